"""Small generated data sets in every layout: real shapes and sizes of the files, made-up images, a function of the name, split and index.

They hold what real ones hold and code gets wrong: odd sizes that are not square, void pixels, crowds, ids that need all three bytes of
a PNG, the data set's first and last class, labels of 16 bits or with a palette, JPEG files with and without subsampled colours,
progressive, grey or turned by EXIF.
"""

from __future__ import annotations

import io
import json
import os
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from checkpoints import registry
from tfmaskformer.data import shapes
from tfmaskformer.data.layouts import LAYOUTS

CROWD_IMAGE = 1
"""The things of this image are crowds."""

_CITIES = ("aachen", "bochum")
_TURNED = 6  # EXIF: turn it by 90° to the right


def write(name: str, data: str | os.PathLike[str], split: str, count: int) -> None:
    """Writes images 0 … ``count`` − 1 of ``split`` of a data set, below ``data``, the folder that holds all data sets.

    Args:
        name: in :data:`~tfmaskformer.data.layouts.LAYOUTS`.
        data: a path, or ``gs://…``; a folder that is there is added to.
    """
    layout, info = LAYOUTS[name], registry.dataset(LAYOUTS[name].dataset)
    root = os.path.join(os.fspath(data), layout.folder)
    folder = {
        field: os.path.join(root, getattr(layout, field).format(split=split, part=layout.splits[split]))
        for field in ("images", "semantic", "panoptic", "panoptic_json")
    }
    listed: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for index in range(count):
        sample = shapes.sample("train", len(split) + index)
        number = f"{index:06}_{7 * index:06}"
        stem = {True: f"{_CITIES[index % 2]}/{_CITIES[index % 2]}_{number}", False: f"{1000 - 3 * index:012}"}[layout.cities]
        image_id: int | str = 1000 - 3 * index if layout.integer_ids else os.path.basename(stem)
        _write(
            os.path.join(folder["images"], stem + layout.image_suffix), _encoded(Image.fromarray(sample.image), layout.image_suffix, index)
        )
        if layout.semantic:
            labels = Image.fromarray(_labels(sample, info))
            if name == "mapillary_vistas":
                labels.putpalette(bytes(range(255, -1, -1)) * 3)
            _write(os.path.join(folder["semantic"], stem + layout.semantic_suffix), _encoded(labels, layout.semantic_suffix))
        if layout.panoptic:
            png = f"{image_id}_gtFine_panoptic.png" if layout.cities else f"{os.path.basename(stem)}.png"
            panoptic_seg, segments = _segments(sample, info, index)
            rgb = np.stack([panoptic_seg >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
            _write(os.path.join(folder["panoptic"], png), _encoded(Image.fromarray(rgb), ".png"))
            height, width = panoptic_seg.shape
            image = {"file_name": f"{os.path.basename(stem)}{layout.image_suffix}", "height": height, "width": width}
            listed["images"].append(image | ({} if name == "ade20k_panoptic" else {"id": image_id}))
            listed["annotations"].append({"image_id": image_id, "file_name": png, "segments_info": segments})
    if layout.panoptic:
        ids = info.dataset_ids or ()
        listed["categories"] = [
            {"id": id_, "name": class_name, "isthing": int(index in info.thing_classes)}
            for index, (id_, class_name) in enumerate(zip(ids, info.class_names, strict=True))
        ]
        _write(folder["panoptic_json"], json.dumps(listed).encode())


def _categories(sample: shapes.Sample, info: registry.DatasetInfo) -> list[int]:
    """A class for each segment, things for things: in turn from the back and the front of the table."""
    things = info.thing_classes or range(len(info.class_names))
    stuff = [category for category in range(len(info.class_names)) if category not in things]
    given: dict[bool, int] = {True: 0, False: 0}
    categories = []
    for segment in sample.segments_info:
        isthing = segment["isthing"] or not stuff
        classes = things if isthing else stuff
        rank = given[isthing]
        given[isthing] += 1
        categories.append(classes[rank // 2 if rank % 2 else -1 - rank // 2])
    return categories


def _labels(sample: shapes.Sample, info: registry.DatasetInfo) -> np.ndarray:
    ignore = info.ignore_label
    labels = np.full(sample.panoptic_seg.shape, ignore, np.uint16 if ignore is not None and ignore > 255 else np.uint8)
    for segment, category in zip(sample.segments_info, _categories(sample, info), strict=True):
        labels[sample.panoptic_seg == segment["id"]] = category
    labels[:7, 3:20] = ignore
    return labels


def _segments(sample: shapes.Sample, info: registry.DatasetInfo, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    panoptic_seg = sample.panoptic_seg.copy()
    panoptic_seg[:7, 3:20] = 0
    segments = []
    for segment, category in zip(sample.segments_info, _categories(sample, info), strict=True):
        area = int((panoptic_seg == segment["id"]).sum())
        crowd = int(index == CROWD_IMAGE and segment["isthing"])
        segments.append({"id": segment["id"], "category_id": (info.dataset_ids or ())[category], "area": area, "iscrowd": crowd})
    return panoptic_seg, [segment for segment in segments if segment["area"]]


def _encoded(image: Image.Image, suffix: str, index: int = 0) -> bytes:
    file = io.BytesIO()
    if not suffix.endswith(".jpg"):
        image.save(file, "TIFF" if suffix == ".tif" else "PNG")
    elif index % 5 == 4:
        exif = Image.Exif()
        exif[0x0112] = _TURNED
        image.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=90, exif=exif)
    else:
        image.convert("L" if index % 5 == 3 else "RGB").save(
            file, "JPEG", quality=90, subsampling=2 * (index % 2), progressive=index % 5 == 2
        )
    return file.getvalue()


def _write(path: str, content: bytes) -> None:
    tf.io.gfile.makedirs(os.path.dirname(path))
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(content)
