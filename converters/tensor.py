"""Tensors that are read when they are needed: shape and dtype are known at once, the elements come with ``np.asarray``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from converters.transforms import Shape, Transform

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class LazyTensor:
    """A tensor whose elements ``read`` gets, anew each time.

    >>> lazy = LazyTensor((2, 3), np.dtype("float32"), lambda: np.ones((2, 3), np.float32))
    >>> lazy.nbytes, float(np.sum(lazy))
    (24, 6.0)
    """

    def __init__(self, shape: Shape, dtype: np.dtype, read: Callable[[], np.ndarray]):
        self.shape = tuple(shape)
        self.dtype = dtype
        self._read = read

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._read(), dtype)


Tensor = np.ndarray | LazyTensor
"""What every reader gives and every writer takes."""


def inverted(variable: Tensor, transform: Transform) -> Tensor:
    """A variable in TensorFlow's layout → the tensor in PyTorch's layout."""
    if transform.permutation is None or not transform.fits(variable.shape):
        return variable
    shape = tuple(variable.shape[axis] for axis in np.argsort(transform.permutation))
    return LazyTensor(shape, variable.dtype, lambda: transform.invert(np.asarray(variable)))


def cast(tensor: Tensor, dtype: np.dtype) -> Tensor:
    """The tensor in another type; itself where that is the one it has. Values beyond the type's range become infinite."""
    if tensor.dtype == dtype:
        return tensor
    return LazyTensor(tensor.shape, dtype, lambda: rounded(np.asarray(tensor), dtype))


def rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in another type, as :func:`cast` makes it."""
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def is_exact(source: np.dtype, target: np.dtype) -> bool:
    """Whether every value of one floating type is one of another.

    >>> is_exact(np.dtype("float16"), np.dtype("float32")), is_exact(np.dtype("float32"), np.dtype("float16"))
    (True, False)
    >>> is_exact(BFLOAT16, np.dtype("float32")), is_exact(BFLOAT16, np.dtype("float16"))
    (True, False)
    """
    if source == target:
        return True
    if not (is_float(source) and is_float(target)):
        return False
    have, want = ml_dtypes.finfo(source), ml_dtypes.finfo(target)
    return bool(have.nmant <= want.nmant and have.maxexp <= want.maxexp and have.minexp >= want.minexp)


def is_float(dtype: np.dtype) -> bool:
    """Whether it is a floating type, bfloat16 included."""
    return dtype.kind == "f" or dtype == BFLOAT16


def little_endian(tensor: Tensor) -> memoryview:
    """The bytes of ``tensor``, row by row, least significant first; made here, and freed with the view."""
    array = np.asarray(tensor)
    if (array.shape, array.dtype) != (tuple(tensor.shape), tensor.dtype):
        raise ValueError(f"expected {tensor.dtype} {tuple(tensor.shape)} as announced, got {array.dtype} {array.shape}")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


def sha256_of(array: np.ndarray) -> str:
    """Of the elements in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
