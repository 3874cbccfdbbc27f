"""Optimizers against 20 steps of the official ones (golden/training/record.py), and under XLA, replicas and checkpoints."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from checkpoints import registry, synthesize
from converters.tables.maskformer import transforms
from converters.transforms import IDENTITY
from tests.tfmaskformer.recorded_recipes import GOLDEN, official_tree
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_variables
from tfmaskformer.training.optimizer import SGD, AdamW, Parameter, build_optimizer, clip_coefficient, global_norm, parameters
from tfmaskformer.training.recipe import Recipe, recipe_of
from tfmaskformer.training.schedule import WarmupPolyLR, build_lr_scheduler

RECORD = runpy.run_path(str(GOLDEN / "training" / "record.py"))
RUNS, STEPS, gradient, sample = (RECORD[name] for name in ("RUNS", "STEPS", "gradient", "sample"))

RTOL = {"float64": 1e-15, "float32": 2e-6}
"""Of the largest value so far, for lack of a better scale of a sum of gradients. Measured: docs/optimizer.md."""
CLIPPED_RTOL = {"float64": 2e-13, "float32": 2e-6}
"""Where the gradient is clipped: torch adds up the squares one by one, so that its float64 norm is off by up to 5e-14."""


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN / "training" / "steps.npz") as file:
        return dict(file)


def recipe_of_run(run):
    pairs = dict(zip(run.options[::2], run.options[1::2], strict=True))
    return recipe_of(official_tree(registry.entry(run.entry).official_config, pairs))


class Training:
    """The recorded parameters of a run as variables, their optimizer, and the transforms to PyTorch's layout."""

    def __init__(self, name, dtype):
        entry = registry.entry(RUNS[name].entry)
        config = MaskFormerConfig.from_dict(entry.config)
        recipe = recipe_of_run(RUNS[name])
        found = {item.name: item for item in parameters(MaskFormer(config), recipe)}
        self.dtype = dtype
        self.names = RECORD["chosen"]([key for key in registry.layout(entry) if key in found], RUNS[name].every)
        self.transforms = transforms(config, self.names)
        values = synthesize.synthesize(entry)
        self.start = {name: values[name].astype(dtype) for name in self.names}
        self.variables = {
            name: keras.Variable(self.transforms[name].apply(values), dtype=dtype, name="weight") for name, values in self.start.items()
        }
        some = [found[name] for name in self.names]
        if recipe.optimizer == "ADAMW":
            self.optimizer = AdamW(build_lr_scheduler(recipe), some, clip_norm=recipe.clip_norm)
        else:
            self.optimizer = SGD(build_lr_scheduler(recipe), some, clip_norm=recipe.clip_norm, momentum=recipe.momentum)
        self.optimizer.build(list(self.variables.values()))

    def gradients(self, step):
        return [tf.constant(self.transforms[name].apply(gradient(name, self.start[name].shape, step)), self.dtype) for name in self.names]

    def arrays(self, name):
        """Weight and slots in PyTorch's layout."""
        of = [self.variables[name], *(self.optimizer.slot(slot, name) for slot in self.optimizer.slots)]
        return [np.ascontiguousarray(self.transforms[name].invert(variable.numpy())) for variable in of]


def check(training, values, norms, jit_compile, rtol):
    """All steps, compiled; returns the largest errors of weights, slots and norms in units of what they are compared with."""
    apply = tf.function(training.optimizer.apply, jit_compile=jit_compile)
    largest = np.zeros((len(training.names), values.shape[2]))
    worst = np.zeros((2, values.shape[2]))
    for step in range(1, len(values) + 1):
        apply(training.gradients(step))
        for index, name in enumerate(training.names):
            found, lengths = RECORD["measured"](name, step, training.start[name], *training.arrays(name))
            expected, expected_norms = values[step - 1, index], norms[step - 1, index]
            root_mean = expected_norms / np.sqrt(training.start[name].size)
            root_mean[0] = 0  # the norm of the change is no scale of the weight
            largest[index] = np.maximum(largest[index], np.maximum(np.abs(expected), root_mean))
            error = np.abs(np.float64(found) - expected)
            where = f"'{name}' after step {step}: {found}, expected {expected.tolist()}"
            assert (error <= rtol * largest[index]).all(), where
            with np.errstate(invalid="ignore"):
                worst[0] = np.fmax(worst[0], error / largest[index])
            # A change is known no better than the weight it is taken from.
            slack = np.array([rtol * np.linalg.norm(np.float64(training.start[name])), *np.zeros(len(lengths) - 1)])
            error = np.abs(np.array(lengths) - expected_norms)
            assert (error <= rtol * expected_norms + slack).all(), f"norms of {where}: {lengths}, expected {expected_norms.tolist()}"
            with np.errstate(invalid="ignore"):
                worst[1] = np.fmax(worst[1], error / (expected_norms + slack / rtol))
    return worst


