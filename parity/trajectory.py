"""Training parity: K steps of the TensorFlow port against K recorded steps of the official Trainer, quantity by quantity.

A recording (:mod:`parity.trajectory_record`) is a directory, maybe the folder :data:`FOLDER` of a trace, with two files for each training,
as of a case of a trace (:class:`parity.trace.Case`): ``plain``, without dropout and stochastic depth, and ``dropout``, with masks that both
sides compute from the same hash (:func:`kept`). The facts of a file say with what recipe, on which images and in how many steps. Its
records:

``inputs``, ``taps``  images, targets and position embeddings, as of a trace; the images of all batches in a row
``scalars``           ``decay`` and, of each step, ``{step}/lr``: float64, one for each parameter in the order of the fact ``parts``;
                      ``{step}/losses/{key}``, weighted, as the official model returns them, ``{step}/losses/total_loss`` and
                      ``{step}/gradient_norm``, before clipping; not of per-pixel baselines and in the float64 file alone
                      ``{step}/assignment``, int32 [layers, images, objects]: the query of each object, −1 for none; the final layer first
``steps``             ``{step}/{quantity}/{part}`` for each of :data:`QUANTITIES` and each part: the parameters that the recipe treats
                      alike (``backbone.weight``, ``sem_seg_head.norm``, …), one behind the other; after the first step also
                      ``1/{quantity}.each/{parameter}``

Steps count from 1. ``weights`` are not the weights but how far they have moved since the start: that is what a step makes, and beside
the weights themselves a fault in it would look small. The floor of a record is the **drift**: how far other official runs, of other kernels
and numbers of threads, are from the float64 one after the same step.

All trainings but the reference take its assignments, the port's in float32 too: where two cost the same but for rounding, each run would
choose for itself, and from there on be another training. In float64 the port matches by itself, and its assignments are judged.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from converters.tables.maskformer import transforms
from parity import compare, tensorflow_run
from parity.judge import Item
from parity.trace import Case, Record, TraceError, file_path, statistics

if TYPE_CHECKING:
    from parity.diagnose import Finding
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.training.step import TrainStep

FOLDER = "steps"
"""Where a trace has a recording of trainings, whose first step is a part of a check."""

TRAININGS = ("plain", "dropout")
"""Names of the files of a recording: without dropout and stochastic depth, and with shared masks."""

QUANTITIES = ("clipped", "exp_avg", "exp_avg_sq", "momentum_buffer", "weights", "buffers")
"""In the order in which a step computes them: clipped gradients, the moments of AdamW or that of SGD, moved weights, moved buffers."""

OF_GRADIENTS = ("gradient_norm", *(quantity + of for quantity in QUANTITIES[:-1] for of in ("", ".each")))
"""What a step makes of its gradients."""

BUFFERS = "buffers"
"""The one part of the buffers: no parameter of the recipe."""

FLOAT64_TOLERANCE = 1e-11
"""Two official float64 trainings are 1e-12 apart after 20 steps, and the port is no farther from them. The smallest fault known is 1e-10: a
norm of 1e4 to which no 1e-6 was added before it divides the gradient."""

DRIFT_FACTOR = 3.0
"""Times the drift, the largest that other official float32 trainings have had so far: of six, one is up to 2.1 times as far as the farthest
of the others (docs/training_parity.md)."""

PARTING = 0.03
"""Relative error of a gradient with which a float32 training may part from the others (:class:`Parting`); official ones part with 1e-2 at
most."""

PARTED = 3.0
"""Relative error that may come of it: two trainings that have nothing more in common than their start."""

LR_RESOLUTION = 2.0**-51
"""Relative to the largest learning rate: compilers turn a division by a constant into a product."""

MODES = ("graph", "eager", "xla")


class StepsError(ValueError):
    """A recording or checkpoint that cannot be used; the message says what and the next step."""


def kept(seed: int, step: int, place: str, size: int, rate: float) -> np.ndarray:
    """The mask of a dropout, as ``tfmaskformer.training.step.TrainStep`` has it on its first replica; in NumPy, for the official code.

    Args:
        seed: of the recording.
        step: 1, 2, …
        place: ``<official name>#<call in this step>``; of attention, the name of the attention.
        size: elements, in the order of a batch-first layout.
        rate: probability of an element to be dropped.

    Returns:
        bool [size], True where an element is kept.
    """
    keys = [np.array([start], np.uint32) for start in (0, 0x9E3779B9)]
    for number in (seed, step - 1, 0, zlib.crc32(place.encode())):
        keys = [_mix(key + np.uint32(number)) for key in keys]
    bits = _mix(_mix(np.arange(size, dtype=np.uint32) + keys[0]) + keys[1])
    return bits >= np.uint32(int(rate * 2**32))


def _mix(bits: np.ndarray) -> np.ndarray:
    """Murmur3's last step (Appleby 2008)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits ^ (bits >> np.uint32(16))


