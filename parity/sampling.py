"""Numbers that look random and are the same on every platform and with every version of every library: hashes, exact integers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np


def hashed_numbers(key: str, count: int) -> np.ndarray:
    """uint64 [count], evenly distributed: splitmix64 (Steele, Lea, Flood 2014) started at a hash of ``key``."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    state = np.uint64(seed) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample_indices(name: str, shape: Sequence[int], count: int) -> np.ndarray:
    """Which elements of tensor ``name`` a sampled trace stores.

    One element from each of ``count`` equal stretches of the flattened tensor, the first and the last element among them, so
    every image, channel and region has its share.

    Args:
        name: the record's name.
        shape: the tensor's shape in the official layout.
        count: number of elements, 2 or more.

    Returns:
        int64 [min(count, elements)], row-major flat indices, ascending.
    """
    size = math.prod(shape)
    if size <= count:
        return np.arange(size, dtype=np.int64)
    edges = np.arange(count + 1, dtype=np.int64) * size // count
    numbers = hashed_numbers(f"{name}{list(map(int, shape))}", count)
    indices = edges[:-1] + (numbers % np.diff(edges).astype(np.uint64)).astype(np.int64)
    indices[0], indices[-1] = 0, size - 1
    return indices
