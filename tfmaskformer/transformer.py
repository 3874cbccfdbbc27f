"""DETR's transformer as MaskFormer uses it: post-norm layers, positions added to queries and keys, no norm behind the encoder.

Source: MaskFormer ``mask_former/modeling/transformer/transformer.py`` and ``position_encoding.py``. Sequences are
``[batch, length, channels]`` (upstream: ``[length, batch, channels]``).
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfmaskformer.layers import Dropout, LayerNorm, Linear, MultiheadAttention
from tfmaskformer.module import Module, ModuleSequence
from tfmaskformer.resize import static_shape


class PositionEmbeddingSine(Module):
    """Sine position embedding, normalised to 2π: ``[batch, height, width, 2 · num_pos_feats]``, always float32, y before x."""

    def __init__(self, num_pos_feats: int, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        exponents = 2 * (np.arange(num_pos_feats) // 2) / num_pos_feats
        self.dim_t = (10000.0**exponents).astype(np.float32)

    def call(self, features: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
        """For the grid of ``features`` ``[batch, height, width, …]``, or of the true ``sizes`` inside it."""
        batch, height, width, _ = static_shape(features)
        if sizes is None:
            sizes = tf.broadcast_to(tf.stack([height, width])[None], [batch, 2])
        rows = self._embed(height, sizes[:, 0])[:, :, None, :]
        columns = self._embed(width, sizes[:, 1])[:, None, :, :]
        channels = rows.shape[-1]
        grid = [batch, height, width, channels]
        return tf.concat([tf.broadcast_to(rows, grid), tf.broadcast_to(columns, grid)], axis=-1)

    def _embed(self, length: Any, sizes: tf.Tensor) -> tf.Tensor:
        """Sines and cosines along one axis, float32 ``[batch, length, num_pos_feats]``."""
        positions = tf.cast(tf.range(1, length + 1), tf.float32)[None, :] / (tf.cast(sizes, tf.float32)[:, None] + 1e-6)
        angles = (positions * np.float32(2 * math.pi))[..., None] / self.dim_t
        batch, length, channels = static_shape(angles)
        pairs = tf.stack([tf.sin(angles[..., 0::2]), tf.cos(angles[..., 1::2])], axis=-1)
        return tf.reshape(pairs, [batch, length, channels])


class TransformerEncoderLayer(Module):
    """Self-attention and feed-forward, each with a residual connection and a norm behind it."""

    is_block = True

    def __init__(self, channels: int, num_heads: int, dim_feedforward: int, dropout: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.self_attn = MultiheadAttention(channels, num_heads, dropout)
        self.linear1 = Linear(channels, dim_feedforward, initializer=keras.initializers.GlorotUniform)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, channels, initializer=keras.initializers.GlorotUniform)
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)

    def call(self, src: tf.Tensor, pos: tf.Tensor, valid_keys: tf.Tensor | None = None) -> tf.Tensor:
        positioned = src + pos
        attended, _ = self.self_attn(positioned, positioned, src, valid_keys)
        src = self.norm1(src + self.dropout1(attended))
        hidden = self.dropout(tf.nn.relu(self.linear1(src)))
        return self.norm2(src + self.dropout2(self.linear2(hidden)))


class TransformerDecoderLayer(Module):
    """Self-attention over the queries, cross-attention to the memory, feed-forward."""

    is_block = True

    def __init__(self, channels: int, num_heads: int, dim_feedforward: int, dropout: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.self_attn = MultiheadAttention(channels, num_heads, dropout)
        self.multihead_attn = MultiheadAttention(channels, num_heads, dropout)
        self.linear1 = Linear(channels, dim_feedforward, initializer=keras.initializers.GlorotUniform)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, channels, initializer=keras.initializers.GlorotUniform)
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)
        self.norm3 = LayerNorm(channels)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.dropout3 = Dropout(dropout)

    def call(
        self, tgt: tf.Tensor, memory: tf.Tensor, pos: tf.Tensor, query_pos: tf.Tensor, valid_keys: tf.Tensor | None = None
    ) -> tf.Tensor:
        positioned = tgt + query_pos
        attended, _ = self.self_attn(positioned, positioned, tgt)
        tgt = self.norm1(tgt + self.dropout1(attended))
        attended, _ = self.multihead_attn(tgt + query_pos, memory + pos, memory, valid_keys)
        tgt = self.norm2(tgt + self.dropout2(attended))
        hidden = self.dropout(tf.nn.relu(self.linear1(tgt)))
        return self.norm3(tgt + self.dropout3(self.linear2(hidden)))


class TransformerEncoder(Module):
    """Encoder layers in a row; with none of them, the identity."""

    def __init__(self, num_layers: int, *layer_arguments: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.layers = ModuleSequence([TransformerEncoderLayer(*layer_arguments) for _ in range(num_layers)])

    def call(self, src: tf.Tensor, pos: tf.Tensor, valid_keys: tf.Tensor | None = None) -> tf.Tensor:
        for layer in self.layers:
            src = layer(src, pos, valid_keys)
        return src


class TransformerDecoder(Module):
    """Decoder layers in a row; one shared norm on the output of each, or of the last alone."""

    def __init__(self, num_layers: int, channels: int, *layer_arguments: Any, return_intermediate: bool, **kwargs: Any):
        super().__init__(**kwargs)
        self.return_intermediate = return_intermediate
        self.layers = ModuleSequence([TransformerDecoderLayer(channels, *layer_arguments) for _ in range(num_layers)])
        self.norm = LayerNorm(channels)

    def call(
        self, tgt: tf.Tensor, memory: tf.Tensor, pos: tf.Tensor, query_pos: tf.Tensor, valid_keys: tf.Tensor | None = None
    ) -> tf.Tensor:
        """``[layers, batch, queries, channels]``, where layers is 1 without ``return_intermediate``."""
        intermediate = []
        for layer in self.layers:
            tgt = layer(tgt, memory, pos, query_pos, valid_keys)
            if self.return_intermediate:
                intermediate.append(self.norm(tgt))
        return tf.stack(intermediate if self.return_intermediate else [self.norm(tgt)])


class Transformer(Module):
    """Encoder and decoder on a feature map and learned queries."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        *,
        enc_layers: int,
        dec_layers: int,
        return_intermediate_dec: bool,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        layer_arguments = (channels, num_heads, dim_feedforward, dropout)
        self.encoder = TransformerEncoder(enc_layers, *layer_arguments)
        self.decoder = TransformerDecoder(dec_layers, *layer_arguments, return_intermediate=return_intermediate_dec)

    def call(
        self, src: tf.Tensor, query_embed: tf.Tensor, pos: tf.Tensor, valid_keys: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Decoder stack ``[layers, batch, queries, channels]`` and encoder memory ``[batch, height, width, channels]``.

        Args:
            src, pos: ``[batch, height, width, channels]``.
            query_embed: ``[queries, channels]``.
            valid_keys: bool ``[batch, height · width]``, True where ``src`` exists, or None for everywhere.
        """
        batch, height, width, channels = static_shape(src)
        pos = tf.reshape(pos, [batch, height * width, channels])
        memory = self.encoder(tf.reshape(src, [batch, height * width, channels]), pos, valid_keys)
        query_pos = tf.tile(query_embed[None], [batch, 1, 1])
        hs = self.decoder(tf.zeros_like(query_pos), memory, pos, query_pos, valid_keys)
        return hs, tf.reshape(memory, [batch, height, width, channels])


class TransformerEncoderOnly(Module):
    """The encoder alone, on a feature map (MaskFormer ``mask_former/modeling/heads/pixel_decoder.py``)."""

    def __init__(self, enc_layers: int, *layer_arguments: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder = TransformerEncoder(enc_layers, *layer_arguments)

    def call(self, src: tf.Tensor, pos: tf.Tensor, valid_keys: tf.Tensor | None = None) -> tf.Tensor:
        """``src``, ``pos`` and the result: ``[batch, height, width, channels]``."""
        batch, height, width, channels = static_shape(src)
        sequence = [batch, height * width, channels]
        memory = self.encoder(tf.reshape(src, sequence), tf.reshape(pos, sequence), valid_keys)
        return tf.reshape(memory, [batch, height, width, channels])
