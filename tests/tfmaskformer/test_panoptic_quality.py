"""Panoptic quality against what panopticapi computed, and what it refuses."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import pytest

from tfmaskformer.evaluation.panoptic import PanopticQuality


@pytest.fixture(scope="module")
def recorded():
    with np.load(pathlib.Path(__file__).with_name("golden") / "panoptic_quality.npz") as file:
        return {**json.loads(str(file["json"])), "true": file["true"], "predicted": file["predicted"]}


def test_equals_panopticapi(recorded):
    quality = PanopticQuality(recorded["num_classes"], recorded["thing_classes"])
    for case in zip(
        recorded["true"], recorded["true_segments_info"], recorded["predicted"], recorded["predicted_segments_info"], strict=True
    ):
        quality.update(*case)
    expected = recorded["per_class"]
    assert quality.true_positives.tolist() == [item["tp"] for item in expected]
    assert quality.false_positives.tolist() == [item["fp"] for item in expected]
    assert quality.false_negatives.tolist() == [item["fn"] for item in expected]
    np.testing.assert_allclose(quality.iou, [item["iou"] for item in expected], rtol=0, atol=1e-12)
    for name, average in recorded["averages"].items():
        actual = quality.result()[name]
        assert actual.num_classes == average["n"]
        np.testing.assert_allclose(actual[:3], [average["pq"], average["sq"], average["rq"]], rtol=0, atol=1e-12)


def test_the_recording_has_what_is_delicate(recorded):
    """Void, crowds, missed and surplus segments in every class but the last, which is never met."""
    assert (recorded["true"] == 0).any()
    assert (recorded["predicted"] == 0).any()
    crowds = [segment["category_id"] for info in recorded["true_segments_info"] for segment in info if segment["iscrowd"]]
    assert len(crowds) > len(set(crowds)) > 2
    assert all(min(item["tp"], item["fp"], item["fn"]) > 0 for item in recorded["per_class"][:-1])
    assert recorded["per_class"][-1] == {"iou": 0, "tp": 0, "fp": 0, "fn": 0}
    assert recorded["averages"]["stuff"]["n"] == 2


def quality_of(truth, prediction, **first):
    """Of one class; the first true segment is described by ``first``."""
    quality = PanopticQuality(1, [0])
    true_info = [{"id": int(index), "category_id": 0} for index in np.unique(truth) if index]
    if true_info:
        true_info[0] |= first
    quality.update(
        np.array([truth]),
        true_info,
        np.array([prediction]),
        [{"id": int(index), "category_id": 0} for index in np.unique(prediction) if index],
    )
    return quality


@pytest.mark.parametrize(
    ("truth", "prediction", "counts"),
    [
        ([1, 1, 2, 2], [1, 1, 2, 2], (2, 0, 0)),
        ([1, 1, 2, 2], [9, 9, 9, 9], (0, 1, 2)),  # an IoU of exactly one half is no match
        ([1, 1, 1, 2], [5, 5, 0, 0], (1, 0, 1)),
        ([1, 0, 0, 0], [5, 5, 5, 5], (1, 0, 0)),  # void does not count in the union
        ([0, 0, 0, 1, 1, 1], [5, 5, 6, 6, 0, 0], (0, 1, 1)),  # 5 lies on void, 6 half on void
        ([0, 0, 0, 0], [5, 5, 5, 5], (0, 0, 0)),
        ([1, 1, 1, 1], [0, 0, 0, 0], (0, 0, 1)),
    ],
)
def test_counts(truth, prediction, counts):
    quality = quality_of(truth, prediction)
    assert (quality.true_positives[0], quality.false_positives[0], quality.false_negatives[0]) == counts


def test_a_crowd_is_neither_missed_nor_matched_and_excuses_predictions():
    quality = quality_of([1, 1, 1, 2], [1, 1, 1, 2], iscrowd=1)
    assert (quality.true_positives[0], quality.false_positives[0], quality.false_negatives[0]) == (1, 0, 0)


def test_without_any_class():
    quality = PanopticQuality(2, [0])
    assert all(math.isnan(value.pq) and value.num_classes == 0 for value in quality.result().values())


@pytest.mark.parametrize(
    ("panoptic_seg", "segments_info", "message"),
    [
        ([[1, 1]], [{"id": 1, "category_id": 0}], r"the ground truth is \(1, 3\), the prediction \(1, 2\)"),
        ([[1, 1, 2]], [{"id": 1, "category_id": 0}], r"prediction's map has ids \[2\] that its segments_info lacks"),
        (
            [[1, 1, 0]],
            [{"id": 1, "category_id": 0}, {"id": 3, "category_id": 0}],
            r"prediction's segments_info lists ids \[3\], which its map has not",
        ),
        ([[1, 1, 0]], [{"id": 1, "category_id": 0}] * 2, "which lists 1 twice"),
        ([[1, 1, 0]], [{"id": 1, "category_id": 90}], r"prediction has categories \[90\], expected contiguous indices 0 … 0"),
        ([[-1, 1, 0]], [{"id": -1, "category_id": 0}, {"id": 1, "category_id": 0}], r"ids -1 … 1, expected 0 … 4294967295"),
        ([[1.0, 1, 0]], [{"id": 1, "category_id": 0}], r"prediction is float64 \(1, 3\), expected integers \[height, width\]"),
    ],
)
def test_refuses(panoptic_seg, segments_info, message):
    quality = PanopticQuality(1, [0])
    with pytest.raises(ValueError, match=message):
        quality.update(np.array([[1, 1, 0]]), [{"id": 1, "category_id": 0}], np.array(panoptic_seg), segments_info)
    assert not quality.true_positives.any()
    assert not quality.false_negatives.any()
