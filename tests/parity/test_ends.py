"""The two ends of the pipeline: the definitions against recorded figures of the official packages, and faults that have to be named."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from checkpoints import registry
from parity import ends
from parity.check import Exemption, Item
from parity.evidence import Evidence
from parity.inputs import make_targets, parse_case
from parity.stages import stage_of
from parity.tap_rules import View
from parity.trace import Case, Trace, TraceFileWriter
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.data import preprocessing
from tfmaskformer.evaluation import panoptic
from tfmaskformer.evaluation.panoptic import PanopticQuality
from tfmaskformer.evaluation.semantic import SemanticQuality

GOLDEN = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def panopticapi():
    with np.load(GOLDEN / "tfmaskformer" / "golden" / "panoptic_quality.npz") as file:
        return {**json.loads(str(file["json"])), "true": file["true"], "predicted": file["predicted"]}


@pytest.fixture(scope="module")
def evaluator():
    """What Detectron2's SemSegEvaluator counted, and its maps, flattened."""
    with np.load(GOLDEN / "golden" / "evaluation" / "semantic.npz") as file:
        return {**json.loads(str(file["json"])), "true": file["true_maps"], "predicted": file["predicted_maps"]}


def by_id(segments_info):
    return {segment["id"]: segment["category_id"] for segment in segments_info}


def test_the_panoptic_definition_is_panopticapis(panopticapi):
    names = ("true", "true_segments_info", "predicted", "predicted_segments_info")
    counts = np.zeros((panopticapi["num_classes"], 4))
    for true, true_info, predicted, info in zip(*(panopticapi[name] for name in names), strict=True):
        crowds = tuple(segment["id"] for segment in true_info if segment["iscrowd"])
        counts += ends.panoptic_counts(ends.Truth(true, by_id(true_info), crowds), predicted, by_id(info), len(counts))
    expected = [[of_class[name] for name in ("iou", "tp", "fp", "fn")] for of_class in panopticapi["per_class"]]
    np.testing.assert_allclose(counts, expected, rtol=0, atol=1e-12)
    is_thing = np.isin(np.arange(len(counts)), panopticapi["thing_classes"])
    averages = [[panopticapi["averages"][group][name] for name in ("pq", "sq", "rq")] for group in ("all", "things", "stuff")]
    np.testing.assert_allclose(ends.panoptic_quality(counts, is_thing), averages, rtol=0, atol=1e-12)
    assert np.isnan(ends.panoptic_quality(np.zeros((3, 4)), np.array([True, False, True]))).all()


def test_the_first_of_equal_scores_is_the_class():
    scores = np.random.default_rng(0).integers(0, 4, (9, 31, 17)).astype(np.float32)
    classes = ends.classes_of(scores)
    assert classes.dtype == np.int64
    np.testing.assert_array_equal(classes, scores.argmax(0))


def test_the_semantic_definition_is_detectron2s(evaluator):
    counts = ends.confusion(evaluator["true"], evaluator["predicted"], evaluator["num_classes"], evaluator["ignore_label"])
    np.testing.assert_array_equal(counts, np.array(evaluator["confusion"])[:-1])
    official = [evaluator["results"][name] / 100 for name in ("mIoU", "fwIoU", "mACC", "pACC")]
    np.testing.assert_allclose(ends.semantic_quality(counts), official, rtol=0, atol=1e-12)
    assert np.isnan(ends.semantic_quality(np.zeros((3, 4), int))).all()


# --- judging

