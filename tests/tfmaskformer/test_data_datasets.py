"""Readers of the official layouts: the official lists and ground truth; bad data told file by file."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints import registry
from tfmaskformer.data import generated, shapes
from tfmaskformer.data.datasets import missing_files, open_dataset, open_training_set
from tfmaskformer.data.layouts import LAYOUTS
from tfmaskformer.data.records import DataError

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "data" / "recorded.json").read_text())
COUNT = RECORDED["images"]


def last_split(name):
    return list(LAYOUTS[name].splits)[-1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with every generated data set."""
    folder = tmp_path_factory.mktemp("datasets")
    for name in LAYOUTS:
        generated.write(name, folder, last_split(name), COUNT)
    return folder


@pytest.mark.parametrize("name", RECORDED["lists"])
def test_equals_the_official_list(name, data):
    dataset = open_dataset(name, data)
    assert dataset.problems == ()
    assert missing_files(dataset) == []
    assert len(dataset.records) == len(RECORDED["lists"][name]) == COUNT
    for sample, expected in zip(dataset.samples(), RECORDED["lists"][name], strict=True):
        record = sample.record
        assert os.path.relpath(record.image, data) == expected["image"]
        if expected["image_id"] is not None:
            assert record.image_id == expected["image_id"]
        for kind, labels in (("panoptic", sample.panoptic_seg), ("semantic", sample.sem_seg)):
            assert (labels is not None) == (kind in expected)
            if labels is not None:
                assert os.path.relpath(getattr(record, kind), data) == expected[kind]
                assert hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest() == expected[f"{kind}_sha256"]
        segments = [[segment[key] for key in ("id", "category_id", "iscrowd", "area")] for segment in sample.segments_info]
        assert segments == expected.get("segments", [])


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples(name, data):
    dataset = open_dataset(name, data)
    info, layout = registry.dataset(LAYOUTS[name].dataset), LAYOUTS[name]
    labels, categories = set(), set()
    for sample in dataset.samples():
        assert sample.image.dtype == np.uint8
        assert sample.image.shape[0] != sample.image.shape[1]
        if sample.panoptic_seg is not None:
            assert sample.panoptic_seg.shape == sample.image.shape[:2]
            assert {0, *(segment["id"] for segment in sample.segments_info)} == set(np.unique(sample.panoptic_seg).tolist())
            assert max(segment["id"] for segment in sample.segments_info) > 65535
            things = {segment["isthing"] for segment in sample.segments_info if segment["category_id"] in info.thing_classes}
            assert things == {True}
            assert any(segment["iscrowd"] for segment in sample.segments_info) == (sample.record in crowded(dataset))
            categories |= {segment["category_id"] for segment in sample.segments_info}
        if sample.sem_seg is not None:
            assert sample.sem_seg.shape == sample.image.shape[:2]
            labels |= set(np.unique(sample.sem_seg).tolist())
    last = len(info.class_names) - 1
    if layout.panoptic:
        stuff = set(range(len(info.class_names))) - set(info.thing_classes)
        assert {min(info.thing_classes), max(info.thing_classes), min(stuff), max(stuff)} <= categories
    elif layout.semantic:
        assert {0, last, info.ignore_label} <= labels <= {*range(last + 1), info.ignore_label}


def crowded(dataset):
    return [dataset.records[generated.CROWD_IMAGE]]


def test_the_data_sets_own_folder(data):
    assert open_dataset("coco_panoptic", data / "coco").records == open_dataset("coco_panoptic", data).records


def test_in_a_bucket(data):
    generated.write("cityscapes_panoptic", "ram://bucket", "val", 3)
    dataset = open_dataset("cityscapes_panoptic", "ram://bucket")
    local = open_dataset("cityscapes_panoptic", data)
    assert missing_files(dataset) == []
    for expected, actual in zip(local.samples(), dataset.samples(), strict=False):
        np.testing.assert_array_equal(actual.image, expected.image)
        np.testing.assert_array_equal(actual.panoptic_seg, expected.panoptic_seg)
        np.testing.assert_array_equal(actual.sem_seg, expected.sem_seg)
        assert actual.segments_info == expected.segments_info


