"""From queries to pixels: semantic and panoptic segmentation of each image (MaskFormer paper, section 3.4).

The flow is that of ``mask_former/mask_former_model.py`` at evaluation: mask logits are resized to the canvas that the network
saw, cropped to the image and resized to the output, bilinearly. Where ``config.postprocess_before_inference`` is false,
``semantic_inference`` resizes probabilities instead of logits in the last step; panoptic inference always resizes logits. The logits
of the per-pixel baselines take the same way (Detectron2 ``sem_seg_postprocess``), but the canvas is 4 times their own size.

Everything is computed in the dtype of the outputs, float32 at least. Sizes are concrete (eager tensors or numbers), results differ
in size and are lists. Images are taken one after the other, so that memory is that of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.resize import resize_bilinear

MASK_STRIDE = 4
"""Image px behind one element of ``pred_masks`` and ``sem_seg``, rounded up at the border."""

Sizes: TypeAlias = "Sequence[Sequence[int]] | np.ndarray | tf.Tensor"
"""(height, width) of each image, px."""


def semantic_inference(
    outputs: Mapping[str, Any],
    config: MaskFormerConfig,
    image_sizes: Sizes,
    output_sizes: Sizes | None = None,
    *,
    padded_size: Sequence[int] | None = None,
    postprocess_before_inference: bool | None = None,
) -> list[tf.Tensor]:
    """Scores of each class at each pixel: Σ over queries of softmax(class logits) · sigmoid(mask logits); of a per-pixel baseline, logits.

    Args:
        outputs: of the model. ``pred_logits`` float [batch, queries, classes + 1], ``pred_masks`` float [batch, queries,
            ceil(padded height / 4), ceil(padded width / 4)], or instead ``sem_seg`` float [batch, classes, …]; with ``valid_sizes`` int32
            [batch, 2] (masked padding) the canvas of each image is its valid size, and the result that of the image alone.
        config: of the model.
        image_sizes: int [batch, 2], (height, width) of each image as given to the model, without padding, px.
        output_sizes: int [batch, 2], (height, width) to return, px; default ``image_sizes``. Upstream: the original image's.
        padded_size: (height, width) of the images as given to the model, px; rounded up to ``config.size_divisibility`` as the model does,
            it is the canvas that the network saw. Default: ``outputs["padded_size"]``, or the batch maximum where outputs lack it. Not
            for masked padding.
        postprocess_before_inference: whether logits are resized to the output, or probabilities; default as in the config. A per-pixel
            baseline has nothing but logits.

    Returns:
        One tensor for each image: float32 (float64 for float64 outputs) [classes, output height, output width]. The scores of a pixel
        are no distribution: their sum may exceed 1. Those of a per-pixel baseline are logits.

    Raises:
        ValueError: sizes that do not fit the outputs, the batch or each other.
    """
    before = config.postprocess_before_inference if postprocess_before_inference is None else postprocess_before_inference
    results = []
    for logits, masks, canvas, image, output in _per_image(outputs, config, image_sizes, output_sizes, padded_size):
        if logits is None:
            rows, columns = _axis_weights(masks, [MASK_STRIDE * length for length in masks.shape[1:]], image, output)
            results.append(rows[tf.newaxis] @ (masks @ columns[tf.newaxis]))
            continue
        rows, columns = _axis_weights(masks, canvas, image, output if before else image)
        masks = tf.sigmoid(rows[tf.newaxis] @ (masks @ columns[tf.newaxis]))
        scores = tf.einsum("qc,qhw->chw", tf.nn.softmax(logits)[:, :-1], masks)
        results.append(scores if before else resize_bilinear(scores, output))
    return results


def panoptic_inference(
    outputs: Mapping[str, Any],
    config: MaskFormerConfig,
    image_sizes: Sizes,
    output_sizes: Sizes | None = None,
    *,
    padded_size: Sequence[int] | None = None,
    object_mask_threshold: float | None = None,
    overlap_threshold: float | None = None,
) -> list[tuple[np.ndarray, list[dict[str, Any]]]]:
    """One segment, or none, for each pixel: things by instance, stuff by class.

    A query is kept if its most probable class is not "no object" and has a probability above ``object_mask_threshold``; each pixel
    goes to the kept query with the largest probability · mask. A query is dropped, its pixels left unlabelled, if they are fewer than
    ``overlap_threshold`` of the pixels where its mask is at least ½. Queries of one stuff class become one segment.

    Args:
        outputs, config, image_sizes, output_sizes, padded_size: see :func:`semantic_inference`. ``config.thing_classes`` tells things
            from stuff.
        object_mask_threshold, overlap_threshold: default as in ``config.test``.

    Returns:
        For each image ``panoptic_seg``, int32 [output height, output width] with the segment's id, 0 where there is none, and
        ``segments_info``, one ``{"id": int, "isthing": bool, "category_id": int}`` for each segment in the order of ids, which start
        at 1; ``category_id`` is the contiguous class index.

    Raises:
        ValueError: sizes that do not fit the outputs, the batch or each other, or outputs of a per-pixel baseline.
    """
    if "sem_seg" in outputs:
        raise ValueError(f"inference: the outputs are those of a per-pixel baseline ({config.head}), which tells no objects apart")
    test = config.test
    object_mask_threshold = test.object_mask_threshold if object_mask_threshold is None else object_mask_threshold
    overlap_threshold = test.overlap_threshold if overlap_threshold is None else overlap_threshold
    results = []
    for logits, masks, canvas, image, output in _per_image(outputs, config, image_sizes, output_sizes, padded_size):
        probabilities = _softmax(logits.numpy())
        # Classes of the probabilities, not of the logits: rounding can make two of them equal, and the first one counts.
        labels, scores = probabilities.argmax(-1), probabilities.max(-1)
        kept = np.flatnonzero((labels != config.num_classes) & (scores > object_mask_threshold))
        rows, columns = _axis_weights(masks, canvas, image, output)
        best = tf.zeros(output, masks.dtype)
        winners = tf.zeros(output, tf.int32)
        areas = []
        # One query after the other: one mask in memory, and equal masks are computed alike, to the last bit.
        for index, query in enumerate(kept):
            mask = tf.sigmoid(rows @ masks[query] @ columns)
            areas.append(int(tf.math.count_nonzero(mask >= 0.5)))
            probability = scores[query] * mask
            winners = tf.where(probability > best, index, winners)  # a tie stays with the first query
            best = tf.maximum(best, probability)
        results.append(_segments(winners.numpy(), areas, labels[kept], config.thing_classes, overlap_threshold))
    return results


def _segments(winners, mask_areas, labels, thing_classes, overlap_threshold):
    """Segments of the kept queries in their order; a pixel belongs to one query, so each query is one entry of a table of ids."""
    areas = np.bincount(winners.ravel(), minlength=len(labels))
    segment_ids = np.zeros(max(len(labels), 1), np.int32)
    segments_info: list[dict[str, Any]] = []
    stuff_ids: dict[int, int] = {}
    for query, label in enumerate(labels.tolist()):
        if areas[query] == 0 or mask_areas[query] == 0 or areas[query] / mask_areas[query] < overlap_threshold:
            continue
        if label not in stuff_ids:
            is_thing = label in thing_classes
            segments_info.append({"id": len(segments_info) + 1, "isthing": is_thing, "category_id": label})
            segment_ids[query] = len(segments_info)
            if not is_thing:
                stuff_ids[label] = len(segments_info)
        else:
            segment_ids[query] = stuff_ids[label]
    return segment_ids[winners], segments_info


def _softmax(logits):
    """In NumPy: TensorFlow's vectorised kernel may give equal rows different last bits, and so break ties."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _axis_weights(masks, canvas, image, output):
    """Matrices [output height, height] and [width, output width]: rows @ mask logits @ columns is resized to the canvas, cropped to
    the image and resized to the output.

    Both resizes and the crop are linear along each axis, so their product is one matrix an axis, and the logits of all queries at
    the canvas (half a GB for 100 queries at 800×1333 px) are never made.
    """

    def weights(axis):
        length = masks.shape[1 + axis]
        on_canvas = resize_bilinear(tf.eye(length, dtype=tf.float64), (canvas[axis], length))
        return tf.cast(resize_bilinear(on_canvas[: image[axis]], (output[axis], length)), masks.dtype)

    return weights(0), tf.transpose(weights(1))


