"""The official dataset mappers: what they do to an image and its ground truth before training, as TensorFlow operations, bit for bit.

A mapper is a pure function of an image and of :class:`Draws`, uniform numbers that stand for the calls of random generators upstream: where
upstream's generators return the same numbers, its mappers give the same pixels.

Sources: MaskFormer ``mask_former/data/dataset_mappers``; Detectron2 ``data/transforms/augmentation_impl.py``, ``transform.py``; Pillow's
``src/libImaging/Geometry.c`` (``ImagingScaleAffine``, nearest), PyTorch's ``UpSampleKernel.cpp`` (nearest of float64 maps).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfmaskformer.config import ConfigError
from tfmaskformer.data import preprocessing
from tfmaskformer.data.color import color_aug_ssd
from tfmaskformer.official_yaml import Tree

DETR, SEMANTIC, PANOPTIC = MAPPERS = ("detr_panoptic", "mask_former_semantic", "mask_former_panoptic")
"""``INPUT.DATASET_MAPPER_NAME``: all that upstream has."""
SAMPLINGS = ("choice", "range")
CROP_TYPES = ("absolute", "absolute_range", "relative", "relative_range")

CROP_TRIES = 10
"""How often a crop is drawn until no category takes too much of it; the last is taken whatever it holds."""
DETR_SIZES = (400, 500, 600)
"""Shorter sides in px to which the mapper ``detr_panoptic`` resizes before it crops."""
PAD_VALUE = 128
"""Of the image's three channels, where the mapper pads."""
NO_SEGMENT = -1
"""In a map of segments: none."""

_NO_LIMIT = 2**31 - 1
_KEYS = {"name": "DATASET_MAPPER_NAME", "crop_type": "CROP.TYPE", "crop_size": "CROP.SIZE"}
"""Fields of :class:`Mapper` that have not the name of their key."""


class Draws(NamedTuple):
    """Uniform float64 numbers in [0, 1), one for each call of a random generator upstream; those that a mapper does not need are not read.

    Attributes:
        min_size: of ``ResizeShortestEdge``: the shorter side.
        flip: whether to flip.
        crop_branch: of ``detr_panoptic``: whether to crop.
        crop_min_size: the shorter side before that crop.
        crop: [10, 4], of each try: height, width, top, left.
        color: [9], of :func:`~tfmaskformer.data.color.color_aug_ssd`.
    """

    min_size: tf.Tensor
    flip: tf.Tensor
    crop_branch: tf.Tensor
    crop_min_size: tf.Tensor
    crop: tf.Tensor
    color: tf.Tensor


def draw(seed: tf.Tensor) -> Draws:
    """The draws of an image: a function of ``seed``, int [2], on every device the same."""
    numbers = tf.random.stateless_uniform([4 + 4 * CROP_TRIES + 9], seed, dtype=tf.float64, alg="philox")
    scalars, crop_draws, color_draws = tf.split(numbers, [4, 4 * CROP_TRIES, 9])
    min_size, flip_draw, crop_branch, crop_min_size = tf.unstack(scalars)
    return Draws(min_size, flip_draw, crop_branch, crop_min_size, tf.reshape(crop_draws, [CROP_TRIES, 4]), color_draws)


class Augmented(NamedTuple):
    """What a mapper makes of an image.

    Attributes:
        image: uint8 [height, width, 3].
        segments: int32 [height, width], :data:`NO_SEGMENT` where there is none; None where the mapper got none.
        sem_seg: int32 [height, width]; None where the mapper got none.
    """

    image: tf.Tensor
    segments: tf.Tensor | None
    sem_seg: tf.Tensor | None


