"""Sampled elements: the same for ever, and spread over the whole tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parity.sampling import contiguous, sample_indices, sketch


def test_sample_indices_never_change():
    """Committed traces hold these elements: a change here makes them unreadable, so it needs a new trace version."""
    assert sample_indices("backbone#0[res2]", (2, 3, 50, 70), 8).tolist() == [0, 3520, 6500, 10280, 11855, 13446, 16332, 20999]
    assert sample_indices("backbone#0[res3]", (2, 3, 50, 70), 8).tolist() != sample_indices("backbone#0[res2]", (2, 3, 50, 70), 8).tolist()
    assert sample_indices("backbone#0[res2]", (2, 3, 70, 50), 8).tolist() != sample_indices("backbone#0[res2]", (2, 3, 50, 70), 8).tolist()


@pytest.mark.parametrize("shape", [(), (0, 4), (1,), (7,), (8,), (9,), (3, 5, 7), (1, 256, 80, 112)])
def test_sample_indices_are_spread_distinct_and_include_both_corners(shape):
    size = math.prod(shape)
    indices = sample_indices("x", shape, 8)
    assert (indices.shape, indices.dtype) == ((min(size, 8),), np.int64)
    assert (np.diff(indices) > 0).all()
    if size:
        assert (indices[0], indices[-1]) == (0, size - 1)
    assert all(np.searchsorted(indices, size * i // 8) == i for i in range(1, 8) if size > 8)  # one in each stretch


SKETCHED = [-277.0, 186.0, 284.0, 1008.0]


def test_sketches_never_change():
    tensor = np.arange(1, 131, dtype=np.float64).reshape(2, 65)
    assert sketch("backbone#0[res2]", tensor, 4).tolist() == SKETCHED
    assert sketch("backbone#0[res3]", tensor, 4).tolist() != SKETCHED


def test_sketches_estimate_the_difference_of_whole_tensors():
    """Also of errors that sit in a few elements, which samples would miss: the estimate has a standard deviation of 1 / √(2 · 256)."""
    random = np.random.default_rng(0)
    estimates = []
    for trial in range(200):
        expected = random.standard_normal((3, 41, 57))
        error = random.standard_normal(expected.shape) * (random.random(expected.shape) < 10.0 ** -random.integers(0, 4))
        found = np.linalg.norm(sketch(f"t{trial}", expected + 1e-7 * error, 256) - sketch(f"t{trial}", expected, 256))
        estimates.append(found / (1e-7 * np.linalg.norm(error)))
    assert np.sqrt(np.mean(np.square(estimates))) == pytest.approx(1, abs=0.01)
    assert np.std(estimates) < 1.2 / math.sqrt(2 * 256)


def test_no_element_can_change_unseen():
    tensor = np.random.default_rng(0).standard_normal((5, 7, 11))
    before = sketch("x", tensor, 16)
    for index in range(tensor.size):
        changed = tensor.copy()
        changed.flat[index] += 1.0
        assert np.abs(sketch("x", changed, 16) - before).max() == pytest.approx(1.0)


def test_elements_that_are_not_finite_count_as_zero():
    tensor = np.random.default_rng(0).standard_normal((4, 9))
    holes = tensor.copy()
    tensor[1, 2], tensor[3, 3] = 0, 0
    holes[1, 2], holes[3, 3] = np.nan, -np.inf
    np.testing.assert_array_equal(sketch("x", holes, 8), sketch("x", tensor, 8))


@pytest.mark.parametrize(
    ("shape", "order"),
    [((), ()), ((7,), (0,)), ((0, 3), (1, 0)), ((70, 45), (1, 0)), ((1, 1, 40, 50), (3, 2, 0, 1)), ((3, 3, 37, 50), (3, 2, 0, 1))]
    + [((2, 33, 41, 5), (0, 3, 1, 2)), ((1, 5, 1, 3), (3, 0, 2, 1)), ((3, 4, 5), (1, 2, 0)), ((2, 3, 4, 5), (3, 2, 1, 0))],
)
def test_contiguous_copies_are_equal(shape, order):
    array = np.random.default_rng(0).standard_normal(shape).transpose(order)
    for view in (array, array[::-1, ..., ::2]) if array.ndim > 1 else (array,):
        copy = contiguous(view)
        assert copy.flags.c_contiguous
        np.testing.assert_array_equal(copy, view)
