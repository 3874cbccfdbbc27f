"""The losses of upstream ``mask_former/modeling/criterion.py``: classification, focal and dice, for every decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.matcher import FOCAL_ALPHA, HungarianMatcher, Matching, compute_dtype, decoder_layers
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

    Raises:
        ValueError: the head of ``config`` is a per-pixel baseline; see :class:`~tfmaskformer.per_pixel_criterion.PerPixelCriterion`.
    """

    def __init__(self, config: MaskFormerConfig, split_products: bool | None = None):
        if config.head != "MaskFormerHead":
            raise ValueError(f"criterion: the head of config {config.name!r} is {config.head}, whose loss is that of PerPixelCriterion")
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
            outputs, targets: see :class:`~tfmaskformer.matcher.HungarianMatcher`; ``targets["masks"]`` has the padded canvas,
                ``outputs["padded_size"]`` px. ``targets["num_masks"]`` (float32 scalar) divides the mask losses; absent: the mean
                number of objects of all replicas, at least 1.

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
        return self.matcher(outputs, _checked(outputs, targets))

    def losses(self, outputs: Mapping[str, Any], targets: Mapping[str, tf.Tensor], assignment: tf.Tensor) -> dict[str, tf.Tensor]:
        """All losses, unweighted, under a given assignment (int32 [layers, batch, max_objects])."""
        given = targets.get("num_masks")
        targets = _checked(outputs, targets)
        dtype = compute_dtype(outputs)
        layers = decoder_layers(outputs)
        num_masks = tf.cast(_num_masks(targets["num_objects"]) if given is None else given, dtype)
        losses_mask, losses_dice = _losses_masks(outputs, targets, assignment)
        losses = {}
        for layer, (key_ce, key_mask, key_dice) in enumerate(_keys(len(layers))):
            losses[key_ce] = self._loss_labels(tf.cast(layers[layer]["pred_logits"], dtype), targets["labels"], assignment[layer])
            losses[key_mask] = losses_mask[layer] / num_masks
            losses[key_dice] = losses_dice[layer] / num_masks
        return losses

    def weighted_total(self, losses: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """The scalar that training minimises: the losses times their official weights, added."""
        return tf.add_n([self.weights[key] * loss for key, loss in losses.items()])

    def _loss_labels(self, logits, labels, queries):
        """Cross-entropy over all queries of a layer, a weighted mean; the last class is "no object"."""
        answers = queries[:, :, tf.newaxis] == tf.range(tf.shape(logits)[1])  # [batch, max_objects, num_queries]
        labels = tf.reduce_sum(tf.where(answers, tf.cast(labels, tf.int32)[:, :, tf.newaxis], 0), 1)
        labels = tf.where(tf.reduce_any(answers, 1), labels, self.num_classes)
        # Upstream's buffer empty_weight is float32, whatever the model's dtype became.
        weights = tf.where(labels == self.num_classes, tf.cast(tf.constant(self.no_object_weight, tf.float32), logits.dtype), 1)
        cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.reduce_sum(weights * cross_entropy) / tf.reduce_sum(weights)


def _keys(num_layers):
    """Official loss keys of each layer: the final one first, then 0, 1, …"""
    suffixes = ["", *(f"_{layer}" for layer in range(num_layers - 1))]
    return [tuple(name + suffix for name in ("loss_ce", "loss_mask", "loss_dice")) for suffix in suffixes]


def _losses_masks(outputs, targets, assignment):
    """Focal and dice loss of the matched pairs, each summed over the batch: two tensors [layers]."""
    queries = tf.maximum(assignment, 0)
    logits = tf.stack([tf.gather(layer["pred_masks"], queries[i], batch_dims=1) for i, layer in enumerate(decoder_layers(outputs))])
    masks = tf.cast(targets["masks"], tf.bool)
    sizes = outputs.get("valid_sizes")

    def layer_with_gradients(logits):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(logits)
            losses = _mask_losses(logits, masks, sizes)
        return *losses, *(tape.gradient(loss, logits) for loss in losses)

    @tf.custom_gradient
    def pairs(logits):
        # Layer by layer, and the gradient taken at once: nothing of the targets' size outlives its layer.
        *losses, focal_gradient, dice_gradient = tf.map_fn(
            layer_with_gradients, tf.stop_gradient(logits), fn_output_signature=(logits.dtype,) * 4, parallel_iterations=1
        )

        def backward(focal, dice):
            return focal[..., tf.newaxis, tf.newaxis] * focal_gradient + dice[..., tf.newaxis, tf.newaxis] * dice_gradient

        return losses, backward

    return [tf.reduce_sum(tf.where(assignment >= 0, loss, 0), [1, 2]) for loss in pairs(tf.cast(logits, compute_dtype(outputs)))]


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


def _checked(outputs, targets):
    """The targets as tensors; ValueError with what, where, expected and got where shapes do not fit together."""
    targets = {key: tf.convert_to_tensor(targets[key]) for key in ("labels", "masks", "num_objects")}
    targets["num_objects"] = tf.cast(targets["num_objects"], tf.int32)
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
    padded = None if outputs.get("padded_size") is None else tf.get_static_value(outputs["padded_size"])
    if padded is not None and not target_masks[2:].is_compatible_with(padded.tolist()):
        raise ValueError(
            f"criterion: targets['masks'] lie on {target_masks[2:].as_list()} px, expected {padded.tolist()} px, the padded canvas of the "
            "images (outputs['padded_size']); fill them up with zeros"
        )
    return targets
