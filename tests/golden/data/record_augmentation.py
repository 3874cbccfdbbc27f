"""Records what the official dataset mappers make of generated images; run by hand, with the official code, panopticapi and OpenCV at hand.

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/data/record_augmentation.py

Writes ``augmentation.json``. The random generators that the official code calls (``numpy.random``, ``random``) are replaced by ones that
make their answers of numbers u, uniform in [0, 1), by the usual rules: ``randint(low, high)`` is low + ⌊u · (high − low)⌋ and so on. Which
function of the official code asked for each u is recorded with it.

- ``mappers``: config and image → the draws, and of what the mapper returns: the image's size, SHA-256 of the image [height, width, 3], the
  classes, SHA-256 of the masks (uint8 [objects, height, width]) and of ``sem_seg`` (int32)
- ``nearest``: [size, new size, SHA-256 of the source indices (int32) of ``ResizeTransform.apply_segmentation`` on a float64 map]
- ``color``: SHA-256 of what each step of ``ColorAugSSDTransform`` makes of images of :func:`colors`
- ``hsv``: SHA-256 of OpenCV's conversions of :func:`colors`, from RGB to HSV and from HSV to RGB
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from tfmaskformer.data import shapes

HERE = Path(__file__).parent
IGNORE = 255
BASE = {
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TRAIN": [64, 80, 97, 150],
    "INPUT.MAX_SIZE_TRAIN": 170,
    "INPUT.CROP.ENABLED": True,
    "INPUT.CROP.TYPE": "absolute",
    "INPUT.CROP.SIZE": [72, 88],
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": IGNORE,
}
DETR = BASE | {"INPUT.DATASET_MAPPER_NAME": "detr_panoptic", "INPUT.CROP.TYPE": "absolute_range", "INPUT.CROP.SIZE": [384, 600]}
SEMANTIC = BASE | {"INPUT.DATASET_MAPPER_NAME": "mask_former_semantic", "INPUT.COLOR_AUG_SSD": True, "INPUT.SIZE_DIVISIBILITY": 96}
CONFIGS: dict[str, dict[str, Any]] = {
    "detr": DETR,
    "detr, no crop": DETR | {"INPUT.CROP.ENABLED": False, "INPUT.MIN_SIZE_TRAIN": [70, 120], "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"},
    "semantic": SEMANTIC,
    "semantic, capped": SEMANTIC | {"INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 0.6, "INPUT.COLOR_AUG_SSD": False},
    "semantic, capped range": SEMANTIC
    | {
        "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 0.75,
        "INPUT.CROP.TYPE": "absolute_range",
        "INPUT.CROP.SIZE": [30, 90],
        "INPUT.COLOR_AUG_SSD": False,
    },
    "semantic, relative": SEMANTIC | {"INPUT.CROP.TYPE": "relative", "INPUT.CROP.SIZE": [0.7, 0.4], "INPUT.SIZE_DIVISIBILITY": -1},
    "semantic, relative range": SEMANTIC
    | {"INPUT.CROP.TYPE": "relative_range", "INPUT.CROP.SIZE": [0.3, 0.6], "INPUT.SIZE_DIVISIBILITY": -1},
    "semantic, no crop": SEMANTIC | {"INPUT.CROP.ENABLED": False, "INPUT.SIZE_DIVISIBILITY": 192},
    "panoptic": SEMANTIC | {"INPUT.DATASET_MAPPER_NAME": "mask_former_panoptic"},
    "panoptic, capped": SEMANTIC
    | {"INPUT.DATASET_MAPPER_NAME": "mask_former_panoptic", "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 0.5, "INPUT.COLOR_AUG_SSD": False},
}
"""Name → what it changes in the official defaults. Sizes as in the official configs, but for the images' size."""

IMAGES = 5
REPETITIONS = 2


