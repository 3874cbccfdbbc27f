"""Metrics and result files against recordings of the official evaluators (tests/golden/evaluation/record.py)."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tfmaskformer.evaluation import results
from tfmaskformer.evaluation.instances import InstanceQuality, instance_truth
from tfmaskformer.evaluation.panoptic import PanopticQuality
from tfmaskformer.evaluation.semantic import SemanticQuality

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"


def recording(name):
    """What record.py saved: the JSON document, and lists of maps."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        document = json.loads(str(file["json"]))
        for key in file.files:
            if key.endswith("_maps"):
                sizes = file[key.replace("_maps", "_sizes")]
                parts = np.split(file[key], np.cumsum(sizes.prod(1))[:-1])
                document[key.removesuffix("_maps")] = [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]
    return document


@pytest.fixture(scope="module")
def panoptic():
    return recording("panoptic")


@pytest.fixture(scope="module")
def semantic():
    return recording("semantic")


@pytest.fixture(scope="module")
def instances():
    pytest.importorskip("pycocotools")
    return recording("instances")


def panoptic_cases(document):
    return list(zip(document["true"], document["true_segments_info"], document["predicted"], document["segments_info"], strict=True))


def panoptic_quality(document, indices=None):
    quality = PanopticQuality(len(document["dataset_ids"]), range(document["num_things"]))
    cases = panoptic_cases(document)
    for index in range(len(cases)) if indices is None else indices:
        quality.update(*cases[index])
    return quality


