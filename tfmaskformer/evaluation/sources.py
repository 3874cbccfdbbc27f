"""Where the images of an evaluation come from: a data set's own files, or TFRecords of it."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image

from checkpoints import registry
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.data import tfrecords
from tfmaskformer.data.datasets import DataSet, Sample, identity, open_dataset
from tfmaskformer.data.layouts import LAYOUTS, Layout
from tfmaskformer.data.preprocessing import exif_orientation
from tfmaskformer.data.records import Problem, Record

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


class EvaluationError(ValueError):
    """The checkpoint, the data set and the options do not fit each other; nothing was evaluated."""


class Source(NamedTuple):
    """A data set, in its own files or packed into TFRecords.

    Attributes:
        name, split, root, layout: as in :class:`~tfmaskformer.data.datasets.DataSet`.
        images: how many there are.
        share: how many of them are this worker's.
        identity: tells its list of images from others.
        skipped: how many images the listing, or the build of TFRecords, left out.
        problems: of these.
        sizes: heights and widths of the images, px, read from JSON, headers or records; those that cannot be read are left out.
        items: of a collection of ids, all the other images in order, as something that ``load`` takes.
        load: reads one, or tells what is wrong with it, under its id.
    """

    name: str
    split: str
    root: str
    layout: Layout
    images: int
    share: int
    identity: str
    skipped: int
    problems: tuple[Problem, ...]
    sizes: Callable[[], list[tuple[int, int]]]
    items: Callable[[Collection[str]], Iterator[Any]]
    load: Callable[[Any], tuple[str, Sample | None, list[Problem]]]

    @property
    def info(self) -> registry.DatasetInfo:
        """Its categories."""
        return registry.dataset(self.layout.dataset)


def open_source(
    data: str | os.PathLike[str],
    name: str | None = None,
    split: str | None = None,
    *,
    default_name: str = "",
    on_error: str = "stop",
    limit: int | None = None,
    shard: tuple[int, int] = (1, 0),
) -> Source:
    """A data set's folder, or one that ``tfmaskformer data tfrecords`` made.

    Args:
        data: the folder; a path or ``gs://…``.
        name: of the data set; default: what the TFRecords are of, else ``default_name``.
        split: default: the one that official evaluation takes, or the one of the TFRecords.
        default_name: of the checkpoint's data set.
        on_error: "stop" raises the first problem of the listing.
        limit: take only the first images.
        shard: (n, i): of these, take every n-th from the i-th on.

    Raises:
        DataError: the folder holds no such data set, or, with "stop", not all of it.
        EvaluationError: the TFRecords are of another data set or split, or nothing tells which data set is meant.
    """
    folder = os.fspath(data)
    if tf.io.gfile.exists(os.path.join(folder, tfrecords.MANIFEST)):
        return _tfrecord_source(folder, name, split, limit, shard)
    name = name or default_name
    if name not in LAYOUTS:
        raise EvaluationError(
            f"the checkpoint's config names {f'the data set {name!r}' if name else 'no data set'}, expected one of {', '.join(LAYOUTS)}\n"
            "  give --dataset"
        )
    dataset = open_dataset(name, folder, split)
    dataset.check_listing(on_error)
    return _file_source(dataset, limit, shard)


def _file_source(dataset: DataSet, limit: int | None, shard: tuple[int, int]) -> Source:
    records = dataset.records[:limit]

    def sizes():
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return [size for size in pool.map(_size, records) if size is not None]

    def items(done):
        return (record for record in records[shard[1] :: shard[0]] if str(record.image_id) not in done)

    def load(record):
        return str(record.image_id), *dataset.examine(record)

    return Source(
        name=dataset.name,
        split=dataset.split,
        root=dataset.root,
        layout=dataset.layout,
        images=len(records),
        share=len(records[shard[1] :: shard[0]]),
        identity=identity(records),
        skipped=len(dataset.problems),
        problems=dataset.problems,
        sizes=sizes,
        items=items,
        load=load,
    )


def _size(record: Record) -> tuple[int, int] | None:
    """(height, width) of the upright image, as the JSON or the file's header has it."""
    if record.height is not None and record.width is not None:
        return record.height, record.width
    try:
        with tf.io.gfile.GFile(record.image, "rb") as file, Image.open(file) as image:
            turned = exif_orientation(image) in _TURNED
            return image.size if turned else image.size[::-1]
    except Exception:  # Pillow raises many kinds; loading the image will tell, and it finds a canvas if it can be read
        return None


