"""What data sets are listed as, and what is said of bad data."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

VOID = 0
"""The id of pixels without a segment."""

UNREADABLE = "unreadable file"
"""The kind of a problem that may be gone next time, as of a bucket that did not answer."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a file: ``kind`` in a few words, the file and the place in it, what was expected, and what there is."""

    kind: str
    file: str
    expected: str
    got: str

    def __str__(self):
        return f"{self.file}: {self.kind}\n  expected {self.expected}, got {self.got}"


class DataError(ValueError):
    """Data that cannot be used. ``problem`` tells it, ``next_step`` what to do."""

    def __init__(self, problem: Problem, next_step: str = "'tfmaskformer data check' lists all problems"):
        super().__init__(f"{problem}\n  {next_step}")
        self.problem = problem
        self.next_step = next_step

    def __reduce__(self):
        return type(self), (self.problem, self.next_step)


class Segment(NamedTuple):
    """A segment of the ground truth: id in the PNG, contiguous class index, whether it is a crowd, area in px as the JSON has it."""

    id: int
    category_id: int
    iscrowd: bool
    area: int


@dataclasses.dataclass(frozen=True)
class Record:
    """An image and the files of its ground truth.

    Attributes:
        image_id: as in the JSON; of semantic data sets the file's name without its suffix.
        image, panoptic, semantic: paths; None where the data set has no such ground truth.
        height, width: px, as the JSON has them; None where it has none.
        segments: of the panoptic ground truth.
    """

    image_id: int | str
    image: str
    height: int | None = None
    width: int | None = None
    panoptic: str | None = None
    segments: tuple[Segment, ...] = ()
    semantic: str | None = None
