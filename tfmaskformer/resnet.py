"""Detectron2's ResNet as the official MaskFormers use it: basic stem, bottleneck blocks, frozen batch norm, stride in the 3×3.

Source: Detectron2 ``modeling/backbone/resnet.py`` (``BasicStem``, ``BottleneckBlock``, ``ResNet``, ``build_resnet_backbone``).
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmaskformer.config import ResNetConfig
from tfmaskformer.layers import Conv2d, FrozenBatchNorm2d, c2_msra_fill, halved, zero_outside
from tfmaskformer.module import Module, ModuleSequence


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
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
        # After a ReLU zeros never win over a pixel that exists, so zero padding is torch's padding with −inf.
        outputs = zero_outside(tf.nn.relu(self.conv1(inputs, sizes)), halved(sizes))
        return tf.nn.max_pool2d(tf.pad(outputs, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")


class BottleneckBlock(Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions around a shortcut, projected where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, bottleneck_channels: int, stride: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.shortcut = _conv(in_channels, out_channels, 1, stride) if in_channels != out_channels else None
        self.conv1 = _conv(in_channels, bottleneck_channels, 1)
        self.conv2 = _conv(bottleneck_channels, bottleneck_channels, 3, stride)
        self.conv3 = _conv(bottleneck_channels, out_channels, 1)

    def call(self, inputs: tf.Tensor, sizes: tf.Tensor | None = None) -> tf.Tensor:
        outputs = tf.nn.relu(self.conv1(inputs))
        outputs = tf.nn.relu(self.conv2(outputs, sizes))
        outputs = self.conv3(outputs)
        shortcut = inputs if self.shortcut is None else self.shortcut(inputs)
        return tf.nn.relu(outputs + shortcut)


class Stage(ModuleSequence):
    """``res2`` … ``res5``: bottleneck blocks, the first of which may have a stride of 2."""

    def __init__(self, num_blocks: int, in_channels: int, out_channels: int, bottleneck_channels: int, stride: int, **kwargs: Any):
        first = BottleneckBlock(in_channels, out_channels, bottleneck_channels, stride)
        rest = (BottleneckBlock(out_channels, out_channels, bottleneck_channels, 1) for _ in range(num_blocks - 1))
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
        self.stem = BasicStem(config.stem_out_channels)
        in_channels = config.stem_out_channels
        for index, num_blocks in enumerate(config.blocks):
            out_channels = config.res2_out_channels * 2**index
            bottleneck_channels = config.width_per_group * 2**index
            stage = Stage(num_blocks, in_channels, out_channels, bottleneck_channels, stride=1 if index == 0 else 2)
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
