"""The assignment against SciPy, on cost: with ties several matchings are right."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import linear_sum_assignment

from tfmaskformer.assignment import linear_assignment

RUN = {
    "eager": linear_assignment,
    "graph": tf.function(linear_assignment),
    "xla": tf.function(linear_assignment, jit_compile=True),
}


def solve(cost, num_objects, mode="xla"):
    queries, valid = RUN[mode](tf.constant(cost), tf.constant(num_objects, tf.int32))
    assert queries.dtype == tf.int32
    return queries.numpy(), valid.numpy()


def check(cost, num_objects, queries, valid):
    """Every problem: solved at SciPy's cost, or not valid exactly where SciPy raises."""
    for problem, (matrix, n, found, is_valid) in enumerate(zip(cost, num_objects, queries, valid, strict=True)):
        matrix = matrix[:, :n].astype(np.float64)
        try:
            rows, columns = linear_sum_assignment(matrix)
        except ValueError:
            assert not is_valid, problem
            assert (found == -1).all(), problem
            continue
        assert is_valid, problem
        assert (found[n:] == -1).all(), problem
        objects = np.flatnonzero(found >= 0)
        assert len(objects) == len(set(found[objects])) == min(matrix.shape), problem
        actual, expected = matrix[found[objects], objects].sum(), matrix[rows, columns].sum()
        scale = np.abs(matrix[np.isfinite(matrix)]).max(initial=0)
        assert actual - expected <= 4 * len(objects) * np.finfo(cost.dtype).eps * scale, (problem, actual, expected)


