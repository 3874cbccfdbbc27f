"""Reading an image and resizing it for the model, as Detectron2 does it for a test, bit for bit: with Pillow, or with TensorFlow alone.

Sources: Detectron2's ``data/detection_utils.py`` (``read_image``) and ``data/transforms/augmentation_impl.py`` (``ResizeShortestEdge``);
Pillow's ``src/libImaging/Resample.c``, whose fixed-point arithmetic :func:`resize_bilinear` repeats. Images are RGB, as every official
config has them (``INPUT.FORMAT``), uint8, [height, width, 3].
"""

from __future__ import annotations

import io

import numpy as np
import PIL
import tensorflow as tf
from PIL import Image

_EXIF_ORIENTATION = 274
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the image upright."""

_PRECISION_BITS = 32 - 8 - 2
"""Pillow's coefficients are integers, 2²² for 1."""

_VERTICAL_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""Pillow goes over the rows first; since 13.0 not where the height loses more than twice as many px as the width: tall images that shrink.
This moves their values by 1 at most."""


def decode_image(data: bytes) -> np.ndarray:
    """uint8 [height, width, 3] RGB of a file's bytes, upright by its EXIF orientation: Detectron2's ``read_image(file, "RGB")``.

    Raises:
        OSError, SyntaxError, ValueError, …: what Pillow raises on a file that is no image, or a truncated one.
    """
    with Image.open(io.BytesIO(data)) as image:
        upright = _TRANSPOSITIONS.get(exif_orientation(image))
        return np.asarray((image if upright is None else image.transpose(upright)).convert("RGB"))


def exif_orientation(image: Image.Image) -> int:
    """1 … 8; 1, upright, where the file does not tell."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises many kinds on a broken EXIF block; Detectron2 takes the image as it is
        return 1


