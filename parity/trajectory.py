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
                      ``{step}/data``, uint8 [32]: of a training on a data set, the hash of the batch (:func:`hash_of`)
``steps``             ``{step}/{quantity}/{part}`` for each of :data:`QUANTITIES` and each part: the parameters that the recipe treats
                      alike (``backbone.weight``, ``sem_seg_head.norm``, …), one behind the other; after the first step also
                      ``1/{quantity}.each/{parameter}``. Of large models after some steps alone, the fact ``tensors_after``

Steps count from 1. ``weights`` are not the weights but how far they have moved since the start: that is what a step makes, and beside
the weights themselves a fault in it would look small. The floor of a record is the **drift**: how far other official runs, of other kernels
and numbers of threads, are from the float64 one after the same step.

All trainings but the reference take its assignments, the port's in float32 too: where two cost the same but for rounding, each run would
choose for itself, and from there on be another training. In float64 the port matches by itself, and its assignments are judged.

A recording whose facts have ``data`` is of a training on a data set. It has no ``inputs``: the port trains on the data set too, in the loop
of ``tfmaskformer train`` (:mod:`parity.trajectory_loop`).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest import mock

import numpy as np

from converters.tables.maskformer import transforms
from parity import compare, tensorflow_run
from parity.compiled import compiled
from parity.converted import CheckError, read_manifest, require_same_weights
from parity.judge import THREADS, Item
from parity.sampling import write
from parity.trace import Case, Record, TraceError, file_path
from tfmaskformer.cli import failed, require_writable, write_whole

if TYPE_CHECKING:
    from parity.diagnose import Finding
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.training.optimizer import TorchOptimizer
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

FUSED_TOLERANCE = 1e-9
"""Of moved weights where XLA compiled the step: it multiplies and adds with one rounding, so that a weight of 0.3 may be one unit in its
last place, 5e-17, away, beside a move of 1e-6 in the first warm-up step. Measured: 2e-10 of a single parameter, 2e-11 of a part."""

DRIFT_FACTOR = 3.0
"""Times the drift, the largest that other official float32 trainings have had so far: of six, one is up to 2.1 times as far as the farthest
of the others (docs/training_parity.md)."""

PARTING = 0.03
"""Relative error of a gradient with which a float32 training may part from the others (:class:`Parting`); official ones part with 1e-2 at
most."""

PARTED = 3.0
"""Relative error that may come of it: two trainings that have nothing more in common than their start."""

EQUAL = {
    "data": "other images, objects or draws than in the official training",
    "assignment": "{} of {} objects of all layers have another query",
}
"""What must be the same, and what is said where it is not."""

LR_RESOLUTION = 2.0**-51
"""Relative to ``BASE_LR``: compilers turn a division by a constant into a product, and a polynomial schedule takes the result from 1."""

MODES = ("graph", "eager", "xla")


Found: TypeAlias = "dict[tuple[str, str], np.ndarray]"
"""(group, name) → array: what a port made of some of a step's records."""


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
    each = {}
    for part in dict.fromkeys(parts.values()):
        own = {name: tensors[name] for name, of in parts.items() if of == part}
        whole = np.empty(sum(tensor.size for tensor in own.values()), np.result_type(*own.values()))
        start = 0
        for name, tensor in own.items():
            each[name] = whole[start : start + tensor.size].reshape(tensor.shape)
            write(tensor, each[name])
            start += tensor.size
        yield f"{step}/{quantity}/{part}", whole
    if step == 1 and quantity != BUFFERS:
        for name in parts:
            yield f"{step}/{quantity}.each/{name}", each[name]


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


