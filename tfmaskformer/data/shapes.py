"""A generated panoptic data set: discs, triangles, boxes and crosses before sky, grass and water.

Easy enough to train a small MaskFormer on in minutes of one CPU core, and not trivial: a class has a colour only roughly, half of the
shapes are striped, they cover each other, some touch another of their class, and sky and water are both blue. Images differ in size and
are not square.

An image is a function of its split and index alone. It is made of NumPy's raw Philox bits with integer arithmetic, so every platform and
version makes the same bytes. Every index from 0 on exists: the training split has no end, the validation split is what one takes of it
(:data:`VALIDATION_IMAGES`).
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

SPLITS = ("train", "val")

VALIDATION_IMAGES = 200
"""Images 0 … 199 of "val" are the validation set."""


class Category(NamedTuple):
    """A class: ``id`` in the data set's files, with gaps as in COCO; its index in :data:`CATEGORIES` is the contiguous one."""

    id: int
    name: str
    isthing: bool
    color: tuple[int, int, int]


CATEGORIES = (
    Category(2, "disc", True, (215, 50, 50)),
    Category(3, "triangle", True, (235, 190, 50)),
    Category(5, "box", True, (140, 60, 190)),
    Category(7, "cross", True, (240, 150, 200)),
    Category(11, "sky", False, (130, 190, 240)),
    Category(13, "grass", False, (90, 160, 60)),
    Category(17, "water", False, (40, 80, 160)),
)
_DISC, _TRIANGLE, _BOX, _CROSS, _SKY, _GRASS, _WATER = range(len(CATEGORIES))

_MIN_SIDE_PX, _MAX_SIDE_PX = 96, 160
_MIN_RADIUS_PX, _MAX_RADIUS_PX = 13, 28
_MAX_THINGS = 4

# From top to bottom.
_SCENES = ((_SKY, _GRASS), (_SKY, _WATER), (_SKY, _WATER, _GRASS), (_SKY, _GRASS, _WATER), (_GRASS, _WATER), (_GRASS,))

_ID_STEP = 0x010203
"""Ids of an image are 1, 2, … times this: all three bytes of a PNG's pixel are used."""


class Sample(NamedTuple):
    """An image and its panoptic ground truth.

    Attributes:
        image: uint8 [height, width, 3] RGB; sides 96 … 160 px, height ≠ width.
        panoptic_seg: int32 [height, width], the id of each pixel's segment. Every pixel has one.
        segments_info: for each segment ``{"id": int, "category_id": int, "isthing": bool, "area": int, "bbox": [left, top, width,
            height], "iscrowd": 0}``. ``category_id`` is the contiguous class index, area and bbox are in px. A stuff class is one segment.
    """

    image: np.ndarray
    panoptic_seg: np.ndarray
    segments_info: list[dict[str, Any]]


def sample(split: str, index: int) -> Sample:
    """Image ``index`` of ``split``, "train" or "val".

    >>> image, panoptic_seg, segments_info = sample("val", 0)
    >>> image.shape, [CATEGORIES[segment["category_id"]].name for segment in segments_info]
    ((105, 114, 3), ['triangle', 'cross', 'box', 'sky', 'water'])

    Raises:
        ValueError: unknown split or a negative index.
    """
    if split not in SPLITS or index < 0:
        raise ValueError(f"shapes: no image {index} of split {split!r}; splits are {SPLITS}, indices start at 0")
    draws = _Draws(f"shapes:{split}:{index}")
    height, width = draws.integer(_MIN_SIDE_PX, _MAX_SIDE_PX), draws.integer(_MIN_SIDE_PX, _MAX_SIDE_PX - 1)
    width += width >= height
    image, classes = _background(draws, height, width)
    owners = np.full((height, width), -1)  # which thing a pixel belongs to
    things: list[_Thing] = []
    areas: list[int] = []
    for _ in range(draws.integer(1, _MAX_THINGS)):
        thing = _draw_thing(draws, height, width, things)
        mask = _mask(thing, height, width)
        covered = np.where(mask, len(things), owners)
        visible = np.bincount(covered.ravel() + 1, minlength=len(things) + 2)[1:]
        if (2 * visible < [*areas, int(mask.sum())]).any():
            continue  # it would hide more than half of another
        owners = covered
        image = np.where(mask[..., None], _paint(draws, thing.category, height, width), image)
        things.append(thing)
        areas.append(int(mask.sum()))
    panoptic_seg, segments_info = _segments(classes, owners, things)
    return Sample(_expose(draws, image), panoptic_seg, segments_info)


