"""The per-pixel baselines: their loss, deep supervision and inference."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from parity.faults.fault import PER_PIXEL, PER_PIXEL_PLUS, PREDICTOR, Fault, replaced
from tfmaskformer import heads, inference, per_pixel_criterion
from tfmaskformer.per_pixel_criterion import PerPixelCriterion


def other_order(right):
    def call(self, features, sizes):
        outputs = right(self, features, sizes)
        return {**outputs, "aux_outputs": outputs["aux_outputs"][::-1]}

    return call


def final_layer_everywhere(right):
    def call(self, features, sizes):
        outputs = right(self, features, sizes)
        return {**outputs, "aux_outputs": [{"sem_seg": outputs["sem_seg"]} for _ in outputs["aux_outputs"]]}

    return call


def align_corners(right):
    def weights(in_size, out_size, in_length, out_length, dtype):
        (into,), (out,) = np.unique(in_size), np.unique(out_size)
        positions = np.minimum(np.arange(out_length) * (into - 1) / (out - 1), into - 1)
        table = np.maximum(1 - np.abs(positions[:, np.newaxis] - np.arange(in_length)), 0)
        return tf.constant(np.broadcast_to(table, (len(in_size), *table.shape)), dtype)

    return weights


def over_all_pixels(right):
    """The sum divided by the number of all pixels, not of those with a label."""

    def mean(logits, labels, sizes):
        return right(logits, labels, sizes) * tf.reduce_mean(tf.cast(labels >= 0, logits.dtype))

    return mean


def ignored_is_the_last_class(model):
    def make(right):
        def labels(self, labels, outputs):
            return right(self, tf.where(labels == self.ignore_value, model.config.num_classes - 1, labels), outputs)

        return labels

    return replaced(PerPixelCriterion, "_labels", make)(model)


def classes_from_one(model):
    """Label 0 is taken for "none", as ADE20K's files have it."""

    def make(right):
        return lambda self, labels, outputs: right(self, tf.where(labels == 0, self.ignore_value, labels - 1), outputs)

    return replaced(PerPixelCriterion, "_labels", make)(model)


def pieces_lost(right):
    return lambda add, pieces, *more, **options: right(add, [piece[1:] for piece in pieces], *more, **options)


HEAD = heads.PerPixelBaselinePlusHead

# fmt: off
FAULTS = (
    Fault("deep supervision in another order", "layers", PER_PIXEL_PLUS, "odd", "taps", "sem_seg_head", "layer order",
          replaced(HEAD, "call", other_order), first=True),
    Fault("deep supervision of the final layer only", "layers", PER_PIXEL_PLUS, "odd", "taps", "sem_seg_head", "layer order",
          replaced(HEAD, "call", final_layer_everywhere), first=True),
    Fault("ignored pixels are a class", "losses", PER_PIXEL, "odd", "losses", "loss_sem_seg", "mask missing",
          ignored_is_the_last_class, first=True),
    Fault("mean over ignored pixels too", "losses", PER_PIXEL, "odd", "losses", "loss_sem_seg", "normaliser",
          replaced(per_pixel_criterion, "_cross_entropy", over_all_pixels), first=True),
    Fault("align_corners in the loss", "losses", PER_PIXEL, "odd", "losses", "loss_sem_seg", "align_corners",
          replaced(per_pixel_criterion, "bilinear_weights", align_corners), first=True),
    Fault("upsampled across the true border", "losses", PER_PIXEL, "odd", "losses", "loss_sem_seg", "padding",
          replaced(per_pixel_criterion, "_cross_entropy", lambda right: lambda logits, labels, sizes: right(logits, labels, None)),
          padding="masked", first=True),
    Fault("a chunk without a gradient", "gradients", PER_PIXEL, "odd", "gradients", PREDICTOR, "missing term",
          replaced(tf, "foldl", pieces_lost), first=True),
    Fault("probabilities instead of logits", "post-processing", PER_PIXEL, "odd", "inference", "0/sem_seg", "extra term",
          replaced(inference, "_at_least_float32", lambda right: lambda values: tf.nn.softmax(right(values), 1)), first=True),
    Fault("upsampled to the image instead of by 4", "post-processing", PER_PIXEL, "odd", "inference", "0/sem_seg", "padding",
          replaced(inference, "_axis_weights", lambda right: lambda maps, canvas, image, output: right(maps, image, image, output)),
          first=True),
    Fault("labels from 1 in the loss", "losses", PER_PIXEL_PLUS, "odd", "losses", "loss_sem_seg", "class order", classes_from_one),
)
# fmt: on
