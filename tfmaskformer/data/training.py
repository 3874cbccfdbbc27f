"""Training batches of fixed shape: a data set shuffled, augmented as by the official mappers, and padded to one canvas.

What the config says of it (``INPUT``) is read, and done to a single image, by :mod:`tfmaskformer.data.augmentation`. Source of the order:
Detectron2 ``data/samplers/distributed_sampler.py`` (``TrainingSampler``): an endless stream of permutations of the whole data set, which
batches, and the shards of a batch, take one after the other.

    batches = training_dataset(config, open_training_set("coco_panoptic", folder), seed=0, batch=16, max_objects=100)
    for batch in batches:
        step(*step_arguments(batch))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tfmaskformer.config import ConfigError, MaskFormerConfig
from tfmaskformer.data import augmentation, tfrecords
from tfmaskformer.data.augmentation import NO_SEGMENT, Mapper, draw, mapper_of, pad_to
from tfmaskformer.data.datasets import DataSet
from tfmaskformer.data.records import DataError, Problem
from tfmaskformer.official_config import config_of
from tfmaskformer.official_yaml import Tree

SAMPLER = "TrainingSampler"
"""``DATALOADER.SAMPLER_TRAIN``: the only one supported, which all official configs have."""


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
        ConfigError: a value of the config that is not supported.
        DataError: a data set without images or without the ground truth that the config wants. Bad files raise
            ``tf.errors.OpError``, of which :func:`~tfmaskformer.data.tfrecords.bad_data` tells what is wrong with them.
        ValueError: a canvas that cannot hold what the config makes, or a batch that has no such parts.
    """
    model, mapper = config_of(config, dataset.name), mapper_of(config, dataset.info.ignore_label)
    if config["DATALOADER"]["SAMPLER_TRAIN"] != SAMPLER:
        raise ConfigError(f"config: 'DATALOADER.SAMPLER_TRAIN' is {config['DATALOADER']['SAMPLER_TRAIN']!r}, supported: {SAMPLER!r}")
    _check_dataset(dataset, mapper, model)
    size = canvas_of(mapper, model, canvas)
    index, count = shard
    if batch % count or not 0 <= index < count:
        raise ValueError(f"training data: shard is {shard} of a batch of {batch} images, expected an index and a count that divides them")
    read = tfrecords.reader(dataset)

    def example(epoch: tf.Tensor, number: tf.Tensor) -> dict[str, tf.Tensor]:
        element = read(number)
        draws = draw(tf.stack([tf.constant(seed, tf.int64), epoch * len(dataset.records) + number]))
        if model.head == "MaskFormerHead":
            made = padded_objects(mapper, draws, element, size, max_objects)
        else:
            made = padded_sem_seg(mapper, draws, element, size)
        return {"image_id": element["image_id"], **made}

    part = batch // count
    order = training_order(len(dataset.records), seed, start * batch).batch(batch)
    mine = order.map(lambda epochs, numbers: (epochs[index * part : (index + 1) * part], numbers[index * part : (index + 1) * part]))
    examples = mine.unbatch().map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return examples.batch(part, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def training_order(length: int, seed: int, start: int = 0) -> tf.data.Dataset:
    """Endless ``(epoch, number)``, int64: a permutation of ``range(length)`` for each epoch; the first ``start`` are left out."""

    def shuffled(epoch: tf.Tensor) -> tf.data.Dataset:
        # Negative, so that no draw of an image has the same seed.
        numbers = tf.random.experimental.stateless_shuffle(tf.range(length, dtype=tf.int64), tf.stack([seed, -1 - epoch]), alg="philox")
        return tf.data.Dataset.from_tensor_slices((tf.repeat(epoch, length), numbers))

    return tf.data.Dataset.range(start // length, tf.int64.max).flat_map(shuffled).skip(start % length)


def padded_objects(
    mapper: Mapper, draws: augmentation.Draws, element: Mapping[str, Any], canvas: tuple[int, int], max_objects: int
) -> dict[str, tf.Tensor]:
    """``image``, ``size``, ``labels``, ``num_objects``, ``segments`` and ``dropped`` of one image; see :func:`training_dataset`.

    Args:
        element: a sample (:func:`~tfmaskformer.data.examples.element_spec`).
    """
    if mapper.name == augmentation.SEMANTIC:
        augmented = mapper(draws, element["image"], sem_seg=element["sem_seg"])
        labels, segments = semantic_objects(augmented.sem_seg, mapper.ignore_label)
    else:
        labels, segments = panoptic_objects(element["panoptic_seg"], element["segments"])
        augmented = mapper(draws, element["image"], segments, element.get("sem_seg") if mapper.single_category_max_area < 1 else None)
        segments = augmented.segments
    total = tf.shape(labels)[0]
    kept, segments = largest_objects(total, segments, max_objects)
    labels, num_objects = tf.gather(labels, kept), tf.shape(kept)[0]
    return {
        **_image(augmented.image, canvas),
        "labels": tf.ensure_shape(tf.pad(labels, [[0, max_objects - num_objects]]), [max_objects]),
        "num_objects": num_objects,
        "dropped": total - num_objects,
        "segments": pad_to(segments, canvas, NO_SEGMENT),
    }


def padded_sem_seg(mapper: Mapper, draws: augmentation.Draws, element: Mapping[str, Any], canvas: tuple[int, int]) -> dict[str, tf.Tensor]:
    """``image``, ``size`` and ``sem_seg`` of one image; see :func:`training_dataset`."""
    augmented = mapper(draws, element["image"], sem_seg=element["sem_seg"])
    return {**_image(augmented.image, canvas), "sem_seg": pad_to(augmented.sem_seg, canvas, mapper.ignore_value)}


def _image(image: tf.Tensor, canvas: tuple[int, int]) -> dict[str, tf.Tensor]:
    return {"image": pad_to(image, canvas, 0), "size": tf.shape(image)[:2]}


def panoptic_objects(panoptic_seg: tf.Tensor, segments: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Segments that are no crowds, in the JSON's order: its class, int32 [objects]; and the object of each pixel, int32 [height, width]."""
    ours = tf.boolean_mask(tf.stack([segments["id"], segments["category_id"]]), segments["iscrowd"] == 0, axis=1)
    order = tf.argsort(ours[0])
    ids = tf.concat([tf.gather(ours[0], order), [tf.int32.max]], 0)  # one more, for pixels behind the last
    place = tf.reshape(tf.searchsorted(ids, tf.reshape(panoptic_seg, [-1])), tf.shape(panoptic_seg))
    objects = tf.gather(tf.concat([order, [NO_SEGMENT]], 0), place)
    return ours[1], tf.where(tf.gather(ids, place) == panoptic_seg, objects, NO_SEGMENT)


def semantic_objects(sem_seg: tf.Tensor, ignore_label: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Every class of a map, in ascending order, int32 [objects]; and the object of each pixel, int32 [height, width]."""
    has_class = sem_seg != ignore_label
    present = tf.math.bincount(tf.boolean_mask(sem_seg, has_class), minlength=1) > 0
    objects = tf.cumsum(tf.cast(present, tf.int32)) - 1
    segments = tf.where(has_class, tf.gather(objects, tf.where(has_class, sem_seg, 0)), NO_SEGMENT)
    return tf.cast(tf.where(present)[:, 0], tf.int32), segments


def largest_objects(count: tf.Tensor, segments: tf.Tensor, max_objects: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Which of ``count`` objects are kept, the largest ``max_objects`` in their order, int32 [kept], and the map of these alone.

    As upstream, an object of which the crop left nothing is one all the same; such are dropped first.
    """

    def largest() -> tuple[tf.Tensor, tf.Tensor]:
        areas = tf.math.bincount(tf.reshape(segments + 1, [-1]), minlength=count + 1)[1:]
        kept = tf.sort(tf.math.top_k(areas, max_objects).indices)
        renamed = tf.tensor_scatter_nd_update(tf.fill([count + 1], NO_SEGMENT), kept[:, tf.newaxis] + 1, tf.range(max_objects))
        return kept, tf.gather(renamed, segments + 1)

    return tf.cond(count > max_objects, largest, lambda: (tf.range(count), segments))


def _check_dataset(dataset: DataSet, mapper: Mapper, model: MaskFormerConfig) -> None:
    layout = dataset.layout
    panoptic = mapper.name != augmentation.SEMANTIC
    wanted = {"panoptic maps": layout.panoptic or not panoptic or model.head != "MaskFormerHead"}
    limited = mapper.name == augmentation.PANOPTIC and mapper.single_category_max_area < 1
    wanted["semantic maps"] = layout.semantic or (panoptic and model.head == "MaskFormerHead" and not limited)
    next_step = "choose another data set, or another config"
    for kind, there in wanted.items():
        if not there:
            raise DataError(Problem("no such ground truth", dataset.root, f"{kind}, for the mapper {mapper.name}", "none"), next_step)
    if len(dataset.info.class_names) != model.num_classes:
        expected = f"the {model.num_classes} classes of the config"
        raise DataError(Problem("other classes", dataset.root, expected, str(len(dataset.info.class_names))), next_step)
    if not dataset.records:
        raise DataError(Problem("empty data set", dataset.root, f"images of {dataset.split}", "none"))


def canvas_of(mapper: Mapper, model: MaskFormerConfig, canvas: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) in px on which training images lie: the given one, or the smallest that holds every image.

    Raises:
        ValueError: the given one is too small, or no multiple of the model's divisibility.
    """
    divisibility = max(model.size_divisibility, 1)
    smallest = tuple(-(-side // divisibility) * divisibility for side in mapper.canvas()) if canvas is None or mapper.bounded else (0, 0)
    chosen = smallest if canvas is None else canvas
    if any(side < least or side % divisibility for side, least in zip(chosen, smallest, strict=True)):
        raise ValueError(
            f"training data: the canvas is {chosen[0]}×{chosen[1]} px, expected at least {smallest[0]}×{smallest[1]} and multiples of "
            f"{divisibility}\n  a smaller 'INPUT.MAX_SIZE_TRAIN' makes smaller images"
        )
    return chosen[0], chosen[1]


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