def test_shapes(tmp_path):
    shapes.write(tmp_path, "val", 3)
    for index, sample in enumerate(open_dataset("shapes", tmp_path).samples()):
        image, panoptic_seg, segments_info = shapes.sample("val", index)
        np.testing.assert_array_equal(sample.image, image)
        np.testing.assert_array_equal(sample.panoptic_seg, panoptic_seg)
        keys = ("id", "category_id", "isthing", "area")
        expected = [[segment[key] for key in keys] for segment in segments_info]
        assert [[segment[key] for key in keys] for segment in sample.segments_info] == expected


@pytest.fixture
def coco(tmp_path):
    generated.write("coco_panoptic", tmp_path, "val", 4)
    return tmp_path / "coco"


def change_json(coco, change):
    file = coco / "annotations" / "panoptic_val2017.json"
    content = json.loads(file.read_text())
    changed = change(content)
    file.write_text(json.dumps(content if changed is None else changed))


def listing_problem(coco):
    dataset = open_dataset("coco_panoptic", coco)
    (problem,) = dataset.problems
    assert len(dataset.records) == 3
    with pytest.raises(DataError) as raised:
        next(dataset.samples("stop"))
    assert raised.value.problem == problem
    reported = []
    assert len(list(dataset.samples("skip", reported.append))) == 3
    assert reported == [problem]
    assert problem.file.endswith("panoptic_val2017.json, annotation 2") or "annotation 2 (" in problem.file
    return problem.kind


def _break(key, value):
    def change(content):
        content["annotations"][2][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (_break("segments_info", []), "empty annotation"),
        (_break("segments_info", "none"), "malformed annotation"),
        (_break("segments_info", [{"id": 7, "category_id": 12, "area": 3, "iscrowd": 0}]), "unknown category"),
        (_break("segments_info", [{"id": 7, "area": 3, "iscrowd": 0}]), "malformed annotation"),
        (_break("segments_info", [{"id": 2**24, "category_id": 1, "area": 3, "iscrowd": 0}]), "malformed annotation"),
        (_break("segments_info", [7]), "malformed annotation"),
        (_break("image_id", 1000), "duplicate image id"),
        (_break("image_id", "one"), "malformed annotation"),
        (_break("file_name", None), "malformed annotation"),
        (lambda content: content["annotations"].__setitem__(2, "x"), "malformed annotation"),
    ],
)
def test_bad_annotation(coco, change, kind):
    change_json(coco, change)
    assert listing_problem(coco) == kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["annotations"], "expected the file that is an object, got list"),
        (lambda content: content.pop("annotations") and None, "'annotations' (list), got only images, categories"),
        (lambda content: content.update(annotations={}), "'annotations' (list), got dict"),
        (lambda content: content["images"].append({"file_name": "x.jpg"}), "image 4"),
        (lambda content: content.update(images=3), "'images' (list), got int 3"),
    ],
)
def test_bad_json(coco, change, message):
    change_json(coco, change)
    with pytest.raises(DataError) as error:
        open_dataset("coco_panoptic", coco)
    assert message in str(error.value)


def test_truncated_and_missing_json(coco):
    file = coco / "annotations" / "panoptic_val2017.json"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match="malformed JSON"):
        open_dataset("coco_panoptic", coco)
    file.unlink()
    with pytest.raises(DataError, match=r"(?s)missing file.*docs/data.md"):
        open_dataset("coco_panoptic", coco)


def image_problem(coco, number, name="coco_panoptic"):
    dataset = open_dataset(name, coco)
    assert [dataset.examine(record)[1] != [] for record in dataset.records] == [index == number for index in range(len(dataset.records))]
    sample, problems = dataset.examine(dataset.records[number])
    assert sample is None
    reported = []
    assert len(list(dataset.samples("skip", reported.append))) == len(dataset.records) - 1
    assert reported == problems
    with pytest.raises(DataError):
        list(dataset.samples("stop"))
    return [(problem.kind, os.path.basename(problem.file)) for problem in problems]


IMAGE, PNG = "000000000994.jpg", "000000000994.png"


