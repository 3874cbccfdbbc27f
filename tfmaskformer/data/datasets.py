"""Data sets on disk or in a bucket: lists of images with their ground truth, in the official order, and what is wrong with them.

All files are read through ``tf.io.gfile``. Where they lie is in :mod:`tfmaskformer.data.layouts`, categories are in
``checkpoints.registry``. Sources: Detectron2's ``data/datasets/coco_panoptic.py``, ``cityscapes_panoptic.py`` and ``coco.py``
(``load_sem_seg``). Different on purpose: Cityscapes is listed in alphabetical, not in the file system's order, and images and semantic maps
are paired by name also where there are equally many of both.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from checkpoints import registry
from tfmaskformer.data import listing, preprocessing
from tfmaskformer.data.layouts import LAYOUTS, Layout
from tfmaskformer.data.records import UNREADABLE, VOID, DataError, Problem, Record

ON_ERROR = ("stop", "skip")
"""What to do about bad data: stop at the first problem, or leave its image out."""

TRAINABLE = ("empty annotation", "ids not in the JSON")
"""Problems for an evaluation that are none for a training: upstream's dataset mappers take an image without objects as it is, and read of a
panoptic map the segments of the JSON alone."""


class Sample(NamedTuple):
    """An image and its ground truth.

    Attributes:
        record: where they are from.
        image: uint8 [height, width, 3] RGB, upright.
        panoptic_seg: int32 [height, width], the id of each pixel's segment, :data:`VOID` where there is none; None without.
        segments_info: ``{"id", "category_id", "isthing", "iscrowd", "area"}`` of each segment, ``category_id`` contiguous.
        sem_seg: int32 [height, width], contiguous class indices or the data set's ignore label; None without.
    """

    record: Record
    image: np.ndarray
    panoptic_seg: np.ndarray | None
    segments_info: list[dict[str, Any]]
    sem_seg: np.ndarray | None


def identity(records: Iterable[Record]) -> str:
    """What tells a list of images from others: SHA-256 of their ids."""
    return hashlib.sha256(json.dumps([record.image_id for record in records]).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A split of a data set.

    Attributes:
        name: in :data:`~tfmaskformer.data.layouts.LAYOUTS`.
        split: of :attr:`Layout.splits`.
        root: the data set's folder.
        records: in the official order.
        problems: found while listing; what they are about is not in ``records``.
        training: whether it is for training, where what is :data:`TRAINABLE` is no problem.
    """

    name: str
    split: str
    root: str
    records: tuple[Record, ...]
    problems: tuple[Problem, ...] = ()
    training: bool = False

    @property
    def layout(self) -> Layout:
        """Its row in the table."""
        return LAYOUTS[self.name]

    @property
    def info(self) -> registry.DatasetInfo:
        """Its categories."""
        return registry.dataset(self.layout.dataset)

    def load(self, record: Record) -> Sample:
        """The image and its ground truth.

        Raises:
            DataError: the first of :meth:`examine`'s problems.
        """
        sample, problems = self.examine(record)
        if sample is None:
            raise DataError(problems[0])
        return sample

    def examine(self, record: Record) -> tuple[Sample | None, list[Problem]]:
        """The sample, or None and all that is wrong with its files."""
        problems: list[Problem] = []
        image = _attempt(_read_rgb, record.image, problems)
        panoptic_seg = sem_seg = None
        if image is not None and record.height is not None and image.shape[:2] != (record.height, record.width):
            problems.append(Problem("wrong image size", record.image, f"{record.height}×{record.width} as in the JSON", _size(image)))
        if record.panoptic is not None:
            panoptic_seg = _attempt(_read_panoptic, record.panoptic, problems)
            if panoptic_seg is not None:
                problems += _segment_problems(panoptic_seg, record, self.layout.exact_areas)
        if record.semantic is not None:
            sem_seg = _attempt(_read_semantic, record.semantic, problems)
            if sem_seg is not None:
                problems += _label_problems(sem_seg, record.semantic, self.info)
        for file, annotation in ((record.panoptic, panoptic_seg), (record.semantic, sem_seg)):
            if file is not None and annotation is not None and image is not None and annotation.shape != image.shape[:2]:
                problems.append(Problem("annotation size ≠ image size", file, f"{_size(image)} as {record.image}", _size(annotation)))
        if self.training:
            problems = [problem for problem in problems if problem.kind not in TRAINABLE]
        if problems or image is None:
            return None, problems
        return Sample(record, image, panoptic_seg, self.segments_info(record), sem_seg), []

    def segments_info(self, record: Record) -> list[dict[str, Any]]:
        """The record's segments as the official code has them."""
        things = frozenset(self.info.thing_classes)
        return [segment._asdict() | {"isthing": segment.category_id in things} for segment in record.segments]

    def samples(self, on_error: str = "stop", report: Callable[[Problem], None] = lambda problem: None) -> Iterator[Sample]:
        """All samples in order.

        Args:
            on_error: "stop" raises the first problem, "skip" leaves images with problems out.
            report: is told each problem that is skipped, those of the listing first.

        Raises:
            DataError: with "stop", the first problem.
        """
        self.check_listing(on_error, report)
        for record in self.records:
            sample, problems = self.examine(record)
            if sample is not None:
                yield sample
            elif on_error == "stop":
                raise DataError(problems[0])
            for problem in problems:
                report(problem)

    def check_listing(self, on_error: str, report: Callable[[Problem], None] = lambda problem: None) -> None:
        """Raises the first problem of the listing, or with ``on_error`` "skip" tells ``report`` all of them."""
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error is {on_error!r}, expected one of {ON_ERROR}")
        if on_error == "stop" and self.problems:
            raise DataError(self.problems[0])
        for problem in self.problems:
            report(problem)


