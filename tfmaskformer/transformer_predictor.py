"""From features and learned queries to class logits and mask logits.

Source: MaskFormer ``mask_former/modeling/transformer/transformer_predictor.py``; paper section 3.3.
"""

from __future__ import annotations

import itertools
from typing import Any

import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.layers import Conv2d, Embedding, Linear, zero_outside
from tfmaskformer.module import Identity, Module, ModuleSequence
from tfmaskformer.pixel_decoder import sequence_mask
from tfmaskformer.resize import static_shape
from tfmaskformer.transformer import PositionEmbeddingSine, Transformer


class MLP(Module):
    """Linear layers with ReLUs between them."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, num_layers: int, **kwargs: Any):
        super().__init__(**kwargs)
        channels = [in_channels] + [hidden_channels] * (num_layers - 1) + [out_channels]
        self.layers = ModuleSequence([Linear(*pair) for pair in itertools.pairwise(channels)])

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            inputs = tf.nn.relu(layer(inputs))
        return last(inputs)


class TransformerPredictor(Module):
    """Queries attend to a feature map; every decoder layer's state yields classes and, with ``mask_features``, masks.

    Args:
        config: of the model.
        mask_classification: whether queries are classified; if not, each stands for one class (``PerPixelBaselinePlusHead``).
    """

    def __init__(self, config: MaskFormerConfig, mask_classification: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        predictor = config.predictor
        hidden_dim = predictor.hidden_dim
        self.deep_supervision = predictor.deep_supervision
        self.pe_layer = PositionEmbeddingSine(hidden_dim // 2)
        self.transformer = Transformer(
            hidden_dim,
            predictor.nheads,
            predictor.dim_feedforward,
            predictor.dropout,
            enc_layers=predictor.enc_layers,
            dec_layers=predictor.dec_layers,
            return_intermediate_dec=predictor.deep_supervision,
        )
        self.query_embed = Embedding(predictor.num_queries, hidden_dim)
        self.input_proj = Conv2d(config.predictor_in_channels, hidden_dim, 1) if config.predictor_has_input_proj else Identity()
        self.class_embed = Linear(hidden_dim, config.num_classes + 1) if mask_classification else None
        self.mask_embed = MLP(hidden_dim, hidden_dim, config.pixel_decoder.mask_dim, 3)

    def call(
        self,
        features: tf.Tensor,
        mask_features: tf.Tensor,
        sizes: tf.Tensor | None = None,
        mask_sizes: tf.Tensor | None = None,
    ) -> dict[str, Any]:
        """``pred_logits`` if queries are classified, ``pred_masks``; under deep supervision ``aux_outputs`` (decoder layers 0 … last − 1).

        Args:
            features: what the queries attend to, ``[batch, height, width, channels]``, with true ``sizes``.
            mask_features: ``[batch, mask_height, mask_width, mask_dim]``, with true ``mask_sizes``; masks are 0 outside.
        """
        src = self.input_proj(features)
        pos = tf.cast(self.pe_layer(features, sizes), src.dtype)
        query_embed = tf.cast(self.query_embed.weight, src.dtype)
        hs, _ = self.transformer(src, query_embed, pos, sequence_mask(features, sizes))
        classes = [] if self.class_embed is None else [{"pred_logits": logits} for logits in tf.unstack(self.class_embed(hs))]
        mask_features = zero_outside(mask_features, mask_sizes)
        masks = [{"pred_masks": _masks(mask_embed, mask_features)} for mask_embed in tf.unstack(self.mask_embed(hs))]
        layers = [logits | masks for logits, masks in zip(classes, masks, strict=True)] if classes else masks
        outputs = layers[-1]
        if self.deep_supervision:
            outputs["aux_outputs"] = layers[:-1]
        return outputs


def _masks(mask_embed: tf.Tensor, mask_features: tf.Tensor) -> tf.Tensor:
    """Mask logits ``[batch, queries, height, width]``: the product of every query's embedding with every pixel's."""
    batch, height, width, channels = static_shape(mask_features)
    pixels = tf.reshape(mask_features, [batch, height * width, channels])
    masks = tf.matmul(mask_embed, pixels, transpose_b=True)
    return tf.reshape(masks, [batch, mask_embed.shape[1], height, width])
