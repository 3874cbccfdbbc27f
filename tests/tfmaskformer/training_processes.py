"""Trainings in processes of their own; run by test_training_loop.py, imports TensorFlow once and then only forks.

``python training_processes.py replicas DATA OUT`` trains on two devices of one process, in two processes, and in two that were not told the
same (``apart``); ``… model_garden DATA OUT`` on two devices, and by the Model Garden, with the parameters in ``OUT/values.yaml``, on two
devices and in two processes, which are stopped once; ``… kills DATA OUT KILLS [SEED]`` trains once undisturbed (``whole``), kills another
training with SIGKILL at random moments, goes on with what it left, and begins anew when it is complete (``completed-…``). Folders of
trainings are in OUT; a JSON object is printed: how the two that are ``apart`` ended, which get SIGTERM at their end; of each kill, the last
step that had been told, the step of the checkpoint that it left, 0 for none and -1 where it cannot be read, and what it interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

OPTIONS = {
    "DATASETS.TRAIN": "('shapes_train',)",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 7,
    "MODEL.SWIN.EMBED_DIM": 12,
    "MODEL.SWIN.DEPTHS": [1, 1, 1, 1],
    "MODEL.SWIN.NUM_HEADS": [2, 3, 4, 6],
    "MODEL.SWIN.WINDOW_SIZE": 3,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 16,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 10,
    "INPUT.MIN_SIZE_TRAIN": "(64, 72)",
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.CROP.ENABLED": False,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.BASE_LR": 1e-3,
    "SOLVER.STEPS": "()",
    "SOLVER.CHECKPOINT_PERIOD": 2,
}
"""Of ``tiny_swin``, for the data set of shapes; with dropout and stochastic depth, as upstream."""

QUICK = {"MODEL__MASK_FORMER__DEC_LAYERS": 1, "SOLVER__OPTIMIZER": "SGD"}
"""Little to trace."""
QUICKEST = {
    "MODEL__META_ARCHITECTURE": "SemanticSegmentor",
    "MODEL__SEM_SEG_HEAD__NAME": "PerPixelBaselineHead",
    "MODEL__MASK_FORMER__TEST__PANOPTIC_ON": False,
    "INPUT__DATASET_MAPPER_NAME": "mask_former_semantic",
    "SOLVER__OPTIMIZER": "SGD",
}
"""Even less: a per-pixel baseline, with stochastic depth and momentum."""
STEPS, EVAL_PERIOD = 8, 4
DIED = -signal.SIGKILL

MOMENTS = {"anywhere": (-4.0, 0.0), "saving": (-4.0, -1.5), "evaluating": (-3.0, 0.5)}
"""When a training is killed, in turns: after some changes in its folder; while a checkpoint that does not count yet is there; while an
evaluation is missing. And how much later: a random power of ten, in seconds, with an exponent in this range."""

CHANGES = 25
"""So many changes at most are waited for: about half of what a whole training makes."""


def arguments(data: object, out: object, *more: str, **options: object) -> list[str]:
    """Of ``tfmaskformer train``; in keywords ``__`` stands for a dot."""
    values = OPTIONS | {key.replace("__", "."): value for key, value in options.items()}
    pairs = [str(part) for item in values.items() for part in item]
    return ["--config", "tiny_swin", "--data", str(data), "--out", str(out), "--cpu", *more, *pairs]


def plain(module) -> None:
    """Neither XLA nor the optimisation of graphs: both take longer than the few steps that are trained."""
    function = module.function
    module.function = lambda *functions, **options: function(*functions, **(options | {"jit_compile": None}))
    module.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def main(what: str, data: str, out: str, kills: str = "0", seed: str = "0") -> None:
    import tensorflow as tf

    from tfmaskformer.training import cli, loop

    folder = pathlib.Path(out)
    plain(tf)
    loop.LOG_PERIOD = 1

    def start(name: str, *more: str, cluster: str = "", log: str = "", run: Callable[[], int] | None = None, **options: object) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.environ |= {"TF_CONFIG": cluster} if cluster else {}
            with open(folder / f"{log or name}.log", "w", buffering=1) as file, contextlib.redirect_stderr(file):
                code = run() if run else cli.main(arguments(data, folder / name, *more, **options))
                if log:
                    print(f"code {code}", file=file)
                    os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    result: dict[str, object] = {}
    if what == "replicas":
        codes = [ended(start("two", "--replicas", "2", SOLVER__MAX_ITER=2))]
        codes += map(ended, [start("workers", cluster=cluster, SOLVER__MAX_ITER=2) for cluster in clusters()])
        apart = [start("apart", cluster=cluster, log=f"apart{seed}", SEED=seed) for seed, cluster in enumerate(clusters())]
        result["apart"] = [ended(child) for child in apart]
    elif what == "model_garden":
        codes = [ended(start("two", "--replicas", "2", "--max-objects", "3", SOLVER__MAX_ITER=3))]
        codes.append(ended(start("replicas", run=functools.partial(model_garden, folder, "replicas", 3, replicas=2))))
        for steps in (2, 3):
            run = functools.partial(model_garden, folder, "workers", steps)
            codes += map(ended, [start("workers", cluster=cluster, run=run) for cluster in clusters()])
    else:
        options = {"SOLVER__MAX_ITER": STEPS, "TEST__EVAL_PERIOD": EVAL_PERIOD, "MODEL__MASK_FORMER__DEC_LAYERS": 1}
        moments = random.Random(int(seed))
        codes, left, before, killed = [ended(start("whole", **options))], [], 0, folder / "killed"
        while len(left) < int(kills):
            (folder / "killed.log").unlink(missing_ok=True)
            moment = list(MOMENTS)[len(left) % len(MOMENTS)]
            was, changes = found(killed), moments.randrange(CHANGES)
            child, last = start("killed", **options), was
            while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                now = found(killed)
                changes -= now != last
                last = now
                started = {"anywhere": changes < 0, "saving": bool(now.unfinished - was.unfinished), "evaluating": now.evaluating}
                if started[moment]:
                    time.sleep(10 ** moments.uniform(*MOMENTS[moment]))
                    break
                time.sleep(0.0005)
            os.kill(child, signal.SIGKILL)
            code = ended(child)
            assert code in (0, DIED), (folder / "killed.log").read_text()
            if code == DIED:
                now, before = found(killed), max(now.told, before)
                saving, evaluating = bool(now.unfinished - was.unfinished), now.evaluating
                left.append({"told": before, "checkpoint": left_by_kill(killed), "saving": saving, "evaluating": evaluating})
                before = min(before, max(left[-1]["checkpoint"], 0))
            else:  # it was over before: judge it, and begin anew
                shutil.move(killed, folder / f"completed-{len(left)}")
                before = 0
        codes.append(ended(start("killed", **options)))
        result["left"] = left
    assert codes == [0] * len(codes), codes
    print(json.dumps(result))


def model_garden(folder: pathlib.Path, name: str, steps: int, replicas: int = 1) -> int:
    """By the Model Garden's driver, with the parameters in ``values.yaml``; on several workers, or on several replicas of one CPU."""
    from official.common import distribute_utils

    from tfmaskformer.evaluation.devices import strategy_for
    from tfmaskformer.model_garden import __main__ as driver

    if replicas > 1:  # the Model Garden makes none of one CPU
        distribute_utils.get_distribution_strategy = lambda **options: strategy_for("cpu", replicas=replicas)
    changes = f"trainer.train_steps={steps},runtime.distribution_strategy=multi_worker_mirrored"
    where = ["--model_dir", str(folder / name), "--config_file", str(folder / "values.yaml"), "--params_override", changes]
    return driver.main(["--experiment", "maskformer_panoptic_R50_bs64_554k", "--mode", "train_and_eval", *where])