CONFIG = MaskFormerConfig.from_dict(registry.entry("shapes_panoptic").config)
SIZE = (61, 90)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A trace of one photograph with an official result; its manifest's description of the images."""
    folder = tmp_path_factory.mktemp("trace")
    [spec] = parse_case(f"odd={ends.PHOTOS / 'chelsea.png'}@{SIZE[0]}x{SIZE[1]}:5").images
    image = spec.read()
    labels, masks = make_targets(*SIZE, 5, CONFIG.num_classes, "ends")
    found, found_labels = np.roll(masks, 2, 1), (labels + (np.arange(5) == 3)) % CONFIG.num_classes
    ids = np.zeros(SIZE, np.int32)
    for index, mask in enumerate(found, 1):
        ids[mask] = index
    scores = np.random.default_rng(0).random((CONFIG.num_classes, *SIZE))
    segments = np.array([[index, label, int(label in CONFIG.thing_classes)] for index, label in enumerate(found_labels, 1)])
    for dtype in ("float64", "float32"):
        with TraceFileWriter(folder, "odd", dtype, runs=["one"], samples=None, facts={"key": "same"}) as writer:
            if dtype == "float64":
                writer.add("inputs", "images/0", image)
                writer.add("inputs", "targets/0/labels", labels)
                writer.add("inputs", "targets/0/masks", masks)
            writer.add("inference", "0/sem_seg", scores.astype(dtype))
            writer.add("inference", "0/panoptic_seg", ids)
            writer.add("inference", "0/segments", segments)
    description = {"file": "chelsea.png", "size_px": list(SIZE), "sha256": hashlib.sha256(image.tobytes()).hexdigest()}
    with Case(folder, "odd") as case:
        yield case, [description]


def results_of(case, **changed):
    """The official results as TensorFlow's own, but for ``changed``; of masked padding the canvas at a place in a batch."""
    own = {name: case.reference.read("inference", name) for name in case.reference.group("inference")} | changed
    view = View(1, (96, 128), SIZE)
    canvas = np.zeros((2, 96, 128, 3))
    canvas[1] = ends.canvas(case.images[0], view.canvas_px, CONFIG)
    return types.SimpleNamespace(groups={"inference": own, "taps": {"images#0": canvas}}, view=view)


def preprocessing_of(recorded, folder=Path("nowhere"), results=None):
    case, described = recorded
    return list(ends.judge_preprocessing(case, described, folder, results or results_of(case), CONFIG, "float64"))


def failed(found):
    return [item.name for item in found if isinstance(item, Item) and not item.passed]


INFERENCE = (Item("inference", "0/panoptic_seg", True), Item("inference", "0/sem_seg", True, tolerance=1e-9))


def metrics_of(recorded, results=None, inference=INFERENCE):
    case, _ = recorded
    return list(ends.judge_metrics(case, results or results_of(case), CONFIG, inference))


def test_what_is_right_passes_and_everything_is_judged(recorded):
    found = preprocessing_of(recorded)
    assert failed(found) == []
    assert [each.name for each in found] == [
        *("0/read/png", "0/read/png_tf", "0/read/upright", "0/read/photograph", "0/resized/photograph"),
        *("0/resized/shortest_edge", "0/resized/shortest_edge_tf", "0/canvas", "resized/shapes", "resized/shapes_tf"),
    ]
    found = metrics_of(recorded)
    assert failed(found) == []
    names = [f"0/panoptic/{name}" for name in ("targets", "shifted", "probe", "quality", "own")]
    assert [each.name for each in found] == names + [f"0/semantic/{name}" for name in ("targets", "shifted", "quality", "own")]
    assert all(each.note == ends.BY_DEFINITION for each in found if not each.name.endswith("own"))


def test_every_stage_knows_its_names(recorded):
    found = [*preprocessing_of(recorded), *metrics_of(recorded)]
    assert {stage_of(each.group, each.name) for each in found} == {"image reading and resize", "normalise and pad", "evaluation metric"}


def bgr(right):
    return lambda *arguments: right(*arguments)[..., ::-1]


def by_tensorflow(right):
    return lambda image, size: tf.cast(tf.round(tf.image.resize(image, size)), tf.uint8)


def truncated(right):
    return lambda height, width, low, high: tuple(int(side * low / min(height, width)) for side in (height, width))


def not_turned(right):
    return lambda image: 1


def raises(right):
    def read(data):
        raise OSError("no such codec")

    return read


