"""Runs every measurement in this folder, one after the other, and writes docs/benchmarks.md from what they print."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from bench.common import progress

ROOT = Path(__file__).parent.parent
SCRIPTS = ("forward", "train", "gpu", "data", "check", "evaluate", "convert", "assignment")
PACKAGES = ("tensorflow-cpu", "tensorflow", "keras", "numpy", "torch")


def main() -> int:
    """Measures all sections, or those that are named, and writes the page, on which the others stay; 3 where a measurement fails."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures, and writes docs/benchmarks.md.")
    parser.add_argument("names", nargs="*", choices=[[], *SCRIPTS], metavar="NAME", help=f"one of {', '.join(SCRIPTS)} (default: all)")
    page = ROOT / "docs" / "benchmarks.md"
    sections = _sections(page.read_text(encoding="utf-8")) if page.exists() else {}
    for script in parser.parse_args().names or SCRIPTS:
        progress(f"bench.{script} …")
        result = subprocess.run([sys.executable, "-m", f"bench.{script}"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            progress(f"error: bench.{script} failed with exit code {result.returncode}; its section is left as it was")
            return 3
        if result.stdout:
            sections[script] = f"{result.stdout.rstrip()}\n\n{_when()}\n"
        page.write_text(_page(sections), encoding="utf-8")
    print(page.relative_to(ROOT))
    return 0


MARK = "<!-- bench.{} -->"


def _sections(page: str) -> dict[str, str]:
    """Script → its section, of an earlier page.

    >>> _sections(_page({"convert": "## Conversion"}))
    {'convert': '## Conversion\\n'}
    """
    found = {}
    for script in SCRIPTS:
        _, mark, rest = page.partition(MARK.format(script) + "\n")
        if mark:
            found[script] = rest.split("<!-- bench.")[0].strip() + "\n"
    return found


def _page(sections: Mapping[str, str]) -> str:
    parts = [f"{MARK.format(script)}\n{sections[script]}" for script in SCRIPTS if script in sections]
    written = (
        "Written by `make bench`; every section is from one run of its script. `bench.gpu` adds its own where it finds an NVIDIA GPU. "
        "Rows of the official code need PyTorch and the two folders of [recording](recording.md); without them they are left out."
    )
    return "\n".join([f"# Benchmarks\n\n{written}\n", *parts])


def _when() -> str:
    """Date, machine and versions, in a line."""
    versions = ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    machine = f"{_processor()}, {os.cpu_count()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    return f"Measured {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d} on {machine}; Python {platform.python_version()}, {versions}."


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
