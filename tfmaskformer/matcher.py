"""Which query answers for which object: the costs of upstream ``mask_former/modeling/matcher.py`` and their assignment.

The cost of a pair is ``class_weight · (−softmax probability of the object's class) + mask_weight · focal + dice_weight · dice``, the
masks compared at the resolution of the prediction against the object's mask resized by PyTorch's nearest rule.

Costs are float32 for outputs of every dtype but float64, which stays. Devices that multiply float32 in fewer bits (TPU: bfloat16,
GPU: TF32) would change which query wins. There the products with the masks, which are exactly 0 or 1, are taken of three
pieces of eight bits each, exact in both formats; see :func:`mask_products`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from tfmaskformer.assignment import linear_assignment
from tfmaskformer.config import CriterionConfig
from tfmaskformer.resize import nearest_indices, valid_pixels

FOCAL_ALPHA = 0.25
"""Share of the pixels inside the mask in the focal loss; its exponent γ is 2 (upstream's defaults, never overridden)."""


class Matching(NamedTuple):
    """Costs and assignment of every decoder layer: the final layer first, then 0, 1, …

    Attributes:
        cost_class, cost_mask, cost_dice: float32 or float64 [layers, batch, num_queries, max_objects], unweighted; 0 for padding.
        total: the same, weighted and added.
        assignment: int32 [layers, batch, max_objects], the query of each object; −1 for padding, left-over objects (more objects
            than queries) and everything in an image that is not valid.
        valid: bool [layers, batch], False where a cost was not finite, so that nothing could be matched.
    """

    cost_class: tf.Tensor
    cost_mask: tf.Tensor
    cost_dice: tf.Tensor
    total: tf.Tensor
    assignment: tf.Tensor
    valid: tf.Tensor


class HungarianMatcher:
    """Matches the queries of all decoder layers to the objects in one call.

    Args:
        config: the weights of the costs.
        split_products: whether products with masks are protected against devices that multiply float32 in fewer bits. By
            default this is so where TensorFlow sees a TPU or GPU; set it when compiling for a device that is not there.
    """

    def __init__(self, config: CriterionConfig, split_products: bool | None = None):
        self.config = config
        self.split_products = split_products

    def __call__(self, outputs: Mapping[str, Any], targets: Mapping[str, tf.Tensor]) -> Matching:
        """Costs and assignment.

        Args:
            outputs: of the model: ``pred_logits`` float [batch, num_queries, num_classes + 1], ``pred_masks`` float logits
                [batch, num_queries, height, width], ``aux_outputs`` (may be absent), ``valid_sizes`` int32 [batch, 2] (with
                masked padding), px of the targets' canvas.
            targets: ``labels`` int [batch, max_objects], ``masks`` bool or 0/1 [batch, max_objects, target_height, target_width],
                ``num_objects`` int32 [batch]. What lies behind ``num_objects`` is never looked at.
        """
        split = _low_precision_device() if self.split_products is None else self.split_products
        real = real_objects(targets)
        labels = tf.where(real, tf.cast(targets["labels"], tf.int32), 0)
        dtype = compute_dtype(outputs)
        masks, valid, area = _targets_at(outputs["pred_masks"], targets["masks"], outputs.get("valid_sizes"), dtype)

        def costs(layer):
            logits, pred_masks = (tf.cast(x, dtype) for x in layer)
            return _cost_class(logits, labels), *_costs_masks(pred_masks, masks, valid, area, split)

        layers = tuple(tf.stack([layer[key] for layer in decoder_layers(outputs)]) for key in ("pred_logits", "pred_masks"))
        layers = tf.nest.map_structure(tf.stop_gradient, layers)
        # One layer at a time bounds the memory.
        all_costs = tf.map_fn(costs, layers, fn_output_signature=(dtype, dtype, dtype), parallel_iterations=1)
        cost_class, cost_mask, cost_dice = (tf.where(real[:, tf.newaxis, :], cost, 0) for cost in all_costs)
        total = self.config.mask_weight * cost_mask + self.config.class_weight * cost_class + self.config.dice_weight * cost_dice
        num_objects = tf.broadcast_to(targets["num_objects"], tf.shape(total)[:2])
        return Matching(cost_class, cost_mask, cost_dice, total, *linear_assignment(total, num_objects))


def decoder_layers(outputs: Mapping[str, Any]) -> list[Mapping[str, tf.Tensor]]:
    """The outputs of every decoder layer: the final one first, then 0, 1, …"""
    return [outputs, *outputs.get("aux_outputs", ())]


def real_objects(targets: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """bool [batch, max_objects]: which objects are no padding."""
    return tf.range(tf.shape(targets["labels"])[1]) < targets["num_objects"][:, tf.newaxis]


def compute_dtype(outputs: Mapping[str, tf.Tensor]) -> tf.DType:
    """dtype of costs and losses: float64 for float64 outputs, otherwise float32."""
    return tf.float64 if outputs["pred_masks"].dtype == tf.float64 else tf.float32


def mask_products(values: tf.Tensor, masks: tf.Tensor, split: bool) -> tf.Tensor:
    """Sums of ``values`` over the pixels of each mask, exact to float32 on every device.

    With ``split``, float32 values are cut into three pieces of 8 significant bits, the products are taken apart and added. A piece
    survives rounding to bfloat16 or TF32, so does a mask, and all these devices add in float32. The cut is made on the bits:
    a cast to bfloat16 and back may be optimised away.

    Args:
        values: float32 or float64 [batch, num_queries, pixels].
        masks: same dtype [batch, max_objects, pixels], 0 or 1.

    Returns:
        same dtype [batch, num_queries, max_objects].
    """
    if not split or values.dtype != tf.float32:
        return tf.matmul(values, masks, transpose_b=True)
    pieces = []
    for _ in range(2):
        pieces.append(tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(values, tf.int32), -(2**16)), tf.float32))
        values -= pieces[-1]
    pieces.append(values)
    return tf.add_n([tf.matmul(piece, masks, transpose_b=True) for piece in reversed(pieces)])


