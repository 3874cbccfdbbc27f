"""Trains the small MaskFormer ``shapes_panoptic`` on generated shapes, with the official model, criterion, optimizer and schedule.

    OMP_NUM_THREADS=1 MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python -m parity.train_shapes --out checkpoints/small/shapes_panoptic.pkl

Writes the checkpoint in the official layout, and beside it a JSON file that says how it was made, its curves, and how good it is. What
differs from the official training, and why, is in ``docs/shapes.md``. Another ``--seed`` starts from other weights and sees other images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from checkpoints import synthesize
from parity import official, record_zoo
from tfmaskformer.data import shapes
from tfmaskformer.evaluation.panoptic import PanopticQuality

NAME = "shapes_panoptic"
STEPS, BATCH = 4000, 4
LOSS_STEPS, EVALUATION_STEPS = 100, 1000
"""How many steps a point of the curves is apart from the one before; a loss is the mean of the steps between them."""
CALIBRATION_IMAGES = 32

SOLVER = [
    *("SOLVER.IMS_PER_BATCH", BATCH, "SOLVER.MAX_ITER", STEPS, "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR"),
    *("SOLVER.BASE_LR", 1e-3, "SOLVER.BACKBONE_MULTIPLIER", 1.0, "SOLVER.WARMUP_ITERS", 100, "SOLVER.WARMUP_FACTOR", 0.01),
]
"""Official options of the training; all others, AdamW's weight decay and the clipping among them, are those of the official config."""

PARTS = (50, shapes.VALIDATION_IMAGES)
"""Results are told for the first so many validation images: a few for quick tests, and all."""


def official_inputs(split: str, index: int, *, training: bool = False) -> dict[str, Any]:
    """An image as the official dataset mappers hand it to the model, without augmentation; with its objects if ``training``."""
    import torch
    from detectron2.structures import Instances

    image, panoptic_seg, segments_info = shapes.sample(split, index)
    inputs: dict[str, Any] = {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))}
    if training:
        inputs["instances"] = Instances(
            panoptic_seg.shape,
            gt_classes=torch.tensor([segment["category_id"] for segment in segments_info]),
            gt_masks=torch.from_numpy(np.stack([panoptic_seg == segment["id"] for segment in segments_info])),
        )
    return inputs


def calibrate_frozen_norms(model: Any, inputs: list[dict[str, Any]]) -> None:
    """Sets the statistics of each FrozenBatchNorm to those of what comes into it, in the order of calls, so that later ones see the earlier
    at work. The official backbone starts from ImageNet and never changes them; from scratch they would normalise nothing.
    """
    import torch
    from detectron2.layers import FrozenBatchNorm2d

    def calibrate(norm: Any, arguments: tuple[Any, ...]) -> None:
        variance, mean = torch.var_mean(arguments[0], dim=(0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()


def train(model: Any, config: Any, trainer: Any, seed: int) -> dict[str, dict[int, float]]:
    """The loop of ``train_net.py``; every image of the training split is seen once, and by one seed.

    Returns:
        The curves ``"loss"`` and ``"pq"``: a value by the number of steps.
    """
    optimizer = trainer.build_optimizer(config, model)
    scheduler = trainer.build_lr_scheduler(config, optimizer)
    curves: dict[str, dict[int, float]] = {"loss": {}, "pq": {}}
    start, total = time.monotonic(), 0.0
    for step in range(STEPS):
        first = (seed * STEPS + step) * BATCH
        losses = model([official_inputs("train", first + index, training=True) for index in range(BATCH)])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += float(loss.detach())
        if (step + 1) % LOSS_STEPS == 0:
            curves["loss"][step + 1] = round(total / LOSS_STEPS, 4)
            minutes = (time.monotonic() - start) / 60
            print(f"step {step + 1} of {STEPS}: loss {total / LOSS_STEPS:.3f}, {minutes:.1f} min", file=sys.stderr, flush=True)
            total = 0.0
        if (step + 1) % EVALUATION_STEPS == 0:
            curves["pq"][step + 1] = evaluate(model)[f"first_{max(PARTS)}_images"]["all"]["pq"]
            model.train()
    return curves


def evaluate(model: Any, seen: Callable[[int, np.ndarray, list[dict[str, Any]]], None] = lambda *result: None) -> dict[str, Any]:
    """Panoptic quality of what the official ``model.forward`` returns for the first validation images, by their number.

    Args:
        model: the official one.
        seen: is given the index of each image, its ``panoptic_seg``, int32 [height, width], and ``segments_info``.
    """
    import torch

    things = [index for index, category in enumerate(shapes.CATEGORIES) if category.isthing]
    quality = PanopticQuality(len(shapes.CATEGORIES), things)
    results: dict[str, Any] = {}
    model.eval()
    for index in range(max(PARTS)):
        with torch.no_grad():
            [result] = model([official_inputs("val", index)])
        panoptic_seg, segments_info = result["panoptic_seg"]
        quality.update(*shapes.sample("val", index)[1:], panoptic_seg.numpy(), segments_info)
        seen(index, panoptic_seg.numpy(), segments_info)
        if index + 1 in PARTS:
            averages = {
                name: {key: round(100 * getattr(value, key), 2) for key in ("pq", "sq", "rq")} for name, value in quality.result().items()
            }
            counts = ("iou", "true_positives", "false_positives", "false_negatives")
            results[f"first_{index + 1}_images"] = averages | {key: getattr(quality, key).tolist() for key in counts}
    return results


def main(argv: list[str] | None = None) -> int:
    """Trains, evaluates and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE", help="for example checkpoints/small/shapes_panoptic.pkl")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the initial weights and the images (default: 0)")
    arguments = parser.parse_args(argv)
    destination, seed = arguments.out, arguments.seed
    code = official.load()
    import torch

    torch.set_num_threads(1)  # sums, and with them the weights, depend on the number of threads
    path, options = record_zoo.TINY[NAME]
    config = code.config(code.maskformer / path)
    config.merge_from_list([*options, *SOLVER])
    model = code.model(config, training=True, seed=seed)
    wall, processor = time.monotonic(), time.process_time()
    calibrate_frozen_norms(model, [official_inputs("train", index, training=True) for index in range(CALIBRATION_IMAGES)])
    curves = train(model, config, code.trainer(), seed)
    minutes = {"wall": round((time.monotonic() - wall) / 60, 1), "processor": round((time.process_time() - processor) / 60, 1)}
    results = evaluate(model)
    tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    synthesize.write_pickle(tensors, destination, synthesize.TRAINED_AUTHOR)
    made = {
        "how_made": f"OMP_NUM_THREADS=1 python -m parity.train_shapes --out {destination}" + (f" --seed {seed}" if seed else ""),
        "commits": code.commits,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": platform.machine(),
        "official_config": path,
        "official_options": dict(zip(options[::2] + SOLVER[::2], options[1::2] + SOLVER[1::2], strict=True)),
        "seed": seed,
        "steps": STEPS,
        "minutes": minutes,
        "sha256": hashlib.sha256(destination.read_bytes()).hexdigest(),
        "curves": curves,
        "validation": results,
    }
    destination.with_suffix(".json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    for part, values in results.items():
        print(part, {name: values[name]["pq"] for name in ("all", "things", "stuff")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