def write(destination: pathlib.Path, split: str, count: int) -> None:
    """Writes images 0 … ``count`` − 1 of ``split`` in the layout of COCO panoptic, as panopticapi and Detectron2 read it.

    Makes ``destination/<split>/000000000000.png`` …, ``destination/annotations/panoptic_<split>/`` with a PNG for each whose
    R + 256·G + 65536·B is the segment's id, ``destination/annotations/panoptic_<split>.json``, where categories have the ids of
    :data:`CATEGORIES`, and ``destination/annotations/semantic_<split>/`` with a PNG of contiguous classes for each.

    Raises:
        ValueError: unknown split.
        OSError: a file cannot be written.
    """
    from PIL import Image

    annotations = destination / "annotations"
    images, panoptic, semantic = destination / split, annotations / f"panoptic_{split}", annotations / f"semantic_{split}"
    for folder in (images, panoptic, semantic):
        folder.mkdir(parents=True, exist_ok=True)
    listed: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
    for index in range(count):
        image, panoptic_seg, segments_info = sample(split, index)
        name = f"{index:012}.png"
        Image.fromarray(image).save(images / name)
        rgb = np.stack([panoptic_seg >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(panoptic / name)
        labels = np.zeros(panoptic_seg.shape, np.uint8)
        for segment in segments_info:
            labels[panoptic_seg == segment["id"]] = segment["category_id"]
        Image.fromarray(labels).save(semantic / name)
        segments = [
            {"id": segment["id"], "category_id": CATEGORIES[segment["category_id"]].id}
            | {key: segment[key] for key in ("area", "bbox", "iscrowd")}
            for segment in segments_info
        ]
        listed["images"].append({"id": index, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
        listed["annotations"].append({"image_id": index, "file_name": name, "segments_info": segments})
    listed["categories"] = [
        {"id": category.id, "name": category.name, "isthing": int(category.isthing), "color": list(category.color)}
        for category in CATEGORIES
    ]
    (annotations / f"panoptic_{split}.json").write_text(json.dumps(listed), encoding="utf-8")


class _Draws:
    """A stream of random integers, told by its name."""

    def __init__(self, name: str):
        self._bits = np.random.Philox(key=int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little"))

    def integer(self, low: int, high: int) -> int:
        """``low`` … ``high``, both included."""
        return low + ((int(self._bits.random_raw()) >> 32) * (high - low + 1) >> 32)

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """int64 of ``shape``, -128 … 127."""
        size = math.prod(shape)
        return self._bits.random_raw(-(-size // 8)).astype("<u8", copy=False).view(np.uint8)[:size].reshape(shape).astype(np.int64) - 128


class _Thing(NamedTuple):
    """A shape's class, centre and radius in half px, and direction: (cosine, sine, norm), cosine² + sine² = norm²."""

    category: int
    y: int
    x: int
    radius: int
    direction: tuple[int, int, int]


def _draw_thing(draws: _Draws, height: int, width: int, things: list[_Thing]) -> _Thing:
    radius = draws.integer(2 * _MIN_RADIUS_PX, 2 * _MAX_RADIUS_PX)
    half = draws.integer(-64, 64)  # the tangent of half the angle, in 64ths
    direction = (64**2 - half**2, 2 * 64 * half, 64**2 + half**2)
    if draws.integer(0, 1):
        direction = (-direction[0], -direction[1], direction[2])
    inside = radius // 2
    if things and draws.integer(0, 4) == 0:  # one in five lies beside the one before, and is of its class; others are of a new class
        last = things[-1]
        category, distance = last.category, (radius + last.radius) * 3 // 4
        y, x = last.y + distance * direction[1] // direction[2], last.x + distance * direction[0] // direction[2]
        y, x = min(max(y, inside), 2 * height - inside), min(max(x, inside), 2 * width - inside)
    else:
        absent = sorted({_DISC, _TRIANGLE, _BOX, _CROSS} - {thing.category for thing in things})
        category = absent[draws.integer(0, len(absent) - 1)]
        y, x = draws.integer(inside, 2 * height - inside), draws.integer(inside, 2 * width - inside)
    return _Thing(category, y, x, radius, direction)


def _mask(thing: _Thing, height: int, width: int) -> np.ndarray:
    """bool [height, width]: pixels whose centre lies in the shape."""
    y, x = 2 * np.arange(height)[:, None] + 1 - thing.y, 2 * np.arange(width)[None] + 1 - thing.x
    cosine, sine, norm = thing.direction
    u, v, radius = cosine * x + sine * y, cosine * y - sine * x, thing.radius * norm
    if thing.category == _DISC:
        return x**2 + y**2 <= thing.radius**2
    if thing.category == _TRIANGLE:
        return (2 * v <= radius) & (7 * np.abs(u) <= 4 * (v + radius))  # equilateral, nearly: 4/7 for 1/√3
    if thing.category == _BOX:
        return (4 * np.abs(u) <= 3 * radius) & (5 * np.abs(v) <= 3 * radius)
    return (np.maximum(np.abs(u), np.abs(v)) <= radius) & (10 * np.minimum(np.abs(u), np.abs(v)) <= 3 * radius)


def _color(draws: _Draws, color: tuple[int, int, int], spread: int) -> np.ndarray:
    return np.array([channel + draws.integer(-spread, spread) for channel in color])


def _background(draws: _Draws, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours int64 [height, width, 3] and classes int64 [height, width]: bands, their borders tilted."""
    scene = _SCENES[draws.integer(0, len(_SCENES) - 1)]
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    bands = np.zeros((height, width), np.int64)
    for border in range(1, len(scene)):
        middle = height * (32 * border + draws.integer(-8, 8)) // (32 * len(scene))
        bands += 64 * (y - middle) >= draws.integer(-12, 12) * (x - width // 2)
    classes = np.array(scene)[bands]

    image = np.zeros((height, width, 3), np.int64)
    for category in scene:
        if category == _SKY:
            texture = _color(draws, (110, 165, 225), 30) + (y * draws.integer(10, 60) // height)[..., None]
        elif category == _GRASS:
            blades = np.repeat(draws.noise((height, -(-width // 2))), 2, axis=1)[:, :width]
            texture = _color(draws, (80, 140, 60), 30) + (blades * draws.integer(8, 24) // 128)[..., None]
        else:
            period = draws.integer(6, 12)
            waves = np.abs((y * 8 + x * draws.integer(-2, 2)) % (8 * period) - 4 * period)
            texture = _color(draws, (50, 100, 160), 30) + (waves * draws.integer(20, 40) // (4 * period))[..., None]
        image = np.where((classes == category)[..., None], texture, image)
    return image, classes


def _paint(draws: _Draws, category: int, height: int, width: int) -> np.ndarray:
    """int64 [height, width, 3] (or broadcast to it): roughly the colour of the class; half of the time with stripes of another."""
    color = _color(draws, CATEGORIES[category].color, 45)
    if draws.integer(0, 1):
        return np.broadcast_to(color, (height, width, 3))
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    period = draws.integer(4, 9)
    stripes = (draws.integer(-2, 2) * y + draws.integer(1, 2) * x) // period % 2
    return color + stripes[..., None] * np.array([draws.integer(-60, 60) for _ in range(3)])


def _expose(draws: _Draws, image: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3]: the image under some light, with noise."""
    gains = np.array([draws.integer(205, 307) for _ in range(3)])
    noise = draws.noise(image.shape) * draws.integer(4, 20)  # 128ths of a grey level
    return np.clip((image * gains + 2 * noise) // 256, 0, 255).astype(np.uint8)


def _segments(classes: np.ndarray, owners: np.ndarray, things: list[_Thing]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    panoptic_seg = np.zeros(classes.shape, np.int32)
    segments_info: list[dict[str, Any]] = []
    masks = [(thing.category, owners == index) for index, thing in enumerate(things)]
    masks += [(category, (owners < 0) & (classes == category)) for category in (_SKY, _GRASS, _WATER)]
    for category, mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not rows.size:
            continue
        top, left = int(rows[0]), int(columns[0])
        segment_id = (len(segments_info) + 1) * _ID_STEP
        panoptic_seg[mask] = segment_id
        segment = {
            "id": segment_id,
            "category_id": category,
            "isthing": CATEGORIES[category].isthing,
            "area": int(mask.sum()),
            "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
            "iscrowd": 0,
        }
        segments_info.append(segment)
    return panoptic_seg, segments_info
