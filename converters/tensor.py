"""What the writers of files take: tensors that may be made only when they are written."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from converters.transforms import Shape


class Tensor(Protocol):
    """An array, or something that tells its shape and dtype before ``np.asarray`` makes the array of it."""

    @property
    def shape(self) -> Shape:
        """Sizes of the dimensions."""

    @property
    def dtype(self) -> np.dtype:
        """Of the elements."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The array."""


def little_endian(tensor: Tensor) -> memoryview:
    """The bytes of ``tensor``, row by row, least significant first; made here, and freed with the view."""
    array = np.asarray(tensor)
    if (array.shape, array.dtype) != (tuple(tensor.shape), tensor.dtype):
        raise ValueError(f"expected {tensor.dtype} {tuple(tensor.shape)} as announced, got {array.dtype} {array.shape}")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
