"""The loop of ``tfmaskformer train`` against a recorded official training on the same data set.

Order of the images, draws, batches and padding are the loop's own, and so is the step, compiled as it always is. The recording was made by
the official dataset mapper, whose random generators gave the numbers that the loop draws, in the loop's order (tests/golden/trajectory).

The model's images may be smaller than the canvas that the loop pads to; upstream's have one size in a batch, since it shows its padding to
the network (docs/decisions/0007).
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from parity.judge import Item
from parity.trajectory import Found, Judge, Made, hash_of

if TYPE_CHECKING:
    from parity.trace import Case
    from tfmaskformer.training.loop import Training


class _Enough(Exception):  # noqa: N818 it is no error
    """As many steps as were asked for."""


def judge_loop(checkpoint: str | Path, case: Case, dtype: str, *, steps: int | None = None) -> tuple[Item, ...]:
    """Every record of the first ``steps`` steps, as of :func:`parity.trajectory.judge`.

    Args:
        checkpoint: directory written by ``convert``, from which the loop starts.
        case: a training whose facts have ``data``: ``config``, the zoo entry of which the facts' ``options`` change values; ``images``, how
            many of the generated data set there are; ``canvas``, height and width in px.
        dtype: "float32" or "float64".
        steps: None: all that were recorded.
    """
    from tfmaskformer.data import shapes
    from tfmaskformer.data.datasets import open_dataset
    from tfmaskformer.evaluation.devices import strategy_for
    from tfmaskformer.official_config import config_of, named_tree
    from tfmaskformer.official_yaml import override
    from tfmaskformer.training import loop
    from tfmaskformer.training.recipe import recipe_of
    from tfmaskformer.training.run import Run

    facts = case.reference.facts
    data, last = facts["data"], steps or facts["steps"]
    name, tree = named_tree(data["config"])
    override(tree, facts["options"])
    config = config_of(tree, name)
    settings = loop.Settings(tree, config, recipe_of(tree), seed=facts["seed"], dtype=dtype, canvas=tuple(data["canvas"]))
    items: list[Item] = []
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "data"
        shapes.write(files, "train", data["images"])
        training = loop.Training(settings, open_dataset(config.dataset, files, "train"), strategy_for("cpu"), initial=str(checkpoint))
        made, judge = Made(training.model, training.optimizer, facts), Judge(case, dtype, fused=True)

        def progress(step: int, values: Mapping[str, float]) -> None:
            losses = {key: value for key, value in values.items() if "loss" in key}
            expected = case.reference.read("scalars", f"{step}/assignment")
            assignment = _exchanged(seen.assignment.numpy()[..., : expected.shape[-1]], expected, seen.targets)
            given: Found = {("scalars", f"{step}/assignment"): assignment, ("scalars", f"{step}/data"): seen.data}
            made_of = made.records(step, losses, values["gradient_norm"], values["lr"], seen.clipped)
            items.extend(judge(itertools.chain([given], made_of)))
            if step == last:
                raise _Enough

        with mock.patch.object(loop, "LOG_PERIOD", 1), _seen(training, case, dtype) as seen, contextlib.suppress(_Enough):
            training.run(Run(Path(folder) / "run", config, tree, settings.plan()), progress)
    return tuple(items)


def _exchanged(assignment: np.ndarray, expected: np.ndarray, targets: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """An assignment in which objects that are the same have exchanged their queries where upstream has it the other way round.

    Of two objects of a class of which the crop left nothing, any matcher may take either first.

    Args:
        assignment, expected: int32 [layers, images, objects].
        targets: ``labels`` and ``masks`` of each image.
    """
    assignment = assignment.copy()
    for image, target in enumerate(targets):
        same: dict[tuple[int, bytes], list[int]] = collections.defaultdict(list)
        for number, (label, mask) in enumerate(zip(target["labels"], target["masks"], strict=True)):
            same[int(label), mask.tobytes()].append(number)
        for numbers in same.values():
            for own, official in zip(assignment[:, image], expected[:, image], strict=True):
                if sorted(own[numbers]) == sorted(official[numbers]):
                    own[numbers] = official[numbers]
    return assignment


class _Seen:
    """What the last step had: the batch's hash, its targets, the assignment, and the clipped gradients by name."""

    def __init__(self, training: Training, assignment: np.ndarray):
        import tensorflow as tf

        self.data = np.zeros(0, np.uint8)
        self.targets: list[dict[str, np.ndarray]] = []
        self.assignment = tf.Variable(assignment)
        self.clipped = {
            parameter.name: tf.Variable(tf.fill(variable.shape, np.array(np.nan, variable.dtype)))
            for parameter, variable in zip(training.optimizer.parameters, training._step.variables, strict=True)
        }


@contextlib.contextmanager
def _seen(training: Training, case: Case, dtype: str) -> Iterator[_Seen]:
    """Inside, a training tells what its steps have. As in :func:`parity.trajectory.steps_of`, in float32 it takes the recorded
    assignments, and in float64 the recorded position embeddings.
    """
    import tensorflow as tf

    from tfmaskformer.criterion import SetCriterion
    from tfmaskformer.data.training import step_arguments
    from tfmaskformer.module import record_taps

    reference, optimizer = case.reference, training.optimizer
    given = [reference.read("scalars", f"{number}/assignment") for number in range(1, reference.facts["steps"] + 1)]
    queries = training.settings.config.predictor.num_queries
    assignments = np.stack([np.pad(of, [(0, 0), (0, 0), (0, queries - of.shape[-1])], constant_values=-1) for of in given])
    seen = _Seen(training, np.full_like(assignments[0], -2))  # nobody's
    train, match, reduce = training._train, SetCriterion.__call__, optimizer._all_reduce_sum_gradients
    embeddings = {name.partition("#")[0]: reference.read("taps", name).transpose(0, 2, 3, 1) for name in reference.group("taps")}

    def trained(batch: Any) -> Any:
        images, sizes, targets = tf.nest.map_structure(np.asarray, step_arguments(training._local(batch)[0]))
        own = []
        for (height, width), labels, masks, count in zip(sizes, targets["labels"], targets["masks"], targets["num_objects"], strict=True):
            own.append({"labels": labels[:count], "masks": masks[:count, :height, :width]})
        seen.data, seen.targets = hash_of([image[:height, :width] for image, (height, width) in zip(images, sizes, strict=True)], own), own
        return train(batch)

    def measure(criterion: Any, outputs: Any, targets: Any) -> Any:
        if dtype == "float64":
            losses, assignment = match(criterion, outputs, targets)
        else:
            assignment = tf.gather(tf.constant(assignments), tf.cast(optimizer.iterations.value, tf.int32))
            losses = criterion.losses(outputs, targets, assignment)
        seen.assignment.assign(assignment)
        return losses, assignment

    def reduced(gradients: Any) -> Any:
        pairs = reduce(gradients)
        for gradient, variable in pairs:
            seen.clipped[optimizer.parameters[optimizer._get_variable_index(variable)].name].assign(gradient)
        return pairs

    def embedded(tap: str, tensor: Any) -> Any:
        array = embeddings.get(tap.partition("#")[0])
        if dtype != "float64" or array is None:
            return tensor
        return tf.constant(np.pad(array, [(0, side - own) for own, side in zip(array.shape, tensor.shape, strict=True)]))

    with (
        mock.patch.object(training, "_train", trained),
        mock.patch.object(SetCriterion, "__call__", measure),
        mock.patch.object(optimizer, "_all_reduce_sum_gradients", reduced),
        record_taps(embedded),
    ):
        yield seen
