"""Swin's windows, shifts, masks and merging."""

from __future__ import annotations

from unittest import mock

import numpy as np
import tensorflow as tf

from parity.faults.fault import SWIN, Fault, attribute, each, replaced
from tfmaskformer import layers, swin
from tfmaskformer.resize import static_shape


def other_shift(change):
    return lambda right: lambda grid, shift, *rest: right(grid, change(shift), *rest)


def row_by_row(right):
    def call(self, inputs, sizes=None):
        grid = swin.pad_to_multiple(inputs, 2)
        quarters = [grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return self.reduction(self.norm(tf.concat(quarters, axis=-1)))

    return call


def zeros_first(right):
    def call(self, inputs, sizes=None):
        _, height, width, _ = inputs.shape
        return right(self, tf.pad(inputs, [[0, 0], [height % 2, 0], [width % 2, 0], [0, 0]]))

    return call


def block_with(**functions):
    """A block that calls other functions: name → what makes it from the block and the right one."""

    def make(right):
        def call(self, *arguments):
            changed = {name: change(self, getattr(swin, name)) for name, change in functions.items()}
            with mock.patch.multiple(swin, **changed):
                return right(self, *arguments)

        return call

    return replaced(swin.SwinTransformerBlock, "call", make)


def padded_before_the_norm(block, right):
    """The norm makes its bias of zeros."""
    bias = block.norm1.bias
    return lambda grid, multiple: right(grid - bias, multiple) + bias


def shifted_first(block, right):
    return lambda grid, multiple: right(tf.roll(grid, [-block.shift_size] * 2, [1, 2]), multiple)


def only_back(block, right):
    return lambda grid, shift, *rest: grid if shift > 0 else right(grid, shift, *rest)


def rows_of_windows(right):
    """Runs of patches in reading order, not squares of them."""

    def window_partition(grid, window_size):
        batch, height, width, channels = static_shape(grid)
        return tf.reshape(grid, [batch, height // window_size, width // window_size, window_size**2, channels])

    return window_partition


def polarity(right):
    def shift_mask(size, window_size, shift, dtype, sizes=None):
        return tf.constant(swin.MASKED_SCORE, dtype) - right(size, window_size, shift, dtype, sizes)

    return shift_mask


def layer(stage, block, module):
    return f"backbone.layers.{stage}.blocks.{block}.{module}"


QKV, SOFTMAX, SHIFTED_QKV, SHIFTED_SOFTMAX = (layer(0, block, f"attn.{what}") for block in (0, 1) for what in ("qkv", "softmax"))
MERGED = "backbone.layers.0.downsample.norm"

# fmt: off
FAULTS = (
    Fault("windows shifted the other way", "layers", SWIN, "odd", "taps", SHIFTED_QKV, "shift",
          replaced(swin, "cyclic_shift", other_shift(lambda shift: -shift)), first=True),
    Fault("windows shifted by one patch too many", "layers", SWIN, "odd", "taps", SHIFTED_QKV, "shift",
          replaced(swin, "cyclic_shift", other_shift(lambda shift: shift + np.sign(shift))), first=True),
    Fault("no window shifted", "layers", SWIN, "odd", "taps", SHIFTED_QKV, "shift",
          each(swin.SwinTransformerBlock, "shift_size", lambda block: 0), first=True),
    Fault("shifted before the padding", "layers", SWIN, "odd", "taps", SHIFTED_QKV, "padding",
          block_with(pad_to_multiple=shifted_first, cyclic_shift=only_back), first=True),
    Fault("padded before the norm", "layers", SWIN, "odd", "taps", QKV, "padding",
          block_with(pad_to_multiple=padded_before_the_norm), first=True),
    Fault("mask of the grid without its padding", "layers", SWIN, "odd", "taps", SHIFTED_SOFTMAX, "padding",
          replaced(swin, "_round_up", lambda right: lambda size, multiple: size if tf.is_tensor(size) else right(size, multiple)),
          first=True),
    Fault("no mask", "layers", SWIN, "odd", "taps", SHIFTED_SOFTMAX, "mask missing",
          replaced(swin, "MASKED_SCORE", lambda right: 0.0), first=True),
    Fault("relative positions transposed", "layers", SWIN, "odd", "taps", SOFTMAX, "transpose",
          each(swin.WindowAttention, "relative_position_index", lambda module: module.relative_position_index.T), first=True),
    Fault("queries not scaled", "layers", SWIN, "odd", "taps", SOFTMAX, "scale",
          each(swin.WindowAttention, "scale", lambda module: 1.0), first=True),
    Fault("queries scaled by all channels", "layers", SWIN, "odd", "taps", SOFTMAX, "scale",
          each(swin.WindowAttention, "scale", lambda module: module.scale / module.num_heads**0.5), first=True),
    Fault("GELU by tanh", "layers", SWIN, "odd", "taps", layer(0, 0, "mlp.act"), "gelu",
          replaced(swin.Gelu, "call", lambda right: lambda self, inputs: tf.nn.gelu(inputs, approximate=True)), first=True),
    Fault("patches merged row by row", "layers", SWIN, "odd", "taps", MERGED, "axis order",
          replaced(swin.PatchMerging, "call", row_by_row), first=True),
    Fault("odd grids padded at the top and left", "layers", SWIN, "odd", "taps", MERGED, "padding side",
          replaced(swin.PatchMerging, "call", zeros_first), first=True),
    Fault("patches not normed", "layers", SWIN, "odd", "taps", "backbone.patch_embed.norm", "missing term",
          attribute("backbone.patch_embed", "norm", lambda inputs: inputs), first=True),
    Fault("a level not normed", "layers", SWIN, "odd", "taps", "backbone.norm2", "missing term",
          attribute("backbone", "norm2", lambda inputs: inputs), first=True),
    Fault("every image turned in the canvas", "layers", SWIN, "odd", "taps", SHIFTED_QKV, "shift",
          replaced(swin, "cyclic_shift", lambda right: lambda grid, shift, window, sizes=None: right(grid, shift, window)),
          padding="masked", first=True),
    Fault("mask of the canvas", "layers", SWIN, "odd", "taps", SHIFTED_SOFTMAX, "padding",
          replaced(swin, "shift_mask", lambda right: lambda size, window, shift, dtype, sizes=None: right(size, window, shift, dtype)),
          padding="masked", first=True),
    Fault("windows filled with what lies behind the image", "layers", SWIN, "odd", "taps", QKV, "mask missing",
          replaced(swin, "zero_outside", lambda right: lambda inputs, sizes: inputs), padding="masked", first=True),
    Fault("Swin's norms with eps 1e-6, as in timm", "layers", SWIN, "odd", "taps", "backbone.patch_embed.norm", "eps",
          each(layers.LayerNorm, "eps", lambda module: 1e-6)),
    Fault("windows that are runs of patches", "layers", SWIN, "odd", "taps", QKV, "axis order",
          replaced(swin, "window_partition", rows_of_windows)),
    Fault("mask of the windows negated", "layers", SWIN, "odd", "taps", SHIFTED_SOFTMAX, "mask polarity",
          replaced(swin, "shift_mask", polarity)),
    Fault("masked scores only 10 lower", "layers", SWIN, "odd", "taps", SHIFTED_SOFTMAX, "scale",
          replaced(swin, "MASKED_SCORE", lambda right: -10.0)),
    Fault("no bias of relative positions", "layers", SWIN, "odd", "taps", SOFTMAX, "bias",
          replaced(swin.WindowAttention, "relative_position_bias", lambda right: lambda self: tf.zeros_like(right(self)))),
)
# fmt: on
