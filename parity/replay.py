"""Forced replay: every module of the TensorFlow model computes from what PyTorch recorded, so that its error is its own.

One eager pass in which each tap is compared with the recorded tensor and then replaced by it. What a tap is off by then is its *local*
error: it arises in that module, or in what is computed between the recorded taps and it, and is inherited from none. Costs, losses and
inference are taken of the recorded outputs, losses under the recorded assignment. Backwards the same is done with the gradients of the
taps, if the trace has them, so the gradient of a parameter shows what its own module does.

It needs a trace whose float64 file holds the taps whole (:func:`why_not`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from parity import tap_rules
from parity.judge import case_inputs
from parity.ports import Port, inputs_of
from parity.tap_rules import Names, TapRuleError, View, official_layout, tensorflow_layout
from parity.tensorflow_run import CaseResults, run
from parity.trace import POSITION_EMBEDDING, Case, relative_error

if TYPE_CHECKING:
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import Module, Substitute


class ReplayError(ValueError):
    """The trace does not hold what a replay needs; the message says what, and the next step."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a replay found. Errors are relative L2 errors of whole tensors; inf: another shape, or not finite.

    Attributes:
        errors: tap → local error, in the order of computation.
        gradients: tap or parameter → local error of its gradient. Of a tap it arises in what takes that tap's output. Of a parameter that
            the trace has samples of, it is that of the samples.
        results: costs, assignments, losses, gradients and inference results, of recorded outputs; no taps.
        calls: for the captured taps.
    """

    errors: dict[str, float]
    gradients: dict[str, float]
    results: CaseResults
    calls: dict[str, Call]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module on recorded inputs, which can be done again.

    Attributes:
        tap: what it was captured for.
        module: what was called. Of a norm inside a convolution that is the convolution: the norm's input is not recorded.
        args, kwargs: TensorFlow's layout. What was computed from recorded taps outside of a module is as it was computed then.
        caller: the call inside which it was, if any.
    """

    tap: str
    module: Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    caller: Call | None
    _recorded: _Recorded = dataclasses.field(repr=False)
    _taps: tuple[str, ...] = dataclasses.field(repr=False)
    _calls: Mapping[str, int] = dataclasses.field(repr=False)

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """Its taps, and those of all calls inside it → recorded tensors, official layout."""
        return {name: self._recorded.read(name) for name in self._taps}

    def rerun(self) -> dict[str, np.ndarray]:
        """The same taps as they are computed now, each from recorded tensors; official layout. Those that are not are left out."""
        found: dict[str, np.ndarray] = {}
        self._run(self._recorded.forced(lambda name, actual, expected: found.update({name: actual})))
        return found

    def residual(self) -> float:
        """The largest relative error of :meth:`rerun`; inf where a tap is missing.

        That of a position embedding, which is float32 in every dtype, counts only where the call is its own.
        """
        errors = dict.fromkeys(self._taps, math.inf)

        def see(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
            errors[name] = self._recorded.error("taps", name, actual, expected)

        self._run(self._recorded.forced(see))
        exact = [error for name, error in errors.items() if not name.partition("#")[0].endswith(POSITION_EMBEDDING)]
        return max(exact or errors.values())

    def tensors(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The same taps as they are computed now and as recorded, both in TensorFlow's layout; of another shape: twice as computed."""
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        force = self._recorded.forced(lambda name, actual, expected: None)

        def substitute(name: str, tensor: Any) -> Any:
            forced = force(name, tensor)
            found[name] = tensor.numpy(), forced.numpy()
            return forced

        self._run(substitute)
        return found

    def _run(self, substitute: Substitute) -> None:
        from tfmaskformer.module import record_taps

        with record_taps(substitute) as taps:
            taps.calls.update(self._calls)
            self.module(*self.args, **self.kwargs)


See = Callable[[str, np.ndarray, np.ndarray], None]
"""Is shown a name, what was computed and what was recorded; official layout."""


class _Recorded:
    """The taps of a case and their gradients as PyTorch recorded them, of which one at a time is in memory.

    Args:
        case: of a whole trace.
        view: of masked padding, where in the batch its image is.
        names: of the model.
    """

    def __init__(self, case: Case, view: View | None, names: Names):
        self._case = case
        self._view = view
        self._layout_of = functools.partial(names.layout_of, "taps")
        # Where TensorFlow's one call stands for two official ones, only the second goes on.
        self._official = {partner: name for name, (partner, _) in names.partners.items()}

    def read(self, name: str) -> np.ndarray:
        """What was recorded of a tap of TensorFlow, official layout."""
        return self._case.reference.read("taps", self._recorded_name(name))

    def _recorded_name(self, name: str) -> str:
        return name if ("taps", name) in self._case.reference.records else self._official.get(name, name)

    def error(self, group: str, name: str, actual: np.ndarray, expected: np.ndarray) -> float:
        """Relative L2 error; where ``expected`` is zero everywhere, on the scale of the official float32's rounding, as in a check."""
        if actual.shape != expected.shape or not np.isfinite(actual).all():
            return math.inf
        rounding = self._case.baseline[group, self._recorded_name(name) if group == "taps" else name].statistics.l2
        if rounding and not expected.any():
            return float(np.linalg.norm(actual)) / rounding
        return relative_error(actual, expected)

    def forced(self, see: See, gradients: dict[str, float] | None = None) -> Substitute:
        """Shows every recorded tap to ``see``, then puts what was recorded in its place.

        Args:
            see: is shown each.
            gradients: receives the error of every recorded gradient on the way back, which goes on as recorded; None: there is none.
        """
        import tensorflow as tf

        names_of: dict[int, list[str]] = {}  # of what was put in place: what it is called besides where it is only passed on
        kept = []  # or its id could be another tensor's

        def substitute(name: str, tensor: tf.Tensor) -> tf.Tensor:
            if ("taps", self._recorded_name(name)) not in self._case.reference.records:
                return tensor
            own, expected, layout = tensor.numpy(), self.read(name), self._layout_of(name)
            try:
                forced = tensorflow_layout(expected, layout, own, self._view)
            except TapRuleError:  # another shape: there is no place for what was recorded
                see(name, own[np.newaxis], expected)
                return tensor
            see(name, official_layout(own, layout, self._view), expected)
            if gradients is None:
                return tf.constant(forced)
            if id(tensor) in names_of:
                names_of[id(tensor)].append(name)
                return tensor
            names = [name]
            kept.append(_backwards(tensor, forced, lambda gradient: self._forced_gradient(names, gradient, gradients)))
            names_of[id(kept[-1])] = names
            return kept[-1]

        return substitute

    def _forced_gradient(self, names: list[str], actual: np.ndarray, errors: dict[str, float]) -> np.ndarray:
        """The recorded gradient of a tensor that is known by several names."""
        forced = actual
        for name in reversed(names):
            official = self._official.get(name, name)
            if ("tap_gradients", official) not in self._case.reference.records:
                continue
            expected, layout = self._case.reference.read("tap_gradients", official), self._layout_of(name)
            errors[name] = self.error("tap_gradients", official, official_layout(actual, layout, self._view), expected)
            forced = tensorflow_layout(expected, layout, actual, self._view)
        return forced


def _backwards(tensor: Any, forced: np.ndarray, replace: Callable[[np.ndarray], np.ndarray]) -> Any:
    """``forced``, with whose gradient ``replace`` is called on its way back to ``tensor``."""
    import tensorflow as tf

    @tf.custom_gradient
    def go_on(_: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        return tf.constant(forced), lambda gradient: tf.constant(replace(gradient.numpy()))

    return go_on(tensor)


def why_not(case: Case) -> str:
    """Why a case cannot be replayed; "" where it can."""
    return "" if _is_whole(case, "taps") else "the trace has samples of the taps only; recorded without --samples it would have them whole"


def _is_whole(case: Case, group: str) -> bool:
    records = case.reference.group(group).values()
    return bool(records) and all(record.samples is None for record in records)


def replay(
    model: MaskFormer,
    case: Case,
    *,
    capture: Collection[str] = (),
    padding: str = "official",
    pad_to: tuple[int, int] | None = None,
    gradients: bool = False,
    memory_budget: int | None = None,
) -> Replay:
    """Runs the model, with every tap replaced by what was recorded.

    Args:
        model: float64, in which a fault stands out from rounding; float32 works as well.
        case: of a whole trace.
        capture: taps whose calls are kept, to be done again.
        padding, pad_to: as of :func:`parity.tensorflow_run.run`; masked padding takes cases of one image.
        gradients: whether to go backwards too, if the trace has the gradients of the taps, whole. All activations are in memory then.
        memory_budget: as of :func:`parity.tensorflow_run.run`: bounds what is kept of the inference results.

    Raises:
        ReplayError: the trace has samples of the taps only.
    """
    if reason := why_not(case):
        raise ReplayError(f"case {case.name} cannot be replayed: {reason}")
    inputs = case_inputs(case, model.compute_dtype, every_assignment=True)
    height, width = inputs.images[0].shape[:2]
    divisor = max(model.config.size_divisibility, 1)

    def rounded(size: tuple[int, int]) -> tuple[int, int]:
        return -(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor

    view = View(0, rounded(pad_to or (height, width)), rounded((height, width))) if padding == "masked" else None
    recorded = _Recorded(case, view, tap_rules.names(model.config))
    of_taps: dict[str, float] | None = {} if gradients and _is_whole(case, "tap_gradients") else None
    errors: dict[str, float] = {}
    captured = _Captured(set(capture), errors)

    def see(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        errors[name] = recorded.error("taps", name, actual, expected)
        captured.see(name)

    with captured.watching():
        [results] = run(
            model,
            [inputs],
            mode="eager",
            padding=padding,
            pad_to=pad_to,
            gradients="none" if of_taps is None else "parameters",
            memory_budget=memory_budget,
            substitute=recorded.forced(see, of_taps),
        )
    return Replay(errors, _with_parameters(of_taps, results, recorded, case), results, captured.calls(recorded))


def replay_port(port: Port, model: Any, case: Case, *, gradients: bool = False) -> Replay:
    """The same of another model, whose calls are not captured; see :func:`replay`."""
    if reason := why_not(case):
        raise ReplayError(f"case {case.name} cannot be replayed: {reason}")
    recorded = _Recorded(case, None, port.names)
    of_taps: dict[str, float] | None = {} if gradients and _is_whole(case, "tap_gradients") else None
    errors: dict[str, float] = {}

    def see(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        errors[name] = recorded.error("taps", name, actual, expected)

    how = "none" if of_taps is None else "parameters"
    results = port.run(model, inputs_of(case), "eager", gradients=how, substitute=recorded.forced(see, of_taps))
    return Replay(errors, _with_parameters(of_taps, results, recorded, case), results, {})


def _with_parameters(of_taps: dict[str, float] | None, results: CaseResults, recorded: _Recorded, case: Case) -> dict[str, float]:
    """The errors of the taps' gradients and, where those were forced, of the parameters'."""
    if of_taps is None:
        return {}
    found = dict(of_taps)
    for name, record in case.reference.group("gradients").items():
        if name in (own := results.groups.get("gradients", {})):
            actual = record.select(own[name]) if own[name].shape == record.shape else own[name]
            found[name] = recorded.error("gradients", name, actual, case.reference.read("gradients", name))
    return found


@dataclasses.dataclass
class _Frame:
    """A module call under way: its arguments, how often each module had been called, and which taps were inside it."""

    module: Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: Mapping[str, int]
    first_tap: int
    taps: tuple[str, ...] = ()


class _Captured:
    """Keeps the calls in which some taps were, and their callers.

    Args:
        taps: whose calls are kept.
        seen: taps that were seen so far, in order.
    """

    def __init__(self, taps: set[str], seen: Mapping[str, Any]):
        self._wanted = taps
        self._seen = seen
        self._stack: list[_Frame] = []
        self._stacks: dict[str, list[_Frame]] = {}
        self._calls: collections.Counter[str] = collections.Counter()

    def see(self, name: str) -> None:
        """A tap of the call that ends now."""
        from tfmaskformer.layers import Conv2d

        module, _, call = name.partition("#")
        self._calls[module] = int(call.partition("[")[0]) + 1
        if name in self._wanted and self._stack:
            in_convolution = len(self._stack) > 1 and isinstance(self._stack[-2].module, Conv2d)
            self._stacks[name] = self._stack[:-1] if in_convolution else self._stack[:]

    def watching(self) -> Any:
        """A context in which all calls of modules are seen, where some are wanted."""
        from tfmaskformer.module import Module

        called = Module.__call__

        def call(module: Module, *args: Any, **kwargs: Any) -> Any:
            frame = _Frame(module, args, kwargs, dict(self._calls), len(self._seen))
            self._stack.append(frame)
            outputs = called(module, *args, **kwargs)
            self._stack.pop()
            frame.taps = tuple(self._seen)[frame.first_tap :]
            return outputs

        return mock.patch.object(Module, "__call__", call)

    def calls(self, recorded: _Recorded) -> dict[str, Call]:
        """Those that were wanted."""
        found = {}
        for name, frames in self._stacks.items():
            call: Call | None = None
            for frame in frames:
                call = Call(name, frame.module, frame.args, frame.kwargs, call, recorded, frame.taps, frame.calls)
            if call is not None:
                found[name] = call
        return found
