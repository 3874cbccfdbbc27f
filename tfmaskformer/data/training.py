"""Training batches of fixed shape: a data set shuffled, augmented as by the official mappers, and padded to one canvas.

What the config says of it (``INPUT``) is read, and done to a single image, by :mod:`tfmaskformer.data.augmentation`. Source of the order:
Detectron2 ``data/samplers/distributed_sampler.py`` (``TrainingSampler``): an endless stream of permutations of the whole data set, which
batches, and the shards of a batch, take one after the other.

    batches = training_dataset(config, open_dataset("coco_panoptic", folder, "train"), seed=0, batch=16, max_objects=100)
    for batch in batches:
        step(*step_arguments(batch))
"""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from tfmaskformer.data.datasets import DataSet
from tfmaskformer.official_yaml import Tree


def training_dataset(
    config: Tree,
    dataset: DataSet,
    *,
    seed: int,
    batch: int,
    max_objects: int,
    canvas: tuple[int, int] | None = None,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """Endless batches, a function of the arguments alone.

    Args:
        config: a whole official config (:func:`~tfmaskformer.official_yaml.read_tree`).
        dataset: what to train on, with the ground truth that the config's mapper wants.
        seed: of the order and of all draws; a draw depends on it, the epoch and the image, so that skipping batches costs nothing.
        batch: images of a batch, on all shards together.
        max_objects: of one image; those beyond it, the smallest, are dropped. Not read for per-pixel heads.
        canvas: height and width in px of all images, a multiple of the model's size divisibility; default: the smallest that holds
            whatever the config can make (:meth:`~tfmaskformer.data.augmentation.Mapper.canvas`).
        start: how many batches to skip: what a training that was interrupted after so many steps goes on with.
        shard: ``(index, count)``: yield only the ``index``-th of ``count`` equal parts of each batch.

    Returns:
        elements with ``B`` = ``batch / count``, ``N`` = ``max_objects``:

        - ``image`` uint8 [B, height, width, 3], RGB, not normalised; 0 outside the image
        - ``size`` int32 [B, 2], px, of the image in the canvas' top left corner; padding that the official mapper makes is part of it
        - ``image_id`` string [B]
        - for ``MaskFormerHead``: ``labels`` int32 [B, N], the class of each object; ``num_objects`` int32 [B];
          ``segments`` int32 [B, height, width], the object of each pixel, 0 … N − 1, or −1; ``dropped`` int32 [B], objects left out
        - for per-pixel heads: ``sem_seg`` int32 [B, height, width], the class of each pixel or the ignore value

        :func:`step_arguments` makes the step's arguments of them: masks are N times as large as ``segments`` and better made on the device.

    Raises:
        ConfigError: a value of ``INPUT`` that is not supported.
        ValueError: a canvas that cannot hold what the config makes, a batch that has no such parts, a data set without the ground truth.
    """
    raise NotImplementedError


def step_arguments(batch: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]:
    """``images, image_sizes, targets`` of :class:`~tfmaskformer.training.step.TrainStep`, of a batch (or a replica's part of it).

    With ``padding="masked"`` each image then gives what it gives alone.
    """
    if "sem_seg" in batch:
        targets = {"sem_seg": batch["sem_seg"]}
    else:
        objects = tf.range(tf.shape(batch["labels"])[1])[:, tf.newaxis, tf.newaxis]
        masks = batch["segments"][:, tf.newaxis] == objects
        targets = {"labels": batch["labels"], "masks": masks, "num_objects": batch["num_objects"]}
    return batch["image"], batch["size"], targets
