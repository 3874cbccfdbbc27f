"""The linear layer's long sums: right for every length, and short enough to be as exact as PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmaskformer.layers import LONGEST_SUM, linear


def operands(rows, channels, outputs=96):
    random = np.random.default_rng(channels)
    return random.standard_normal((rows, channels)), random.standard_normal((channels, outputs)), random.standard_normal(outputs)


@pytest.mark.parametrize("channels", [1, LONGEST_SUM, LONGEST_SUM + 1, 3 * LONGEST_SUM - 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-14)])
def test_every_length_is_added_up_whole(channels, dtype, tolerance):
    inputs, weight, bias = (array.astype(dtype) for array in operands(6, channels))
    expected = inputs.astype(np.float64) @ weight + bias
    for function in (linear, tf.function(linear)):
        actual = function(tf.constant(inputs.reshape(2, 3, -1)), tf.constant(weight), tf.constant(bias))
        assert actual.dtype == dtype
        assert np.linalg.norm(actual.numpy().reshape(6, -1) - expected) <= tolerance * np.linalg.norm(expected)


def test_long_float32_sums_are_as_exact_as_pytorchs():
    """2.1e-7, where PyTorch has 2.5e-7; TensorFlow's own product of these has 3.5e-7 on a CPU with AVX-512."""
    inputs, weight, _ = operands(266, 1536, 384)
    inputs, weight = inputs.astype(np.float32), weight.astype(np.float32)
    expected = inputs.astype(np.float64) @ weight.astype(np.float64)
    error = np.linalg.norm(tf.function(linear)(inputs, weight, None) - expected) / np.linalg.norm(expected)
    assert error < 2.5e-7
