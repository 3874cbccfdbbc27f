"""Trainings in processes of their own; run by test_training_loop.py, imports TensorFlow once and then only forks.

``python training_processes.py replicas DATA OUT`` trains on two devices of one process, and in two processes; ``… kills DATA OUT KILLS
[SEED]`` trains once undisturbed (``whole``), kills another training with SIGKILL at random moments, goes on with what it left, and begins
anew when it is complete. Folders of trainings are in OUT; a JSON object is printed: of each kill, the last step that had been told, and the
step of the checkpoint that it left, 0 for none and -1 where it cannot be read.
"""

from __future__ import annotations

import contextlib
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
STEPS = 8
DIED = -signal.SIGKILL


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

    def start(name: str, *more: str, cluster: str = "", **options: object) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.environ |= {"TF_CONFIG": cluster} if cluster else {}
            with open(folder / f"{name}.log", "w", buffering=1) as log, contextlib.redirect_stderr(log):
                code = cli.main(arguments(data, folder / name, *more, **options))
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    result: dict[str, object] = {}
    if what == "replicas":
        codes = [ended(start("two", "--replicas", "2", SOLVER__MAX_ITER=2))]
        workers = [f"localhost:{port}" for port in free_ports(2)]
        clusters = [json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}) for index in range(2)]
        codes += map(ended, [start("workers", cluster=cluster, SOLVER__MAX_ITER=2) for cluster in clusters])
    else:
        moments = random.Random(int(seed))
        codes, left, before = [ended(start("whole", SOLVER__MAX_ITER=STEPS, **QUICK))], [], 0
        while len(left) < int(kills):
            (folder / "killed.log").unlink(missing_ok=True)
            child = start("killed", SOLVER__MAX_ITER=STEPS, **QUICK)
            # Most of the time goes into the model and its graph: a random number of steps later, and then at a random moment.
            later = before + moments.randrange(4)
            while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) and told(folder) < later:
                time.sleep(0.002)
            time.sleep(0.1 * moments.random())
            os.kill(child, signal.SIGKILL)
            code = ended(child)
            assert code in (0, DIED), (folder / "killed.log").read_text()
            if code == DIED and (after := left_by_kill(folder)) < STEPS:
                left.append({"told": max(told(folder), before), "checkpoint": after})
                before = max(after, 0)
            else:  # it was over before: judge it, and begin anew
                shutil.move(folder / "killed", folder / f"completed-{len(left)}")
                before = 0
        codes.append(ended(start("killed", SOLVER__MAX_ITER=STEPS, **QUICK)))
        result["left"] = left
    assert codes == [0] * len(codes), codes
    print(json.dumps(result))


def told(folder: pathlib.Path) -> int:
    """The last step of which a training has told."""
    try:
        steps = re.findall(r"^step (\d+) of", (folder / "killed.log").read_text(), re.MULTILINE)
    except OSError:
        steps = []
    return int(steps[-1]) if steps else 0


def left_by_kill(folder: pathlib.Path) -> int:
    """The step of the last checkpoint, all of whose tensors can be read; 0 where there is none yet, -1 where it cannot be read."""
    import tensorflow as tf

    prefix = tf.train.latest_checkpoint(str(folder / "killed"))
    if prefix is None:
        return 0
    try:
        reader = tf.train.load_checkpoint(prefix)
        for key in reader.get_variable_to_shape_map():
            reader.get_tensor(key)
        return int(reader.get_tensor("optimizer/_iterations/.ATTRIBUTES/VARIABLE_VALUE"))
    except (tf.errors.OpError, RuntimeError, ValueError):
        return -1


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("localhost", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    main(*sys.argv[1:])
