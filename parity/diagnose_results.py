"""Why costs, losses, results, gradients, the canvas or an optimizer step differ, though what they are computed of is as recorded.

Sites for :func:`parity.diagnose.diagnose`, and :func:`examine`, which picks the one of a case.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from parity.tensorflow_run import padded_images, run
from parity.trace import Case

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
    """

    def __init__(
        self,
        where: str,
        actual: np.ndarray,
        expected: np.ndarray,
        formula: Callable[..., np.ndarray] | None = None,
        choices: Sequence[Choice] = (),
        floor: float = FLOOR,
    ):
        self.where, self.floor = where, floor
        self.actual, self.expected = np.asarray(actual), np.asarray(expected)
        self._formula, self._choices = formula, choices

    def residual(self) -> float:
        return relative(self.actual, self.expected)

    @functools.cached_property
    def _official(self) -> np.ndarray | None:
        """What the formula gives with the official choices."""
        try:
            return None if self._formula is None else np.asarray(self._formula())
        except UnsupportedError:
            return None

    def hypotheses(self) -> Iterator[Iterable[Hypothesis]]:
        official = self._official
        if official is not None and relative(official, self.expected) <= self.floor:
            yield self._tried(self.actual, lambda choice, value: f"{choice.words} {told(value)} instead of {told(choice.values[0])}", 1)
        elif official is not None and relative(official, self.actual) <= self.floor:
            yield self._tried(self.expected, lambda choice, value: f"PyTorch computed with {choice.words} {told(value)}", 0)
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
        if not np.issubdtype(self.actual.dtype, np.floating) or np.isfinite(self.actual).all() or not np.isfinite(self.expected).all():
            return None
        words = f"{np.count_nonzero(~np.isfinite(self.actual))} elements are not finite"
        return Finding(self.where, words, "not finite", f"{self.where}: {words}", math.inf, math.nan, self.floor)

    def without_cause(self) -> Finding | None:
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

    def _output(self, layer: int, name: str) -> np.ndarray:
        """``layer`` counts from 0, the final one, cyclically. Where the trace has samples, TensorFlow's own, which is right then."""
        layers = self._layers()
        name = layers[layer % len(layers)] + name
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
        layer, image = 0 if place == "final" else int(place) + 1, int(image_text)
        where = f"matcher/{what}"
        actual, expected = self.actual("matcher", name), self.expected("matcher", name)
        labels, weights = self._targets[image]["labels"], self._config.criterion

        def cost(function: Callable[..., np.ndarray], output: str, *rest: Any) -> Callable[..., np.ndarray]:
            return lambda layer_off=0, **choices: function(
                self._output(layer + choices.pop("layer", layer_off), output)[image], *rest, **choices
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
        term = name.rstrip("0123456789").rstrip("_")
        recorded = list(self._case.reference.group("losses"))
        if term == "total":
            return self._total(recorded)
        names = [other for other in recorded if other.rstrip("0123456789").rstrip("_") == term]
        layers = [0 if other == term else int(other.rpartition("_")[2]) + 1 for other in names]
        actual = np.array([float(self.actual("losses", other)) for other in names])
        expected = np.array([float(self.expected("losses", other)) for other in names])
        images = range(len(self._images))

        def each(loss: Callable[..., float]) -> Callable[..., np.ndarray]:
            return lambda layer=0, **choices: np.array([loss(own, layer, **choices) for own in layers])

        def of_classes(layer: int, off: int, **choices: Any) -> float:
            labels = [target["labels"] for target in self._targets]
            weight = self._config.criterion.no_object_weight
            return formulas.class_loss(
                self._output(layer + off, "pred_logits"), labels, self._assignments(layer), official_weight=weight, **choices
            )

        def of_masks(function: Callable[..., float]) -> Callable[..., float]:
            return lambda layer, off, **choices: function(
                self._output(layer + off, "pred_masks"), [self._masks(image) for image in images], self._assignments(layer), **choices
            )

        def of_pixels(layer: int, off: int, **choices: Any) -> float:
            labels = [target["sem_seg"] for target in self._targets]
            ignore = self._config.criterion.ignore_value
            return self._config.criterion.loss_weight * formulas.pixel_loss(self._output(layer + off, "sem_seg"), labels, ignore, **choices)

        functions: dict[str, tuple[Callable[..., float], Sequence[Choice]]] = {
            "loss_ce": (of_classes, formulas.CLASS_LOSS_CHOICES),
            "loss_mask": (of_masks(formulas.mask_loss), formulas.MASK_LOSS_CHOICES),
            "loss_dice": (of_masks(formulas.dice_loss), formulas.DICE_LOSS_CHOICES),
            "loss_sem_seg": (of_pixels, formulas.PIXEL_LOSS_CHOICES),
        }
        if term not in functions:
            return ResultSite(name, actual, expected)
        function, choices = functions[term]
        return ResultSite(term, actual, expected, each(function), choices)

    def _total(self, recorded: Sequence[str]) -> ResultSite:
        terms = {name: float(self.expected("losses", name)) for name in recorded if name != "total"}
        weights = self._config.criterion
        official = {
            "loss_ce": weights.class_weight,
            "loss_mask": weights.mask_weight,
            "loss_dice": weights.dice_weight,
            "loss_sem_seg": 1.0,
        }

        def total(weights: Mapping[str, float] | None = None, layers: str = "all") -> np.ndarray:
            found = 0.0
            for name, loss in terms.items():
                term = name.rstrip("0123456789").rstrip("_")
                if (layers == "the last alone" and name != term) or (layers == "all but the last" and name == term):
                    continue
                found += (weights or official).get(term, 1.0) * loss
            return np.array([found / (len(terms) / 3 if layers == "mean of all" else 1)])

        numbers = (0.5, 1.0, 2.0, 5.0, 20.0)
        others = tuple({"loss_ce": ce, "loss_mask": mask, "loss_dice": dice} for ce in numbers for mask in numbers for dice in numbers)
        choices = (
            Choice("weights", (official, *others), "scale", "weights"),
            Choice("layers", ("all", "the last alone", "all but the last", "mean of all"), "missing term", "decoder layers"),
        )
        actual, expected = (np.array([float(read("losses", "total"))]) for read in (self.actual, self.expected))
        return ResultSite("total", actual, expected, total, choices)

    # Results

    def _inference(self, name: str) -> ResultSite | None:
        image_text, *resized, what = name.split("/")
        image = int(image_text)
        _, *output = self._case.reference["inference", f"{image}/{'/'.join([*resized, 'sem_seg'])}"].shape
        test = self._config.test
        per_pixel = ("outputs", "sem_seg") in self._case.reference.records
        masks = self._output(0, "sem_seg" if per_pixel else "pred_masks")[image]
        logits = None if per_pixel else self._output(0, "pred_logits")[image]
        canvas = (4 * masks.shape[1], 4 * masks.shape[2]) if per_pixel else self.canvas
        height, width = self._images[image].shape[:2]
        sizes = {"canvas": canvas, "image": (height, width), "output": (output[0], output[1])}
        actual, expected = self.actual("inference", name), self.expected("inference", name)
        where = f"inference/{what}"
        if what == "sem_seg":
            after = not self._config.postprocess_before_inference
            record = self._case.reference["inference", name]

            def scores(**choices: Any) -> np.ndarray:
                found = formulas.semantic(logits, masks, sizes, after, **choices)
                return record.select(np.ascontiguousarray(found)) if found.shape == record.shape else found

            return ResultSite(where, record.select(actual), expected, scores, formulas.SEMANTIC_CHOICES)
        thresholds = (test.object_mask_threshold, test.overlap_threshold)
        part = 0 if what == "panoptic_seg" else 1

        def result(**choices: Any) -> np.ndarray:
            assert logits is not None
            return formulas.panoptic(logits, masks, sizes, thresholds, self._config.thing_classes, **choices)[part]

        # A pixel that two masks claim alike may go to either.
        return ResultSite(where, actual, expected, result, formulas.PANOPTIC_CHOICES, floor=1e-3)


def _weighted(parts: Sequence[np.ndarray], official: Sequence[float], weights: Sequence[float] | None = None) -> np.ndarray:
    return sum((weight * part for weight, part in zip(weights or official, parts, strict=True)), np.zeros_like(parts[0]))


def _weight_choices(parts: Sequence[np.ndarray], actual: np.ndarray) -> tuple[Choice, ...]:
    """The weights with which the parts come closest to the actual sum."""
    if actual.size < len(parts):
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
        "missing term",
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
    """

    def __init__(self, where: str, actual: np.ndarray, expected: np.ndarray, rerun: Callable[[], np.ndarray]):
        super().__init__(where, actual, expected)
        self._rerun = rerun

    def hypotheses(self) -> Iterator[Iterable[Hypothesis]]:
        yield self._cut()
        yield hypotheses.of_outputs(self.where, self.actual, self.expected)

    def _cut(self) -> Iterator[Hypothesis]:
        """Each place where the code stops gradients."""
        places: dict[str, None] = {}
        with _passing(lambda place: bool(places.setdefault(place))):
            self._rerun()
        for place in places:

            def after(place: str = place) -> float:
                with _passing(lambda other: other == place):
                    return relative(self._rerun(), self.expected)

            yield Hypothesis("missing term", self.where, f"tf.stop_gradient in {place} cuts its path", "the gradient passing there", after)

    def without_cause(self) -> Finding | None:
        if self.actual.any() or not self.expected.any():
            return None
        said = "no gradient arrives: its path is cut"
        return Finding(self.where, said, "missing term", f"{self.where}: {said}", self.residual(), math.nan, self.floor)


@contextlib.contextmanager
def _passing(passes: Callable[[str], bool]) -> Iterator[None]:
    """Inside, ``tf.stop_gradient`` lets gradients pass where it is called from a place ("file:line") that ``passes`` says yes to."""
    import tensorflow as tf

    stop = tf.stop_gradient

    def replaced(tensor: Any, name: str | None = None) -> Any:
        frame = inspect.currentframe()
        caller = frame.f_back if frame else None
        place = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}" if caller else ""
        return tf.identity(tensor) if passes(place) else stop(tensor, name)

    with mock.patch.object(tf, "stop_gradient", replaced):
        yield


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
            site = None if call is None else TapSite(call, model, None if why_not(case) else case)
        elif group in ("gradients", "tap_gradients"):
            site = _gradient_site(model, case, group, name)
        elif group in ("preprocessing", "metrics"):
            from parity.diagnose_ends import site_of

            site = site_of(case, model.config, group, name)
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
        return np.asarray(record.select(np.ascontiguousarray(results.official(group, name))))

    return GradientSite(name, rerun(), case.reference.read(group, name), rerun)


def _padded(case: Case) -> tuple[Any, Any]:
    """The batch of images, and their sizes."""
    sizes = np.array([image.shape[:2] for image in case.images], np.int32)
    return padded_images(case.images, sizes.max(0)), sizes
