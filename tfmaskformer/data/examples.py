"""A sample as a ``tf.train.Example`` and as an element of ``tf.data``; docs/data.md has the table of features.

Names are those that DeepLab2 (``data/data_utils.py``) and the Model Garden (``official/vision/data/create_coco_tf_record.py``) give; what
neither keeps are the ids, categories, crowds and areas of segments: ``image/panoptic/encoded`` and ``image/panoptic/segments_info/…``.
"""

from __future__ import annotations

import hashlib
import io
import os
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from checkpoints import registry
from tfmaskformer.data import preprocessing
from tfmaskformer.data.datasets import DataSet, Sample
from tfmaskformer.data.layouts import Layout
from tfmaskformer.data.listing import read_file
from tfmaskformer.data.records import DataError, Problem

_SEGMENT_FIELDS = ("id", "category_id", "iscrowd", "area")


def element_spec(layout: Layout) -> dict[str, Any]:
    """What a sample is as an element of ``tf.data``: ``image_id``, ``image``, and the ground truth that the layout has.

    ``panoptic_seg`` int32 [height, width]; ``segments`` int32 [segments]: ``id``, ``category_id`` (contiguous), ``iscrowd``, ``area``;
    ``sem_seg`` int32 [height, width].
    """
    spec: dict[str, Any] = {"image_id": tf.TensorSpec([], tf.string), "image": tf.TensorSpec([None, None, 3], tf.uint8)}
    if layout.panoptic:
        spec["panoptic_seg"] = tf.TensorSpec([None, None], tf.int32)
        spec["segments"] = {field: tf.TensorSpec([None], tf.int32) for field in _SEGMENT_FIELDS}
    if layout.semantic:
        spec["sem_seg"] = tf.TensorSpec([None, None], tf.int32)
    return spec


def element(sample: Sample) -> dict[str, Any]:
    """The sample as :func:`element_spec` says, NumPy arrays."""
    values: dict[str, Any] = {"image_id": str(sample.record.image_id).encode(), "image": sample.image}
    if sample.panoptic_seg is not None:
        values["panoptic_seg"] = sample.panoptic_seg
        segments = sample.segments_info
        values["segments"] = {field: np.array([segment[field] for segment in segments], np.int32) for field in _SEGMENT_FIELDS}
    if sample.sem_seg is not None:
        values["sem_seg"] = sample.sem_seg
    return values


def parse(record: tf.Tensor, layout: Layout) -> dict[str, Any]:
    """What :func:`element` was, of a serialized :func:`example` (string scalar)."""
    text = tf.io.FixedLenFeature([], tf.string)
    features: dict[str, Any] = dict.fromkeys(("image/source_id", "image/encoded", "image/format"), text)
    if layout.panoptic:
        features["image/panoptic/encoded"] = text
        features |= {f"image/panoptic/segments_info/{field}": tf.io.VarLenFeature(tf.int64) for field in _SEGMENT_FIELDS}
    if layout.semantic:
        features[_semantic_key(layout)] = text
    parsed = tf.io.parse_single_example(record, features)
    element = {
        "image_id": parsed["image/source_id"],
        "image": preprocessing.decode_image_tf(parsed["image/encoded"], parsed["image/format"]),
    }
    if layout.panoptic:
        rgb = tf.cast(tf.io.decode_png(parsed["image/panoptic/encoded"], channels=3), tf.int32)
        element["panoptic_seg"] = tf.reduce_sum(rgb * [1, 256, 65536], axis=-1)
        element["segments"] = {
            field: tf.cast(tf.sparse.to_dense(parsed[f"image/panoptic/segments_info/{field}"]), tf.int32) for field in _SEGMENT_FIELDS
        }
    if layout.semantic:
        dtype = _label_dtype(layout)
        element["sem_seg"] = tf.cast(tf.io.decode_png(parsed[_semantic_key(layout)], channels=1, dtype=dtype), tf.int32)[..., 0]
    return element


