"""Curves and pictures for TensorBoard.

Written as protocol buffers of TensorFlow's own, since the functions ``tf.summary.scalar`` and ``image`` need the package ``tensorboard``,
and training does not.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.inference import panoptic_inference, semantic_inference
from tfmaskformer.visualize import panoptic_overlay, semantic_overlay, side_by_side

_Summary = tf.compat.v1.Summary


class Summaries:
    """What a training tells TensorBoard.

    Args:
        folder: of the event files; None: nothing is written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None):
        self._writer = tf.summary.create_noop_writer() if folder is None else tf.summary.create_file_writer(os.fspath(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves."""
        self._write(step, [_Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

    def picture(self, step: int, tag: str, picture: np.ndarray) -> None:
        """uint8 [height, width, 3] RGB."""
        with io.BytesIO() as file:
            Image.fromarray(picture).save(file, format="PNG")
            height, width, channels = picture.shape
            image = _Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=file.getvalue())
        self._write(step, [_Summary.Value(tag=tag, image=image)])

    def _write(self, step: int, values: list[Any]) -> None:
        with self._writer.as_default():
            tf.summary.experimental.write_raw_pb(_Summary(value=values).SerializeToString(), step)
            self._writer.flush()


def sample_overlay(model: Any, image: np.ndarray, targets: Mapping[str, np.ndarray]) -> np.ndarray:
    """A training image under its ground truth, and beside it under what the model makes of it.

    Args:
        model: :class:`~tfmaskformer.model.MaskFormer`.
        image: uint8 [height, width, 3] RGB.
        targets: of the step, of this image alone: ``labels`` [objects] and ``masks`` [objects, height, width], or ``sem_seg``.

    Returns:
        uint8 [height, width, 3] RGB.
    """
    config: MaskFormerConfig = model.config
    size = image.shape[:2]
    outputs = model(tf.constant(image[np.newaxis]), training=False)
    if config.test.panoptic_on:
        [(ids, segments_info)] = panoptic_inference(outputs, config, [size])
        found = panoptic_overlay(image, ids, segments_info, config)
    else:
        [scores] = semantic_inference(outputs, config, [size])
        found = semantic_overlay(image, np.argmax(scores, 0), config)
    if "sem_seg" in targets:
        truth = semantic_overlay(image, targets["sem_seg"], config)
    else:
        masks, labels = targets["masks"], targets["labels"]
        segments = [{"id": index + 1, "category_id": int(label)} for index, label in enumerate(labels)]
        ids = np.max(masks * np.arange(1, len(labels) + 1)[:, np.newaxis, np.newaxis], axis=0, initial=0)
        truth = panoptic_overlay(image, ids, segments, config)
    return side_by_side([truth, found], ["ground truth", "prediction"])