def thirds(number):
    """Three replicas' shares, of different order and size."""
    order = np.random.default_rng(3).permutation(number).tolist()
    return order[: number // 2], order[number // 2 : number - 2], order[number - 2 :]


def same(first, second):
    return json.dumps(first.to_dict(), sort_keys=True) == json.dumps(second.to_dict(), sort_keys=True)


def test_panoptic_quality_is_panopticapis(panoptic):
    quality = panoptic_quality(panoptic)
    ids = panoptic["dataset_ids"]
    for name, official in panoptic["panopticapi"].items():
        if name != "per_class":
            actual = quality.result()[name.lower()]
            assert actual.num_classes == official["n"]
            np.testing.assert_allclose(actual[:3], [official[key] for key in ("pq", "sq", "rq")], rtol=0, atol=1e-12)
    per_class = panoptic["panopticapi"]["per_class"]
    assert len(per_class) == len(ids)
    for dataset_id, actual in zip(ids, quality.per_class(), strict=True):
        np.testing.assert_allclose(actual[:3], [per_class[str(dataset_id)][key] for key in ("pq", "sq", "rq")], rtol=0, atol=1e-12)
    for key, group in (("PQ", "all"), ("PQ_th", "things"), ("PQ_st", "stuff")):
        assert 100 * quality.result()[group].pq == pytest.approx(panoptic["detectron2"][key], rel=0, abs=1e-10)


def test_the_panoptic_recording_has_what_is_delicate(panoptic):
    """Every kind of count in many classes, crowds and void that matter, empty images, stale areas, covered segments, classes never met."""
    quality = panoptic_quality(panoptic)
    for name in ("true_positives", "false_positives", "false_negatives"):
        assert (getattr(quality, name) > 0).sum() > 25
    assert [value.num_classes for value in quality.per_class()[-2:]] == [0, 0]
    infos = panoptic["true_segments_info"]
    for left_out in ("iscrowd", "area"):
        changed = [[{key: value for key, value in segment.items() if key != left_out} for segment in info] for info in infos]
        if left_out == "area":  # a segment without pixels has none
            changed = [
                [segment for segment in info if (ids == segment["id"]).any()] for ids, info in zip(panoptic["true"], changed, strict=True)
            ]
        changed = {**panoptic, "true_segments_info": changed}
        assert abs(panoptic_quality(changed).result()["all"].pq - quality.result()["all"].pq) > 0.001
    assert sum(not ids.any() for ids in panoptic["true"]) > 3
    assert sum(not ids.any() for ids in panoptic["predicted"]) > 3
    assert any(set(np.unique(ids)) < {0} | {segment["id"] for segment in info} for ids, info in zip(panoptic["true"], infos, strict=True))


def test_panoptic_counts_add_up_to_the_same_bits_in_any_order(panoptic):
    whole = panoptic_quality(panoptic)
    parts = [panoptic_quality(panoptic, share) for share in thirds(len(panoptic["true"]))]
    for total in (parts[0] + parts[1] + parts[2], parts[2] + (parts[0] + parts[1])):
        assert same(total, whole)
        assert total.result() == whole.result()
        assert total.iou.tolist() == whole.iou.tolist()
    assert parts[0].true_positives.sum() < whole.true_positives.sum()  # adding leaves the parts as they are
    with pytest.raises(ValueError, match="different classes do not add up"):
        whole + PanopticQuality(len(panoptic["dataset_ids"]), [])


def test_iou_sums_are_exact():
    """1/3 of a class's IoUs each: float64 sums of these in two orders differ, here they are the sum of fractions, rounded once."""
    forward, backward = (PanopticQuality(1, [0]) for _ in range(2))
    widths = list(range(3, 60))
    for quality, order in ((forward, widths), (backward, widths[::-1])):
        for width in order:
            truth = np.ones((1, width), int)
            prediction = np.array([[1] * (width - 1) + [0]])
            quality.update(truth, [{"id": 1, "category_id": 0}], prediction, [{"id": 1, "category_id": 0}])
    ious = [(width - 1) / width for width in widths]
    assert sum(ious) != sum(ious[::-1])
    assert forward.iou[0] == backward.iou[0] == math.fsum(ious)


def test_interrupted_panoptic_evaluation_resumes(panoptic):
    cases = panoptic_cases(panoptic)
    quality = panoptic_quality(panoptic, range(17))
    quality = PanopticQuality.from_dict(json.loads(json.dumps(quality.to_dict())))
    for case in cases[17:]:
        quality.update(*case)
    assert same(quality, panoptic_quality(panoptic))


def semantic_quality(document, indices=None):
    quality = SemanticQuality(document["num_classes"], document["ignore_label"])
    for index in range(len(document["true"])) if indices is None else indices:
        quality.update(document["true"][index], document["predicted"][index])
    return quality


def test_semantic_quality_is_that_of_the_official_evaluator(semantic):
    quality = semantic_quality(semantic)
    official = np.array(semantic["confusion"])
    assert quality.confusion.dtype == np.int64
    assert quality.confusion.tolist() == official[:-1].tolist()
    assert not official[-1].any()
    result, expected = quality.result(), semantic["results"]
    for name, value in (("mIoU", result.miou), ("fwIoU", result.fwiou), ("mACC", result.macc), ("pACC", result.pacc)):
        assert 100 * value == pytest.approx(expected[name], rel=0, abs=1e-12)
    for index in range(semantic["num_classes"]):
        np.testing.assert_allclose(100 * result.iou[index], expected[f"IoU-c{index}"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(100 * result.acc[index], expected[f"ACC-c{index}"], rtol=0, atol=1e-12)
    absent = np.isnan(result.iou)
    assert absent.sum() == 3
    assert (quality.confusion[absent].sum(1) > 0).any()  # predicted, but never true: not in the mean
    assert quality.confusion[:, -1].sum() > 0


def test_semantic_counts_add_up_and_resume(semantic):
    parts = [semantic_quality(semantic, share) for share in thirds(len(semantic["true"]))]
    total = SemanticQuality.from_dict(json.loads(json.dumps((parts[2] + parts[0]).to_dict()))) + parts[1]
    assert same(total, semantic_quality(semantic))
    with pytest.raises(ValueError, match="do not add up"):
        total + SemanticQuality(semantic["num_classes"], 0)


def test_semantic_quality_without_any_truth():
    quality = SemanticQuality(2)
    quality.update(np.full((2, 3), 255), np.zeros((2, 3), int))
    assert all(math.isnan(value) for value in quality.result()[:4])
    ignored_class = SemanticQuality(2, ignore_label=0)  # upstream, too, a class can be ignored
    ignored_class.update(np.array([[0, 1]]), np.array([[1, 1]]))
    assert ignored_class.result().pacc == 1


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        ([[0, 1, 2]], [[0, 1, 1]], r"ground truth has labels \[2\], expected 0 … 1 or 255 \(ignored\)"),
        ([[0, -1, 1]], [[0, 1, 1]], r"ground truth has labels \[-1\]"),
        ([[0, 255, 1]], [[0, 255, 1]], r"prediction has labels \[255\], expected 0 … 1$"),
        ([[0, 255, 1]], [[0, 1]], r"prediction is int64 \(1, 2\), expected integers .*\(1, 3\)"),
        ([0, 1], [0, 1], r"ground truth is int64 \(2,\)"),
        ([[0, 1]], [[0.0, 1.0]], "prediction is float64"),
    ],
)
def test_semantic_quality_refuses(truth, prediction, message):
    quality = SemanticQuality(2)
    with pytest.raises(ValueError, match=message):
        quality.update(np.array(truth), np.array(prediction))
    assert not quality.confusion.any()


def test_panoptic_files_are_those_of_the_official_evaluator(panoptic, tmp_path):
    ids = panoptic["dataset_ids"]
    image_ids = [annotation["image_id"] for annotation in panoptic["truth_json"]["annotations"]]
    files = [f"folder/{name}.jpg" for name in panoptic["names"]]
    written = list(zip(image_ids, files, panoptic["predicted"], panoptic["segments_info"], strict=True))
    results.write_panoptic(tmp_path / "new", panoptic["truth_json"], written, ids)
    assert json.loads((tmp_path / "new" / "predictions.json").read_text()) == panoptic["predictions_json"]
    pngs = tmp_path / "new" / "predictions"
    assert sorted(path.name for path in pngs.iterdir()) == sorted(f"{name}.png" for name in panoptic["names"])
    official = bytes.fromhex(panoptic["png_of_7"])
    np.testing.assert_array_equal(results.decode_png(official), panoptic["predicted"][7])
    np.testing.assert_array_equal(results.decode_png((pngs / f"{panoptic['names'][7]}.png").read_bytes()), panoptic["predicted"][7])
    again = list(results.read_panoptic(tmp_path / "new", ids))
    assert len(again) == len(written)
    quality = PanopticQuality(len(ids), range(panoptic["num_things"]))
    for (image_id, file, panoptic_seg, infos), expected, case in zip(again, written, panoptic_cases(panoptic), strict=True):
        assert (image_id, Path(file).stem) == (expected[0], Path(expected[1]).stem)
        np.testing.assert_array_equal(panoptic_seg, expected[2])
        quality.update(*case[:2], panoptic_seg, infos)
    assert same(quality, panoptic_quality(panoptic))
    with pytest.raises(ValueError, match=r"category ids .* which the data set has not"):
        list(results.read_panoptic(tmp_path / "new", ids[:3]))


def test_png_holds_24_bits():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 2**24 - 1, 66051]], np.int32)
    np.testing.assert_array_equal(results.decode_png(results.encode_png(ids)), ids)
    for wrong in (2**24, -1):
        with pytest.raises(ValueError, match=r"ids are .* expected 0 … 16777215"):
            results.encode_png(np.array([[0, wrong]]))
    with io.BytesIO() as file:
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(file, format="PNG")
        with pytest.raises(ValueError, match="mode 'L', expected 'RGB'"):
            results.decode_png(file.getvalue())


