"""The law: what passes, what fails, and what is told of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parity import compare
from parity.compare import Whole, compare_assignment
from parity.trace import statistics


@pytest.fixture
def expected():
    return np.random.default_rng(0).standard_normal((2, 3, 5, 7))


def test_equal_tensors_pass_at_any_tolerance(expected):
    result = compare.compare(expected.copy(), expected, 0.0)
    assert result.passed
    assert (result.error, result.max_difference, result.mismatched, result.passing_tolerance) == (0, 0, 0, 0)
    assert (result.elements, result.compared, result.fault) == (210, 210, None)


def test_every_statistic_of_one_changed_element(expected):
    actual = expected.copy()
    actual[1, 2, 3, 4] += 0.5
    result = compare.compare(actual, expected, 1e-3)
    assert not result.passed
    assert result.fault is None
    assert result.error == pytest.approx(0.5 / np.linalg.norm(expected), rel=1e-12)
    assert result.max_difference == pytest.approx(0.5)
    assert result.max_index == (1, 2, 3, 4)
    assert (result.actual_at_max, result.expected_at_max) == (actual[1, 2, 3, 4], expected[1, 2, 3, 4])
    assert result.mismatched == pytest.approx(1 / 210)
    assert compare.compare(actual, expected, result.error * (1 + 1e-12)).passed
    assert compare.compare(actual, expected, result.passing_tolerance * (1 + 1e-12)).mismatched == 0
    assert compare.compare(actual, expected, result.passing_tolerance * (1 - 1e-6)).mismatched > 0


@pytest.mark.parametrize("size", [(1 << 16) - 1, 1 << 16, 3 * (1 << 16) + 5])
def test_large_tensors_are_taken_stretch_by_stretch(size):
    random = np.random.default_rng(size)
    expected = random.standard_normal((1, size))
    actual = expected + 1e-6 * random.standard_normal((1, size))
    actual[0, -2] += 1
    result = compare.compare(actual, expected, 1e-5)
    difference = np.abs(actual - expected)
    needed = difference / (np.abs(expected) + np.sqrt(np.mean(expected**2)))
    assert result.error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(expected), rel=1e-12)
    assert (result.max_index, result.actual_at_max, result.expected_at_max) == ((0, size - 2), actual[0, -2], expected[0, -2])
    assert result.max_difference == difference.max()
    assert result.passing_tolerance == pytest.approx(needed.max(), rel=1e-12)
    assert result.mismatched == np.count_nonzero(difference > 1e-5 * difference / needed) / size


def test_error_is_accumulated_in_float64():
    expected = np.full(1 << 20, 1.0)
    actual = np.float32(expected) + np.float32(1e-6)
    assert compare.compare(actual, expected, 1.0).error == pytest.approx(float(np.float32(1) + np.float32(1e-6)) - 1, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x[:, :2], r"shape \(2, 2, 5, 7\), expected \(2, 3, 5, 7\)"),
        (lambda x: x.transpose(0, 1, 3, 2), r"shape \(2, 3, 7, 5\)"),
        (lambda x: np.where(np.arange(7) == 3, np.nan, x), r"NaN at 30 elements, expected at 0; first difference at \(0, 0, 0, 3\)"),
        (lambda x: np.where(x > 2, np.inf, x), r"\+inf at"),
        (lambda x: np.where(x < -2, -np.inf, x), r"-inf at"),
        (lambda x: x.astype(np.float32), r"dtype float32, expected float64"),
        (lambda x: (x * 0).astype(np.int32), r"dtype int32"),
    ],
)
def test_faults_fail_whatever_the_tolerance(expected, change, told):
    result = compare.compare(change(expected), expected, math.inf, dtype="float64")
    assert not result.passed
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(result.fault)


def test_nan_and_inf_in_the_same_places_are_no_difference(expected):
    expected[0, 0, 0] = [np.nan, np.inf, -np.inf, 1, 2, 3, 4]
    assert compare.compare(expected.copy(), expected, 0.0).passed
    swapped = expected.copy()
    swapped[0, 0, 0, 1:3] = [-np.inf, np.inf]
    assert not compare.compare(swapped, expected, math.inf).passed


def test_a_tolerance_that_is_not_a_number_passes_nothing(expected):
    assert not compare.compare(expected, expected, math.nan).passed


def test_zero_reference():
    zero = np.zeros((3, 4))
    assert compare.compare(zero.copy(), zero, 0.0).passed
    assert compare.compare(zero + 1e-30, zero, 1e9).error == math.inf
    assert not compare.compare(zero + 1e-30, zero, 1e9).passed
    rounding = compare.compare(zero + 1e-9, zero, 1.5, zero_scale=float(np.linalg.norm(zero + 1e-9)))
    assert rounding.error == pytest.approx(1)
    assert rounding.passed


def test_scale_replaces_the_norm(expected):
    result = compare.compare(expected + 1e-3, expected, 1.0, scale=2.0)
    assert result.error == pytest.approx(1e-3 * math.sqrt(expected.size) / 2)


def test_empty_tensors_are_compared_by_shape():
    assert compare.compare(np.zeros((0, 3)), np.zeros((0, 3)), 0.0).passed
    assert not compare.compare(np.zeros((0, 4)), np.zeros((0, 3)), math.inf).passed


def whole_of(actual, expected, difference=0.0):
    return Whole(statistics(actual), statistics(expected), expected.shape, difference)


def test_a_sampled_tensor_is_judged_by_its_sketch(expected):
    sample = np.array([0, 50, 209])
    part = expected.flat[sample]
    whole = whole_of(expected, expected, 1e-4 * np.linalg.norm(expected))
    result = compare.compare(part, part, 2e-4, whole=whole)
    assert result.error == pytest.approx(1e-4)
    assert result.passed
    assert not compare.compare(part, part, 0.5e-4, whole=whole).passed
    assert compare.compare(part, part, 1.0, whole=whole_of(expected, expected, 3.0), scale=2.0).error == pytest.approx(1.5)


def test_a_fault_between_the_samples_shows_in_the_statistics(expected):
    sample = np.array([0, 50, 209])
    for change in (lambda x: x * (1 + 1e-3), lambda x: x + 1e-2):
        actual = change(expected)
        actual.flat[sample] = expected.flat[sample]
        whole = whole_of(actual, expected)
        result = compare.compare(actual.flat[sample], expected.flat[sample], 1e-5, whole=whole)
        assert result.error == 0
        assert not result.passed
        assert "by its statistics" in result.fault
        true_error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert 0 < result.error_bound <= true_error * (1 + 1e-9)  # a bound, so it never raises a false alarm
        assert compare.compare(actual.flat[sample], expected.flat[sample], true_error, whole=whole).passed


def test_the_bound_never_exceeds_the_error():
    random = np.random.default_rng(1)
    for scale in (1e-12, 1e-6, 1e-2, 1.0):
        for shift in (0.0, 1.0, 100.0):
            expected = random.standard_normal(1000) + shift
            actual = expected + scale * random.standard_normal(1000)
            result = compare.compare(actual[:2], expected[:2], math.inf, whole=whole_of(actual, expected))
            assert result.error_bound <= np.linalg.norm(actual - expected) / np.linalg.norm(expected) * (1 + 1e-3)


def test_tolerances_come_from_floors():
    assert compare.tolerance("float32", 2e-6) == pytest.approx(1.5 * 2e-6 + 3e-7)
    assert compare.tolerance("float64", 1e-14) == 1e-9
    assert compare.tolerance("float64", 0.5) == 8  # a tensor that is nothing but rounding
    assert compare.result_tolerance("float32", 1e-7) == 2e-6
    assert compare.result_tolerance("float32", 1e-5) == pytest.approx(3e-5)
    assert compare.result_tolerance("float64", 1e-14) == 1e-9
    assert compare.gradient_tolerance("float64", 1e-14) == 1e-9
    assert compare.gradient_tolerance("float32", 1e-3) == math.inf
    assert math.isnan(compare.tolerance("float32", math.nan))  # a floor that was not measured passes nothing


COST = np.array([[1.0, 5.0], [2.0, 1.0], [1.0, 3.0], [1.0 + 5e-5, 9.0]])


@pytest.mark.parametrize(
    ("actual", "gap", "dtype", "label"),
    [
        ([0, 1], 0.0, "float64", "same"),
        ([2, 1], 0.0, "float64", "tie"),
        ([3, 1], 5e-5, "float32", "near-tie"),
        ([3, 1], 5e-5, "float64", "different"),
        ([3, 1], 2e-4, "float32", "different"),  # the gap exceeds the noise of 1e-4
        ([1, 0], 5e-5, "float32", "different"),  # costs far more than noise explains
        ([0, 0], 0.0, "float32", "different"),  # one query twice
        ([-1, 1], 0.0, "float32", "different"),  # an object left out
        ([0, 4], 0.0, "float32", "different"),  # no such query
        ([0], 0.0, "float32", "different"),
    ],
)
def test_ties_and_near_ties_are_told_from_bugs(actual, gap, dtype, label):
    result = compare_assignment(np.array(actual), np.array([0, 1]), COST, gap=gap, cost_noise=1e-4, dtype=dtype)
    assert result.label == label
    assert result.passed == (label != "different")


def test_no_objects_are_assigned_alike():
    nothing = np.zeros(0, np.int64)
    assert compare_assignment(nothing, nothing, np.zeros((4, 0)), gap=math.inf, cost_noise=0.0, dtype="float32").label == "same"


def test_the_factor_of_results_has_the_origin_that_is_told():
    """Of four official runs one has up to 1.9 × the largest error of the other three, so 1.5 × would fail the official code."""
    from checkpoints import registry
    from parity import prove
    from parity.judge import _term
    from parity.trace import Trace

    worst = {"losses": 0.0, "inference": 0.0}
    for entry in registry.entries():
        errors: dict[tuple[str, str], list[tuple[float, ...]]] = {}
        for case in Trace(prove.TRACES / entry.name):
            for name, record in case.baseline.group("losses").items():
                errors.setdefault(("losses", _term(name)), []).append(record.floor)
            for name, record in case.baseline.group("inference").items():
                if name.endswith("sem_seg"):
                    errors["inference", f"{case.name}/{name}"] = [record.floor]
        for (group, _), floors in errors.items():
            largest = np.max(floors, axis=0)
            if largest.max() > compare.RESULT_RESOLUTION:  # smaller ones are judged by that
                worst[group] = max(worst[group], *(largest[run] / np.delete(largest, run).max() for run in range(4)))
    assert {group: round(ratio, 1) for group, ratio in worst.items()} == {"losses": 1.9, "inference": 1.9}
    assert min(worst.values()) > compare.FLOOR_FACTOR
    assert max(worst.values()) * compare.FLOOR_FACTOR < compare.RESULT_FACTOR


def test_the_median_of_one_case_is_a_draw_as_is_told():
    """Held to the largest error of the other three, an official run has a median above 1.1 in 48 of the 64 cases, and up to 1.41."""
    from checkpoints import registry
    from parity import prove
    from parity.trace import Trace

    worst = []
    for entry in registry.entries():
        for case in Trace(prove.TRACES / entry.name):
            floors = np.array([tap.floor for tap in case.baseline.group("taps").values() if tap.floor])
            floors = floors[np.isfinite(floors).all(1) & (floors.min(1) > 0)]
            worst.append(max(np.median(floors[:, run] / np.delete(floors, run, 1).max(1)) for run in range(4)))
    assert (sum(ratio > compare.MEDIAN_FACTOR for ratio in worst), len(worst)) == (48, 64)
    assert round(max(worst), 2) == 1.41
