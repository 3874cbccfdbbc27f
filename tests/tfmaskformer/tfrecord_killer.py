"""Kills TFRecord builds with SIGKILL; run by test_data_tfrecords.py in a process that imports TensorFlow once and then only forks.

``python tfrecord_killer.py DATA KILLS`` prints a JSON object. For each kill of a running build: how many shards the manifest then has
(``finished``), whether it is readable and those are on disk with its checksums (``whole``), and whether all that were finished before are
the same files (``kept``). At the end: whether the build that was killed and resumed again and again has the bytes of one that was not
(``same_bytes``).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

SHARDS = 8


def main(data: str, kills: str) -> None:
    from tfmaskformer.data import tfrecords  # imported before the forks
    from tfmaskformer.data.datasets import open_dataset

    reference, out = pathlib.Path(data, "reference"), pathlib.Path(data, "killed")

    def start(destination: pathlib.Path) -> int:
        child = os.fork()
        if child:
            return child
        try:
            tfrecords.build(open_dataset("coco_panoptic", data), destination, shards=SHARDS)
        finally:
            os._exit(0)

    def state() -> tuple[dict[str, tuple[int, int]], bool, bool]:
        """(inode, mtime) of the finished shards, whether they are whole, and whether the build is complete."""
        if not (out / "manifest.json").exists():
            return {}, True, False
        manifest = json.loads((out / "manifest.json").read_text())
        shards = manifest["shards"]
        stats = {name: (out / name).stat() for name in shards}
        whole = all(hashlib.sha256((out / name).read_bytes()).hexdigest() == shard["sha256"] for name, shard in shards.items())
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}, whole, manifest["complete"]

    os.waitpid(start(reference), 0)
    moments = random.Random(0)
    results: list[dict[str, object]] = []
    same_bytes = True
    while len(results) < int(kills):
        before, _, complete = state()
        if complete:  # judge it, and begin anew
            same_bytes &= contents(out) == contents(reference)
            shutil.rmtree(out)
            before = {}
        more, rest = moments.randrange(3), moments.random()
        child, start_s, over = start(out), time.monotonic(), False
        while not over and len(state()[0]) < len(before) + more:  # a moment of the build, however fast the machine is just now
            time.sleep(0.002)
            over = os.waitpid(child, os.WNOHANG)[0] != 0
        time.sleep(rest * (time.monotonic() - start_s) / (more + 1))
        if over or os.waitpid(child, os.WNOHANG)[0]:
            continue  # it was over before
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after, whole, _ = state()
        results.append({"finished": len(after), "kept": before.items() <= after.items(), "whole": whole})
    os.waitpid(start(out), 0)
    same_bytes &= contents(out) == contents(reference)
    print(json.dumps({"kills": results, "shards": SHARDS, "same_bytes": same_bytes}))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """All files; what a killed build left is gone."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


if __name__ == "__main__":
    main(*sys.argv[1:])
