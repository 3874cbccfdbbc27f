"""Forced replay: every module of the TensorFlow model computes from what PyTorch recorded, so that its error is its own.

One eager forward pass in which each tap is compared with the recorded tensor and then replaced by it. What a tap is off by then is its
*local* error: it arises in that module, or in what is computed between the recorded taps and it, and is inherited from none.

It needs a trace whose float64 file holds the taps whole (:func:`replayable`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from parity.tap_rules import TapRuleError, View, layout_of, official_layout, tensorflow_layout
from parity.tensorflow_run import padded_images
from parity.trace import POSITION_EMBEDDING, Case, relative_error

if TYPE_CHECKING:
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import Module, Substitute


class ReplayError(ValueError):
    """The trace does not hold what a replay needs; the message says what, and the next step."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a replay found.

    Attributes:
        errors: tap → local relative L2 error of the whole tensor (inf: another shape, or not finite), in the order of computation.
        calls: for the captured taps.
    """

    errors: dict[str, float]
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
    _calls: collections.Counter[str] = dataclasses.field(repr=False)

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """Its taps, and those of all calls inside it → recorded tensors, official layout."""
        return {name: self._recorded.read(name) for name in self._taps}

    def rerun(self) -> dict[str, np.ndarray]:
        """The same taps as they are computed now, each from recorded tensors; official layout. Those that are not are left out."""
        found: dict[str, np.ndarray] = {}
        self._run(lambda name, actual, expected: found.update({name: actual}))
        return found

    def residual(self) -> float:
        """The largest relative error of :meth:`rerun`; inf where a tap is missing.

        That of a position embedding, which is float32 in every dtype, counts only where the call is its own.
        """
        errors = dict.fromkeys(self._taps, math.inf)
        self._run(lambda name, actual, expected: errors.update({name: self._recorded.error(name, actual, expected)}))
        exact = [error for name, error in errors.items() if not name.partition("#")[0].endswith(POSITION_EMBEDDING)]
        return max(exact or errors.values())

    def _run(self, see: See) -> None:
        from tfmaskformer.module import record_taps

        with record_taps(self._recorded.forced(see)) as taps:
            taps.calls.update(self._calls)
            self.module(*self.args, **self.kwargs)


See = Callable[[str, np.ndarray, np.ndarray], None]
"""Is shown a tap, what was computed and what was recorded; official layout."""


class _Recorded:
    """The taps of a case as PyTorch recorded them, of which one at a time is in memory."""

    def __init__(self, case: Case, view: View | None):
        self._case = case
        self._view = view

    def read(self, name: str) -> np.ndarray:
        """One of them, official layout."""
        return self._case.reference.read("taps", name)

    def error(self, name: str, actual: np.ndarray, expected: np.ndarray) -> float:
        """Relative L2 error; where ``expected`` is zero everywhere, on the scale of the official float32's rounding, as in a check."""
        if actual.shape != expected.shape or not np.isfinite(actual).all():
            return math.inf
        rounding = self._case.baseline["taps", name].statistics.l2
        if rounding and not expected.any():
            return float(np.linalg.norm(actual)) / rounding
        return relative_error(actual, expected)

    def forced(self, see: See) -> Substitute:
        """Shows every recorded tap to ``see``, then puts what was recorded in its place."""
        import tensorflow as tf

        def substitute(name: str, tensor: tf.Tensor) -> tf.Tensor:
            if ("taps", name) not in self._case.reference.records:
                return tensor
            own, expected, layout = tensor.numpy(), self.read(name), layout_of("taps", name)
            try:
                forced = tf.constant(tensorflow_layout(expected, layout, own, self._view))
            except TapRuleError:  # another shape: there is no place for what was recorded
                see(name, own[np.newaxis], expected)
                return tensor
            see(name, official_layout(own, layout, self._view), expected)
            return forced

        return substitute


def replayable(case: Case) -> bool:
    """Whether the trace has every tap of the case whole."""
    return all(record.samples is None for record in case.reference.group("taps").values())


def replay(
    model: MaskFormer, case: Case, *, capture: Collection[str] = (), padding: str = "official", pad_to: tuple[int, int] | None = None
) -> Replay:
    """Runs the model, with every tap replaced by what was recorded.

    Args:
        model: float64, in which a fault stands out from rounding; float32 works as well.
        case: of a whole trace.
        capture: taps whose calls are kept, to be done again.
        padding, pad_to: as of :func:`parity.tensorflow_run.run`; masked padding takes cases of one image.

    Raises:
        ReplayError: the trace has samples of the taps only.
    """
    if not replayable(case):
        raise ReplayError(f"case {case.name} has samples of its taps only; a replay needs them whole: record the trace without --samples")
    images = case.images
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    divisor = max(model.config.size_divisibility, 1)
    canvas, valid = (-(-np.array(size) // divisor) * divisor for size in (pad_to or sizes.max(0), sizes[0]))
    view = View(0, tuple(canvas.tolist()), tuple(valid.tolist())) if padding == "masked" else None
    batch = padded_images(images, pad_to or sizes.max(0))
    return _replay(functools.partial(model, batch, sizes, padding=padding), _Recorded(case, view), capture)


@dataclasses.dataclass
class _Frame:
    """A module call that is under way: its arguments, how often each module had been called, and which taps were inside it."""

    module: Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: collections.Counter[str]
    first_tap: int
    taps: tuple[str, ...] = ()


def _replay(run: Callable[[], Any], recorded: _Recorded, capture: Collection[str]) -> Replay:
    from tfmaskformer.layers import Conv2d
    from tfmaskformer.module import Module, record_taps

    errors: dict[str, float] = {}
    stack: list[_Frame] = []
    stacks: dict[str, list[_Frame]] = {}
    called = Module.__call__

    def see(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        errors[name] = recorded.error(name, actual, expected)
        if name in capture and stack:
            in_convolution = len(stack) > 1 and isinstance(stack[-2].module, Conv2d)
            stacks[name] = stack[:-1] if in_convolution else stack[:]

    def call(module: Module, *args: Any, **kwargs: Any) -> Any:
        frame = _Frame(module, args, kwargs, taps.calls.copy(), len(errors))
        stack.append(frame)
        outputs = called(module, *args, **kwargs)
        stack.pop()
        frame.taps = tuple(errors)[frame.first_tap :]
        taps.clear()  # they have been seen
        return outputs

    with record_taps(recorded.forced(see)) as taps, mock.patch.object(Module, "__call__", call):
        run()
    calls: dict[str, Call] = {}
    for name, frames in stacks.items():
        one: Call | None = None
        for frame in frames:
            one = Call(name, frame.module, frame.args, frame.kwargs, one, recorded, frame.taps, frame.calls)
        if one is not None:
            calls[name] = one
    return Replay(errors, calls)
