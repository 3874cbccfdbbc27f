"""Ends a training that cannot become good any more, and says where it went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

FACTOR, WINDOW = 10, 20
"""A training has diverged when the median loss of its last WINDOW steps is FACTOR times the lowest that it ever was."""


class Observed(NamedTuple):
    """What a step gave: losses by official key with ``total_loss``, the parameters whose gradient is not finite, and its norm."""

    step: int
    losses: Mapping[str, float]
    bad_gradients: Sequence[str]
    gradient_norm: float


class DivergedError(RuntimeError):
    """The training ended where it went wrong; the message says in which step and which term."""


class Guard(tf.Module):
    """Looks at the losses and gradients of every step.

    Attributes:
        recent: float64 [WINDOW], total losses of the last steps, NaN for those before the first; part of the checkpoint.
        lowest: float64, the lowest that their median has been; the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recent = tf.Variable(np.full(WINDOW, np.nan), trainable=False)
        self.lowest = tf.Variable(np.inf, dtype=tf.float64, trainable=False)

    def check(self, window: Sequence[Observed]) -> None:
        """Looks at some steps in a row.

        Raises:
            DivergedError: a loss or gradient that is not finite, or a median loss of :data:`FACTOR` times the lowest one.
        """
        for observed in window:
            if problem := not_finite(observed):
                raise DivergedError(f"step {observed.step}: {problem}")
        recent = np.append(self.recent.numpy(), [observed.losses["total_loss"] for observed in window])[-WINDOW:]
        self.recent.assign(recent)
        if np.isnan(recent).any():
            return
        median, lowest = float(np.median(recent)), float(self.lowest.numpy())
        if median > FACTOR * lowest:
            medians = f"the median of the last {WINDOW} steps is {median:.4g}, and it was {lowest:.4g}"
            raise DivergedError(f"step {window[-1].step}: the loss diverged: {medians}")
        self.lowest.assign(min(median, lowest))


def not_finite(observed: Observed) -> str:
    """The first term of a step, in the order of computation, that is not finite; empty where all are."""
    terms = [key for key in sorted(observed.losses, key=_order) if key != "total_loss"]
    if bad := [key for key in terms if not np.isfinite(observed.losses[key])]:
        more = f", then {_listed(bad[1:])}" if bad[1:] else ""
        return f"{bad[0]} is {observed.losses[bad[0]]}{more}"
    if observed.bad_gradients:  # they are computed from the last parameter to the first
        *earlier, first = observed.bad_gradients
        more = f", then those of {_listed(earlier[::-1])}" if earlier else ""
        return f"all losses are finite, but the gradient of {first} is not{more}"
    total, norm = observed.losses["total_loss"], observed.gradient_norm
    if not np.isfinite([total, norm]).all():
        return f"total_loss is {total}, the gradient's norm {norm}, and all their terms here are finite"
    return ""


def _order(key: str) -> tuple[float, str]:
    """Decoder layers in their order; keys of the last have no number."""
    name, _, layer = key.rpartition("_")
    return (int(layer), name) if layer.isdecimal() else (np.inf, key)


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
