"""MaskFormer's Swin Transformer: attention inside windows of patches, shifted by half a window in every other block.

Source: MaskFormer ``mask_former/modeling/backbone/swin.py``; paper: Liu et al., "Swin Transformer: Hierarchical Vision Transformer
using Shifted Windows", arXiv 2103.14030. Grids of patches are ``[batch, rows, columns, channels]`` (upstream: flattened), windows
``[batch, window rows, window columns, positions, channels]`` (upstream: the first three in one).

Every grid is padded with zeros, behind ``norm1``, to whole windows; the cyclic shift turns the padded grid, and patches that it makes
neighbours without their being so are told apart by −100 in their scores. The zeros do take part in attention. So what an image gives
depends on its padded size, and with true ``sizes`` inside a canvas all of this happens at the true, padded size of each image; windows
behind it hold nothing that anybody reads.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from checkpoints.registry import relative_position_index
from tfmaskformer.config import SwinConfig
from tfmaskformer.layers import Dropout, LayerNorm, Linear, halved, torch_bias_fill, torch_linear_fill, zero_outside
from tfmaskformer.module import Module, ModuleSequence
from tfmaskformer.resize import static_shape

PATCH_SIZE = 4
"""MODEL.SWIN.PATCH_SIZE, px."""

MASKED_SCORE = -100.0
"""Added to the score of two patches that only the cyclic shift has brought together."""

Size: TypeAlias = "int | tf.Tensor"


class Gelu(Module):
    """``nn.GELU``: exact, with the error function."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        half, root = (tf.constant(value, inputs.dtype) for value in (0.5, math.sqrt(0.5)))
        return half * inputs * (1 + tf.math.erf(inputs * root))


class Softmax(Module):
    """``nn.Softmax`` over the last axis."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        shape = static_shape(inputs)  # oneDNN's kernel takes five axes at most
        return tf.reshape(tf.nn.softmax(tf.reshape(inputs, [-1, shape[-1]])), shape)


class DropPath(Dropout):
    """Stochastic depth: in training, drops each image of the batch as a whole with probability ``rate`` and scales up the others."""

    def mask_shape(self, inputs: tf.Tensor) -> list[int | tf.Tensor]:
        batch, *rest = static_shape(inputs)
        return [batch] + [1] * len(rest)


class PatchProjection(Module):
    """The convolution of non-overlapping patches, with PyTorch's default initial values."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.declare("weight", [PATCH_SIZE, PATCH_SIZE, in_channels, out_channels], initializer=torch_linear_fill())
        self.declare("bias", [out_channels], initializer=torch_bias_fill(PATCH_SIZE**2 * in_channels))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        outputs = tf.nn.conv2d(inputs, tf.cast(self.weight, inputs.dtype), PATCH_SIZE, "VALID")
        return tf.nn.bias_add(outputs, tf.cast(self.bias, inputs.dtype))


class PatchEmbed(Module):
    """Image to normed patches; an image that is not made of whole patches is padded with zeros, right and at the bottom."""

    def __init__(self, channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.proj = PatchProjection(3, channels)
        self.norm = LayerNorm(channels)

    def call(self, images: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
        return self.norm(self.proj(pad_to_multiple(zero_outside(images, sizes), PATCH_SIZE)))


class Mlp(Module):
    """Two linear layers around a GELU; one dropout behind each."""

    def __init__(self, channels: int, hidden_channels: int, dropout: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.fc1 = Linear(channels, hidden_channels)
        self.act = Gelu()
        self.fc2 = Linear(hidden_channels, channels)
        self.drop = Dropout(dropout)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(inputs)))))


