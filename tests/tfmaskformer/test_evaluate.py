"""``tfmaskformer eval``: the official numbers and predictions, images on canvases, augmentation, replicas, kills, both kinds of data, bad
data and input."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from pycocotools import mask

import tfmaskformer
from checkpoints import registry
from converters import cli as convert
from tfmaskformer.config import MaskFormerConfig, PixelDecoderConfig, SwinConfig, TestConfig, TransformerPredictorConfig
from tfmaskformer.data import cli as data_cli
from tfmaskformer.data import generated, shapes, tfrecords
from tfmaskformer.data.datasets import open_dataset
from tfmaskformer.data.preprocessing import resize_shortest_edge
from tfmaskformer.data.records import Record
from tfmaskformer.evaluation import augmentation, cli, sources
from tfmaskformer.evaluation.augmentation import Augmentation, augmented_scores
from tfmaskformer.evaluation.canvases import Canvas, choose_canvases
from tfmaskformer.evaluation.devices import strategy_for
from tfmaskformer.evaluation.instances import InstanceQuality, instance_truth
from tfmaskformer.evaluation.panoptic import PanopticQuality
from tfmaskformer.evaluation.results import read_panoptic
from tfmaskformer.evaluation.semantic import SemanticQuality
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import parameter_specs
from tfmaskformer.static_inference import static_panoptic_inference, static_semantic_inference

IMAGES = 50
MOVED = 5
"""Pixels of these images, 800 000, that lie so near to a tie that the rounding of float32 may decide about them."""
SMALL = importlib.resources.files("checkpoints") / "small"
CANVAS = ["--canvas", "160", "160"]
OFFICIAL = json.loads((SMALL / "shapes_panoptic.json").read_text(encoding="utf-8"))["validation"][f"first_{IMAGES}_images"]
TINY = MaskFormerConfig(
    name="tiny",
    num_classes=19,
    backbone=SwinConfig(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4),
    head="PerPixelBaselineHead",
    pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=16),
    test=TestConfig(min_size=64, max_size=100),
    dataset="cityscapes",
)
"""With random weights: borders of classes lie anywhere."""

TINY_PANOPTIC = TINY.replace(
    name="tiny_panoptic",
    head="MaskFormerHead",
    predictor=TransformerPredictorConfig(hidden_dim=32, num_queries=12, nheads=4, dim_feedforward=32, dec_layers=1),
    test=TestConfig(panoptic_on=True, min_size=64, max_size=100),  # thresholds of 0: nearly all queries become segments
    dataset="cityscapes_panoptic",
    thing_classes=registry.dataset("cityscapes_panoptic").thing_classes,
)


def save(config, folder):
    rng = np.random.default_rng(0)
    model = MaskFormer(config)
    specs = parameter_specs(model)

    def value(name):
        shape = specs[name].shape
        if len(shape) == 1:
            return np.full(shape, name.endswith("weight"), np.float32)  # scales and biases of norms
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)

    model.build_parameters(value)
    tf.train.Checkpoint(model=model).save(str(folder / "ckpt"))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_panoptic(tmp_path_factory):
    return save(TINY_PANOPTIC, tmp_path_factory.mktemp("tiny_panoptic"))


@pytest.fixture
def uncompiled(monkeypatch):
    """Plain graphs: compiling takes seconds."""
    function = tf.function
    monkeypatch.setattr(tf, "function", lambda *functions, **options: function(*functions, **(options | {"jit_compile": None})))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small trained model, converted."""
    folder = str(tmp_path_factory.mktemp("small") / "tf_ckpt")
    assert convert.main(["--src", str(SMALL / "shapes_panoptic.pkl"), "--dst", folder, "--config", "shapes_panoptic"]) == 0
    return folder


@pytest.fixture(scope="module")
def shapes_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, "val", IMAGES)
    return str(folder)


