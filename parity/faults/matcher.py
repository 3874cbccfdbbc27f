"""Costs and assignment that are others.

Costs that are not numbers, of which other ports make a constant, occur in no trace of a working model; a probe has them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from parity.faults.fault import PANOPTIC, SEMANTIC, SWIN, Fault, replaced
from tfmaskformer import matcher
from tfmaskformer.assignment import Assignment
from tfmaskformer.resize import resize_bilinear


def smaller_dice(right):
    def costs(*arguments):
        cost_mask, cost_dice = right(*arguments)
        return cost_mask, cost_dice * 0.999

    return costs


def weighted(**weights):
    def make(right):
        def init(self, config, *rest):
            right(self, dataclasses.replace(config, **weights), *rest)

        return init

    return replaced(matcher.HungarianMatcher, "__init__", make)


def logits_for_probabilities(right):
    return lambda logits, labels: -tf.gather(logits, labels, axis=2, batch_dims=1)


def classes_from_one(right):
    return lambda logits, labels: right(logits, labels + 1)


def bilinear_targets(right):
    def targets_at(pred_masks, masks, sizes, dtype):
        _, valid, area = right(pred_masks, masks, sizes, dtype)
        small = resize_bilinear(tf.cast(masks, dtype), pred_masks.shape[2:])
        return tf.reshape(small, [*masks.shape[:2], -1]), valid, area

    return targets_at


def half_pixel_indices(right):
    def nearest_indices(in_size, out_size, length=None):
        in_size, out_size = (tf.convert_to_tensor(size, tf.int32)[..., tf.newaxis] for size in (in_size, out_size))
        index = tf.range(out_size[0] if length is None else length)
        return tf.minimum((2 * index + 1) * in_size // (2 * out_size), in_size - 1)

    return nearest_indices


def without_smoothing(right):
    def costs(logits, masks, valid, area, split):
        cost_mask, _ = right(logits, masks, valid, area, split)
        inside = tf.sigmoid(tf.reshape(logits, [*logits.shape[:2], -1]))
        size = tf.reduce_sum(inside * valid, 2)[:, :, tf.newaxis] + tf.reduce_sum(masks, 2)[:, tf.newaxis, :]
        return cost_mask, 1 - 2 * tf.matmul(inside, masks, transpose_b=True) / (size + 1e-6)

    return costs


def pairs_torn(right):
    """SciPy's (row, column) taken for (column, row): the queries come in ascending order, whose object is whose is lost."""

    def assignment(cost, num_objects):
        found = right(cost, num_objects)
        return Assignment(tf.sort(found.queries, axis=-1), found.valid)

    return assignment


def greedy(right):
    """The cheapest pair first."""

    def assignment(cost, num_objects):
        costs, counts = cost.numpy(), np.broadcast_to(num_objects, cost.shape[:-2])
        queries = np.full((*cost.shape[:-2], cost.shape[-1]), -1, np.int32)
        for place in np.ndindex(*counts.shape):
            left = costs[place][:, : counts[place]].copy()
            for _ in range(min(left.shape)):
                query, target = np.unravel_index(left.argmin(), left.shape)
                queries[(*place, target)] = query
                left[query], left[:, target] = np.inf, np.inf
        return Assignment(tf.constant(queries), tf.ones(counts.shape, tf.bool))

    return assignment


def finite(right):
    """As in other ports: what is not a number costs 100."""
    return lambda cost, num_objects: right(tf.where(tf.math.is_finite(cost), cost, tf.constant(100.0, cost.dtype)), num_objects)


# fmt: off
FAULTS = (
    Fault("dice cost off by a thousandth", "matcher", PANOPTIC, "even", "matcher", "final/0/cost_dice", "scale",
          replaced(matcher, "_costs_masks", smaller_dice), first=True),
    Fault("costs of masks weigh 1, not 20", "matcher", PANOPTIC, "odd", "matcher", "final/0/total", "scale", weighted(mask_weight=1.0)),
    Fault("costs of logits, not probabilities", "matcher", PANOPTIC, "odd", "matcher", "final/0/cost_class", "missing term",
          replaced(matcher, "_cost_class", logits_for_probabilities)),
    Fault("classes from 1 in the costs", "matcher", PANOPTIC, "odd", "matcher", "final/0/cost_class", "class order",
          replaced(matcher, "_cost_class", classes_from_one)),
    Fault("bilinear targets", "matcher", PANOPTIC, "odd", "matcher", "final/0/cost_mask", "interpolation",
          replaced(matcher, "_targets_at", bilinear_targets)),
    Fault("half-pixel targets", "matcher", PANOPTIC, "odd", "matcher", "final/0/cost_mask", "half-pixel",
          replaced(matcher, "nearest_indices", half_pixel_indices)),
    Fault("dice cost without its 1", "matcher", SWIN, "odd", "matcher", "final/0/cost_dice", "eps",
          replaced(matcher, "_costs_masks", without_smoothing)),
    Fault("focal cost with alpha for objects and background exchanged", "matcher", SEMANTIC, "odd", "matcher", "final/0/cost_mask", "scale",
          replaced(matcher, "FOCAL_ALPHA", lambda right: 1 - right)),
    Fault("target and prediction exchanged", "matcher", PANOPTIC, "odd", "matcher", "final/0/assignment", "axis order",
          replaced(matcher, "linear_assignment", pairs_torn)),
    Fault("greedy assignment", "matcher", PANOPTIC, "odd", "matcher", "final/0/assignment", "assignment",
          replaced(matcher, "linear_assignment", greedy)),
    Fault("costs that are not numbers replaced by a constant", "matcher", PANOPTIC, "odd", "matcher", "probe/not a number", "not finite",
          replaced(matcher, "linear_assignment", finite)),
)
# fmt: on
