"""A full check of R50 panoptic at 640×640 px, beside one training step of the official PyTorch code.

The check: forward pass with every tap, matcher, losses, gradients, inference, and one training step, in float32, all of it compared with a
recording of the official code. What it costs besides is told apart: the self-test of the machine, once in a process; loading; tracing, once
for a shape; the recording; and the same in float64. The official step is forward pass, losses, gradients, clipping and AdamW. Every side
runs in a process of its own, one after the other. Needs ``MASKFORMER_SOURCE`` and ``DETECTRON2_SOURCE``.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import checkpoints.registry
from bench.common import THREADS, Worker, gigabytes, official_given, peak_memory_bytes, progress, section, serve
from checkpoints import synthesize

ENTRY = "maskformer_panoptic_R50_bs64_554k"
SIZE_PX, OBJECTS, SAMPLES = 640, 12, 32
WARM_UPS, PASSES = 1, 5
PHOTO = Path(checkpoints.registry.__file__).parent / "photos" / "coffee.png"
CASE = f"bench={PHOTO}@{SIZE_PX}x{SIZE_PX}:{OBJECTS}"


def main() -> int:
    """Measures and prints the section; nothing where the official code is not there."""
    if not official_given():
        progress("  no official code: MASKFORMER_SOURCE, DETECTRON2_SOURCE")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        worker = Worker("bench.check", "official", folder)
        steps_s = [worker.run() for _ in range(WARM_UPS + PASSES)][WARM_UPS:]
        step_s, step_bytes = statistics.median(steps_s), worker.finish()
        progress(f"  one official step: {step_s:.2f} s")
        source = scratch / "model_final.pkl"
        synthesize.write_pickle(synthesize.synthesize(checkpoints.registry.entry(ENTRY)), source)
        recording_s = _recorded(scratch)
        runs = {dtype: _run_apart(dtype, scratch) for dtype in ("float32", "float64")}

    ours = runs["float32"]
    check_s = ours["run"] + ours["compare"]
    rows = [
        ["one official training step", f"{step_s:.2f} s", "1.00", gigabytes(step_bytes)],
        ["the check: TensorFlow", f"{ours['run']:.2f} s", f"{ours['run'] / step_s:.2f}", ""],
        ["the check: comparing", f"{ours['compare']:.2f} s", f"{ours['compare'] / step_s:.2f}", ""],
        ["the check, both", f"{check_s:.2f} s", f"{check_s / step_s:.2f}", gigabytes(ours["peak"])],
        ["apart: tracing", f"{ours['trace']:.2f} s", f"{ours['trace'] / step_s:.2f}", ""],
        ["apart: loading two models, one with an optimizer", f"{ours['load']:.2f} s", f"{ours['load'] / step_s:.2f}", ""],
        ["apart: self-test of the machine", f"{ours['examine']:.2f} s", f"{ours['examine'] / step_s:.2f}", ""],
    ]
    both_s = sum(runs["float64"][key] for key in ("run", "compare", "trace"))
    rows += [
        ["apart: the same in float64, with its tracing", f"{both_s:.2f} s", f"{both_s / step_s:.2f}", gigabytes(runs["float64"]["peak"])],
        ["apart: recording with the official code", f"{recording_s:.2f} s", f"{recording_s / step_s:.2f}", ""],
    ]
    text = (
        f"`python -m bench.check`: {ENTRY}, one photograph of {SIZE_PX}×{SIZE_PX} px with {OBJECTS} objects, {THREADS} threads; official "
        f"step: median of {PASSES}. The check: every tap, cost, assignment, loss, gradient and result, and one training step, in graph "
        f"mode, against a recording with {SAMPLES} elements, sketches and statistics of each large tensor; for that TensorFlow runs "
        "forward with taps and back, forward without taps, and a training step. Target: both together within 4 × the official step. "
        "Memory: the process's peak."
    )
    print(section("A full check", text, ["", "time", "ratio", "peak memory"], rows))
    return 0


def _recorded(scratch: Path) -> float:
    """Seconds of recording the case, and one step of training."""
    config = checkpoints.registry.entry(ENTRY).official_config.removeprefix("configs/")
    common = ["--src", str(scratch / "model_final.pkl"), "--config", config, "--case", CASE, "--samples", str(SAMPLES)]
    start_s = time.monotonic()
    for command, out, more in (("record", "trace", []), ("record-steps", "trace/steps", ["--steps", "1", "--training", "plain"])):
        arguments = [sys.executable, "-m", "parity.cli", command, *common, "--out", str(scratch / out), *more]
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start_s


def _run_apart(dtype: str, scratch: Path) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-m", "bench.check", dtype, str(scratch)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def _check(dtype: str, scratch: Path) -> int:
    """Checks, and prints the seconds of what TensorFlow ran, of tracing, loading, the self-test and all the rest, and the peak memory, as
    JSON.
    """
    import tensorflow as tf

    from converters.convert import convert
    from parity import check, probes, report_text
    from tfmaskformer import checkpoint
    from tfmaskformer.training import optimizer

    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    if not (scratch / "tf_ckpt").exists():
        convert(scratch / "model_final.pkl", scratch / "tf_ckpt", ENTRY)
    seconds = dict.fromkeys(("run", "trace", "load", "examine"), 0.0)
    function, load, build, examine = tf.function, checkpoint.load, optimizer.build_optimizer, probes.examine

    def timed(key: str, do: Any, *arguments: Any, **options: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return do(*arguments, **options)
        finally:
            seconds[key] += time.perf_counter() - start_s

    def warm_up(concrete: Any, arguments: Any) -> None:
        """The first call, which optimizes the graph; variables are as before when it returns."""
        before = [variable.numpy() for variable in concrete.variables]
        concrete(*arguments)
        for variable, value in zip(concrete.variables, before, strict=True):
            variable.assign(value)

    def timed_function(do: Any = None, **options: Any) -> Any:
        if do is None:
            return lambda do: timed_function(do, **options)
        compiled = function(do, **options)

        def call(*arguments: Any) -> Any:
            concrete = timed("trace", compiled.get_concrete_function, *arguments)
            timed("trace", warm_up, concrete, arguments)
            return timed("run", concrete, *arguments)

        return call

    with (
        mock.patch.object(tf, "function", timed_function),
        mock.patch.object(checkpoint, "load", functools.partial(timed, "load", load)),
        mock.patch.object(optimizer, "build_optimizer", functools.partial(timed, "load", build)),
        mock.patch.object(probes, "examine", functools.partial(timed, "examine", examine)),
    ):
        gc.freeze()  # as the command does
        start_s = time.perf_counter()
        result = check.check(check.Settings(str(scratch / "tf_ckpt"), str(scratch / "trace"), (dtype,), all_stages=True))
        all_s = time.perf_counter() - start_s
    for line in () if result.passed else report_text.verdict(result):
        progress(f"  {dtype}: {line}")
    compare_s = all_s - sum(seconds.values())
    print(json.dumps({**seconds, "compare": compare_s, "peak": peak_memory_bytes()}))
    return 0


def _official() -> int:
    """One training step for each line."""
    import numpy as np
    import torch

    from parity import official
    from parity.inputs import make_targets, parse_case

    torch.set_num_threads(THREADS)
    code = official.load()
    from detectron2.structures import Instances

    entry = checkpoints.registry.entry(ENTRY)
    model = code.model(code.config(entry.official_config.removeprefix("configs/"))).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    pixels = parse_case(CASE).images[0].read()
    labels, masks = make_targets(SIZE_PX, SIZE_PX, OBJECTS, model.sem_seg_head.num_classes, "bench")
    instances = Instances((SIZE_PX, SIZE_PX), gt_classes=torch.from_numpy(labels), gt_masks=torch.from_numpy(np.asarray(masks)))
    batch = [{"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "instances": instances}]

    def step() -> None:
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()

    return serve(step)


def _worker(name: str, folder: str) -> int:
    return _official() if name == "official" else _check(name, Path(folder))


if __name__ == "__main__":
    sys.exit(_worker(*sys.argv[1:]) if len(sys.argv) > 1 else main())
