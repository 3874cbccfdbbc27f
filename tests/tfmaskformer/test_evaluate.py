"""``tfmaskformer eval``: the official numbers, images on canvases, replicas, kills, both kinds of data, bad input."""

from __future__ import annotations

import importlib.resources
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from pycocotools import mask

import tfmaskformer
from checkpoints import registry
from converters import cli as convert
from tfmaskformer.config import MaskFormerConfig, PixelDecoderConfig, SwinConfig, TestConfig
from tfmaskformer.data import generated, shapes, tfrecords
from tfmaskformer.data.datasets import open_dataset
from tfmaskformer.data.preprocessing import resize_shortest_edge
from tfmaskformer.evaluation import cli
from tfmaskformer.evaluation.canvases import Canvas, choose_canvases
from tfmaskformer.evaluation.instances import InstanceQuality, instance_truth
from tfmaskformer.evaluation.panoptic import PanopticQuality
from tfmaskformer.evaluation.results import read_panoptic
from tfmaskformer.evaluation.semantic import SemanticQuality
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import parameter_specs

IMAGES = 50
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


def test_official_quality(tmp_path, capsys):
    """The official PQ, as tests/checkpoints/test_small.py has it, and AP and files from the same predictions."""
    assert convert.main(["--src", str(SMALL / "shapes_panoptic.pkl"), "--dst", str(tmp_path / "ckpt"), "--config", "shapes_panoptic"]) == 0
    shapes.write(tmp_path / "data", "val", IMAGES)
    capsys.readouterr()
    folders = ["--results", str(tmp_path / "results"), "--resume", str(tmp_path / "resume")]
    report = evaluate("--ckpt", str(tmp_path / "ckpt"), "--data", str(tmp_path / "data"), *CANVAS, "--batch", "4", "--ap", *folders)
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

    # On canvases the same, pixel for pixel, as alone.
    model = tfmaskformer.load(str(tmp_path / "ckpt"))
    for index in range(6):
        image = samples[index].image
        [(panoptic_seg, segments_info)] = tfmaskformer.panoptic_inference(model(image[None]), model.config, [image.shape[:2]])
        assert [(info["id"], info["category_id"]) for info in segments_info] == [
            (info["id"], info["category_id"]) for info in found[index][1]
        ]
        np.testing.assert_array_equal(found[index][0], panoptic_seg)

    state = json.loads((tmp_path / "resume" / "state-0-of-1.json").read_text())["counts"]
    instances = InstanceQuality.from_dict(state["instances"])
    things = registry.dataset("shapes").thing_classes
    truth = instance_truth([(index, *sample[1:]) for index, sample in samples.items()], ids, registry.dataset("shapes").class_names, things)
    expected = instances.result(truth)
    assert report["metrics"]["instances"]["ap"] == pytest.approx(100 * expected.ap, abs=1e-9)
    assert report["metrics"]["instances"]["ap50"] > 60
    assert len(instances.detections) == sum(info["category_id"] in things for _, infos in found.values() for info in infos)

    # Again: nothing is left to do, and the result is the same.
    again = evaluate("--ckpt", str(tmp_path / "ckpt"), "--data", str(tmp_path / "data"), *CANVAS, "--ap", *folders)
    assert (again["metrics"], again["counts"]) == (report["metrics"], report["counts"])
    assert again["run"]["resumed_with"] == IMAGES


def test_the_same_as_each_image_alone(tiny, cityscapes, tmp_path, capsys, monkeypatch):
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
    function = tf.function
    monkeypatch.setattr(tf, "function", lambda **kwargs: function(**(kwargs | {"jit_compile": None})))  # compiling takes seconds
    packed = evaluate("--ckpt", tiny, "--data", str(tmp_path / "records"), *options, "--canvas", "64", "100", "100", "64")
    assert len(packed["run"]["canvases"]) == 2
    for key in ("counts", "images", "metrics", "problems"):
        assert packed[key] == report[key], key


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    generated.write("cityscapes", folder, "val", 7)
    return str(folder)


def processes(what, *arguments):
    script = Path(__file__).with_name("evaluation_processes.py")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), what, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_replicas_count_the_same(tiny, sound):
    """Seven images do not divide by 2 or 4."""
    counts = processes("replicas", tiny, sound)["counts"]
    ids = [record.image_id for record in open_dataset("cityscapes", sound).records]
    assert len(counts) == 4
    for name, count in counts.items():
        assert sorted(count["done"]) == sorted(ids), name
    assert counts["1"] == counts["2"] == counts["4"]
    plain, compiled = (SemanticQuality.from_dict(counts[name]["semantic"]).confusion for name in ("2", "2 compiled"))
    assert plain.sum() == compiled.sum()
    assert np.abs(plain - compiled).sum() <= 10  # px; XLA adds in another order
    pixels = sum(sample.sem_seg.size for sample in open_dataset("cityscapes", sound).samples())
    assert sum(counts["1"]["semantic"]["counts"]) == pixels


def test_a_killed_evaluation_goes_on(tiny, sound):
    result = processes("kills", tiny, sound)
    assert result["left"] == [1, 2, 3]
    killed, whole = (result["counts"][name] for name in ("killed", "whole"))
    assert len(killed["done"]) == len(set(killed["done"])) == 7
    assert killed == whole


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
    ):
        assert cli.main(["--ckpt", tiny, "--cpu", *arguments]) == cli.BAD_INPUT, message
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err


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


@pytest.mark.parametrize("arguments", [["--canvas", "1", "2", "3"], ["--replicas", "2", "--gpu"], ["--cpu", "--gpu"], ["--batch", "0"]])
def test_usage(arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(["--ckpt", "ckpt", "--data", "data", *arguments])
    assert error.value.code == cli.BAD_INPUT


def test_no_gpu(tiny, cityscapes, capsys):
    assert cli.main(["--ckpt", tiny, "--data", cityscapes, "--gpu"]) == cli.COULD_NOT_RUN
    assert "TensorFlow sees no GPU" in capsys.readouterr().err


def test_help_needs_no_tensorflow():
    code = "import sys; sys.modules['tensorflow'] = None\nfrom tfmaskformer.evaluation.cli import main\nmain(sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: tfmaskformer eval" in result.stdout