def test_semantic_json_is_that_of_the_official_evaluator(semantic):
    pytest.importorskip("pycocotools")
    written = []
    for index, labels in enumerate(semantic["predicted"]):
        written += results.semantic_annotations(f"images/{index}.jpg", labels, semantic["dataset_ids"])
    assert json.loads(json.dumps(written)) == semantic["predictions_json"]


def instance_quality(document, indices=None):
    quality = InstanceQuality([*document["dataset_ids"], 999])
    for index in range(len(document["image_ids"])) if indices is None else indices:
        quality.update(document["image_ids"][index], document["predicted"][index], document["segments_info"][index])
    return quality


def check_instances(result, expected):
    for name, value in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), result, strict=False):
        assert 100 * value == pytest.approx(expected[name], rel=0, abs=1e-12)
    assert {f"AP-{name}" for name in result.per_class} == {name for name in expected if name.startswith("AP-")}
    for name, value in result.per_class.items():
        assert 100 * value == pytest.approx(expected[f"AP-{name}"], rel=0, abs=1e-12)


def test_instance_json_and_ap_are_those_of_the_official_evaluator(instances):
    quality = instance_quality(instances)
    assert json.loads(json.dumps(quality.detections)) == instances["predictions_json"]
    truth = json.dumps(instances["truth_json"])
    check_instances(quality.result(instances["truth_json"]), instances["results"])
    assert json.dumps(instances["truth_json"]) == truth  # pycocotools writes into what it gets
    assert len(set(map(str, instances["results"].values()))) == len(instances["results"])  # all numbers tell something
    assert all(math.isfinite(value) for value in instances["results"].values())


