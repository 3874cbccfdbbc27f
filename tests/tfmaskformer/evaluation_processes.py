"""Evaluations in processes of their own; run by test_evaluate.py, imports TensorFlow once and then only forks.

``python evaluation_processes.py replicas CKPT DATA`` evaluates with 1, 2 and 4 logical devices of the CPU, and with 2 compiled; the others
are plain graphs, since compiling takes seconds. ``… kills CKPT DATA`` kills one evaluation with SIGKILL again and again, each time
elsewhere, and goes on with what it saved. Both print a JSON object: the counts of each run by its name, and, of kills, what each of them
left: how many images its state has, or -1 if it cannot be read.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Callable

DIED = -signal.SIGKILL


def main(what: str, ckpt: str, data: str) -> None:
    import tensorflow as tf

    from tfmaskformer.checkpoint import read_config
    from tfmaskformer.evaluation import evaluate, sources
    from tfmaskformer.evaluation.devices import strategy_for

    evaluate.SAVE_EVERY = 1
    scratch = pathlib.Path(tempfile.mkdtemp())

    def evaluated(name: str, resume: str | None, replicas: int, sabotage: Callable[[], None], compiled: bool = False) -> int:
        """Exit code of a process that writes its counts to ``name``."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 1
        try:
            if not compiled:
                function = tf.function
                tf.function = lambda **options: function(**(options | {"jit_compile": None}))
            strategy = strategy_for("cpu", replicas=replicas)
            source = sources.open_source(data, default_name=read_config(ckpt).dataset)
            metrics = sources.metrics_of(read_config(ckpt), source)
            evaluation = evaluate.Evaluation(ckpt, source, strategy, metrics, canvases=[(100, 100)], resume=resume)
            sabotage()
            evaluation.run()
            (scratch / name).write_text(json.dumps(evaluation.counts.to_dict()))
            code = 0
        finally:
            os._exit(code)

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

    def nothing() -> None:
        pass

    left = []
    if what == "replicas":
        names = ["1", "2", "4", "2 compiled"]
        codes = [evaluated(name, None, int(name[0]), nothing, "compiled" in name) for name in names]
        assert codes == [0] * 4, codes
    else:
        resume = str(scratch / "resume")
        for sabotage in (at_rename(2, after=False), at_rename(1, after=True), while_counting(2)):
            assert evaluated("killed", resume, 1, sabotage) == DIED
            try:
                left.append(len(json.loads((scratch / "resume" / "state-0-of-1.json").read_text())["counts"]["done"]))
            except (OSError, ValueError):
                left.append(-1)
        names = ["killed", "whole"]
        codes = [evaluated("killed", resume, 1, nothing), evaluated("whole", None, 1, nothing)]
        assert codes == [0, 0], codes
    print(json.dumps({"left": left, "counts": {name: json.loads((scratch / name).read_text()) for name in names}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