class WindowAttention(Module):
    """Self-attention inside each window, with a learned bias for each head and each offset from query to key."""

    def __init__(self, channels: int, window_size: int, num_heads: int, attn_drop: float, proj_drop: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5
        self.relative_position_index = relative_position_index(window_size)
        self.declare(
            "relative_position_bias_table",
            [(2 * window_size - 1) ** 2, num_heads],
            initializer=keras.initializers.RandomNormal(stddev=0.02),  # upstream cuts it off at ±2, a hundred deviations away
        )
        self.qkv = Linear(channels, 3 * channels)
        self.attn_drop = Dropout(attn_drop)
        self.proj = Linear(channels, channels)
        self.proj_drop = Dropout(proj_drop)
        self.softmax = Softmax()

    def call(self, windows: tf.Tensor, attn_mask: tf.Tensor | None = None) -> tf.Tensor:
        """Of ``windows`` ``[batch, window rows, window columns, positions, channels]``, the same shape.

        ``attn_mask``: added to every head's scores, ``[batch or 1, window rows, window columns, 1, positions, positions]``.
        """
        *grid, positions, channels = static_shape(windows)
        heads = self.num_heads
        # All windows in one axis for products and transpositions: LiteRT takes few axes.
        qkv = tf.reshape(self.qkv(windows), [-1, positions, 3, heads, channels // heads])
        query, key, value = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))
        scores = tf.matmul(query * tf.constant(self.scale, query.dtype), key, transpose_b=True)
        scores = tf.reshape(scores, [*grid, heads, positions, positions]) + tf.cast(self.relative_position_bias(), scores.dtype)
        if attn_mask is not None:
            scores += attn_mask
        attention = tf.reshape(self.attn_drop(self.softmax(scores)), [-1, heads, positions, positions])
        mixed = tf.transpose(tf.matmul(attention, value), [0, 2, 1, 3])
        return self.proj_drop(self.proj(tf.reshape(mixed, [*grid, positions, channels])))

    def relative_position_bias(self) -> tf.Tensor:
        """``[heads, positions, positions]``: query, then key."""
        # Gathered along the last axis, whose gradient is dense; along the first it would be IndexedSlices.
        bias = tf.gather(tf.transpose(self.relative_position_bias_table), self.relative_position_index.ravel(), axis=1)
        return tf.reshape(bias, [self.num_heads, *self.relative_position_index.shape])


class SwinTransformerBlock(Module):
    """Window attention and an MLP, each behind a norm and beside a residual connection."""

    is_block = True

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int,
        shift_size: int,
        mlp_ratio: float,
        drop: float,
        attn_drop: float,
        drop_path: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.window_size = window_size
        self.shift_size = shift_size
        self.norm1 = LayerNorm(channels)
        self.attn = WindowAttention(channels, window_size, num_heads, attn_drop, drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), drop)

    def call(self, inputs: tf.Tensor, attn_mask: tf.Tensor | None = None, sizes: tf.Tensor | None = None) -> tf.Tensor:
        """``inputs`` and the result: ``[batch, rows, columns, channels]``; ``attn_mask`` (:func:`shift_mask`) is for blocks that shift."""
        _, height, width, _ = static_shape(inputs)
        shift, window = self.shift_size, self.window_size
        grid = pad_to_multiple(zero_outside(self.norm1(inputs), sizes), window)
        grid = cyclic_shift(grid, shift, window, sizes)
        attended = self.attn(window_partition(grid, window), attn_mask if shift else None)
        grid = cyclic_shift(window_reverse(attended, window), -shift, window, sizes)
        outputs = inputs + self.drop_path(grid[:, :height, :width])
        return outputs + self.drop_path(self.mlp(self.norm2(outputs)))


