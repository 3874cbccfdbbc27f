"""Why costs, losses, results, gradients, the canvas or an optimizer step differ, though what they are computed of is as recorded.

Sites for :func:`parity.diagnose.diagnose`, and :func:`examine`, which picks the one of a case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from parity import formulas_results as formulas
from parity import hypotheses
from parity.diagnose import FLOOR, Finding, Site, TapSite, diagnose, relative, told
from parity.diagnose_samples import call_of
from parity.formulas import Choice, UnsupportedError
from parity.hypotheses import Hypothesis
from parity.judge import case_inputs
from parity.replay import Call, replay, why_not
from parity.tensorflow_run import _task, padded_images, run
from parity.trace import Case, Record

if TYPE_CHECKING:
    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.model import MaskFormer


class ResultSite:
    """Something that is computed of recorded inputs by a formula.

    Args:
        where: what is at fault if this is wrong.
        actual, expected: what TensorFlow computed of them and what PyTorch recorded, of one shape.
        formula: the official computation; its keywords are choices. None: nothing is known of it.
        choices: what ports get wrong in it.
        floor: see :data:`parity.diagnose.FLOOR`.
        first, last: what else to try, before the choices and where none of them explains it.
    """

    def __init__(
        self,
        where: str,
        actual: np.ndarray,
        expected: np.ndarray,
        formula: Callable[..., np.ndarray] | None = None,
        choices: Sequence[Choice] = (),
        floor: float = FLOOR,
        first: Iterable[Hypothesis] = (),
        last: Iterable[Hypothesis] = (),
    ):
        self.where, self.floor = where, floor
        self.actual, self.expected = np.asarray(actual), np.asarray(expected)
        self._formula, self._choices, self._first, self._last = formula, choices, first, last

    def residual(self) -> float:
        return relative(self.actual, self.expected)

    @functools.cached_property
    def _official(self) -> np.ndarray | None:
        """What the formula gives with the official choices."""
        try:
            return None if self._formula is None else np.asarray(self._formula())
        except (UnsupportedError, ValueError, IndexError):  # what was recorded has a shape that the formula does not know
            return None

    def hypotheses(self) -> Iterator[Iterable[Hypothesis]]:
        yield self._first
        official = self._official
        if official is not None and relative(official, self.expected) <= self.floor:
            yield self._tried(self.actual, lambda choice, value: f"{choice.words} {told(value)} instead of {told(choice.values[0])}", 1)
        elif official is not None and relative(official, self.actual) <= self.floor:
            yield self._tried(self.expected, lambda choice, value: f"PyTorch computed with {choice.words} {told(value)}", 0)
        yield self._last
        yield hypotheses.of_outputs(self.where, self.actual, self.expected)

    def _tried(self, target: np.ndarray, words: Callable[[Choice, Any], str], start: int) -> Iterator[Hypothesis]:
        for choice in self._choices:
            for value in choice.values[start:]:
                yield Hypothesis(
                    choice.cause_of(value),
                    self.where,
                    words(choice, value),
                    "that in the formula",
                    lambda c=choice, v=value: relative(np.asarray(self._formula(**{c.keyword: v})), target),  # type: ignore[misc]
                )

    def not_finite(self) -> Finding | None:
        """None: what makes it so may be known (labels that are no class do)."""
        return None

    def without_cause(self) -> Finding | None:
        if self.actual.dtype.kind == "f" and not np.isfinite(self.actual).all() and np.isfinite(self.expected).all():
            words = f"{np.count_nonzero(~np.isfinite(self.actual))} elements are not finite"
            return Finding(self.where, words, "not finite", f"{self.where}: {words}", math.inf, math.nan, self.floor)
        official = self._official
        if official is None or relative(official, self.expected) > self.floor:
            return None
        said = "of the recorded inputs the formula makes what PyTorch computed, and TensorFlow does not: its code is wrong"
        return Finding(
            self.where, "", "", f"{self.where}: {said}; none of the hypotheses explains it", self.residual(), math.nan, self.floor
        )


class Results:
    """The sites of one case, of what is computed of the recorded outputs.

    Args:
        case: of the trace.
        results: what TensorFlow computed: of recorded inputs (:class:`parity.replay.Replay`), or of its own, if those are right.
        config: of the model.
    """

    def __init__(self, case: Case, results: Any, config: MaskFormerConfig):
        self._case, self._results, self._config = case, results, config
        self._images, self._targets = case.images, case.targets
        height, width = case.reference["taps", "images#0"].shape[2:]
        self.canvas = (height, width)

    def expected(self, group: str, name: str) -> np.ndarray:
        """What PyTorch recorded."""
        return self._case.reference.read(group, name)

    def actual(self, group: str, name: str) -> np.ndarray:
        """What TensorFlow computed of recorded inputs."""
        return np.asarray(self._results.official(group, name))

    def site(self, group: str, name: str) -> ResultSite | None:
        """The site of a failing item; None where there is none for such items."""
        makers = {"matcher": self._matcher, "losses": self._losses, "inference": self._inference}
        return makers[group](name) if group in makers else None

    # Outputs and targets

    def _layers(self) -> list[str]:
        """Prefixes of the outputs of all decoder layers: the final one, then 0, 1, …"""
        last = "sem_seg" if ("outputs", "sem_seg") in self._case.reference.records else "pred_masks"
        count = sum(name.endswith(last) for name in self._case.reference.group("outputs"))
        return ["", *(f"aux_outputs.{layer}." for layer in range(count - 1))]

    def _output(self, place: int, name: str, layer: int = 0, layers: str = "as they are") -> np.ndarray:
        """Of a decoder layer; of another one where ``layer``, how far it is off, or ``layers``, their order, say so.

        ``place`` counts from 0, the final one. Where the trace has samples, TensorFlow's own, which is right then.
        """
        names = self._layers()
        if layers == "auxiliary ones backwards":
            place = -place
        elif layers == "all backwards":
            place = 1 - place
        name = names[(place + layer) % len(names)] + name
        sampled = self._case.reference["outputs", name].samples is not None
        return self.actual("outputs", name) if sampled else self.expected("outputs", name)

    def _masks(self, image: int) -> np.ndarray:
        """bool ``[objects, canvas height, canvas width]``."""
        own = self._targets[image]["masks"]
        padded = np.zeros((len(own), *self.canvas), bool)
        padded[:, : own.shape[1], : own.shape[2]] = own
        return padded

    def _assignments(self, layer: int) -> list[np.ndarray]:
        place = "final" if layer == 0 else str(layer - 1)
        return [self.expected("matcher", f"{place}/{image}/assignment") for image in range(len(self._images))]

    # Matcher

    def _matcher(self, name: str) -> ResultSite | None:
        place, image_text, what = name.split("/")
        decoder_layer, image = 0 if place == "final" else int(place) + 1, int(image_text)
        where = f"matcher/{what}"
        actual, expected = self.actual("matcher", name), self.expected("matcher", name)
        labels, weights = self._targets[image]["labels"], self._config.criterion

        def cost(function: Callable[..., np.ndarray], output: str, *rest: Any) -> Callable[..., np.ndarray]:
            return lambda layer=0, layers="as they are", **choices: function(
                self._output(decoder_layer, output, layer, layers)[image], *rest, **choices
            )

        if what == "cost_class":
            return ResultSite(where, actual, expected, cost(formulas.class_cost, "pred_logits", labels), formulas.CLASS_COST_CHOICES)
        if what == "cost_mask":
            return ResultSite(
                where, actual, expected, cost(formulas.mask_cost, "pred_masks", self._masks(image)), formulas.MASK_COST_CHOICES
            )
        if what == "cost_dice":
            return ResultSite(
                where, actual, expected, cost(formulas.dice_cost, "pred_masks", self._masks(image)), formulas.DICE_COST_CHOICES
            )
        if what == "total":
            parts = [self.expected("matcher", f"{place}/{image}/{part}") for part in ("cost_class", "cost_mask", "cost_dice")]
            official = (weights.class_weight, weights.mask_weight, weights.dice_weight)
            return ResultSite(where, actual, expected, functools.partial(_weighted, parts, official), _weight_choices(parts, actual))
        costs = self.expected("matcher", f"{place}/{image}/total")
        return ResultSite("matcher/assignment", actual, expected, functools.partial(_assigned, costs), ASSIGNMENT_CHOICES)

    # Losses

    def _losses(self, name: str) -> ResultSite | None:
        """One term in all layers at once: a formula that is wrong by chance fits one number, but not all."""
        term = _term(name)
        recorded = list(self._case.reference.group("losses"))
        if term == "total":
            return self._total(recorded)
        names = [other for other in recorded if _term(other) == term and other in self._results.groups["losses"]]
        places = [0 if other == term else int(other.rpartition("_")[2]) + 1 for other in names]
        actual = np.array([float(self.actual("losses", other)) for other in names])
        expected = np.array([float(self.expected("losses", other)) for other in names])
        targets, weights = self._targets, self._config.criterion

        def each(output: str, loss: Callable[..., float]) -> Callable[..., np.ndarray]:
            def losses(layer: int = 0, layers: str = "as they are", **choices: Any) -> np.ndarray:
                return np.array([loss(self._output(place, output, layer, layers), place, **choices) for place in places])

            return losses

        def of_classes(logits: np.ndarray, place: int, **choices: Any) -> float:
            labels = [target["labels"] for target in targets]
            return formulas.class_loss(logits, labels, self._assignments(place), official_weight=weights.no_object_weight, **choices)

        def of_masks(function: Callable[..., float]) -> Callable[..., float]:
            masks = [self._masks(image) for image in range(len(targets))]
            return lambda logits, place, **choices: function(logits, masks, self._assignments(place), **choices)

        def of_pixels(logits: np.ndarray, place: int, **choices: Any) -> float:
            labels = [target["sem_seg"] for target in targets]
            return weights.loss_weight * formulas.pixel_loss(logits, labels, weights.ignore_value, self.canvas, **choices)

        functions: dict[str, tuple[str, Callable[..., float], Sequence[Choice]]] = {
            "loss_ce": ("pred_logits", of_classes, formulas.CLASS_LOSS_CHOICES),
            "loss_mask": ("pred_masks", of_masks(formulas.mask_loss), formulas.MASK_LOSS_CHOICES),
            "loss_dice": ("pred_masks", of_masks(formulas.dice_loss), formulas.DICE_LOSS_CHOICES),
            "loss_sem_seg": ("sem_seg", of_pixels, formulas.PIXEL_LOSS_CHOICES),
        }
        if term not in functions:
            return ResultSite(name, actual, expected)
        output, function, choices = functions[term]
        return ResultSite(term, actual, expected, each(output, function), choices, last=self._of_other_inputs(term, names, expected))

    def _of_other_inputs(self, term: str, names: Sequence[str], expected: np.ndarray) -> Iterator[Hypothesis]:
        """TensorFlow's own losses, of labels or outputs in which the mistake is undone."""

        def after(
            labels: Callable[[np.ndarray], np.ndarray] = lambda labels: labels, maps: Callable[[np.ndarray], np.ndarray] = lambda maps: maps
        ) -> float:
            found = self._losses_of(labels, maps)
            return relative(np.array([found[name] for name in names]), expected)

        ignore = self._config.criterion.ignore_value
        counted = {
            "labels are counted from 1, with 0 for none": lambda labels: np.where(labels == ignore, 0, labels + 1),
            "labels are counted from 1": lambda labels: np.where(labels == ignore, ignore, labels + 1),
            "1 is added to labels": lambda labels: np.where(labels == ignore, ignore, labels - 1),
        }
        for words, labels in counted.items():
            yield Hypothesis("class order", term, words, "such labels given to it", functools.partial(after, labels))
        if self._results.view is not None:
            yield Hypothesis(
                "padding",
                term,
                "what lies behind the border of the outputs is resized too",
                "the border repeated there",
                functools.partial(after, maps=self._border_repeated),
            )

    def _border_repeated(self, maps: np.ndarray) -> np.ndarray:
        """Outputs ``[..., height, width]`` of a padded canvas, of which the border of the image goes on to the end."""
        assert self._results.view is not None
        height, width = (-(-length // 4) for length in self._results.view.valid_px)
        margins = [(0, 0)] * (maps.ndim - 2) + [(0, maps.shape[-2] - height), (0, maps.shape[-1] - width)]
        return np.pad(maps[..., :height, :width], margins, mode="edge")

    def _losses_of(self, labels: Callable[[np.ndarray], np.ndarray], maps: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        """What TensorFlow's criterion makes of other labels and other maps."""
        import tensorflow as tf

        task, view = _task(self._config), self._results.view
        inputs = case_inputs(self._case, "float64", every_assignment=True)
        key = "labels" if "sem_seg" not in task.outputs else "sem_seg"
        inputs = dataclasses.replace(inputs, targets=[{**target, key: labels(target[key])} for target in inputs.targets])
        canvas = self.canvas if view is None else view.canvas_px

        def layer(prefix: str) -> dict[str, Any]:
            own = {name: self._results.groups["outputs"][prefix + name] for name in task.outputs}
            if view is not None:
                own = {name: values[view.image : view.image + 1] for name, values in own.items()}
            return {name: tf.constant(maps(values) if values.ndim == 4 else values) for name, values in own.items()}

        final, *others = map(layer, self._layers())
        outputs = {**final, "aux_outputs": others, "padded_size": tf.constant(canvas)}
        if view is not None:
            outputs["valid_sizes"] = tf.constant([view.valid_px])
        _, losses_of = task.match(outputs, tf.nest.map_structure(tf.constant, task.targets(inputs, *canvas)))
        return {name: float(loss) for name, loss in losses_of(outputs).items()}

    def _total(self, recorded: Sequence[str]) -> ResultSite:
        terms = {name: float(self.expected("losses", name)) for name in recorded if name != "total"}
        config = self._config.criterion
        official = (config.class_weight, config.mask_weight, config.dice_weight)

        def total(weights: Sequence[float] = official, layers: str = "all") -> np.ndarray:
            of_term = dict(zip(("loss_ce", "loss_mask", "loss_dice"), weights, strict=True))
            chosen = {
                "the last alone": [name for name in terms if name == _term(name)],
                "all but the last": [name for name in terms if name != _term(name)],
            }.get(layers, list(terms))
            found = sum(of_term.get(_term(name), 1.0) * terms[name] for name in chosen)
            return np.array([found / (len(terms) / len(set(map(_term, terms))) if layers == "mean of all" else 1)])

        others = itertools.product(sorted({0.5, 1.0, 2.0, 5.0, 20.0, *official}), repeat=3)
        choices = (
            Choice("weights", (official, *others), "scale", "weights of class, mask and dice"),
            Choice("layers", ("all", "the last alone", "all but the last", "mean of all"), "missing term", "decoder layers"),
        )
        actual, expected = (np.array([float(read("losses", "total"))]) for read in (self.actual, self.expected))
        return ResultSite("total", actual, expected, total, choices)

    # Results

    def _inference(self, name: str) -> ResultSite | None:
        image_text, _, rest = name.partition("/")
        image, what = int(image_text), rest.rpartition("/")[2]
        _, *output = self._case.reference["inference", name.removesuffix(what) + "sem_seg"].shape
        test = self._config.test
        per_pixel = ("outputs", "sem_seg") in self._case.reference.records
        masks = self._output(0, "sem_seg" if per_pixel else "pred_masks")[image]
        canvas = (4 * masks.shape[1], 4 * masks.shape[2]) if per_pixel else self.canvas
        sizes = {"canvas": canvas, "image": self._images[image].shape[:2], "output": (output[0], output[1])}
        formula: Callable[..., np.ndarray]
        choices: Sequence[Choice]
        if per_pixel:
            formula, choices = functools.partial(formulas.pixel_logits, masks, sizes), formulas.LOGITS_CHOICES
        elif what == "sem_seg":
            after = not self._config.postprocess_before_inference
            formula = functools.partial(formulas.semantic, self._output(0, "pred_logits")[image], masks, sizes, after)
            choices = formulas.SEMANTIC_CHOICES
        else:
            logits, thresholds = self._output(0, "pred_logits")[image], (test.object_mask_threshold, test.overlap_threshold)
            of, part = _things(self._config.thing_classes), 0 if what == "panoptic_seg" else 1
            choices = (*formulas.PANOPTIC_CHOICES, Choice("things", tuple(of), "id", "things are"))

            def panoptic(things: str = "those of the config", **choices: Any) -> np.ndarray:
                return formulas.panoptic(logits, masks, sizes, thresholds, of[things], **choices)[part]

            formula = panoptic
        actual, record = self.actual("inference", name), self._case.reference["inference", name]
        return ResultSite(
            f"inference/{what}",
            _selected(record, actual),
            self.expected("inference", name),
            lambda **choices: _selected(record, formula(**choices)),
            choices,
            FLOOR if what == "sem_seg" else PIXELS_FLOOR,
            self._of_other_images(image, rest, actual),
        )

    def _of_other_images(self, image: int, rest: str, actual: np.ndarray) -> Iterator[Hypothesis]:
        """The result of another image of the batch."""
        images = range(len(self._images))
        missing = [other for other in images if f"{other}/{rest}" not in self._results.groups["inference"]]
        for other in images:
            if other != image:
                record, name = self._case.reference["inference", f"{other}/{rest}"], f"{other}/{rest}"
                yield Hypothesis(
                    "id" if missing else "axis order",
                    f"inference/{rest.rpartition('/')[2]}",
                    f"what comes out for image {image} is the result of image {other}" + "; some images have none" * bool(missing),
                    "that image's official result",
                    functools.partial(
                        lambda record, name: relative(_selected(record, actual), self.expected("inference", name)), record, name
                    ),
                )


PIXELS_FLOOR = 1e-3
"""A pixel that two masks claim alike may go to either."""


def _term(loss: str) -> str:
    return loss.rstrip("0123456789").rstrip("_")


def _selected(record: Record, values: np.ndarray) -> np.ndarray:
    """The samples that are recorded; all of what has another shape."""
    return record.select(np.ascontiguousarray(values)) if values.shape == record.shape else values


def _things(official: Collection[int]) -> dict[str, Collection[int]]:
    """Which classes are things, as they are looked up: by the right numbers, or by those of the files of a data set."""
    from checkpoints.registry import datasets

    found: dict[str, Collection[int]] = {"those of the config": official}
    for info in datasets():
        if info.dataset_ids and info.thing_classes:
            ids = dict(enumerate(info.dataset_ids))
            found[f"classes whose id in {info.name} is the number of a thing"] = {label for label in ids if ids[label] in official}
            found[f"classes whose number is the id of a thing in {info.name}"] = {ids[label] for label in official if label in ids}
    return found


def _weighted(parts: Sequence[np.ndarray], official: Sequence[float], weights: Sequence[float] | None = None) -> np.ndarray:
    return sum((weight * part for weight, part in zip(weights or official, parts, strict=True)), np.zeros_like(parts[0]))


def _weight_choices(parts: Sequence[np.ndarray], actual: np.ndarray) -> tuple[Choice, ...]:
    """The weights with which the parts come closest to the actual sum."""
    if actual.size < len(parts) or actual.shape != parts[0].shape or not np.isfinite(actual).all():
        return ()
    fitted = np.linalg.lstsq(np.stack([part.ravel() for part in parts], 1), actual.ravel(), rcond=None)[0]
    return (
        Choice(
            "weights", ("of the config", tuple(float(f"{weight:.9g}") for weight in fitted)), "scale", "weights of class, mask and dice"
        ),
    )


ASSIGNMENT_CHOICES = (
    Choice(
        "rule",
        ("least cost", "largest cost", "best query of each object", "objects in turn", "cheapest pair first", "in order"),
        "assignment",
        "assigned by",
    ),
)


def _assigned(costs: np.ndarray, rule: str = "least cost") -> np.ndarray:
    """The query of each object, of costs ``[queries, objects]``."""
    import tensorflow as tf

    from tfmaskformer.assignment import linear_assignment

    queries, objects = costs.shape
    if rule in ("least cost", "largest cost"):
        sign = 1.0 if rule == "least cost" else -1.0
        found = linear_assignment(tf.constant(sign * costs[None, None]), tf.constant([[objects]]))[0]
        return found.numpy()[0, 0]
    if rule == "best query of each object":
        return costs.argmin(0)
    if rule == "in order":
        return np.where(np.arange(objects) < queries, np.arange(objects), -1)
    taken, free = np.full(objects, -1), costs.astype(np.float64).copy()
    for turn in range(min(queries, objects)):
        if rule == "objects in turn":
            query, thing = int(free[:, turn].argmin()), turn
        else:
            query, thing = (int(index) for index in np.unravel_index(free.argmin(), free.shape))
            free[:, thing] = math.inf
        taken[thing] = query
        free[query] = math.inf
    return taken


PROBES = (
    ([[1.0, math.nan], [2.0, 3.0], [0.5, 4.0]], (0, -1, -1)),  # that of the check
    ([[1.0, 2.0], [1.5, 10.0], [9.0, 9.0]], (1, 1, 0)),  # the cheapest pair, and the best query of each object, leave the other a worse one
    ([[3.0, 1.0], [4.0, 9.0], [8.0, 7.0]], (1, 1, 0)),  # objects in turn do
)
"""Costs of two objects and three queries; whether these can be assigned, and the query of each object."""


def probe_site() -> ResultSite:
    """What is assigned for :data:`PROBES`, of which one is a part of every check."""
    import tensorflow as tf

    from tfmaskformer import matcher

    assign = vars(matcher)["linear_assignment"]  # as the matcher calls it
    found = [assign(tf.constant(costs), tf.constant(2)) for costs, _ in PROBES]
    actual = np.array([[one.valid.numpy(), *one.queries.numpy()] for one in found], np.int64)

    def assigned(replaced: str = "nothing", **rule: str) -> np.ndarray:
        of_each = []
        for costs in (np.array(costs) for costs, _ in PROBES):
            queries = _assigned(costs if replaced == "nothing" else np.nan_to_num(costs, nan=float(replaced)), **rule)
            of_each.append([int((queries >= 0).all()), *queries])
        return np.array(of_each, np.int64)

    constants = Choice("replaced", ("nothing", "0", "100", "1e6"), "not finite", "what is no number replaced by")
    expected = np.array([answer for _, answer in PROBES], np.int64)
    return ResultSite("matcher/assignment", actual, expected, assigned, (constants, *ASSIGNMENT_CHOICES))


class CanvasSite(ResultSite):
    """The network's input, ``[images, 3, height, width]``, of another size than the official one."""

    def __init__(self, actual: np.ndarray, expected_px: tuple[int, int], formula: Callable[[tuple[int, int]], np.ndarray]):
        super().__init__("images", actual, formula(expected_px))
        self._words = "padded to {}×{} px, not to {}×{}".format(*actual.shape[2:], *expected_px)
        self._formula_of = formula

    def residual(self) -> float:
        return math.inf

    def hypotheses(self) -> Iterator[Iterable[Hypothesis]]:
        height, width = self.actual.shape[2:]
        undone = "that size in the formula"
        yield [Hypothesis("padding", self.where, self._words, undone, lambda: relative(self.actual, self._formula_of((height, width))))]

    def without_cause(self) -> Finding | None:
        return None


def canvas_site(case: Case, actual: np.ndarray, config: MaskFormerConfig) -> ResultSite:
    """The network's input; ``actual``: what TensorFlow made of the images, official layout."""
    images, record = case.images, case.reference["taps", "images#0"]
    height, width = record.shape[2:]

    def formula(**choices: Any) -> np.ndarray:
        made = formulas.canvas(images, (height, width), config.pixel_mean, config.pixel_std, **choices)
        return record.select(np.ascontiguousarray(np.moveaxis(made, -1, 1)))

    if actual.shape != record.shape:

        def sized(size: tuple[int, int]) -> np.ndarray:
            return np.moveaxis(formulas.canvas(images, size, config.pixel_mean, config.pixel_std), -1, 1)

        return CanvasSite(actual, (height, width), sized)
    selected = record.select(actual)
    return ResultSite("images", selected, case.reference.read("taps", "images#0"), formula, formulas.CANVAS_CHOICES)


class GradientSite(ResultSite):
    """The gradient of a parameter or a tap, of which nothing that was computed before it, on the way back, differs.

    Args:
        where: the parameter or tap.
        actual, expected: official layout.
        rerun: computes the gradient again.
        values: of a tap, what it is the gradient of, element by element; None where that is not known.
    """

    def __init__(
        self, where: str, actual: np.ndarray, expected: np.ndarray, rerun: Callable[[], np.ndarray], values: np.ndarray | None = None
    ):
        super().__init__(where, actual, expected)
        self._rerun, self._values = rerun, values

    def hypotheses(self) -> Iterator[Iterable[Hypothesis]]:
        yield self._straight_through()
        yield self._of_code()
        yield hypotheses.of_outputs(self.where, self.actual, self.expected)

    def _straight_through(self) -> Iterator[Hypothesis]:
        """A ReLU behind a tap that lets the gradient pass where it is 0."""
        if (values := self._values) is not None and values.shape == self.actual.shape and (values < 0).any():
            words = "the ReLU behind it lets the gradient pass everywhere"
            yield Hypothesis("derivative", self.where, words, "its derivative", lambda: relative(self.actual * (values > 0), self.expected))

    def _of_code(self) -> Iterator[Hypothesis]:
        """Each place where the code has its own way back, where it stops gradients or replaces them; then all of one function."""
        functions: dict[str, list[str]] = {}

        def seen(function: str, place: str) -> bool:
            places = functions.setdefault(function, [])
            if place not in places:
                places.append(place)
            return False

        with _passing(seen):
            self._rerun()
        alone = [[place] for own in functions.values() for place in own]
        for places in [*alone, *(own for own in functions.values() if len(own) > 1)]:
            with _passing(lambda _, place, places=places: place in places) as lost:  # type: ignore[misc]
                passed = self._rerun()
            cause, said, undone = "missing term", f"{' and '.join(places)} cuts its path", "the gradient passing there"
            if places[0].startswith(CUSTOM):
                cause = "missing term" if any(lost) else "derivative"
                said = f"{places[0]} is not the derivative of what it is for" + f": {sum(lost)} elements are left out" * any(lost)
                undone = "TensorFlow's own derivative there"
            yield Hypothesis(cause, self.where, said, undone, functools.partial(relative, passed, self.expected))

    def without_cause(self) -> Finding | None:
        if self.actual.any() or not self.expected.any():
            return super().without_cause()
        said = "no gradient arrives: its path is cut"
        return Finding(self.where, said, "missing term", f"{self.where}: {said}", self.residual(), math.nan, self.floor)


STOP, CUSTOM = "tf.stop_gradient", "tf.custom_gradient"


@contextlib.contextmanager
def _passing(passes: Callable[[str, str], bool]) -> Iterator[list[int]]:
    """Inside, ``tf.stop_gradient`` lets gradients pass, and ``tf.custom_gradient`` leaves them to TensorFlow, where they are called from
    a function and place ("tf.stop_gradient in file:line") that ``passes`` says yes to. Yields of each custom gradient that was called how
    many elements it leaves out, 0 where it is the derivative not, if all others are right.
    """
    import tensorflow as tf

    stop, custom = tf.stop_gradient, tf.custom_gradient

    def called(what: str) -> tuple[str, str]:
        frame = inspect.currentframe()
        while frame and (frame.f_code.co_filename == __file__ or "/tensorflow/" in frame.f_code.co_filename):
            frame = frame.f_back
        if frame is None:
            return "", what
        file, function = Path(frame.f_code.co_filename).name, frame.f_code.co_name
        if file.startswith("__autograph"):  # what a loop made of it
            file = f"{function.removeprefix('tf__')}()"
        return f"{frame.f_code.co_filename}:{frame.f_code.co_firstlineno}", f"{what} in {file}:{frame.f_lineno}"

    @tf.autograph.experimental.do_not_convert
    def stopped(tensor: Any, name: str | None = None) -> Any:
        return tf.identity(tensor) if passes(*called(STOP)) else stop(tensor, name)

    def customised(function: Callable[..., Any]) -> Callable[..., Any]:
        if not passes(*called(CUSTOM)):
            return custom(function)

        @custom
        def derived(*arguments: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(arguments)
                outputs, backward = function(*arguments)

            def derivative(*upstream: Any) -> Any:
                arriving = upstream if isinstance(outputs, list | tuple) else upstream[0]
                found = tape.gradient(outputs, arguments, output_gradients=arriving)
                found = [right if right is None else tf.convert_to_tensor(right) for right in found]  # that of a look-up is sparse
                for own, right in zip(tf.nest.flatten(backward(*upstream)), found, strict=True):
                    if own is not None and right is not None:
                        own, right = own.numpy(), right.numpy()
                        others_right = relative(own, np.where(own == 0, 0, right)) <= FLOOR
                        lost.append(int(np.count_nonzero((own == 0) & (right != 0))) if others_right else 0)
                return found

            return outputs, derivative

        return derived

    lost: list[int] = []
    with mock.patch.object(tf, "stop_gradient", stopped), mock.patch.object(tf, "custom_gradient", customised):
        yield lost


def _of_other_taps(site: TapSite) -> ResultSite | None:
    """What a module gives, if it is what it gives at another place: all that fails together."""
    level = site.levels[0]
    outputs = {name: pair for name, pair in level.tensors.items() if name.startswith(f"{site.tap.partition('[')[0]}[")}
    failing = [name for name in level.failing if name in outputs]
    if not failing or failing != level.failing:
        return None
    source = {
        name: next((other for other, (_, official) in outputs.items() if relative(outputs[name][0], official) <= site.floor), "")
        for name in failing
    }
    if not all(source.values()):
        return None
    said = ", ".join(f"{name.partition('#')[2]} is {source[name].partition('#')[2]}" for name in failing)
    actual, expected = (np.concatenate([outputs[name][which].ravel() for name in failing]) for which in (0, 1))
    official = np.concatenate([outputs[source[name]][1].ravel() for name in failing])
    return ResultSite(
        site.where,
        actual,
        expected,
        first=[Hypothesis("layer order", site.where, said, "the official ones of those", lambda: relative(actual, official))],
    )


def examine(
    model: MaskFormer,
    case: Case,
    failing: Sequence[tuple[str, str]],
    results: Any,
    *,
    padding: str = "official",
    pad_to: tuple[int, int] | None = None,
) -> Finding | None:
    """The diagnosis of a case: of its first failure that is not inherited.

    Args:
        model: float64, as it was checked.
        case: of the trace.
        failing: (group, name) of what failed in the check and is not known to be inherited, in the order of computation.
        results: what TensorFlow computed: those of a replay where the trace permits one, else of its own inputs.
        padding, pad_to: as of :func:`parity.replay.replay`.
    """
    of_case = Results(case, results, model.config)
    for group, name in failing:
        site: Site | None = None
        if (group, name) == ("taps", "images#0"):
            canvas = model.preprocess(*_padded(case)).numpy()
            site = canvas_site(case, np.moveaxis(canvas, -1, 1), model.config)
        elif group == "taps":
            if why_not(case):
                call: Call | None = call_of(model, case, name, padding=padding, pad_to=pad_to)
            else:
                call = replay(model, case, capture=[name], padding=padding, pad_to=pad_to).calls.get(name)
            if call is not None:
                taps = TapSite(call, model, None if why_not(case) else case)
                found = diagnose(taps)
                exchanged = None if found and found.cause else _of_other_taps(taps)
                return found if exchanged is None else diagnose(exchanged)
        elif group in ("gradients", "tap_gradients"):
            site = _gradient_site(model, case, group, name)
        elif group in ("preprocessing", "metrics"):
            from parity.diagnose_ends import site_of

            site = site_of(case, model.config, group, name)
        elif (group, name) == ("matcher", "probe/not a number"):
            site = probe_site()
        elif name in results.groups.get(group, ()):
            site = of_case.site(group, name)
        if site is not None:
            return diagnose(site)
    return None


def _gradient_site(model: MaskFormer, case: Case, group: str, name: str) -> ResultSite:
    record = case.reference[group, name]
    inputs = case_inputs(case, model.compute_dtype, every_assignment=True)

    def rerun() -> np.ndarray:
        [results] = run(model, [inputs], mode="eager", gradients="all" if group == "tap_gradients" else "parameters")
        if name not in results.groups[group]:  # nothing that is computed of it has a gradient
            return np.zeros_like(expected)
        return np.asarray(record.select(np.ascontiguousarray(results.official(group, name))))

    expected = case.reference.read(group, name)
    values = None
    if group == "tap_gradients" and record.samples is None and ("taps", name) in case.reference.records and not why_not(case):
        values = case.reference.read("taps", name)
    return GradientSite(name, rerun(), expected, rerun, values)


def _padded(case: Case) -> tuple[Any, Any]:
    """The batch of images, and their sizes."""
    sizes = np.array([image.shape[:2] for image in case.images], np.int32)
    return padded_images(case.images, sizes.max(0)), sizes
