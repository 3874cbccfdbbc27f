"""Evaluations in processes of their own; run by test_evaluate.py, imports TensorFlow once and then only forks.

``python evaluation_processes.py replicas CKPT DATA`` evaluates with 1, 2 and 4 logical devices of the CPU, and with 2 compiled; the others
are plain graphs, since compiling takes seconds. ``… workers CKPT DATA`` evaluates in two processes together, with 1 and with 2 devices
each, and ``… alone CKPT DATA`` in one. ``… kills CKPT DATA`` kills one evaluation with SIGKILL again and again, each time at another place
of the program, and goes on with what it saved; ``… moments CKPT DATA KILLS [SEED]`` does so at random moments, and begins anew when it is
complete. All print a JSON object: the counts of each run by its name, and, of kills, what each of them left: how many images its state
has, or -1 if it cannot be read.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

DIED = -signal.SIGKILL
WORKERS = 2


def main(what: str, ckpt: str, data: str, kills: str = "0", seed: str = "0") -> None:
    import tensorflow as tf

    from tfmaskformer.checkpoint import read_config
    from tfmaskformer.evaluation import evaluate, sources
    from tfmaskformer.evaluation.devices import strategy_for

    evaluate.SAVE_EVERY = 1
    scratch = pathlib.Path(tempfile.mkdtemp())

    def nothing() -> None:
        pass

    def start(
        name: str,
        resume: str | None = None,
        replicas: int = 1,
        sabotage: Callable[[], None] = nothing,
        compiled: bool = False,
        cluster: str = "",
    ) -> int:
        """A process that writes its counts to ``name``, those of all workers together."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.environ |= {"TF_CONFIG": cluster} if cluster else {}
            if not compiled:
                function = tf.function
                tf.function = lambda *functions, **options: function(*functions, **(options | {"jit_compile": None}))
            strategy = strategy_for("cpu", replicas=replicas)
            source = sources.open_source(data, default_name=read_config(ckpt).dataset, shard=evaluate.worker(strategy))
            metrics = sources.metrics_of(read_config(ckpt), source, instances=True)
            evaluation = evaluate.Evaluation(ckpt, source, strategy, metrics, canvases=[(100, 100)], resume=resume)
            sabotage()
            evaluation.run(tell)
            (scratch / f"{name}.own").write_text(json.dumps(evaluation.counts.done))
            (scratch / f"{name}.new").write_text(json.dumps(evaluation.total().to_dict()))
            os.replace(scratch / f"{name}.new", scratch / name)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def evaluated(*arguments, **options) -> int:
        return ended(start(*arguments, **options))

    def at_rename(number: int, after: bool) -> Callable[[], None]:
        """Dies when the state is saved for the n-th time, before or after it gets its name."""

        def sabotage() -> None:
            rename, calls = tf.io.gfile.rename, []

            def renamed(*args, **kwargs):
                calls.append(args)
                dies = len(calls) == number
                if dies and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                rename(*args, **kwargs)
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)

            tf.io.gfile.rename = renamed

        return sabotage

    def while_counting(number: int) -> Callable[[], None]:
        """Dies when the n-th image has been counted, and not saved."""

        def sabotage() -> None:
            count, calls = evaluate.Evaluation._count, []

            def counted(*args):
                count(*args)
                calls.append(args)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            evaluate.Evaluation._count = counted

        return sabotage

    def read(name: str) -> dict:
        return json.loads((scratch / name).read_text())

    def left_by_kill() -> int:
        """How many images the state has; 0 where there is none yet."""
        try:
            return len(read("resume/state-0-of-1.json")["counts"]["done"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError):
            return -1

    def tell(done: int, images: int) -> None:
        (scratch / "progress").write_text(str(done))

    def done() -> int:
        """How many images the process has told of; -1 before it begins with them."""
        try:
            return int((scratch / "progress").read_text())
        except (OSError, ValueError):
            return -1

    resume = str(scratch / "resume")
    result: dict[str, object] = {}
    if what == "replicas":
        names = ["1", "2", "4", "2 compiled"]
        codes = [evaluated(name, replicas=int(name[0]), compiled="compiled" in name) for name in names]
    elif what == "alone":
        names, codes = ["alone"], [evaluated("alone")]
    elif what == "workers":
        names = ["1 device", "2 devices"]
        codes = []
        for replicas, name in enumerate(names, 1):
            workers = [f"localhost:{port}" for port in free_ports(WORKERS)]
            clusters = [{"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}} for index in range(WORKERS)]
            children = [start(f"{name} {index}", resume, replicas, cluster=json.dumps(cluster)) for index, cluster in enumerate(clusters)]
            codes += [ended(child) for child in children]
            shutil.rmtree(resume)
        result["own"] = [[read(f"{name} {index}.own") for index in range(WORKERS)] for name in names]
        names = [f"{name} {index}" for name in names for index in range(WORKERS)]
    elif what == "kills":
        left = []
        for sabotage in (at_rename(2, after=False), at_rename(1, after=True), while_counting(2)):
            assert evaluated("killed", resume, sabotage=sabotage) == DIED
            left.append(left_by_kill())
        result["left"] = left
        names = ["killed", "whole"]
        codes = [evaluated("killed", resume), evaluated("whole")]
    else:
        codes = [evaluated("whole")]
        moments = random.Random(int(seed))
        names, left, before = ["whole"], [], 0
        while len(left) < int(kills):
            for name in ("killed", "progress"):
                (scratch / name).unlink(missing_ok=True)
            child = start("killed", resume)
            # Most of the time goes into the model and its graph: a random number of images later, and then at a random moment.
            later = before + moments.randrange(4)
            while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) and done() < later:
                time.sleep(0.002)
            time.sleep(0.1 * moments.random())
            os.kill(child, signal.SIGKILL)
            if ended(child) == DIED and not (scratch / "killed").exists():
                left.append({"before": before, "after": left_by_kill()})
                before = left_by_kill()
            else:  # it was over before: judge it, and begin anew
                names.append(f"completed {len(left)}")
                shutil.move(scratch / "killed", scratch / names[-1])
                shutil.rmtree(resume)
                before = 0
        codes.append(evaluated("killed", resume))
        names.append("killed")
        result["left"] = left
    assert codes == [0] * len(codes), codes
    print(json.dumps(result | {"counts": {name: read(name) for name in names}}))
    shutil.rmtree(scratch)


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("localhost", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    main(*sys.argv[1:])
