"""Layers that compute something else: ResNet, pixel decoder, transformer and predictor."""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest import mock

import tensorflow as tf

from parity.faults.fault import (
    DECODER,
    DEEPLAB,
    ENCODER,
    PANOPTIC,
    PIXEL,
    PREDICTOR,
    SEMANTIC,
    Fault,
    attribute,
    each,
    replaced,
    together,
)
from tfmaskformer import layers, pixel_decoder, resize, resnet, transformer
from tfmaskformer.module import record_taps


def eps(value):
    return lambda module: value


# --- ResNet


def same_padding(right):
    def conv2d(inputs, kernel, stride, padding):
        return right(inputs, kernel, stride, "SAME" if stride == 2 and kernel.shape[0] == 3 else padding)

    return conv2d


def pool_same(right):
    return lambda self, inputs, sizes=None: tf.nn.max_pool2d(tf.nn.relu(self.conv1(inputs, sizes)), 3, 2, "SAME")


def without_relus(right):
    def call(self, inputs, sizes=None):
        with mock.patch.object(tf.nn, "relu", lambda values: values):
            return right(self, inputs, sizes)

    return call


def stride_in_1x1(stage):
    """Detectron2's ``STRIDE_IN_1X1``, as in the ResNets of MSRA."""
    block = f"backbone.{stage}.0"
    return together(attribute(f"{block}.conv1", "stride", 2), attribute(f"{block}.conv2", "stride", 1))


# --- pixel decoder