@dataclasses.dataclass(frozen=True)
class Mapper:
    """An official dataset mapper; names and defaults are those of ``INPUT`` in the official code.

    ``crop_type`` is empty for no crop. ``crop_size``: height and width; px, or with "relative…" shares; of "absolute_range" the least and
    the largest side.
    """

    name: str = SEMANTIC  # DATASET_MAPPER_NAME
    min_size_train: tuple[int, ...] = (800,)  # MIN_SIZE_TRAIN
    max_size_train: int = 1333  # MAX_SIZE_TRAIN
    min_size_train_sampling: str = "choice"  # MIN_SIZE_TRAIN_SAMPLING
    crop_type: str = ""  # CROP.TYPE, if CROP.ENABLED
    crop_size: tuple[float, float] = (0.9, 0.9)  # CROP.SIZE
    single_category_max_area: float = 1.0  # CROP.SINGLE_CATEGORY_MAX_AREA: share of a crop; 1: no limit
    color_aug_ssd: bool = False  # COLOR_AUG_SSD
    size_divisibility: int = -1  # SIZE_DIVISIBILITY: the side to which images are padded; 0 or below: they are not
    ignore_value: int = 255  # MODEL.SEM_SEG_HEAD.IGNORE_VALUE: the category that may take any share of a crop
    ignore_label: int = 255  # the data set's, with which semantic maps are padded

    def __post_init__(self) -> None:
        self._require("name", self.name in MAPPERS, f"one of {MAPPERS}")
        self._require("min_size_train_sampling", self.min_size_train_sampling in SAMPLINGS, f"one of {SAMPLINGS}")
        self._require("crop_type", self.crop_type in ("", *CROP_TYPES), f"one of {CROP_TYPES}")
        sizes = self.min_size_train
        self._require(
            "min_size_train", bool(sizes) and all(0 <= size <= _NO_LIMIT for size in sizes), "at least one size, in px, below 2**31"
        )
        ranged = self.min_size_train_sampling == "range"
        self._require("min_size_train", not ranged or (len(sizes) == 2 and sizes[0] <= sizes[1]), "the least and the largest size")
        self._require("max_size_train", 0 < self.max_size_train <= _NO_LIMIT, "a size in px, below 2**31")
        first, second = self.crop_size
        self._require("crop_size", min(first, second) > 0 and max(first, second) <= _NO_LIMIT, "numbers above 0, below 2**31")
        whole = "absolute" not in self.crop_type or all(isinstance(side, int) for side in self.crop_size)
        self._require("crop_size", whole, f"whole numbers of px, as 'INPUT.CROP.TYPE' is {self.crop_type!r}")
        self._require("crop_size", "relative" not in self.crop_type or max(first, second) <= 1, "shares, 1 at most")
        self._require("crop_size", self.crop_type != "absolute_range" or first <= second, "the least and the largest side")
        if self._padded:
            largest = max(self._unpadded())
            expected = f"{largest} px or more, or none: images can be as large, and upstream cuts off what is beyond it"
            self._require("size_divisibility", largest <= self.size_divisibility, expected)

    def _require(self, field: str, condition: bool, expected: str) -> None:
        if not condition:
            key = _KEYS.get(field, field.upper())
            raise ConfigError(f"input: 'INPUT.{key}' is {getattr(self, field)!r}, expected {expected}")

    def canvas(self) -> tuple[int, int]:
        """Height and width in px of the smallest canvas that holds all that the mapper can make of any image.

        Raises:
            ValueError: there is none, since images are left at their own size (a ``min_size_train`` of 0).
        """
        if not self.bounded:
            raise ValueError(f"{self.name}: 'INPUT.MIN_SIZE_TRAIN' 0 leaves images at their own size; name a canvas that holds them")
        return (self.size_divisibility, self.size_divisibility) if self._padded else self._unpadded()

    @property
    def bounded(self) -> bool:
        """Whether there is such a canvas."""
        return 0 not in self.min_size_train or (self.name != DETR and self.crop_type == "absolute")

    @property
    def _padded(self) -> bool:
        return self.name != DETR and self.size_divisibility > 0

    def _unpadded(self) -> tuple[int, int]:
        largest = self.max_size_train
        if self.name == DETR or "absolute" not in self.crop_type:
            return largest, largest
        height, width = map(int, self.crop_size if self.crop_type == "absolute" else self.crop_size[1:] * 2)
        return min(height, largest), min(width, largest)

    def __call__(self, draws: Draws, image: tf.Tensor, segments: tf.Tensor | None = None, sem_seg: tf.Tensor | None = None) -> Augmented:
        """The image and its maps, augmented alike.

        Args:
            draws: of :func:`draw`.
            image: uint8 [height, width, 3] RGB.
            segments: int32 [height, width], resized as upstream resizes panoptic maps.
            sem_seg: int32 [height, width], resized as upstream resizes semantic maps, which is by another rule; classes from 0.

        Raises:
            ValueError: a limit of a category's area, and no ``sem_seg``.
        """
        augmented = Augmented(image, segments, sem_seg)
        if self.name == DETR:
            return self._detr(draws, augmented)
        augmented = resize(augmented, self._min_size(draws), self.max_size_train, functools.partial(self._window, draws))
        if self.color_aug_ssd:
            augmented = augmented._replace(image=color_aug_ssd(augmented.image, draws.color))
        augmented = flip(augmented, draws)
        return pad(augmented, self.size_divisibility, self.ignore_label) if self._padded else augmented

    def _detr(self, draws: Draws, augmented: Augmented) -> Augmented:
        augmented = flip(augmented, draws)
        if self.crop_type:

            def cropped() -> Augmented:
                min_size = _choice(draws.crop_min_size, DETR_SIZES)
                return resize(augmented, min_size, _NO_LIMIT, functools.partial(self._window, draws))

            augmented = tf.cond(draws.crop_branch > 0.5, lambda: augmented, cropped)
        return resize(augmented, self._min_size(draws), self.max_size_train)

    def _min_size(self, draws: Draws) -> tf.Tensor:
        if self.min_size_train_sampling == "choice":
            return _choice(draws.min_size, self.min_size_train)
        low, high = self.min_size_train
        return _randint(draws.min_size, low, high + 1)

    def _window(self, draws: Draws, size: tf.Tensor, sem_seg: tf.Tensor | None) -> tf.Tensor:
        """What is cropped of an image of this size, int32 [4], given its semantic map; all of it without a crop."""
        if not self.crop_type:
            return tf.concat([[0, 0], size], 0)
        windows = crop_windows(self.crop_type, self.crop_size, draws.crop, size)
        if self.name == DETR or self.single_category_max_area >= 1:
            return windows[0]
        if sem_seg is None:
            raise ValueError(f"{self.name}: a category may take {self.single_category_max_area} of a crop at most, and there is no sem_seg")
        return balanced_window(windows, sem_seg, self.single_category_max_area, self.ignore_value)