def resized_shape(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width in px after ``ResizeShortestEdge``: the shorter side becomes ``min_size``, the longer at most ``max_size``.

    A ``min_size`` of 0 leaves the image as it is, as upstream.

    >>> resized_shape(427, 640, 800, 1333), resized_shape(300, 900, 800, 1333), resized_shape(300, 900, 0, 100)
    ((800, 1199), (444, 1333), (300, 900))
    """
    if min_size == 0:
        return height, width
    scale = float(min_size) / min(height, width)
    new_height, new_width = (float(min_size), scale * width) if height < width else (scale * height, float(min_size))
    if max(new_height, new_width) > max_size:
        scale = float(max_size) / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


def resize_shortest_edge(image: np.ndarray, min_size: int, max_size: int) -> np.ndarray:
    """``image`` (uint8 [height, width, 3]) resized by Pillow's bilinear filter to :func:`resized_shape`: the official test transform.

    ``min_size`` and ``max_size``: ``config.test.min_size`` (0: the image as it is) and ``config.test.max_size``, px.
    """
    height, width = resized_shape(image.shape[0], image.shape[1], min_size, max_size)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def decode_image_tf(data: tf.Tensor, image_format: tf.Tensor) -> tf.Tensor:
    """:func:`decode_image` in TensorFlow, for upright JPEG and PNG files of 8 bits.

    Of JPEG files it takes the accurate integer transform, as Pillow does; with TensorFlow's own choice two thirds of the values differ.

    Args:
        data: string scalar, the file.
        image_format: string scalar, "jpeg" or "png".
    """
    image = tf.cond(
        image_format == "png",
        lambda: tf.io.decode_png(data, channels=3),
        lambda: tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE", fancy_upscaling=True),
    )
    return tf.ensure_shape(image, [None, None, 3])


def resized_shape_tf(shape: tf.Tensor, min_size: int, max_size: int) -> tf.Tensor:
    """:func:`resized_shape` in TensorFlow: int32 [2] of int32 [2]."""
    old, low, high = (tf.cast(size, tf.float64) for size in (shape, min_size, max_size))
    # The shorter side itself becomes min_size, not a product that rounds; of a square, both do.
    new = tf.where(old == tf.reduce_min(old), low, old * (low / tf.reduce_min(old)))
    longest = tf.reduce_max(new)
    new = tf.where(longest > high, new * (high / longest), new)
    return tf.cast(tf.where(low == 0, old, new + 0.5), tf.int32)


def resize_shortest_edge_tf(image: tf.Tensor, min_size: int, max_size: int) -> tf.Tensor:
    """:func:`resize_shortest_edge` in TensorFlow, bit for bit: uint8 [height, width, 3], sizes known or not."""
    return resize_bilinear(image, resized_shape_tf(tf.shape(image)[:2], min_size, max_size))


def resize_bilinear(image: tf.Tensor, size: tf.Tensor, window: tf.Tensor | None = None) -> tf.Tensor:
    """Pillow's ``resize(…, BILINEAR)`` of 8-bit images, bit for bit, in integers; antialiased where it shrinks.

    Pillow goes over rows and columns in turn, and rounds to uint8 after each; the order is that of the Pillow which is installed.

    Args:
        image: uint8 [height, width, channels].
        size: int32 [2], height and width of the result, px.
        window: int32 [4], the part of the result that is wanted: top, left, height, width; default all of it.

    Returns:
        uint8 [size[0], size[1], channels], or the window of it.
    """
    first, length = (tf.zeros([2], tf.int32), size) if window is None else (window[:2], window[2:])

    def passes(*axes):
        resized = image
        for axis in axes:
            turned = tf.transpose(resized, [1, 0, 2]) if axis else resized  # whole rows are gathered ten times as fast
            resampled = _resample(turned, size[axis], first[axis], length[axis])
            resized = tf.transpose(resampled, [1, 0, 2]) if axis else resampled
        return resized

    lost = tf.shape(image)[:2] - size
    vertical_first = _VERTICAL_FIRST & (lost[0] > 0) & (lost[0] > 2 * lost[1])
    return tf.cond(vertical_first, lambda: passes(0, 1), lambda: passes(1, 0))


def _resample(image: tf.Tensor, out_size: tf.Tensor, start: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    """One of Pillow's two passes, along columns, for ``length`` rows from ``start`` on: sums of rows, weighted with 22-bit integers."""
    in_size = tf.shape(image)[0]
    scale = tf.cast(in_size, tf.float64) / tf.cast(out_size, tf.float64)
    support = tf.maximum(scale, 1.0)  # the bilinear filter's half width, 1, in input pixels
    center = (tf.cast(start + tf.range(length), tf.float64) + 0.5) * scale
    first = tf.cast(tf.maximum(center - support + 0.5, 0.0), tf.int32)
    taps = tf.minimum(tf.cast(center + support + 0.5, tf.int32), in_size) - first
    num_taps = tf.reduce_max(taps)

    def weight(tap):
        distance = tf.abs((tf.cast(tap + first, tf.float64) - center + 0.5) * (1.0 / support))
        return tf.where(tap < taps, tf.maximum(1.0 - distance, 0.0), 0.0)

    # Added one by one, as Pillow adds them: another order can change the last bit of the sum, and with it a weight.
    total = tf.while_loop(
        lambda tap, _: tap < num_taps,
        lambda tap, total: (tap + 1, total + weight(tap)),
        (tf.constant(0), tf.zeros([length], tf.float64)),
    )[1]

    def add(tap, accumulated):
        fixed = tf.cast(weight(tap) / total * 2.0**_PRECISION_BITS + 0.5, tf.int32)
        pixels = tf.gather(image, tf.minimum(first + tap, in_size - 1))
        return tap + 1, accumulated + tf.cast(pixels, tf.int32) * fixed[:, tf.newaxis, tf.newaxis]

    half = tf.fill([length, tf.shape(image)[1], tf.shape(image)[2]], 1 << (_PRECISION_BITS - 1))
    accumulated = tf.while_loop(
        lambda tap, _: tap < num_taps,
        add,
        (tf.constant(0), half),
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None, image.shape[2]])),
    )[1]
    return tf.cast(tf.clip_by_value(tf.bitwise.right_shift(accumulated, _PRECISION_BITS), 0, 255), tf.uint8)
