"""How measurements are told: every script prints one section of Markdown to stdout, and progress to stderr."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence

THREADS = 2
"""Of every framework that is measured."""


def section(title: str, text: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A second-level Markdown section: a paragraph, then a table whose first column is text and whose others are figures."""
    lines = [f"## {title}", "", text, "", "| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def peak_memory_bytes() -> int:
    """The largest resident set that this process has had, in bytes; unlike ``getrusage``'s, without that of the process it came from."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


def gigabytes(size_bytes: float) -> str:
    """Size in 10⁹ bytes, for a table.

    >>> gigabytes(1_650_000_000)
    '1.65 GB'
    """
    return f"{size_bytes / 1e9:.2f} GB"


def progress(message: str) -> None:
    """One line for who waits."""
    print(message, file=sys.stderr, flush=True)


class Worker:
    """A process that makes one pass for each line it is given: ``python -m module NAME …``. It answers with seconds, or its peak memory."""

    def __init__(self, module: str, name: str, *arguments: str):
        progress(f"  starting {name}")
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "TF_CPP_MIN_LOG_LEVEL": "2"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, name, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _ask(self, line: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args!r} ended with exit code {self.process.wait()}")
        return float(answer)

    def run(self) -> float:
        """Seconds of one pass."""
        return self._ask("run")

    def finish(self) -> int:
        """Ends the process; its peak memory in bytes."""
        peak_bytes = int(self._ask("peak"))
        self.process.communicate()
        return peak_bytes
