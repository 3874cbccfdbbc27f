"""From right outputs to wrong results."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from checkpoints import registry
from parity.faults.fault import PANOPTIC, SEMANTIC, SILENT, Fault, configured, replaced
from parity.faults.losses import align_corners
from tfmaskformer import inference


def kept_queries_of_all_images(right):
    """An image in which nothing is kept has no result: later ones move up."""

    def panoptic_inference(*arguments, **options):
        return [result for result in right(*arguments, **options) if result[1]]

    return panoptic_inference


def every_segment_apart(right):
    """Two queries of one stuff class are two segments."""

    def segments(winners, mask_areas, labels, thing_classes, overlap_threshold):
        ids, info = right(winners, mask_areas, labels, range(1000), overlap_threshold)
        return ids, [segment | {"isthing": segment["category_id"] in thing_classes} for segment in info]

    return segments


def original_ids(right):
    """Contiguous classes looked up among the ids that COCO gives its things, 1 … 90 with gaps."""
    info = registry.dataset("coco_panoptic")
    things = [index for label, index in enumerate(info.dataset_ids or ()) if label in info.thing_classes]

    def segments(winners, mask_areas, labels, thing_classes, overlap_threshold):
        return right(winners, mask_areas, labels, things, overlap_threshold)

    return segments


def ids_from_zero(right):
    return lambda *arguments: (np.maximum(right(*arguments)[0] - 1, 0), right(*arguments)[1])


def other_images_first(right):
    return lambda *arguments, **options: right(*arguments, **options)[::-1]


def half_pixel(right):
    """As ``tf.compat.v1.image.resize_bilinear`` without ``half_pixel_centers``."""

    def resize(maps, size, *sizes):
        def along(values, length, axis):
            into = values.shape[axis]
            positions = np.arange(int(length)) * into / int(length)
            low = positions.astype(int)
            share = tf.reshape(tf.constant(positions - low, values.dtype), [-1, 1] if axis == -2 else [-1])
            return tf.gather(values, low, axis=axis) * (1 - share) + tf.gather(values, np.minimum(low + 1, into - 1), axis=axis) * share

        return along(along(maps, size[0], -2), size[1], -1)

    return resize


def aligned(right):
    """``align_corners=True`` of two axes."""
    return lambda maps, size: align_corners(right)(maps[tf.newaxis, tf.newaxis], size)[0, 0]


def not_cropped(right):
    return lambda maps, canvas, image, output: right(maps, canvas, canvas, output)


class _NoObjectLeftOut:
    """``tf`` for the module, whose softmax is over the classes without "no object"."""

    class nn:  # noqa: N801
        @staticmethod
        def softmax(logits):
            return tf.concat([tf.nn.softmax(logits[:, :-1]), tf.zeros_like(logits[:, :1])], 1)

    def __getattr__(self, name):
        return getattr(tf, name)


BEFORE = "sem_seg_postprocessing_before_inference"

# fmt: off
FAULTS = (
    Fault("panoptic ids start at 0", "post-processing", PANOPTIC, "even", "inference", "0/panoptic_seg", "id",
          replaced(inference, "_segments", ids_from_zero), first=True),
    Fault("score threshold of 0.5", "post-processing", PANOPTIC, "odd", "inference", "0/panoptic_seg", "threshold",
          configured(test={"object_mask_threshold": 0.5})),
    Fault("overlap threshold of 0.5", "post-processing", PANOPTIC, "odd", "inference", "0/panoptic_seg", "threshold",
          configured(test={"overlap_threshold": 0.5})),
    Fault("stuff not merged", "post-processing", PANOPTIC, "odd", "inference", "0/panoptic_seg", "id",
          replaced(inference, "_segments", every_segment_apart)),
    Fault("things looked up by the data set's ids", "post-processing", PANOPTIC, "batch", "inference", "0/segments", "id",
          replaced(inference, "_segments", original_ids)),
    Fault("images without a kept query left out", "post-processing", SILENT, "batch", "inference", "0/panoptic_seg", "id",
          replaced(inference, "panoptic_inference", kept_queries_of_all_images)),
    Fault("results of the other image", "post-processing", PANOPTIC, "batch", "inference", "0/sem_seg", "axis order",
          replaced(inference, "semantic_inference", other_images_first)),
    Fault("probabilities resized, not logits", "post-processing", PANOPTIC, "odd", "inference", "0/resized/sem_seg", "layer order",
          replaced(inference, "semantic_inference",
                   lambda right: lambda *arguments: right(*arguments, postprocess_before_inference=False))),
    Fault("logits resized, not probabilities", "post-processing", SEMANTIC, "odd", "inference", "0/resized/sem_seg", "layer order",
          configured(test={BEFORE: True})),
    Fault("probabilities without no-object", "post-processing", SEMANTIC, "odd", "inference", "0/sem_seg", "normaliser",
          replaced(inference, "tf", lambda right: _NoObjectLeftOut())),
    Fault("padding not cut off", "post-processing", SEMANTIC, "odd", "inference", "0/sem_seg", "padding",
          replaced(inference, "_axis_weights", not_cropped)),
    Fault("masks resized without half pixels", "post-processing", PANOPTIC, "odd", "inference", "0/sem_seg", "half-pixel",
          replaced(inference, "resize_bilinear", half_pixel)),
    Fault("masks resized with align_corners", "post-processing", PANOPTIC, "odd", "inference", "0/sem_seg", "align_corners",
          replaced(inference, "resize_bilinear", aligned)),
)
# fmt: on
