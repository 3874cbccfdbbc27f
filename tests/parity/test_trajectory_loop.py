"""The loop of `tfmaskformer train`, with its own order, draws and batches, trains as the official trainer does (golden/trajectory)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from checkpoints import registry
from parity import trajectory, trajectory_loop
from tfmaskformer.data import training as training_data
from tfmaskformer.data.augmentation import draw
from tfmaskformer.training.step import TrainStep

GOLDEN = Path(__file__).parents[1] / "golden" / "trajectory" / "shapes_100"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from converters.convert import convert

    source = Path(registry.__file__).parent / "small" / "shapes_panoptic.pkl"
    return Path(convert(source, tmp_path_factory.mktemp("shapes") / "tf_ckpt", config="shapes_panoptic").destination)


@pytest.fixture
def eager(monkeypatch):
    """Tracing and compiling take longer than a few steps."""
    monkeypatch.setattr(tf, "function", lambda function, **_: function)


def kinds(items, passed):
    return {trajectory._kind(item.name).partition("/")[0] for item in items if item.passed == passed}


def test_the_loop_trains_as_upstream(checkpoint, eager):
    """Its first steps; `make trajectory` judges a hundred, compiled."""
    [found] = trajectory.check(checkpoint, GOLDEN, dtypes=["float64"], steps=2)
    print(trajectory.text([found]))
    assert found.passed, trajectory.text([found])
    assert (found.mode, found.steps) == ("loop", 2)
    with trajectory.open_training(GOLDEN, "plain") as case:
        keys = [key for key in case.reference.records if key[0] in ("scalars", "steps") and trajectory._step_of(key[1]) <= 2]
    assert len(found.items) == len(keys)
    assert kinds(found.items, True) >= {"data", "assignment", "lr", "losses", "gradient_norm", "clipped", "exp_avg", "weights"}


@pytest.fixture
def without_gradients(monkeypatch, eager):
    """Steps that do not look at the batch: what the loop takes of the data is told at little cost."""

    def gradients(step, images, image_sizes, targets):
        keys = [*step.criterion.weights, "total_loss"]
        return dict.fromkeys(keys, tf.constant(1.0, tf.float64)), [tf.zeros_like(variable.value) for variable in step.variables]

    monkeypatch.setattr(TrainStep, "gradients", gradients)


def test_draws_that_do_not_change_are_named(checkpoint, without_gradients, monkeypatch):
    """Every epoch, of six steps, with those of the first."""
    monkeypatch.setattr(training_data, "draw", lambda seed: draw(seed % 12))
    with trajectory.open_training(GOLDEN, "plain") as case:
        items = trajectory_loop.judge_loop(checkpoint, case, "float64", steps=7)
    data = [item for item in items if item.name.endswith("/data")]
    assert [item.passed for item in data] == [True] * 6 + [False]
    assert trajectory.describe(data[-1]) == "step 7, data: other images, objects or draws than in the official training"
    assert kinds(items, False) >= {"losses", "gradient_norm", "clipped", "weights", "assignment"}


def test_objects_that_are_the_same_may_exchange_their_queries():
    empty, mask = np.zeros((2, 2), bool), np.eye(2, dtype=bool)
    targets = [{"labels": np.array([3, 3, 3, 5]), "masks": np.stack([empty, empty, mask, empty])}]
    expected = np.array([[[7, 2, 4, 6]]])
    for own, exchanged in (
        ([2, 7, 4, 6], [7, 2, 4, 6]),
        ([4, 2, 7, 6], [4, 2, 7, 6]),
        ([7, 6, 4, 2], [7, 6, 4, 2]),
        ([2, 8, 4, 6], [2, 8, 4, 6]),
    ):
        assert trajectory_loop._exchanged(np.array([[own]]), expected, targets).tolist() == [[exchanged]]


def test_hash_of_a_batch():
    image, mask = np.arange(24, dtype=np.uint8).reshape(2, 4, 3), np.eye(2, 4, dtype=bool)[None]
    target = {"labels": np.array([3]), "masks": mask}
    whole = trajectory.hash_of([image], [target])
    assert (whole.shape, whole.dtype) == ((32,), np.uint8)
    assert np.array_equal(whole, trajectory.hash_of([image], [{"labels": np.array([3], np.int32), "masks": mask.astype(np.uint8)}]))
    others = [
        trajectory.hash_of([image.reshape(4, 2, 3)], [target | {"masks": mask.reshape(1, 4, 2)}]),
        trajectory.hash_of([image], [target | {"labels": np.array([4])}]),
        trajectory.hash_of([image], [target | {"masks": ~mask}]),
        trajectory.hash_of([image ^ 1], [target]),
        trajectory.hash_of([image, image], [target, target]),
    ]
    assert len({other.tobytes() for other in (whole, *others)}) == 6
