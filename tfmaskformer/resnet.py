"""Detectron2's ResNet as the official MaskFormers use it: bottleneck blocks, frozen batch norm, stride in the 3×3.

Source: Detectron2 ``modeling/backbone/resnet.py`` (``BasicStem``, ``BottleneckBlock``, ``ResNet``, ``build_resnet_backbone``) and, for
R101c, ``projects/DeepLab/deeplab/resnet.py`` (``DeepLabStem``, ``build_resnet_deeplab_backbone``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfmaskformer.config import ResNetConfig
from tfmaskformer.layers import Conv2d, FrozenBatchNorm2d, c2_msra_fill, halved, zero_outside
from tfmaskformer.module import Module, ModuleSequence


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        dilation=dilation,
        bias=False,
        norm=FrozenBatchNorm2d(out_channels),
        initializer=c2_msra_fill,
    )


class BasicStem(Module):
    """7×7 convolution with stride 2, ReLU, 3×3 max pool with stride 2."""

    def __init__(self, out_channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.conv1 = _conv(3, out_channels, 7, stride=2)

    def call(self, inputs: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
        return _max_pool(tf.nn.relu(self.conv1(inputs, sizes)), halved(sizes))


class DeepLabStem(Module):
    """Three 3×3 convolutions, the first with stride 2, a ReLU behind each, and the same max pool."""

    def __init__(self, out_channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.conv1 = _conv(3, out_channels // 2, 3, stride=2)
        self.conv2 = _conv(out_channels // 2, out_channels // 2, 3)
        self.conv3 = _conv(out_channels // 2, out_channels, 3)

    def call(self, inputs: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
        outputs = tf.nn.relu(self.conv1(inputs, sizes))
        sizes = halved(sizes)
        outputs = tf.nn.relu(self.conv2(outputs, sizes))
        return _max_pool(tf.nn.relu(self.conv3(outputs, sizes)), sizes)


def _max_pool(inputs: tf.Tensor, sizes: tf.Tensor | None) -> tf.Tensor:
    """3×3 with stride 2 and padding 1, of what comes out of a ReLU: there zero padding is as good as torch's −inf."""
    outputs = zero_outside(inputs, sizes)
    return tf.nn.max_pool2d(tf.pad(outputs, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")


STEMS: dict[str, type[BasicStem] | type[DeepLabStem]] = {"basic": BasicStem, "deeplab": DeepLabStem}


class BottleneckBlock(Module):
    """1×1, 3×3 (with the stride and the dilation) and 1×1 convolutions around a shortcut, projected where the channels change."""

    is_block = True

    def __init__(self, in_channels: int, out_channels: int, bottleneck_channels: int, stride: int, dilation: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.shortcut = _conv(in_channels, out_channels, 1, stride) if in_channels != out_channels else None
        self.conv1 = _conv(in_channels, bottleneck_channels, 1)
        self.conv2 = _conv(bottleneck_channels, bottleneck_channels, 3, stride, dilation)
        self.conv3 = _conv(bottleneck_channels, out_channels, 1)

    def call(self, inputs: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
        outputs = tf.nn.relu(self.conv1(inputs))
        outputs = tf.nn.relu(self.conv2(outputs, sizes))
        outputs = self.conv3(outputs)
        shortcut = inputs if self.shortcut is None else self.shortcut(inputs)
        return tf.nn.relu(outputs + shortcut)


class Stage(ModuleSequence):
    """``res2`` … ``res5``: bottleneck blocks, one for each of ``dilations``; the first may have a stride of 2."""

    def __init__(self, dilations: Sequence[int], in_channels: int, out_channels: int, bottleneck_channels: int, stride: int, **kwargs: Any):
        first = BottleneckBlock(in_channels, out_channels, bottleneck_channels, stride, dilations[0])
        rest = (BottleneckBlock(out_channels, out_channels, bottleneck_channels, 1, dilation) for dilation in dilations[1:])
        super().__init__([first, *rest], **kwargs)
        self.stride = stride

    def call(self, inputs: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
        outputs = inputs
        for index, block in enumerate(self):
            outputs = block(outputs, sizes)
            if index == 0 and self.stride == 2:
                sizes = halved(sizes)
        return outputs


class ResNet(Module):
    """The backbone: ``{"res2": …, "res5": …}`` at strides 4, 8, 16, 32, each ``[batch, ceil(height / stride), …, channels]``."""

    def __init__(self, config: ResNetConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.stem = STEMS[config.stem_type](config.stem_out_channels)
        in_channels = config.stem_out_channels
        dilations = [(1,) * num_blocks for num_blocks in config.blocks[:-1]] + [config.res5_multi_grid]
        for index, of_stage in enumerate(dilations):
            out_channels = config.res2_out_channels * 2**index
            bottleneck_channels = config.width_per_group * 2**index
            stage = Stage(of_stage, in_channels, out_channels, bottleneck_channels, stride=1 if index == 0 else 2)
            setattr(self, f"res{index + 2}", stage)
            in_channels = out_channels

    def call(self, images: tf.Tensor, sizes: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        """Features of ``images`` ``[batch, height, width, 3]``, normalised and padded."""
        outputs = self.stem(images, sizes)
        sizes = halved(halved(sizes))
        features = {}
        for name in ("res2", "res3", "res4", "res5"):
            stage = getattr(self, name)
            outputs = features[name] = stage(outputs, sizes)
            if stage.stride == 2:
                sizes = halved(sizes)
        return features