class Found(NamedTuple):
    """What can be seen of a training: the last step that it told, all files with their sizes, those of a checkpoint that does not count
    yet, and whether the last one that counts has still to be evaluated."""

    told: int
    files: frozenset[tuple[str, int, int]]
    unfinished: frozenset[tuple[str, int, int]]
    evaluating: bool


def found(folder: pathlib.Path) -> Found:
    files = set()
    with contextlib.suppress(FileNotFoundError):  # of files that come and go
        for entry in os.scandir(folder):
            files.add((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns))
    texts = []
    for file in (folder.with_suffix(".log"), folder / "checkpoint"):
        texts.append(file.read_text() if file.exists() else "")
    steps = re.findall(r"^step (\d+) of", texts[0], re.MULTILINE)
    counts = {int(step) for step in re.findall(r"ckpt-(\d+)", texts[1])}
    last = max(counts, default=0)
    unfinished = {file for file in files if (step := re.match(r"ckpt-(\d+)", file[0])) and int(step[1]) > last}
    evaluating = last > 0 and last % EVAL_PERIOD == 0 and not (folder / f"evaluation-{last}.json").exists()
    return Found(int(steps[-1]) if steps else 0, frozenset(files), frozenset(unfinished), evaluating)


def left_by_kill(folder: pathlib.Path) -> int:
    """The step of the last checkpoint, all of whose tensors can be read; 0 where there is none yet, -1 where it cannot be read."""
    import tensorflow as tf

    prefix = tf.train.latest_checkpoint(str(folder))
    if prefix is None:
        return 0
    try:
        reader = tf.train.load_checkpoint(prefix)
        for key in reader.get_variable_to_shape_map():
            reader.get_tensor(key)
        return int(reader.get_tensor("optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE"))
    except (tf.errors.OpError, RuntimeError, ValueError):
        return -1


def clusters() -> list[str]:
    """``TF_CONFIG`` of each of two workers."""
    workers = [f"localhost:{port}" for port in free_ports(2)]
    return [json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}) for index in range(2)]


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("localhost", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    main(*sys.argv[1:])