def mapper_of(tree: Tree, ignore_label: int | None = None) -> Mapper:
    """The mapper of a whole config (:func:`~tfmaskformer.official_yaml.read_tree`).

    ``INPUT.RANDOM_FLIP`` and ``INPUT.MASK_FORMAT`` are not read, as upstream: its mappers always flip, horizontally.

    Args:
        ignore_label: the data set's; default ``MODEL.SEM_SEG_HEAD.IGNORE_VALUE``.

    Raises:
        ConfigError: a key of ``INPUT`` has a value that is not supported.
    """
    values, ignore_value = tree["INPUT"], tree["MODEL"]["SEM_SEG_HEAD"]["IGNORE_VALUE"]
    if values["FORMAT"] != "RGB":
        raise ConfigError(f"input: 'INPUT.FORMAT' is {values['FORMAT']!r}, supported: 'RGB'")
    sizes = values["MIN_SIZE_TRAIN"]
    crop_values: dict[str, Any] = values["CROP"]
    return Mapper(
        name=values["DATASET_MAPPER_NAME"],
        min_size_train=(sizes,) if isinstance(sizes, int) else tuple(sizes),
        max_size_train=values["MAX_SIZE_TRAIN"],
        min_size_train_sampling=values["MIN_SIZE_TRAIN_SAMPLING"],
        crop_type=crop_values["TYPE"] if crop_values["ENABLED"] else "",
        crop_size=tuple(crop_values["SIZE"]),
        single_category_max_area=crop_values["SINGLE_CATEGORY_MAX_AREA"],
        color_aug_ssd=values["COLOR_AUG_SSD"],
        size_divisibility=values["SIZE_DIVISIBILITY"],
        ignore_value=ignore_value,
        ignore_label=ignore_value if ignore_label is None else ignore_label,
    )