@pytest.mark.parametrize(
    ("function", "break_it", "named"),
    [
        ("decode_image", bgr, ["0/read/png", "0/read/upright"]),
        ("decode_image", raises, ["0/read/png", "0/read/upright"]),
        ("decode_image_tf", bgr, ["0/read/png_tf", "0/read/photograph", "0/resized/photograph"]),
        ("exif_orientation", not_turned, ["0/read/upright"]),
        ("resize_bilinear", by_tensorflow, ["0/resized/photograph", "0/resized/shortest_edge_tf"]),
        ("resized_shape", truncated, ["0/resized/shortest_edge", "resized/shapes"]),
        (
            "resized_shape_tf",
            lambda right: lambda shape, *limits: right(shape, *limits) - 1,
            ["0/resized/shortest_edge_tf", "resized/shapes_tf"],
        ),
    ],
)
def test_faults_of_reading_and_resizing_are_named(recorded, monkeypatch, function, break_it, named):
    monkeypatch.setattr(preprocessing, function, break_it(getattr(preprocessing, function)))
    found = preprocessing_of(recorded)
    assert failed(found) == named
    seen = [each for each in found if isinstance(each, Evidence)]
    assert all(each.expected.shape[2] == 3 and each.error.any() for each in seen)
    assert break_it is not bgr or {each.name for each in seen} == set(named)


def test_a_canvas_with_something_beside_the_image_is_named(recorded):
    case, _ = recorded
    for place in ((1, 95, 3, 0), (1, 3, 127, 2), (1, 3, 3, 1)):
        results = results_of(case)
        results.groups["taps"]["images#0"][place] += 1e-3
        assert failed(preprocessing_of(recorded, results=results)) == ["0/canvas"]
        results.groups["taps"]["images#0"][(0, *place[1:])] += 1  # another image of the batch
        assert failed(preprocessing_of(recorded, results=results)) == ["0/canvas"]


