"""How measurements are told: every script prints one section of Markdown to stdout, and progress to stderr."""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

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
    """A process that makes one pass for each line it is given: ``python -m module NAME …``. It answers with seconds, or its peak memory.

    It sees no GPU unless it is asked for.
    """

    def __init__(self, module: str, name: str, *arguments: str, gpu: bool = False):
        progress(f"  starting {name}")
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "TF_CPP_MIN_LOG_LEVEL": "2"}
        environment |= {} if gpu else {"CUDA_VISIBLE_DEVICES": "-1"}
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


def official_given() -> bool:
    """Whether the official code can be measured: its folders are named in the environment."""
    return "MASKFORMER_SOURCE" in os.environ and "DETECTRON2_SOURCE" in os.environ


def in_turns(
    module: str, names: Sequence[str], *arguments: str, warm_ups: int, passes: int, gpu: bool = False
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Runs a worker for every name, ``python -m module NAME arguments``, and lets them make their passes in turns.

    Whatever else the machine does meets all of them, and the peak memory of each is its own.

    Returns:
        Name → seconds of each pass after the ``warm_ups``; name → peak memory in bytes.
    """
    workers = {name: Worker(module, name, *arguments, gpu=gpu) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warm_ups + passes):
        for name, worker in workers.items():
            elapsed_s = worker.run()
            if index >= warm_ups:
                seconds[name].append(elapsed_s)
            progress(f"  pass {index + 1} of {warm_ups + passes}: {name}, {elapsed_s:.2f} s")
    return seconds, {name: worker.finish() for name, worker in workers.items()}


def serve(one_pass: Callable[[], Any]) -> int:
    """A worker's side of :func:`in_turns`: makes a pass for every line of stdin, until its peak memory is asked for."""
    for line in sys.stdin:
        if line.strip() == "peak":
            print(peak_memory_bytes(), flush=True)
            continue
        start_s = time.perf_counter()
        one_pass()
        print(time.perf_counter() - start_s, flush=True)
    return 0


def timings(seconds: Mapping[str, Sequence[float]], reference: str, each: int = 1) -> dict[str, list[str]]:
    """Name → median, fastest and ratio of the medians to ``reference``, which is "–" where that was not measured, for a table.

    Args:
        seconds: of every pass.
        reference: the name that all are compared with.
        each: what a pass has of what is timed, by which it is divided.
    """
    medians = {name: statistics.median(values) / each for name, values in seconds.items()}
    return {
        name: [
            f"{medians[name]:.3f} s",
            f"{min(values) / each:.3f} s",
            f"{medians[name] / medians[reference]:.2f}" if reference in medians else "–",
        ]
        for name, values in seconds.items()
    }