def test_missing_files(coco):
    (coco / "val2017" / IMAGE).unlink()
    (coco / "panoptic_val2017" / PNG).unlink()
    assert image_problem(coco, 2) == [("missing file", IMAGE), ("missing file", PNG)]
    missing = missing_files(open_dataset("coco_panoptic", coco))
    assert [os.path.basename(problem.file) for problem in missing] == [IMAGE, PNG]


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_corrupt_image(coco, content):
    file = coco / "val2017" / IMAGE
    file.write_bytes(file.read_bytes()[:-900] if content is None else content)
    assert image_problem(coco, 2) == [("corrupt image", IMAGE)]


def test_truncated_png(coco):
    file = coco / "panoptic_val2017" / PNG
    file.write_bytes(file.read_bytes()[:-60])
    assert image_problem(coco, 2) == [("corrupt image", PNG)]


def change_png(coco, change):
    file = coco / "panoptic_val2017" / PNG
    with Image.open(file) as image:
        pixels = np.array(image)
    changed = change(pixels)
    Image.fromarray(pixels if changed is None else changed).save(file)


def test_png_with_other_ids(coco):
    change_png(coco, lambda pixels: pixels[20:22, 5:9].fill(77))
    assert image_problem(coco, 2) == [("ids not in the JSON", PNG), ("wrong area", PNG)]


def test_segment_without_pixels(coco):
    def take_away(pixels):
        pixels[(pixels == [3, 2, 1]).all(-1)] = 0

    change_png(coco, take_away)
    assert image_problem(coco, 2) == [("ids not in the PNG", PNG)]


def test_png_of_another_size(coco):
    change_png(coco, lambda pixels: np.repeat(pixels, 2, axis=0))
    assert image_problem(coco, 2) == [("wrong area", PNG), ("annotation size ≠ image size", PNG)]


def test_png_that_is_grey(coco):
    change_png(coco, lambda pixels: pixels[..., 0])
    assert image_problem(coco, 2) == [("wrong format", PNG)]


def test_image_of_another_size_than_in_the_json(coco):
    change_json(coco, lambda content: content["images"][2].update(height=5))
    assert image_problem(coco, 2) == [("wrong image size", IMAGE)]


def test_ade20k_areas_need_not_be_exact(tmp_path):
    """Its script counts a segment before others cover it."""
    generated.write("ade20k_panoptic", tmp_path, "val", 1)
    file = tmp_path / "ADEChallengeData2016" / "ade20k_panoptic_val.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segments_info"][0]["area"] += 5
    content["annotations"][0]["segments_info"].append({"id": 9, "category_id": 0, "area": 3, "iscrowd": 0})
    file.write_text(json.dumps(content))
    (sample,) = open_dataset("ade20k_panoptic", tmp_path).samples()
    assert sample.segments_info[-1]["id"] == 9


LABEL = "000000000997.png"


@pytest.mark.parametrize(
    ("labels", "kind"),
    [(171, "unknown category"), (255, "empty annotation"), (None, "corrupt image"), ("RGB", "wrong format")],
)
def test_bad_semantic_map(tmp_path, labels, kind):
    generated.write("coco_stuff_10k", tmp_path, "test", 3)
    file = tmp_path / "coco" / "coco_stuff_10k" / "annotations_detectron2" / "test" / LABEL
    if labels is None:
        file.write_bytes(file.read_bytes()[:100])
    else:
        with Image.open(file) as image:
            (image.convert("RGB") if labels == "RGB" else Image.new("L", image.size, labels)).save(file)
    assert image_problem(tmp_path, 1, "coco_stuff_10k") == [(kind, LABEL)]