def steps_of(checkpoint: str | Path, case: Case, dtype: str, *, steps: int | None = None, mode: str = "graph") -> Iterator[Iterator[Found]]:
    """Trains the port as the recorded training, and yields after each step what a recording has of it; see :meth:`Made.records`.

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
    from tfmaskformer.training.optimizer import build_optimizer
    from tfmaskformer.training.recipe import recipe_of
    from tfmaskformer.training.step import TrainStep

    facts = case.reference.facts
    model = load(str(checkpoint), dtype)
    if not facts["dropout"]:
        _silence(model)
    optimizer = build_optimizer(recipe_of({"SOLVER": facts["recipe"]}), model)
    step = TrainStep(model, optimizer, seed=facts["seed"])
    made = Made(model, optimizer, facts)
    is_matched = ("scalars", "1/assignment") in case.reference.records
    batches = [_batch(case, model, images, dtype) for images in facts["batches"]]
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(compiled(_run_of(step, embeddings), mode)) for *_, embeddings in batches]
        for number in range(1, (steps or facts["steps"]) + 1):
            index = (number - 1) % len(batches)
            given = [] if dtype == "float64" or not is_matched else [tf.constant(case.reference.read("scalars", f"{number}/assignment"))]
            result, clipped, assignment = runs[index](*batches[index][:3], *given)
            matched: Found = {("scalars", f"{number}/assignment"): assignment.numpy()} if is_matched else {}
            yield itertools.chain([matched], made.records(number, result.losses, result.gradient_norm, result.lr, clipped))


class Made:
    """What a training makes of a model, as a recording has it.

    Args:
        model, optimizer: at its start.
        facts: of the recording.

    Raises:
        StepsError: other parameters are trained.
    """

    def __init__(self, model: MaskFormer, optimizer: TorchOptimizer, facts: Mapping[str, Any]):
        from tfmaskformer.module import named_variables

        self.optimizer = optimizer
        self.parts: dict[str, str] = facts["parts"]
        self._tensors_after = facts.get("tensors_after")
        self.variables = named_variables(model)
        self._own = {parameter.name: parameter for parameter in optimizer.parameters}
        if unlike := sorted(self._own.keys() ^ self.parts.keys()):
            raise StepsError(f"the port and the recording do not train the same parameters: {unlike[:3]}")
        self._layouts = transforms(model.config, self.parts)
        self._buffers = sorted(name for name, variable in self.variables.items() if not variable.trainable)
        self._before, self._held_before = {name: array.copy("K") for name, array in self._weights().items()}, self._held()

    def _official(self, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        import tensorflow as tf

        return {name: self._layouts[name].invert(np.asarray(tf.convert_to_tensor(value))) for name, value in values.items()}

    def _weights(self) -> dict[str, np.ndarray]:
        """As they are until the next step."""
        return self._official({name: self.variables[name] for name in self.parts})

    def _held(self) -> np.ndarray:
        return np.concatenate([np.zeros(0), *(np.float64(self.variables[name].numpy()).ravel() for name in self._buffers)])

    def records(self, number: int, losses: Mapping[str, Any], gradient_norm: Any, lr: Any, clipped: Mapping[str, Any]) -> Iterator[Found]:
        """After a step, what a recording has of it, but for the assignment; one quantity after the other, each as large as the model.

        All of it must have been taken before the next step.

        Args:
            number: 1, 2, …
            losses, gradient_norm, lr: of :class:`~tfmaskformer.training.step.StepResult`.
            clipped: official name → gradient that entered the update; of those without one, none.
        """
        scalars: Found = {}
        if number == 1:
            scalars["scalars", "decay"] = np.array([self._own[name].weight_decay for name in self.parts])
        scalars["scalars", f"{number}/lr"] = np.array([float(lr) * self._own[name].lr_factor for name in self.parts])
        for key, loss in losses.items():
            scalars["scalars", f"{number}/losses/{key}"] = np.asarray(loss)
        scalars["scalars", f"{number}/gradient_norm"] = np.asarray(gradient_norm)
        yield scalars
        if self._tensors_after is not None and number not in self._tensors_after:
            return

        def each(quantity: str, tensors: Mapping[str, np.ndarray], parts: Mapping[str, str]) -> Found:
            return {("steps", name): array for name, array in records_of(number, quantity, tensors, parts)}

        nothing = {name: np.full(self.variables[name].shape, math.nan) for name in self.parts.keys() - clipped.keys()}
        missing = {name: self._layouts[name].invert(array) for name, array in nothing.items()}
        yield each("clipped", self._official(clipped) | missing, self.parts)
        for slot in self.optimizer.slots:
            yield each(slot, self._official({name: self.optimizer.slot(slot, name) for name in self.parts}), self.parts)
        yield each("weights", {name: array - self._before[name] for name, array in self._weights().items()}, self.parts)
        yield each(BUFFERS, {BUFFERS: self._held() - self._held_before}, {BUFFERS: BUFFERS})


def hash_of(images: Sequence[np.ndarray], targets: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """uint8 [32], SHA-256 of a batch: of each image its sides, its pixels, its classes and its masks.

    Args:
        images: uint8 [H, W, 3] RGB.
        targets: ``labels`` int [K] and ``masks`` bool [K, H, W] of each.
    """
    digest = hashlib.sha256()
    for image, target in zip(images, targets, strict=True):
        for array, dtype in ((np.array(image.shape), "<i8"), (image, "u1"), (target["labels"], "<i8"), (target["masks"], "u1")):
            digest.update(np.ascontiguousarray(array, dtype).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


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


def _run_of(step: TrainStep, embeddings: Mapping[str, Any]) -> Callable[..., Any]:
    """The step, which returns its result, the clipped gradients by name and the assignment, with given position embeddings.

    It takes images, sizes and targets and, where it shall not match by itself, the assignment.
    """
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

    return run


def judge(
    checkpoint: str | Path, case: Case, dtype: str, *, steps: int | None = None, mode: str = "graph", by_drift: bool = True
) -> Iterator[Item]:
    """Every record of the first ``steps`` steps, step by step; arguments as of :func:`steps_of` and :class:`Judge`."""
    step = Judge(case, dtype, by_drift=by_drift, fused=mode == "xla")
    for found in steps_of(checkpoint, case, dtype, steps=steps, mode=mode):
        yield from step(found)


class Judge:
    """Judges what a training made, step by step, each record in the order of computation.

    The clipped gradients of each parameter in the first step are the group ``clipped``, everything else is the group ``steps``.

    Args:
        case: of :func:`open_training`.
        dtype: "float32" or "float64".
        by_drift: whether float32 is held to the drift. Else what is made of gradients (:data:`OF_GRADIENTS`) is told in float32 and not
            judged, as gradients are in a check: the first step of a ResNet-50 may part by more than a few official runs do.
        fused: whether XLA compiled the steps (:data:`FUSED_TOLERANCE`).
    """

    def __init__(self, case: Case, dtype: str, *, by_drift: bool = True, fused: bool = False):
        self._case, self._dtype, self._by_drift, self._fused = case, dtype, by_drift, fused
        self._file = case.baseline if dtype == "float32" else case.reference
        self._expected: dict[int, list[tuple[str, str]]] = collections.defaultdict(list)
        for group, name in case.reference.records:
            if group in ("scalars", "steps"):
                self._expected[_step_of(name)].append((group, name))
        self._drift: dict[str, float] = collections.defaultdict(float)
        self._parting = Parting() if dtype == "float32" else None
        self._number = 0

    def __call__(self, step: Iterable[Found]) -> Iterator[Item]:
        """The next step: an item for each record that the recording has of it, and for each that it has not."""
        self._number += 1
        expected, drift = self._expected[self._number], self._drift
        for key in (key for key in expected if key in self._file.records):  # what is equal is in the float64 file alone
            drift[_kind(key[1])] = max(drift[_kind(key[1])], _largest(self._file[key].floor))
        judged: dict[tuple[str, str], Item] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            for found in step:
                judged |= zip(found, pool.map(self._item, found.keys(), found.values()), strict=True)
                del found  # before the next one is made
        for key in expected:
            yield self._unless_parted(judged.pop(key) if key in judged else self._item(key, None))
        yield from judged.values()

    def _item(self, key: tuple[str, str], actual: np.ndarray | None) -> Item:
        case, (group, name), kind = self._case, key, _kind(key[1])
        if key not in case.reference.records:
            return Item("steps", name, False, note="no partner in the recording")
        if actual is None:
            return Item(_group_of(name), name, False, note="no partner in TensorFlow")
        if kind in EQUAL:
            return _judge_equal(case, name, actual)
        if kind in ("decay", "lr"):
            return _judge_rates(case, name, actual)
        limited = self._by_drift or self._dtype == "float64" or kind.partition("/")[0] not in OF_GRADIENTS
        least = FUSED_TOLERANCE if self._fused and kind.startswith("weights") else FLOAT64_TOLERANCE
        return _judge_floats(case, case.reference[group, name], actual, _group_of(name), self._dtype, self._drift[kind], limited, least)

    def _unless_parted(self, item: Item) -> Item:
        kind = _kind(item.name)
        told = item.comparison is not None and kind not in (*EQUAL, "decay", "lr")
        if told and self._parting is not None and self._parting.excuses(self._number, kind, item.error, item.tolerance):
            return dataclasses.replace(item, passed=True, tolerance=PARTED, note=f"parted in step {self._parting.step}")
        return item


def _group_of(name: str) -> str:
    return "clipped" if name.startswith("1/clipped.each/") else "steps"


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
    scale = float(case.reference.facts["recipe"]["BASE_LR"])
    comparison = compare.compare(actual, expected, tolerance)
    wrong = np.flatnonzero(~(difference <= tolerance * scale))
    note = ""
    if wrong.size:
        first = int(wrong[0])
        note = f"{wrong.size} of {len(names)} parameters, the first '{names[first]}': {actual[first]:.6g}, expected {expected[first]:.6g}"
    error = float(difference.max(initial=0)) / scale
    return Item("steps", name, not wrong.size, error, 0.0, tolerance, comparison, note)


def _judge_equal(case: Case, name: str, actual: np.ndarray) -> Item:
    comparison = compare.compare(actual, case.reference.read("scalars", name), 0.0)
    wrong = 0 if comparison.fault else int(np.count_nonzero(actual != case.reference.read("scalars", name)))
    note = comparison.fault or (EQUAL[_kind(name)].format(wrong, actual.size) if wrong else "")
    return Item("steps", name, not note, float(wrong > 0), 0.0, 0.0, comparison, note)


def _judge_floats(
    case: Case, record: Record, actual: np.ndarray, group: str, dtype: str, drift: float, limited: bool, least: float
) -> Item:
    tolerance = _tolerance(record, dtype, drift, by_itself=".each/" in record.name, least=least) if limited else math.inf
    if tuple(actual.shape) != record.shape:
        fault = f"shape {actual.shape}, expected {record.shape}"
        comparison = compare.incomparable(fault, expected_shape=record.shape, actual_shape=actual.shape, tolerance=tolerance)
        return Item(group, record.name, False, math.nan, drift, tolerance, comparison, fault)
    whole = None
    if record.samples is not None:
        figures, sums = record.statistics_and_sketch(actual)
        difference = float(np.linalg.norm(sums - case.reference.read_sketch(record.group, record.name)))
        whole = compare.Whole(figures, record.statistics, record.shape, difference)
    zero_scale = case.baseline[record.group, record.name].statistics.l2
    expected = case.reference.read(record.group, record.name)
    comparison = compare.compare(record.select(actual), expected, tolerance, whole=whole, zero_scale=zero_scale)
    error = max(comparison.error, comparison.error_bound)  # that of the sketch is an estimate
    passed, note = comparison.passed, "" if error > tolerance else comparison.fault or ""
    if group == "clipped" and dtype == "float64" and passed and comparison.mismatched:
        passed, note = False, f"{comparison.mismatched:.0%} of the elements that are recorded differ by more than {tolerance:.0e}"
    return Item(group, record.name, passed, error, drift, tolerance, comparison, note)


def _tolerance(record: Record, dtype: str, drift: float, *, by_itself: bool, least: float = FLOAT64_TOLERANCE) -> float:
    """Relative L2 error that a record may have; in float64 ``least`` or more.

    In float32 parameters are judged in parts and not by themselves: where the input of a ReLU is zero but for rounding, the gradient of its
    weights is there or not, and a few official runs have not met every such place.
    """
    if dtype == "float64":
        return max(least, compare.FLOAT64_FACTOR * drift)
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
        mode: see :func:`steps_of`; a training on a data set takes the loop's.
        progress: is told each training.

    Raises:
        CheckError, StepsError, TraceError, tfmaskformer.CheckpointError: bad input.
    """
    recorded = trainings(reference)
    if unknown := [name for name in names if name not in recorded]:
        raise StepsError(f"'{reference}' has no training {', '.join(unknown)}; it has {', '.join(recorded)}")
    source = read_manifest(checkpoint)["source"]
    checks = []
    for name in names or recorded:
        with open_training(reference, name) as case:
            facts = case.reference.facts
            require_same_weights(checkpoint, source, f"training '{name}' started from", facts["checkpoint"])
            if steps is not None and steps > facts["steps"]:
                raise StepsError(f"'{reference}' has {facts['steps']} steps of '{name}', {steps} were asked for; record more")
            for dtype in dtypes:
                progress(f"{name}: {dtype}")
                count = steps or facts["steps"]
                if "data" in facts:
                    from parity.trajectory_loop import judge_loop

                    checks.append(TrainingCheck(name, dtype, "loop", count, judge_loop(checkpoint, case, dtype, steps=steps)))
                    continue
                items = tuple(judge(checkpoint, case, dtype, steps=steps, mode=mode))
                checks.append(TrainingCheck(name, dtype, mode, count, items, diagnosis(checkpoint, case, dtype, items)))
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
    outside = [of for of in checks if not of.passed]
    lines.append(
        f"match: {len(checks)} trainings are inside the drift of the official code"
        if passed
        else f"MISMATCH: {describe(outside[0].first_failure)} ({outside[0].training}, {outside[0].dtype})"  # type: ignore[arg-type]
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
    """``parity-check steps``: 0 match, 1 mismatch, 2 bad input, 3 could not run.

    Raises:
        tfmaskformer.cli.OutputError: ``--json`` cannot be written.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if arguments.steps is not None and arguments.steps < 1:
        return failed(f"--steps {arguments.steps}: expected 1 or more", 2)
    require_writable(arguments.json)
    try:
        from parity import probes
        from tfmaskformer.checkpoint import CheckpointError
    except ImportError as error:
        return failed(f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[cpu]'", 3)
    try:
        if broken := probes.examine().broken:
            return failed(f"TensorFlow computes garbage on this machine: {broken[0].name}\n  {probes.REMEDY}", 3)
        checks = check(
            arguments.ckpt,
            arguments.reference,
            names=arguments.training,
            dtypes=("float64", "float32") if arguments.dtype == "both" else (arguments.dtype,),
            steps=arguments.steps,
            mode=arguments.mode,
            progress=lambda text: print(f"{text} …", file=sys.stderr, flush=True),
        )
    except (CheckError, StepsError, TraceError, CheckpointError) as error:
        return failed(str(error), 2)
    except KeyboardInterrupt:
        return failed("interrupted; nothing was concluded", 3)
    if arguments.json != "-":
        print(text(checks))
    if arguments.json:
        content = as_json(checks, arguments.ckpt, arguments.reference)
        if arguments.json == "-":
            print(content, end="")
        else:
            write_whole(arguments.json, content)
    return 0 if all(of.passed for of in checks) else 1
