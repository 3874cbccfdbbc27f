"""Swin against loops over single patches, at sizes that fit the windows and sizes that do not, alone and inside a canvas."""

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf

from checkpoints import registry
from tests.tfmaskformer.conftest import random_values
from tfmaskformer.config import MaskFormerConfig, SwinConfig
from tfmaskformer.model import _dtype_policy
from tfmaskformer.module import assign_official_names, build_parameters, named_modules, named_variables, record_taps
from tfmaskformer.swin import (
    BasicLayer,
    D2SwinTransformer,
    DropPath,
    Gelu,
    PatchEmbed,
    PatchMerging,
    SwinTransformerBlock,
    shift_mask,
)

CONFIG = SwinConfig(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 3, 4, 6), window_size=3, drop_path_rate=0.35)
# Patches of the two images: grids of 19 × 9 and 6 × 13, neither even nor whole windows.
SIZES = ((75, 33), (24, 50))


@pytest.fixture(scope="module", autouse=True)
def float64():
    """Every module here computes in float64."""
    with _dtype_policy("float64"):
        yield


def built(make, seed=0):
    """A module with random values."""
    rng = np.random.default_rng(seed)
    module = make()
    for child in [module, *(child for _, child in named_modules(module))]:
        for name, spec in child._declared.items():
            values = rng.standard_normal(spec.shape) / math.sqrt(spec.shape[0] if len(spec.shape) == 2 else 1)
            child._declared[name] = type(spec)(spec.shape, spec.trainable, lambda shape, dtype, values=values: tf.constant(values, dtype))
        child.build()
    return module


@pytest.fixture(scope="module")
def backbone(float64):
    config = MaskFormerConfig(name="swin", num_classes=2, backbone=CONFIG)
    values = random_values(config)
    module = D2SwinTransformer(CONFIG)
    assign_official_names(module)
    build_parameters(module, lambda name: values[f"backbone.{name}"])
    return module


def norm(inputs, module):
    centred = inputs - inputs.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * module.weight.numpy() + module.bias.numpy()


def linear(inputs, module):
    return inputs @ module.weight.numpy() + module.bias.numpy()


def erf_gelu(inputs):
    return inputs * np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))))(inputs)


def attention(normed, block):
    """Of every patch of one image [rows, columns, channels] over the patches of its window, one pair of patches at a time."""
    module, window, shift = block.attn, block.window_size, block.shift_size
    height, width, channels = normed.shape
    rows, columns = (-(-side // window) * window for side in (height, width))
    padded = np.zeros((rows, columns, channels))
    padded[:height, :width] = normed
    query, key, value = np.moveaxis(linear(padded, module.qkv).reshape(rows, columns, 3, module.num_heads, -1), 2, 0)
    table = module.relative_position_bias_table.numpy().reshape(2 * window - 1, 2 * window - 1, module.num_heads)
    positions = list(itertools.product(range(rows), range(columns)))

    def place(position):
        """(window, place in it) along both axes, behind the cyclic shift."""
        return [divmod((at - shift) % side, window) for at, side in zip(position, (rows, columns), strict=True)]

    outputs = np.zeros((rows, columns, module.num_heads, channels // module.num_heads))
    for at in positions:
        (row_window, row), (column_window, column) = place(at)
        scores, values = [], []
        for other in positions:
            (other_row_window, other_row), (other_column_window, other_column) = place(other)
            if (other_row_window, other_column_window) != (row_window, column_window):
                continue
            score = (query[at] * key[other]).sum(-1) / math.sqrt(query.shape[-1])
            score += table[row - other_row + window - 1, column - other_column + window - 1]
            # One of the two came in again at the other side.
            score -= 100 * any((a < shift) != (b < shift) for a, b in zip(at, other, strict=True))
            scores.append(score)
            values.append(value[other])
        weights = np.exp(np.array(scores) - np.max(scores, axis=0))
        outputs[at] = np.einsum("kh,khc->hc", weights / weights.sum(0), np.array(values))
    return linear(outputs.reshape(rows, columns, channels)[:height, :width], module.proj)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (6, 3), (2, 1), (8, 4)])
@pytest.mark.parametrize("shift", [0, 1])
def test_block(height, width, shift):
    block = built(lambda: SwinTransformerBlock(12, 3, 3, shift, 2.5, 0.0, 0.0, 0.2))
    inputs = np.random.default_rng(1).standard_normal((2, height, width, 12))
    actual = block(tf.constant(inputs), shift_mask((height, width), 3, shift, tf.float64))
    for image, of_block in zip(inputs, actual.numpy(), strict=True):
        attended = image + attention(norm(image, block.norm1), block)
        hidden = erf_gelu(linear(norm(attended, block.norm2), block.mlp.fc1))
        np.testing.assert_allclose(of_block, attended + linear(hidden, block.mlp.fc2), rtol=1e-12, atol=1e-12)


def test_every_second_block_shifts_by_half_a_window():
    for window, shift in ((3, 1), (7, 3), (12, 6)):
        layer = BasicLayer(SwinConfig(embed_dim=12, num_heads=(3, 3, 3, 3), window_size=window), 0, [0.0] * 5)
        assert [block.shift_size for block in layer.blocks] == [0, shift, 0, shift, 0]


def test_relative_position_index_by_hand():
    """Window of 3 × 3: the middle patch (4) sees the top left one (0) one row and one column before it."""
    index = registry.relative_position_index(3)
    assert index.shape == (9, 9)
    assert (np.diag(index) == 12).all()
    assert (index[4, 0], index[0, 4], index[4, 1], index[4, 3]) == (12 + 5 + 1, 12 - 5 - 1, 12 + 5, 12 + 1)
    assert np.unique(index).size == 25


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 2)])
def test_patch_merging_pads_odd_grids_and_goes_down_first(size):
    module = built(lambda: PatchMerging(3))
    inputs = np.random.default_rng(2).standard_normal((2, *size, 3))
    actual = module(tf.constant(inputs)).numpy()
    assert actual.shape == (2, (size[0] + 1) // 2, (size[1] + 1) // 2, 6)
    padded = np.zeros((2, size[0] + 1, size[1] + 1, 3))
    padded[:, : size[0], : size[1]] = inputs
    for row, column in itertools.product(*map(range, actual.shape[1:3])):
        top, left = 2 * row, 2 * column
        patches = [padded[:, top + down, left + right] for right in (0, 1) for down in (0, 1)]
        expected = norm(np.concatenate(patches, -1), module.norm) @ module.reduction.weight.numpy()
        np.testing.assert_allclose(actual[:, row, column], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 12), (9, 14), (3, 7)])
