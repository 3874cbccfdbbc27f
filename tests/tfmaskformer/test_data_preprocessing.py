"""Reading and resizing images: the official test loader's pixels, with Pillow and with TensorFlow alone."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tfmaskformer.data import preprocessing

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "data"
PHOTOS = ROOT / "checkpoints" / "photos"
RECORDED = json.loads((GOLDEN / "recorded.json").read_text())

resize_bilinear = tf.function(
    preprocessing.resize_bilinear, input_signature=[tf.TensorSpec([None, None, None], tf.uint8), tf.TensorSpec([2], tf.int32)]
)
resize_shortest_edge_tf = tf.function(
    preprocessing.resize_shortest_edge_tf,
    input_signature=[tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([], tf.int32), tf.TensorSpec([], tf.int32)],
)


def sha256(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


@pytest.mark.parametrize("case", RECORDED["transformed"])
def test_equals_the_official_test_loader(case):
    name, min_size, max_size = case.split()
    sizes = int(min_size), int(max_size)
    file = next(path for path in (GOLDEN / "images" / name, PHOTOS / name) if path.exists())
    image = preprocessing.decode_image(file.read_bytes())
    height, width, new_height, new_width, digest = RECORDED["transformed"][case]
    assert image.shape == (height, width, 3)
    assert preprocessing.resized_shape(height, width, *sizes) == (new_height, new_width)
    resized = preprocessing.resize_shortest_edge(image, *sizes)
    assert (resized.shape, sha256(resized)) == ((new_height, new_width, 3), digest)
    np.testing.assert_array_equal(resize_shortest_edge_tf(image, *sizes), resized)


def test_every_orientation_is_recorded():
    names = {case.split()[0] for case in RECORDED["transformed"]}
    digests = {RECORDED["transformed"][f"orientation{orientation}.jpg 64 100"][-1] for orientation in range(2, 9)}
    assert len(digests) == 7
    assert {file.name for folder in (GOLDEN / "images", PHOTOS) for file in folder.glob("*.[jp][pn]g")} == names


def test_resize_is_pillows():
    rng = np.random.default_rng(0)
    for index in range(90):
        high = (40, 200)[index % 2]
        height, width, new_height, new_width = (int(size) for size in rng.integers(1, high, 4))
        channels = 1 + 2 * (index % 3 > 0)
        image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        if index % 5 == 0:  # the largest and smallest sums
            image = np.where(image > 127, 255, 0).astype(np.uint8)
        expected = np.asarray(
            Image.fromarray(image.squeeze(-1) if channels == 1 else image).resize((new_width, new_height), Image.BILINEAR)
        )
        actual = resize_bilinear(image, [new_height, new_width]).numpy()
        np.testing.assert_array_equal(
            actual, expected.reshape(new_height, new_width, channels), err_msg=f"{image.shape} to {expected.shape}"
        )


@pytest.mark.parametrize("size", [(400, 90), (90, 400), (300, 160), (301, 150)])
def test_tall_and_wide_images_that_shrink(size):
    """Pillow's order of the two passes shows here."""
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = preprocessing.resize_shortest_edge(image, 64, 1333)
    np.testing.assert_array_equal(resize_shortest_edge_tf(image, 64, 1333), expected)
    assert (expected != image[: expected.shape[0], : expected.shape[1]]).any()


def test_a_size_of_0_leaves_an_image_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (31, 50, 3), dtype=np.uint8)
    np.testing.assert_array_equal(preprocessing.resize_shortest_edge(image, 0, 20), image)
    np.testing.assert_array_equal(resize_shortest_edge_tf(image, 0, 20), image)


def test_sizes_in_tensorflow():
    """A sweep of sizes, squares among them; TensorFlow's arithmetic rounds as Python's."""
    signature = [tf.TensorSpec(shape, tf.int32) for shape in ([2], [], [])]
    resized_shape_tf = tf.function(preprocessing.resized_shape_tf, input_signature=signature)
    rng = np.random.default_rng(0)
    shapes = [(height, width) for height in (1, 2, 427, 640) for width in (1, 427, 640, 1333)]
    for height, width in shapes + rng.integers(200, 2000, (60, 2)).tolist():
        for sizes in ((800, 1333), (640, 2560), (0, 100)):
            assert tuple(resized_shape_tf([height, width], *sizes).numpy()) == preprocessing.resized_shape(height, width, *sizes)


@pytest.mark.parametrize("photo", ["astronaut.png", "chelsea.png"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_decoding_is_pillows(photo, options, mode):
    for crop in ((0, 0), (1, 3)):
        with Image.open(PHOTOS / photo) as image:
            image = image.convert(mode).crop((0, 0, image.width - crop[0], image.height - crop[1]))
        file = io.BytesIO()
        image.save(file, "JPEG", **{"quality": 92} | options)
        assert Image.open(file).mode == mode
        decoded = preprocessing.decode_image_tf(tf.constant(file.getvalue()), tf.constant("jpeg"))
        np.testing.assert_array_equal(decoded, preprocessing.decode_image(file.getvalue()))


def test_broken_exif_is_no_error():
    file = io.BytesIO()
    Image.new("RGB", (5, 3)).save(file, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "getexif", lambda self: (_ for _ in ()).throw(SyntaxError("broken")))
        assert preprocessing.decode_image(file.getvalue()).shape == (3, 5, 3)
