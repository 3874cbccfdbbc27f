"""Kills conversions at many moments; run by test_kill.py in a process that imports TensorFlow once and then only forks.

``python conversion_killer.py SOURCE CONFIG DESTINATION KILLS [--force]`` prints a JSON list, an item for each kill: whether the
conversion was still running, and the names that it left beside the destination.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import time


def main(source: str, config: str, destination: str, kills: str, *flags: str) -> None:
    import tfmaskformer.model  # noqa: F401 - imported before the forks
    from converters.convert import convert

    parent = pathlib.Path(destination).parent

    def start() -> int:
        child = os.fork()
        if child:
            return child
        try:
            convert(source, destination, config, force="--force" in flags)
        finally:
            os._exit(0)

    def snapshot(directory: pathlib.Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in directory.iterdir()} if directory.exists() else {}

    start_s = time.monotonic()
    child = os.fork()
    if not child:
        try:
            convert(source, f"{destination}-reference", config)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    duration_s = time.monotonic() - start_s
    complete = snapshot(pathlib.Path(f"{destination}-reference"))
    allowed = [complete, snapshot(pathlib.Path(destination))]

    results = []
    for number in range(int(kills)):
        child = start()
        time.sleep(duration_s * 1.05 * (number + 0.5) / int(kills))
        running = os.waitpid(child, os.WNOHANG)[0] == 0
        if running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        found = snapshot(pathlib.Path(destination))
        left = [name for name in os.listdir(parent) if name.startswith(f".{pathlib.Path(destination).name}.")]
        results.append({"running": running, "whole": found in allowed, "new": found == complete, "left": left})
        if found == complete and "--force" not in flags:
            for file in pathlib.Path(destination).iterdir():
                file.unlink()
            pathlib.Path(destination).rmdir()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
