"""Detectron2's SSD colour augmentation in TensorFlow, bit for bit: brightness, contrast, saturation and hue of 8-bit images.

Sources: Detectron2 ``projects/point_rend/color_augmentation.py``; paper: Liu et al., "SSD: Single Shot MultiBox Detector", arXiv
1512.02325. Upstream leaves the conversion to HSV and back to OpenCV, whose arithmetic is repeated here: fixed-point forth, float32 back.
On the way back OpenCV takes pixels 32 at a time (AVX2) and cuts off their fractions; those that remain at the end of a row are rounded.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

BRIGHTNESS_DELTA = 32
CONTRAST = SATURATION = (0.5, 1.5)
HUE_DELTA = 18

VECTOR_PX = 32
"""Pixels that OpenCV converts at a time, as its builds for x86-64 do on every processor with AVX2."""

_HUES = 180
_BITS = 12
"""OpenCV's fixed-point numbers are integers, 2¹² for 1."""

_BY_VALUE, _BY_DIFFERENCE = (
    np.concatenate([[0], np.rint((top << _BITS) / np.arange(1, 256))]).astype(np.int32) for top in (255, _HUES // 6)
)
"""255 / value and 30 / difference, fixed-point; 0 for 0."""


def color_aug_ssd(image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """``ColorAugSSDTransform``.

    Args:
        image: uint8 [height, width, 3] RGB.
        draws: float64 [9], uniform in [0, 1): brightness or not, how much; contrast before the others or after; contrast or not, how much;
            the same of saturation and of hue.

    Returns:
        uint8 [height, width, 3] RGB.
    """
    brighter, delta, first, contrasted, contrast, saturated, saturation, hued, hue = tf.unstack(draws)
    image = tf.cond(_coin(brighter), lambda: _convert(image, beta=_uniform(delta, -BRIGHTNESS_DELTA, BRIGHTNESS_DELTA)), lambda: image)
    image = tf.cond(_coin(first) & _coin(contrasted), lambda: _convert(image, _uniform(contrast, *CONTRAST)), lambda: image)
    image = tf.cond(_coin(saturated), lambda: _saturated(image, _uniform(saturation, *SATURATION)), lambda: image)
    image = tf.cond(_coin(hued), lambda: _hued(image, tf.cast(tf.floor(_uniform(hue, -HUE_DELTA, HUE_DELTA + 1)), tf.int32)), lambda: image)
    return tf.cond(~_coin(first) & _coin(contrasted), lambda: _convert(image, _uniform(contrast, *CONTRAST)), lambda: image)


def _coin(draw: tf.Tensor) -> tf.Tensor:
    return draw >= 0.5


def _uniform(draw: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return low + (high - low) * draw


def _convert(values: tf.Tensor, alpha: tf.Tensor | None = None, beta: tf.Tensor | None = None) -> tf.Tensor:
    """uint8 of ``alpha · values`` or ``values + beta``, computed in float32, without its fraction."""
    converted = tf.cast(values, tf.float32)
    converted = converted + tf.cast(beta, tf.float32) if alpha is None else converted * tf.cast(alpha, tf.float32)
    return tf.cast(tf.clip_by_value(converted, 0, 255), tf.uint8)


def _saturated(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    hue, saturation, value = rgb_to_hsv(image)
    return hsv_to_rgb(hue, tf.cast(_convert(saturation, factor), tf.int32), value)


def _hued(image: tf.Tensor, delta: tf.Tensor) -> tf.Tensor:
    hue, saturation, value = rgb_to_hsv(image)
    return hsv_to_rgb((hue + delta) % _HUES, saturation, value)


def rgb_to_hsv(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """OpenCV's ``cvtColor(…, COLOR_RGB2HSV)`` of 8-bit images.

    Args:
        image: uint8 [height, width, 3] RGB.

    Returns:
        int32 [height, width] each: hue in 2°, 0 … 179; saturation and value, 0 … 255.
    """
    red, green, blue = tf.unstack(tf.cast(image, tf.int32), axis=-1)
    value = tf.maximum(tf.maximum(red, green), blue)
    difference = value - tf.minimum(tf.minimum(red, green), blue)
    sixths = tf.where(value == red, green - blue, tf.where(value == green, blue - red + 2 * difference, red - green + 4 * difference))
    hue = _fixed(sixths * tf.gather(_BY_DIFFERENCE, difference))
    return tf.where(hue < 0, hue + _HUES, hue), _fixed(difference * tf.gather(_BY_VALUE, value)), value


def _fixed(product: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.right_shift(product + (1 << (_BITS - 1)), _BITS)


def hsv_to_rgb(hue: tf.Tensor, saturation: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """OpenCV's ``cvtColor(…, COLOR_HSV2RGB)`` of 8-bit images, on a processor with AVX2: uint8 [height, width, 3].

    Each channel is ``value · (1 − saturation · g)``, where g depends on the channel and the hue alone. ``1 − saturation · g`` is one
    operation there, rounded once: float64 holds the product exactly.

    Args:
        hue: int32 [height, width], 0 … 179.
        saturation, value: int32 [height, width], 0 … 255.
    """
    saturations = tf.gather(_UNITS.astype(np.float64), saturation)[..., tf.newaxis]
    shares = tf.cast(1 - saturations * tf.gather(_TAKEN, hue), tf.float32)
    channels = tf.gather(_UNITS, value)[..., tf.newaxis] * shares
    # In float64, exactly, and rounded then: TensorFlow changes the order of float32 products with constants.
    channels = tf.cast(tf.cast(channels, tf.float64) * 255, tf.float32)
    width = tf.shape(hue)[1]
    cut = (tf.range(width) < width - width % VECTOR_PX)[:, tf.newaxis]
    return tf.cast(tf.where(cut, tf.floor(channels), tf.round(channels)), tf.uint8)


def _taken() -> np.ndarray:
    """float64 [180, 3]: of float32 numbers, what the saturation takes of red, green and blue at each hue."""
    sixths = np.arange(_HUES, dtype=np.float32) * np.float32(6 / _HUES)
    sector = np.floor(sixths)
    up = sixths - sector
    none, all_, down = np.zeros_like(up), np.ones_like(up), 1 - up  # ``up``: of the channel that falls in this sector; ``down``: rises
    by_sector = np.stack(
        [
            np.choose(sector.astype(int), channel)
            for channel in (
                (none, up, all_, all_, down, none),
                (down, none, none, up, all_, all_),
                (all_, all_, down, none, none, up),
            )
        ],
        axis=-1,
    )
    return by_sector.astype(np.float64)


_TAKEN = _taken()
_UNITS = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
