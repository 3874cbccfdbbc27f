"""The matcher's costs against the official ones, recorded in golden/criterion.npz, and their precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfmaskformer.config import CriterionConfig
from tfmaskformer.matcher import HungarianMatcher, mask_products

GOLDEN = Path(__file__).with_name("golden") / "criterion.npz"


def load(name, dtype):
    """(outputs, targets, recorded arrays) of a case."""
    with np.load(GOLDEN) as file:
        case = {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}
    layers = [
        {"pred_logits": tf.constant(x, dtype), "pred_masks": tf.constant(y, dtype)}
        for x, y in zip(case["logits"], case["pred_masks"], strict=True)
    ]
    targets = {
        "labels": tf.constant(case["labels"], tf.int32),
        "masks": tf.constant(case["masks"]),
        "num_objects": tf.constant(case["num_objects"], tf.int32),
    }
    return {**layers[0], "aux_outputs": layers[1:]}, targets, case


CASES = ["padded_batch", "more_objects_than_queries", "an_image_without_objects", "no_objects", "confident"]


@pytest.mark.parametrize(("name", "jit_compile"), [*((name, False) for name in CASES), ("more_objects_than_queries", True)])
def test_costs_are_the_official_ones_in_float64(name, jit_compile):
    outputs, targets, case = load(name, "float64")
    matching = tf.function(HungarianMatcher(CriterionConfig()), jit_compile=jit_compile)(outputs, targets)
    for actual, expected in zip(matching[:4], case["costs"], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(matching.assignment, case["assignment"])
    assert matching.assignment.dtype == tf.int32
    assert matching.valid.numpy().all()


@pytest.mark.parametrize("split_products", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_costs_are_float32_for_everything_but_float64(dtype, split_products):
    outputs, targets, case = load("padded_batch", dtype)
    matching = HungarianMatcher(CriterionConfig(), split_products)(outputs, targets)
    assert matching.total.dtype == tf.float32
    if dtype == "float32":
        np.testing.assert_allclose(matching.total, case["costs"][3], rtol=1e-6)
        np.testing.assert_array_equal(matching.assignment, case["assignment"])


def to_bfloat16(x):
    return np.asarray(tf.cast(tf.cast(x, tf.bfloat16), x.dtype))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_split_products_survive_a_device_that_multiplies_in_bfloat16(jit_compile, monkeypatch):
    """The operands of every product are rounded to bfloat16, as a TPU does, and the sums still are those of float32."""
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(2, 5, 400)) * 10.0 ** rng.integers(-6, 3, (2, 5, 400))).astype(np.float32)
    masks = (rng.random((2, 3, 400)) < 0.5).astype(np.float32)
    exact = values.astype(np.float64) @ masks.astype(np.float64).swapaxes(1, 2)
    scale = np.abs(values).astype(np.float64) @ masks.swapaxes(1, 2)

    operands = []
    product = tf.matmul

    def coarse_product(a, b, **kwargs):
        operands.append(a)
        mantissa = tf.bitcast(tf.bitcast(a, tf.int32) & -(2**16), tf.float32)  # what bfloat16 keeps
        return product(mantissa, b, **kwargs)

    monkeypatch.setattr(tf, "matmul", coarse_product)
    for split, tolerance in ((True, 3e-7), (False, None)):
        run = tf.function(lambda values, masks, split=split: mask_products(values, masks, split), jit_compile=jit_compile)
        error = np.max(np.abs(run(values, masks) - exact) / scale)
        assert error > 1e-4 if tolerance is None else error < tolerance


def test_pieces_are_exact_in_bfloat16_and_add_up(monkeypatch):
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(1, 1, 1000)) * 10.0 ** rng.integers(-30, 30, (1, 1, 1000))).astype(np.float32)
    pieces = []
    monkeypatch.setattr(tf, "matmul", lambda a, b, **kwargs: pieces.append(a.numpy()) or a)
    mask_products(tf.constant(values), tf.ones([1, 1, 1000]), split=True)
    assert len(pieces) == 3
    for piece in pieces:
        np.testing.assert_array_equal(piece, to_bfloat16(piece))
    np.testing.assert_array_equal(sum(piece.astype(np.float64) for piece in pieces), values)


def test_products_are_split_where_an_accelerator_is_visible(monkeypatch):
    outputs, targets, _ = load("no_objects", "float32")
    seen = []

    def spy(values, masks, split):
        seen.append(split)
        return mask_products(values, masks, split)

    monkeypatch.setattr("tfmaskformer.matcher.mask_products", spy)
    for kind, expected in (("CPU", False), ("GPU", True), ("TPU", True)):
        device = tf.config.LogicalDevice(f"/device:{kind}:0", kind)
        monkeypatch.setattr(tf.config, "list_logical_devices", lambda device=device: [device])
        seen.clear()
        HungarianMatcher(CriterionConfig())(outputs, targets)
        assert set(seen) == {expected}, kind


@pytest.mark.parametrize("jit_compile", [False, True])
def test_masked_padding_costs_each_image_as_alone(jit_compile):
    sizes, canvas = [(33, 50), (41, 36), (44, 64)], (44, 64)
    rng = np.random.default_rng(0)
    logits, pred_masks = rng.normal(size=(3, 6, 5)), rng.normal(size=(3, 6, 11, 16))
    labels, masks = rng.integers(0, 4, (3, 3)), rng.random((3, 3, *canvas)) < 0.5
    run = tf.function(HungarianMatcher(CriterionConfig()), jit_compile=jit_compile)
    outputs = {"pred_logits": tf.constant(logits), "pred_masks": tf.constant(pred_masks), "valid_sizes": tf.constant(sizes)}
    together = run(outputs, {"labels": tf.constant(labels), "masks": tf.constant(masks), "num_objects": tf.constant([3, 3, 3])})
    for image, (height, width) in enumerate(sizes):
        only = slice(image, image + 1)
        outputs = {
            "pred_logits": tf.constant(logits[only]),
            "pred_masks": tf.constant(pred_masks[only, :, : -(-height // 4), : -(-width // 4)]),
        }
        targets = {
            "labels": tf.constant(labels[only]),
            "masks": tf.constant(masks[only, :, :height, :width]),
            "num_objects": tf.constant([3]),
        }
        alone = HungarianMatcher(CriterionConfig())(outputs, targets)
        for actual, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(actual[:, only], expected, rtol=1e-12, atol=1e-14)


def test_not_finite_costs_are_reported_and_stay_where_they_are():
    outputs, targets, case = load("padded_batch", "float32")
    broken = outputs["aux_outputs"][0]["pred_masks"].numpy()
    broken[1, 3, 0, 0] = np.nan
    outputs["aux_outputs"][0]["pred_masks"] = tf.constant(broken)
    matching = HungarianMatcher(CriterionConfig())(outputs, targets)
    np.testing.assert_array_equal(matching.valid, [[True, True], [True, False], [True, True]])
    case["assignment"][1, 1] = -1
    np.testing.assert_array_equal(matching.assignment, case["assignment"])
    assert np.isnan(matching.total[1, 1, 3, 0])


def test_no_gradient_passes():
    outputs, targets, _ = load("no_objects", "float32")
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        total = tf.reduce_sum(HungarianMatcher(CriterionConfig())(outputs, targets).total)
    assert all(gradient is None for gradient in tf.nest.flatten(tape.gradient(total, outputs)))