def records_of(step: int, quantity: str, tensors: Mapping[str, np.ndarray], parts: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of the group ``steps``.

    Args:
        tensors: official name → array in the official layout.
        parts: official name → part.
    """
    for part in dict.fromkeys(parts.values()):
        yield f"{step}/{quantity}/{part}", np.concatenate([tensors[name].ravel() for name, own in parts.items() if own == part])
    if step == 1 and quantity != BUFFERS:
        for name in parts:
            yield f"{step}/{quantity}.each/{name}", tensors[name]


def open_training(directory: str | Path, name: str) -> Case:
    """One training of a recording.

    Raises:
        TraceError: it is not there or damaged, or the directory holds something else.
    """
    case = Case(directory, name)
    if "recipe" not in case.reference.facts:
        case.close()
        raise TraceError(f"'{file_path(directory, name, 'float64')}' is no recorded training; record one with 'parity-check record-steps'")
    return case


def trainings(directory: str | Path) -> tuple[str, ...]:
    """Those of :data:`TRAININGS` that a recording has.

    Raises:
        TraceError: it has none.
    """
    found = tuple(name for name in TRAININGS if file_path(directory, name, "float64").is_file())
    if not found:
        raise TraceError(f"'{directory}' has no recorded training; record one with 'parity-check record-steps'")
    return found


def steps_of(
    checkpoint: str | Path, case: Case, dtype: str, *, steps: int | None = None, mode: str = "graph"
) -> Iterator[dict[tuple[str, str], np.ndarray]]:
    """Trains the port as the recorded training, and yields after each step what a recording has of it, by (group, name).

    Args:
        checkpoint: directory written by ``convert``.
        case: of :func:`open_training`.
        dtype: "float32" or "float64". In float64 the model gets the recorded position embeddings, as in
            :class:`parity.tensorflow_run.CaseInputs`.
        steps: how many; None: all that were recorded.
        mode: "graph", "eager" or "xla".
    """
    import tensorflow as tf

    from tfmaskformer.checkpoint import load
    from tfmaskformer.module import named_variables
    from tfmaskformer.training.optimizer import build_optimizer
    from tfmaskformer.training.recipe import recipe_of
    from tfmaskformer.training.step import TrainStep

    facts = case.reference.facts
    model = load(str(checkpoint), dtype)
    if not facts["dropout"]:
        _silence(model)
    optimizer = build_optimizer(recipe_of({"SOLVER": facts["recipe"]}), model)
    step = TrainStep(model, optimizer, seed=facts["seed"])
    parts = facts["parts"]
    variables = named_variables(model)
    buffers = sorted(name for name, variable in variables.items() if not variable.trainable)
    own = {parameter.name: parameter for parameter in optimizer.parameters}
    if own.keys() != parts.keys():
        raise StepsError(f"the port and the recording do not train the same parameters: {sorted(own.keys() ^ parts.keys())[:3]}")

    layouts = transforms(model.config, parts)

    def official(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: layouts[name].invert(value.numpy()) for name, value in values.items()}

    def weights() -> dict[str, np.ndarray]:
        return {name: array.astype(np.float64) for name, array in official({name: variables[name] for name in parts}).items()}

    def held() -> np.ndarray:
        return np.concatenate([np.zeros(0), *(np.float64(variables[name].numpy()).ravel() for name in buffers)])

    is_matched = ("scalars", "1/assignment") in case.reference.records
    batches = [_batch(case, model, images, dtype) for images in facts["batches"]]
    runs = [_compiled(step, embeddings, mode) for *_, embeddings in batches]
    before, held_before = weights(), held()
    for number in range(1, (steps or facts["steps"]) + 1):
        index = (number - 1) % len(batches)
        given = [] if dtype == "float64" or not is_matched else [tf.constant(case.reference.read("scalars", f"{number}/assignment"))]
        result, clipped, assignment = runs[index](*batches[index][:3], *given)
        found: dict[tuple[str, str], np.ndarray] = {}
        if is_matched:
            found["scalars", f"{number}/assignment"] = assignment.numpy()
        if number == 1:
            found["scalars", "decay"] = np.array([own[name].weight_decay for name in parts])
        found["scalars", f"{number}/lr"] = np.array([float(result.lr) * own[name].lr_factor for name in parts])
        for key, loss in result.losses.items():
            found["scalars", f"{number}/losses/{key}"] = loss.numpy()
        found["scalars", f"{number}/gradient_norm"] = result.gradient_norm.numpy()
        nothing = {name: tf.fill(variables[name].shape, math.nan) for name in parts.keys() - clipped.keys()}  # it had no gradient
        tensors = {"clipped": official(clipped | nothing)}
        tensors |= {slot: official({name: optimizer.slot(slot, name) for name in parts}) for slot in optimizer.slots}
        tensors["weights"] = {name: array - before[name] for name, array in weights().items()}
        for quantity, of in tensors.items():
            found |= {("steps", name): array for name, array in records_of(number, quantity, of, parts)}
        found |= {
            ("steps", name): array for name, array in records_of(number, BUFFERS, {BUFFERS: held() - held_before}, {BUFFERS: BUFFERS})
        }
        yield found


def _silence(model: MaskFormer) -> None:
    """Turns dropout and stochastic depth off, as the recording did."""
    from tfmaskformer.layers import Dropout, MultiheadAttention
    from tfmaskformer.module import named_modules

    for _, module in named_modules(model):
        if isinstance(module, Dropout):
            module.rate = 0.0
        elif isinstance(module, MultiheadAttention):
            module.dropout = 0.0


def _batch(case: Case, model: MaskFormer, images: Sequence[int], dtype: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Images, sizes and targets of a step, and the recorded position embeddings by tap."""
    import tensorflow as tf

    reference = case.reference
    pixels, targets = [case.images[index] for index in images], [case.targets[index] for index in images]
    sizes = np.array([image.shape[:2] for image in pixels], np.int32)
    divisor = max(model.config.size_divisibility, 1)
    height, width = (-(-int(side) // divisor) * divisor for side in sizes.max(0))
    own = tensorflow_run._task(model.config).targets(tensorflow_run.CaseInputs(pixels, targets, {}, ()), height, width)
    batch = (tensorflow_run.padded_images(pixels, sizes.max(0)), sizes, own[0] if isinstance(own, tuple) else own)
    embeddings = {}
    if dtype == "float64":
        for name in reference.group("taps"):
            module, _, number = name.partition("#")
            if reference.facts["batches"][int(number)] == list(images):
                embeddings[f"{module}#0"] = tf.constant(reference.read("taps", name).transpose(0, 2, 3, 1))
    return *tf.nest.map_structure(tf.constant, batch), embeddings


def _compiled(step: TrainStep, embeddings: Mapping[str, Any], mode: str) -> Callable[..., Any]:
    """The step, which returns its result, the clipped gradients by name and the assignment, with given position embeddings.

    It takes images, sizes and targets and, where it shall not match by itself, the assignment.
    """
    import tensorflow as tf

    from tfmaskformer.criterion import SetCriterion
    from tfmaskformer.module import record_taps

    optimizer = step.optimizer
    match = SetCriterion.__call__

    def run(images: Any, sizes: Any, targets: Any, *given_assignment: Any) -> Any:
        clipped: dict[str, Any] = {}
        taken = list(given_assignment)

        def measure(criterion: Any, outputs: Any, targets: Any) -> Any:
            if taken:
                return criterion.losses(outputs, targets, taken[0]), taken[0]
            losses, assignment = match(criterion, outputs, targets)
            taken.append(assignment)
            return losses, assignment

        reduce = optimizer._all_reduce_sum_gradients

        def seen(gradients: Any) -> Any:
            pairs = reduce(gradients)
            clipped.update((optimizer.parameters[optimizer._get_variable_index(variable)].name, gradient) for gradient, variable in pairs)
            return pairs

        given = record_taps(lambda tap, tensor: embeddings.get(tap, tensor)) if embeddings else contextlib.nullcontext()
        with mock.patch.object(optimizer, "_all_reduce_sum_gradients", seen), mock.patch.object(SetCriterion, "__call__", measure), given:
            result = step(images, sizes, targets)
        return result, clipped, taken[0] if taken else ()

    return run if mode == "eager" else tf.function(run, jit_compile=mode == "xla")


def judge(
    checkpoint: str | Path, case: Case, dtype: str, *, steps: int | None = None, mode: str = "graph", by_drift: bool = True
) -> Iterator[Item]:
    """Every record of the first ``steps`` steps, step by step, each in the order of computation; arguments as of :func:`steps_of`.

    With ``by_drift`` float32 is held to the drift. Without it, what is made of gradients (:data:`OF_GRADIENTS`) is told in float32 and not
    judged, as gradients are in a check: the first step of a ResNet-50 may part by more than a few official runs do.

    The clipped gradients of each parameter in the first step are the group ``clipped``, everything else is the group ``steps``.
    """
    file = case.baseline if dtype == "float32" else case.reference
    expected: dict[int, list[tuple[str, str]]] = collections.defaultdict(list)
    for group, name in case.reference.records:
        if group in ("scalars", "steps"):
            expected[_step_of(name)].append((group, name))
    drift: dict[str, float] = collections.defaultdict(float)
    parting = Parting() if dtype == "float32" else None
    for number, found in enumerate(steps_of(checkpoint, case, dtype, steps=steps, mode=mode), start=1):
        for key in (key for key in expected[number] if key in file.records):  # assignments are in the float64 file alone
            drift[_kind(key[1])] = max(drift[_kind(key[1])], _largest(file[key].floor))
        for group, name in expected[number]:
            own = "clipped" if name.startswith("1/clipped.each/") else "steps"
            if (group, name) not in found:
                yield Item(own, name, False, note="no partner in TensorFlow")
            elif _kind(name) == "assignment":
                yield _judge_assignment(case, name, found[group, name])
            elif _kind(name) in ("decay", "lr"):
                yield _judge_rates(case, name, found[group, name])
            else:
                limited = by_drift or dtype == "float64" or _kind(name).partition("/")[0] not in OF_GRADIENTS
                item = _judge_floats(case, case.reference[group, name], found[group, name], own, dtype, drift[_kind(name)], limited)
                if parting is not None and parting.excuses(number, _kind(name), item.error, item.tolerance):
                    item = dataclasses.replace(item, passed=True, tolerance=PARTED, note=f"parted in step {parting.step}")
                yield item
        for _, name in found.keys() - set(expected[number]):
            yield Item("steps", name, False, note="no partner in the recording")


class Parting:
    """Where a float32 training left the others, as official ones do.

    Sooner or later the input of some ReLU comes so close to zero that rounding decides whether it has a gradient. That gradient is the
    first thing that is different, by :data:`PARTING` at most; losses of the same step are not, nor was anything before. Whatever else
    comes first, a weight, a moment or a loss, is no such thing, and a fault. What follows from it is judged by :data:`PARTED` alone.

    Attributes:
        step: in which it parted; 0: it has not.
    """

    def __init__(self) -> None:
        self.step = 0
        self._lost = False

    def excuses(self, step: int, kind: str, error: float, tolerance: float) -> bool:
        """Whether an error, told in the order of computation, is to be excused; ``kind``: :func:`_kind`."""
        if error <= tolerance or kind == "buffers/buffers":
            return False
        if not self.step and not self._lost:
            if kind.partition("/")[0] in ("gradient_norm", "clipped") and error <= PARTING:
                self.step = step
            else:
                self._lost = True
        return self.step > 0 and error <= PARTED


def _kind(name: str) -> str:
    """What has one drift, which the largest of all steps so far stands for: a quantity's part, or all losses together.

    >>> _kind("3/losses/loss_ce_1"), _kind("3/lr"), _kind("12/weights/backbone.norm")
    ('losses', 'lr', 'weights/backbone.norm')
    """
    kind = name.partition("/")[2] or name
    return "losses" if kind.startswith("losses/") else kind


def _largest(floors: Sequence[float]) -> float:
    """Where the reference is zero and another official run is not, that run is the scale of the error, and the drift is 1."""
    return 1.0 if math.inf in floors else max((floor for floor in floors if not math.isnan(floor)), default=0.0)


def _judge_rates(case: Case, name: str, actual: np.ndarray) -> Item:
    """Learning rates and decays of all parameters: equal, but for what compilers do to the last bit."""
    expected, names = case.reference.read("scalars", name), list(case.reference.facts["parts"])
    tolerance = LR_RESOLUTION if name != "decay" else 0.0
    difference = np.abs(actual - expected)
    scale = float(np.abs(expected).max(initial=0)) or 1.0
    comparison = compare.compare(actual, expected, tolerance)
    wrong = np.flatnonzero(~(difference <= tolerance * scale))
    note = ""
    if wrong.size:
        first = int(wrong[0])
        note = f"{wrong.size} of {len(names)} parameters, the first '{names[first]}': {actual[first]:.6g}, expected {expected[first]:.6g}"
    error = float(difference.max(initial=0)) / scale
    return Item("steps", name, not wrong.size, error, 0.0, tolerance, comparison, note)


def _judge_assignment(case: Case, name: str, actual: np.ndarray) -> Item:
    comparison = compare.compare(actual, case.reference.read("scalars", name), 0.0)
    wrong = 0 if comparison.fault else int(np.count_nonzero(actual != case.reference.read("scalars", name)))
    note = comparison.fault or (f"{wrong} of {actual.size} objects of all layers have another query" if wrong else "")
    return Item("steps", name, not note, float(wrong > 0), 0.0, 0.0, comparison, note)


def _judge_floats(case: Case, record: Record, actual: np.ndarray, group: str, dtype: str, drift: float, limited: bool) -> Item:
    tolerance = _tolerance(record, dtype, drift, by_itself=".each/" in record.name) if limited else math.inf
    if tuple(actual.shape) != record.shape:
        fault = f"shape {actual.shape}, expected {record.shape}"
        comparison = compare.incomparable(fault, expected_shape=record.shape, actual_shape=actual.shape, tolerance=tolerance)
        return Item(group, record.name, False, math.nan, drift, tolerance, comparison, fault)
    whole = None
    if record.samples is not None:
        difference = np.linalg.norm(record.sketch(actual) - case.reference.read_sketch(record.group, record.name))
        whole = compare.Whole(statistics(actual), record.statistics, record.shape, float(difference))
    zero_scale = case.baseline[record.group, record.name].statistics.l2
    expected = case.reference.read(record.group, record.name)
    comparison = compare.compare(record.select(actual), expected, tolerance, whole=whole, zero_scale=zero_scale)
    error = max(comparison.error, comparison.error_bound)  # that of the sketch is an estimate
    passed, note = comparison.passed, "" if error > tolerance else comparison.fault or ""
    if group == "clipped" and dtype == "float64" and passed and comparison.mismatched:
        passed, note = False, f"{comparison.mismatched:.0%} of the elements that are recorded differ by more than {tolerance:.0e}"
    return Item(group, record.name, passed, error, drift, tolerance, comparison, note)


def _tolerance(record: Record, dtype: str, drift: float, *, by_itself: bool) -> float:
    """Relative L2 error that a record may have.

    In float32 parameters are judged in parts and not by themselves: where the input of a ReLU is zero but for rounding, the gradient of its
    weights is there or not, and a few official runs have not met every such place.
    """
    if dtype == "float64":
        return max(FLOAT64_TOLERANCE, compare.FLOAT64_FACTOR * drift)
    if by_itself:
        return math.inf
    return max(DRIFT_FACTOR * drift, compare.RESULT_RESOLUTION if record.group == "scalars" else compare.FLOAT32_RESOLUTION)


@dataclasses.dataclass(frozen=True)
class TrainingCheck:
    """One training in one dtype.

    Attributes:
        training: of :data:`TRAININGS`.
        steps: how many were judged.
        items: see :func:`judge`.
        finding: the diagnosis of the first step, where it fails in float64; None without one.
    """

    training: str
    dtype: str
    mode: str
    steps: int
    items: tuple[Item, ...]
    finding: Finding | None = None

    @property
    def passed(self) -> bool:
        """Every item; never of nothing."""
        return bool(self.items) and all(item.passed for item in self.items)

    @property
    def first_failure(self) -> Item | None:
        """The first thing that truly differs, in the order of computation."""
        return next((item for item in self.items if not item.passed), None)

    def worst(self, step: int, quantity: str) -> Item | None:
        """Of a quantity after a step, what is farthest out among what is judged; None if there is nothing."""
        prefix = f"{step}/{quantity}"
        items = [item for item in self.items if item.name.startswith(prefix + "/") or item.name == prefix]
        return max(items, key=_excess, default=None)


def _excess(item: Item) -> float:
    if math.isnan(item.error):
        return math.inf
    return item.error / item.tolerance if item.tolerance else math.inf if item.error else 0.0


def check(
    checkpoint: str | Path,
    reference: str | Path,
    *,
    names: Sequence[str] = (),
    dtypes: Sequence[str] = ("float64", "float32"),
    steps: int | None = None,
    mode: str = "graph",
    progress: Callable[[str], None] = lambda text: None,
) -> list[TrainingCheck]:
    """Judges trainings of a recording.

    Args:
        names: of :data:`TRAININGS`; empty: all that were recorded.
        progress: is told each training.

    Raises:
        StepsError, TraceError, tfmaskformer.CheckpointError: bad input.
    """
    recorded = trainings(reference)
    if unknown := [name for name in names if name not in recorded]:
        raise StepsError(f"'{reference}' has no training {', '.join(unknown)}; it has {', '.join(recorded)}")
    checks = []
    for name in names or recorded:
        with open_training(reference, name) as case:
            facts = case.reference.facts
            check_same_weights(checkpoint, facts)
            if steps is not None and steps > facts["steps"]:
                raise StepsError(f"'{reference}' has {facts['steps']} steps of '{name}', {steps} were asked for; record more")
            for dtype in dtypes:
                progress(f"{name}: {dtype}")
                items = tuple(judge(checkpoint, case, dtype, steps=steps, mode=mode))
                finding = diagnosis(checkpoint, case, dtype, items)
                checks.append(TrainingCheck(name, dtype, mode, steps or facts["steps"], items, finding))
    return checks


def diagnosis(checkpoint: str | Path, case: Case, dtype: str, items: Sequence[Item]) -> Finding | None:
    """Why the first step fails, by trying (:mod:`parity.diagnose_steps`), if it does in float64."""
    if dtype != "float64" or all(item.passed for item in items if _step_of(item.name) == 1):
        return None
    from parity.diagnose import Finding
    from parity.diagnose_steps import examine_training

    try:
        return examine_training(checkpoint, case)
    except Exception as error:  # the judgement stands without it
        words = f"steps: the diagnosis itself failed ({type(error).__name__}: {error})"
        return Finding("steps", "", "", words, math.nan, math.nan, math.nan)


def _step_of(name: str) -> int:
    """``decay`` is of the first step."""
    return 1 if name == "decay" else int(name.partition("/")[0])


def check_same_weights(checkpoint: str | Path, facts: Mapping[str, Any]) -> None:
    """Raises StepsError unless a checkpoint was converted from the file that a recorded training began with."""
    path = Path(checkpoint) / "manifest.json"
    try:
        source = json.loads(path.read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StepsError(f"'{path}' cannot be read ({error!r}); expected a directory from 'convert'") from error
    if source.get("sha256") != facts["checkpoint"]["sha256"]:
        raise StepsError(
            f"other weights: '{checkpoint}' was converted from {source.get('file')} (SHA-256 {source.get('sha256')}),\n"
            f"  but the training started from {facts['checkpoint']['file']} (SHA-256 {facts['checkpoint']['sha256']})"
        )


def text(checks: Sequence[TrainingCheck]) -> str:
    """A table for each training, and a line of verdict.

    Each cell has the largest relative error of a quantity after a step and, in float32, how many times the drift that is; ``!``: it failed,
    ``~``: the training has parted from the others (:class:`Parting`).
    """
    lines = []
    for of in checks:
        columns = [quantity for quantity in ("losses", "gradient_norm", *QUANTITIES) if of.worst(1, quantity) is not None]
        lines += [f"{of.training}, {of.dtype}, {of.mode}: {'match' if of.passed else 'MISMATCH'} over {of.steps} steps"]
        lines.append(" step" + "".join(f"{name:>20}" for name in ("lr", *columns)))
        for step in _shown(of.steps):
            rate = of.worst(step, "lr")
            cells = ["equal" if rate is not None and rate.passed else "DIFFERS"]
            cells += [_cell(of.worst(step, quantity), of.dtype) for quantity in columns]
            lines.append(f"{step:5}" + "".join(f"{cell:>20}" for cell in cells))
        if (failure := of.first_failure) is not None:
            lines.append(f"  first failure: {describe(failure)}")
            if of.finding is not None:
                lines += [f"  diagnosis: {words}" for words in (of.finding.statement, *(f"or {other}" for other in of.finding.others))]
        lines.append("")
    passed = bool(checks) and all(of.passed for of in checks)
    failed = [of for of in checks if not of.passed]
    lines.append(
        f"match: {len(checks)} trainings are inside the drift of the official code"
        if passed
        else f"MISMATCH: {describe(failed[0].first_failure)} ({failed[0].training}, {failed[0].dtype})"  # type: ignore[arg-type]
    )
    return "\n".join(lines)


def describe(item: Item) -> str:
    """A failed item in words.

    >>> describe(Item("steps", "3/weights/backbone.norm", False, 1e-3, 0.0, 1e-9))
    'step 3, weights of backbone.norm: error 1.0e-03, allowed 1.0e-09'
    """
    step, _, rest = item.name.partition("/")
    quantity, _, where = rest.partition("/")
    place = f"step {step}, {quantity.removesuffix('.each')}" if rest else item.name
    if where:
        place += f" of {where}"
    if item.note:
        return f"{place}: {item.note}"
    return f"{place}: error {item.error:.1e}, allowed {item.tolerance:.1e}"


def _shown(steps: int) -> list[int]:
    """All of a few steps; of many, the first ones, then every fifth or tenth, and the last."""
    every = 1 if steps <= 20 else 10
    return [step for step in range(1, steps + 1) if step <= 5 or step % every == 0 or step == steps]


def _cell(item: Item | None, dtype: str) -> str:
    if item is None:
        return ""
    mark = "~" if item.note.startswith("parted") else "" if item.passed else "!"
    return f"{mark}{item.error:.1e} ({item.ratio:.1f}x)" if dtype == "float32" and item.floor > 0 else f"{mark}{item.error:.1e}"


def as_json(checks: Sequence[TrainingCheck], checkpoint: str, reference: str) -> str:
    """Everything; numbers that are not finite are null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def told(finding: Finding) -> dict[str, Any]:
        return {key: number(value) if isinstance(value, float) else value for key, value in vars(finding).items()}

    runs = [
        {
            "training": of.training,
            "dtype": of.dtype,
            "mode": of.mode,
            "steps": of.steps,
            "passed": of.passed,
            "first_failure": None if of.first_failure is None else describe(of.first_failure),
            "finding": None if of.finding is None else told(of.finding),
            "items": [
                {
                    "group": item.group,
                    "name": item.name,
                    "passed": item.passed,
                    **{key: number(getattr(item, key)) for key in ("error", "tolerance")},
                    "drift": number(item.floor),
                    **({"note": item.note} if item.note else {}),
                }
                for item in of.items
            ],
        }
        for of in checks
    ]
    content = {
        "format": "tfmaskformer-steps",
        "version": 2,
        "passed": bool(checks) and all(of.passed for of in checks),
        "checkpoint": checkpoint,
        "reference": reference,
        "trainings": runs,
    }
    return json.dumps(content, indent=1) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``parity-check steps``."""
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="the checkpoint, written by convert")
    parser.add_argument("--reference", required=True, metavar="DIR", help="a recording of 'parity-check record-steps'")
    parser.add_argument("--steps", type=int, metavar="K", help="the first K steps (default: all that were recorded)")
    parser.add_argument("--training", choices=TRAININGS, action="append", default=[], help="default: all that were recorded")
    parser.add_argument(
        "--dtype", choices=("float32", "float64", "both"), default="both", help="what TensorFlow computes in (default: both)"
    )
    parser.add_argument("--mode", choices=MODES, default="graph", help="how TensorFlow runs (default: graph)")
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON to FILE, or to stdout only (-)")


def run(arguments: argparse.Namespace) -> int:
    """``parity-check steps``: 0 match, 1 mismatch, 2 bad input, 3 could not run."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if arguments.steps is not None and arguments.steps < 1:
        return _failed(f"--steps {arguments.steps}: expected 1 or more", 2)
    if arguments.json not in (None, "-") and not os.access(Path(arguments.json).absolute().parent, os.W_OK):
        return _failed(f"cannot write '{arguments.json}': no folder to write in; give another place", 2)
    try:
        from parity import probes
        from tfmaskformer.checkpoint import CheckpointError
    except ImportError as error:
        return _failed(f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[cpu]'", 3)
    try:
        if broken := probes.examine().broken:
            return _failed(f"TensorFlow computes garbage on this machine: {broken[0].name}\n  {probes.REMEDY}", 3)
        checks = check(
            arguments.ckpt,
            arguments.reference,
            names=arguments.training,
            dtypes=("float64", "float32") if arguments.dtype == "both" else (arguments.dtype,),
            steps=arguments.steps,
            mode=arguments.mode,
            progress=lambda text: print(f"{text} …", file=sys.stderr, flush=True),
        )
    except (StepsError, TraceError, CheckpointError) as error:
        return _failed(str(error), 2)
    except KeyboardInterrupt:
        return _failed("interrupted; nothing was concluded", 3)
    if arguments.json != "-":
        print(text(checks))
    if arguments.json:
        content = as_json(checks, arguments.ckpt, arguments.reference)
        if arguments.json == "-":
            print(content, end="")
        else:
            Path(arguments.json).write_text(content, encoding="utf-8")
    return 0 if all(of.passed for of in checks) else 1


def _failed(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
