"""Cases: photographs at their size, and targets that no platform changes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from parity.inputs import InputError, make_targets, parse_case


def test_an_image_is_resized_to_exactly_its_size_as_rgb(tmp_path):
    photo = np.zeros((10, 20, 4), np.uint8)
    photo[..., 0], photo[..., 3] = 200, 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    (image,) = parse_case(f"{tmp_path}/photo.png@13x17").images
    pixels = image.read()
    assert (pixels.shape, pixels.dtype) == ((13, 17, 3), np.uint8)
    assert (pixels == [200, 0, 0]).all()


@pytest.mark.parametrize("text", ["photo.png", "photo.png@0x3", "photo.png@3", "a=photo.png@3x4,", "photo.png@3x4:x", ""])
def test_other_case_texts_are_refused(text):
    with pytest.raises(InputError, match="expected"):
        parse_case(text)


def test_unreadable_images_are_refused(tmp_path):
    (tmp_path / "photo.png").write_text("no image")
    for name in ("photo.png", "absent.png"):
        with pytest.raises(InputError, match="cannot read image"):
            parse_case(f"{tmp_path}/{name}@3x4").images[0].read()


def test_every_kind_of_damage_is_told(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)).save(tmp_path / "photo.png")
    data = (tmp_path / "photo.png").read_bytes()
    second = data.index(b"IDAT", data.index(b"IDAT") + 1)
    (tmp_path / "chunk.png").write_bytes(data[:second] + b"\x00\xff\x00\xff" + data[second + 4 :])
    with pytest.raises(InputError, match=r"cannot read image .*chunk"):
        parse_case(f"{tmp_path}/chunk.png@3x4").images[0].read()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"cannot read image .*decompression bomb"):
        parse_case(f"{tmp_path}/photo.png@3x4").images[0].read()


def test_targets_never_change():
    """Recorded traces can be made again only as long as these stay."""
    labels, masks = make_targets(60, 81, 6, 133, "seed 0 image 0")
    assert labels.tolist() == [25, 32, 78, 53, 66, 54]
    assert hashlib.sha256(np.packbits(masks).tobytes()).hexdigest()[:16] == "0724f489edb44d54"


@pytest.mark.parametrize("objects", [0, 1, 2, 6, 20])
def test_targets_are_a_partition_with_a_gap_and_one_overlapping_object(objects):
    labels, masks = make_targets(60, 81, objects, 19, "k")
    assert (labels.shape, labels.dtype, masks.shape, masks.dtype) == ((objects,), np.int64, (objects, 60, 81), np.bool_)
    assert all(mask.any() for mask in masks)
    assert ((labels >= 0) & (labels < 19)).all()
    cells = masks[: objects - (objects >= 2)].sum(0)
    assert cells.max(initial=0) <= 1
    assert (cells == 0).any()
    if objects >= 2:
        assert (masks[-1] & (cells == 1)).any()


def test_another_key_gives_other_targets_and_too_many_objects_are_refused():
    assert not np.array_equal(make_targets(60, 81, 3, 19, "a")[1], make_targets(60, 81, 3, 19, "b")[1])
    with pytest.raises(InputError, match="30 objects do not fit into 3x3 px"):
        make_targets(3, 3, 30, 19, "a")