def resize(
    augmented: Augmented, min_size: tf.Tensor, max_size: int, window_of: Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor] | None = None
) -> Augmented:
    """``ResizeShortestEdge``, then ``CropTransform``: only what is kept is computed of the image.

    Images are resized by Pillow's bilinear filter, segments by Pillow's nearest rule, semantic maps by PyTorch's.

    Args:
        min_size, max_size: px.
        window_of: of the resized image's size, int32 [2], and semantic map, the window that is kept, int32 [4]: top, left, height, width;
            default all of it.
    """
    image, segments, sem_seg = augmented
    old = tf.shape(image)[:2]
    new = preprocessing.resized_shape_tf(old, min_size, max_size)
    if sem_seg is not None:
        sem_seg = _gather(sem_seg, *(torch_nearest(old[axis], new[axis]) for axis in (0, 1)))
    if segments is not None:
        segments = _gather(segments, *(pillow_nearest(old[axis], new[axis]) for axis in (0, 1)))
    if window_of is None:
        return Augmented(preprocessing.resize_bilinear(image, new), segments, sem_seg)
    window = window_of(new, sem_seg)
    maps = (None if values is None else _cut(values, window) for values in (segments, sem_seg))
    return Augmented(preprocessing.resize_bilinear(image, new, window), *maps)


def pillow_nearest(in_size: tf.Tensor, out_size: tf.Tensor) -> tf.Tensor:
    """Source index of each output of Pillow's ``resize(…, NEAREST)`` along an axis, int32 [out_size]: positions are added up, float64."""
    scale = tf.cast(in_size, tf.float64) / tf.cast(out_size, tf.float64)
    steps = tf.fill([out_size], scale)
    return tf.cast(tf.cumsum(tf.concat([[scale * 0.5], steps[1:]], 0)), tf.int32)


def torch_nearest(in_size: tf.Tensor, out_size: tf.Tensor) -> tf.Tensor:
    """Source index of each output of ``interpolate(mode="nearest")`` of float64 maps along an axis, int32 [out_size]."""
    scale = tf.cast(in_size, tf.float64) / tf.cast(out_size, tf.float64)
    position = tf.cast(tf.cast(tf.range(out_size), tf.float64) * scale, tf.float32)  # PyTorch's floor takes float32
    return tf.minimum(tf.cast(position, tf.int32), in_size - 1)


def _gather(values: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor) -> tf.Tensor:
    return tf.gather(tf.gather(values, rows, axis=0), columns, axis=1)