@pytest.fixture(scope="module")
def recorded():
    """tests/golden/evaluation/shapes.npz: what the official loop and evaluators make of the same images and weights."""
    with np.load(Path(__file__).parents[1] / "golden" / "evaluation" / "shapes.npz") as file:
        document = json.loads(str(file["json"]))
        for name in ("panoptic", "semantic"):
            sizes = file[f"{name}_sizes"]
            parts = np.split(file[f"{name}_maps"], np.cumsum(sizes.prod(1))[:-1])
            document[f"{name}_maps"] = [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]
    return document


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """Nine images, the third without its end."""
    folder = tmp_path_factory.mktemp("cityscapes")
    generated.write("cityscapes", folder, "val", 9)
    image = Path(open_dataset("cityscapes", folder).records[2].image)
    image.write_bytes(image.read_bytes()[:-500])
    return str(folder)


def evaluate(*arguments):
    """The report of a command that succeeds."""
    out = Path(os.environ["PYTEST_JSON"])
    assert cli.main([*arguments, "--cpu", "--json", str(out)]) == cli.OK
    return json.loads(out.read_text())


@pytest.fixture(autouse=True)
def _json_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_JSON", str(tmp_path / "report.json"))


def test_canvases():
    rng = np.random.default_rng(0)
    sizes = [(480, 640), (427, 640), (640, 480), *rng.integers(200, 641, [300, 2]).tolist()]
    sizes = [(*cli_size(*size), *size) for size in sizes]
    for most in (1, 2, 4):
        canvases = choose_canvases(sizes, most)
        assert len(canvases) == most
        assert all(any(canvas.holds(size) for canvas in canvases) for size in sizes)
    assert choose_canvases(sizes, 1) == [Canvas(*np.max(sizes, 0).tolist())]
    assert choose_canvases([(1024, 2048, 1024, 2048)] * 3) == [(1024, 2048, 1024, 2048)]
    assert choose_canvases([]) == []
    wide, tall, small = (50, 100, 50, 100), (100, 50, 100, 50), (20, 20, 20, 20)
    assert choose_canvases([wide, tall, small, (49, 98, 50, 100)], 3) == [small, wide, tall]


def cli_size(height, width):
    from tfmaskformer.data.preprocessing import resized_shape

    return resized_shape(height, width, 800, 1333)


def check_official(metrics, recorded, names):
    """Every number, overall and per class, to 1e-4 (percent)."""
    for name, official in names.items():
        value = recorded[official]
        assert metrics[name] == (None if np.isnan(value) else pytest.approx(value, rel=0, abs=1e-4)), official


def check_official_semantic(report, recorded, confusion, pixels):
    """And the same class for each pixel, but for near-ties."""
    check_official(report["metrics"]["semantic"], recorded, {"miou": "mIoU", "fwiou": "fwIoU", "macc": "mACC", "pacc": "pACC"})
    for row in report["metrics"]["semantic"]["classes"]:
        check_official(row, recorded, {"iou": f"IoU-{row['name']}", "acc": f"ACC-{row['name']}"})
    counted = SemanticQuality.from_dict(report["counts"]["semantic"]).confusion
    assert np.abs(counted - np.array(confusion)[:-1]).sum() <= 2 * pixels