def test_patch_embed_pads_images_that_are_not_whole_patches(size):
    module = built(lambda: PatchEmbed(5))
    images = np.random.default_rng(3).standard_normal((1, *size, 3))
    rows, columns = (-(-side // 4) for side in size)
    padded = np.zeros((4 * rows, 4 * columns, 3))
    padded[: size[0], : size[1]] = images[0]
    patches = padded.reshape(rows, 4, columns, 4, 3).transpose(0, 2, 1, 3, 4).reshape(rows, columns, -1)
    expected = norm(patches @ module.proj.weight.numpy().reshape(-1, 5) + module.proj.bias.numpy(), module.norm)
    np.testing.assert_allclose(module(tf.constant(images))[0], expected, rtol=1e-12, atol=1e-12)


def test_gelu_is_exact_in_float64():
    values = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(Gelu()(tf.constant(values)), erf_gelu(values), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla", "unknown sizes"])
def test_masked_padding_gives_what_each_image_gives_alone(backbone, mode):
    """Whatever stands outside, also NaN; the canvas is whole windows and patches of none of the images."""
    rng = np.random.default_rng(4)
    images = [rng.standard_normal((*size, 3)) for size in SIZES]
    canvas = np.full((2, 91, 70, 3), np.nan)
    for index, image in enumerate(images):
        canvas[index, : image.shape[0], : image.shape[1]] = image
    run = backbone.call
    if mode == "unknown sizes":
        signature = [tf.TensorSpec([None, None, None, 3], tf.float64), tf.TensorSpec([None, 2], tf.int32)]
        run = tf.function(run, input_signature=signature)
    elif mode != "eager":
        run = tf.function(run, jit_compile=mode == "xla")
    together = run(tf.constant(canvas), tf.constant(SIZES))
    for index, image in enumerate(images):
        alone = backbone(tf.constant(image[None]))
        for level, (name, expected) in enumerate(alone.items(), start=2):
            rows, columns = (-(-side // 2**level) for side in image.shape[:2])
            assert expected.shape == (1, rows, columns, CONFIG.out_channels[name])
            assert np.isfinite(together[name]).all()
            np.testing.assert_allclose(together[name][index, :rows, :columns], expected[0], rtol=1e-12, atol=1e-12)


def test_unknown_sizes_without_masked_padding(backbone):
    run = tf.function(lambda images: backbone(images), input_signature=[tf.TensorSpec([None, None, None, 3], tf.float64)])
    for size in SIZES:
        image = tf.random.stateless_normal([1, *size, 3], [1, 2], dtype=tf.float64)
        for name, expected in backbone(image).items():
            np.testing.assert_allclose(run(image)[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradients_of_masked_padding_are_those_of_each_image_alone(backbone, jit_compile):
    images = [np.random.default_rng(5).standard_normal((*size, 3)) for size in SIZES]
    canvas = np.full((2, 91, 70, 3), 7.0)
    for index, image in enumerate(images):
        canvas[index, : image.shape[0], : image.shape[1]] = image
    variables = {name: variable.value for name, variable in named_variables(backbone).items()}

    def gradients(images, sizes=None):
        with tf.GradientTape() as tape:
            tape.watch(images)
            loss = tf.constant(0.0, tf.float64)
            for level, feature in enumerate(backbone(images, sizes).values(), start=2):
                for index, (height, width) in enumerate(SIZES if sizes is not None else [images.shape[1:3]]):
                    loss += tf.reduce_sum(feature[index, : -(-height // 2**level), : -(-width // 2**level)] ** 3)
        return tape.gradient(loss, [images, *variables.values()])

    of_canvas, *together = tf.function(gradients, jit_compile=jit_compile)(tf.constant(canvas), tf.constant(SIZES))
    alone = [gradients(tf.constant(image[None])) for image in images]
    for name, actual, first, second in zip(variables, together, alone[0][1:], alone[1][1:], strict=True):
        assert isinstance(actual, tf.Tensor), name
        difference, scale = np.linalg.norm(actual - (first + second)), np.linalg.norm(actual)
        assert difference < 1e-11 * scale, name
    outside = of_canvas.numpy()
    for index, (image, own) in enumerate(zip(images, alone, strict=True)):
        inside = outside[index, : image.shape[0], : image.shape[1]]
        np.testing.assert_allclose(inside, own[0][0], rtol=1e-9, atol=1e-11 * np.abs(own[0]).max())
        inside[:] = 0
    assert not outside.any()


def test_no_window_of_another_image_or_of_the_canvas_is_read(backbone):
    """The taps of windows: the true ones of the first image are the same on any canvas."""
    image = np.random.default_rng(6).standard_normal((1, *SIZES[0], 3))
    with record_taps() as alone:
        backbone(tf.constant(image))
    with record_taps() as padded:
        backbone(tf.pad(tf.constant(image), [[0, 0], [0, 40], [0, 61], [0, 0]]), tf.constant(SIZES[:1]))
    assert list(alone) == list(padded)
    assert len(alone) > 8 * 14
    for name, expected in alone.items():
        crop = tuple(slice(length) for length in expected.shape)
        np.testing.assert_allclose(padded[name][crop], expected, rtol=1e-11, atol=1e-11, err_msg=name)


def test_stochastic_depth_drops_images_as_a_whole():
    tf.random.set_seed(1)
    module = DropPath(0.25)
    inputs = tf.ones([4000, 2, 3, 5], tf.float64)
    assert (module(inputs) == inputs).numpy().all()
    for run in (module, tf.function(module, jit_compile=True)):
        outputs = run(inputs, training=True).numpy().reshape(4000, -1)
        assert (outputs == outputs[:, :1]).all()
        assert set(np.unique(outputs)) == {0, 1 / 0.75}
        # Four standard deviations of the share of 4000.
        assert abs((outputs[:, 0] == 0).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)


def test_stochastic_depth_grows_linearly_with_depth(backbone):
    rates = [block.drop_path.rate for layer in backbone.layers for block in layer.blocks]
    np.testing.assert_allclose(rates, 0.05 * np.arange(8), atol=1e-7)
    # [x.item() for x in torch.linspace(0, 0.35, 8)], PyTorch 2.13
    upstream = [0.0, 0.05000000074505806, 0.10000000149011612, 0.15000000596046448]
    upstream += [0.19999998807907104, 0.25, 0.29999998211860657, 0.3499999940395355]
    assert rates == upstream
    images = tf.random.stateless_normal([3, 32, 40, 3], [3, 4], dtype=tf.float64)
    tf.random.set_seed(2)
    quiet, noisy = backbone(images), backbone(images, training=True)
    assert np.abs(noisy["res5"] - quiet["res5"]).max() > 1e-3


def test_initial_values_are_upstreams():
    module = D2SwinTransformer(SwinConfig())
    build_parameters(module)
    values = {name: variable.numpy() for name, variable in named_variables(module).items()}
    tables = np.concatenate([value.ravel() for name, value in values.items() if name.endswith("relative_position_bias_table")])
    assert np.std(tables) == pytest.approx(0.02, rel=0.03)
    assert np.abs(tables).max() > 0.05
    for name, fan_in in (("layers.0.blocks.1.mlp.fc2", 384), ("layers.2.blocks.0.attn.qkv", 384), ("patch_embed.proj", 48)):
        for what in ("weight", "bias"):
            assert np.abs(values[f"{name}.{what}"]).max() == pytest.approx(fan_in**-0.5, rel=0.05)
    assert "layers.1.downsample.reduction.bias" not in values
    assert (values["layers.1.blocks.0.norm1.weight"] == 1).all()
    assert not values["norm3.bias"].any()