class PatchMerging(Module):
    """Each 2 × 2 patches become one of twice the channels; an odd grid is padded with zeros."""

    def __init__(self, channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.reduction = Linear(4 * channels, 2 * channels, bias=False)
        self.norm = LayerNorm(4 * channels)

    def call(self, inputs: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
        grid = pad_to_multiple(zero_outside(inputs, sizes), 2)
        quarters = [grid[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(tf.concat(quarters, axis=-1)))


class BasicLayer(Module):
    """One stage: blocks, every second of which shifts, then patch merging, except in the last stage."""

    def __init__(self, config: SwinConfig, stage: int, drop_path: list[float], **kwargs: Any):
        super().__init__(**kwargs)
        self.window_size = config.window_size
        self.shift_size = config.window_size // 2
        channels = config.embed_dim * 2**stage
        self.blocks = ModuleSequence(
            [
                SwinTransformerBlock(
                    channels,
                    config.num_heads[stage],
                    config.window_size,
                    self.shift_size if index % 2 else 0,
                    config.mlp_ratio,
                    config.drop_rate,
                    config.attn_drop_rate,
                    rate,
                )
                for index, rate in enumerate(drop_path)
            ]
        )
        self.downsample = PatchMerging(channels) if stage < len(config.depths) - 1 else None

    def call(self, inputs: tf.Tensor, sizes: tf.Tensor | None = None) -> dict[int, tf.Tensor]:
        """``{0: the blocks' output, 3: the next stage's input}``, by their places in upstream's tuple, the rest of which are sizes."""
        _, height, width, _ = static_shape(inputs)
        attn_mask = shift_mask((height, width), self.window_size, self.shift_size, inputs.dtype, sizes) if len(self.blocks) > 1 else None
        outputs = inputs
        for block in self.blocks:
            outputs = block(outputs, attn_mask, sizes)
        return {0: outputs, 3: outputs if self.downsample is None else self.downsample(outputs, sizes)}


class D2SwinTransformer(Module):
    """The backbone: ``{"res2": …, "res5": …}`` at strides 4, 8, 16, 32, each ``[batch, ceil(height / stride), …, channels]``."""

    def __init__(self, config: SwinConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.patch_embed = PatchEmbed(config.embed_dim)
        self.pos_drop = Dropout(config.drop_rate)
        rates = np.split(drop_path_rates(config.drop_path_rate, sum(config.depths)), np.cumsum(config.depths)[:-1])
        self.layers = ModuleSequence([BasicLayer(config, stage, of_stage.tolist()) for stage, of_stage in enumerate(rates)])
        for stage, channels in enumerate(config.out_channels.values()):
            setattr(self, f"norm{stage}", LayerNorm(channels))

    def call(self, images: tf.Tensor, sizes: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        """Features of ``images`` ``[batch, height, width, 3]``, normalised and padded."""
        outputs = self.pos_drop(self.patch_embed(images, sizes))
        sizes = halved(halved(sizes))
        features = {}
        for stage, layer in enumerate(self.layers):
            of_stage = layer(outputs, sizes)
            features[f"res{stage + 2}"] = getattr(self, f"norm{stage}")(of_stage[0])
            outputs, sizes = of_stage[3], halved(sizes)
        return features


def drop_path_rates(last: float, blocks: int) -> np.ndarray:
    """The rate of stochastic depth of each block, rising linearly from 0 to ``last``: float32 numbers, those of ``torch.linspace``.

    Of Swin-T to the last bit; of 24 blocks two or three rates are off by one, since PyTorch's depend on how many it computes at once.

    Args:
        last: of the last block.
        blocks: 2 or more.
    """
    end, index = np.float32(last), np.arange(blocks, dtype=np.float32)
    step = end / np.float32(blocks - 1)
    return np.where(index < blocks // 2, step * index, end - step * (blocks - 1 - index)).astype(np.float64)


def pad_to_multiple(grid: tf.Tensor, multiple: int) -> tf.Tensor:
    """``[batch, rows, columns, channels]`` with zeros behind the rows and columns, up to a multiple."""
    _, height, width, _ = static_shape(grid)
    return tf.pad(grid, [[0, 0], [0, -height % multiple], [0, -width % multiple], [0, 0]])


def window_partition(grid: tf.Tensor, window_size: int) -> tf.Tensor:
    """``[batch, rows, columns, channels]`` → ``[batch, window rows, window columns, positions, channels]``."""
    batch, height, width, channels = static_shape(grid)
    rows, columns = height // window_size, width // window_size
    windows = tf.reshape(grid, [batch, rows, window_size, columns, window_size, channels])
    return tf.reshape(tf.transpose(windows, [0, 1, 3, 2, 4, 5]), [batch, rows, columns, window_size**2, channels])


def window_reverse(windows: tf.Tensor, window_size: int) -> tf.Tensor:
    """Inverse of :func:`window_partition`."""
    batch, rows, columns, _, channels = static_shape(windows)
    grid = tf.reshape(windows, [batch, rows, columns, window_size, window_size, channels])
    return tf.reshape(tf.transpose(grid, [0, 1, 3, 2, 4, 5]), [batch, rows * window_size, columns * window_size, channels])


def cyclic_shift(grid: tf.Tensor, shift: int, window_size: int, sizes: tf.Tensor | None = None) -> tf.Tensor:
    """Moves a padded grid up and left by ``shift``; what leaves it comes in again at the other side.

    Args:
        grid: ``[batch, rows, columns, channels]``, whole windows.
        shift: rows and columns; negative: down and right.
        sizes: int32 ``[batch, 2]``, true sizes without the padding to windows: each image turns in its own padded size.
    """
    if shift == 0:
        return grid
    if sizes is None:
        return tf.roll(grid, [-shift, -shift], [1, 2])
    for axis, length in ((1, static_shape(grid)[1]), (2, static_shape(grid)[2])):
        period = _round_up(sizes[:, axis - 1, None], window_size)
        index = tf.range(length)[None]
        index = tf.where(index < period, (index + shift) % period, index)
        grid = tf.gather(grid, index, axis=axis, batch_dims=1)
    return grid


def shift_mask(size: tuple[Size, Size], window_size: int, shift: int, dtype: tf.DType, sizes: tf.Tensor | None = None) -> tf.Tensor:
    """``[batch or 1, window rows, window columns, 1, positions, positions]``: −100 between patches that are no neighbours, else 0.

    Args:
        size: rows and columns of the grid, before its padding to windows.
        window_size, shift: as in :func:`cyclic_shift`.
        sizes: int32 ``[batch, 2]``, true sizes inside the grid.
    """
    true_sizes = tf.stack(size)[None] if sizes is None else sizes
    regions = []
    for axis in (0, 1):
        padded = _round_up(true_sizes[:, axis, None], window_size)
        index = tf.range(_round_up(size[axis], window_size))[None]
        # The last window of the shifted grid holds patches from both ends.
        regions.append(tf.cast(index >= padded - window_size, tf.int32) + tf.cast(index >= padded - shift, tf.int32))
    rows, columns = regions
    region = window_partition((3 * rows[:, :, None] + columns[:, None, :])[..., None], window_size)[..., 0]
    apart = region[..., None, :, None] != region[..., None, None, :]
    return tf.where(apart, tf.constant(MASKED_SCORE, dtype), tf.zeros([], dtype))


def _round_up(size: Any, multiple: int) -> Any:
    return (size + multiple - 1) // multiple * multiple