def _per_image(
    outputs: Mapping[str, Any],
    config: MaskFormerConfig,
    image_sizes: Sizes,
    output_sizes: Sizes | None,
    padded_size: Sequence[int] | None,
) -> Iterator[tuple[Any, tf.Tensor, tuple[int, int], tuple[int, int], tuple[int, int]]]:
    """For each image: class logits, mask logits without padding of the batch, and (height, width) of canvas, image and output.

    A per-pixel baseline has None for class logits, and the logits of its classes for masks.
    """
    key, axis, classes = ("sem_seg", 1, config.num_classes) if "sem_seg" in outputs else ("pred_logits", 2, config.num_classes + 1)
    if outputs[key].shape[axis] != classes:
        raise ValueError(
            f"inference: {key} have {outputs[key].shape[axis]} classes, expected {classes} (num_classes of config {config.name!r}"
            f"{' and no object' * (key == 'pred_logits')}); give the config of the model that made the outputs"
        )
    maps = "pred_masks" if key == "pred_logits" else key
    masks = _at_least_float32(outputs[maps])
    logits = _at_least_float32(outputs[key]) if key == "pred_logits" else [None] * masks.shape[0]
    batch = masks.shape[0]
    images = _checked_sizes("image_sizes", image_sizes, batch)
    targets = images if output_sizes is None else _checked_sizes("output_sizes", output_sizes, batch)
    masked = "valid_sizes" in outputs
    if masked and padded_size is not None:
        raise ValueError("inference: padded_size is given, but outputs of masked padding have their own valid_sizes; leave it out")
    if masked:
        canvases = _checked_sizes("valid_sizes", outputs["valid_sizes"], batch)
    else:
        if padded_size is None and "padded_size" in outputs:
            padded_size = np.asarray(outputs["padded_size"]).tolist()
        height, width = np.max(images if padded_size is None else _checked_sizes("padded_size", [padded_size], 1), axis=0).tolist()
        divisor = max(config.size_divisibility, 1)
        canvases = [(-(-height // divisor) * divisor, -(-width // divisor) * divisor)] * batch
    for index, (canvas, image, output) in enumerate(zip(canvases, images, targets, strict=True)):
        if image[0] > canvas[0] or image[1] > canvas[1]:
            raise ValueError(f"inference: image {index} of {_px(image)} is larger than its canvas of {_px(canvas)}")
        height, width = (-(-length // MASK_STRIDE) for length in canvas)
        found = tuple(masks.shape[2:])
        if found != (height, width) and not (masked and found[0] >= height and found[1] >= width):
            raise ValueError(
                f"inference: {maps} are {_px(found)}, but a canvas of {_px(canvas)} gives {_px((height, width))}; "
                "if the images were padded beyond the batch maximum, give padded_size=(height, width) of the images"
            )
        yield logits[index], masks[index, :, :height, :width], canvas, image, output


def _checked_sizes(name: str, sizes: Sizes, batch: int) -> list[tuple[int, int]]:
    array: np.ndarray = np.asarray(sizes)
    if array.shape != (batch, 2) or array.dtype.kind not in "iu" or (array < 1).any():
        raise ValueError(
            f"inference: {name} must be integers ({batch}, 2), height and width of each image in px, at least 1; "
            f"got {array.dtype} {array.shape}: {array.tolist()}"
        )
    return [(int(height), int(width)) for height, width in array]


def _px(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"


def _at_least_float32(values: Any) -> tf.Tensor:
    tensor = tf.convert_to_tensor(values)
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)
