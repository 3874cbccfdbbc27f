"""Why something differs: hypotheses are tried at the place of the first local failure, and one is told only if it explains the failure.

A module is judged from both sides. Its formula (:mod:`parity.formulas`) with the official choices must give what PyTorch recorded, and with
the wrong one what TensorFlow computed; or a change of TensorFlow's own variables and attributes (:mod:`parity.hypotheses`) must bring the
residual down to the floor. Which of the two is tried is not guessed either: a module that gives what its formula says, with the weights
that it has, is coded right, so its weights are wrong or its inputs; the first caller whose formula gives the official result is where the
code is wrong.

With masked padding all this is done with the image alone, cut out of its canvas: there everything must be as if the image were the canvas.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import parity.formulas_model  # noqa: F401  registers its formulas
from parity import hypotheses
from parity.diagnose_samples import SampledCall
from parity.formulas import CHOICES, ON_CANVAS, ZEROS_AROUND, Choice, Reference, UnsupportedError
from parity.hypotheses import Hypothesis, Trial
from parity.tap_rules import MAP, MEMORY, Layout, TapRuleError, View, cropped, layout_of, official_layout
from parity.trace import POSITION_EMBEDDING, Case, TraceError, relative_error

if TYPE_CHECKING:
    from parity.replay import Call

FLOOR = 1e-9
"""Relative L2 error in float64 that a hypothesis may leave: :data:`parity.compare.FLOAT64_TOLERANCE`."""

POSITION_FLOOR = 1e-6
"""The same for position embeddings, which are float32 on both sides."""

LEAST_FALL = 30
"""A hypothesis must leave less than the residual divided by this; else noise that is near the floor could pass for a fault."""

FLOAT32_CONSTANT, FLOAT32_SHARE = 1e-7, 1e-4
"""What is left may be as much where it is less than this share of the residual: the wrong code may have rounded a constant of its own to
float32 (``tf.nn.gelu`` does, in its approximation)."""

SECONDS = 20.0
"""Of processor time for one site; then the search ends with what was found."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found at one place.

    Attributes:
        where: official name of the module, parameter, loss or step at fault.
        hypothesis: what is wrong; "" where no hypothesis explains the failure.
        cause: of :data:`parity.hypotheses.CAUSES`; "" where no hypothesis explains it.
        statement: the finding in a sentence, with its numbers.
        before, after: relative error without and with the hypothesis taken back; ``after`` is nan where there is none.
        floor: what ``after`` had to come down to.
        others: statements of further hypotheses that explain the failure as well.
    """

    where: str
    hypothesis: str
    cause: str
    statement: str
    before: float
    after: float
    floor: float
    others: tuple[str, ...] = ()


class Site(Protocol):
    """A failure that can be examined."""

    where: str
    floor: float

    def residual(self) -> float:
        """Relative error as it is."""

    def hypotheses(self) -> Iterator[Iterable[Hypothesis]]:
        """What to try, in groups: the search ends behind the first group in which something was found."""

    def not_finite(self) -> Finding | None:
        """NaN or ±inf, which need no hypothesis."""

    def without_cause(self) -> Finding | None:
        """What is to be said where no hypothesis holds."""


def diagnose(site: Site) -> Finding | None:
    """The simplest hypothesis that explains a failure, or what is known without one; None: nothing.

    Args:
        site: see :class:`TapSite` and :mod:`parity.diagnose_results`.
    """
    if (found := site.not_finite()) is not None:
        return found
    before, end = site.residual(), time.process_time() + SECONDS
    if not before > site.floor:
        return None
    enough = min(before / LEAST_FALL, max(site.floor, min(FLOAT32_CONSTANT, before * FLOAT32_SHARE)))
    for group in site.hypotheses():
        holding: list[Finding] = []
        for hypothesis in group:
            if time.process_time() > end:
                break
            after = _after(hypothesis)
            if after <= enough:
                holding.append(_finding(hypothesis, before, after, site.floor))
        if holding:
            first, *others = holding
            return dataclasses.replace(first, others=tuple(dict.fromkeys(other.statement for other in others)))
        if time.process_time() > end:
            break
    return site.without_cause()


def _after(hypothesis: Hypothesis) -> float:
    """What the hypothesis leaves; inf where it cannot be applied here."""
    from tensorflow.errors import InvalidArgumentError

    try:
        with np.errstate(all="ignore"):
            after = hypothesis.after()
    except (UnsupportedError, InvalidArgumentError, ValueError, IndexError, ZeroDivisionError):  # shapes that no longer fit
        return math.inf
    return after if math.isfinite(after) else math.inf


def _finding(hypothesis: Hypothesis, before: float, after: float, floor: float) -> Finding:
    words = hypothesis.words if isinstance(hypothesis.words, str) else hypothesis.words()
    if not hypothesis.undone:
        return Finding(hypothesis.where, words, hypothesis.cause, f"{hypothesis.where}: {words}", before, math.nan, floor)
    statement = f"{hypothesis.where}: {words}; with {hypothesis.undone} the residual falls from {before:.1e} to {after:.1e}"
    return Finding(hypothesis.where, words, hypothesis.cause, statement, before, after, floor)


class Level:
    """One call on the way from the failing tap outwards, and what its formula says.

    Args:
        call: of a replay.
        tap: the first failure, which is inside the call.
        floor: see :data:`FLOOR`.

    Attributes:
        view: of masked padding: where in its canvas the image is.
        tensors: tap → what was computed and what was recorded, of the image alone, in TensorFlow's layout.
        called: names of modules that have a tap.
        modules: what is judged here: the called module, and those on the way to the tap that have no call of their own in the replay.
        failing: taps of the call that differ, ``tap`` first.
        follows: whether TensorFlow computes what the formula says; None: there is no formula.
        official: whether the formula gives what PyTorch recorded; None: there is no formula.
    """

    def __init__(self, call: Call, tap: str, floor: float, inner: set[str]):
        self.call, self.tap, self.floor = call, tap, floor
        self.name = call.module.official_name
        self.view: View | None = getattr(call._recorded, "_view", None)
        self.modules = [call.module, *_on_the_way(call.module, tap, inner)]
        self._on_canvas = call.tensors()
        self.tensors = self._alone(self._on_canvas)
        self.called = {name.partition("#")[0] for name in self.tensors}
        self.failing = [name for name in self.tensors if self.off_record(name, self.tensors[name][0]) > floor_of(name)]
        self.failing.sort(key=lambda name: name != tap)
        if isinstance(call, SampledCall):
            self.failing = [tap]  # what comes behind it is not right by itself
        self.follows = self.official = None
        with contextlib.suppress(UnsupportedError):
            value = self.formula([tap]).computed.get(tap)
            self.follows = self.off_actual(tap, value) <= floor
            self.official = self.off_record(tap, value) <= floor

    @property
    def wrong_code(self) -> bool:
        """Whether something else is computed here than the formula says, which is right."""
        return self.official is True and self.follows is False

    def off_actual(self, tap: str, value: np.ndarray | None) -> float:
        """Relative error of ``value`` (TensorFlow's layout) against what TensorFlow computed."""
        return relative(value, self.tensors[tap][0])

    def off_record(self, tap: str, value: np.ndarray | None) -> float:
        """Relative error of ``value`` (TensorFlow's layout) against what PyTorch recorded."""
        if value is None:
            return math.inf
        return relative(self._shown(tap, value), self._recorded(tap), None if tap in self._unplaced else self.tensors[tap][0])

    @functools.cached_property
    def _unplaced(self) -> set[str]:
        """The tap, where what was recorded of it is samples, or has another shape: it cannot be laid out as TensorFlow's."""
        if isinstance(self.call, SampledCall):
            return {self.tap}
        own = official_layout(self.tensors[self.tap][0], layout_of("taps", self.tap))
        return {self.tap} if own.shape != self.call.expected[self.tap].shape else set()

    def _shown(self, tap: str, value: np.ndarray) -> np.ndarray:
        """Of ``value`` what there is a record of."""
        if tap not in self._unplaced:
            return value
        try:
            return self.call.select(value) if isinstance(self.call, SampledCall) else official_layout(value, layout_of("taps", tap))
        except (TapRuleError, TraceError, ValueError):
            return np.empty(0)

    def _recorded(self, tap: str) -> np.ndarray:
        return self.call.expected[tap] if tap in self._unplaced else self.tensors[tap][1]

    def _alone(self, tensors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Taps, of the image without its padding."""
        return {tap: (self._cut(tap, own), self._cut(tap, recorded)) for tap, (own, recorded) in tensors.items()}

    def _cut(self, tap: str, tensor: np.ndarray) -> np.ndarray:
        with contextlib.suppress(TapRuleError):  # it has another shape than it should have
            return tensor if self.view is None else cropped(tensor, layout_of("taps", tap), self.view)
        return tensor

    def arguments(self, alone: bool = True) -> tuple[list[Any], dict[str, Any]]:
        """What the module was called with; with masked padding of the image ``alone`` or of the canvas, without sizes and masks of keys."""
        args, kwargs = _numpy(self.call.args), _numpy(self.call.kwargs)
        return (args, kwargs) if self.view is None else (self._argument(args, alone), self._argument(kwargs, alone))

    def _argument(self, value: Any, alone: bool) -> Any:
        if isinstance(value, Mapping):
            return {name: self._argument(item, alone) for name, item in value.items()}
        if isinstance(value, list):
            return [self._argument(item, alone) for item in value]
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype.kind != "f":
            return None
        assert self.view is not None
        return cropped(value, self._layout(value.shape), self.view) if alone and value.ndim > 2 else value

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        """Of an argument: that of a tap of the same shape but for its channels, else the one that fits.

        Raises:
            UnsupportedError: there is none.
        """
        assert self.view is not None
        layouts = {tap: layout_of("taps", tap) for tap in self._on_canvas}
        for tap, layout in layouts.items():
            if self._on_canvas[tap][0].shape[:-1] == shape[:-1]:
                return layout
        if len(shape) == 3:
            positions = math.prod(-(-side // MEMORY.stride) for side in self.view.canvas_px)
            return MEMORY if shape[1] == positions else Layout("BQC", "QBC")
        if len(shape) == 4:
            return MAP
        for layout in layouts.values():
            if "Y" in layout.actual:
                return Layout("BYXAPO" if len(shape) == 6 else "BYXPC", "", layout.stride)
        raise UnsupportedError(f"nothing is known of the axes of an argument of shape {shape}")

    def formula(self, wanted: Sequence[str], where: str = "", choices: Mapping[str, Any] | None = None) -> Reference:
        """Runs the formula on recorded inputs, for some taps; in ``computed`` of what it returns they are of the image alone."""
        choices = dict(choices or {})
        canvas = choices.pop(ON_CANVAS.keyword, ON_CANVAS.values[0])
        alone = canvas == ON_CANVAS.values[0]
        recorded = {name: forced for name, (_, forced) in (self.tensors if alone else self._on_canvas).items()}
        reference = Reference(recorded, wanted, where, choices, self._zeros_around if canvas == ZEROS_AROUND else lambda grid: grid)
        try:
            args, kwargs = self.arguments(alone)
        except TapRuleError as error:
            raise UnsupportedError(str(error)) from None
        reference.tap(self.name, reference.run(self.call.module, *args, **kwargs))
        if not alone:
            reference.computed = {tap: self._cut(tap, value) for tap, value in reference.computed.items()}
        return reference

    def _zeros_around(self, grid: np.ndarray) -> np.ndarray:
        assert self.view is not None
        height, width = cropped(grid, MAP, self.view).shape[1:3]
        outside = np.ones(grid.shape[1:3], bool)
        outside[:height, :width] = False
        return np.where(outside[..., np.newaxis], 0.0, grid)

    @functools.cached_property
    def first_call(self) -> str:
        """What the call is called: ``<official name>#<call>``."""
        return next(tap for tap in self._on_canvas if tap.startswith(f"{self.name}#")).partition("[")[0]

    def of_masks(self) -> Iterator[Hypothesis]:
        """Which positions exist, the other way round."""
        for index, value in enumerate(self.call.args):
            if getattr(value, "dtype", None) == "bool":
                yield Hypothesis(
                    "mask polarity",
                    self.name,
                    f"argument {index}, which positions exist, is negated",
                    "the mask turned round",
                    functools.partial(self._off_with_arguments, [*self.call.args[:index], ~value, *self.call.args[index + 1 :]]),
                )

    def _off_with_arguments(self, args: Sequence[Any]) -> float:
        tensors = self._alone(dataclasses.replace(self.call, args=tuple(args)).tensors())
        return max(self.off_record(tap, tensors[tap][0]) for tap in self.failing)

    def of_code(self) -> Iterator[Hypothesis]:
        """The formula with something wrong in it, against what TensorFlow computed."""
        right = self.formula(self.failing).computed
        wanted = [tap for tap in self.failing if self.off_record(tap, right.get(tap)) <= floor_of(tap)]
        for where, kind, choice, value in self._choices():
            said = f"{choice.words} {told(value)} instead of {told(choice.values[0])}"
            yield Hypothesis(
                choice.cause_of(value),
                where,
                said,
                f"that in the formula of {kind}",
                functools.partial(self._off_with, wanted, self.off_actual, self._owner(where, choice), choice.keyword, value),
            )

    def of_settings(self) -> Iterator[Hypothesis]:
        """The formula with another number than the module has, against what PyTorch recorded."""
        ours = self.formula(self.failing).computed if self.follows else {}
        wanted = [tap for tap in self.failing if self.off_actual(tap, ours.get(tap)) <= floor_of(tap)]
        for where, kind, choice, value in self._choices(every=True) if wanted else ():
            yield Hypothesis(
                choice.cause_of(value),
                where,
                f"PyTorch computed with {choice.words} {told(value)}",
                f"that in the formula of {kind}",
                functools.partial(self._off_with, wanted, self.off_record, self._owner(where, choice), choice.keyword, value),
            )

    def _choices(self, every: bool = False) -> Iterator[tuple[str, str, Choice, Any]]:
        for module in self.modules:
            kind = type(module).__name__
            of_canvas = [choice for choice in CHOICES.get(kind, ()) if choice.keyword == ON_CANVAS.keyword]
            others = [choice for choice in CHOICES.get(kind, ()) if choice.keyword != ON_CANVAS.keyword]
            if self.view is None:
                of_canvas = []
            elif module is self.call.module:
                of_canvas = of_canvas or [ON_CANVAS]
            for choice in (*of_canvas, *others):  # with masked padding first what only that gets wrong
                where = ".".join(filter(None, (module.official_name, choice.within)))
                for value in choice.values if every else choice.values[1:]:
                    yield where, kind, choice, value

    def _off_with(
        self, wanted: Sequence[str], off: Callable[[str, np.ndarray | None], float], where: str, keyword: str, value: Any
    ) -> float:
        """How far the formula is off with one choice."""
        return self._worst(wanted, self.formula(wanted, where, {keyword: value}).computed, off)

    @staticmethod
    def _owner(where: str, choice: Choice) -> str:
        return where.removesuffix(f".{choice.within}") if choice.within else where

    @staticmethod
    def _worst(wanted: Sequence[str], computed: Mapping[str, np.ndarray], off: Callable[[str, np.ndarray | None], float]) -> float:
        return max((off(tap, computed.get(tap)) for tap in wanted), default=math.inf)

    def trial(self) -> Trial:
        """What this call gives, for hypotheses on its variables and attributes."""
        expected = {tap: self._recorded(tap) for tap in self.failing}

        def shown(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {tap: self._shown(tap, tensors[tap]) for tap in self.failing}

        def rerun() -> dict[str, np.ndarray]:
            return shown({tap: own for tap, (own, _) in self._alone(self.call.tensors()).items()})

        def confirm() -> float:
            found = rerun()
            return max(relative(found[tap], expected[tap]) for tap in self.failing)

        fast = self.follows and self._worst(self.failing, self.formula(self.failing).computed, self.off_actual) <= self.floor
        run = (lambda: shown(self.formula(self.failing).computed)) if fast else rerun
        return Trial(lambda: _flat(run(), self.failing), _flat(expected, self.failing), confirm, self.floor)


def _flat(tensors: Mapping[str, np.ndarray], names: Iterable[str]) -> np.ndarray:
    return np.concatenate([np.ravel(tensors[name]) for name in names])


def _on_the_way(module: Any, tap: str, inner: set[str]) -> Iterator[Any]:
    path = tap.partition("#")[0].removeprefix(module.official_name).strip(".")
    for name in path.split(".") if path else ():
        module = getattr(module, name)
        if module.official_name in inner:
            return
        yield module


def floor_of(tap: str) -> float:
    """What may be left of the error of a tap."""
    return POSITION_FLOOR if tap.partition("#")[0].endswith(POSITION_EMBEDDING) else FLOOR


def relative(value: np.ndarray | None, expected: np.ndarray, other: np.ndarray | None = None) -> float:
    """Relative L2 error; of whole numbers, the share that differs. inf: another shape, or not finite.

    ``other``: relative to the larger of it and ``expected``, so that of a tensor that should be zero the error is not infinite.
    """
    if value is None or value.shape != expected.shape or not np.isfinite(value).all():
        return math.inf
    if expected.dtype.kind in "iub":
        return float(np.mean(value != expected)) if expected.size else 0.0
    difference = float(np.linalg.norm(value - expected))
    scale = max((float(np.linalg.norm(each)) for each in (expected, other) if each is not None and np.isfinite(each).all()), default=0.0)
    return difference / scale if scale else difference


def _numpy(arguments: Any) -> Any:
    if isinstance(arguments, Mapping):
        return {name: _numpy(value) for name, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return [_numpy(value) for value in arguments]
    return arguments.numpy() if hasattr(arguments, "numpy") else arguments


def told(value: Any) -> str:
    """A value of a choice, for a sentence."""
    if value is None:
        return "as configured"
    return f"{value:g}" if isinstance(value, float) else f"'{value}'" if isinstance(value, str) else str(value)


class TapSite:
    """A tap that differs although everything before it is as recorded.

    Args:
        call: of a replay, captured for the tap; with its callers.
        root: the model, whose other variables may stand in the wrong place; None: these are not tried.
        case: of the trace, whose other taps may have been taken by mistake; None: these are not tried.
    """

    def __init__(self, call: Call, root: Any = None, case: Case | None = None):
        self.tap, self._root, self._case = call.tap, root, case
        self.floor = floor_of(self.tap)
        chain: list[Call] = [call]
        while chain[-1].caller is not None:
            chain.append(chain[-1].caller)
        names = [one.module.official_name for one in chain]
        self.levels = [Level(one, self.tap, self.floor, set(names[:index])) for index, one in enumerate(chain)]
        self.where = self._culprit.name if self._culprit else self.levels[0].name

    @property
    def _culprit(self) -> Level | None:
        """Where the code is wrong: the innermost call whose formula gives the official result, and TensorFlow does not."""
        return next((level for level in self.levels if level.wrong_code), None)

    def residual(self) -> float:
        level = self.levels[0]
        return level.off_record(self.tap, level.tensors[self.tap][0])

    def hypotheses(self) -> Iterator[Iterable[Hypothesis]]:
        own, forced = self.levels[0].tensors[self.tap]
        if (culprit := self._culprit) is not None:
            yield itertools.chain(*(level.of_masks() for level in self.levels[: self.levels.index(culprit) + 1]), culprit.of_code())
            yield self._of_attributes(culprit)
            yield self._of_arguments(culprit)
        else:
            yield self._exchanged()
            yield self._left_out()
            siblings = {}
            if self._root is not None:
                from tfmaskformer.module import named_variables

                siblings = named_variables(self._root)
            heads = next((heads for level in self.levels if (heads := getattr(level.call.module, "num_heads", None))), None)
            for level in self.levels:
                yield self._of_attributes(level)
                for module in level.modules:
                    if len(level.failing) <= MOST_TAPS:
                        yield hypotheses.of_variables(module, level.trial(), siblings, level.called, heads)
                yield level.of_settings()
        if not isinstance(self.levels[0].call, SampledCall):
            yield hypotheses.of_outputs(self.where, own, forced)

    @staticmethod
    def _of_attributes(level: Level) -> Iterator[Hypothesis]:
        for module in level.modules:
            yield from hypotheses.of_attributes(module, level.trial(), level.called)

    def _exchanged(self) -> Iterator[Hypothesis]:
        """A number that belongs to a module beside it, which fails too and has this one's."""
        inner, *outer = self.levels
        for sibling in vars(outer[0].call.module).values() if outer else ():
            if type(sibling) is not type(inner.call.module) or sibling is inner.call.module:
                continue
            if not any(tap.startswith((f"{sibling.official_name}.", f"{sibling.official_name}#")) for tap in outer[0].failing):
                continue
            for name, value in hypotheses.settings(inner.call.module):
                if (other := getattr(sibling, name)) != value:
                    yield Hypothesis(
                        "layer order",
                        inner.name,
                        f"{name} is {value!r} here and {other!r} in {sibling.official_name}",
                        "these exchanged",
                        functools.partial(self._off_exchanged, outer[0], sibling, name),
                    )

    def _off_exchanged(self, parent: Level, sibling: Any, name: str) -> float:
        module = self.levels[0].call.module
        ours, theirs = getattr(module, name), getattr(sibling, name)
        with hypotheses.attribute(module, name, theirs), hypotheses.attribute(sibling, name, ours):
            return parent.trial().confirm()

    def _left_out(self) -> Iterator[Hypothesis]:
        """A norm that PyTorch calls here, and TensorFlow nowhere."""
        level = self.levels[0]
        if self._case is None:
            return
        recorded = {tap.partition("#")[0] for tap in self._case.reference.group("taps")}
        for name in sorted(name for name in recorded - level.called if name.startswith(f"{level.name}.")):
            yield from hypotheses.of_missing_norm(name, *level.tensors[self.tap])

    def _of_arguments(self, culprit: Level) -> Iterator[Hypothesis]:
        """What is handed on in the culprit is not what its formula hands on: another tap, or the same in another form."""
        given = culprit.formula([self.tap]).given
        for level in reversed(self.levels[: self.levels.index(culprit)]):
            for ours, theirs in zip(level.arguments()[0], given.get(level.first_call, ()), strict=False):
                if not (isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray)) or relative(ours, theirs) <= self.floor:
                    continue
                for tap, record in self._case.reference.group("taps").items() if self._case is not None and ours.ndim > 2 else ():
                    if ours.size == record.size:
                        yield Hypothesis(
                            "layer order",
                            culprit.name,
                            f"{level.name} is given what {tap} gives",
                            f"that for what {culprit.name} should have given it",
                            functools.partial(self._off_tap, ours, tap),
                        )
                yield from hypotheses.of_outputs(culprit.name, ours, theirs, f"what it gives to {level.name}")

    def _off_tap(self, value: np.ndarray, tap: str) -> float:
        assert self._case is not None
        return relative_error(official_layout(value, layout_of("taps", tap)), self._case.reference.read("taps", tap))

    def not_finite(self) -> Finding | None:
        """NaN or ±inf in a variable, or in what comes out."""
        own = self.levels[0].tensors[self.tap][0]
        if np.isfinite(own).all():
            return None
        where, words = self.where, f"{np.count_nonzero(~np.isfinite(own))} elements of {self.tap} are not finite"
        for level in self.levels:
            for module in level.modules:
                for name, variable in hypotheses.own_variables(module, level.called).items():
                    if count := np.count_nonzero(~np.isfinite(variable.numpy())):
                        where, words = name.rpartition(".")[0], f"{count} elements of {name} are not finite"
        return Finding(where, words, "not finite", f"{where}: {words}", math.inf, math.nan, self.floor)

    def without_cause(self) -> Finding | None:
        before = self.residual()
        if (culprit := self._culprit) is not None:
            where = self._part(culprit)
            said = "of its inputs and weights its formula makes what PyTorch computed, and TensorFlow does not: its code is wrong"
        elif self.levels[0].follows:
            where = self.levels[0].name
            said = "its code does what its formula says with the weights that it has: these are wrong, or its inputs"
        else:
            return None
        return Finding(where, "", "", f"{where}: {said}; none of the hypotheses explains it", before, math.nan, self.floor)

    def _part(self, culprit: Level) -> str:
        """The culprit, or the part of it that is never called itself, where the failure is in that."""
        from tfmaskformer.module import Module, named_modules

        for module in culprit.modules[1:]:
            if type(module).call is Module.call and any(named_modules(module)):
                return module.official_name
        return culprit.name


MOST_TAPS = 40
"""Variables are tried where at most so many taps fail: a module that holds many others has none of its own."""
