"""What there is to see of a check: small, and nothing that is wrong disappears."""

from __future__ import annotations

import types

import numpy as np
import pytest

from parity import evidence, tap_rules
from parity.check import Item
from parity.trace import Case, TraceFileWriter
from tfmaskformer.config import MaskFormerConfig

MAP = tap_rules.Layout("BHWC", "BCHW")


def test_one_wrong_element_of_a_large_map_is_seen():
    expected = np.random.default_rng(0).normal(size=(2, 5, 333, 401))
    actual = expected.copy()
    actual[1, 3, 201, 77] += 0.5
    seen = evidence.evidence("taps", "x", actual, expected, layout=MAP)
    assert seen.axes == ("row", "column")
    assert seen.error.shape == seen.expected.shape == seen.actual.shape == (evidence.SIDE, evidence.SIDE)
    [[row, column]] = np.argwhere(seen.error)
    assert (row, column) == (201 * evidence.SIDE // 333, 77 * evidence.SIDE // 401)
    assert seen.error[row, column] == np.float32(0.5)
    assert seen.place == "image 1 of 0…1, channel 3 of 0…4"
    assert (seen.profile_axis, np.flatnonzero(seen.profile).tolist()) == ("channel", [3])
    assert [expected[1, 3, 201, 77], actual[1, 3, 201, 77]] in seen.points.tolist()
    assert seen.difference_counts.sum() == 1
    assert seen.counts.sum(1).tolist() == [expected.size] * 2
    assert seen.equal == 1 - 1 / expected.size


@pytest.mark.parametrize(
    ("group", "layout", "shape", "lengths", "axes", "maps"),
    [
        ("taps", tap_rules.Layout("BSC", "SBC", 32), (6, 1, 8), {}, ("position", "channel"), (6, 8)),
        ("taps", tap_rules.Layout("BHWC", "B(HW)C"), (1, 12, 5), {"B": 1, "H": 3, "W": 4, "C": 5}, ("row", "column"), (3, 4)),
        ("taps", tap_rules.Layout("BHWC", "B(HW)C"), (1, 12, 5), {}, ("row and column", "channel"), (12, 5)),
        ("outputs", tap_rules.Layout("BQC", "BQC"), (1, 7, 3), {}, ("query", "channel"), (7, 3)),
        ("inference", None, (4, 5, 6), {}, ("row", "column"), (5, 6)),
        ("matcher", None, (9, 2), {}, ("query", "object"), (9, 2)),
        ("gradients", None, (8, 3, 2, 2), {}, ("out", "in, row, column"), (8, 12)),
        ("gradients", None, (8,), {}, ("", "channel"), (1, 8)),
        ("taps", MAP, (1, 4, 1, 1), {}, ("", "channel"), (1, 4)),
        ("preprocessing", None, (5, 6, 3), {}, ("row", "column"), (5, 6, 3)),
    ],
)
def test_rows_and_columns_are_what_the_layout_says(group, layout, shape, lengths, axes, maps):
    expected = np.arange(np.prod(shape), dtype=float).reshape(shape)
    seen = evidence.evidence(group, "x", expected + 1, expected, layout=layout, lengths=lengths)
    assert seen.axes == axes
    assert seen.expected.shape == seen.actual.shape == maps
    assert seen.error.shape == maps[:2]
    assert (seen.error == 1).all()


def test_samples_empty_tensors_and_nan_have_no_maps_or_none_that_break():
    expected = np.linspace(-1, 1, 50)
    seen = evidence.evidence("taps", "x", expected * 2, expected, sampled=True)
    assert seen.error.size == seen.profile.size == 0
    assert len(seen.points) == 50
    empty = evidence.evidence("matcher", "x", np.zeros((3, 0)), np.zeros((3, 0)))
    assert (empty.error.size, empty.points.size, empty.equal) == (0, 0, 1.0)
    broken = evidence.evidence("gradients", "x", np.array([[np.nan, np.inf], [1.0, 2.0]]), np.ones((2, 2)))
    assert broken.error.tolist() == [[3, 3], [0, 1]]
    huge = evidence.evidence("gradients", "x", np.full((2, 2), 1e300), np.ones((2, 2)))
    assert np.isfinite(huge.error).all()


def pair(ids, classes):
    return np.array(ids), classes


def test_results_differ_in_pixels_and_classes_but_not_in_names():
    image = np.zeros((2, 3, 3), np.uint8)
    config = MaskFormerConfig(name="mini", num_classes=3)
    expected = pair([[1, 1, 2], [1, 1, 2]], {1: 0, 2: 1})

    def differing(actual):
        seen = evidence.overlay("0/panoptic_seg", image, expected, actual, config)
        assert seen.share == seen.differing.mean()
        return seen.differing.astype(int).tolist()

    assert differing(expected) == [[0, 0, 0], [0, 0, 0]]
    assert differing(pair([[5, 5, 3], [5, 5, 3]], {5: 0, 3: 1})) == [[0, 0, 0], [0, 0, 0]]
    assert differing(pair([[1, 1, 2], [1, 1, 2]], {1: 0, 2: 2})) == [[0, 0, 1], [0, 0, 1]]
    assert differing(pair([[1, 1, 2], [1, 2, 2]], {1: 0, 2: 1})) == [[0, 0, 0], [0, 1, 0]]
    assert differing(pair([[0, 0, 0], [0, 0, 0]], {})) == [[1, 1, 1], [1, 1, 1]]


def test_large_photographs_are_made_small_and_a_single_pixel_stays():
    ids = np.ones((1000, 1400), np.int32)
    actual = ids.copy()
    actual[777, 1399] = 2
    config = MaskFormerConfig(name="mini", num_classes=3)
    seen = evidence.overlay("0/sem_seg", np.zeros((*ids.shape, 3), np.uint8), (ids, {1: 1}), (actual, {1: 1, 2: 2}), config)
    assert max(seen.image.shape) <= evidence.SHOWN_PX
    assert seen.differing.shape == seen.image.shape[:2] == seen.expected.shape
    assert seen.differing.sum() == 1
    assert seen.share == 1 / ids.size


def test_the_first_failures_are_kept_and_what_cannot_be_shown_is_passed_over(tmp_path):
    names = [f"backbone.res2.{block}#0" for block in range(6)]
    for dtype in ("float64", "float32"):
        with TraceFileWriter(tmp_path, "a", dtype, runs=["one"], samples=None, facts={"key": "same"}) as writer:
            for name in names:
                writer.add("taps", name, np.zeros((1, 2, 3, 4), dtype))
            writer.add("matcher", "final/0/assignment", np.zeros(2, np.int64))
    actual = {name: np.ones((1, 3, 4, 2)) for name in names}
    actual[names[1]] = np.ones((1, 3, 3, 2))  # another shape
    results = types.SimpleNamespace(groups={"taps": actual, "matcher": {"final/0/assignment": np.ones(2)}}, view=None)
    results.names = tap_rules.names(MaskFormerConfig(name="mini", num_classes=3))
    results.official = lambda group, name: results.groups[group][name].transpose(0, 3, 1, 2) if group == "taps" else np.ones(2)
    failures = [
        Item("taps", "nowhere#0", False),
        Item("matcher", "final/0/assignment", False),
        *(Item("taps", name, False) for name in names),
    ]
    with Case(tmp_path, "a") as case:
        found = list(evidence.of_failures(case, results, failures))
    assert [each.name for each in found] == [names[0], names[2], names[3]]
    assert all(each.axes == ("row", "column") and each.error.shape == (3, 4) for each in found)
