"""Why a training step differs: rates, decay, clipping and the optimizer's update of the first step, tried against the official form.

What enters the update is TensorFlow's own: up to the first quantity that differs it is right. All parameters are judged together, so a
choice must explain each of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity import formulas_results as formulas
from parity.diagnose import Finding, diagnose, relative
from parity.diagnose_results import ResultSite
from parity.formulas import Choice
from parity.hypotheses import Hypothesis

if TYPE_CHECKING:
    from parity.trace import Case
    from parity.trajectory import Found

GROUP_CHOICES = (
    Choice("decay_of", ("the recipe's", "weights: all", "none"), "weight decay", "decay of all parameters"),
    Choice("rate_of", ("the recipe's", "the largest: all", "the smallest: all"), "learning rate", "learning rate of all parameters"),
)


STEP_FLOOR = 1e-11
"""Relative L2 error that a hypothesis may leave: :data:`parity.trajectory.FLOAT64_TOLERANCE`."""


class ClipSite(ResultSite):
    """Clipped gradients of all parameters.

    Args:
        of_each: of every parameter, what TensorFlow made and what was recorded.
    """

    def __init__(
        self,
        of_each: Sequence[tuple[np.ndarray, np.ndarray]],
        formula: Callable[..., np.ndarray],
        choices: Sequence[Choice],
    ):
        actual, expected = (np.concatenate(arrays) for arrays in zip(*of_each, strict=True))
        super().__init__("steps/clipped", actual, expected, formula, choices, STEP_FLOOR)
        self._of_each = of_each

    def hypotheses(self) -> Iterator[Iterable[Hypothesis]]:
        *groups, of_outputs = super().hypotheses()
        yield from groups
        words = "each parameter's gradient is multiplied by a factor of its own, as if clipped apart"
        yield [Hypothesis("clip", self.where, words, "one factor for all", self._without_own_factors)]
        yield of_outputs

    def _without_own_factors(self) -> float:
        scaled = []
        for actual, expected in self._of_each:
            power = float(np.vdot(actual, actual))
            scaled.append(actual * (float(np.vdot(actual, expected)) / power if power else 1.0))
        return relative(np.concatenate(scaled), self.expected)


class RateSite(ResultSite):
    """Learning rates or decays, of all parameters."""

    def __init__(self, what: str, parts: Mapping[str, str], actual: np.ndarray, expected: np.ndarray):
        super().__init__(what, actual, expected, floor=1e-12)
        self._parts = np.array(list(parts.values()))
        self._cause = "learning rate" if what.endswith("lr") else "weight decay"

    def hypotheses(self) -> Iterator[Iterable[Hypothesis]]:
        yield self._by_part()

    def _by_part(self) -> Iterator[Hypothesis]:
        """Parameters that the recipe treats alike have one value on either side."""
        said, mended = [], self.actual.copy()
        for part in dict.fromkeys(self._parts.tolist()):
            own = self._parts == part
            pairs = {(float(actual), float(expected)) for actual, expected in zip(self.actual[own], self.expected[own], strict=True)}
            wrong = [pair for pair in sorted(pairs) if not math.isclose(*pair, rel_tol=1e-12)]
            if wrong:
                actual, expected = wrong[0]
                said.append(f"of {part} it is {actual:g} instead of {expected:g}")
                mended[own] = np.where(self.actual[own] == actual, expected, self.actual[own])
        yield Hypothesis(self._cause, self.where, "; ".join(said), "the official", lambda: relative(mended, self.expected))


def examine_training(checkpoint: str | Path, case: Case) -> Finding | None:
    """The diagnosis of the first step of a recorded training, in float64; arguments as of :func:`parity.trajectory.steps_of`."""
    from converters.tables.maskformer import transforms
    from parity.trajectory import steps_of
    from tfmaskformer.checkpoint import load
    from tfmaskformer.module import named_variables

    model = load(str(checkpoint), "float64")
    layouts, variables = transforms(model.config, case.reference.facts["parts"]), named_variables(model)
    weights = {name: layout.invert(variables[name].numpy()) for name, layout in layouts.items()}
    step = next(steps_of(checkpoint, case, "float64", steps=1, mode="eager"))
    return examine_step(case, {key: array for found in step for key, array in found.items()}, weights)


def examine_step(case: Case, found: Found, weights: Mapping[str, np.ndarray]) -> Finding | None:
    """The diagnosis of a first step.

    Args:
        case: of :func:`parity.trajectory.open_training`.
        found: what TensorFlow made of the step.
        weights: by parameter, before the step; official layout.
    """
    for site in _sites(case, found, weights):
        if (finding := diagnose(site)) is not None:
            return finding
    return None


def _sites(case: Case, found: Found, weights: Mapping[str, np.ndarray]) -> Iterator[ResultSite]:
    facts, reference = case.reference.facts, case.reference
    parts, recipe = facts["parts"], facts["recipe"]
    rates = {}
    for what, name in (("decay", "decay"), ("lr", "1/lr")):
        rates[what] = reference.read("scalars", name)
        yield RateSite(f"steps/{what}", parts, np.asarray(found["scalars", name]), rates[what])

    def selected(quantity: str, tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        records = [reference["steps", f"1/{quantity}.each/{name}"] for name in parts]
        return [np.ravel(record.select(np.ascontiguousarray(tensors[name]))) for record, name in zip(records, parts, strict=True)]

    def recorded(quantity: str) -> list[np.ndarray]:
        return [np.ravel(reference.read("steps", f"1/{quantity}.each/{name}")) for name in parts]

    def each(quantity: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate(selected(quantity, tensors))

    def own(quantity: str) -> dict[str, np.ndarray]:
        return {name: np.asarray(found["steps", f"1/{quantity}.each/{name}"], np.float64) for name in parts}

    def site(quantity: str, formula: Callable[..., np.ndarray], choices: Sequence[Choice]) -> ResultSite:
        return ResultSite(
            f"steps/{quantity}", each(quantity, own(quantity)), np.concatenate(recorded(quantity)), formula, choices, STEP_FLOOR
        )

    norm = float(np.asarray(found["scalars", "1/gradient_norm"]))
    pairs = list(zip(selected("clipped", own("clipped")), recorded("clipped"), strict=True))
    largest = _clip_of(recipe)
    # What enters: the recorded gradients, before they were multiplied by what is known from the norm.
    before = np.concatenate([expected for _, expected in pairs]) / float(formulas.clipped(np.ones(()), norm, largest))
    yield ClipSite(pairs, functools.partial(formulas.clipped, before, norm, largest), formulas.CLIP_CHOICES)
    quantities = [
        quantity for quantity in ("exp_avg", "exp_avg_sq", "weights") if ("steps", f"1/{quantity}.each/{next(iter(parts))}") in found
    ]
    if "exp_avg" not in quantities:
        return
    gradients, steps = own("clipped"), zip(parts, rates["lr"], rates["decay"], strict=True)
    of_each = [(name, float(lr), float(decay)) for name, lr, decay in steps]

    def updated(quantity: str, decay_of: str = "the recipe's", rate_of: str = "the recipe's", **choices: Any) -> np.ndarray:
        decays, lrs = [decay for *_, decay in of_each], [lr for _, lr, _ in of_each]
        tensors = {}
        for name, lr, decay in of_each:
            decay = {"weights: all": max(decays), "none": 0.0}.get(decay_of, decay)
            lr = {"the largest: all": max(lrs), "the smallest: all": min(lrs)}.get(rate_of, lr)
            nothing = np.zeros_like(gradients[name])
            made = formulas.adamw(weights[name], gradients[name], (nothing, nothing), 1, lr, decay, **choices)
            tensors[name] = made["moved" if quantity == "weights" else quantity]
        return each(quantity, tensors)

    for quantity in quantities:
        yield site(quantity, functools.partial(updated, quantity), (*GROUP_CHOICES, *formulas.STEP_CHOICES))


def _clip_of(recipe: Mapping[str, Any]) -> float:
    clip = recipe.get("CLIP_GRADIENTS", {})
    return float(clip.get("CLIP_VALUE", 0.0)) if clip.get("ENABLED") else 0.0
