"""The leaves of the tree: convolution, linear, norms, attention, dropout, each computing what its PyTorch namesake computes.

Feature maps are NHWC, sequences ``[batch, length, channels]``. Kernels are HWIO, linear weights ``[in, out]``. Where a module
takes ``sizes`` (int32 ``[batch, 2]``: true height and width of each feature map inside its padded canvas), everything outside
them is treated as the border of the map, so the inside is what the map alone would give; ``None`` means the canvas is the map.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tfmaskformer.module import Module, recording, tap
from tfmaskformer.resize import static_shape, valid_pixels

EPSILON = 1e-5
"""Of every norm in the official models: ``nn.GroupNorm``, ``nn.LayerNorm`` and Detectron2's ``FrozenBatchNorm2d`` defaults."""

GROUP_NORM_GROUPS = 32
"""Detectron2 ``layers/batch_norm.py:get_norm("GN")``."""

LONGEST_SUM = 128
"""Products that one float32 matrix product adds up. TensorFlow's matrix product on a CPU adds more in a row than PyTorch's: of long sums of
normal numbers its error is 3.5e-7, PyTorch's 2.5e-7, and Swin's residual stream passes that on. In stretches of 128 it is 2.1e-7
(tests/tfmaskformer/test_layers.py)."""


def c2_msra_fill() -> keras.initializers.Initializer:
    """fvcore ``weight_init.c2_msra_fill``: normal, fan out, gain of a ReLU."""
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


def c2_xavier_fill() -> keras.initializers.Initializer:
    """fvcore ``weight_init.c2_xavier_fill``: uniform in ±sqrt(3 / fan in)."""
    return keras.initializers.VarianceScaling(1.0, "fan_in", "uniform")


def torch_linear_fill() -> keras.initializers.Initializer:
    """PyTorch's default for ``nn.Linear`` and ``nn.Conv2d``: uniform in ±1 / sqrt(fan in)."""
    return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")


def torch_bias_fill(fan_in: int) -> keras.initializers.Initializer:
    """PyTorch's default for the bias of ``nn.Linear`` and ``nn.Conv2d``: uniform in ±1 / sqrt(fan in)."""
    bound = 1 / math.sqrt(fan_in)
    return keras.initializers.RandomUniform(-bound, bound)


def halved(sizes: tf.Tensor | None) -> tf.Tensor | None:
    """True sizes behind a stride of 2 (every one of the network: kernel 2p + 1, padding p): ``ceil(size / 2)``."""
    return None if sizes is None else (sizes + 1) // 2


def zero_outside(inputs: tf.Tensor, sizes: tf.Tensor | None) -> tf.Tensor:
    """``inputs`` ``[batch, height, width, channels]`` with exact zeros outside ``sizes``, whatever stood there (also NaN)."""
    if sizes is None:
        return inputs
    _, height, width, _ = static_shape(inputs)
    return tf.where(valid_pixels(sizes, (height, width))[..., None], inputs, tf.zeros([], inputs.dtype))


def _at_least_float32(dtype: tf.DType) -> tf.DType:
    return tf.float64 if dtype == tf.float64 else tf.float32