def half_pixel_nearest(right):
    def resize_nearest(images, size, *sizes):
        rows, columns = (
            tf.cast((tf.range(out) * 2 + 1) * into // (2 * out), tf.int32) for out, into in zip(size, images.shape[1:3], strict=True)
        )
        return tf.gather(tf.gather(images, rows, axis=1), columns, axis=2)

    return resize_nearest


def always_twice(right):
    """As large as possible, then cut at the top and left."""
    return lambda images, size, *sizes: tf.repeat(tf.repeat(images, 2, axis=1), 2, axis=2)[:, -size[0] :, -size[1] :]


def bilinear(right):
    return lambda images, size, *sizes: tf.transpose(resize.resize_bilinear(tf.transpose(images, [0, 3, 1, 2]), size), [0, 2, 3, 1])


def memory_after_output_conv(right):
    def forward_features(self, features, sizes):
        mask_features, top = right(self, features, sizes)
        with record_taps():  # into nowhere
            return mask_features, self.layer_4(top)

    return forward_features


# --- transformer


def heads_last(right):
    def split(self, inputs):
        batch, length, channels = inputs.shape
        return tf.transpose(tf.reshape(inputs, [batch, length, channels // self.num_heads, self.num_heads]), [0, 3, 1, 2])

    return split


def scaled_by_all_channels(right):
    """1 / √channels instead of 1 / √(channels of a head), with 8 heads."""
    return SimpleNamespace(sqrt=lambda value: math.sqrt(value / 8), inf=math.inf)


def x_before_y(right):
    def call(self, features, sizes=None):
        return tf.concat(tf.split(right(self, features, sizes), 2, axis=-1)[::-1], axis=-1)

    return call


def positions_from_zero(right):
    def embed(self, length, sizes):
        one = right(self, length, sizes)
        zero = tf.tile(tf.constant([[[0.0, 1.0]]]), [one.shape[0], 1, one.shape[2] // 2])
        return tf.concat([zero, one[:, :-1]], axis=1)

    return embed


def sines_before_cosines(right):
    def embed(self, length, sizes):
        pairs = right(self, length, sizes)
        return tf.concat([pairs[..., 0::2], pairs[..., 1::2]], axis=-1)

    return embed


def position_on_the_value(right):
    def call(self, src, pos, valid_keys=None):
        positioned = src + pos
        attended, _ = self.self_attn(positioned, positioned, positioned, valid_keys)
        src = self.norm1(src + self.dropout1(attended))
        hidden = self.dropout(tf.nn.relu(self.linear1(src)))
        return self.norm2(src + self.dropout2(self.linear2(hidden)))

    return call


def decoder_layer(*, self_positions=True, cross_positions=True, memory_positions=True, activation=tf.nn.relu):
    def make(right):
        def call(self, tgt, memory, pos, query_pos, valid_keys=None):
            positioned = tgt + query_pos if self_positions else tgt
            attended, _ = self.self_attn(positioned, positioned, tgt)
            tgt = self.norm1(tgt + self.dropout1(attended))
            query, key = tgt + query_pos if cross_positions else tgt, memory + pos if memory_positions else memory
            attended, _ = self.multihead_attn(query, key, memory, valid_keys)
            tgt = self.norm2(tgt + self.dropout2(attended))
            hidden = self.dropout(activation(self.linear1(tgt)))
            return self.norm3(tgt + self.dropout3(self.linear2(hidden)))

        return call

    return replaced(transformer.TransformerDecoderLayer, "call", make)


def norm_first(right):
    def call(self, tgt, memory, pos, query_pos, valid_keys=None):
        normed = self.norm1(tgt)
        attended, _ = self.self_attn(normed + query_pos, normed + query_pos, normed)
        tgt += self.dropout1(attended)
        attended, _ = self.multihead_attn(self.norm2(tgt) + query_pos, memory + pos, memory, valid_keys)
        tgt += self.dropout2(attended)
        hidden = self.dropout(tf.nn.relu(self.linear1(self.norm3(tgt))))
        return tgt + self.dropout3(self.linear2(hidden))

    return call


def only_the_last_is_normed(right):
    def call(self, tgt, memory, pos, query_pos, valid_keys=None):
        states = []
        for layer in self.layers:
            tgt = layer(tgt, memory, pos, query_pos, valid_keys)
            states.append(tgt)
        return tf.stack([*states[:-1], self.norm(states[-1])])

    return call


def norm_behind_the_encoder(right):
    def call(self, src, pos, valid_keys=None):
        outputs = right(self, src, pos, valid_keys)
        centred = outputs - tf.reduce_mean(outputs, -1, keepdims=True)
        return centred * tf.math.rsqrt(tf.reduce_mean(tf.square(centred), -1, keepdims=True) + layers.EPSILON)

    return call


def unbiased_layer_norm(right):
    """As ``x.std()`` in PyTorch: divided by one less than the number of channels."""

    def call(self, inputs):
        channels = inputs.shape[-1]
        centred = inputs - tf.reduce_mean(inputs, -1, keepdims=True)
        variance = tf.reduce_sum(tf.square(centred), -1, keepdims=True) / (channels - 1)
        return centred * tf.math.rsqrt(variance + self.eps) * self.weight + self.bias

    return call


POSITIONS = transformer.PositionEmbeddingSine

# fmt: off
FAULTS = (
    Fault("GroupNorm eps 1e-6", "layers", PANOPTIC, "even", "taps", f"{PIXEL}.layer_4.norm", "eps",
          each(layers.GroupNorm, "eps", eps(1e-6)), first=True),
    Fault("FrozenBatchNorm eps 1e-6", "layers", PANOPTIC, "even", "taps", "backbone.stem.conv1.norm", "eps",
          each(layers.FrozenBatchNorm2d, "eps", eps(1e-6)), first=True),
    Fault("LayerNorm eps 1e-6", "layers", PANOPTIC, "even", "taps", f"{ENCODER}.layers.0.norm1", "eps",
          each(layers.LayerNorm, "eps", eps(1e-6)), first=True),
    Fault("same padding on stride 2", "layers", PANOPTIC, "even", "taps", "backbone.res3.0.conv2", "padding side",
          replaced(tf.nn, "conv2d", same_padding), first=True),
    Fault("same padding of the max pool", "layers", PANOPTIC, "even", "taps", "backbone.stem", "padding side",
          replaced(resnet.BasicStem, "call", pool_same), first=True),
    Fault("half-pixel nearest", "layers", PANOPTIC, "odd", "taps", f"{PIXEL}.layer_3", "half-pixel",
          replaced(pixel_decoder, "resize_nearest", half_pixel_nearest), first=True),
    Fault("heads split the other way", "layers", PANOPTIC, "even", "taps", f"{ENCODER}.layers.0.self_attn", "head split order",
          replaced(layers.MultiheadAttention, "_split_heads", heads_last), first=True),
    Fault("memory taken after the output conv", "layers", PANOPTIC, "even", "taps", f"{PREDICTOR}.input_proj", "layer order",
          replaced(pixel_decoder.BasePixelDecoder, "forward_features", memory_after_output_conv), first=True),
    Fault("position embedding x before y", "layers", PANOPTIC, "even", "taps", f"{PIXEL}.pe_layer", "axis order",
          replaced(POSITIONS, "call", x_before_y), first=True),
    Fault("GroupNorm over the padding", "layers", PANOPTIC, "odd", "taps", f"{PIXEL}.layer_4.norm", "mask missing",
          replaced(layers.GroupNorm, "call", lambda right: lambda self, inputs, sizes=None: right(self, inputs)),
          padding="masked", first=True),
    Fault("attention to the padding", "layers", PANOPTIC, "odd", "taps", f"{ENCODER}.layers.0.self_attn", "mask missing",
          replaced(pixel_decoder, "sequence_mask", lambda right: lambda features, sizes: None), padding="masked", first=True),
    Fault("position embedding of the canvas", "layers", PANOPTIC, "odd", "taps", f"{PIXEL}.pe_layer", "mask missing",
          replaced(POSITIONS, "call", lambda right: lambda self, features, sizes=None: right(self, features)),
          padding="masked", first=True),
    Fault("stem without a norm", "layers", DEEPLAB, "odd", "taps", "backbone.stem.conv2.norm", "missing term",
          attribute("backbone.stem.conv2", "norm", None), first=True),
    Fault("stem without ReLUs", "layers", DEEPLAB, "odd", "taps", "backbone.stem.conv2", "missing term",
          replaced(resnet.DeepLabStem, "call", without_relus), first=True),
    Fault("dilation dropped", "layers", DEEPLAB, "odd", "taps", "backbone.res5.1.conv2", "dilation",
          attribute("backbone.res5.1.conv2", "dilation", 1), first=True),
    Fault("dilation in the first block too", "layers", DEEPLAB, "odd", "taps", "backbone.res5.0.conv2", "dilation",
          attribute("backbone.res5.0.conv2", "dilation", 2), first=True),
    Fault("stride dropped where there is dilation", "layers", DEEPLAB, "odd", "taps", "backbone.res5.0.conv2", "stride",
          together(attribute("backbone.res5.0.conv2", "stride", 1), attribute("backbone.res5.0.shortcut", "stride", 1)), first=True),
    Fault("LayerNorm eps 1e-3 in the decoder's last norm", "layers", PANOPTIC, "odd", "taps", f"{DECODER}.norm", "eps",
          attribute(f"{DECODER}.norm", "eps", 1e-3)),
    Fault("unbiased variance in LayerNorm", "layers", SEMANTIC, "odd", "taps", f"{DECODER}.layers.0.norm1", "normaliser",
          replaced(layers.LayerNorm, "call", unbiased_layer_norm)),
    Fault("stride in the 1×1 convolution", "layers", PANOPTIC, "odd", "taps", "backbone.res3.0.conv1", "layer order",
          stride_in_1x1("res3")),
    Fault("always twice as large, cut at the top and left", "layers", PANOPTIC, "odd", "taps", f"{PIXEL}.layer_3", "shift",
          replaced(pixel_decoder, "resize_nearest", always_twice)),
    Fault("bilinear in the feature pyramid", "layers", PANOPTIC, "even", "taps", f"{PIXEL}.layer_3", "interpolation",
          replaced(pixel_decoder, "resize_nearest", bilinear)),
    Fault("scores scaled by all channels", "layers", PANOPTIC, "odd", "taps", f"{ENCODER}.layers.0.self_attn", "scale",
          replaced(layers, "math", scaled_by_all_channels)),
    Fault("positions from 0", "layers", PANOPTIC, "odd", "taps", f"{PIXEL}.pe_layer", "shift",
          replaced(POSITIONS, "_embed", positions_from_zero)),
    Fault("all sines before all cosines", "layers", SEMANTIC, "odd", "taps", f"{PREDICTOR}.pe_layer", "axis order",
          replaced(POSITIONS, "_embed", sines_before_cosines)),
    Fault("positions on the value too", "layers", PANOPTIC, "odd", "taps", f"{ENCODER}.layers.0.self_attn", "missing term",
          replaced(transformer.TransformerEncoderLayer, "call", position_on_the_value)),
    Fault("no query positions in the cross-attention", "layers", PANOPTIC, "odd", "taps", f"{DECODER}.layers.0.multihead_attn",
          "missing term",
          decoder_layer(cross_positions=False)),
    Fault("GELU in the decoder", "layers", SEMANTIC, "odd", "taps", f"{DECODER}.layers.0.dropout", "gelu",
          decoder_layer(activation=tf.nn.gelu)),
    Fault("norms first", "layers", SEMANTIC, "odd", "taps", f"{DECODER}.layers.0.self_attn", "layer order",
          replaced(transformer.TransformerDecoderLayer, "call", norm_first)),
    Fault("only the last state normed", "layers", PANOPTIC, "odd", "taps", f"{DECODER}.norm", "missing term",
          replaced(transformer.TransformerDecoder, "call", only_the_last_is_normed)),
    Fault("a norm behind the encoder", "layers", PANOPTIC, "odd", "taps", ENCODER, "extra term",
          replaced(transformer.TransformerEncoder, "call", norm_behind_the_encoder)),
    Fault("mask of the attention negated", "layers", PANOPTIC, "odd", "taps", f"{ENCODER}.layers.0.self_attn", "mask polarity",
          replaced(pixel_decoder, "sequence_mask", lambda right: lambda features, sizes: ~right(features, sizes)), padding="masked"),
)
# fmt: on
