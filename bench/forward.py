"""One forward pass of R50 panoptic at 640×640, batch 1: TensorFlow beside the official PyTorch code.

Every framework runs in a process of its own, so that its peak memory is its own; the processes take turns, one pass each, so that
whatever else the machine does meets all of them. Both networks see the same uint8 image and compute all outputs, those of the
earlier decoder layers too, at their initial weights. The official code is measured where ``MASKFORMER_SOURCE`` and
``DETECTRON2_SOURCE`` name its folders.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import checkpoints.registry
from bench.common import THREADS, gigabytes, in_turns, official_given, section, serve, timings

ENTRY = "maskformer_panoptic_R50_bs64_554k"
SIZE_PX = 640
WARM_UPS, PASSES = 2, 15
OFFICIAL = ("PyTorch, official", "PyTorch, official, channels last")


def main() -> int:
    """Measures and prints the section."""
    names = [*OFFICIAL, *TENSORFLOW] if official_given() else [*TENSORFLOW]
    seconds, peaks = in_turns("bench.forward", names, warm_ups=WARM_UPS, passes=PASSES)
    rows = [[name, *timing, gigabytes(peaks[name])] for name, timing in timings(seconds, OFFICIAL[0]).items()]
    text = (
        f"`python -m bench.forward`: {ENTRY}, one image of {SIZE_PX}×{SIZE_PX} px, float32, {THREADS} threads, all outputs; "
        f"{PASSES} passes each, taken in turns. Ratio: of the medians, to the official code as it runs by default. "
        "Memory: the process's peak."
    )
    print(section("Forward pass", text, ["", "median", "fastest", "ratio", "peak memory"], rows))
    return 0


def _worker(name: str) -> int:
    image = np.random.default_rng(0).integers(0, 256, [1, SIZE_PX, SIZE_PX, 3], dtype=np.uint8)
    forward = TENSORFLOW[name](image) if name in TENSORFLOW else _official(image, channels_last=name == OFFICIAL[1])
    return serve(forward)


def _tensorflow(image: np.ndarray, jit_compile: bool = False) -> Callable[[], Any]:
    import tensorflow as tf

    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.model import MaskFormer

    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    model = MaskFormer(MaskFormerConfig.from_dict(checkpoints.registry.entry(ENTRY).config))
    model.build_parameters()
    images = tf.constant(image)
    function = tf.function(lambda images: model(images), jit_compile=jit_compile)

    def forward() -> None:
        # A tensor is there when its value is read: wait for the last one that the network computes.
        function(images)["pred_masks"].numpy()

    return forward


def _official(image: np.ndarray, channels_last: bool) -> Callable[[], Any]:
    import torch

    from parity import official

    torch.set_num_threads(THREADS)
    code = official.load()
    from detectron2.structures import ImageList

    config = checkpoints.registry.entry(ENTRY).official_config.removeprefix("configs/")
    model = code.model(code.config(config), channels_last=channels_last)
    tensor = torch.from_numpy(image[0].transpose(2, 0, 1).copy())

    def forward() -> None:
        with torch.no_grad():
            images = ImageList.from_tensors([(tensor - model.pixel_mean) / model.pixel_std], model.size_divisibility).tensor
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            model.sem_seg_head(model.backbone(images))

    return forward


TENSORFLOW: dict[str, Callable[[np.ndarray], Callable[[], Any]]] = {
    "TensorFlow, graph": _tensorflow,
    "TensorFlow, XLA": lambda image: _tensorflow(image, jit_compile=True),
}

if __name__ == "__main__":
    sys.exit(_worker(sys.argv[1]) if len(sys.argv) > 1 else main())
