"""Photographs come upright out of a graph as they come out of Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tfmaskformer.data.orientation import exif_orientation_tf, upright_tf
from tfmaskformer.data.preprocessing import decode_image, decode_image_tf


def jpeg(orientation, endian="<", more=()):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F] = "maker"
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8))
    image.save(file, format="JPEG", exif=exif, comment=b"x" * 300, icc_profile=b"y" * 500, **dict(more))
    return file.getvalue()


@tf.function
def decoded(data):
    return upright_tf(decode_image_tf(data, tf.constant("jpeg")), exif_orientation_tf(data))


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_as_pillow(orientation, endian):
    data = jpeg(orientation, endian)
    assert int(exif_orientation_tf(tf.constant(data))) == (orientation or 1)
    np.testing.assert_array_equal(decoded(tf.constant(data)), decode_image(data))


def test_files_that_tell_nothing():
    data = jpeg(6)
    place = data.index(b"Exif")
    for broken in (
        b"",
        b"\xff",
        b"no image at all",
        data[: place + 2],
        data[: place + 12],
        data.replace(b"Exif", b"Exit"),
        jpeg(0),
        jpeg(9),
        data[: place + 10] + b"\xff" * 4 + data[place + 14 :],  # a directory far outside
    ):
        assert int(exif_orientation_tf(tf.constant(broken))) == 1
