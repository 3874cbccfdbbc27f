"""Losses, gradients and assignments against the official code, recorded in golden/criterion.npz (see golden/record_criterion.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig, TransformerPredictorConfig
from tfmaskformer.criterion import SetCriterion

GOLDEN = Path(__file__).with_name("golden") / "criterion.npz"


def load(name):
    with np.load(GOLDEN) as file:
        return {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}


def case_names():
    with np.load(GOLDEN) as file:
        return sorted({key.split("/")[0] for key in file.files})


def criterion_for(case, **kwargs):
    layers, _, queries, classes = case["logits"].shape
    predictor = TransformerPredictorConfig(num_queries=queries, dec_layers=layers)
    return SetCriterion(MaskFormerConfig("golden", classes - 1, predictor=predictor), **kwargs)


def outputs_of(logits, pred_masks, **extra):
    final, *aux = ({"pred_logits": x, "pred_masks": y} for x, y in zip(tf.unstack(logits), tf.unstack(pred_masks), strict=True))
    return {**final, "aux_outputs": aux, **extra}


def targets_of(case):
    return {
        "labels": tf.constant(case["labels"], tf.int32),
        "masks": tf.constant(case["masks"]),
        "num_objects": tf.constant(case["num_objects"], tf.int32),
    }


def run(case, dtype, mode="graph", **extra):
    """losses, assignment, weighted total and its gradients (with respect to logits and masks)."""
    criterion = criterion_for(case)

    def compute(logits, pred_masks):
        with tf.GradientTape() as tape:
            tape.watch([logits, pred_masks])
            losses, assignment = criterion(outputs_of(logits, pred_masks, **extra), targets_of(case))
            total = criterion.weighted_total(losses)
        return losses, assignment, total, tape.gradient(total, [logits, pred_masks])

    if mode != "eager":
        compute = tf.function(compute, jit_compile=mode == "xla")
    return tf.nest.map_structure(np.asarray, compute(tf.constant(case["logits"], dtype), tf.constant(case["pred_masks"], dtype)))


def relative_l2(actual, expected):
    return np.linalg.norm(actual.astype(np.float64) - expected) / max(np.linalg.norm(expected), 1e-300)


def check_against_official(case, mode):
    losses, assignment, total, gradients = run(case, "float64", mode)
    suffixes = ["", *(f"_{i}" for i in range(len(case["logits"]) - 1))]
    assert list(losses) == [f"loss_{name}{suffix}" for suffix in suffixes for name in ("ce", "mask", "dice")]
    np.testing.assert_allclose(np.reshape(list(losses.values()), [-1, 3]), case["losses"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(total, case["total"], rtol=1e-12)
    np.testing.assert_array_equal(assignment, case["assignment"])
    for actual, key in zip(gradients, ("logits_gradient", "pred_masks_gradient"), strict=True):
        assert relative_l2(actual, case[key]) < 1e-12, key


@pytest.mark.parametrize("name", case_names())
def test_is_the_official_criterion_in_float64(name):
    check_against_official(load(name), "graph")


@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_eager_and_xla_are_the_official_criterion_too(mode):
    check_against_official(load("padded_batch"), mode)


def test_float32_is_as_good_as_the_official_float32():
    """Upstream's own float32 is 3e-7 (losses) and 7e-7 (gradients) from its float64 on such cases."""
    case = load("padded_batch")
    losses, assignment, _, gradients = run(case, "float32", "xla")
    assert {loss.dtype for loss in losses.values()} == {np.dtype("float32")}
    np.testing.assert_allclose(np.reshape(list(losses.values()), [-1, 3]), case["losses"], rtol=5e-7)
    np.testing.assert_array_equal(assignment, case["assignment"])
    assert relative_l2(gradients[0], case["logits_gradient"]) < 5e-7
    assert relative_l2(gradients[1], case["pred_masks_gradient"]) < 5e-7


def test_bfloat16_outputs_are_measured_in_float32():
    case = load("padded_batch")
    rounded = {key: np.asarray(tf.cast(tf.cast(case[key], tf.bfloat16), tf.float32)) for key in ("logits", "pred_masks")}
    actual, expected = run(case, "bfloat16"), run(case | rounded, "float32")
    for key, loss in expected[0].items():
        assert actual[0][key] == loss
    assert actual[3][1].dtype == tf.bfloat16.as_numpy_dtype


def test_no_objects_give_zero_mask_losses_with_zero_gradients():
    case = load("no_objects")
    losses, assignment, _, (logits_gradient, pred_masks_gradient) = run(case, "float32")
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    assert losses["loss_ce"] > 0
    assert (assignment == -1).all()
    assert np.abs(logits_gradient).max() > 0
    assert (pred_masks_gradient == 0).all()