def sample(index: int) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]], np.ndarray]:
    """Image ``index``: uint8 [height, width, 3], ids, segments, classes (int32); odd sizes, none square; the last has no ground truth."""
    image, panoptic_seg, segments = shapes.sample("train", 40 + index)
    height, width = (side - 2 * index - 1 for side in panoptic_seg.shape)
    image, panoptic_seg = image[:height, :width], panoptic_seg[:height, :width].astype(np.int32)
    segments = [segment | {"iscrowd": int(index == 1 and segment["isthing"])} for segment in segments]
    sem_seg = np.full((height, width), IGNORE, np.int32)
    for segment in segments:
        sem_seg[panoptic_seg == segment["id"]] = segment["category_id"]
    panoptic_seg[:7, 3:20] = 0
    sem_seg[:7, 3:20] = IGNORE
    if index == IMAGES - 1:
        panoptic_seg, segments, sem_seg = np.zeros_like(panoptic_seg), [], np.full_like(sem_seg, IGNORE)
    return image, panoptic_seg, segments, sem_seg


def colors(width: int) -> np.ndarray:
    """uint8 [rows, width, 3]: a seventh of all colours, in an order without a pattern; hues (first channel) as they come."""
    numbers = np.arange(5, 256**3, 7 * 13, dtype=np.int64) * 7919 % 256**3
    pixels = np.stack([numbers >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
    return pixels[: len(pixels) // width * width].reshape(-1, width, 3)


def hsv_colors(width: int) -> np.ndarray:
    """As :func:`colors`, with hues below 180."""
    pixels = colors(width).copy()
    pixels[..., 0] %= 180
    return pixels


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


class Generators:
    """``numpy.random`` and ``random``, as far as the official mappers call them, fed with uniform numbers."""

    def __init__(self, seed: int):
        self.uniform_numbers = np.random.default_rng(seed)
        self.log: list[tuple[str, float]] = []

    def next(self) -> float:
        asked = sys._getframe(2)
        number = float(self.uniform_numbers.random())
        self.log.append((asked.f_code.co_qualname, number))
        return number

    def integer(self, number: float, low: int, high: int) -> int:
        return low + int(number * (high - low))

    def rand(self, *shape: int) -> Any:
        if not shape:
            return self.next()
        numbers = np.empty(shape)
        for index in np.ndindex(shape):  # no comprehension, which is a function of its own in some versions of Python
            numbers[index] = self.next()
        return numbers

    def randint(self, low: int, high: int | None = None) -> int:
        return self.integer(self.next(), *((0, low) if high is None else (low, high)))

    def choice(self, values: Any) -> Any:
        return values[self.integer(self.next(), 0, len(values))]

    def uniform(self, low: float, high: float, size: Any = None) -> float:
        return low + (high - low) * self.next()

    def randrange(self, stop: int) -> int:
        return self.integer(self.next(), 0, stop)

    def python_randint(self, low: int, high: int) -> int:
        return self.integer(self.next(), low, high + 1)

    def installed(self) -> Any:
        stack = mock.patch.multiple(np.random, rand=self.rand, randint=self.randint, choice=self.choice, uniform=self.uniform)
        python = mock.patch.multiple(random, randrange=self.randrange, uniform=self.uniform, randint=self.python_randint)
        return stack, python


def mappers(code: Any, folder: Path) -> dict[str, Any]:
    """Every config on every image."""
    import mask_former
    from detectron2.data import MetadataCatalog

    from parity.record_defaults import official_defaults

    MetadataCatalog.get("augmentation").ignore_label = IGNORE
    classes = {
        "detr_panoptic": mask_former.DETRPanopticDatasetMapper,
        "mask_former_semantic": mask_former.MaskFormerSemanticDatasetMapper,
        "mask_former_panoptic": mask_former.MaskFormerPanopticDatasetMapper,
    }
    result = {}
    for number, (name, changes) in enumerate(CONFIGS.items()):
        cfg = official_defaults()
        cfg.merge_from_list([part for item in (changes | {"DATASETS.TRAIN": ["augmentation"]}).items() for part in item])
        mapper = classes[cfg.INPUT.DATASET_MAPPER_NAME](cfg, True)
        for index, repetition in itertools.product(range(IMAGES), range(REPETITIONS)):
            generators = Generators(1000 * number + 10 * index + repetition)
            numpy_random, python_random = generators.installed()
            with numpy_random, python_random:
                made = mapper(written(index, folder, cfg.INPUT.DATASET_MAPPER_NAME))
            image = made["image"].numpy().transpose(1, 2, 0)
            instances = made["instances"]
            row = {
                "draws": generators.log,
                "size": image.shape[:2],
                "image": sha256(image),
                "labels": instances.gt_classes.tolist(),
                "masks": sha256(instances.gt_masks.numpy().astype(np.uint8)),
            }
            if "sem_seg" in made:
                row["sem_seg"] = sha256(made["sem_seg"].numpy().astype(np.int32))
            result[f"{name}; image {index}, {repetition}"] = row
    return result


def written(index: int, folder: Path, mapper: str) -> dict[str, Any]:
    """The sample's files, as the official lists have them."""
    image, panoptic_seg, segments, sem_seg = sample(index)
    rgb = np.stack([panoptic_seg >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
    item: dict[str, Any] = {"image_id": index, "height": image.shape[0], "width": image.shape[1]}
    parts = {"file_name": image}
    if mapper != "mask_former_semantic":
        parts["pan_seg_file_name"] = rgb
        item["segments_info"] = segments
    if mapper != "detr_panoptic":
        parts["sem_seg_file_name"] = sem_seg.astype(np.uint8)
    for key, pixels in parts.items():
        item[key] = str(folder / f"{index}_{key}.png")
        Image.fromarray(pixels).save(item[key])
    return item


def nearest() -> list[Any]:
    """Source indices of the nearest rule of semantic maps."""
    from detectron2.data.transforms import ResizeTransform

    rng = np.random.default_rng(0)
    official = [(side, size) for side in (427, 480, 640, 683) for size in (256, 307, 320, 384, 512, 640, 1024, 1280)]
    rows = []
    for old, new in official + rng.integers(1, 1400, (200, 2)).tolist():
        positions = np.arange(old, dtype=np.float64)[np.newaxis]
        found = ResizeTransform(1, old, 1, new).apply_segmentation(positions)
        rows.append([old, new, sha256(found[0].astype(np.int32))])
    return rows


COLOR_STEPS = ("brightness", "contrast", "saturation", "hue")


def color() -> dict[str, Any]:
    """Each step, done, by its amount u; widths with and without a rest."""
    from detectron2.projects.point_rend import ColorAugSSDTransform

    result = {}
    for step, width, amount in itertools.product(COLOR_STEPS, (160, 41), (0.0, 0.13, 0.5, 0.77, 0.999)):
        generators = Generators(0)
        numbers = iter([0.6, amount])
        generators.next = lambda numbers=numbers: next(numbers)  # type: ignore[method-assign]
        numpy_random, python_random = generators.installed()
        with numpy_random, python_random:
            bgr = np.ascontiguousarray(colors(width)[..., ::-1])
            result[f"{step} {width} {amount}"] = sha256(getattr(ColorAugSSDTransform("RGB"), step)(bgr)[..., ::-1])
    return result


def hsv() -> dict[str, Any]:
    """OpenCV's conversions."""
    import cv2

    return {
        f"{name} {width}": sha256(cv2.cvtColor(pixels(width), conversion))
        for width in (256, 41)
        for name, pixels, conversion in (("forth", colors, cv2.COLOR_RGB2HSV), ("back", hsv_colors, cv2.COLOR_HSV2RGB))
    }


def main() -> None:
    import cv2

    from parity import official

    code = official.load()
    with tempfile.TemporaryDirectory() as folder:
        recorded = {
            "how_made": "python tests/golden/data/record_augmentation.py",
            "commits": code.commits,
            "versions": {"pillow": Image.__version__, "opencv-python-headless": cv2.__version__, "numpy": np.__version__},
            "mappers": mappers(code, Path(folder)),
            "nearest": nearest(),
            "color": color(),
            "hsv": hsv(),
        }
    lines = ",\n".join(f" {json.dumps(key)}: {_lines(value)}" for key, value in recorded.items())
    (HERE / "augmentation.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def _lines(value: object) -> str:
    """One line for each item."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()) + "\n }"


if __name__ == "__main__":
    main()
