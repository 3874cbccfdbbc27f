"""What R101c has beside R50 and R101: the DeepLab stem and dilated convolutions, against loops over single pixels."""

import numpy as np
import pytest
import tensorflow as tf

from tests.tfmaskformer.conftest import random_values
from tfmaskformer.config import MaskFormerConfig, ResNetConfig
from tfmaskformer.layers import Conv2d
from tfmaskformer.model import MaskFormer, _dtype_policy
from tfmaskformer.module import assign_official_names, build_parameters, named_modules
from tfmaskformer.resnet import DeepLabStem, ResNet

SIZES = ((75, 33), (24, 50))


def conv(inputs, kernel, stride=1, dilation=1):
    """One image [rows, columns, channels], one output pixel and one tap of the kernel at a time."""
    height, width, _ = inputs.shape
    reach = kernel.shape[0] // 2
    outputs = np.zeros((-(-height // stride), -(-width // stride), kernel.shape[-1]))
    for row, column, down, right in np.ndindex(*outputs.shape[:2], *kernel.shape[:2]):
        source = stride * row + dilation * (down - reach), stride * column + dilation * (right - reach)
        if 0 <= source[0] < height and 0 <= source[1] < width:
            outputs[row, column] += inputs[source] @ kernel[down, right]
    return outputs


def norm(inputs, module):
    scale = module.weight.numpy() / np.sqrt(module.running_var.numpy() + 1e-5)
    return (inputs - module.running_mean.numpy()) * scale + module.bias.numpy()


def dilated(dilation, stride):
    with _dtype_policy("float64"):
        module = Conv2d(3, 5, 3, stride=stride, dilation=dilation)
    module.build()
    module.bias.assign(np.arange(5))
    return module


@pytest.mark.parametrize("size", [(9, 14), (8, 8), (3, 2), (1, 1)])
@pytest.mark.parametrize(("dilation", "stride"), [(2, 1), (4, 1), (2, 2)])
def test_dilated_convolution_of_any_size(size, dilation, stride):
    """Also of maps that are smaller than the kernel's reach."""
    module = dilated(dilation, stride)
    inputs = np.random.default_rng(1).standard_normal((2, *size, 3))
    actual = module(tf.constant(inputs)).numpy()
    for image, expected in zip(actual, inputs, strict=True):
        np.testing.assert_allclose(image, conv(expected, module.weight.numpy(), stride, dilation) + np.arange(5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla", "unknown size"])
def test_gradient_of_the_dilated_convolution(mode):
    """It is linear, so its gradient along a direction is what it gives for that direction."""
    module = dilated(4, 1)
    rng = np.random.default_rng(2)
    inputs, direction = (tf.constant(rng.standard_normal((2, 7, 10, 3))) for _ in range(2))
    weights = tf.constant(rng.standard_normal((2, 7, 10, 5)))

    def gradients(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(weights * module(inputs))
        return tape.gradient(loss, [inputs, module.weight.value])

    if mode == "unknown size":
        gradients = tf.function(gradients, input_signature=[tf.TensorSpec([None, None, None, 3], tf.float64)])
    elif mode != "eager":
        gradients = tf.function(gradients, jit_compile=mode == "xla")
    of_inputs, of_weight = gradients(inputs)
    along = tf.reduce_sum(weights * (module(direction) - module.bias))
    np.testing.assert_allclose(tf.reduce_sum(of_inputs * direction), along, rtol=1e-12)
    along = tf.reduce_sum(weights * (module(inputs) - module.bias))
    np.testing.assert_allclose(tf.reduce_sum(of_weight * module.weight), along, rtol=1e-12)


@pytest.mark.parametrize("size", [(9, 14), (8, 12)])
def test_deeplab_stem(size):
    with _dtype_policy("float64"):
        stem = DeepLabStem(8)
    rng = np.random.default_rng(3)
    build_parameters(stem, lambda name: rng.uniform(0.5, 1.5, stem_shape(stem, name)) * (1 if "norm" in name else rng.choice([-1, 1])))
    image = rng.standard_normal((*size, 3))
    expected = image
    for index, stride in enumerate((2, 1, 1), start=1):
        module = getattr(stem, f"conv{index}")
        expected = np.maximum(norm(conv(expected, module.weight.numpy(), stride), module.norm), 0)
    rows, columns = (-(-side // 2) for side in expected.shape[:2])
    pooled = np.zeros((rows, columns, 8))
    for row, column in np.ndindex(rows, columns):
        pooled[row, column] = expected[max(2 * row - 1, 0) : 2 * row + 2, max(2 * column - 1, 0) : 2 * column + 2].max((0, 1))
    np.testing.assert_allclose(stem(tf.constant(image[None]))[0], pooled, rtol=1e-12, atol=1e-12)


def stem_shape(stem, name):
    module, _, variable = name.rpartition(".")
    return dict(named_modules(stem))[module]._declared[variable].shape


@pytest.fixture(scope="module")
def r101c():
    """R50's depth, R101c's architecture."""
    config = ResNetConfig(
        depth=50, stem_type="deeplab", stem_out_channels=16, width_per_group=12, res2_out_channels=40, res5_multi_grid=(1, 2, 4)
    )
    values = random_values(MaskFormerConfig(name="deeplab", num_classes=2, backbone=config))
    with _dtype_policy("float64"):
        module = ResNet(config)
    assign_official_names(module)
    build_parameters(module, lambda name: values[f"backbone.{name}"])
    return module


def test_only_res5_is_dilated_and_keeps_its_stride(r101c):
    dilations = {name: module.dilation for name, module in named_modules(r101c) if isinstance(module, Conv2d) and module.dilation > 1}
    assert dilations == {"res5.1.conv2": 2, "res5.2.conv2": 4}
    assert (r101c.res5[0].conv2.stride, r101c.res5[0].shortcut.stride) == (2, 2)
    assert r101c(tf.zeros([1, 65, 97, 3], tf.float64))["res5"].shape == (1, 3, 4, 320)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_masked_padding_gives_what_each_image_gives_alone(r101c, jit_compile):
    rng = np.random.default_rng(4)
    images = [rng.standard_normal((*size, 3)) for size in SIZES]
    canvas = np.full((2, 91, 70, 3), np.nan)
    for index, image in enumerate(images):
        canvas[index, : image.shape[0], : image.shape[1]] = image
    together = tf.function(r101c.call, jit_compile=jit_compile)(tf.constant(canvas), tf.constant(SIZES))
    for index, image in enumerate(images):
        for level, (name, expected) in enumerate(r101c(tf.constant(image[None])).items(), start=2):
            rows, columns = (-(-side // 2**level) for side in image.shape[:2])
            actual = together[name][index, :rows, :columns]
            np.testing.assert_allclose(actual, expected[0], rtol=1e-11, atol=1e-12 * np.abs(expected).max())


def test_basic_and_deeplab_stems_have_their_own_names():
    for stem, convolutions in (("basic", 1), ("deeplab", 3)):
        model = MaskFormer(MaskFormerConfig(name="mine", num_classes=2, backbone=ResNetConfig(stem_type=stem)))
        names = {name for name, _ in named_modules(model) if name.startswith("backbone.stem.") and "norm" not in name}
        assert names == {f"backbone.stem.conv{index + 1}" for index in range(convolutions)}
