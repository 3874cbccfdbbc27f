"""The command ``tfmaskformer compile``: would a step of evaluation or training run on a TPU, and how much memory would it take?

What is compiled is the very function that ``tfmaskformer eval`` or a training step runs on one core, at one shape; the TPU itself is not
needed (:mod:`tfmaskformer.aot`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tfmaskformer.cli import BAD_INPUT, COULD_NOT_RUN, OK, failed
from tfmaskformer.config import ConfigError, MaskFormerConfig

if TYPE_CHECKING:
    from tfmaskformer.aot import CompiledStats
    from tfmaskformer.model import MaskFormer

REFUSED = 1

STEPS = ("eval", "train")
DTYPES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


def program(
    model: MaskFormer,
    step: str,
    batch: int,
    size: tuple[int, int],
    *,
    output_size: tuple[int, int] | None = None,
    objects: int | None = None,
    rematerialise: bool = False,
) -> tuple[Callable[..., Any], list[Any]]:
    """A step as one core runs it, and the shapes of its arguments.

    Args:
        model: with its weights.
        step: "eval": network and post-processing, of all metrics that the model is for. "train": forward pass, losses with the matcher,
            gradients, clipping and update.
        batch: images of the core.
        size: (height, width) of the canvas, px.
        output_size: "eval": that of the results, px; default ``size``.
        objects: "train": room for objects in each image; default: as many as the model has queries, as in training.
        rematerialise: "train": see :class:`~tfmaskformer.training.step.TrainStep`.

    Returns:
        a function, and a ``tf.TensorSpec`` for each of its arguments.
    """
    import tensorflow as tf

    images, sizes = tf.TensorSpec([batch, *size, 3], tf.uint8), tf.TensorSpec([batch, 2], tf.int32)
    if step == "eval":
        from tfmaskformer.evaluation.devices import multiply_in_float32
        from tfmaskformer.evaluation.evaluate import infer_step

        metrics = ("panoptic", "semantic") if model.config.test.panoptic_on else ("semantic",)
        infer, canvas = infer_step(model, metrics), output_size or size
        multiply_in_float32()  # as evaluation does
        return lambda images, sizes, output_sizes: infer(images, sizes, output_sizes, canvas), [images, sizes, sizes]

    from tfmaskformer.training.optimizer import build_optimizer
    from tfmaskformer.training.recipe import Recipe
    from tfmaskformer.training.step import TrainStep

    train = TrainStep(model, build_optimizer(Recipe(clip_norm=0.01), model), padding="masked", rematerialise=rematerialise)
    targets = {"sem_seg": tf.TensorSpec([batch, *size], tf.int32)}
    if model.config.head == "MaskFormerHead":
        objects = objects or model.config.predictor.num_queries
        targets = {
            "labels": tf.TensorSpec([batch, objects], tf.int32),
            "masks": tf.TensorSpec([batch, objects, *size], tf.bool),
            "num_objects": tf.TensorSpec([batch], tf.int32),
        }
    return lambda images, sizes, *values: train(images, sizes, dict(zip(targets, values, strict=True))), [images, sizes, *targets.values()]


def default_size(config: MaskFormerConfig, step: str) -> tuple[int, int]:
    """(height, width) of a canvas, px: one that holds the largest official test image up to twice as long as high, or that of training.

    Raises:
        ConfigError: "train", and the config's name is no entry of the zoo.
    """
    if step == "train":
        from tfmaskformer.data.augmentation import mapper_of
        from tfmaskformer.data.training import canvas_of
        from tfmaskformer.official_config import named_tree

        try:
            return canvas_of(mapper_of(named_tree(config.name)[1]), config)
        except ConfigError as error:
            raise ConfigError(f"how large '{config.name}' is trained is not known: {error}\n  give --size HEIGHT WIDTH") from None
    shorter = config.test.min_size or 800
    return shorter, min(config.test.max_size, 2 * shorter)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile a step for a TPU that is not there: does it, and how much memory does it take?

    Returns 0; 1 where the compiler refuses; 2 for usage or bad input; 3 where nothing here can compile.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    numbers = [arguments.batch, arguments.objects, *(arguments.size or ()), *(arguments.output_size or ())]
    if any(number is not None and number < 1 for number in numbers):
        parser.error("--batch, --objects, --size and --output-size take positive numbers")
    if arguments.output_size and arguments.step == "train":
        parser.error("--output-size belongs to --step eval")
    if (arguments.rematerialise or arguments.objects) and arguments.step == "eval":
        parser.error("--rematerialise and --objects belong to --step train")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf

        from tfmaskformer import aot
        from tfmaskformer.checkpoint import CheckpointError, load
    except ImportError as error:
        return failed(f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[cpu,aot]'", COULD_NOT_RUN)
    dtype = arguments.dtype or {"eval": "float32", "train": "bfloat16"}[arguments.step]
    start_s = time.monotonic()
    try:
        aot.check_target(arguments.target)
        print("loading the checkpoint …", file=sys.stderr, flush=True)
        model = load(arguments.ckpt, DTYPES[dtype])
        size = tuple(arguments.size or default_size(model.config, arguments.step))
        objects = arguments.objects or model.config.predictor.num_queries
        options: dict[str, Any] = {"objects": objects, "rematerialise": arguments.rematerialise}
        if arguments.step == "eval":
            options = {"output_size": tuple(arguments.output_size or size)}
        step, specs = program(model, arguments.step, arguments.batch, size, **options)
        print(f"compiling for {arguments.target}, which takes a minute or two …", file=sys.stderr, flush=True)
        stats = aot.compile_for_tpu(step, *specs, topology=arguments.target)
    except aot.UnavailableError as error:
        return failed(str(error), COULD_NOT_RUN)
    except (CheckpointError, ConfigError, aot.TargetError) as error:
        return failed(str(error), BAD_INPUT)
    except aot.AotError as error:
        return failed(str(error), REFUSED)
    except (MemoryError, tf.errors.ResourceExhaustedError):
        return failed("out of memory", COULD_NOT_RUN)
    except KeyboardInterrupt:
        return failed("interrupted", COULD_NOT_RUN)
    told = {
        "model": model.config.name,
        "step": arguments.step,
        "target": arguments.target,
        "dtype": dtype,
        "batch": arguments.batch,
        "size": size,
        **options,
        **dataclasses.asdict(stats),
        "seconds": round(time.monotonic() - start_s, 1),
    }
    print(json.dumps(told, indent=1) if arguments.json else "\n".join(_lines(told, stats)))
    return OK


def _lines(told: dict[str, Any], stats: CompiledStats) -> list[str]:
    height, width = told["size"]
    rows = [
        ("peak HBM", _size(stats.peak_hbm_bytes)),
        ("arguments", f"{_size(stats.argument_bytes)}, variables included"),
        ("temporaries", _size(stats.temp_bytes)),
        ("outputs", _size(stats.output_bytes) + (", new values of variables included" if told["step"] == "train" else "")),
        ("code", _size(stats.code_bytes)),
        ("flops", f"{stats.flops:.3g}, {stats.flops / told['batch']:.3g} an image"),
    ]
    if stats.rematerialized:
        again = f"{stats.rematerialized} instructions are computed again (rematerialisation); a smaller batch is faster"
        rows.append(("fits only because", again))
    what = f"one {told['step']} step of {told['batch']} × {height}×{width} px in {told['dtype']}"
    head = f"{told['model']}: {what} compiles for {told['target']}; each core needs"
    return [head, *(f"  {name:<18}{value}" for name, value in rows)]


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**28 else f"{size_bytes / 2**20:.1f} MiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfmaskformer compile",
        description="Compiles a step of evaluation or training for a TPU that need not be there; tells memory and work of one core.",
        epilog="needs the extra 'aot' (Linux, x86-64). docs/compile.md tells what it cannot see. "
        "exit codes: 0 it compiles, 1 the compiler refuses it, 2 usage or bad input, 3 nothing here can compile",
    )
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="directory written by 'convert'; may be gs://…")
    parser.add_argument(
        "--target", default="v5e:2x2", metavar="TPU", help="generation and chips: v5e:2x2, v4:2x2x1, v6e:2x2, … (default: %(default)s)"
    )
    parser.add_argument(
        "--step", choices=STEPS, default="eval", help="what 'tfmaskformer eval' or a training step runs (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images of one core (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="canvas of the images, px (default: of the official test, or training)"
    )
    parser.add_argument(
        "--output-size", type=int, nargs=2, metavar=("H", "W"), help="canvas of the results, px (default: that of the images)"
    )
    parser.add_argument(
        "--objects", type=int, metavar="N", help="room for objects in an image, in training (default: as many as the model has queries)"
    )
    parser.add_argument("--rematerialise", action="store_true", help="as 'tfmaskformer train' takes it: blocks are computed again")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what the network computes in (default: float32 in evaluation, bfloat16 in training)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