CASES = [(name, dtype, False) for name, run in RUNS.items() for dtype in run.dtypes]


@pytest.mark.parametrize(
    ("name", "dtype", "jit_compile"),
    [*CASES, ("few", "float64", True), ("few", "float32", True)],
    ids=lambda item: {True: "xla", False: "graph"}.get(item, item),
)
def test_official_steps(name, dtype, jit_compile, recorded):
    training = Training(name, dtype)
    values, norms = (recorded[f"{name}.{dtype}.{key}"] for key in ("values", "norms"))
    worst = check(training, values, norms, jit_compile, (CLIPPED_RTOL if training.optimizer.clip_norm else RTOL)[dtype])
    print(f"{name} {dtype} {'xla' if jit_compile else 'graph'}: {worst.tolist()}")
    assert len(training.names) >= (19 if name != "few" else 4)
    assert int(training.optimizer.iterations) == STEPS


def test_sgd_without_momentum(recorded):
    training = Training.__new__(Training)
    training.dtype, training.names, training.transforms = "float64", ["plain.weight"], {"plain.weight": IDENTITY}
    training.start = {"plain.weight": gradient("plain.weight", (3, 4), 100)}
    training.variables = {"plain.weight": keras.Variable(training.start["plain.weight"], dtype="float64")}
    schedule = build_lr_scheduler(Recipe(base_lr=0.02, steps=(), warmup_iters=0))
    training.optimizer = SGD(schedule, [("plain.weight", "", 1.0, 0.3)])
    training.optimizer.build([training.variables["plain.weight"]])
    training.optimizer.slots = ()
    check(training, recorded["plain.float64.values"], recorded["plain.float64.norms"], False, RTOL["float64"])


def test_recorded_runs_clip_and_do_not_clip():
    training = Training("official", "float64")
    norms = [float(global_norm(training.gradients(step))) for step in range(1, 5)]
    assert norms[0] > 1
    assert norms[1] == pytest.approx(0.01, rel=0.9)
    assert norms[2] < 0.01
    assert norms[3] > 100
    for step, norm in enumerate(norms, start=1):
        training.optimizer.apply(training.gradients(step))
        assert float(training.optimizer.gradient_norm) == norm


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clip_coefficient(dtype):
    expected = {0.0: 1.0, 0.01 - 1e-6: 1.0, 0.01: 0.01 / (0.01 + 1e-6), 5.0: 0.01 / (5.0 + 1e-6), np.inf: 0.0}
    for norm, value in expected.items():
        assert float(clip_coefficient(tf.constant(norm, dtype), 0.01)) == pytest.approx(value, rel=4 * float(np.finfo(dtype).eps))
    assert np.isnan(float(clip_coefficient(tf.constant(np.nan, dtype), 0.01)))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_norm_of_many_elements(jit_compile):
    """Of a large kernel, as accurate as float32 allows: sums of squares must not be added up one by one."""
    values = np.random.default_rng(0).standard_normal((512, 2304)).astype(np.float32)
    norm = float(tf.function(global_norm, jit_compile=jit_compile)([tf.constant(values)]))
    assert norm == pytest.approx(np.linalg.norm(values.astype(np.float64)), rel=1e-6)


def plain(weights=(1.0, -2.0), decay=0.0, **options):
    variable = keras.Variable(np.array(weights), dtype=options.pop("dtype", "float64"))
    schedule = build_lr_scheduler(Recipe(base_lr=0.1, steps=(), warmup_iters=0))
    optimizer = AdamW(schedule, [Parameter("a.weight", "", 1.0, decay)], **options)
    optimizer.build([variable])
    return variable, optimizer


def test_first_step_moves_by_the_learning_rate():
    variable, optimizer = plain(decay=0.5)
    optimizer.apply([tf.constant([3e-6, 0.0], tf.float64)])
    np.testing.assert_allclose(variable.numpy(), [0.95 - 0.1 * 3e-6 / (3e-6 + 1e-8), -1.9], rtol=1e-15)


def test_small_decay_is_lost_in_float32_as_upstream():
    for dtype, expected in (("float32", 1.0), ("float64", 1 - 1e-8)):
        variable, optimizer = plain(weights=(1.0,), decay=1e-7, dtype=dtype)
        optimizer.apply([tf.zeros([1], dtype)])
        assert float(variable.numpy()[0]) == expected


