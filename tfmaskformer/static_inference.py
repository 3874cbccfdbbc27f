"""Semantic and panoptic segmentation at static shapes, for XLA: whole batches of images of any size in one compiled program.

The results are those of :mod:`tfmaskformer.inference`, which has the flow and its source; here sizes are tensors, and every image is
written into the top left corner of one output canvas. Nothing depends on values but the number of turns of a loop over kept queries.

    @tf.function(jit_compile=True)
    def step(images, image_sizes, output_sizes):
        outputs = model(images, image_sizes, padding="masked")
        return static_panoptic_inference(outputs, model.config, image_sizes, output_sizes, (640, 640))

Sums of floats have another order under XLA. Where two queries are equally probable up to that rounding, but are not equal, or a mask is ½
up to it, the two forms may choose differently; exact ties are decided as upstream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.inference import MASK_STRIDE, _at_least_float32
from tfmaskformer.resize import bilinear_taps, bilinear_weights, resize_bilinear, static_shape, valid_pixels


class PanopticSegments(NamedTuple):
    """Segments of a batch of images.

    Attributes:
        panoptic_seg: int32 [batch, canvas height, canvas width], ids of segments, from 1; 0 where there is none and outside the image.
        count: int32 [batch], the number of segments.
        category_id: int32 [batch, queries], the contiguous class index of segment 1, 2, …; -1 behind the last.
        isthing: bool [batch, queries].
        score: float [batch, queries], the probability of the class; of stuff, of the first of its queries. 0 behind the last.
    """

    panoptic_seg: tf.Tensor
    count: tf.Tensor
    category_id: tf.Tensor
    isthing: tf.Tensor
    score: tf.Tensor

    def images(self, output_sizes: Any) -> list[tuple[np.ndarray, list[dict[str, Any]]]]:
        """For each image what ``panoptic_inference`` returns, with the ``"score"`` of each segment.

        Args:
            output_sizes: int [batch, 2], as given to :func:`static_panoptic_inference`, px.
        """
        results = []
        for panoptic_seg, count, *fields, (height, width) in zip(*map(np.asarray, self), np.asarray(output_sizes), strict=True):
            rows = zip(*(field[:count].tolist() for field in fields), strict=True)
            infos = [
                {"id": index, "isthing": isthing, "category_id": category_id, "score": score}
                for index, (category_id, isthing, score) in enumerate(rows, 1)
            ]
            results.append((panoptic_seg[:height, :width], infos))
        return results


def static_semantic_inference(
    outputs: Mapping[str, Any],
    config: MaskFormerConfig,
    image_sizes: tf.Tensor,
    output_sizes: tf.Tensor,
    output_canvas: Sequence[int],
    *,
    postprocess_before_inference: bool | None = None,
) -> tf.Tensor:
    """Scores of each class at each pixel; of a per-pixel baseline, logits. Upstream takes the argmax of these, at the output's size.

    Args:
        outputs: of the model, with its "padded_size" or "valid_sizes".
        config: of the model.
        image_sizes: int32 [batch, 2], (height, width) of each image as given to the model, without padding, px.
        output_sizes: int32 [batch, 2], (height, width) of each result, px. Upstream: the original image's.
        output_canvas: (height, width), at least the largest of ``output_sizes``, px; ints, or scalar tensors where shapes are dynamic.
        postprocess_before_inference: see :func:`tfmaskformer.inference.semantic_inference`.

    Returns:
        float32 (float64 for float64 outputs) [batch, classes, canvas height, canvas width]; 0 outside ``output_sizes``.
    """
    before = config.postprocess_before_inference if postprocess_before_inference is None else postprocess_before_inference
    if "sem_seg" in outputs:
        scores = _resized(*_masks_and_weights(outputs, "sem_seg", image_sizes, output_sizes, output_canvas))
    else:
        image_canvas = [MASK_STRIDE * length for length in static_shape(outputs["pred_masks"])[2:]]
        size = (output_sizes, output_canvas) if before else (image_sizes, image_canvas)
        masks = tf.sigmoid(_resized(*_masks_and_weights(outputs, "pred_masks", image_sizes, *size)))
        probabilities = tf.nn.softmax(_at_least_float32(outputs["pred_logits"]))[..., :-1]
        scores = tf.einsum("bqc,bqhw->bchw", probabilities, masks)
        if not before:
            scores = resize_bilinear(scores, output_canvas, image_sizes, output_sizes)
    return tf.where(valid_pixels(output_sizes, output_canvas)[:, tf.newaxis], scores, tf.zeros([], scores.dtype))


def static_panoptic_inference(
    outputs: Mapping[str, Any],
    config: MaskFormerConfig,
    image_sizes: tf.Tensor,
    output_sizes: tf.Tensor,
    output_canvas: Sequence[int],
    *,
    object_mask_threshold: float | None = None,
    overlap_threshold: float | None = None,
) -> PanopticSegments:
    """One segment, or none, for each pixel: things by instance, stuff by class; see :func:`tfmaskformer.inference.panoptic_inference`.

    Args:
        outputs, config, image_sizes, output_sizes, output_canvas: see :func:`static_semantic_inference`.
        object_mask_threshold, overlap_threshold: default as in ``config.test``.
    """
    test = config.test
    object_mask_threshold = test.object_mask_threshold if object_mask_threshold is None else object_mask_threshold
    overlap_threshold = test.overlap_threshold if overlap_threshold is None else overlap_threshold
    masks, rows, columns = _masks_and_weights(outputs, "pred_masks", image_sizes, output_sizes, output_canvas)
    inside = valid_pixels(output_sizes, output_canvas)
    batch, num_queries = static_shape(masks)[:2]

    # Classes of the probabilities, not of the logits: rounding can make two of them equal, and the first one counts.
    probabilities = tf.nn.softmax(_at_least_float32(outputs["pred_logits"]))
    labels, scores = tf.argmax(probabilities, -1, tf.int32), tf.reduce_max(probabilities, -1)
    kept = (labels != config.num_classes) & (scores > object_mask_threshold)
    # Kept queries first, in their order: the loops end behind the last one.
    order = tf.argsort(tf.where(kept, 0, 1), stable=True)
    labels, scores, kept = (tf.gather(values, order, batch_dims=1) for values in (labels, scores, kept))
    most_kept = tf.reduce_max(tf.reduce_sum(tf.cast(kept, tf.int32), -1))

    def paint(index, best, winners, mask_areas):
        mask = tf.sigmoid(rows @ tf.gather(masks, order[:, index], batch_dims=1) @ columns)
        probability = tf.where(kept[:, index, tf.newaxis, tf.newaxis], scores[:, index, tf.newaxis, tf.newaxis] * mask, best)
        winners = tf.where(probability > best, index, winners)  # a tie stays with the first query
        return index + 1, tf.maximum(best, probability), winners, _with_count(mask_areas, index, (mask >= 0.5) & inside)

    def count(index, areas):
        return index + 1, _with_count(areas, index, (winners == index) & inside)

    def not_done(index, *_):
        return index < most_kept

    no_areas = tf.zeros([batch, num_queries], tf.int32)
    canvas = [batch, *output_canvas]
    state = (0, tf.zeros(canvas, masks.dtype), tf.zeros(canvas, tf.int32), no_areas)
    _, _, winners, mask_areas = tf.while_loop(not_done, paint, state, maximum_iterations=num_queries)
    _, areas = tf.while_loop(not_done, count, (0, no_areas), maximum_iterations=num_queries)

    isthing = tf.gather(tf.constant(np.isin(np.arange(config.num_classes + 1), config.thing_classes)), labels)
    found = kept & (areas > 0) & (mask_areas > 0) & ~_below(areas, mask_areas, overlap_threshold, tf.int32.max)
    # Queries of one stuff class become one segment, that of the first of them.
    alike = found[:, tf.newaxis] & (labels[:, tf.newaxis] == labels[..., tf.newaxis]) & ~isthing[..., tf.newaxis]
    own = tf.range(num_queries)[tf.newaxis]
    first = tf.where(tf.reduce_any(alike, -1), tf.argmax(tf.cast(alike, tf.int32), -1, tf.int32), own)
    is_new = found & (first == own)
    ids = tf.where(found, tf.gather(tf.cumsum(tf.cast(is_new, tf.int32), axis=-1), first, batch_dims=1), 0)
    by_id = tf.argsort(tf.where(is_new, 0, 1), stable=True)
    listed, labels, isthing, scores = (tf.gather(values, by_id, batch_dims=1) for values in (is_new, labels, isthing, scores))
    return PanopticSegments(
        panoptic_seg=tf.where(inside, tf.gather(ids, winners, batch_dims=1), 0),
        count=tf.reduce_sum(tf.cast(is_new, tf.int32), -1),
        category_id=tf.where(listed, labels, -1),
        isthing=listed & isthing,
        score=tf.where(listed, scores, tf.zeros([], scores.dtype)),
    )


def _with_count(counts, index, pixels):
    """int32 [batch, n]: ``counts`` with the number of true ``pixels``, bool [batch, height, width], at ``index``."""
    count = tf.reduce_sum(tf.cast(pixels, tf.int32), [1, 2])
    return tf.where(tf.range(counts.shape[1]) == index, count[:, tf.newaxis], counts)


def _below(numerator, denominator, threshold, largest):
    """Whether the quotient of two ints, rounded to float64, is below the threshold, for denominators up to ``largest``.

    In integers, because a TPU only imitates float64. The quotients that are rounded to less than the threshold are those below the middle
    between it and the float before. No fraction with such a denominator lies between that middle and the closest one to it.
    """
    middle = (Fraction(threshold) + Fraction(float(np.nextafter(threshold, -np.inf)))) / 2
    closest = middle.limit_denominator(largest)
    left, right = tf.cast(numerator, tf.int64) * closest.denominator, tf.cast(denominator, tf.int64) * closest.numerator
    return left <= right if closest < middle else left < right


def _masks_and_weights(outputs, name, image_sizes, output_sizes, output_canvas):
    """Logits [batch, n, height, width] and, for each axis, the matrices that resize them to the canvas that the network saw, crop them to
    the image and resize them to the output: rows [batch, output height, height] @ logits @ columns [batch, width, output width].

    Outside the output's size the result is arbitrary."""
    masks = _at_least_float32(outputs[name])
    canvases = outputs["valid_sizes"] if "valid_sizes" in outputs else tf.broadcast_to(outputs["padded_size"], [static_shape(masks)[0], 2])
    weights = []
    for axis, length in enumerate(static_shape(masks)[2:]):
        valid_length = -(-canvases[:, axis] // MASK_STRIDE)
        # The logits of the per-pixel baselines are enlarged by 4, those of masks to the canvas.
        canvas = canvases[:, axis] if name == "pred_masks" else MASK_STRIDE * valid_length
        on_canvas = bilinear_weights(valid_length, canvas, length, MASK_STRIDE * length, tf.float64)
        # Each output lies between two pixels of the image: gathering them is far less work than a matrix product.
        left, right, fraction = bilinear_taps(image_sizes[:, axis], output_sizes[:, axis], output_canvas[axis], tf.float64)
        first, second = (tf.gather(on_canvas, index, batch_dims=1) for index in (left, right))
        fraction = fraction[..., tf.newaxis]
        weights.append(tf.cast((1 - fraction) * first + fraction * second, masks.dtype))
    return masks, weights[0], tf.transpose(weights[1], [0, 2, 1])


def _resized(masks, rows, columns):
    batch, number, height, width = static_shape(masks)
    wide = tf.reshape(tf.reshape(masks, [batch, number * height, width]) @ columns, [batch, number, height, static_shape(columns)[-1]])
    return rows[:, tf.newaxis] @ wide