def open_dataset(name: str, data: str | os.PathLike[str], split: str | None = None, *, training: bool = False) -> DataSet:
    """Lists a split of a data set; reads no image.

    Args:
        name: in :data:`~tfmaskformer.data.layouts.LAYOUTS`, e.g. "coco_panoptic".
        data: the folder that holds all data sets, official code's ``DETECTRON2_DATASETS``, or the data set's own; a path or ``gs://…``.
        split: default: the one that official evaluation takes.
        training: see :attr:`DataSet.training`.

    Raises:
        DataError: no such data set, split, folder, or a JSON that is none.
    """
    if name not in LAYOUTS:
        raise DataError(Problem("unknown data set", str(data), f"one of {', '.join(LAYOUTS)}", repr(name)), "choose one of them")
    layout = LAYOUTS[name]
    split = split or list(layout.splits)[-1]
    if split not in layout.splits:
        problem = Problem("unknown split", f"{name} in {data}", f"one of {', '.join(layout.splits)}", repr(split))
        raise DataError(problem, "choose one of them")
    root = os.path.join(os.fspath(data), layout.folder)
    if not tf.io.gfile.isdir(root):
        root = os.fspath(data)
    paths = {
        field: os.path.join(root, getattr(layout, field).format(split=split, part=layout.splits[split]))
        for field in ("images", "semantic", "panoptic", "panoptic_json")
        if getattr(layout, field)
    }
    if layout.panoptic:
        records, problems = listing.list_panoptic(layout, paths, empty=training)
    else:
        records, problems = listing.list_semantic(layout, paths)
    return DataSet(name, split, root, tuple(records), tuple(problems), training)


def open_training_set(name: str, data: str | os.PathLike[str]) -> DataSet:
    """The split to train on; arguments as of :func:`open_dataset`.

    Raises:
        DataError: the same, the first problem of the listing, or the first file that does not exist. What is in the files is not looked at.
    """
    dataset = open_dataset(name, data, "train", training=True)
    dataset.check_listing("stop")
    if missing := missing_files(dataset):
        raise DataError(missing[0])
    return dataset


def missing_files(dataset: DataSet) -> list[Problem]:
    """The files of ``dataset.records`` that do not exist, told from one listing of each folder."""
    names = functools.cache(lambda folder: frozenset(listing.names_in(folder)))
    return [
        Problem("missing file", path, "a file", "none")
        for record in dataset.records
        for path in (record.image, record.panoptic, record.semantic)
        if path is not None and os.path.basename(path) not in names(os.path.dirname(path))
    ]


def _attempt(read: Callable[[bytes, str], np.ndarray], file: str, problems: list[Problem]) -> np.ndarray | None:
    try:
        return read(listing.read_file(file), file)
    except tf.errors.NotFoundError:
        problems.append(Problem("missing file", file, "a file", "none"))
    except tf.errors.OpError as error:
        problems.append(Problem(UNREADABLE, file, "a file that can be read", listing.told(error)))
    except DataError as error:
        problems.append(error.problem)
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, ValueError, struct.error, DecompressionBombError …
        problems.append(Problem("corrupt image", file, "a whole image", f"{type(error).__name__}: {error}".partition("<_io.")[0]))
    return None


def _read_rgb(data: bytes, file: str) -> np.ndarray:
    return preprocessing.decode_image(data)


def _read_panoptic(data: bytes, file: str) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        if image.format != "PNG" or image.mode != "RGB":
            expected = "an RGB PNG whose R + 256·G + 65536·B is a segment's id"
            raise DataError(Problem("wrong format", file, expected, f"{image.format} {image.mode}"))
        red, green, blue = np.moveaxis(np.asarray(image).astype(np.int32), -1, 0)
    return red + 256 * green + 65536 * blue


def _read_semantic(data: bytes, file: str) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        labels = np.asarray(image)  # of an image with a palette, its indices
    if labels.ndim != 2 or labels.dtype.kind not in "ui":
        raise DataError(Problem("wrong format", file, "an image of integers with one channel", f"{labels.dtype} {labels.shape}"))
    return labels.astype(np.int32)


def _segment_problems(panoptic_seg: np.ndarray, record: Record, exact_areas: bool) -> list[Problem]:
    file = record.panoptic or ""
    areas = dict(zip(*(values.tolist() for values in np.unique(panoptic_seg, return_counts=True)), strict=True))
    areas.pop(VOID, None)
    ids = {segment.id for segment in record.segments}
    problems = []
    if unknown := sorted(areas.keys() - ids):
        problems.append(Problem("ids not in the JSON", file, f"the {len(ids)} ids of the JSON", _some(unknown)))
    if exact_areas and (absent := sorted(ids - areas.keys())):
        problems.append(Problem("ids not in the PNG", file, f"{len(ids)} segments", f"none of {_some(absent)}"))
    if exact_areas and (wrong := [segment for segment in record.segments if segment.area != areas.get(segment.id, segment.area)]):
        expected = f"{wrong[0].area} px of segment {wrong[0].id} as in the JSON"
        more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        problems.append(Problem("wrong area", file, expected, f"{areas[wrong[0].id]} px{more}"))
    return problems


def _label_problems(sem_seg: np.ndarray, file: str, info: registry.DatasetInfo) -> list[Problem]:
    labels = np.unique(sem_seg)
    classes = labels[labels != info.ignore_label]
    if unknown := classes[(classes < 0) | (classes >= len(info.class_names))].tolist():
        return [Problem("unknown category", file, f"0 … {len(info.class_names) - 1} or {info.ignore_label} (ignored)", _some(unknown))]
    if not classes.size:
        return [Problem("empty annotation", file, "at least one pixel with a class", f"{info.ignore_label} everywhere")]
    return []


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if ids[5:] else "")


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}×{array.shape[1]}"