def test_what_training_takes(tmp_path):
    """No segments, ids that the JSON lacks, maps that are ignored everywhere; for everything else these are problems."""
    generated.write("cityscapes_panoptic", tmp_path, "train", 4)
    sound = open_dataset("cityscapes_panoptic", tmp_path, "train")
    file = tmp_path / "cityscapes" / "gtFine" / "cityscapes_panoptic_train.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["segments_info"] = []
    lost = content["annotations"][2]["segments_info"].pop()
    file.write_text(json.dumps(content))
    labels = Path(sound.records[3].semantic)
    Image.fromarray(np.full_like(np.asarray(Image.open(labels)), 255)).save(labels)

    strict = open_dataset("cityscapes_panoptic", tmp_path, "train")
    assert [problem.kind for problem in strict.problems] == ["empty annotation"]
    found = [[problem.kind for problem in strict.examine(record)[1]] for record in strict.records]
    assert found == [[], ["ids not in the JSON"], ["empty annotation"]]
    dataset = open_training_set("cityscapes_panoptic", tmp_path)
    assert [record.image_id for record in dataset.records] == [record.image_id for record in sound.records]
    samples = list(dataset.samples())
    assert [len(sample.segments_info) for sample in samples] == [len(record.segments) for record in dataset.records]
    assert samples[1].segments_info == []
    assert lost["id"] in samples[2].panoptic_seg
    assert (samples[3].sem_seg == 255).all()

    labels.unlink()
    with pytest.raises(DataError, match="missing file") as raised:
        open_training_set("cityscapes_panoptic", tmp_path)
    assert raised.value.problem.file == str(labels)


def test_unpaired_files(tmp_path):
    generated.write("ade20k", tmp_path, "val", 4)
    folder = tmp_path / "ADEChallengeData2016"
    (folder / "images" / "validation" / "000000000991.jpg").unlink()
    (folder / "annotations_detectron2" / "validation" / "000000000997.png").unlink()
    dataset = open_dataset("ade20k", tmp_path)
    assert [record.image_id for record in dataset.records] == ["000000000994", "000000001000"]
    assert [(problem.kind, os.path.basename(problem.file)) for problem in dataset.problems] == [
        ("missing file", "000000000997.png"),
        ("missing file", "000000000991.jpg"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("coco", "."), "unknown data set"),
        (("coco_panoptic", ".", "test"), "unknown split"),
        (("ade20k", "nowhere"), "empty folder"),
        (("cityscapes", "nowhere"), "empty folder"),
    ],
)
def test_nothing_to_list(arguments, message):
    with pytest.raises(DataError, match=message):
        open_dataset(*arguments)


def test_unknown_policy(coco):
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        next(open_dataset("coco_panoptic", coco).samples("ignore"))


def test_generated_files_have_every_kind(tmp_path):
    generated.write("ade20k", tmp_path, "val", 5)
    modes, progressive, orientations = set(), set(), set()
    for file in (tmp_path / "ADEChallengeData2016" / "images" / "validation").iterdir():
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            modes.add(image.mode)
            progressive.add("progressive" in image.info)
            orientations.add(image.getexif().get(0x0112, 1))
    assert (modes, progressive, orientations) == ({"RGB", "L"}, {True, False}, {1, 6})


@pytest.mark.parametrize("name", LAYOUTS)
def test_documented(name):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    layout, split = LAYOUTS[name], last_split(name)
    assert f"| `{layout.folder}` | {', '.join(layout.splits)} |" in row
    for folder, suffix in (
        (layout.images, layout.image_suffix),
        (layout.semantic, layout.semantic_suffix),
        (layout.panoptic, ".png"),
        (layout.panoptic_json, ""),
    ):
        path = folder.format(split=split, part=layout.splits[split])
        cities = "*/" if layout.cities and folder in (layout.images, layout.semantic) else ""
        assert not path or f"`{path}{f'/{cities}*{suffix}' if suffix else ''}`" in row


def test_real_coco_images():
    """Two real images with real annotations, where a folder of them is at hand (images/, panoptic/, panoptic.json)."""
    folder = os.environ.get("TFMASKFORMER_COCO_SAMPLE", "")
    if not os.path.isdir(folder):
        pytest.skip("needs real COCO images: set TFMASKFORMER_COCO_SAMPLE")
    from tfmaskformer.data import listing
    from tfmaskformer.data.datasets import DataSet

    paths = {"images": f"{folder}/images", "panoptic": f"{folder}/panoptic", "panoptic_json": f"{folder}/panoptic.json"}
    records, problems = listing.list_panoptic(LAYOUTS["coco_panoptic"], paths)
    assert problems == []
    samples = list(DataSet("coco_panoptic", "val", folder, tuple(records)).samples())
    assert samples
    for sample in samples:
        assert sample.image.shape[:2] == sample.panoptic_seg.shape
