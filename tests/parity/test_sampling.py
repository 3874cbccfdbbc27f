"""Sampled elements: the same for ever, and spread over the whole tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parity.sampling import sample_indices


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
