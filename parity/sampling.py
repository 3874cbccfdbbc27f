"""Numbers that look random and are the same on every platform and with every version of every library: hashes, exact integers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

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


def sketch(name: str, tensor: np.ndarray, count: int) -> np.ndarray:
    """``count`` numbers that stand for every element of a tensor: a count sketch (Charikar, Chen, Farach-Colton 2002).

    Every element is added to one of ``count`` sums with a sign that depends on the tensor's name and the element's place alone. Sketching
    is linear and keeps lengths: for two tensors a and b, ``‖sketch(a) − sketch(b)‖`` estimates ``‖a − b‖`` without bias in the square,
    with a relative standard deviation of 1 / √(2 · count), and no element can change without being seen.

    Args:
        name: the record's name.
        tensor: any shape; elements that are not finite count as 0.
        count: number of sums.

    Returns:
        float64 [count].
    """
    drawn = Sketch(name, tensor.shape, count)
    for start, values in blocks(tensor, drawn.multiple):
        drawn.add(start, values)
    return drawn.sums


class Sketch:
    """A sketch while it is drawn; arguments as of :func:`sketch`.

    Attributes:
        sums: of all blocks so far.
        multiple: of which every block's start is one.
    """

    def __init__(self, name: str, shape: Sequence[int], count: int):
        self.sums = np.zeros(count)
        self.multiple = 64 * count
        words = hashed_numbers(f"{name}{list(shape)} signs", -(-math.prod(shape) // 64))
        self._bits = words.astype("<u8").view(np.uint8)

    def add(self, start: int, values: np.ndarray) -> None:
        """Adds the elements from ``start`` on, float64, which are something else afterwards."""
        bits = self._bits[start // 8 : -(-(start + values.size) // 8)]
        sign_bits = values.view(np.uint64)
        sign_bits ^= np.unpackbits(bits, count=values.size).astype(np.uint64) << np.uint64(63)
        count = self.sums.size
        with np.errstate(invalid="ignore"):
            of_block = _dealt(values, count)
        if not np.isfinite(of_block).all():
            of_block = _dealt(np.where(np.isfinite(values), values, 0), count)
        self.sums += of_block


def _dealt(values: np.ndarray, count: int) -> np.ndarray:
    """Sums of every ``count``-th element, from each of the first ``count`` on; taken in long rows, which is faster."""
    row = count * max(_ROW // count, 1)
    whole = values.size // row * row
    sums = values[:whole].reshape(-1, row).sum(0)
    sums[: values.size - whole] += values[whole:]
    return sums.reshape(-1, count).sum(0)


def blocks(tensor: np.ndarray, multiple: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """(start, float64 copy) of one stretch of a tensor's elements after the other, small enough to stay in a processor's cache.

    Args:
        tensor: any shape and dtype; its elements are taken row-major.
        multiple: every start is a multiple of this.
    """
    flat = np.asarray(tensor).ravel()
    length = max(_BLOCK // multiple, 1) * multiple
    for start in range(0, flat.size, length):
        yield start, flat[start : start + length].astype(np.float64)


def square(values: np.ndarray) -> float:
    """The sum of the squares of a stretch, float64. BLAS would take threads for that, which get in one another's way and in ours."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.einsum("i,i->", values, values))


def contiguous(array: np.ndarray) -> np.ndarray:
    """The same in row-major order."""
    if array.flags.c_contiguous:
        return array
    copy = np.empty(array.shape, array.dtype)
    write(array, copy)
    return copy


def write(array: np.ndarray, target: np.ndarray) -> None:
    """``target[...] = array`` for a row-major target and an array whose axes lie in another order in memory (channels last).

    Runs of the target are columns of the array: they are written a few elements at a time, so that what is read stays in a processor's
    cache until all of it is used. That is up to 8 times as fast.
    """
    strides = {axis: abs(array.strides[axis]) for axis in range(array.ndim) if array.shape[axis] > 1}
    axis = min(strides, key=strides.__getitem__, default=0) + 1  # the first one behind that which is dense in memory
    if axis >= array.ndim:
        target[...] = array
        return
    before = (slice(None),) * axis
    step = max(_RUN // math.prod(array.shape[axis + 1 :]), 1)
    for start in range(0, array.shape[axis], step):
        piece = (*before, slice(start, start + step))
        target[piece] = array[piece]


_BLOCK = 1 << 18  # threads that take much smaller ones spend their time with waiting for one another
_RUN = 32
_ROW = 1 << 10
