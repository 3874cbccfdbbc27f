"""Learning rates against those of the official schedulers (golden/training/record.py): eagerly to the last bit."""

from __future__ import annotations

import json
import runpy

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.tfmaskformer.recorded_recipes import ENTRIES, GOLDEN, RECORDED, official_tree
from tfmaskformer.training.recipe import Recipe, recipe_of
from tfmaskformer.training.schedule import WarmupMultiStepLR, WarmupPolyLR, build_lr_scheduler

TRAINING = GOLDEN / "training"
SCHEDULES = json.loads((TRAINING / "schedules.json").read_text())


def schedule_of(recorded):
    changes = {f"SOLVER.{key}": tuple(value) if isinstance(value, list) else value for key, value in recorded["changes"].items()}
    return build_lr_scheduler(recipe_of(official_tree(recorded["config"], changes)))


COMPILED_ATOL = 4e-16
"""Of the base learning rate; measured 2.2e-16. Compilers turn the division by max_iter into a product."""


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_iteration_of_short_trainings(name):
    recorded, schedule = SCHEDULES[name]["learning_rates"], schedule_of(SCHEDULES[name])
    assert [[iteration, float(schedule(iteration))] for iteration, _ in recorded] == recorded


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_official_trainings(entry):
    recorded = RECORDED[entry.name]["learning_rates"]
    schedule = build_lr_scheduler(recipe_of(official_tree(entry.official_config)))
    assert [[iteration, float(schedule(iteration))] for iteration, _ in recorded] == recorded


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("name", ["steps_warmup", "steps_constant", "poly_warmup", "poly_ending", "two_million"])
def test_compiled(name, jit_compile):
    recorded, schedule = SCHEDULES[name]["learning_rates"], schedule_of(SCHEDULES[name])
    rate = tf.function(schedule, jit_compile=jit_compile, input_signature=[tf.TensorSpec([], tf.int64)])
    found = [float(rate(iteration)) for iteration, _ in recorded]
    np.testing.assert_allclose(found, [value for _, value in recorded], rtol=0, atol=COMPILED_ATOL * schedule.base_lr)


def test_eager_with_a_variable():
    recorded = SCHEDULES["steps_warmup"]
    schedule, iterations = schedule_of(recorded), keras.Variable(4, dtype="int64")
    assert schedule(iterations).dtype == tf.float64
    assert float(schedule(iterations)) == recorded["learning_rates"][4][1]


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupPolyLR"])
def test_behind_the_end_it_stays(name):
    schedule = build_lr_scheduler(Recipe(lr_scheduler_name=name, max_iter=10, steps=(5,), warmup_iters=0, base_lr=2.0))
    assert float(schedule(10)) == float(schedule(10**9)) == {"WarmupMultiStepLR": 0.2, "WarmupPolyLR": 0.0}[name]


@pytest.mark.parametrize("kind", [WarmupMultiStepLR, WarmupPolyLR])
def test_config_leads_back(kind):
    schedule = kind.of(Recipe(max_iter=10, steps=(5, 8), warmup_iters=2))
    again = keras.optimizers.schedules.deserialize(
        json.loads(json.dumps(keras.optimizers.schedules.serialize(schedule))), custom_objects={kind.__name__: kind}
    )
    assert [float(again(iteration)) for iteration in range(11)] == [float(schedule(iteration)) for iteration in range(11)]


def test_recorded_again_it_is_the_same(official_sources, tmp_path):
    from parity import official

    module = runpy.run_path(str(TRAINING / "record.py"))
    module["record_schedules"].__globals__["HERE"] = tmp_path
    module["record_schedules"](official.load(*official_sources))
    assert (tmp_path / "schedules.json").read_text() == (TRAINING / "schedules.json").read_text()