def example(sample: Sample, dataset: DataSet, deeplab2: bool) -> tf.train.Example:
    """The sample as a record; with ``deeplab2`` also DeepLab2's panoptic label.

    Raises:
        DataError: with ``deeplab2``, more instances of a category than its label can tell.
    """
    layout, info = dataset.layout, dataset.info
    encoded, image_format = _encoded_image(sample)
    height, width = sample.image.shape[:2]
    features: dict[str, Any] = {
        "image/encoded": encoded,
        "image/format": image_format,
        "image/filename": os.path.basename(sample.record.image),
        "image/source_id": str(sample.record.image_id),
        "image/key/sha256": hashlib.sha256(encoded).hexdigest(),
        "image/height": height,
        "image/width": width,
        "image/channels": 3,
    }
    if sample.sem_seg is not None:
        features[_semantic_key(layout)] = _png(sample.sem_seg.astype(_label_dtype(layout).as_numpy_dtype))
        features[_semantic_key(layout).replace("encoded", "format")] = "png"
    if sample.panoptic_seg is not None:
        features["image/panoptic/encoded"] = read_file(str(sample.record.panoptic))
        for field in _SEGMENT_FIELDS:
            features[f"image/panoptic/segments_info/{field}"] = [int(segment[field]) for segment in sample.segments_info]
        category, instance = _model_garden_masks(sample, info)
        features["image/panoptic/category_mask"] = _png(category)
        features["image/panoptic/instance_mask"] = _png(instance)
        if deeplab2:
            features["image/segmentation/class/encoded"] = _deeplab2_label(sample, layout).tobytes()
            features["image/segmentation/class/format"] = "raw"
    return tf.train.Example(features=tf.train.Features(feature={key: _feature(value) for key, value in features.items()}))


def _encoded_image(sample: Sample) -> tuple[bytes, str]:
    """The file's bytes, if TensorFlow decodes them to the sample's very pixels; otherwise (turned by EXIF, rare kinds) a PNG of these."""
    data = read_file(sample.record.image)
    with Image.open(io.BytesIO(data)) as image:
        image_format = str(image.format).lower()
    if image_format in ("jpeg", "png"):
        try:
            if np.array_equal(preprocessing.decode_image_tf(tf.constant(data), tf.constant(image_format)), sample.image):
                return data, image_format
        except tf.errors.OpError:  # a kind that TensorFlow cannot decode
            pass
    return _png(sample.image), "png"


def _model_garden_masks(sample: Sample, info: registry.DatasetInfo) -> tuple[np.ndarray, np.ndarray]:
    """The Model Garden's masks: dataset ids of categories (plus 1 where a category has id 0), and numbers of things; 0 is neither."""
    assert sample.panoptic_seg is not None
    assert info.dataset_ids is not None
    shift = int(0 in info.dataset_ids)
    category = np.zeros(sample.panoptic_seg.shape, np.uint8)
    instance = np.zeros(sample.panoptic_seg.shape, np.uint16)
    for number, segment in enumerate(sample.segments_info, 1):
        mask = sample.panoptic_seg == segment["id"]
        category[mask] = info.dataset_ids[segment["category_id"]] + shift
        instance[mask] = number * segment["isthing"]
    return category, instance if instance.max() > 255 else instance.astype(np.uint8)


def _deeplab2_label(sample: Sample, layout: Layout) -> np.ndarray:
    """int32 [height, width]: category · divisor + number of the thing in its category, from 1; 0 for stuff and crowds."""
    assert sample.panoptic_seg is not None
    divisor, ignore, first = layout.deeplab2
    label = np.full(sample.panoptic_seg.shape, ignore * divisor, np.int32)
    counts: dict[int, int] = {}
    for segment in sample.segments_info:
        category = segment["category_id"]
        number = 0
        if segment["isthing"] and not segment["iscrowd"]:
            number = counts[category] = counts.get(category, 0) + 1
        if number >= divisor:
            file = str(sample.record.panoptic)
            raise DataError(Problem("too many instances", file, f"at most {divisor - 1} of a category for DeepLab2", str(number)))
        label[sample.panoptic_seg == segment["id"]] = (category + first) * divisor + number
    return label.astype("<i4")


def _semantic_key(layout: Layout) -> str:
    return "image/semantic/encoded" if layout.panoptic else "image/segmentation/class/encoded"


def _label_dtype(layout: Layout) -> tf.DType:
    return tf.uint8 if (registry.dataset(layout.dataset).ignore_label or 0) < 256 else tf.uint16


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _feature(value: Any) -> tf.train.Feature:
    if isinstance(value, str | bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode() if isinstance(value, str) else value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=value if isinstance(value, list) else [value]))
