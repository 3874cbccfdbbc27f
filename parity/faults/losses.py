"""Losses of MaskFormers. Those of the per-pixel baselines: :mod:`parity.faults.per_pixel`."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from parity.faults.fault import PANOPTIC, SEMANTIC, Fault, replaced
from tfmaskformer import criterion
from tfmaskformer.criterion import SetCriterion
from tfmaskformer.resize import resize_bilinear


def align_corners(right):
    def along(values, length, axis):
        into = values.shape[axis]
        positions = np.linspace(0, into - 1, int(length))
        low = np.minimum(positions.astype(int), into - 2)
        share = tf.reshape(tf.constant(positions - low, values.dtype), [-1, 1] if axis == 2 else [-1])
        return tf.gather(values, low, axis=axis) * (1 - share) + tf.gather(values, low + 1, axis=axis) * share

    return lambda images, size, *sizes: along(along(images, size[0], 2), size[1], 3)


def own_attribute(name, value):
    """Of the criterion, behind its constructor."""

    def make(right):
        def init(self, *arguments):
            right(self, *arguments)
            setattr(self, name, value(getattr(self, name)))

        return init

    return replaced(SetCriterion, "__init__", make)


def exchanged_weights(weights):
    other = {"loss_mask": "loss_dice", "loss_dice": "loss_mask"}
    return {key: weights[key.replace(key[:9], other.get(key[:9], key[:9]))] for key in weights}


def mask_losses(*, gamma=2.0, smoothing=1.0):
    def make(right):
        def losses(logits, masks, sizes):
            logits = resize_bilinear(logits, tf.shape(masks)[2:])
            inside = tf.cast(masks, logits.dtype)
            probability = tf.sigmoid(logits)
            wrong = inside * (1 - probability) + (1 - inside) * probability
            alpha = 0.25 * inside + 0.75 * (1 - inside)
            cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(inside, logits)
            focal = tf.reduce_mean(alpha * wrong**gamma * cross_entropy, [2, 3])
            both = tf.reduce_sum(probability, [2, 3]) + tf.reduce_sum(inside, [2, 3])
            return focal, 1 - (2 * tf.reduce_sum(probability * inside, [2, 3]) + smoothing) / (both + smoothing)

        return losses

    return replaced(criterion, "_mask_losses", make)


def unweighted_mean(right):
    """Divided by the number of queries, not by the sum of their weights."""

    def loss(self, logits, labels, queries):
        matched = tf.cast(tf.math.count_nonzero(queries >= 0), logits.dtype)
        count = tf.cast(tf.size(logits[..., 0]), logits.dtype)
        weights = matched + tf.cast(self.no_object_weight, logits.dtype) * (count - matched)
        return right(self, logits, labels, queries) * weights / count

    return loss


def not_by_object(right):
    """A mean over the images of the batch."""
    return lambda num_objects: tf.cast(tf.size(num_objects), tf.float32)


def layers_backwards(right):
    def layers(outputs):
        final, *others = right(outputs)
        return [final, *reversed(others)]

    return layers


def unmatched_too(right):
    return lambda outputs, targets, assignment: right(outputs, targets, tf.maximum(assignment, 0))


# fmt: off
FAULTS = (
    Fault("align_corners in the losses", "losses", PANOPTIC, "even", "losses", "loss_mask", "align_corners",
          replaced(criterion, "resize_bilinear", align_corners), first=True),
    Fault("losses divided by one object too many", "losses", PANOPTIC, "even", "losses", "loss_mask", "normaliser",
          replaced(criterion, "_num_masks", lambda right: lambda n: right(n) + 1), first=True),
    Fault("no-object weighs 1, not 0.1", "losses", PANOPTIC, "odd", "losses", "loss_ce", "scale",
          own_attribute("no_object_weight", lambda weight: 1.0)),
    Fault("no-object is class 0 in the loss", "losses", SEMANTIC, "odd", "losses", "loss_ce", "class order",
          own_attribute("num_classes", lambda classes: 0)),
    Fault("classification divided by the number of queries", "losses", PANOPTIC, "odd", "losses", "loss_ce", "normaliser",
          replaced(SetCriterion, "_loss_labels", unweighted_mean)),
    Fault("mask losses divided by the number of images", "losses", PANOPTIC, "batch", "losses", "loss_mask", "normaliser",
          replaced(criterion, "_num_masks", not_by_object)),
    Fault("padding counts as objects", "losses", PANOPTIC, "batch", "losses", "loss_mask", "mask missing",
          replaced(criterion, "_losses_masks", unmatched_too)),
    Fault("dice loss without its 1", "losses", PANOPTIC, "odd", "losses", "loss_dice", "eps", mask_losses(smoothing=1e-6)),
    Fault("focal loss with gamma 1", "losses", SEMANTIC, "odd", "losses", "loss_mask", "exponent", mask_losses(gamma=1.0)),
    Fault("auxiliary losses backwards", "losses", PANOPTIC, "odd", "losses", "loss_ce_0", "layer order",
          replaced(criterion, "decoder_layers", layers_backwards)),
    Fault("weights of focal and dice exchanged", "losses", PANOPTIC, "odd", "losses", "total", "scale",
          own_attribute("weights", exchanged_weights)),
)
# fmt: on
