"""Kills conversions at many moments; run by test_kill.py in a process that imports TensorFlow once and then only forks.

``python conversion_killer.py SOURCE CONFIG DESTINATION KILLS [--force]`` prints a JSON list, an item for each kill that met a
running conversion, from its begin to its end: whether the destination is absent or whole, and what was left beside it.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import sys
import time


def main(source: str, config: str, destination: str, kills: str, *flags: str) -> None:
    import tfmaskformer.model  # noqa: F401 - imported before the forks
    from converters.convert import convert

    parent, force = pathlib.Path(destination).parent, "--force" in flags

    def start(directory: str) -> int:
        child = os.fork()
        if child:
            return child
        try:
            convert(source, directory, config, force=force)
        finally:
            os._exit(0)

    def snapshot(directory: pathlib.Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in directory.iterdir()} if directory.exists() else {}

    start_s = time.monotonic()
    os.waitpid(start(f"{destination}-reference"), 0)
    duration_s = time.monotonic() - start_s
    complete = snapshot(pathlib.Path(f"{destination}-reference"))
    allowed = [complete, snapshot(pathlib.Path(destination))]

    results: list[dict[str, object]] = []
    while len(results) < int(kills):
        child = start(destination)
        time.sleep(duration_s * (len(results) + 0.5) / int(kills))
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            left = [name for name in os.listdir(parent) if name.startswith(f".{pathlib.Path(destination).name}.")]
            found = snapshot(pathlib.Path(destination))
            results.append({"whole": found in allowed, "new": found == complete, "left": left})
        else:
            duration_s *= 0.95  # it was over before: this moment again, a little earlier
        if not force:
            shutil.rmtree(destination, ignore_errors=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
