"""Fixed shapes for images of all sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

MOST_CANVASES = 4
"""Each is one compilation; more of them pad less."""

_MOST_KINDS = 256
"""Of sizes, among which canvases are chosen."""


class Canvas(NamedTuple):
    """Room for images as the model takes them, and for their results at the original size, px."""

    height: int
    width: int
    output_height: int
    output_width: int

    @property
    def pixels(self) -> int:
        """Of both, what a batch costs."""
        return self.height * self.width + self.output_height * self.output_width

    def holds(self, sizes: Sequence[int]) -> bool:
        """Whether an image with these four sizes fits."""
        return all(size <= room for size, room in zip(sizes, self, strict=True))


def choose_canvases(sizes: Iterable[Sequence[int]], most: int = MOST_CANVASES) -> list[Canvas]:
    """At most ``most`` canvases that hold all images, with little padding: the two whose union wastes least become one, again and again.

    Args:
        sizes: of each image the four sizes of a :class:`Canvas`, px.
        most: at least 1.

    Returns:
        the smallest first.

    >>> choose_canvases([(80, 100, 80, 100), (100, 80, 100, 80), (78, 99, 78, 99)], most=2)
    [Canvas(height=80, width=100, output_height=80, output_width=100), Canvas(height=100, width=80, output_height=100, output_width=80)]
    """
    images = np.array([tuple(size) for size in sizes], np.int64).reshape(-1, 4)
    grain = 32
    while len(np.unique(images // grain, axis=0)) > _MOST_KINDS:
        grain *= 2
    _, group, counts = np.unique(images // grain, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    boxes = np.array([images[group == index].max(0) for index in range(len(counts))]).reshape(-1, 4)

    def pixels(boxes):
        return boxes[..., 0] * boxes[..., 1] + boxes[..., 2] * boxes[..., 3]

    while len(boxes) > most:
        unions = np.maximum(boxes[:, np.newaxis], boxes)
        own = pixels(boxes) * counts
        waste = (pixels(unions) * (counts[:, np.newaxis] + counts) - own[:, np.newaxis] - own).astype(float)
        np.fill_diagonal(waste, np.inf)
        first, second = np.unravel_index(waste.argmin(), waste.shape)
        boxes[first] = unions[first, second]
        counts[first] += counts[second]
        boxes, counts = np.delete(boxes, second, 0), np.delete(counts, second)
    return sorted((Canvas(*box) for box in boxes.tolist()), key=lambda canvas: (canvas.pixels, canvas))
