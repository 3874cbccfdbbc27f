"""What is missing or malformed in a data set, file by file."""

from __future__ import annotations

import collections
import concurrent.futures
import os
from collections.abc import Callable
from typing import NamedTuple

from tfmaskformer.data.datasets import DataSet, missing_files
from tfmaskformer.data.records import Problem


class Findings(NamedTuple):
    """How many images are listed, all problems in the order of the list, and how many of the images have none."""

    images: int
    sound: int
    problems: list[Problem]

    def counts(self) -> dict[str, int]:
        """Problems of each kind, the most frequent first."""
        return dict(collections.Counter(problem.kind for problem in self.problems).most_common())


def check(dataset: DataSet, *, fast: bool = False, progress: Callable[[int, int], None] = lambda done, images: None) -> Findings:
    """Reads every image and its ground truth; with ``fast`` only asks whether the files are there.

    ``progress`` is called with the number of images that were read and of all.
    """
    images = len(dataset.records)
    if fast:
        missing = missing_files(dataset)
        files = {problem.file for problem in missing}
        sound = sum(files.isdisjoint((record.image, record.panoptic, record.semantic)) for record in dataset.records)
        return Findings(images, sound, [*dataset.problems, *missing])
    problems, sound = list(dataset.problems), 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found_in = pool.map(lambda record: dataset.examine(record)[1], dataset.records)
        for done, found in enumerate(found_in, 1):
            problems += found
            sound += not found
            progress(done, images)
    return Findings(images, sound, problems)