def test_instances_add_up_in_any_order_and_resume(instances):
    parts = [instance_quality(instances, share) for share in thirds(len(instances["image_ids"]))]
    total = InstanceQuality.from_dict(json.loads(json.dumps((parts[2] + parts[0]).to_dict()))) + parts[1]
    check_instances(total.result(instances["truth_json"]), instances["results"])


def test_instances_of_some_images_only(instances):
    """Images that were skipped are not missed objects, if they are not in the truth."""
    share = thirds(len(instances["image_ids"]))[0]
    part, ids = instance_quality(instances, share), [instances["image_ids"][index] for index in share]
    rest = {
        **instances["truth_json"],
        "images": [image for image in instances["truth_json"]["images"] if image["id"] in ids],
        "annotations": [item for item in instances["truth_json"]["annotations"] if item["image_id"] in ids],
    }
    assert part.result(instances["truth_json"]).ap < part.result(rest).ap


def test_without_detections_there_is_no_ap(instances):
    result = InstanceQuality(instances["dataset_ids"]).result(instances["truth_json"])
    assert all(math.isnan(value) for value in result[:6])
    assert result.per_class == {}


def test_a_perfect_panoptic_result_has_an_ap_of_1(panoptic):
    """Against the things of panoptic annotations themselves; crowds are neither found nor missed."""
    pytest.importorskip("pycocotools")
    things, ids = range(panoptic["num_things"]), panoptic["dataset_ids"]
    names = [category["name"] for category in panoptic["truth_json"]["categories"]]
    listed = [
        [segment for segment in info if (ids_map == segment["id"]).any()]
        for ids_map, info in zip(panoptic["true"], panoptic["true_segments_info"], strict=True)
    ]
    truth = instance_truth(zip(range(60), panoptic["true"], listed, strict=True), ids, names, things)
    assert [category["id"] for category in truth["categories"]] == ids[: len(things)]
    assert {annotation["category_id"] for annotation in truth["annotations"]} <= {category["id"] for category in truth["categories"]}
    assert sum(annotation["iscrowd"] for annotation in truth["annotations"]) > 5
    quality = InstanceQuality(ids)
    for index, (ids_map, info) in enumerate(zip(panoptic["true"], listed, strict=True)):
        found = [{**segment, "isthing": segment["category_id"] in things, "score": 1.0} for segment in info if not segment["iscrowd"]]
        quality.update(index, ids_map, found)
    result = quality.result(truth)
    assert result.ap == pytest.approx(1, abs=1e-12)
    quality.detections.pop()
    assert quality.result(truth).ap < 0.999


def test_missing_pycocotools_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    with pytest.raises(ImportError, match=r"need pycocotools: pip install 'tfmaskformer\[eval\]'"):
        results.encode_mask(np.zeros((2, 2), bool))
    with pytest.raises(ImportError, match="need pycocotools"):
        InstanceQuality([1]).result({})
