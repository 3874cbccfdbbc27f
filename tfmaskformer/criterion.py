"""The losses of upstream ``mask_former/modeling/criterion.py``: classification, focal and dice, for every decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.matcher import FOCAL_ALPHA, HungarianMatcher, Matching, compute_dtype, decoder_layers, real_objects
from tfmaskformer.resize import resize_bilinear, valid_pixels


class SetCriterion:
    """Matches queries to objects, then measures them.

    With masked padding (``outputs["valid_sizes"]``) every cost and loss is what the image alone gives.

    Args:
        config: of the model.
        split_products: see :class:`~tfmaskformer.matcher.HungarianMatcher`.

    Attributes:
        weights: the official weight of each loss, by the loss's key.
        matcher: the :class:`~tfmaskformer.matcher.HungarianMatcher`.
    """

    def __init__(self, config: MaskFormerConfig, split_products: bool | None = None):
        weights = config.criterion
        self.num_classes = config.num_classes
        self.no_object_weight = weights.no_object_weight
        self.matcher = HungarianMatcher(weights, split_products)
        one_layer = {"loss_ce": weights.class_weight, "loss_mask": weights.mask_weight, "loss_dice": weights.dice_weight}
        aux_layers = config.predictor.dec_layers - 1 if config.predictor.deep_supervision else 0
        suffixes = ["", *(f"_{layer}" for layer in range(aux_layers))]
        self.weights = {key + suffix: weight for suffix in suffixes for key, weight in one_layer.items()}

    def __call__(self, outputs: Mapping[str, Any], targets: Mapping[str, tf.Tensor]) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        """All losses, unweighted, and the assignment they were measured under.

        Args:
            outputs, targets: see :class:`~tfmaskformer.matcher.HungarianMatcher`; ``targets["masks"]`` has the canvas of the images.

        Returns:
            losses: scalars, float32 (float64 for float64 outputs), by their official keys: ``loss_ce``, ``loss_mask``,
                ``loss_dice`` of the final layer, ``loss_ce_0`` … of layer 0 and so on. A layer's losses are NaN where its costs
                were not finite (upstream raises there).
            assignment: int32 [layers, batch, max_objects], the query of each object, −1 for none; final layer first, then 0, 1, …
        """
        matching = self.match(outputs, targets)
        losses = self.losses(outputs, targets, matching.assignment)
        unmatched = tf.where(tf.reduce_all(matching.valid, 1), 0.0, float("nan"))
        for layer, keys in enumerate(_keys(len(decoder_layers(outputs)))):
            losses |= {key: losses[key] + tf.cast(unmatched[layer], losses[key].dtype) for key in keys}
        return losses, matching.assignment

    def match(self, outputs: Mapping[str, Any], targets: Mapping[str, tf.Tensor]) -> Matching:
        """Costs and assignment of every decoder layer."""
        _check(outputs, targets)
        return self.matcher(outputs, targets)

    def losses(self, outputs: Mapping[str, Any], targets: Mapping[str, tf.Tensor], assignment: tf.Tensor) -> dict[str, tf.Tensor]:
        """All losses, unweighted, under a given assignment (int32 [layers, batch, max_objects])."""
        _check(outputs, targets)
        num_masks = _num_masks(targets["num_objects"])
        losses = {}
        layers = decoder_layers(outputs)
        for layer, keys, queries in zip(layers, _keys(len(layers)), tf.unstack(assignment, len(layers)), strict=True):
            loss_ce = self._loss_labels(layer, targets, queries)
            loss_mask, loss_dice = _loss_masks(layer, targets, queries, outputs.get("valid_sizes"))
            num = tf.cast(num_masks, loss_mask.dtype)
            losses |= dict(zip(keys, (loss_ce, loss_mask / num, loss_dice / num), strict=True))
        return losses

    def weighted_total(self, losses: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """The scalar that training minimises: the losses times their official weights, added."""
        return tf.add_n([self.weights[key] * loss for key, loss in losses.items()])

    def _loss_labels(self, outputs, targets, queries):
        """Cross-entropy over all queries, a weighted mean; the last class is "no object"."""
        logits = tf.cast(outputs["pred_logits"], compute_dtype(outputs))
        answers = queries[:, :, tf.newaxis] == tf.range(tf.shape(logits)[1])  # [batch, max_objects, num_queries]
        labels = tf.cast(targets["labels"], tf.int32)[:, :, tf.newaxis]
        labels = tf.where(tf.reduce_any(answers, 1), tf.reduce_sum(tf.where(answers, labels, 0), 1), self.num_classes)
        # Upstream's buffer empty_weight is float32, whatever the model's dtype became.
        weights = tf.where(labels == self.num_classes, tf.cast(tf.constant(self.no_object_weight, tf.float32), logits.dtype), 1)
        cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.reduce_sum(weights * cross_entropy) / tf.reduce_sum(weights)


def _keys(num_layers):
    """Official loss keys of each layer: the final one first, then 0, 1, …"""
    suffixes = ["", *(f"_{layer}" for layer in range(num_layers - 1))]
    return [tuple(name + suffix for name in ("loss_ce", "loss_mask", "loss_dice")) for suffix in suffixes]


def _loss_masks(outputs, targets, queries, sizes):
    """Focal and dice loss of the matched pairs, each summed over the batch: two scalars."""
    logits = tf.gather(tf.cast(outputs["pred_masks"], compute_dtype(outputs)), tf.maximum(queries, 0), batch_dims=1)
    matched = queries >= 0
    # Only the small masks are kept for the gradient; at full size they are made anew, one layer at a time.
    masks = tf.cast(targets["masks"], tf.bool)
    focal, dice = tf.recompute_grad(lambda logits: _mask_losses(logits, masks, sizes))(logits)
    return tuple(tf.reduce_sum(tf.where(matched, loss, 0)) for loss in (focal, dice))


def _mask_losses(logits, masks, sizes):
    """Focal (mean over pixels) and dice loss of each pair, [batch, max_objects], at the targets' size."""
    canvas = tf.shape(masks)[2:]
    if sizes is None:
        logits = resize_bilinear(logits, canvas)
        area = tf.reduce_prod(canvas)
        keep = tf.identity
    else:
        logits = resize_bilinear(logits, canvas, -(-sizes // 4), sizes)
        area = tf.reduce_prod(sizes, 1, keepdims=True)
        valid = valid_pixels(sizes, canvas)[:, tf.newaxis]
        masks &= valid

        def keep(x):
            return tf.where(valid, x, 0)

    def pixels(x):
        return tf.reduce_sum(tf.reduce_sum(x, 3), 2)

    wrong = tf.where(masks, -logits, logits)  # the logit of the wrong answer
    wrong_probability = tf.sigmoid(wrong)
    alpha = tf.where(masks, tf.constant(FOCAL_ALPHA, logits.dtype), 1 - FOCAL_ALPHA)
    focal = pixels(keep(alpha * tf.square(wrong_probability) * tf.nn.softplus(wrong))) / tf.cast(area, logits.dtype)
    probability = keep(tf.where(masks, 1 - wrong_probability, wrong_probability))
    inside = pixels(tf.where(masks, probability, 0))
    dice = 1 - (2 * inside + 1) / (pixels(probability) + pixels(tf.cast(masks, logits.dtype)) + 1)
    return focal, dice


def _num_masks(num_objects):
    """The normaliser: objects per replica, at least 1; float32 scalar."""
    total = tf.cast(tf.reduce_sum(num_objects), tf.float32)
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1 and not tf.distribute.in_cross_replica_context():
        total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, total) / replicas
    return tf.maximum(total, 1)


def _check(outputs, targets):
    """Raises ValueError with what, where, expected and got where shapes do not fit together."""
    logits, masks = outputs["pred_logits"].shape, outputs["pred_masks"].shape
    labels, target_masks = targets["labels"].shape, targets["masks"].shape
    for name, shape, rank in (
        ("outputs['pred_logits']", logits, 3),
        ("outputs['pred_masks']", masks, 4),
        ("targets['labels']", labels, 2),
        ("targets['masks']", target_masks, 4),
        ("targets['num_objects']", targets["num_objects"].shape, 1),
    ):
        if shape.rank != rank:
            raise ValueError(f"criterion: {name} must have {rank} dimensions, got shape {shape}")
    if not logits[:2].is_compatible_with(masks[:2]):
        raise ValueError(f"criterion: [batch, num_queries] of pred_logits {logits} and pred_masks {masks} differ")
    if not labels.is_compatible_with(target_masks[:2]):
        raise ValueError(f"criterion: [batch, max_objects] of targets['labels'] {labels} and targets['masks'] {target_masks} differ")
    if not labels[:1].is_compatible_with(logits[:1]):
        raise ValueError(f"criterion: the batch of the targets {labels} is not that of the outputs {logits}")