def test_official_quality(small, shapes_data, recorded, tmp_path, capsys):
    """PQ, mIoU and AP of the official code, and its predictions segment for segment."""
    folders = ["--results", str(tmp_path / "results"), "--resume", str(tmp_path / "resume")]
    report = evaluate("--ckpt", small, "--data", shapes_data, *CANVAS, "--batch", "4", "--ap", *folders)
    panoptic, instances = report["metrics"]["panoptic"], report["metrics"]["instances"]
    for group, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st")):
        check_official(panoptic[group], recorded["panoptic"], {key: f"{key.upper()}{suffix}" for key in ("pq", "sq", "rq")})
    check_official_semantic(report, recorded["semantic"], recorded["confusion"], pixels=MOVED)
    check_official(instances, recorded["instances"], {name.lower(): name for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")})
    for row in instances["classes"]:
        check_official(row, recorded["instances"], {"ap": f"AP-{row['name']}"})
    for group in ("all", "things", "stuff"):
        for key, official in OFFICIAL[group].items():
            assert report["metrics"]["panoptic"][group][key] == pytest.approx(official, abs=0.005 + 1e-4), (group, key)  # two decimals
    counts = report["counts"]["panoptic"]
    for name in ("true_positives", "false_positives", "false_negatives"):
        assert counts[name] == OFFICIAL[name]
    np.testing.assert_allclose([total / 2**53 for total in counts["iou"]], OFFICIAL["iou"], rtol=1e-3)
    assert report["images"] == {"evaluated": IMAGES, "skipped": 0, "of": IMAGES}
    assert report["checkpoint"]["source"]["file"] == "shapes_panoptic.pkl"
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"shapes_panoptic on shapes val: {IMAGES} images, 0 skipped"
    assert ["all", *(f"{OFFICIAL['all'][key]:.2f}" for key in ("pq", "sq", "rq")), "7"] in [line.split() for line in out.splitlines()]
    assert "skipped" not in err  # progress at most

    ids = [category.id for category in shapes.CATEGORIES]
    found = {image_id: result for image_id, _, *result in read_panoptic(tmp_path / "results", ids)}
    quality = PanopticQuality(len(ids), registry.dataset("shapes").thing_classes)
    samples = {index: shapes.sample("val", index) for index in range(IMAGES)}
    for index, sample in samples.items():
        quality.update(sample.panoptic_seg, sample.segments_info, *found[index])
    assert quality.to_dict() == counts

    moved = 0
    for index, infos, panoptic_seg in zip(recorded["image_ids"], recorded["segments_info"], recorded["panoptic_maps"], strict=True):
        segments = [(info["id"], ids[info["category_id"]]) for info in infos]
        assert [(info["id"], ids[info["category_id"]]) for info in found[index][1]] == segments, index
        moved += int((found[index][0] != panoptic_seg).sum())
    assert moved <= MOVED

    # On canvases the same, pixel for pixel, as alone.
    model = tfmaskformer.load(small)
    for index in range(6):
        image = samples[index].image
        [(panoptic_seg, segments_info)] = tfmaskformer.panoptic_inference(model(image[None]), model.config, [image.shape[:2]])
        assert [(info["id"], info["category_id"]) for info in segments_info] == [
            (info["id"], info["category_id"]) for info in found[index][1]
        ]
        np.testing.assert_array_equal(found[index][0], panoptic_seg)

    state = json.loads((tmp_path / "resume" / "state-0-of-1.json").read_text())["counts"]
    detections = InstanceQuality.from_dict(state["instances"])
    things = registry.dataset("shapes").thing_classes
    truth = instance_truth([(index, *sample[1:]) for index, sample in samples.items()], ids, registry.dataset("shapes").class_names, things)
    expected = detections.result(truth)
    assert report["metrics"]["instances"]["ap"] == pytest.approx(100 * expected.ap, abs=1e-9)
    assert report["metrics"]["instances"]["ap50"] > 60
    assert len(detections.detections) == sum(info["category_id"] in things for _, infos in found.values() for info in infos)

    # Again: nothing is left to do, and the result is the same.
    again = evaluate("--ckpt", small, "--data", shapes_data, *CANVAS, "--ap", *folders)
    assert (again["metrics"], again["counts"]) == (report["metrics"], report["counts"])
    assert again["run"]["resumed_with"] == IMAGES


def test_the_same_as_each_image_alone(tiny, cityscapes, tmp_path, capsys, request):
    """Semantic results of images on canvases, against each unpadded one, by hand; the bad image is skipped; and the same from TFRecords."""
    results = tmp_path / "results"
    options = ["--canvas", "100", "100", "--batch", "3", "--on-error", "skip"]
    report = evaluate("--ckpt", tiny, "--data", cityscapes, *options, "--results", str(results))
    assert "skipped: " in capsys.readouterr().err
    assert report["images"] == {"evaluated": 8, "skipped": 1, "of": 9}
    assert [problem["kind"] for problem in report["problems"]] == ["corrupt image"]

    model = tfmaskformer.load(tiny)
    quality, files = SemanticQuality(TINY.num_classes), {}
    dataset = open_dataset("cityscapes", cityscapes)
    padded = 0
    for sample in dataset.samples("skip"):
        image = resize_shortest_edge(sample.image, TINY.test.min_size, TINY.test.max_size)
        padded += image.shape[:2] != (100, 100)
        [scores] = tfmaskformer.semantic_inference(model(image[None]), TINY, [image.shape[:2]], [sample.image.shape[:2]])
        labels = np.argmax(scores, 0)
        quality.update(sample.sem_seg, labels)
        files[os.path.basename(sample.record.image)] = {label: int((labels == label).sum()) for label in np.unique(labels).tolist()}
    assert padded == 8
    assert min(map(len, files.values())) > 10  # classes
    assert report["counts"]["semantic"] == quality.to_dict()
    assert report["metrics"]["semantic"]["miou"] == 100 * quality.result().miou
    areas = {name: {} for name in files}
    for entry in json.loads((results / "sem_seg_predictions.json").read_text()):
        areas[entry["file_name"]][entry["category_id"]] = int(mask.area(entry["segmentation"]))
    assert areas == files

    tfrecords.build(dataset, tmp_path / "records", shards=2, on_error="skip")
    request.getfixturevalue("uncompiled")
    packed = evaluate("--ckpt", tiny, "--data", str(tmp_path / "records"), *options, "--canvas", "64", "100", "100", "64")
    assert len(packed["run"]["canvases"]) == 2
    for key in ("counts", "images", "metrics", "problems"):
        assert packed[key] == report[key], key


def test_official_augmentation(small, shapes_data, recorded, monkeypatch, uncompiled, capsys):
    """``--tta`` as upstream's SemanticSegmentorWithTTA behind the test loader: every number, and the class of each pixel."""
    min_sizes, max_size, flip = recorded["augmentation"]
    monkeypatch.setitem(augmentation.OFFICIAL, ("shapes", 0), Augmentation(tuple(min_sizes), max_size, flip))
    report = evaluate("--ckpt", small, "--data", shapes_data, "--limit", "6", "--tta", "--batch", "2", "--canvas", "160", "160")
    assert report["metrics"].keys() == {"semantic"}
    assert report["run"]["augmentation"] == {"min_sizes": min_sizes, "max_size": max_size, "flip": flip}
    check_official_semantic(report, recorded["augmented"], recorded["augmented_confusion"], pixels=MOVED)
    plain = np.abs(np.array(recorded["augmented_confusion"]) - np.array(recorded["confusion"])).sum()
    assert plain > 1000  # 6 images of 50
    assert "mIoU" in capsys.readouterr().out


def test_augmented_on_canvases_as_each_image_alone(tiny, cityscapes, monkeypatch, uncompiled, capsys):
    settings = Augmentation((48, 70), 110)
    monkeypatch.setitem(augmentation.OFFICIAL, ("cityscapes", 64), settings)
    report = evaluate("--ckpt", tiny, "--data", cityscapes, "--tta", "--batch", "3", "--on-error", "skip", "--limit", "5")
    model, quality = tfmaskformer.load(tiny), SemanticQuality(TINY.num_classes)
    for sample in list(open_dataset("cityscapes", cityscapes).samples("skip"))[:4]:

        def infer(view, output=sample.image.shape[:2]):
            return tfmaskformer.semantic_inference(model(np.ascontiguousarray(view)[None]), TINY, [view.shape[:2]], [output])[0]

        image = resize_shortest_edge(sample.image, TINY.test.min_size, TINY.test.max_size)
        quality.update(sample.sem_seg, augmented_scores(infer, image, settings).argmax(0))
    counted = SemanticQuality.from_dict(report["counts"]["semantic"]).confusion
    assert counted.sum() == quality.confusion.sum() > 10_000
    assert np.abs(counted - quality.confusion).sum() <= 4


def test_there_is_no_panoptic_augmentation(tmp_path, capsys):
    info = registry.dataset("coco_panoptic")
    config = TINY_PANOPTIC.replace(num_classes=len(info.class_names), dataset=info.name, thing_classes=info.thing_classes)
    generated.write("coco_panoptic", tmp_path, "val", 1)
    assert cli.main(["--ckpt", save(config, tmp_path), "--cpu", "--data", str(tmp_path), "--tta"]) == cli.BAD_INPUT
    assert "results with test-time augmentation are semantic, and the data set has panoptic" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    generated.write("cityscapes_panoptic", folder, "val", 7)
    return str(folder)


def processes(what, *arguments):
    script = Path(__file__).with_name("evaluation_processes.py")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), what, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def unordered(counts):
    """What does not depend on the order of images."""
    instances = sorted(
        counts["instances"]["detections"], key=lambda detection: (detection["image_id"], detection["segmentation"]["counts"])
    )
    return counts["panoptic"], counts["semantic"], sorted(counts["done"]), instances


def test_replicas_count_the_same(tiny_panoptic, sound):
    """Seven images do not divide by 2 or 4."""
    counts = processes("replicas", tiny_panoptic, sound)["counts"]
    ids = [record.image_id for record in open_dataset("cityscapes_panoptic", sound).records]
    assert len(counts) == 4
    for name, count in counts.items():
        assert sorted(count["done"]) == sorted(ids), name
    assert counts["1"] == counts["2"] == counts["4"]
    plain, compiled = (SemanticQuality.from_dict(counts[name]["semantic"]).confusion for name in ("2", "2 compiled"))
    assert plain.sum() == compiled.sum()
    assert np.abs(plain - compiled).sum() <= 10  # px; XLA adds in another order
    pixels = sum(sample.sem_seg.size for sample in open_dataset("cityscapes_panoptic", sound).samples())
    assert sum(counts["1"]["semantic"]["counts"]) == pixels
    assert len(counts["1"]["instances"]["detections"]) > 7
    assert sum(counts["1"]["panoptic"]["false_positives"]) > 20


def test_processes_count_the_same(tiny_panoptic, sound):
    """Two real ones with MultiWorkerMirroredStrategy, 4 and 3 images, on one device each and on two."""
    result = processes("workers", tiny_panoptic, sound)
    [alone] = processes("alone", tiny_panoptic, sound)["counts"].values()
    ids = [record.image_id for record in open_dataset("cityscapes_panoptic", sound).records]
    assert result["own"] == [[ids[::2], ids[1::2]]] * 2
    assert len(result["counts"]) == 4
    for name, counts in result["counts"].items():  # every worker gets the whole
        assert unordered(counts) == unordered(alone), name


def test_an_evaluation_killed_at_random_moments(tiny_panoptic, sound):
    """``make kills`` has 50 of them."""
    kills = int(os.environ.get("TFMASKFORMER_KILLS", "3"))
    result = processes("moments", tiny_panoptic, sound, str(kills))
    assert len(result["left"]) == kills
    assert all(0 <= kill["before"] <= kill["after"] <= 7 for kill in result["left"]), result["left"]
    assert sum(kill["after"] > 0 for kill in result["left"]) >= kills // 2, result["left"]
    whole = result["counts"].pop("whole")
    assert all(counts == whole for counts in result["counts"].values())
    assert "killed" in result["counts"]


def test_a_killed_evaluation_goes_on(tiny_panoptic, sound):
    result = processes("kills", tiny_panoptic, sound)
    assert result["left"] == [1, 2, 3]
    killed, whole = (result["counts"][name] for name in ("killed", "whole"))
    assert len(killed["done"]) == len(set(killed["done"])) == 7
    assert killed == whole


def spoil(folder):
    """Ten images of which seven have one fault each; kind → the file that is told."""
    generated.write("cityscapes_panoptic", folder, "val", 10)
    records = open_dataset("cityscapes_panoptic", folder).records
    faults = {}

    def fault(index, kind, field):
        faults[kind] = getattr(records[index], field)
        return Path(faults[kind])

    image = fault(1, "corrupt image", "image")
    image.write_bytes(image.read_bytes()[:-500])
    fault(2, "missing file", "semantic").unlink()
    png = fault(3, "ids not in the JSON", "panoptic")
    with Image.open(png) as opened:
        pixels = np.array(opened)
    pixels[40:44, 50:60] = 77, 78, 79
    Image.fromarray(pixels).save(png)
    labels = fault(4, "unknown category", "semantic")
    with Image.open(labels) as opened:
        Image.new("L", opened.size, 19).save(labels)
    labels = fault(5, "empty annotation", "semantic")
    with Image.open(labels) as opened:
        Image.new("L", opened.size, 255).save(labels)
    file = folder / "cityscapes" / "gtFine" / "cityscapes_panoptic_val.json"
    content = json.loads(file.read_text())
    content["annotations"][6]["segments_info"] = []
    content["annotations"][7]["segments_info"][0]["category_id"] = 4711
    file.write_text(json.dumps(content))
    return faults, file


def test_bad_data_is_told_by_file_and_counted(tiny_panoptic, tmp_path, capsys, uncompiled):
    """Of every kind: ``data check`` finds it, ``data tfrecords`` and ``eval`` stop at it or leave its image out, and all count it."""
    faults, listing = spoil(tmp_path)
    data = ["--dataset", "cityscapes_panoptic", "--data", str(tmp_path)]
    assert data_cli.main(["check", *data, "--json", "-"]) == data_cli.PROBLEMS
    out, err = capsys.readouterr()
    checked = json.loads(out)
    expected = {*faults.items(), ("wrong area", faults["ids not in the JSON"])}
    listed = {(problem["kind"], problem["file"]) for problem in checked["problems"] if str(listing) in problem["file"]}
    assert {kind for kind, _ in listed} == {"empty annotation", "unknown category"}
    assert {(problem["kind"], problem["file"]) for problem in checked["problems"]} == expected | listed
    assert (checked["images"], checked["sound"]) == (8, 3)
    assert all(f"{file}: {kind}" in err for kind, file in expected | listed)

    records = ["tfrecords", *data, "--out", str(tmp_path / "records"), "--processes", "1", "--shards", "2"]
    command = ["--ckpt", tiny_panoptic, *data, "--cpu", "--canvas", "100", "100", "--batch", "3"]
    assert data_cli.main(records) == data_cli.PROBLEMS
    assert cli.main(command) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error: ") == 2
    assert f"error: {listing}, annotation 6" in err
    assert "--on-error skip" in err

    assert data_cli.main([*records, "--on-error", "skip", "--json", "-"]) == data_cli.OK
    out, err = capsys.readouterr()
    assert sum(shard["records"] for shard in json.loads(out)["shards"].values()) == 3
    assert err.count("skipped: ") == len(expected | listed)
    report = evaluate(*command[:-1], "2", "--on-error", "skip")
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "tiny_panoptic on cityscapes_panoptic val: 3 images, 7 skipped"
    assert {line.removeprefix("skipped: ") for line in err.splitlines() if line.startswith("skipped")} == {
        f"{file}: {kind}" for kind, file in expected | listed
    }
    assert report["images"] == {"evaluated": 3, "skipped": 7, "of": 10}
    assert {(problem["kind"], problem["file"]) for problem in report["problems"]} == expected | listed
    packed = evaluate("--ckpt", tiny_panoptic, "--data", str(tmp_path / "records"), *command[6:-1], "2")
    for key in ("images", "metrics", "counts"):
        assert packed[key] == report[key], key


def test_in_a_bucket(tiny, tmp_path, uncompiled):
    """TensorFlow's file system in memory: checkpoint, data, results and what is saved."""
    for file in Path(tiny).iterdir():
        tf.io.gfile.makedirs("ram://eval/ckpt")
        with tf.io.gfile.GFile(f"ram://eval/ckpt/{file.name}", "wb") as copy:
            content = file.read_bytes()
            copy.write(content.replace(tiny.encode(), b"ram://eval/ckpt") if file.name == "checkpoint" else content)
    for folder in ("ram://eval/data", tmp_path / "data"):
        generated.write("cityscapes", folder, "val", 3)
    options = ["--canvas", "100", "100"]
    folders = [f"--{name}={{0}}/{name}" for name in ("results", "resume")]
    local = evaluate("--ckpt", tiny, "--data", str(tmp_path / "data"), *options, *(folder.format(tmp_path) for folder in folders))
    remote = ["--ckpt", "ram://eval/ckpt", "--data", "ram://eval/data", *options, *(folder.format("ram://eval") for folder in folders)]
    report = evaluate(*remote)
    assert (report["metrics"], report["counts"]) == (local["metrics"], local["counts"])
    assert evaluate(*remote)["run"]["resumed_with"] == 3
    with tf.io.gfile.GFile("ram://eval/results/sem_seg_predictions.json") as file:
        assert file.read() == (tmp_path / "results" / "sem_seg_predictions.json").read_text()


def test_products_are_asked_for_in_float32(tiny_panoptic):
    """Of XLA, which on a TPU would round their factors to bfloat16."""
    strategy_for("cpu")
    model = tfmaskformer.load(tiny_panoptic)

    def infer(images, sizes):
        outputs = model(images, sizes, padding="masked")
        panoptic = static_panoptic_inference(outputs, model.config, sizes, sizes, (64, 96))
        return panoptic, static_semantic_inference(outputs, model.config, sizes, sizes, (64, 96))

    compiled = tf.function(infer, jit_compile=True, autograph=False)
    arguments = tf.zeros([1, 64, 96, 3], tf.uint8), tf.constant([[60, 90]])
    program = compiled.experimental_get_compiler_ir(*arguments)(stage="hlo", platform_name="CPU")
    products = [line for line in program.splitlines() if re.search(r"= f32\S* (dot|convolution)\(", line)]
    assert len(products) > 40
    assert [line for line in products if "operand_precision={highest,highest}" not in line] == []


@pytest.mark.parametrize(("orientation", "size"), [(1, (3, 5)), (6, (5, 3)), (None, (3, 5))])
def test_sizes_are_those_of_upright_images(orientation, size, tmp_path, monkeypatch):
    """Where the EXIF block is broken, of the image as it is: as it is read."""
    exif = Image.Exif()
    exif[0x0112] = orientation or 1
    Image.new("RGB", (5, 3)).save(tmp_path / "a.jpg", exif=exif)
    if orientation is None:
        monkeypatch.setattr(Image.Image, "getexif", lambda self: (_ for _ in ()).throw(SyntaxError("broken")))
    assert sources._size(Record("a", str(tmp_path / "a.jpg"))) == size


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_on_a_full_disk_the_result_is_printed(tiny, cityscapes, tmp_path, monkeypatch, capsys, uncompiled):
    command = ["--ckpt", tiny, "--cpu", "--data", cityscapes, "--limit", "1"]
    assert cli.main([*command, "--json", "/dev/full"]) == cli.COULD_NOT_RUN
    out, err = capsys.readouterr()
    assert out.startswith("tiny on cityscapes val: 1 images, 0 skipped")
    assert "cannot write '/dev/full': No space left on device" in err

    def full(path, content):
        raise tf.errors.ResourceExhaustedError(None, None, f"{path}; No space left on device")

    monkeypatch.setattr("tfmaskformer.evaluation.evaluate.write_file", full)
    assert cli.main([*command, "--results", str(tmp_path / "results")]) == cli.COULD_NOT_RUN
    out, err = capsys.readouterr()
    assert out.startswith("tiny on cityscapes val: 1 images, 0 skipped")
    assert "sem_seg_predictions.json; No space left on device" in err


def test_another_evaluation_is_not_resumed(tiny, cityscapes, tmp_path, capsys):
    """Bad data stops; what is saved of it serves no other command."""
    command = ["--ckpt", tiny, "--cpu", "--data", cityscapes, "--resume", str(tmp_path)]
    assert cli.main([*command, "--limit", "3", "--batch", "9"]) == cli.BAD_INPUT
    assert "corrupt image" in capsys.readouterr().err
    assert cli.main([*command, "--limit", "2"]) == cli.BAD_INPUT
    assert "is of another evaluation (different: dataset)" in capsys.readouterr().err


def test_data_that_does_not_fit(tiny, cityscapes, tmp_path, capsys):
    generated.write("ade20k", tmp_path, "val", 1)
    generated.write("shapes", tmp_path, "val", 1)
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--data", "nowhere"], "empty folder"),
        (["--data", str(tmp_path), "--dataset", "ade20k"], "19 classes, expected 150"),
        (["--data", str(tmp_path), "--dataset", "shapes"], "19 classes, expected 7"),
        (["--data", cityscapes, "--canvas", "64", "64"], "give a larger --canvas"),
        (["--data", cityscapes, "--split", "test"], "unknown split"),
        (["--data", cityscapes, "--json", "no/such/folder.json"], "cannot write"),
        (["--data", cityscapes, "--results", str(tmp_path / "file" / "results")], "cannot make the folder"),
        (["--data", cityscapes, "--ckpt", str(tmp_path)], "expected a directory written by 'convert'"),
        (["--data", cityscapes, "--ckpt", "no/such/folder"], "no/such/folder"),
    ):
        assert cli.main(["--ckpt", tiny, "--cpu", *arguments]) == cli.BAD_INPUT, message
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("manifest.json", b"{", "convert the source again"),
        ("manifest.json", b"[1]", "expected what 'convert' tells of the source"),
        ("checkpoint", b"\x80\xff junk", "expected TensorFlow's list of checkpoints"),
    ],
)
def test_a_damaged_checkpoint_is_told(file, content, told, tiny, cityscapes, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "damaged")
    (folder / file).write_bytes(content)
    assert cli.main(["--ckpt", str(folder), "--cpu", "--data", cityscapes]) == cli.BAD_INPUT
    message = capsys.readouterr().err
    assert f"error: {folder / file}: " in message
    assert told in message


