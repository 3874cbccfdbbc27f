"""Resizing against PyTorch's rules, written once more in NumPy with floating-point coordinates.

The NumPy rules were compared with ``torch.nn.functional.interpolate`` (torch 2.13) on the sizes below: nearest equal, bilinear
to 1e-14 in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmaskformer.resize import nearest_indices, resize_bilinear, resize_nearest, valid_pixels

SIZES = [
    ((13, 17), (25, 34)),
    ((1, 1), (4, 3)),
    ((7, 5), (7, 5)),
    ((16, 24), (61, 95)),
    ((50, 84), (13, 21)),
    ((3, 200), (2, 67)),
]


def torch_indices(in_size, out_size):
    scale = np.float32(in_size) / np.float32(out_size)
    return np.floor(np.arange(out_size, dtype=np.float32) * scale).astype(int)


def numpy_nearest(x, size):
    rows, columns = (torch_indices(m, n) for m, n in zip(x.shape[-2:], size, strict=True))
    return x[..., rows, :][..., columns]


def numpy_bilinear(x, size):
    for axis, n in ((-2, size[0]), (-1, size[1])):
        m = x.shape[axis]
        source = np.maximum((np.arange(n) + 0.5) * (m / n) - 0.5, 0)
        left = np.minimum(source.astype(int), m - 1)
        right = np.minimum(left + 1, m - 1)
        fraction = (source - left) if axis == -1 else (source - left)[:, None]
        x = np.take(x, left, axis) * (1 - fraction) + np.take(x, right, axis) * fraction
    return x


def random(shape, dtype="float64", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def canvas_of(images, canvas):
    """Images [..., h, w] of different sizes in one zero canvas [batch, ..., H, W]."""
    batch = np.zeros((len(images), *images[0].shape[:-2], *canvas), images[0].dtype)
    for target, image in zip(batch, images, strict=True):
        target[..., : image.shape[-2], : image.shape[-1]] = image
    return batch


@pytest.mark.parametrize(("in_size", "out_size"), SIZES)
def test_nearest_follows_torch(in_size, out_size):
    x = random((2, 3, *in_size))
    actual = resize_nearest(tf.transpose(x, [0, 2, 3, 1]), out_size)
    np.testing.assert_array_equal(tf.transpose(actual, [0, 3, 1, 2]), numpy_nearest(x, out_size))


def test_nearest_indices_equal_torchs_float32_rule_for_the_sizes_that_occur():
    pairs = [(h, -(-h // 4)) for h in range(1, 4097, 3)] + [(n, 2 * n - odd) for n in range(1, 1025, 5) for odd in (0, 1)]
    for in_size, out_size in pairs:
        expected = torch_indices(in_size, out_size)
        np.testing.assert_array_equal(np.arange(out_size) * in_size // out_size, expected, err_msg=f"{in_size} → {out_size}")
    for in_size, out_size in pairs[:: len(pairs) // 20]:
        np.testing.assert_array_equal(nearest_indices(in_size, out_size), np.arange(out_size) * in_size // out_size)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 3e-6)])
@pytest.mark.parametrize("leading", [(), (1,), (5,), (1, 6), (2, 3)])
@pytest.mark.parametrize(("in_size", "out_size"), SIZES)
def test_bilinear_follows_torch(in_size, out_size, leading, dtype, tolerance):
    x = random((*leading, *in_size))
    actual = resize_bilinear(tf.constant(x, dtype), out_size)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, numpy_bilinear(x, out_size), atol=tolerance)


def test_bilinear_of_large_masks_is_right_in_float32():
    """The shape class in which oneDNN kernels were found wrong: many rows, batch 1."""
    x = random((1, 100, 100, 167))
    np.testing.assert_allclose(resize_bilinear(tf.constant(x, tf.float32), (400, 667)), numpy_bilinear(x, (400, 667)), atol=5e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_images_in_a_canvas_resize_as_alone(direction, jit_compile):
    large, small = [(61, 95), (33, 63), (64, 96)], [(16, 24), (9, 16), (16, 24)]
    in_sizes, out_sizes = (small, large) if direction == "up" else (large, small)
    in_canvas, out_canvas = ((20, 25), (64, 100)) if direction == "up" else ((64, 100), (20, 25))
    images = [random((3, *size), seed=seed) for seed, size in enumerate(in_sizes)]

    @tf.function(jit_compile=jit_compile)
    def resize(x, in_sizes, out_sizes):
        nearest = resize_nearest(tf.transpose(x, [0, 2, 3, 1]), out_canvas, in_sizes, out_sizes)
        return tf.transpose(nearest, [0, 3, 1, 2]), resize_bilinear(x, out_canvas, in_sizes, out_sizes)

    garbage = np.where(canvas_of([np.ones_like(image) for image in images], in_canvas) > 0, 0, 1e3)
    nearest, bilinear = resize(canvas_of(images, in_canvas) + garbage, tf.constant(in_sizes), tf.constant(out_sizes))
    expected = [numpy_nearest(image, size) for image, size in zip(images, out_sizes, strict=True)]
    np.testing.assert_array_equal(nearest, canvas_of(expected, out_canvas))
    expected = [numpy_bilinear(image, size) for image, size in zip(images, out_sizes, strict=True)]
    np.testing.assert_allclose(bilinear, canvas_of(expected, out_canvas), atol=1e-12)


def test_unknown_static_shapes():
    @tf.function(input_signature=[tf.TensorSpec([None, None, None, None], tf.float64), tf.TensorSpec([2], tf.int32)])
    def resize(x, size):
        return resize_bilinear(x, size), resize_nearest(tf.transpose(x, [0, 2, 3, 1]), size)

    x = random((2, 3, 9, 11))
    bilinear, nearest = resize(x, [17, 30])
    np.testing.assert_allclose(bilinear, numpy_bilinear(x, (17, 30)), atol=1e-13)
    np.testing.assert_array_equal(tf.transpose(nearest, [0, 3, 1, 2]), numpy_nearest(x, (17, 30)))


def test_gradients_are_the_transposed_operation():
    x, y = tf.constant(random((1, 4, 9, 11))), random((1, 4, 33, 41), seed=1)
    with tf.GradientTape() as tape:
        tape.watch(x)
        product = tf.reduce_sum(resize_bilinear(x, (33, 41)) * y)
    np.testing.assert_allclose(tf.reduce_sum(tape.gradient(product, x) * x), product, rtol=1e-12)


def test_valid_pixels():
    expected = [[[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [1, 0, 0]]]
    np.testing.assert_array_equal(valid_pixels(tf.constant([[1, 2], [2, 1]]), (2, 3)), np.array(expected, bool))


def test_one_size_alone_is_refused():
    with pytest.raises(ValueError, match="belong together"):
        resize_nearest(tf.zeros([1, 2, 2, 1]), (4, 4), in_sizes=tf.constant([[1, 1]]))