class FrozenBatchNorm2d(Module):
    """Batch norm whose statistics and affine parameters are constants (Detectron2 ``layers/batch_norm.py``).

    The :class:`Conv2d` in front of it folds it into its kernel, one fused operation instead of three.
    """

    def __init__(self, channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.eps = EPSILON
        self.declare("weight", [channels], trainable=False, initializer="ones")
        self.declare("bias", [channels], trainable=False)
        self.declare("running_mean", [channels], trainable=False)
        self.declare("running_var", [channels], trainable=False, initializer=keras.initializers.Constant(1 - EPSILON))

    def scale_and_bias(self) -> tuple[tf.Tensor, tf.Tensor]:
        """The norm as ``x · scale + bias``; both ``[channels]``, in the variables' dtype."""
        scale = self.weight * tf.math.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale


class GroupNorm(Module):
    """``nn.GroupNorm(32, channels)`` over the true part of each map; statistics in two passes, in float32 at least."""

    def __init__(self, channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.eps = EPSILON
        self.groups = GROUP_NORM_GROUPS
        self.declare("weight", [channels], initializer="ones")
        self.declare("bias", [channels])

    def call(self, inputs: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
        batch, height, width, channels = static_shape(inputs)
        group = channels // self.groups
        values = tf.cast(inputs, _at_least_float32(inputs.dtype))
        pixels = tf.fill([batch], height * width) if sizes is None else tf.reduce_prod(sizes, axis=1)
        count = tf.cast(pixels * group, values.dtype)[:, None]

        def mean(values: tf.Tensor) -> tf.Tensor:
            # Columns, rows, then channels: one float32 sum over all pixels of a large map has 2.7 times the error.
            sums = tf.reduce_sum(tf.reduce_sum(zero_outside(values, sizes), axis=1), axis=1)
            means = tf.reduce_sum(tf.reshape(sums, [batch, self.groups, group]), axis=2) / count
            return tf.repeat(means, group, axis=1)[:, None, None, :]

        centred = values - mean(values)
        scale = tf.math.rsqrt(mean(tf.square(centred)) + self.eps) * self.weight
        return tf.cast(centred * scale + self.bias, inputs.dtype)


class LayerNorm(Module):
    """``nn.LayerNorm(channels)`` over the last axis; statistics in two passes, in float32 at least."""

    def __init__(self, channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.eps = EPSILON
        self.declare("weight", [channels], initializer="ones")
        self.declare("bias", [channels])

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        values = tf.cast(inputs, _at_least_float32(inputs.dtype))
        centred = values - tf.reduce_mean(values, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
        outputs = centred * tf.math.rsqrt(variance + self.eps) * self.weight + self.bias
        return tf.cast(outputs, inputs.dtype)


class Conv2d(Module):
    """Detectron2's ``Conv2d`` (``layers/wrappers.py``): convolution, then norm, then activation.

    Padding is ``dilation · (kernel_size // 2)`` on every side at every stride, as in all official models. TensorFlow's ``SAME`` is
    that only at stride 1; at stride 2 it pads even sizes on one side, which odd sizes hide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        norm: FrozenBatchNorm2d | GroupNorm | None = None,
        activation: Callable[[tf.Tensor], tf.Tensor] | None = None,
        initializer: Callable[[], keras.initializers.Initializer] = c2_xavier_fill,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.use_bias = bias
        self.activation = activation
        self.declare("weight", [kernel_size, kernel_size, in_channels, out_channels], initializer=initializer())
        if bias:
            self.declare("bias", [out_channels])
        self.norm = norm

    def call(self, inputs: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
        padding: Any = "VALID"
        if self.kernel_size > 1:
            inputs = zero_outside(inputs, sizes)
            margin = [self.kernel_size // 2] * 2
            padding = "SAME" if self.stride == 1 else [[0, 0], margin, margin, [0, 0]]
        kernel, bias = self.weight, self.bias if self.use_bias else None
        if isinstance(self.norm, FrozenBatchNorm2d):
            scale, bias = self.norm.scale_and_bias()
            kernel = kernel * scale
        kernel = tf.cast(kernel, inputs.dtype)
        if self.dilation == 1:
            outputs = tf.nn.conv2d(inputs, kernel, self.stride, padding)
        else:
            outputs = _dilated_conv2d(inputs, kernel, self.dilation)[:, :: self.stride, :: self.stride]
        if bias is not None:
            outputs = tf.nn.bias_add(outputs, tf.cast(bias, inputs.dtype))
        if isinstance(self.norm, FrozenBatchNorm2d):
            outputs = tap(self.norm.official_name, outputs)
        elif self.norm is not None:
            outputs = self.norm(outputs, sizes if self.stride == 1 else halved(sizes))
        return outputs if self.activation is None else self.activation(outputs)


def _dilated_conv2d(inputs: tf.Tensor, kernel: tf.Tensor, dilation: int) -> tf.Tensor:
    """Stride 1, as many zeros on every side as keep the size.

    Every ``dilation``-th row and column form a map of their own, on which the kernel is not dilated. TensorFlow's own dilated
    convolution has no gradient in float64 on a CPU outside XLA.
    """
    _, height, width, _ = static_shape(inputs)
    margins = [[0, -height % dilation], [0, -width % dilation]]
    maps = tf.space_to_batch(inputs, [dilation, dilation], margins)
    return tf.batch_to_space(tf.nn.conv2d(maps, kernel, 1, "SAME"), [dilation, dilation], margins)


def linear(inputs: tf.Tensor, weight: Any, bias: Any) -> tf.Tensor:
    """``inputs @ weight + bias`` over the last axis of ``inputs``; ``bias`` may be None.

    Always 2-D products: TensorFlow 2.20 and 2.21 with oneDNN on AVX-512 return garbage for a 4-D by a 2-D ``tf.matmul``.
    In float32 long sums are taken in stretches of :data:`LONGEST_SUM`.
    """
    *leading, channels = static_shape(inputs)
    flat, weight = tf.reshape(inputs, [-1, channels]), tf.cast(weight, inputs.dtype)
    if inputs.dtype == tf.float32 and channels > LONGEST_SUM:
        lengths = [LONGEST_SUM] * (channels // LONGEST_SUM) + [channels % LONGEST_SUM] * (channels % LONGEST_SUM > 0)
        parts = zip(tf.split(flat, lengths, axis=1), tf.split(weight, lengths, axis=0), strict=True)
        outputs = tf.add_n([tf.matmul(*part) for part in parts])
    else:
        outputs = tf.matmul(flat, weight)
    if bias is not None:
        outputs = tf.nn.bias_add(outputs, tf.cast(bias, inputs.dtype))
    return tf.reshape(outputs, [*leading, weight.shape[-1]])


class Linear(Module):
    """``nn.Linear``, over the last axis."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        initializer: Callable[[], keras.initializers.Initializer] = torch_linear_fill,
        bias_initializer: str | keras.initializers.Initializer | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.use_bias = bias
        self.declare("weight", [in_channels, out_channels], initializer=initializer())
        if bias:
            self.declare("bias", [out_channels], initializer=bias_initializer or torch_bias_fill(in_channels))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return linear(inputs, self.weight, self.bias if self.use_bias else None)


class Embedding(Module):
    """``nn.Embedding`` of which upstream only ever reads ``weight``, whole."""

    def __init__(self, num_embeddings: int, channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.declare("weight", [num_embeddings, channels], initializer=keras.initializers.RandomNormal(stddev=1.0))


Keep: TypeAlias = Callable[[str, "Sequence[int | tf.Tensor]", float], tf.Tensor]
"""Place (``<official name>#<call>``), shape and rate → bool of that shape: what dropout keeps. Sequences are batch first."""

_masks: list[tuple[Keep, collections.Counter[str]]] = []


@contextlib.contextmanager
def dropout_masks(keep: Keep) -> Iterator[None]:
    """Inside, eagerly or while a ``tf.function`` is traced, ``keep`` decides what dropout and stochastic depth keep, call by call."""
    _masks.append((keep, collections.Counter()))
    try:
        yield
    finally:
        _masks.pop()


def dropout(inputs: tf.Tensor, rate: float, name: str, shape: Sequence[int | tf.Tensor]) -> tf.Tensor:
    """``inputs``, scaled up by ``1 / (1 − rate)`` where they are kept, and 0 elsewhere.

    Args:
        inputs: any float dtype and shape.
        rate: probability of an element to become 0, below 1.
        name: official name of the module.
        shape: of the mask, which is broadcast: 1 for axes that are dropped as a whole.
    """
    if not _masks:
        return tf.nn.dropout(inputs, rate, noise_shape=tf.stack(shape))
    keep, calls = _masks[-1]
    place = f"{name}#{calls[name]}"
    calls[name] += 1
    return inputs * tf.where(keep(place, shape, rate), tf.constant(1 / (1 - rate), inputs.dtype), 0)


def rematerialised(call: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """A block's call in training that keeps its arguments alone for the backward pass, which then computes the rest again.

    For :func:`~tfmaskformer.module.wrap_blocks`. Dropout keeps what it kept the first time.
    """

    def again(*args: Any) -> tf.Tensor:
        masks = [(keep, calls.copy()) for keep, calls in _masks[-1:]]

        def forward(*tensors: tf.Tensor) -> tf.Tensor:
            given = iter(tensors)
            _masks.extend((keep, calls.copy()) for keep, calls in masks)
            try:
                return call(*(next(given) if _is_float(arg) else arg for arg in args), training=True)
            finally:
                del _masks[len(_masks) - len(masks) :]

        return tf.recompute_grad(forward)(*filter(_is_float, args))

    return again


def _is_float(argument: Any) -> bool:
    return isinstance(argument, tf.Tensor) and argument.dtype.is_floating


class Dropout(Module):
    """``nn.Dropout``: the identity unless the model runs with ``training=True``."""

    def __init__(self, rate: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return dropout(inputs, self.rate, self.official_name, self.mask_shape(inputs)) if training and self.rate > 0 else inputs

    def mask_shape(self, inputs: tf.Tensor) -> list[int | tf.Tensor]:
        """Every element has its own."""
        return static_shape(inputs)


class MultiheadAttention(Module):
    """``nn.MultiheadAttention``: one packed input projection, scaled dot products, dropout on the weights, output projection."""

    def __init__(self, channels: int, num_heads: int, dropout: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.dropout = dropout
        self.declare("in_proj_weight", [channels, 3 * channels], initializer="glorot_uniform")
        self.declare("in_proj_bias", [3 * channels])
        self.out_proj = Linear(channels, channels, initializer=keras.initializers.GlorotUniform, bias_initializer="zeros")

    def call(
        self,
        query: tf.Tensor,
        key: tf.Tensor,
        value: tf.Tensor,
        valid_keys: tf.Tensor | None = None,
        training: bool | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Attends from ``query`` ``[batch, queries, channels]`` to ``key`` and ``value`` ``[batch, keys, channels]``.

        ``valid_keys``: bool ``[batch, keys]``, True for keys that exist (torch's ``key_padding_mask``, negated). Returns the output
        ``[batch, queries, channels]`` and, while taps are recorded, the weights averaged over heads ``[batch, queries, keys]``.
        """
        weights = tf.split(self.in_proj_weight, 3, axis=1)
        biases = tf.split(self.in_proj_bias, 3)
        query, key, value = (
            self._split_heads(linear(inputs, weight, bias))
            for inputs, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        head_channels = query.shape[-1]
        scores = tf.matmul(query * tf.constant(math.sqrt(1 / head_channels), query.dtype), key, transpose_b=True)
        if valid_keys is not None:
            scores = tf.where(valid_keys[:, None, None, :], scores, tf.constant(-math.inf, scores.dtype))
        attention = tf.nn.softmax(scores)
        if training and self.dropout > 0:
            attention = dropout(attention, self.dropout, self.official_name, static_shape(attention))
        batch, heads, length, _ = static_shape(query)
        mixed = tf.transpose(tf.matmul(attention, value), [0, 2, 1, 3])
        mixed = tf.reshape(mixed, [batch, length, heads * head_channels])
        # As upstream, out_proj holds parameters but is never called, so it has no tap of its own.
        outputs = linear(mixed, self.out_proj.weight, self.out_proj.bias)
        return outputs, tf.reduce_mean(attention, axis=1) if recording() else None

    def _split_heads(self, inputs: tf.Tensor) -> tf.Tensor:
        batch, length, channels = static_shape(inputs)
        return tf.transpose(tf.reshape(inputs, [batch, length, self.num_heads, channels // self.num_heads]), [0, 2, 1, 3])
