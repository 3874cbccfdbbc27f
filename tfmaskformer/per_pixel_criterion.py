"""The loss of the per-pixel baselines: cross-entropy of the logits, upsampled to the image, at every labelled pixel.

Source: MaskFormer ``mask_former/modeling/heads/per_pixel_baseline.py`` (``losses``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.inference import MASK_STRIDE
from tfmaskformer.resize import bilinear_weights, static_shape, valid_pixels

CHUNK_ROWS = 16
"""Rows of the image that are upsampled at a time; a multiple of the stride wastes nothing."""


class PerPixelCriterion:
    """Cross-entropy of the upsampled logits, the mean over all pixels of the batch that have a label.

    The logits are upsampled by 4, to the padded canvas rounded up to a multiple of 4 (upstream knows only canvases that are one),
    and never held at that size: 16 rows of the image at a time are upsampled, forwards and again backwards. With 847 classes, two images
    of 640×640 px and float32 such a chunk is 69 MB, of which a few live at once, where the whole would be 2.8 GB.

    With masked padding (``outputs["valid_sizes"]``) an image is upsampled as if it were alone, and pixels outside it have no loss.

    Args:
        config: of the model, whose head is a per-pixel baseline.

    Attributes:
        weights: 1 for the key of each loss: as upstream, ``config.criterion.loss_weight`` is in the losses themselves.

    Raises:
        ValueError: the head of ``config`` is another one.
    """

    def __init__(self, config: MaskFormerConfig):
        if config.head == "MaskFormerHead":
            raise ValueError(f"criterion: the head of config {config.name!r} is MaskFormerHead, whose losses are those of SetCriterion")
        self.loss_weight = config.criterion.loss_weight
        self.ignore_value = config.criterion.ignore_value
        deep = config.head == "PerPixelBaselinePlusHead" and config.predictor.deep_supervision
        self.weights = dict.fromkeys(_keys(config.predictor.dec_layers if deep else 1), 1.0)

    def __call__(self, outputs: Mapping[str, Any], targets: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The loss of every decoder layer.

        Args:
            outputs: of the model: ``sem_seg`` float [batch, classes, height, width], ``aux_outputs`` (may be absent), ``padded_size``,
                ``valid_sizes`` int32 [batch, 2] (with masked padding), px.
            targets: ``sem_seg`` int [batch, padded_height, padded_width], the class of each pixel, or ``config.criterion.ignore_value``
                where there is none; fill padding up with that.

        Returns:
            Scalars, float32 (float64 for float64 outputs), by their official keys: ``loss_sem_seg`` of the final layer,
            ``loss_sem_seg_0`` of layer 0 and so on. As upstream, all are NaN, with a gradient of 0, if no pixel has a label. They are NaN,
            gradients too, if a label is neither a class nor the ignore value (upstream raises there).

        Raises:
            ValueError: shapes that do not fit together; what, where, expected and got.
        """
        labels = _checked(outputs, targets)
        layers = [layer["sem_seg"] for layer in (outputs, *outputs.get("aux_outputs", ()))]
        labels = self._labels(labels, outputs)
        return {
            key: self.loss_weight * _cross_entropy(logits, labels, outputs.get("valid_sizes"))
            for key, logits in zip(_keys(len(layers)), layers, strict=True)
        }

    def weighted_total(self, losses: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """The scalar that training minimises: the losses, added."""
        return tf.add_n([self.weights[key] * loss for key, loss in losses.items()])

    def _labels(self, labels: tf.Tensor, outputs: Mapping[str, Any]) -> tf.Tensor:
        """int32 on the canvas of the upsampled logits, −1 for pixels without a label."""
        _, _, height, width = static_shape(outputs["sem_seg"])
        _, rows, columns = static_shape(labels)
        counted = labels != self.ignore_value
        if "valid_sizes" in outputs:
            counted &= valid_pixels(outputs["valid_sizes"], (rows, columns))
        # What is no class must not pass for "no label".
        labels = tf.where(counted, tf.where(labels < 0, tf.int32.max, labels), -1)
        return tf.pad(labels, [[0, 0], [0, MASK_STRIDE * height - rows], [0, MASK_STRIDE * width - columns]], constant_values=-1)


def _keys(num_layers: int) -> list[str]:
    """Official loss keys: of the final layer first, then of 0, 1, …"""
    return ["loss_sem_seg", *(f"loss_sem_seg_{layer}" for layer in range(num_layers - 1))]


def _cross_entropy(logits: tf.Tensor, labels: tf.Tensor, sizes: tf.Tensor | None) -> tf.Tensor:
    """Mean over the pixels that have a label; scalar, float32 at least.

    Args:
        logits: float [batch, classes, height, width].
        labels: int32 [batch, 4 · height, 4 · width], −1 for none.
        sizes: int32 [batch, 2], px of the image that ``logits`` were computed of; None: all of them.
    """
    logits = logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)
    batch, classes, height, width = static_shape(logits)
    chunks = -(-MASK_STRIDE * height // CHUNK_ROWS)
    small = tf.broadcast_to([height, width], [batch, 2]) if sizes is None else -(-sizes // MASK_STRIDE)
    rows = bilinear_weights(small[:, 0], MASK_STRIDE * small[:, 0], height, chunks * CHUNK_ROWS, logits.dtype)
    columns = bilinear_weights(small[:, 1], MASK_STRIDE * small[:, 1], width, MASK_STRIDE * width, logits.dtype)
    below = tf.pad(labels, [[0, 0], [0, chunks * CHUNK_ROWS - MASK_STRIDE * height], [0, 0]], constant_values=-1)

    def cut(by_row: tf.Tensor, length: Any) -> tf.Tensor:
        return tf.transpose(tf.reshape(by_row, [batch, chunks, CHUNK_ROWS, length]), [1, 0, 2, 3])

    pieces = cut(rows, height), cut(below, MASK_STRIDE * width)

    def chunk_sum(logits: tf.Tensor, piece: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        rows, labels = piece
        upsampled = tf.reshape(rows[:, tf.newaxis] @ logits, [batch, classes * CHUNK_ROWS, width])
        upsampled @= tf.transpose(columns, [0, 2, 1])
        upsampled = tf.reshape(upsampled, [batch, classes, CHUNK_ROWS, MASK_STRIDE * width])
        # Against the largest, as PyTorch: where the right class is far above the others, nothing cancels.
        upsampled -= tf.stop_gradient(tf.reduce_max(upsampled, 1, keepdims=True))
        is_label = labels[:, tf.newaxis] == tf.range(classes)[:, tf.newaxis, tf.newaxis]
        of_label = tf.reduce_sum(tf.where(is_label, upsampled, 0), 1)
        losses = tf.where(labels >= 0, tf.math.log(tf.reduce_sum(tf.exp(upsampled), 1)) - of_label, 0)
        return tf.reduce_sum(tf.reduce_sum(losses, 2))

    def chunk_gradient(logits: tf.Tensor, piece: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = chunk_sum(logits, piece)
        return tape.gradient(loss, logits)

    @tf.custom_gradient
    def total(logits: tf.Tensor) -> tuple[tf.Tensor, Any]:
        sums = tf.map_fn(lambda piece: chunk_sum(logits, piece), pieces, fn_output_signature=logits.dtype, parallel_iterations=1)

        def backward(upstream: tf.Tensor) -> tf.Tensor:
            def add(gradient: tf.Tensor, piece: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
                return gradient + chunk_gradient(logits, piece)

            return upstream * tf.foldl(add, pieces, tf.zeros_like(logits), parallel_iterations=1)

        return tf.reduce_sum(sums), backward

    count = tf.math.count_nonzero(labels >= 0, dtype=tf.int32)
    nan = tf.constant(float("nan"), logits.dtype)
    mean = total(logits) / tf.cast(tf.maximum(count, 1), logits.dtype) + tf.where(count == 0, nan, 0)
    return mean * tf.where(tf.reduce_any(labels >= classes), nan, 1)


def _checked(outputs: Mapping[str, Any], targets: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """The labels, int32; ValueError where shapes do not fit together."""
    labels, logits = tf.cast(targets["sem_seg"], tf.int32), outputs["sem_seg"].shape
    for name, shape, rank in (("outputs['sem_seg']", logits, 4), ("targets['sem_seg']", labels.shape, 3)):
        if shape.rank != rank:
            raise ValueError(f"criterion: {name} must have {rank} dimensions, got shape {shape}")
    if not labels.shape[:1].is_compatible_with(logits[:1]):
        raise ValueError(f"criterion: the batch of the targets {labels.shape} is not that of the outputs {logits}")
    grid = [None if length is None else -(-length // MASK_STRIDE) for length in labels.shape[1:]]
    padded = None if outputs.get("padded_size") is None else tf.get_static_value(outputs["padded_size"])
    expected = "a canvas of which they are a fourth, rounded up" if padded is None else f"{padded.tolist()} px, the padded canvas"
    if not logits[2:].is_compatible_with(grid) or (padded is not None and not labels.shape[1:].is_compatible_with(padded.tolist())):
        raise ValueError(
            f"criterion: targets['sem_seg'] lie on {labels.shape[1:].as_list()} px and outputs['sem_seg'] on {logits[2:].as_list()}, "
            f"expected {expected} of the images (outputs['padded_size']); fill the targets up with the ignore value"
        )
    return labels
