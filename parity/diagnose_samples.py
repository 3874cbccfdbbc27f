"""Diagnosis on a trace that has samples of its taps only: of the first failure, before which everything is right.

There a replay is not possible, since recorded tensors are not whole. But up to the first tap that differs TensorFlow's own tensors are the
recorded ones, to rounding, and can stand for them; of that tap itself the recorded samples tell whether a hypothesis holds.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.judge import case_inputs
from parity.replay import Call, _Captured
from parity.tap_rules import layout_of, official_layout
from parity.tensorflow_run import run
from parity.trace import Case, Record

if TYPE_CHECKING:
    from tfmaskformer.model import MaskFormer


class _Own:
    """Stands for recorded taps: every tap as it was first computed, but for the one that is wrong, which goes through."""

    def __init__(self, case: Case, wrong: str):
        self._case, self.wrong = case, wrong
        self.tensors: dict[str, np.ndarray] = {}

    def forced(self, see: Any, gradients: Any = None) -> Any:
        import tensorflow as tf

        def substitute(name: str, tensor: Any) -> Any:
            own = self.tensors.setdefault(name, tensor.numpy())
            see(name, own, own)
            return tensor if name == self.wrong or own.shape != tensor.shape else tf.constant(own)

        return substitute


@dataclasses.dataclass(frozen=True)
class SampledCall(Call):
    """A call on TensorFlow's own tensors, of which one tap is compared with samples."""

    @property
    def record(self) -> Record:
        """Of the tap."""
        return self._recorded._case.reference["taps", self.tap]

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """The samples of the tap."""
        return {self.tap: self._recorded._case.reference.read("taps", self.tap)}

    def select(self, value: np.ndarray) -> np.ndarray:
        """The samples of the tap's tensor, given in TensorFlow's layout."""
        return self.record.select(np.ascontiguousarray(official_layout(value, layout_of("taps", self.tap))))


def call_of(model: MaskFormer, case: Case, tap: str, *, padding: str, pad_to: tuple[int, int] | None) -> SampledCall | None:
    """The call in which a tap is, and its callers; None where no module makes the tap. Only for official padding."""
    if padding != "official":
        return None
    own = _Own(case, tap)
    captured = _Captured({tap}, own.tensors)

    def see(name: str, *_: Any) -> None:
        captured.see(name)

    with captured.watching():
        run(
            model,
            [case_inputs(case, model.compute_dtype)],
            mode="eager",
            padding=padding,
            pad_to=pad_to,
            gradients="none",
            substitute=own.forced(see),
        )
    found = None
    for frame in captured._stacks.get(tap, ()):
        found = SampledCall(tap, frame.module, frame.args, frame.kwargs, found, own, frame.taps, frame.calls)  # type: ignore[arg-type]
    return found
