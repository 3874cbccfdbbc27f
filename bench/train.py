"""Forward pass, losses and gradients of R50 panoptic at 640×640, batch 1 and 2: TensorFlow beside the official PyTorch code.

What a training step does before its update, dropout and the matcher included, at initial weights. Both sides see the same photograph with
the same objects. Every framework runs in a process of its own, and they take turns. The official code is measured where
``MASKFORMER_SOURCE`` and ``DETECTRON2_SOURCE`` name its folders.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints.registry
from bench.common import THREADS, gigabytes, in_turns, official_given, section, serve, timings

ENTRY = "maskformer_panoptic_R50_bs64_554k"
SIZE_PX, OBJECTS = 640, 12
BATCHES = (1, 2)
WARM_UPS, PASSES = 2, 7
OFFICIAL, GRAPH, XLA = "PyTorch, official", "TensorFlow, graph", "TensorFlow, XLA"
PHOTO = Path(checkpoints.registry.__file__).parent / "photos" / "coffee.png"


def main() -> int:
    """Measures and prints the section."""
    rows = measured(BATCHES)
    text = (
        f"`python -m bench.train`: {ENTRY}, photographs of {SIZE_PX}×{SIZE_PX} px with {OBJECTS} objects each, float32, {THREADS} threads: "
        f"forward pass, matcher, losses and gradients of all parameters, with dropout; {PASSES} passes each, taken in turns. "
        "Ratio: of the medians, to the official code for the same batch. Memory: the process's peak."
    )
    print(section("Gradients", text, ["", "median", "fastest", "ratio", "peak memory"], rows))
    return 0


def measured(batches: Sequence[int], gpu: bool = False) -> list[list[str]]:
    """A row of the table for each framework and batch; of a GPU without its last column, for the memory of its frameworks is its own."""
    names = [OFFICIAL, GRAPH, XLA] if official_given() else [GRAPH, XLA]
    rows = []
    for batch in batches:
        device = "gpu" if gpu else "cpu"
        seconds, peaks = in_turns("bench.train", names, str(batch), device, warm_ups=WARM_UPS, passes=PASSES, gpu=gpu)
        for name, timing in timings(seconds, OFFICIAL).items():
            rows.append([f"{name}, batch {batch}", *timing, *([] if gpu else [gigabytes(peaks[name])])])
    return rows


def _examples(batch: int, classes: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pixels uint8 [height, width, 3], labels int64 [objects] and masks bool [objects, height, width] of each image."""
    from parity.inputs import make_targets, parse_case

    pixels = parse_case(f"bench={PHOTO}@{SIZE_PX}x{SIZE_PX}:{OBJECTS}").images[0].read()
    return [(pixels, *make_targets(SIZE_PX, SIZE_PX, OBJECTS, classes, f"bench {index}")) for index in range(batch)]


def _tensorflow(batch: int, gpu: bool, jit_compile: bool) -> Callable[[], Any]:
    import tensorflow as tf

    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.training.optimizer import build_optimizer
    from tfmaskformer.training.recipe import Recipe
    from tfmaskformer.training.step import TrainStep

    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    config = MaskFormerConfig.from_dict(checkpoints.registry.entry(ENTRY).config)
    model = MaskFormer(config)
    model.build_parameters()
    step = TrainStep(model, build_optimizer(Recipe(), model))
    pixels, labels, masks = (tf.constant(np.stack(parts)) for parts in zip(*_examples(batch, config.num_classes), strict=True))
    targets = {"labels": labels, "masks": masks, "num_objects": tf.fill([batch], OBJECTS)}
    function = tf.function(step.gradients, jit_compile=jit_compile)

    def one_pass() -> None:
        gradients = function(pixels, None, targets)[1]
        if gpu:
            tf.test.experimental.sync_devices()
            return
        for gradient in gradients:  # a tensor is there when its value is read
            if gradient is not None:
                gradient.numpy()

    return one_pass


def _official(batch: int, gpu: bool) -> Callable[[], Any]:
    import torch

    from parity import official

    torch.set_num_threads(THREADS)
    torch.backends.cudnn.allow_tf32 = False  # as `tfmaskformer train` has it
    code = official.load()
    from detectron2.structures import Instances

    model = code.model(code.config(checkpoints.registry.entry(ENTRY).official_config.removeprefix("configs/"))).train()
    model.to("cuda" if gpu else "cpu")
    inputs = []
    for pixels, labels, masks in _examples(batch, model.sem_seg_head.num_classes):
        instances = Instances((SIZE_PX, SIZE_PX), gt_classes=torch.from_numpy(labels), gt_masks=torch.from_numpy(masks))
        inputs.append({"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "instances": instances})

    def one_pass() -> None:
        model.zero_grad()
        sum(model(inputs).values()).backward()
        if gpu:
            torch.cuda.synchronize()

    return one_pass


def _worker(name: str, batch: str, device: str) -> int:
    what = int(batch), device == "gpu"
    return serve(_official(*what) if name == OFFICIAL else _tensorflow(*what, jit_compile=name == XLA))


if __name__ == "__main__":
    sys.exit(_worker(*sys.argv[1:]) if len(sys.argv) > 1 else main())
