"""Runs every measurement in this folder, one after the other, and writes docs/benchmarks.md from what they print."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from bench.common import progress

ROOT = Path(__file__).parent.parent
SCRIPTS = ("forward", "check", "evaluate", "convert", "assignment")
PACKAGES = ("tensorflow-cpu", "tensorflow", "keras", "numpy", "torch")


def main() -> int:
    """Writes the page; 3 where a measurement fails, and then no page."""
    sections = []
    for script in SCRIPTS:
        progress(f"bench.{script} …")
        result = subprocess.run([sys.executable, "-m", f"bench.{script}"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            progress(f"error: bench.{script} failed with exit code {result.returncode}; docs/benchmarks.md is left as it was")
            return 3
        sections.append(result.stdout)
    page = ROOT / "docs" / "benchmarks.md"
    page.write_text("\n".join([_head(), *sections]), encoding="utf-8")
    print(page.relative_to(ROOT))
    return 0


def _head() -> str:
    versions = ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    return f"""# Benchmarks

Written by `make bench`; every figure is from one run of it.

| | |
|---|---|
| Date | {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d} |
| Machine | {_processor()}, {os.cpu_count()} cores, {os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30:.0f} GiB |
| Versions | Python {platform.python_version()}, {versions} |
"""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