def test_max_objects_may_be_zero():
    case = load("no_objects")
    expected = run(case, "float64")
    case |= {"labels": case["labels"][:, :0], "masks": case["masks"][:, :0]}
    losses, assignment, *_ = run(case, "float64")
    assert assignment.shape == (1, 2, 0)
    assert losses == expected[0]


def test_padding_of_targets_is_never_looked_at():
    case = load("padded_batch")
    expected = run(case, "float64")
    case["labels"][1, 2:] = 10**6
    case["masks"][1, 2:] = True
    actual = run(case, "float64")
    tf.nest.map_structure(np.testing.assert_array_equal, actual, expected)


def test_targets_may_be_arrays():
    case = load("padded_batch")
    outputs = outputs_of(tf.constant(case["logits"]), tf.constant(case["pred_masks"]))
    losses, _ = criterion_for(case)(outputs, {key: case[key] for key in ("labels", "masks", "num_objects")})
    np.testing.assert_allclose([float(loss) for loss in losses.values()], case["losses"].ravel(), rtol=1e-6)


def test_masks_may_be_any_number_type():
    case = load("padded_batch")
    expected = run(case, "float64")
    for dtype in (np.uint8, np.float32):
        tf.nest.map_structure(np.testing.assert_array_equal, run(case | {"masks": case["masks"].astype(dtype)}, "float64"), expected)


def test_forced_assignment_moves_the_losses():
    case = load("padded_batch")
    criterion = criterion_for(case)
    outputs = outputs_of(tf.constant(case["logits"], tf.float64), tf.constant(case["pred_masks"], tf.float64))
    own = criterion.losses(outputs, targets_of(case), tf.constant(case["assignment"], tf.int32))
    np.testing.assert_allclose([float(x) for x in own.values()], case["losses"].ravel(), rtol=1e-12)
    forced = case["assignment"].copy()
    forced[1, 0, [0, 1]] = forced[1, 0, [1, 0]]
    swapped = criterion.losses(outputs, targets_of(case), tf.constant(forced, tf.int32))
    changed = {key for key in own if abs(float(own[key] - swapped[key])) > 1e-6}
    assert changed == {"loss_ce_0", "loss_mask_0", "loss_dice_0"}