def _cost_class(logits, labels):
    """Minus the probability of the object's class, [batch, num_queries, max_objects]."""
    return -tf.gather(tf.nn.softmax(logits), labels, axis=2, batch_dims=1)


def _costs_masks(logits, masks, valid, area, split):
    """Focal and dice cost [batch, num_queries, max_objects] of mask logits; ``masks`` and ``valid`` are flat, 0 or 1."""
    shape = tf.shape(logits)
    logits = tf.reshape(logits, [shape[0], shape[1], shape[2] * shape[3]])
    inside = tf.sigmoid(logits)
    focal_pos = FOCAL_ALPHA * tf.square(tf.sigmoid(-logits)) * tf.nn.softplus(-logits)
    focal_neg = (1 - FOCAL_ALPHA) * tf.square(inside) * tf.nn.softplus(logits)
    cost_mask = mask_products(focal_pos, masks, split) + mask_products(focal_neg, valid - masks, split)
    cost_mask /= area[:, tf.newaxis, tf.newaxis]

    size = tf.reduce_sum(inside * valid, 2)[:, :, tf.newaxis] + tf.reduce_sum(masks, 2)[:, tf.newaxis, :]
    cost_dice = 1 - (2 * mask_products(inside, masks, split) + 1) / (size + 1)
    return cost_mask, cost_dice


def _targets_at(pred_masks, masks, sizes, dtype):
    """Target masks at the prediction's resolution, which pixels count, and how many: [batch, objects|1, pixels], [batch]."""
    batch, _, height, width = tf.unstack(tf.shape(pred_masks))
    if sizes is None:
        sizes = tf.broadcast_to(tf.shape(masks)[2:], [batch, 2])
        small_sizes = tf.broadcast_to([height, width], [batch, 2])
    else:
        small_sizes = -(-sizes // 4)
    for axis, length in enumerate((height, width)):
        indices = nearest_indices(sizes[:, axis], small_sizes[:, axis], length)
        masks = tf.gather(masks, indices, axis=2 + axis, batch_dims=1)
    valid = valid_pixels(small_sizes, (height, width))[:, tf.newaxis]

    def flat(x):
        return tf.cast(tf.reshape(x, [batch, tf.shape(x)[1], height * width]), dtype)

    return flat(tf.cast(masks, tf.bool) & valid), flat(valid), tf.cast(tf.reduce_prod(small_sizes, 1), dtype)


def _low_precision_device() -> bool:
    return any(device.device_type in ("TPU", "GPU") for device in tf.config.list_logical_devices())
