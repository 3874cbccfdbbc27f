"""Images that reach the network in another way: colours, size, normalisation, padding."""

from __future__ import annotations

import io

import numpy as np
import tensorflow as tf
from PIL import Image

from parity.faults.fault import PANOPTIC, SEMANTIC, Fault, configured, replaced
from tfmaskformer.data import preprocessing
from tfmaskformer.layers import zero_outside
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import tap


def bgr(right):
    return lambda self, images, *rest: right(self, images[..., ::-1], *rest)


def preprocess(*, pad_first=False, at_the_top_left=False, uint8_mean=False):
    def make(right):
        def call(self, images, image_sizes=None):
            dtype = tf.as_dtype(self.compute_dtype)
            mean, std = (tf.cast(np.array(values, np.float32), dtype) for values in (self.config.pixel_mean, self.config.pixel_std))
            if uint8_mean:
                mean = tf.round(mean)
            images = zero_outside(tf.cast(images, dtype), image_sizes)
            _, height, width, _ = images.shape
            missing = (self._round_up(height) - height, self._round_up(width) - width)
            margins = [[0, 0], *([length, 0] if at_the_top_left else [0, length] for length in missing), [0, 0]]
            if pad_first:
                images = (tf.pad(images, margins) - mean) / std
            else:
                images = tf.pad(zero_outside((images - mean) / std, image_sizes), margins)
            return tap("images", images)

        return call

    return replaced(MaskFormer, "preprocess", make)


def read_as_bgr(right):
    return lambda data: right(data)[..., ::-1]


def never_upright(right):
    def decode_image(data):
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))

    return decode_image


def truncated(right):
    def resized_shape(height, width, min_size, max_size):
        scale = min(min_size / min(height, width), max_size / max(height, width))
        return int(height * scale), int(width * scale)

    return resized_shape


def longest_side_free(right):
    return lambda height, width, min_size, max_size: right(height, width, min_size, 10**6)


def resized_by(method, **options):
    """By ``tf.image.resize``."""

    def make(right):
        def resize(image, min_size, max_size):
            size = preprocessing.resized_shape(image.shape[0], image.shape[1], min_size, max_size)
            resized = tf.image.resize(image, size, method, **options)
            return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8).numpy()

        return resize

    return replaced(preprocessing, "resize_shortest_edge", make)


def square(right):
    """Warped to a square: the shape of the image is lost."""
    return lambda height, width, min_size, max_size: (min_size, min_size)


# fmt: off
FAULTS = (
    Fault("BGR", "preprocessing", PANOPTIC, "even", "taps", "images", "BGR", replaced(MaskFormer, "preprocess", bgr), first=True),
    Fault("mean in the order of BGR", "preprocessing", PANOPTIC, "odd", "taps", "images", "BGR",
          configured(pixel_mean=(103.53, 116.28, 123.675))),
    Fault("not divided by the standard deviation", "preprocessing", SEMANTIC, "odd", "taps", "images", "scale",
          configured(pixel_std=(1.0, 1.0, 1.0))),
    Fault("padded, then normalised", "preprocessing", SEMANTIC, "odd", "taps", "images", "padding", preprocess(pad_first=True)),
    Fault("padded at the top and left", "preprocessing", SEMANTIC, "odd", "taps", "images", "padding side",
          preprocess(at_the_top_left=True)),
    Fault("padded to 32 where the official model is not", "preprocessing", PANOPTIC, "odd", "taps", "images", "padding",
          configured(size_divisibility=32)),
    Fault("file read as BGR", "preprocessing", PANOPTIC, "odd", "preprocessing", "read", "BGR",
          replaced(preprocessing, "decode_image", read_as_bgr)),
    Fault("orientation in the file ignored", "preprocessing", PANOPTIC, "odd", "preprocessing", "read", "axis flip",
          replaced(preprocessing, "decode_image", never_upright)),
    Fault("size truncated, not rounded", "preprocessing", PANOPTIC, "odd", "preprocessing", "resized", "dtype rounding",
          replaced(preprocessing, "resized_shape", truncated)),
    Fault("longer side not limited", "preprocessing", PANOPTIC, "odd", "preprocessing", "resized", "clip",
          replaced(preprocessing, "resized_shape", longest_side_free)),
    Fault("shrunk without antialiasing", "preprocessing", PANOPTIC, "odd", "preprocessing", "resized", "interpolation",
          resized_by("bilinear")),
    Fault("resized by TensorFlow, a grey level off", "preprocessing", PANOPTIC, "odd", "preprocessing", "resized", "dtype rounding",
          resized_by("bilinear", antialias=True)),
)
# fmt: on