@pytest.mark.parametrize("key", ["logits", "pred_masks"])
def test_not_finite_outputs_give_nan_losses_of_their_layer(key):
    case = load("padded_batch")
    case[key][1, 0, 2] = np.nan
    losses, assignment, *_ = run(case, "float32", "eager")
    assert {name for name, loss in losses.items() if np.isnan(loss)} == {"loss_ce_0", "loss_mask_0", "loss_dice_0"}
    np.testing.assert_array_equal(assignment[1, 0], -1)
    np.testing.assert_array_equal(assignment[1, 1], case["assignment"][1, 1])


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_masked_padding_measures_each_image_as_alone(mode):
    """Two images of different size in one canvas, rubbish around them: what each contributes is what it gives alone."""
    sizes, canvas, objects = [(33, 50), (41, 36)], (44, 64), [3, 2]
    rng = np.random.default_rng(0)
    case = {
        "logits": rng.normal(size=(2, 2, 6, 5)),
        "pred_masks": rng.normal(size=(2, 2, 6, canvas[0] // 4, canvas[1] // 4)),
        "labels": rng.integers(0, 4, (2, 3)),
        "masks": rng.random((2, 3, *canvas)) < 0.5,
        "num_objects": np.array(objects),
    }
    losses, assignment, total, (_, gradient) = run(case, "float64", mode, valid_sizes=tf.constant(sizes))
    expected_gradient = np.zeros_like(gradient)
    sums = dict.fromkeys((key for key in losses if "ce" not in key), 0.0)
    for image, (height, width) in enumerate(sizes):
        only = slice(image, image + 1)
        h, w = -(-height // 4), -(-width // 4)
        alone = {
            "logits": case["logits"][:, only],
            "pred_masks": case["pred_masks"][:, only, :, :h, :w],
            "labels": case["labels"][only],
            "masks": case["masks"][only, :, :height, :width],
            "num_objects": case["num_objects"][only],
        }
        alone_losses, alone_assignment, _, (_, alone_gradient) = run(alone, "float64")
        np.testing.assert_array_equal(assignment[:, only], alone_assignment)
        share = objects[image] / sum(objects)
        expected_gradient[:, only, :, :h, :w] = share * alone_gradient
        for key in sums:
            sums[key] += share * alone_losses[key]
    for key, expected in sums.items():
        np.testing.assert_allclose(losses[key], expected, rtol=1e-12, err_msg=key)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-15)
    assert np.isfinite(total)


def test_compiles_for_any_device_with_static_shapes_and_no_call_to_the_host():
    criterion = SetCriterion(MaskFormerConfig("any", 5), split_products=True)

    @tf.function(jit_compile=True)
    def step(logits, pred_masks, labels, masks, num_objects, sizes):
        with tf.GradientTape() as tape:
            tape.watch([logits, pred_masks])
            targets = {"labels": labels, "masks": masks, "num_objects": num_objects}
            losses, assignment = criterion(outputs_of(logits, pred_masks, valid_sizes=sizes), targets)
            total = criterion.weighted_total(losses)
        return assignment, tape.gradient(total, [logits, pred_masks])

    shapes = [tf.zeros([2, 2, 7, 6]), tf.zeros([2, 2, 7, 8, 12]), tf.zeros([2, 9], tf.int32), tf.zeros([2, 9, 32, 48], tf.bool)]
    hlo = step.experimental_get_compiler_ir(*shapes, tf.constant([3, 9]), tf.constant([[32, 48], [29, 31]]))(
        stage="hlo", platform_name="CPU"
    )
    assert " while(" in hlo
    for forbidden in ("<=", "custom-call", "infeed", "outfeed", " send(", " recv("):
        assert forbidden not in hlo, forbidden


def test_weights_are_the_official_ones():
    criterion = SetCriterion(MaskFormerConfig("coco", 133))
    assert len(criterion.weights) == 18
    assert criterion.weights["loss_ce"] == criterion.weights["loss_dice_4"] == 1
    assert criterion.weights["loss_mask"] == criterion.weights["loss_mask_0"] == 20
    no_aux = MaskFormerConfig("plain", 3, predictor=TransformerPredictorConfig(deep_supervision=False))
    assert set(SetCriterion(no_aux).weights) == {"loss_ce", "loss_mask", "loss_dice"}


def test_replicas_share_the_number_of_masks():
    """Under two replicas the masks are normalised by the mean number of objects per replica (4 and 2 objects: by 3)."""
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from test_criterion import *
case = load("padded_batch")
images = [{{k: v[:, i : i + 1] if k in ("logits", "pred_masks") else v[i : i + 1] for k, v in case.items() if v.ndim and k != "losses"}}
          for i in range(2)]
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
def compute(index):
    def branch(i):
        x, y = (tf.constant(images[i][k], tf.float64) for k in ("logits", "pred_masks"))
        t = targets_of(images[i])
        return x, y, t["labels"], t["masks"], t["num_objects"]
    x, y, *t = tf.cond(index == 0, lambda: branch(0), lambda: branch(1))
    t = dict(zip(("labels", "masks", "num_objects"), t))
    return criterion_for(case)(outputs_of(x, y), t)[0]["loss_mask"]
values = strategy.experimental_distribute_values_from_function(lambda c: tf.constant(c.replica_id_in_sync_group))
result = strategy.experimental_local_results(tf.function(lambda v: strategy.run(compute, (v,)))(values))
alone = [run(image, "float64")[0]["loss_mask"] * len(image["labels"][0][: image["num_objects"][0]]) for image in images]
np.testing.assert_allclose([float(r) for r in result], np.array(alone) / 3, rtol=1e-12)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred_masks": np.zeros((3, 2, 7, 9))}, "pred_masks.*4 dimensions"),
        ({"masks": np.zeros((2, 3, 8, 8))}, r"max_objects.*differ"),
        ({"logits": np.zeros((3, 2, 9, 6))}, "num_queries.*differ"),
        ({"num_objects": np.array(3)}, "num_objects.*1 dimension"),
        ({"labels": np.zeros((3, 4)), "masks": np.zeros((3, 4, 8, 8))}, "batch of the targets"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    case = load("padded_batch")
    with pytest.raises(ValueError, match=message):
        run(case | change, "float32", "eager")


def test_golden_is_what_the_official_code_says(official_sources):
    sys.path.insert(0, str(GOLDEN.parent))
    import record_criterion

    for name in record_criterion.CASES:
        recorded, golden = record_criterion.record(name), load(name)
        assert recorded.keys() == golden.keys()
        for key, value in recorded.items():
            np.testing.assert_allclose(golden[key], value, rtol=1e-12, atol=1e-15, err_msg=f"{name}/{key}")