def test_semantic_models_need_semantic_truth(tmp_path, capsys):
    """And instance AP needs panoptic results."""
    info = registry.dataset("coco_panoptic")
    ckpt = save(TINY.replace(num_classes=len(info.class_names), dataset=info.name), tmp_path)
    generated.write("coco_panoptic", tmp_path, "val", 1)
    assert cli.main(["--ckpt", ckpt, "--cpu", "--data", str(tmp_path)]) == cli.BAD_INPUT
    assert "its results are semantic, and the data set has panoptic ground truth alone" in capsys.readouterr().err
    generated.write("coco_panoptic_semseg", tmp_path, "val", 1)
    assert cli.main(["--ckpt", ckpt, "--cpu", "--data", str(tmp_path), "--dataset", "coco_panoptic_semseg", "--ap"]) == cli.BAD_INPUT
    assert "instance AP is that of panoptic results" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--canvas", "1", "2", "3"], ["--replicas", "2", "--gpu"], ["--cpu", "--gpu"], ["--batch", "0"], ["--tta", "--ap"]]
)
def test_usage(arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(["--ckpt", "ckpt", "--data", "data", *arguments])
    assert error.value.code == cli.BAD_INPUT


def test_no_gpu(tiny, cityscapes, capsys):
    assert cli.main(["--ckpt", tiny, "--data", cityscapes, "--gpu"]) == cli.COULD_NOT_RUN
    assert "TensorFlow sees no GPU" in capsys.readouterr().err


def test_no_tpu(tiny, cityscapes, capsys):
    """The precision is chosen before the TPU is started: the program is traced later."""
    tf.config.experimental.enable_tensor_float_32_execution(True)
    assert cli.main(["--ckpt", tiny, "--data", cityscapes, "--tpu", "local"]) == cli.COULD_NOT_RUN
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
    err = capsys.readouterr().err
    assert "cannot use the TPU 'local': TPUs not found in the cluster" in err
    assert err.splitlines()[-1] == "  docs/tpu.md tells what to install, and what may be wrong"


@pytest.mark.parametrize("value", ["", "[]", "{", '{"cluster": 3}'])
def test_a_broken_cluster(tiny, cityscapes, monkeypatch, capsys, value):
    monkeypatch.setenv("TF_CONFIG", value)
    assert cli.main(["--ckpt", tiny, "--data", cityscapes, "--cpu"]) == cli.COULD_NOT_RUN
    assert "TF_CONFIG is not what TensorFlow reads" in capsys.readouterr().err


def test_help_needs_no_tensorflow():
    code = "import sys; sys.modules['tensorflow'] = None\nfrom tfmaskformer.evaluation.cli import main\nmain(sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: tfmaskformer eval" in result.stdout
