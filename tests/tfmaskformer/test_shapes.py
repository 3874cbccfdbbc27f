"""The generated data set: the same bytes everywhere, ground truth that fits, files that can be read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from checkpoints import registry
from tfmaskformer.data import shapes

# The committed checkpoint was trained on these images, and its metric is that of these.
HASHES = {
    ("train", 0): "9c67b2ac5743d3c9",
    ("train", 15999): "a85edc6fb391f67a",
    ("val", 0): "41935359dd36fbad",
    ("val", 199): "b9e3e5ea538689fa",
}


@pytest.fixture(scope="module")
def samples():
    return [shapes.sample("val", index) for index in range(60)]


@pytest.mark.parametrize(("split", "index"), HASHES)
def test_the_same_bytes_everywhere(split, index):
    image, panoptic_seg, segments_info = shapes.sample(split, index)
    digest = hashlib.sha256(image.tobytes() + panoptic_seg.astype("<i4").tobytes() + json.dumps(segments_info).encode()).hexdigest()
    assert digest[:16] == HASHES[split, index]


def test_images(samples):
    for image, panoptic_seg, _ in samples:
        height, width = panoptic_seg.shape
        assert image.dtype == np.uint8
        assert image.shape == (height, width, 3)
        assert height != width
        assert 96 <= min(height, width) <= max(height, width) <= 160
    assert len({sample.image.shape for sample in samples}) > 50


def test_segments_are_those_of_the_map(samples):
    for _, panoptic_seg, segments_info in samples:
        assert panoptic_seg.dtype == np.int32
        ids, areas = np.unique(panoptic_seg, return_counts=True)
        assert {segment["id"]: segment["area"] for segment in segments_info} == dict(zip(ids.tolist(), areas.tolist(), strict=True))
        assert (ids > 0).all()
        assert len(ids) == len(segments_info)
        for segment in segments_info:
            left, top, width, height = segment["bbox"]
            mask = panoptic_seg == segment["id"]
            inside = mask[top : top + height, left : left + width]
            assert inside.sum() == segment["area"]
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            assert segment["isthing"] == shapes.CATEGORIES[segment["category_id"]].isthing
            assert segment["iscrowd"] == 0
        stuff = [segment["category_id"] for segment in segments_info if not segment["isthing"]]
        assert len(stuff) == len(set(stuff)) > 0


def test_every_class_and_what_makes_it_hard(samples):
    seen = {segment["category_id"] for sample in samples for segment in sample.segments_info}
    assert seen == set(range(len(shapes.CATEGORIES)))
    touching = covered = 0
    for _, panoptic_seg, segments_info in samples:
        category = {segment["id"]: segment["category_id"] for segment in segments_info if segment["isthing"]}
        neighbours = np.unique(np.stack([panoptic_seg[:, 1:], panoptic_seg[:, :-1]], -1).reshape(-1, 2), axis=0).tolist()
        pairs = [(one, other) for one, other in neighbours if one != other and one in category and other in category]
        touching += any(category[one] == category[other] for one, other in pairs)
        covered += bool(pairs)
    assert touching >= 5
    assert covered >= 20


def test_shapes_are_what_their_names_say():
    """Areas of large upright shapes, by geometry: a disc πr², a triangle of height 3r/2, a box 1.5r × 1.2r, a cross of two bars."""
    radius = 100
    exact = {"disc": np.pi, "triangle": 3 / 2 * 4 / 7 * 3 / 2, "box": 1.5 * 1.2, "cross": 2 * 2 * 0.6 - 0.6**2}
    for index, (name, area) in enumerate(exact.items()):
        assert shapes.CATEGORIES[index].name == name
        for direction in ((1, 0, 1), (3, 4, 5)):
            mask = shapes._mask(shapes._Thing(index, 250, 300, 2 * radius, direction), 300, 300)
            assert mask.sum() == pytest.approx(area * radius**2, rel=0.01)


def test_registry_has_the_same_classes():
    info = registry.dataset("shapes")
    assert info.class_names == tuple(category.name for category in shapes.CATEGORIES)
    assert info.dataset_ids == tuple(category.id for category in shapes.CATEGORIES)
    assert info.colors == tuple(category.color for category in shapes.CATEGORIES)
    assert info.thing_classes == tuple(index for index, category in enumerate(shapes.CATEGORIES) if category.isthing)


def test_written_files(tmp_path):
    shapes.write(tmp_path, "val", 3)
    listed = json.loads((tmp_path / "annotations/panoptic_val.json").read_text())
    contiguous = {category["id"]: index for index, category in enumerate(listed["categories"])}
    assert [(category["name"], category["isthing"]) for category in listed["categories"][3:5]] == [("cross", 1), ("sky", 0)]
    assert len(listed["images"]) == len(listed["annotations"]) == 3
    for index, (about, annotation) in enumerate(zip(listed["images"], listed["annotations"], strict=True)):
        image, panoptic_seg, segments_info = shapes.sample("val", index)
        assert (about["id"], about["height"], about["width"]) == (annotation["image_id"], *panoptic_seg.shape) == (index, *image.shape[:2])
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "val" / about["file_name"])), image)
        rgb = np.asarray(Image.open(tmp_path / "annotations/panoptic_val" / annotation["file_name"])).astype(int)
        np.testing.assert_array_equal(rgb @ [1, 256, 65536], panoptic_seg)
        read = [
            segment
            | {"category_id": contiguous[segment["category_id"]], "isthing": shapes.CATEGORIES[contiguous[segment["category_id"]]].isthing}
            for segment in annotation["segments_info"]
        ]
        assert read == segments_info


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("val", -1)])
def test_unknown_images(split, index):
    with pytest.raises(ValueError, match=rf"no image {index} of split '{split}'; splits are \('train', 'val'\), indices start at 0"):
        shapes.sample(split, index)


def test_needs_no_framework():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('tensorflow', 'keras', 'torch')))\n"
        "import tfmaskformer.evaluation.panoptic, tfmaskformer.data.shapes as shapes; shapes.sample('val', 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
