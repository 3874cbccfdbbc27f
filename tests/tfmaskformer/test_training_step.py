"""One training step against its parts, compiled, with dropout, and on two replicas (step_replicas.py)."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from checkpoints import registry, synthesize
from converters.convert import convert
from tests.tfmaskformer.conftest import SMALL, random_values
from tfmaskformer.checkpoint import load
from tfmaskformer.config import MaskFormerConfig, SwinConfig
from tfmaskformer.criterion import SetCriterion
from tfmaskformer.layers import Dropout, dropout_masks
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_variables
from tfmaskformer.training.optimizer import build_optimizer, global_norm
from tfmaskformer.training.recipe import Recipe
from tfmaskformer.training.step import TrainStep

RECORDED = Path(__file__).parents[1] / "golden" / "training" / "processes.npz"
RECIPE = Recipe(base_lr=1e-3, max_iter=10, lr_scheduler_name="WarmupPolyLR", warmup_iters=4, clip_norm=0.01)


BACKBONE = SwinConfig(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(2, 3, 4, 6), window_size=3)
LOUD = dataclasses.replace(SMALL["encoder"], backbone=BACKBONE)
QUIET = dataclasses.replace(
    LOUD,
    backbone=dataclasses.replace(BACKBONE, drop_path_rate=0.0),
    predictor=dataclasses.replace(LOUD.predictor, dropout=0.0),
)


def build(config: MaskFormerConfig, dtype: str = "float64", **options) -> TrainStep:
    model = MaskFormer(config, dtype)
    model.build_parameters(random_values(config).__getitem__)
    return TrainStep(model, build_optimizer(RECIPE, model), **options)


def batch(counts=(2, 1), height=40, width=52, divisor=1):
    """Images, their sizes, and that many objects in each, on the padded canvas."""
    rng = np.random.default_rng(7)
    images = tf.constant(rng.integers(0, 256, (len(counts), height, width, 3)), tf.uint8)
    canvas = (-(-side // divisor) * divisor for side in (height, width))
    masks = tf.constant(rng.random((len(counts), max(counts), *canvas)) < 0.4)
    targets = {"labels": tf.constant(rng.integers(0, 5, masks.shape[:2])), "masks": masks, "num_objects": tf.constant(counts)}
    return images, tf.constant([[height, width]] * len(counts)), targets


@pytest.fixture(scope="module")
def step():
    return build(QUIET)


def test_a_step_is_its_parts(step):
    images, sizes, targets = batch()
    model, criterion = step.model, SetCriterion(step.model.config)
    variables = named_variables(model)
    with tf.GradientTape() as tape:
        losses, _ = criterion(model(images, sizes), targets)
        total = criterion.weighted_total(losses)
    names = [parameter.name for parameter in step.optimizer.parameters]
    expected = tape.gradient(total, [variables[name].value for name in names])
    before = {name: variable.numpy() for name, variable in variables.items()}

    result = step(images, sizes, targets)
    assert result.losses.keys() == {*losses, "total_loss"}
    assert float(result.losses["total_loss"]) == pytest.approx(float(total), rel=1e-12)
    assert float(result.losses["loss_mask_0"]) == pytest.approx(20 * float(losses["loss_mask_0"]), rel=1e-12)
    assert float(result.gradient_norm) == pytest.approx(float(global_norm(expected)), rel=1e-12)
    assert float(result.lr) == pytest.approx(1e-6, rel=1e-12)
    assert int(step.optimizer.iterations) == 1
    clip = 0.01 / (float(global_norm(expected)) + 1e-6)
    for name, gradient in zip(names, expected, strict=True):
        np.testing.assert_allclose(step.optimizer.slot("exp_avg", name).numpy(), 0.1 * clip * gradient.numpy(), rtol=1e-9, atol=1e-18)
    moved = {name for name, variable in variables.items() if (variable.numpy() != before[name]).any()}
    assert moved == set(names)
    assert float(step(images, sizes, targets).lr) > 100 * 1e-6  # the warm-up goes on


@pytest.mark.parametrize("jit_compile", [False, True])
def test_compiled_it_is_the_same(jit_compile):
    """Dropout too: XLA draws the same masks."""
    eager, compiled = build(LOUD), build(LOUD)
    inputs = batch(counts=(2,), height=33, width=35)
    expected, found = eager(*inputs), tf.function(compiled, jit_compile=jit_compile)(*inputs)
    for key, loss in expected.losses.items():
        assert float(found.losses[key]) == pytest.approx(float(loss), rel=1e-7), key
    assert float(found.gradient_norm) == pytest.approx(float(expected.gradient_norm), rel=1e-6)
    assert float(found.lr) == pytest.approx(float(expected.lr), rel=1e-14)
    assert found.lr.dtype == tf.float64
    for variable, other in zip(eager.variables, compiled.variables, strict=True):
        np.testing.assert_allclose(other.numpy(), variable.numpy(), rtol=1e-5, atol=1e-6)


def test_masks_depend_on_seed_iteration_and_place_alone():
    images, sizes, targets = batch()

    def losses(step):
        return np.array([float(loss) for loss in step.gradients(images, sizes, targets)[0].values()])

    step = build(LOUD, seed=3)
    tf.random.set_seed(1)
    first = losses(step)
    tf.random.set_seed(2)
    assert np.array_equal(losses(step), first)
    step.optimizer.iterations.assign(1)
    assert not np.array_equal(losses(step), first)
    step.optimizer.iterations.assign(0)
    assert not np.array_equal(losses(build(LOUD, seed=4)), first)
    keep = step.keep()
    masks = [keep(place, [50, 60], 0.25).numpy() for place in ("a#0", "a#1", "b#0")]
    for mask in masks:
        assert abs(mask.mean() - 0.75) < 4 * (0.25 * 0.75 / mask.size) ** 0.5
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[one] == masks[other]).mean() - 0.625) < 0.05


def test_given_masks_are_used_call_by_call():
    module = Dropout(0.5)
    module.official_name = "a"
    seen = []

    def keep(place, shape, rate):
        seen.append((place, list(shape), rate))
        return tf.constant([[True, False]])

    with dropout_masks(keep):
        for _ in range(2):
            assert module(tf.constant([[1.0, 2.0]]), training=True).numpy().tolist() == [[2.0, 0.0]]
        assert module(tf.constant([[1.0, 2.0]])).numpy().tolist() == [[1.0, 2.0]]
    assert seen == [("a#0", [1, 2], 0.5), ("a#1", [1, 2], 0.5)]


def test_attention_and_every_dropout_take_the_given_masks(step):
    images, sizes, targets = batch()
    loud = build(LOUD)
    seen = []

    def keep(place, shape, rate):
        seen.append(place)
        return tf.fill(shape, True)

    loud.keep = lambda part: keep
    with_masks, without = loud.gradients(images, sizes, targets)[0], build(QUIET).gradients(images, sizes, targets)[0]
    layers = LOUD.predictor.dec_layers
    assert len(seen) == len(set(seen)) == 2 * 4 + layers * 6 + 3 * 2  # of encoder and decoder layers, and of blocks with a rate above 0
    assert float(with_masks["total_loss"]) != float(without["total_loss"])  # scaled up by 1 / 0.9


def test_per_pixel_baselines_train_too():
    config = dataclasses.replace(SMALL["base"], head="PerPixelBaselineHead", name="small_per_pixel")
    model = MaskFormer(config)
    model.build_parameters(random_values(config).__getitem__)
    step = TrainStep(model, build_optimizer(RECIPE, model))
    labels = tf.constant(np.random.default_rng(0).integers(0, 5, (1, 64, 64)))
    images = tf.zeros([1, 40, 52, 3], tf.uint8)
    losses = [float(step(images, None, {"sem_seg": labels}).losses["total_loss"]) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_two_parts_equal_two_official_processes(tmp_path):
    """A recording over gloo (tests/golden/training/record_processes.py), each process with an image of its own size."""
    spec = importlib.util.spec_from_file_location("record_processes", RECORDED.with_name("record_processes.py"))
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    entry = registry.entry(record.NAME)
    synthesize.write_pickle(synthesize.synthesize(entry), tmp_path / "model_final.pkl")
    convert(tmp_path / "model_final.pkl", tmp_path / "tf_ckpt", record.NAME)
    config = MaskFormerConfig.from_dict(entry.config)
    model = load(tmp_path / "tf_ckpt", "float64", config.replace(predictor=dataclasses.replace(config.predictor, dropout=0.0)))
    step = TrainStep(model, build_optimizer(RECIPE, model), padding="masked", parts=2)

    canvas, most = np.max(record.SIZES, 0), max(record.OBJECTS)
    images, labels = np.zeros([2, *canvas, 3], np.uint8), np.zeros([2, most], np.int64)
    masks = np.zeros([2, most, *canvas], bool)
    for index, (image, own_labels, own_masks) in enumerate(record.images_and_targets()):
        height, width = record.SIZES[index]
        images[index, :height, :width] = image
        labels[index, : len(own_labels)] = own_labels
        masks[index, : len(own_labels), :height, :width] = own_masks
    targets = {"labels": tf.constant(labels), "masks": tf.constant(masks), "num_objects": tf.constant(record.OBJECTS)}
    losses, gradients = tf.function(step.gradients)(tf.constant(images), tf.constant(record.SIZES), targets)

    with np.load(RECORDED) as official:
        for key, loss in losses.items():
            if key != "total_loss":
                assert float(loss) == pytest.approx(float(official[f"loss/{key}"]), rel=1e-5), key
        names = [parameter.name for parameter in step.optimizer.parameters]
        assert sorted(names) == sorted(official["names"])
        found = {name: gradient.numpy() for name, gradient in zip(names, gradients, strict=True)}
        for name, norm, total in zip(official["names"], official["norms"], official["sums"], strict=True):
            assert np.linalg.norm(found[name].ravel()) == pytest.approx(norm, rel=1e-4, abs=1e-12), name
            assert found[name].sum() == pytest.approx(total, rel=1e-3, abs=1e-12 + 1e-4 * norm * found[name].size ** 0.5), name


def test_parts_are_added_up_and_blocks_computed_again():
    """With dropout. Four parts in which blocks are computed again, against each part by itself."""
    images, sizes, targets = batch(counts=(2, 1, 3, 0))
    plain, step = build(LOUD), build(LOUD, parts=4, rematerialise=True)
    losses, gradients = tf.function(step.gradients)(images, sizes, targets)
    expected = []
    for part in range(4):
        own = tf.nest.map_structure(lambda values, part=part: values[part : part + 1], (images, sizes, targets))
        own[2]["num_masks"] = tf.constant(6 / 4)
        plain.keep = lambda _, part=part: TrainStep.keep(plain, part)
        expected.append(plain.gradients(*own))
    for key, loss in losses.items():
        assert float(loss) == pytest.approx(np.mean([float(own[key]) for own, _ in expected]), rel=1e-6), key
    for index, gradient in enumerate(gradients):
        mean = np.mean([own[index].numpy() for _, own in expected], axis=0)
        np.testing.assert_allclose(gradient.numpy(), mean, rtol=1e-6, atol=1e-9 * np.abs(mean).max() + 1e-15)


def test_blocks_are_computed_again():
    """In the backward pass, each once, and nothing changes."""
    images, sizes, targets = batch(counts=(2,))
    plain, step = build(LOUD), build(LOUD, rematerialise=True)
    calls = collections.Counter()
    keep = step.keep()

    def counting(place, shape, rate):
        calls[place] += 1
        return keep(place, shape, rate)

    expected, expected_gradients = plain.gradients(images, sizes, targets)
    step.keep = lambda part: counting
    losses, gradients = step.gradients(images, sizes, targets)
    assert set(calls.values()) == {2}
    for key, loss in expected.items():
        assert float(losses[key]) == float(loss), key
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient.numpy(), other.numpy(), rtol=1e-9, atol=1e-12)


def test_two_replicas_equal_the_official_rule():
    """In a process of its own, because it needs two logical devices."""
    script = Path(__file__).with_name("step_replicas.py")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "equal"


def test_example_in_the_docs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "training_parity.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("tf.function(step)", "step"), {})
    loss, norm, rate = map(float, capsys.readouterr().out.split())
    assert loss > 1
    assert norm > 0
    assert rate == 1e-4
