"""The two ends of the pipeline: the definitions against recorded figures of the official packages, and faults that have to be named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from parity import ends

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


def test_the_semantic_definition_is_detectron2s(evaluator):
    counts = ends.confusion(evaluator["true"], evaluator["predicted"], evaluator["num_classes"], evaluator["ignore_label"])
    np.testing.assert_array_equal(counts, np.array(evaluator["confusion"])[:-1])
    official = [evaluator["results"][name] / 100 for name in ("mIoU", "fwIoU", "mACC", "pACC")]
    np.testing.assert_allclose(ends.semantic_quality(counts), official, rtol=0, atol=1e-12)
    assert np.isnan(ends.semantic_quality(np.zeros((3, 4), int))).all()