def test_builds_for_a_whole_model_and_steps():
    model = MaskFormer(MaskFormerConfig.from_dict(registry.entry("tiny_per_pixel").config))
    model.build_parameters()
    recipe = Recipe(base_lr=0.1, warmup_iters=0, clip_norm=0.01)
    optimizer = build_optimizer(recipe, model)
    variables = named_variables(model)
    before = {name: variable.numpy() for name, variable in variables.items()}
    assert len(model.trainable_variables) == len(optimizer.parameters)
    assert optimizer.clip_norm == 0.01
    optimizer.apply([tf.ones(variable.shape) for variable in model.trainable_variables], model.trainable_variables)
    moved = {name for name, variable in variables.items() if (variable.numpy() != before[name]).all()}
    assert moved == {item.name for item in optimizer.parameters}
    for name in ("backbone.stem.conv1.weight", "sem_seg_head.predictor.weight"):
        item = next(item for item in optimizer.parameters if item.name == name)
        change = before[name] * (1 - np.float32(0.1 * item.lr_factor * item.weight_decay)) - variables[name].numpy()
        np.testing.assert_allclose(change, 0.1 * item.lr_factor, rtol=1e-3)


def test_build_optimizer_takes_the_optimizer_of_the_recipe():
    model = MaskFormer(MaskFormerConfig.from_dict(registry.entry("tiny_per_pixel").config))
    model.build_parameters()
    sgd = build_optimizer(Recipe(optimizer="SGD", momentum=0.7, clip_norm=3.0, lr_scheduler_name="WarmupPolyLR"), model)
    assert isinstance(sgd, SGD)
    assert (sgd.momentum, sgd.clip_norm) == (0.7, 3.0)
    assert isinstance(sgd.get_config()["learning_rate"], dict)
    assert float(sgd.learning_rate) == 0.001 * 0.001


