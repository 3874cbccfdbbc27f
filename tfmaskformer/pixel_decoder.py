"""The pixel decoder: an FPN from ``res2`` … ``res5`` to ``mask_features`` at stride 4.

Source: MaskFormer ``mask_former/modeling/heads/pixel_decoder.py``. As upstream, pixel decoders are used through
``forward_features`` and never called.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.layers import Conv2d, GroupNorm
from tfmaskformer.module import Module
from tfmaskformer.resize import resize_nearest, static_shape, valid_pixels
from tfmaskformer.transformer import PositionEmbeddingSine, TransformerEncoderOnly

IN_FEATURES = ("res2", "res3", "res4", "res5")


class BasePixelDecoder(Module):
    """``adapter_1`` … ``adapter_3`` (1×1) bring features in, ``layer_1`` … ``layer_4`` (3×3) smooth; GroupNorm behind each."""

    def __init__(self, config: MaskFormerConfig, **kwargs: Any):
        super().__init__(**kwargs)
        conv_dim = config.pixel_decoder.conv_dim
        channels = [config.backbone.out_channels[name] for name in IN_FEATURES]
        for index, in_channels in enumerate(channels[:-1], start=1):
            setattr(self, f"adapter_{index}", Conv2d(in_channels, conv_dim, 1, bias=False, norm=GroupNorm(conv_dim)))
            setattr(self, f"layer_{index}", _output_conv(conv_dim, conv_dim))
        setattr(self, f"layer_{len(channels)}", _output_conv(self._top_channels(config), conv_dim))
        self.mask_features = Conv2d(conv_dim, config.pixel_decoder.mask_dim, 3)

    @staticmethod
    def _top_channels(config: MaskFormerConfig) -> int:
        """Input channels of the last output convolution, which has no lateral input."""
        return config.backbone.out_channels[IN_FEATURES[-1]]

    def _top(self, features: tf.Tensor, sizes: tf.Tensor | None) -> tf.Tensor:
        """What goes from ``res5`` into the top-down path."""
        return features

    def forward_features(self, features: dict[str, tf.Tensor], sizes: dict[str, tf.Tensor | None]) -> tuple[tf.Tensor, tf.Tensor]:
        """``mask_features`` ``[batch, height / 4, width / 4, mask_dim]`` and the top of the FPN before its output convolution.

        Args:
            features: ``res2`` … ``res5``, NHWC.
            sizes: the true size of each of them (int32 ``[batch, 2]``), or None where the whole map is true.
        """
        top_name = IN_FEATURES[-1]
        top = self._top(features[top_name], sizes[top_name])
        outputs, below = getattr(self, f"layer_{len(IN_FEATURES)}")(top, sizes[top_name]), sizes[top_name]
        for index in range(len(IN_FEATURES) - 1, 0, -1):
            name = IN_FEATURES[index - 1]
            lateral = getattr(self, f"adapter_{index}")(features[name], sizes[name])
            _, height, width, _ = static_shape(lateral)
            upsampled = resize_nearest(outputs, (height, width), below, sizes[name])
            outputs = getattr(self, f"layer_{index}")(lateral + upsampled, sizes[name])
            below = sizes[name]
        return self.mask_features(outputs, below), top


class TransformerEncoderPixelDecoder(BasePixelDecoder):
    """The same with a transformer encoder on ``res5``, whose raw output is also the memory of the transformer predictor."""

    def __init__(self, config: MaskFormerConfig, **kwargs: Any):
        super().__init__(config, **kwargs)
        conv_dim, predictor = config.pixel_decoder.conv_dim, config.predictor
        self.input_proj = Conv2d(config.backbone.out_channels[IN_FEATURES[-1]], conv_dim, 1)
        self.transformer = TransformerEncoderOnly(
            config.pixel_decoder.transformer_enc_layers, conv_dim, predictor.nheads, predictor.dim_feedforward, predictor.dropout
        )
        self.pe_layer = PositionEmbeddingSine(conv_dim // 2)

    @staticmethod
    def _top_channels(config: MaskFormerConfig) -> int:
        return config.pixel_decoder.conv_dim

    def _top(self, features: tf.Tensor, sizes: tf.Tensor | None) -> tf.Tensor:
        projected = self.input_proj(features)
        return self.transformer(projected, self.pe_layer(features, sizes), sequence_mask(projected, sizes))


def sequence_mask(features: tf.Tensor, sizes: tf.Tensor | None) -> tf.Tensor | None:
    """Bool ``[batch, height · width]``: which positions of a flattened NHWC map exist; None if all do."""
    if sizes is None:
        return None
    batch, height, width, _ = static_shape(features)
    return tf.reshape(valid_pixels(sizes, (height, width)), [batch, height * width])


def _output_conv(in_channels: int, conv_dim: int) -> Conv2d:
    return Conv2d(in_channels, conv_dim, 3, bias=False, norm=GroupNorm(conv_dim), activation=tf.nn.relu)


PIXEL_DECODERS = {cls.__name__: cls for cls in (BasePixelDecoder, TransformerEncoderPixelDecoder)}