def _tfrecord_source(folder: str, name: str | None, split: str | None, limit: int | None, shard: tuple[int, int]) -> Source:
    manifest = tfrecords.read_manifest(folder)
    plan, shards = manifest["plan"], manifest["shards"]
    for what, expected in (("dataset", name), ("split", split)):
        if expected not in (None, plan[what]):
            raise EvaluationError(f"'{folder}' holds TFRecords of {what} {plan[what]!r}, expected {expected!r}\n  leave out --{what}")
    layout = LAYOUTS[plan["dataset"]]
    things = frozenset(registry.dataset(layout.dataset).thing_classes)
    records = sum(part["records"] for part in shards.values())
    images = records if limit is None else min(limit, records)
    problems = [Problem(**problem) for problem in (*manifest["problems"], *(item for part in shards.values() for item in part["problems"]))]

    def sizes():
        features = {key: tf.io.FixedLenFeature([], tf.int64) for key in ("image/height", "image/width")}
        raw = tf.data.TFRecordDataset([os.path.join(folder, part) for part in shards]).take(-1 if limit is None else limit)
        parsed = raw.batch(64).map(lambda batch: tf.io.parse_example(batch, features))
        return [tuple(size) for batch in parsed.as_numpy_iterator() for size in np.stack([batch[key] for key in features], -1).tolist()]

    def items(done):
        elements = tfrecords.read(folder).take(-1 if limit is None else limit).shard(*shard)
        return (element for element in elements.as_numpy_iterator() if element["image_id"].decode() not in done)

    def load(element):
        image_id = element["image_id"].decode()
        segments = [
            {field: int(value) for field, value in zip(element["segments"], row, strict=True)}
            for row in zip(*element.get("segments", {}).values(), strict=True)
        ]
        infos = [segment | {"isthing": segment["category_id"] in things} for segment in segments]
        record = Record(int(image_id) if layout.integer_ids else image_id, image_id)
        return image_id, Sample(record, element["image"], element.get("panoptic_seg"), infos, element.get("sem_seg")), []

    return Source(
        name=plan["dataset"],
        split=plan["split"],
        root=folder,
        layout=layout,
        images=images,
        share=len(range(shard[1], images, shard[0])),
        identity=f"{plan['records_sha256']} {limit}",
        skipped=plan["images"] - records + len(manifest["problems"]),
        problems=tuple(problems),
        sizes=sizes,
        items=items,
        load=load,
    )


def metrics_of(config: MaskFormerConfig, source: Source, *, instances: bool = False, augmented: bool = False) -> tuple[str, ...]:
    """What the model's results are judged by on this data set: "panoptic", "semantic" and "instances", or some of them.

    Args:
        config: of the model.
        source: of its images.
        instances: whether AP is wanted.
        augmented: with test-time augmentation, which upstream gives semantic results alone.

    Raises:
        EvaluationError: other classes, or no ground truth of this kind.
    """
    info, layout = source.info, source.layout
    problems = []
    if config.num_classes != len(info.class_names):
        problems.append(f"{config.num_classes} classes, expected {len(info.class_names)}")
    elif config.class_names and config.class_names != info.class_names:
        index = next(index for index, name in enumerate(info.class_names) if config.class_names[index] != name)
        problems.append(f"class {index} is {config.class_names[index]!r}, expected {info.class_names[index]!r}")
    elif config.test.panoptic_on and layout.panoptic and sorted(config.thing_classes) != sorted(info.thing_classes):
        problems.append(f"{len(config.thing_classes)} classes are things, expected {len(info.thing_classes)}, the data set's")
    panoptic = bool(config.test.panoptic_on and layout.panoptic and not augmented)
    if not panoptic and not layout.semantic:
        results = "results with test-time augmentation are semantic" if augmented else "its results are semantic"
        problems.append(f"{results}, and the data set has panoptic ground truth alone")
    if instances and not panoptic:
        problems.append("instance AP is that of panoptic results, and there are none")
    if problems:
        known = f", the checkpoint is for {config.dataset!r}" if config.dataset else ""
        raise EvaluationError(
            f"the checkpoint ({config.name}) does not fit the data set {source.name!r}: {'; '.join(problems)}\n"
            f"  give another --dataset{known}"
        )
    chosen = {"panoptic": panoptic, "semantic": bool(layout.semantic), "instances": instances}
    return tuple(metric for metric, wanted in chosen.items() if wanted)
