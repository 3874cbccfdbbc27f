"""Trains ``shapes_panoptic`` in TensorFlow as :mod:`parity.train_shapes` does in PyTorch, by ``tfmaskformer train``.

    OMP_NUM_THREADS=1 python -m parity.train_shapes_tensorflow --data shapes --out run --seed 0

Images, widths, recipe and number of steps are those of the PyTorch training, and the frozen batch norms are given the statistics of what
comes into them in the same way; initial weights and the order of the images are drawn here. The same command goes on with a training that
was interrupted. Checkpoints, curves and the evaluations on the validation set are in the folder ``--out`` (docs/training.md), the initial
weights beside it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from parity import train_shapes
from tfmaskformer.data import shapes

if TYPE_CHECKING:
    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.model import MaskFormer

OPTIONS: dict[str, Any] = {
    **dict(zip(map(str, train_shapes.SOLVER[::2]), train_shapes.SOLVER[1::2], strict=True)),
    "INPUT.CROP.ENABLED": False,
    "INPUT.MIN_SIZE_TRAIN": (0,),
    "INPUT.MAX_SIZE_TRAIN": 160,
    "SOLVER.CHECKPOINT_PERIOD": 500,
    "TEST.EVAL_PERIOD": 1000,
}
"""Every image at its own size, half of them mirrored, as official mappers cannot but do."""

CANVAS = (160, 160)
"""Height and width in px that every image fits."""


def write_initial(config: MaskFormerConfig, images: Sequence[np.ndarray], seed: int, destination: pathlib.Path) -> None:
    """Writes the checkpoint directory that a training from scratch starts from, if it is not there.

    Args:
        config: of the model.
        images: uint8 [height, width, 3] RGB, as the model takes them; what its frozen norms are calibrated with.
        seed: of the official initial distributions.
        destination: the directory.
    """
    import tensorflow as tf

    if not (destination / "config.json").exists():  # written last
        model = initial_model(config, images, seed)
        tf.train.Checkpoint(model=model).save(str(destination / "ckpt"))
        (destination / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")


def initial_model(config: MaskFormerConfig, images: Sequence[np.ndarray], seed: int) -> MaskFormer:
    """What :func:`write_initial` writes."""
    import tensorflow as tf

    from converters.init import initial_values
    from tfmaskformer.layers import FrozenBatchNorm2d
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import named_modules, parameter_specs, record_taps

    model = MaskFormer(config)
    model.build_parameters(initial_values(parameter_specs(model), seed).__getitem__)
    norms = {name: module for name, module in named_modules(model) if isinstance(module, FrozenBatchNorm2d)}

    def calibrate(tap: str, outputs: tf.Tensor) -> tf.Tensor:
        """As long as a norm is at its initial values, what it gives is what came into it."""
        norm = norms.get(tap.partition("#")[0])
        if norm is None:
            return outputs
        mean, variance = tf.nn.moments(outputs, [0, 1, 2])
        count = tf.cast(tf.size(outputs) / outputs.shape[-1], outputs.dtype)
        norm.running_mean.assign(mean)
        norm.running_var.assign(variance * count / (count - 1))
        return (outputs - mean) * tf.math.rsqrt(norm.running_var + norm.eps)

    sizes = np.array([image.shape[:2] for image in images])
    batch = np.zeros([len(images), *sizes.max(0), 3], np.uint8)
    for place, image in zip(batch, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    with record_taps(calibrate):
        model.backbone(model.preprocess(tf.constant(batch), tf.constant(sizes, tf.int32)))
    return model


def main(argv: list[str] | None = None) -> int:
    """Writes the images, where they are missing, and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, metavar="DIR", help="of the images; made where they are missing")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="of the training")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of initial weights and order (default: 0)")
    parser.add_argument("--steps", type=int, default=train_shapes.STEPS, metavar="N", help="for a trial; default: all of them")
    arguments = parser.parse_args(argv)
    from checkpoints import registry
    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.training import cli

    for split, count in (("train", arguments.steps * train_shapes.BATCH), ("val", shapes.VALIDATION_IMAGES)):
        if not (arguments.data / "annotations" / f"panoptic_{split}.json").exists():  # written last
            shapes.write(arguments.data, split, count)
    initial = arguments.out.with_name(f"{arguments.out.name}.initial")
    images = [shapes.sample("train", index).image for index in range(train_shapes.CALIBRATION_IMAGES)]
    write_initial(MaskFormerConfig.from_dict(registry.entry(train_shapes.NAME).config), images, arguments.seed, initial)
    command = ["--config", train_shapes.NAME, "--data", str(arguments.data), "--init", str(initial), "--out", str(arguments.out), "--cpu"]
    options = OPTIONS | {"SEED": arguments.seed, "SOLVER.MAX_ITER": arguments.steps}
    return cli.main([*command, "--canvas", *map(str, CANVAS), *(str(part) for option in options.items() for part in option)])


if __name__ == "__main__":
    sys.exit(main())