def test_example_in_the_docs(capsys):
    text = (GOLDEN.parents[1] / "docs" / "optimizer.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("jit_compile=True", "autograph=False"), names)
    assert capsys.readouterr().out.startswith("Parameter(name='backbone.stem.conv1.weight', group='backbone.weight', lr_factor=0.1")
    variables = names["model"].trainable_variables
    norm = names["step"]([tf.ones(variable.shape) for variable in variables])
    assert float(norm) == pytest.approx(sum(variable.shape.num_elements() for variable in map(tf.convert_to_tensor, variables)) ** 0.5)


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_compiled_for_several_gpus(kind):
    """As far as it goes without them: traced, where TensorFlow refuses whatever needs all replicas at once but a sum (``merge_call``)."""
    strategy = tf.distribute.MirroredStrategy(["/gpu:0", "/gpu:1"])
    with strategy.scope():
        variable, optimizer = keras.Variable([1.0, 2.0]), kind(WarmupPolyLR.of(Recipe()), [("a.weight", "", 1.0, 0.1)], clip_norm=0.5)
        optimizer.build([variable])
    step = tf.function(lambda: optimizer.apply([tf.ones([2])], [variable]), jit_compile=True, autograph=False)
    traced = tf.function(lambda: strategy.run(step), autograph=False).get_concrete_function()
    programs = {operation.get_attr("f").name for operation in traced.graph.get_operations() if operation.type == "StatefulPartitionedCall"}
    assert len(programs) == 2


def test_wrong_variables_are_refused():
    variable, optimizer = plain()
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply([tf.ones([2])], [keras.Variable([1.0, 2.0])])
    fresh = AdamW.from_config(optimizer.get_config())
    with pytest.raises(ValueError, match=r"got 2 variables, expected 1, one for each parameter"):
        fresh.build([variable, variable])
    with pytest.raises(ValueError, match=r"'a.weight' is bfloat16, expected float32 or float64"):
        fresh.build([keras.Variable([1.0], dtype="bfloat16")])


def test_parameters_without_gradient_stay():
    """Upstream skips them too: no decay, no part in the norm."""
    variables = [keras.Variable([1.0, 2.0], dtype="float64") for _ in range(2)]
    optimizer = AdamW(0.5, [("a.weight", "", 1.0, 0.1), ("b.weight", "", 1.0, 0.1)])
    optimizer.build(variables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.apply([None, tf.ones([2], tf.float64)])
    assert variables[0].numpy().tolist() == [1.0, 2.0]
    assert float(optimizer.gradient_norm) == pytest.approx(2**0.5)


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_config_leads_back(kind):
    options = {"betas": (0.5, 0.7), "eps": 1e-3} if kind is AdamW else {"momentum": 0.3}
    schedule = WarmupPolyLR.of(Recipe(max_iter=50))
    optimizer = kind(schedule, [Parameter("a.weight", "backbone.weight", 0.1, 0.2)], clip_norm=0.4, name="mine", **options)
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    again = keras.optimizers.deserialize(config, custom_objects={"WarmupPolyLR": WarmupPolyLR, kind.__name__: kind})
    assert again.get_config() == optimizer.get_config()
    assert again.parameters == optimizer.parameters
    assert (again.clip_norm, again.name) == (0.4, "mine")


@pytest.mark.parametrize("name", ["few", "sgd"])
def test_restored_training_goes_on_to_the_same_bits(name, tmp_path):
    def step(training, number):
        training.optimizer.apply(training.gradients(number))

    def checkpoint(training):
        return tf.train.Checkpoint(model=list(training.variables.values()), optimizer=training.optimizer)

    whole, first, second = (Training(name, "float32") for _ in range(3))
    for number in range(1, 6):
        step(whole, number)
    for number in range(1, 4):
        step(first, number)
    path = checkpoint(first).save(str(tmp_path / "ckpt"))
    checkpoint(second).restore(path).assert_consumed()
    assert int(second.optimizer.iterations) == 3
    for number in range(4, 6):
        step(second, number)
    for parameter in whole.names:
        for one, other in zip(whole.arrays(parameter), second.arrays(parameter), strict=True):
            np.testing.assert_array_equal(one, other)

    keys = {key for key, _ in tf.train.list_variables(path)}
    expected = {f"model/{number}" for number in range(len(whole.names))} | {"optimizer/_iterations", "save_counter"}
    expected |= {f"optimizer/{slot}/{parameter.replace('.', '/')}" for slot in whole.optimizer.slots for parameter in whole.names}
    assert keys == {f"{key}/.ATTRIBUTES/VARIABLE_VALUE" for key in expected} | {"_CHECKPOINTABLE_OBJECT_GRAPH"}


def test_restored_before_it_is_built(tmp_path):
    variable, optimizer = plain()
    optimizer.apply([tf.constant([1.0, 2.0], tf.float64)])
    path = tf.train.Checkpoint(optimizer=optimizer).save(str(tmp_path / "ckpt"))
    fresh = AdamW.from_config(optimizer.get_config())
    status = tf.train.Checkpoint(optimizer=fresh).restore(path)
    fresh.build([keras.Variable(variable)])
    status.assert_consumed()
    for slot in fresh.slots:
        np.testing.assert_array_equal(fresh.slot(slot, "a.weight").numpy(), optimizer.slot(slot, "a.weight").numpy())


def test_loss_scaling():
    """Keras' LossScaleOptimizer around it: the scale cancels, and a step that is not finite is skipped."""
    (one, plain_one), (other, inner) = plain(clip_norm=0.01), plain(clip_norm=0.01)
    scaled = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    scaled.build([other])
    for factor in (1.0, 3.0):
        plain_one.apply([tf.constant([1.0, 2.0], tf.float64) * factor])
        scaled.apply([tf.constant([1.0, 2.0], tf.float64) * factor * 8])
    scaled.apply([tf.constant([np.inf, 2.0], tf.float64)])
    np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_two_replicas_equal_one_with_the_summed_gradient(tmp_path):
    """In a process of its own, because it needs two logical devices."""
    script = Path(__file__).with_name("training_replicas.py")
    result = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "equal"


def test_recorded_again_it_is_the_same(official_sources, recorded):
    from parity import official

    again = RECORD["record_all_steps"](official.load(*official_sources))
    assert again.keys() == recorded.keys()
    for key, array in again.items():
        np.testing.assert_allclose(array, recorded[key], rtol=1e-6 if "float32" in key else 1e-13, atol=1e-20, err_msg=key)


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs the extra 'aot'")
def test_step_compiles_for_a_tpu():
    from tfmaskformer.aot import compile_for_tpu

    variable = keras.Variable(np.zeros([256, 128]), dtype="float32")
    schedule = build_lr_scheduler(Recipe(lr_scheduler_name="WarmupPolyLR"))
    optimizer = AdamW(schedule, [Parameter("a.weight", "", 1.0, 0.1)], clip_norm=0.01)
    optimizer.build([variable])

    def step(gradient):
        optimizer.apply([gradient])
        return variable.value + 0

    stats = compile_for_tpu(step, tf.TensorSpec([256, 128]))
    assert stats.argument_bytes < 5 * 256 * 128 * 4  # weight, two moments and gradient