def problems(kind, count, num_queries, max_objects, dtype, seed=0):
    """Random cost matrices [count, num_queries, max_objects] and numbers of objects, every number from 0 on."""
    rng = np.random.default_rng([seed, num_queries, max_objects])
    shape = (count, num_queries, max_objects)
    cost = rng.normal(size=shape)
    if kind == "ties":
        cost = rng.integers(-2, 3, shape)
    elif kind == "constant":
        cost = np.ones(shape)
    elif kind == "duplicated objects":
        cost = cost[:, :, rng.integers(0, max(max_objects // 2, 1), max_objects)] if max_objects else cost
    elif kind == "huge":
        cost = cost * np.sqrt(np.finfo(dtype).max)
    elif kind == "tiny":
        cost = cost * np.sqrt(np.finfo(dtype).tiny)
    elif kind == "near-ties on an offset":
        cost = 1000 + np.round(cost, 1) + 1e-4 * rng.normal(size=shape)
    elif kind == "good and bad queries":  # like a network's: some queries suit every object, so that paths grow long
        cost = 3 * rng.random((count, num_queries, 1)) + rng.random((count, 1, max_objects)) + 0.2 * cost
    elif kind == "forbidden pairs":
        cost = np.where(rng.random(shape) < rng.random((count, 1, 1)), np.inf, cost)
    elif kind == "not finite":
        cost = np.where(rng.random(shape) < 0.1 / max(max_objects, 1), rng.choice([np.nan, -np.inf, np.inf], shape), cost)
    return cost.astype(dtype), np.arange(count) % (max_objects + 1)


KINDS = [
    "normal",
    "ties",
    "constant",
    "duplicated objects",
    "huge",
    "tiny",
    "near-ties on an offset",
    "good and bad queries",
    "forbidden pairs",
    "not finite",
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("num_queries", "max_objects"), [(1, 1), (7, 7), (3, 8), (20, 12)])
def test_costs_what_scipy_pays(num_queries, max_objects, dtype):
    cases = [problems(kind, 40, num_queries, max_objects, dtype, seed) for seed, kind in enumerate(KINDS)]
    cost, num_objects = (np.concatenate(part) for part in zip(*cases, strict=True))
    queries, valid = solve(cost, num_objects)
    check(cost, num_objects, queries, valid)
    assert 0.5 < valid.mean() < 1  # both outcomes were put to the test


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_modes_agree(mode):
    for num_queries, max_objects in ((5, 3), (3, 5)):
        cases = [problems(kind, 6, num_queries, max_objects, "float32") for kind in KINDS[6:]]
        cost, num_objects = (np.concatenate(part) for part in zip(*cases, strict=True))
        for actual, expected in zip(solve(cost, num_objects, mode), solve(cost, num_objects), strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("mode", RUN)
@pytest.mark.parametrize(("num_queries", "max_objects"), [(1, 0), (4, 0), (0, 0), (0, 3)])
def test_nothing_to_match(num_queries, max_objects, mode):
    queries, valid = solve(np.zeros((3, num_queries, max_objects), np.float32), [0, max_objects, 0], mode)
    np.testing.assert_array_equal(queries, np.full((3, max_objects), -1))
    assert valid.all()


@pytest.mark.parametrize("mode", RUN)
def test_no_problems(mode):
    queries, valid = solve(np.zeros((0, 4, 3), np.float32), np.zeros(0), mode)
    assert queries.shape == (0, 3)
    assert valid.shape == (0,)


@pytest.mark.parametrize("size", [(100, 100), (40, 60)])
def test_the_longest_searches_end_within_the_bound(size):
    """Costs (i + 1) · (j + 1): every search scans all columns before (Machol & Wien 1976)."""
    row, column = np.ogrid[1 : size[0] + 1, 1 : size[1] + 1]
    cost = np.stack([row * column, -row * column, np.random.default_rng(0).normal(size=size)]).astype(np.float32)
    num_objects = np.full(3, size[1])
    check(cost, num_objects, *solve(cost, num_objects))


def test_a_bad_problem_leaves_the_others_alone():
    cost, num_objects = problems("good and bad queries", 8, 9, 6, "float32")
    num_objects = np.array([6, 6, 5, 6, 6, 6, 4, 6])
    expected, _ = solve(cost, num_objects)
    for problem, value in ((1, np.nan), (3, -np.inf), (4, np.inf)):
        cost[problem, :, 2] = value
    queries, valid = solve(cost, num_objects)
    np.testing.assert_array_equal(valid, [1, 0, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(queries[~valid], -1)
    np.testing.assert_array_equal(queries[valid], expected[valid])


def test_one_bad_cost_is_enough_even_if_the_matching_would_avoid_it():
    cost = np.array([[[np.nan, 0], [0, 1]], [[np.inf, 0], [0, 1]]], np.float32)
    queries, valid = solve(cost, [2, 2])
    np.testing.assert_array_equal(valid, [False, True])
    np.testing.assert_array_equal(queries, [[-1, -1], [1, 0]])


def test_padding_is_never_looked_at():
    cost, _ = problems("normal", 4, 6, 5, "float32")
    num_objects = np.array([3, 3, 3, 3])
    expected, _ = solve(cost, num_objects)
    cost[:, :, 3:] = np.array([np.nan, np.inf, -np.inf, -1e30]).reshape(4, 1, 1)
    queries, valid = solve(cost, num_objects)
    np.testing.assert_array_equal(queries, expected)
    assert valid.all()


def test_leading_dimensions():
    cost, num_objects = problems("normal", 6, 5, 3, "float32")
    expected, _ = solve(cost, num_objects)
    queries, valid = solve(cost.reshape(2, 3, 5, 3), num_objects.reshape(2, 3))
    np.testing.assert_array_equal(queries, expected.reshape(2, 3, 3))
    assert valid.shape == (2, 3)


def test_a_single_problem_without_batch():
    queries, valid = solve(np.array([[3.0, 1.0], [1.0, 2.0], [0.0, 0.5]]), 2, "eager")
    np.testing.assert_array_equal(queries, [2, 0])
    assert valid.shape == ()


def test_batch_may_be_unknown_but_not_the_sizes():
    signature = [tf.TensorSpec([None, 5, 3]), tf.TensorSpec([None], tf.int32)]
    run = tf.function(linear_assignment, input_signature=signature)
    cost, num_objects = problems("normal", 6, 5, 3, "float32")
    np.testing.assert_array_equal(run(cost, num_objects.astype(np.int32)).queries, solve(cost, num_objects)[0])
    with pytest.raises(ValueError, match=r"static.*num_queries"):
        tf.function(linear_assignment).get_concrete_function(tf.TensorSpec([2, 5, None]), tf.TensorSpec([2], tf.int32))
