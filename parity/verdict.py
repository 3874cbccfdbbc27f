"""Noise or bug: what a check's failures are, in a word and a sentence.

Three runs are set against each other: TensorFlow in float32, the official float32 runs, whose largest error is the floor, and the official
float64 run, which both are measured against. A check matches only if the worst case *and* the median over all cases hold. What fails in
float32 is run again in float64: there a bug stays, and noise drops by orders of magnitude.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from parity import compare

if TYPE_CHECKING:
    from parity.check import Check
    from parity.judge import Item

MATCH, BUG, NOISE = "match", "bug", "noise"

NOISE_FACTOR = 10
"""Times its tolerance that a float32 error may be for noise. Official runs differ among themselves by up to 1.46 × in a tap and 1.9 × in a
loss, so 15 × the floor comes from no rounding: such an error, even if it is gone in float64, is a fault that only float32 has."""


class Verdict(NamedTuple):
    """What a check came to.

    Attributes:
        kind: "match", "bug" or "noise".
        reason: what it rests on, in a sentence.
    """

    kind: str
    reason: str


def tell(check: Check) -> Verdict:
    """The verdict on a check, which is about its failures only: noise fails a check as well."""
    if check.passed:
        return Verdict(MATCH, _distribution(check) or "every comparison holds in float64")
    exact = {(case.case, item.group, item.name): item for case in check.cases if case.dtype == "float64" for item in case.items}
    if wrong := [item for case in check.cases if case.dtype == "float64" for item in (case.own_failures or case.failures)]:
        return Verdict(BUG, f"it stays in float64, where there is no noise: {_name(wrong[0])} is off by {_error(wrong[0])}")
    failures = [(item, exact.get((case.case, item.group, item.name))) for case in check.cases for item in case.failures]
    if not failures:
        return Verdict(NOISE, f"no comparison fails by itself and all hold in float64, but {_distribution(check)}")
    for item, again in failures:
        if again is None:
            return Verdict(BUG, f"float64 has nothing to set against {_name(item)}")
        if not item.error <= NOISE_FACTOR * item.tolerance:
            share = f"{item.error / item.tolerance:.0f} × what may be expected of float32"
            return Verdict(BUG, f"{_name(item)} is right in float64, but in float32 off by {_error(item)}, {share}: no rounding does that")
    return Verdict(NOISE, f"what fails in float32 holds in float64, where its error {_fall(failures)}")


def _name(item: Item) -> str:
    return f"{item.group} '{item.name}'"


def _error(item: Item) -> str:
    return f"{item.error:.1e}" if not math.isnan(item.error) else item.note or "more than can be said"


def _fall(failures: list[tuple[Item, Item | None]]) -> str:
    """By how much the errors fall, at least."""
    falls = [item.error / again.error for item, again in failures if again is not None and again.error > 0]
    return f"falls by a factor of at least {min(falls):.0e}" if falls else "is gone"


def _distribution(check: Check) -> str:
    """The median and the worst of error / floor over the taps of all float32 cases; "" without one."""
    ratios = [ratio for case in check.cases if case.dtype == "float32" for ratio in case.tap_ratios]
    if not ratios:
        return ""
    return (
        f"over {len(ratios)} taps of all cases the error is {check.median_ratio:.2f} × the official floor in the median "
        f"(at most {compare.MEDIAN_FACTOR}) and {max(ratios):.2f} × at worst"
    )