def test_a_photograph_that_is_not_there_or_another_is_exempted_by_name(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(ends, "PHOTOS", tmp_path)
    for reason in ("is not here", "another photograph", "neither PNG nor JPEG"):
        found = preprocessing_of(recorded)
        assert [(each.name, reason in each.reason) for each in found if isinstance(each, Exemption)] == [
            ("0/read/photograph", True),
            ("0/resized/photograph", True),
        ]
        assert failed(found) == []
        Image.fromarray(np.zeros((70, 100, 3), np.uint8)).save(tmp_path / "chelsea.png", "BMP" if reason == "another photograph" else "PNG")
    shutil.copy(Path(ends.__file__).parents[1] / "checkpoints" / "photos" / "chelsea.png", tmp_path / "x")
    (tmp_path / "trace").mkdir()
    shutil.copy(tmp_path / "x", tmp_path / "trace" / "chelsea.png")
    assert not [each for each in preprocessing_of(recorded, tmp_path / "trace") if isinstance(each, Exemption)]


def without_void(right):
    def update(self, true_ids, true_info, ids, info):
        everything = [*true_info, {"id": 999, "category_id": 0, "iscrowd": 0}]
        right(self, np.where(true_ids == 0, 999, true_ids), everything, ids, info)

    return update


def without_crowds(right):
    return lambda self, ids, info, *prediction: right(self, ids, [{**segment, "iscrowd": 0} for segment in info], *prediction)


def resets(right):
    def update(self, *arguments):
        self.__init__(CONFIG.num_classes, CONFIG.thing_classes)
        right(self, *arguments)

    return update


def exchanged(right):
    def update(self, truth, classes):
        ignored = truth == CONFIG.criterion.ignore_value
        right(self, np.where(ignored, truth, classes), np.where(ignored, classes, truth))

    return update


def ignored_counts(right):
    return lambda self, truth, classes: right(self, np.where(truth == CONFIG.criterion.ignore_value, 0, truth), classes)


@pytest.mark.parametrize(
    ("owner", "function", "break_it", "named"),
    [
        (PanopticQuality, "update", without_void, {"0/panoptic/targets", "0/panoptic/shifted", "0/panoptic/probe", "0/panoptic/quality"}),
        (PanopticQuality, "update", without_crowds, {"0/panoptic/shifted", "0/panoptic/probe", "0/panoptic/quality"}),
        (PanopticQuality, "update", resets, {"0/panoptic/quality"}),
        (
            panoptic,
            "_mean",
            lambda right: lambda classes: right([each._replace(num_classes=1) for each in classes]),
            {"0/panoptic/quality"},
        ),
        (
            panoptic,
            "_quality",
            lambda right: lambda iou, true, *wrong: right(iou, true, *(2 * each for each in wrong)),
            {"0/panoptic/quality"},
        ),
        (SemanticQuality, "update", exchanged, {"0/semantic/targets", "0/semantic/shifted", "0/semantic/quality"}),
        (SemanticQuality, "update", ignored_counts, {"0/semantic/targets", "0/semantic/shifted", "0/semantic/quality"}),
        (
            SemanticQuality,
            "result",
            lambda right: lambda self: right(self)._replace(miou=float(np.nan_to_num(right(self).iou).mean()) / 2),
            {"0/semantic/quality"},
        ),
    ],
)
def test_faults_of_counting_are_named(recorded, monkeypatch, owner, function, break_it, named):
    monkeypatch.setattr(owner, function, break_it(getattr(owner, function)))
    assert set(failed(metrics_of(recorded))) == named


def test_every_rule_of_the_probe_counts():
    truth, ids, classes = ends.probe()
    counts = ends.panoptic_counts(truth, ids, classes, 7)
    assert counts.tolist() == [[0, 0, 1, 2], [1.8, 2, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_other_results_give_other_counts_unless_at_a_near_tie(recorded):
    case, _ = recorded
    ids, segments = (case.reference.read("inference", f"0/{name}") for name in ("panoptic_seg", "segments"))
    edge = ids.copy()
    edge.flat[np.flatnonzero(ids == segments[0, 0])[:4]] = 0
    item = next(each for each in metrics_of(recorded, results_of(case, **{"0/panoptic_seg": edge})) if each.name == "0/panoptic/own")
    assert item.passed
    assert item.note == "4 pixels belong to other segments"
    assert 0 < item.error < item.tolerance

    dropped = np.where(ids == segments[0, 0], 0, ids)
    changed = results_of(case, **{"0/panoptic_seg": dropped, "0/segments": segments[1:]})
    assert failed(metrics_of(recorded, changed)) == ["0/panoptic/own"]
    near_tie = (dataclasses.replace(INFERENCE[0], note="near-tie: shown"), INFERENCE[1])
    assert failed(metrics_of(recorded, changed, near_tie)) == []
    wrong = (dataclasses.replace(near_tie[0], passed=False), INFERENCE[1])
    assert failed(metrics_of(recorded, changed, wrong)) == ["0/panoptic/own"]
    assert failed(metrics_of(recorded, results_of(case, **{"0/panoptic_seg": ids[1:]}))) == ["0/panoptic/own"]

    scores = case.reference.read("inference", "0/sem_seg")
    other = scores.copy()
    other[:, 7, 7] = 1 - other[:, 7, 7]
    assert failed(metrics_of(recorded, results_of(case, **{"0/sem_seg": other}))) == ["0/semantic/own"]
    tied = scores.copy()
    best = tied[:, 7, 7].argsort()[-2:]
    tied[best[0], 7, 7] = tied[best[1], 7, 7] + 1e-12
    assert failed(metrics_of(recorded, results_of(case, **{"0/sem_seg": tied}))) == []
    assert failed(metrics_of(recorded, results_of(case, **{"0/sem_seg": scores[:, 1:]}))) == ["0/semantic/own"]
    assert failed(metrics_of(recorded, inference=INFERENCE[:1])) == ["0/semantic/own"]


def test_recorded_figures_of_the_official_packages_are_what_counts(recorded, tmp_path):
    case, _ = recorded
    target, scores = case.targets[0], case.reference.read("inference", "0/sem_seg")
    ids, classes = ends.panoptic_result(case.reference.read, "0")
    with TraceFileWriter(tmp_path, "odd", "float64", runs=["one"], samples=100, facts={"key": "same"}) as writer:
        for group, name in case.reference.records:
            writer.add(group, name, case.reference.read(group, name))
        writer.add("metrics", "0/semantic/classes", scores.argmax(0).astype(np.int32))
        counts = ends.confusion(ends.target_sem_seg(target, 255), scores.argmax(0), CONFIG.num_classes, 255)
        rows = np.argwhere(counts)
        writer.add("metrics", "0/semantic/targets", np.column_stack([rows, counts[tuple(rows.T)]]))
        for name, pair in ends.panoptic_pairs(target, ids, classes, CONFIG.num_classes).items():
            writer.add("metrics", f"0/panoptic/{name}", ends.panoptic_counts(*pair, CONFIG.num_classes) + (name == "shifted"))
    shutil.copy(case.baseline.path, tmp_path)
    results = results_of(case)
    with Case(tmp_path, "odd") as again:
        assert again.reference["inference", "0/sem_seg"].samples == 100
        found = list(ends.judge_metrics(again, results, CONFIG, INFERENCE))
    assert failed(found) == ["0/panoptic/shifted"]
    notes = {each.name: each.note for each in found}
    assert notes["0/semantic/targets"] == notes["0/panoptic/probe"] == ""
    assert notes["0/semantic/quality"] == ends.BY_DEFINITION


def test_samples_of_scores_are_told_of(recorded, tmp_path):
    case, _ = recorded
    with TraceFileWriter(tmp_path, "odd", "float64", runs=["one"], samples=100, facts={"key": "same"}) as writer:
        for group, name in case.reference.records:
            writer.add(group, name, case.reference.read(group, name))
    shutil.copy(case.baseline.path, tmp_path)
    with Case(tmp_path, "odd") as again:
        found = list(ends.judge_metrics(again, results_of(case), CONFIG, INFERENCE))
    assert failed(found) == []
    [exempted] = [each for each in found if isinstance(each, Exemption)]
    assert exempted.name == "0/semantic/own"
    assert "samples" in exempted.reason


def test_the_photographs_of_committed_traces_are_compared_and_not_exempted():
    traces = [*(GOLDEN / "golden").glob("tiny_*"), GOLDEN / "golden" / "small_R50"]
    results = types.SimpleNamespace(view=None)
    for trace in map(Trace, traces):
        for case in trace:
            found = list(
                ends.judge_preprocessing(case, trace.manifest["cases"][case.name]["images"], trace.directory, results, CONFIG, "float32")
            )
            assert failed(found) == []
            assert not [each for each in found if isinstance(each, Exemption)]


def test_the_official_packages_agree_with_the_definitions(official_sources, monkeypatch):
    """panopticapi is not on PyPI: its figures are compared where it is installed, Detectron2's in any case."""
    torch = pytest.importorskip("torch")
    from parity import official, official_metrics

    official.load()
    for objects in (0, 1, 5):
        labels, masks = make_targets(40, 50, objects, 9, f"official {objects}")
        target = {"labels": labels, "masks": masks}
        truth = ends.target_truth({"labels": labels, "masks": np.roll(masks, 1, 1)})
        scores = np.random.default_rng(objects).random((9, 8, 10)).repeat(5, 1).repeat(5, 2)
        head = types.SimpleNamespace(num_classes=9, ignore_value=255)
        model = types.SimpleNamespace(sem_seg_head=head, metadata={"thing_dataset_id_to_contiguous_id": {1: 0, 2: 1, 3: 2}})
        result = {"sem_seg": torch.from_numpy(scores), "panoptic_seg": (torch.from_numpy(truth.ids), truth.segments_info)}
        found = dict(official_metrics.figures(result, target, model))
        classes = scores.argmax(0)
        truths = {"targets": ends.target_sem_seg(target, 255), "shifted": ends.moved(classes, 255)}
        defined = {name: ends.confusion(sem_seg, classes, 9, 255) for name, sem_seg in truths.items()}
        for name, counts in defined.items():
            rows = np.argwhere(counts)
            np.testing.assert_array_equal(found[f"semantic/{name}"], np.column_stack([rows, counts[tuple(rows.T)]]))
        np.testing.assert_allclose(found["semantic/quality"], ends.semantic_quality(sum(defined.values())), rtol=0, atol=1e-12)
        if importlib.util.find_spec("panopticapi") is None:
            assert not any(name.startswith("panoptic") for name in found)
            continue
        pairs = ends.panoptic_pairs(target, truth.ids, truth.classes, 9)
        defined = {name: ends.panoptic_counts(*pair, 9) for name, pair in pairs.items()}
        for name, counts in defined.items():
            np.testing.assert_allclose(found[f"panoptic/{name}"], counts, rtol=0, atol=1e-12)
        quality = ends.panoptic_quality(sum(defined.values()), np.arange(9) < 3)
        np.testing.assert_allclose(found["panoptic/quality"], quality, rtol=0, atol=1e-12)
