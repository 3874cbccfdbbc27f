"""Records the trainings beside this file: official architectures, from the weights that `tfmaskformer zoo synthesize` writes, but for
shapes_100, which goes on with checkpoints/small/shapes_panoptic.pkl.

    PYTHONPATH=. OMP_WAIT_POLICY=PASSIVE MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/trajectory/record.py [NAME…]

The recipes are the official ones, but for a larger weight decay, which float32 can see, and a schedule that changes within the steps.

shapes_100 trains on the generated data set. Its batches are those of the official dataset mapper (which needs panopticapi), on the images
that ``tfmaskformer train`` takes, in its order; the random generators that the mapper calls give the numbers that it draws.
"""

from __future__ import annotations

import collections
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import registry, synthesize
from parity import official, trajectory_record
from parity.inputs import parse_case
from parity.record import LoadedCase

PHOTOS = Path(registry.__file__).parent / "photos"
CASE = f"batch={PHOTOS}/astronaut.png@64x96:3,{PHOTOS}/chelsea.png@75x61:2"
CASE_R50 = f"batch={PHOTOS}/astronaut.png@64x96:3,{PHOTOS}/chelsea.png@101x75:2"
RECIPE = ("SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WARMUP_FACTOR", 0.1)
STEPPED = ("SOLVER.MAX_ITER", 40, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (8, 14), "SOLVER.WARMUP_ITERS", 5)
OPTIONS: dict[str, Sequence[Any]] = {
    "tiny_panoptic": STEPPED,
    "tiny_swin": ("SOLVER.MAX_ITER", 40, "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 3),
    "tiny_swin_100": ("SOLVER.MAX_ITER", 120, "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 10),
    "R50_20": STEPPED,
    "shapes_100": (
        *("SOLVER.MAX_ITER", 100, "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 10, "SOLVER.IMS_PER_BATCH", 2),
        *("INPUT.DATASET_MAPPER_NAME", "mask_former_panoptic", "INPUT.MIN_SIZE_TRAIN", (56, 64, 80), "INPUT.MAX_SIZE_TRAIN", 110),
        *("INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", (57, 63), "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.75),
        *("INPUT.SIZE_DIVISIBILITY", 67, "TEST.EVAL_PERIOD", 0),
    ),
}
ENTRIES = {"tiny_swin_100": "tiny_swin", "R50_20": "maskformer_panoptic_R50_bs64_554k", "shapes_100": "shapes_panoptic"}
"""Name → zoo entry, where it is another."""

CASES = {"R50_20": CASE_R50}
SHAPES = {"config": "shapes_panoptic", "images": 12, "canvas": (72, 80)}
LONG = {"steps": 100, "trainings": ("plain",)}
PLANS = {"tiny_swin_100": LONG, "R50_20": {"trainings": ("plain",), "tensors_after": (1, 2, 5, 10, 20)}, "shapes_100": LONG}
"""What differs from 20 steps with and without dropout."""

RUNS = {"tiny_swin_100": (0, 2), "R50_20": (0, 3, 4), "shapes_100": (0, 3, 4)}
"""Which float32 trainings there are beside the reference, of the six in ``trajectory_record.RUNS``."""


def shapes_data(code: official.Official, config: Any, steps: int, seed: int) -> trajectory_record.TrainingData:
    """The batches of a training on the generated data set."""
    import tensorflow as tf
    from detectron2.data import MetadataCatalog
    from mask_former import MaskFormerPanopticDatasetMapper

    from tests.golden.data import record_augmentation
    from tfmaskformer.data import shapes
    from tfmaskformer.data.augmentation import draw
    from tfmaskformer.data.training import training_order

    class Drawn(record_augmentation.Generators):
        """Gives each function of the mapper what the port has drawn for it."""

        def __init__(self, epoch: int, image: int):
            drawn = draw(tf.constant([seed, epoch * SHAPES["images"] + image], tf.int64))
            windows = drawn.crop.numpy()[:, 2:].ravel().tolist()
            self.left = {
                "ResizeShortestEdge.get_transform": [float(drawn.min_size)],
                "Augmentation._rand_range": [float(drawn.flip)],
                "RandomCrop_CategoryAreaConstraint.get_transform": windows,
            }

        def next(self) -> float:
            return self.left[sys._getframe(2).f_code.co_qualname].pop(0)

    assert "ignore_label" in MetadataCatalog.get(config.DATASETS.TRAIN[0]).as_dict()
    mapper = MaskFormerPanopticDatasetMapper(config, True)
    order = training_order(SHAPES["images"], seed).take(steps * config.SOLVER.IMS_PER_BATCH).as_numpy_iterator()
    made: collections.deque[tuple[np.ndarray, dict[str, np.ndarray]]] = collections.deque()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shapes.write(folder, "train", SHAPES["images"])
        for epoch, image in order:
            name = f"{image:012}.png"
            segments_info = shapes.sample("train", int(image)).segments_info
            element = {
                "file_name": str(folder / "train" / name),
                "pan_seg_file_name": str(folder / "annotations" / "panoptic_train" / name),
                "sem_seg_file_name": str(folder / "annotations" / "semantic_train" / name),
                "segments_info": segments_info,
            }
            numpy_random, python_random = Drawn(int(epoch), int(image)).installed()
            with numpy_random, python_random:
                mapped = mapper(element)
            instances = mapped["instances"]
            targets = {"labels": instances.gt_classes.numpy(), "masks": instances.gt_masks.numpy().astype(bool)}
            made.append((mapped["image"].numpy().transpose(1, 2, 0), targets))
    batches = []
    for step in range(1, steps + 1):
        images, targets = zip(*(made.popleft() for _ in range(config.SOLVER.IMS_PER_BATCH)), strict=True)
        batches.append(LoadedCase(f"step {step}", list(images), list(targets), []))
    return trajectory_record.TrainingData(batches, SHAPES)


def main(folder: Path, *names: str) -> None:
    code = official.load()
    all_runs = trajectory_record.RUNS["float32"]
    for name in names or OPTIONS:
        entry = registry.entry(ENTRIES.get(name, name))
        options = [*entry.official_options, *RECIPE, *OPTIONS[name]]
        plan: dict[str, Any] = dict(PLANS.get(name, {}))
        trajectory_record.RUNS["float32"] = tuple(all_runs[number] for number in RUNS.get(name, range(len(all_runs))))
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "model_final.pkl"
            config_name = entry.official_config.removeprefix("configs/")
            if name == "shapes_100":
                source = Path(registry.__file__).parent / "small" / "shapes_panoptic.pkl"
                config = code.config(config_name)
                config.merge_from_list(options)
                plan["data"] = shapes_data(code, config, plan["steps"], 0)
            else:
                synthesize.write_pickle(synthesize.synthesize(entry), source)
            trajectory_record.record_steps(
                code,
                config_name,
                source,
                [parse_case(CASES.get(name, CASE))],
                folder / name,
                options=options,
                command=["python", "tests/golden/trajectory/record.py", name],
                **plan,
            )


if __name__ == "__main__":
    main(Path(__file__).parent, *sys.argv[1:])
