"""Faults for the harness's own proof: each breaks TensorFlow's side in one place, of the size that it has in real ports.

Those marked ``first`` are the oldest: they were written before there were hypotheses of what can be wrong, and stay as they were. The
others were written without a look at the hypotheses. :data:`HELD_OUT` came when the diagnosis was done, and counts for itself.

A fault is data: what it is called, on which test model and case it shows, what must be named, and from what it comes. ``parity-check
selftest`` (:mod:`parity.selftest`) applies them one at a time. Importing this package imports TensorFlow.
"""

from __future__ import annotations

from parity.faults import (
    gradients,
    held_out,
    layers,
    losses,
    matcher,
    metrics,
    optimizer,
    per_pixel,
    post_processing,
    preprocessing,
    swin,
    weights,
)
from parity.faults.fault import KINDS, Fault

FAULTS: tuple[Fault, ...] = (
    *weights.FAULTS,
    *layers.FAULTS,
    *swin.FAULTS,
    *preprocessing.FAULTS,
    *matcher.FAULTS,
    *losses.FAULTS,
    *gradients.FAULTS,
    *optimizer.FAULTS,
    *post_processing.FAULTS,
    *per_pixel.FAULTS,
    *metrics.FAULTS,
)

HELD_OUT: tuple[Fault, ...] = held_out.FAULTS

__all__ = ["FAULTS", "HELD_OUT", "KINDS", "Fault"]