def crop_windows(crop_type: str, crop_size: tuple[float, float], draws: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """The windows that ``RandomCrop`` draws.

    Args:
        crop_type, crop_size: see :class:`Mapper`.
        draws: float64 [tries, 4]: height, width, top, left.
        size: int32 [2], of the image.

    Returns:
        int32 [tries, 4]: top, left, height, width.
    """
    exact = tf.cast(size, tf.float64)
    if crop_type == "absolute":
        window = tf.broadcast_to(tf.minimum(tf.constant(crop_size, tf.int32), size), [tf.shape(draws)[0], 2])
    elif crop_type == "absolute_range":
        low, high = (tf.minimum(int(side), size) for side in crop_size)
        window = _randint(draws[:, :2], low, high + 1)
    elif crop_type == "relative":
        window = tf.broadcast_to(tf.cast(exact * tf.constant(crop_size, tf.float64) + 0.5, tf.int32), [tf.shape(draws)[0], 2])
    else:
        least = np.array(crop_size, np.float32)
        window = tf.cast(exact * (least.astype(np.float64) + draws[:, :2] * (1 - least).astype(np.float64)) + 0.5, tf.int32)
    corner = _randint(draws[:, 2:], 0, size - window + 1)
    return tf.concat([corner, window], axis=1)


def balanced_window(windows: tf.Tensor, sem_seg: tf.Tensor, max_area: float, ignore_value: int) -> tf.Tensor:
    """``RandomCrop_CategoryAreaConstraint``: the first window with two categories, none of which takes ``max_area`` of it, or the last.

    Args:
        windows: int32 [tries, 4].
        sem_seg: int32 [height, width], classes from 0.
        max_area: share of the pixels that have a category.
        ignore_value: no category.

    Returns:
        int32 [4].
    """

    def refused(window):
        labels = tf.reshape(_cut(sem_seg, window), [-1])
        counts = tf.math.bincount(tf.boolean_mask(labels, labels != ignore_value))
        most, all_ = (tf.cast(reduce(counts), tf.float64) for reduce in (tf.reduce_max, tf.reduce_sum))
        return tf.logical_not((tf.math.count_nonzero(counts) > 1) & (most < all_ * max_area))

    last = tf.shape(windows)[0] - 1
    chosen = tf.while_loop(lambda number: (number < last) & refused(windows[number]), lambda number: (number + 1,), (tf.constant(0),))
    return windows[chosen[0]]


def _cut(values: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
    top, left, height, width = tf.unstack(window)
    return values[top : top + height, left : left + width]


def flip(augmented: Augmented, draws: Draws) -> Augmented:
    """``RandomFlip``: left for right, or not."""
    return tf.cond(
        draws.flip < 0.5,
        lambda: Augmented(*(None if values is None else tf.reverse(values, [1]) for values in augmented)),
        lambda: augmented,
    )


def pad(augmented: Augmented, side: int, ignore_label: int) -> Augmented:
    """A square of ``side`` px, with the image in its top left corner."""
    image, segments, sem_seg = augmented
    return Augmented(
        pad_to(image, (side, side), PAD_VALUE),
        None if segments is None else pad_to(segments, (side, side), NO_SEGMENT),
        None if sem_seg is None else pad_to(sem_seg, (side, side), ignore_label),
    )


def pad_to(values: tf.Tensor, canvas: tuple[int, int], value: int) -> tf.Tensor:
    """``values`` [height, width, …] in the top left corner of a canvas of known size, filled up with ``value``.

    Raises:
        tf.errors.InvalidArgumentError: larger than the canvas.
    """
    missing = tf.constant(canvas) - tf.shape(values)[:2]
    channels = values.shape[2:].num_elements()
    rows = tf.reshape(values, [tf.shape(values)[0], tf.shape(values)[1] * channels])  # TensorFlow pads two axes far faster than three
    padded = tf.pad(rows, [[0, missing[0]], [0, missing[1] * channels]], constant_values=tf.cast(value, values.dtype))
    return tf.reshape(padded, [*canvas, *values.shape[2:]])


def _choice(draws: tf.Tensor, values: tuple[int, ...]) -> tf.Tensor:
    """``numpy.random.choice``."""
    return tf.gather(tf.constant(values, tf.int32), _randint(draws, 0, len(values)))


def _randint(draws: tf.Tensor, low: Any, high: Any) -> tf.Tensor:
    """``numpy.random.randint``: int32 from ``low`` to ``high − 1``."""
    return low + tf.cast(tf.floor(draws * tf.cast(high - low, tf.float64)), tf.int32)
