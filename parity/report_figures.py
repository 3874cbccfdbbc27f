"""The charts of a report, for light and for dark pages: PNG files as bytes, each a pure function of one :class:`parity.check.Check`."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from parity import compare
from parity.check import LEDGER, CaseCheck, Check, Item
from parity.report_text import title
from parity.report_tree import share

SMALLEST = 1e-17
"""Below it an error is drawn at the edge: 0 has no place on a logarithmic axis."""

_BLUE, _ORANGE, _RED, _VIOLET, _GREY = "#2f7ed8", "#e08214", "#d7303c", "#9b6bd3", "#8a8f98"
_GROUPS = (_GREY, _BLUE, "#5aa9e6", "#7a5195", "#2a9d8f", "#b5838d", "#f4a261", "#c9a227", "#74a57f", "#bc5090", "#4d908e", "#9a8c98")
"""Of the groups, in the order of the ledger, over and over."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture and what it shows.

    Attributes:
        png: the file, on white; ``dark``: the same on a dark ground.
    """

    caption: str
    png: bytes
    dark: bytes


_INK = {
    "figure.facecolor": "#ffffff",
    "axes.facecolor": "#ffffff",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), "#1c2126"),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), "#5a636e"),
    "grid.color": "#cfd8e3",
    "legend.edgecolor": "#cfd8e3",
}
_DARK_INK = {
    "figure.facecolor": "#14181d",
    "axes.facecolor": "#14181d",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), "#dde3ea"),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), "#9aa5b1"),
    "grid.color": "#3a444f",
    "legend.edgecolor": "#3a444f",
}


def _drawn(caption: str, rows: int, columns: int, height: float, draw: Callable[[Any, Any], None]) -> Picture:
    """The picture that ``draw(figure, axes [rows, columns])`` makes, on both grounds."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    pngs = []
    for ink in (_INK, _DARK_INK):
        with plt.rc_context(ink):
            figure, axes = plt.subplots(rows, columns, figsize=(14, 0.9 + height * rows), squeeze=False, layout="constrained")
            draw(figure, axes)
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=110)
            plt.close(figure)
            pngs.append(file.getvalue())
    return Picture(caption, *pngs)


def error_along_depth(check: Check) -> Picture:
    """The error of every tap in the order of computation, with the floor and the tolerance; one panel for each case and dtype."""
    cases = [case for case in check.cases if not case.is_step] or check.cases

    def draw(figure: Any, axes: Any) -> None:
        figure.suptitle("Error of TensorFlow against the official model in float64, along the computation", fontsize=13)
        for axis, case in zip(axes[:, 0], cases, strict=True):
            _draw_depth(axis, case)

    caption = "Noise grows slowly and stays within the band of the official runs; a fault is a step."
    if any(not math.isnan(item.local) for case in check.cases for item in case.items if item.group == "taps"):
        caption += " Violet: the part of an error that arises in that place itself, with recorded inputs."
    return _drawn(caption, len(cases), 1, 3.4, draw)


def _draw_depth(axis: Any, case: CaseCheck) -> None:
    import matplotlib

    grid = matplotlib.rcParams["grid.color"]
    taps = [item for item in case.items if item.group == "taps" and item.comparison is not None]
    places = range(len(taps))
    if not taps:
        axis.text(0.5, 0.5, "no tap was judged", ha="center", transform=axis.transAxes)
        axis.set_axis_off()
        axis.set_title(title(case), loc="left", fontsize=10, **_colour(case))
        return

    def clipped(values: Iterator[float]) -> list[float]:
        return [max(value, SMALLEST) if not math.isnan(value) else math.nan for value in values]

    errors = clipped(item.error for item in taps)
    axis.fill_between(places, SMALLEST, clipped(item.floor for item in taps), color=grid, step="mid", label="floor: official runs")
    axis.step(places, clipped(item.tolerance for item in taps), where="mid", color=_GREY, linewidth=1, label="tolerance")
    axis.plot(places, errors, ".", color=_BLUE, markersize=4, label="TensorFlow")
    local = clipped(item.local for item in taps)
    if not all(map(math.isnan, local)):
        axis.plot(places, local, ".", color=_VIOLET, markersize=3, label="of it local")
    failed = [place for place in places if not taps[place].passed]
    top = max((value for value in errors if math.isfinite(value)), default=1.0)
    heights = {place: errors[place] if math.isfinite(errors[place]) else top for place in failed}
    inherited = [place for place in failed if taps[place].inherited]
    own = [place for place in failed if place not in inherited]
    for shown, colour, words in ((inherited, _ORANGE, "inherits"), (own, _RED, "fails")):
        if shown:
            at = [heights[place] for place in shown]
            axis.plot(shown, at, "x", color=colour, markersize=7, markeredgewidth=1.8, label=f"{words} ({len(shown)})")
    if failed:
        first = (own or inherited)[0]
        right = first > len(taps) / 2
        name = axis.annotate(
            taps[first].name,
            (first, heights[first]),
            xytext=(-6 if right else 6, 8),
            textcoords="offset points",
            color=_RED,
            fontsize=9,
            ha="right" if right else "left",
        )
        name.set_in_layout(False)
    drawn = [
        value
        for item in taps
        for value in (item.error, item.floor, item.tolerance, item.local)
        if value > SMALLEST and math.isfinite(value)
    ]
    low, high = min(drawn, default=1e-8) / 3, max(drawn, default=1.0)
    axis.set_yscale("log")
    axis.set_ylim(low, high * max((high / low) ** 0.15, 2))  # leaves room for the name of the first failure
    axis.set_xlim(-1, len(taps))
    starts = [place for place in places if place == 0 or _part(taps[place].name) != _part(taps[place - 1].name)]
    ends = [*starts[1:], len(taps)]
    for start in starts[1:]:
        axis.axvline(start - 0.5, color=grid, linewidth=0.8)
    wide = [(start, end) for start, end in zip(starts, ends, strict=True) if end - start > len(taps) / 60]
    axis.set_xticks([(start + end - 1) / 2 for start, end in wide], [_part(taps[start].name) for start, _ in wide], fontsize=9)
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel("relative L2 error")
    axis.set_title(title(case), loc="left", fontsize=10, **_colour(case))
    axis.legend(loc="lower right", fontsize=8, ncols=6, framealpha=0.9)


def _colour(case: CaseCheck) -> dict[str, str]:
    """Of a case's title: that of the page unless it fails."""
    return {} if case.passed else {"color": _RED}


def _part(tap: str) -> str:
    """The part of the model that a tap belongs to, short enough for an axis."""
    module = tap.split("#")[0].removeprefix("sem_seg_head.")
    parts = module.split(".")
    if parts[:2] == ["backbone", "layers"]:
        return ".".join(parts[1:3])
    if parts[0] == "backbone":
        return parts[1] if len(parts) > 1 else "res5"
    if "encoder" in parts:
        return "encoder"
    if "decoder" in parts:
        return "decoder"
    return {"pixel_decoder": "pixel decoder", "predictor": "heads"}.get(parts[0], "heads" if parts[0] == "sem_seg_head" else parts[0])


def histograms(check: Check) -> Picture:
    """How errors are distributed, one row for each case and dtype: error / floor of taps, error / tolerance of all that is judged."""

    def draw(figure: Any, axes: Any) -> None:
        for (left, right), case in zip(axes, check.cases, strict=True):
            taps = [item for item in case.items if item.group == "taps"]
            _draw_histogram(left, "error / floor of taps", _groups(taps, lambda item: item.ratio))
            if case.dtype == "float32" and taps:
                left.axvline(compare.MEDIAN_FACTOR, color=_GREY, linewidth=1, linestyle="--")
                left.set_title(f"median {case.median_ratio:.3f}", loc="right", fontsize=8)
            judged = [item for item in case.items if math.isfinite(item.tolerance)]
            _draw_histogram(right, "error / tolerance", _groups(judged, share))
            right.axvline(1, color=_RED, linewidth=1, linestyle="--")
            left.set_title(f"{case.case}, {case.dtype}", loc="left", fontsize=9, **_colour(case))

    caption = "Left: how many taps have which error, in units of the floor (1.1: what their median may have). "
    caption += "Right: everything that is judged; 1 is the limit."
    return _drawn(caption, len(check.cases), 2, 2.7, draw)


def _groups(items: Sequence[Item], figure: Callable[[Item], float]) -> dict[str, list[float]]:
    """Group → the finite figures above 0 of its items."""
    found = {group: [figure(item) for item in items if item.group == group] for group in LEDGER}
    kept = {group: [value for value in values if value > 0 and math.isfinite(value)] for group, values in found.items()}
    return {group: values for group, values in kept.items() if values}


def _draw_histogram(axis: Any, label: str, groups: dict[str, list[float]]) -> None:
    from matplotlib import ticker

    exponents = {group: [math.log10(value) for value in values] for group, values in groups.items()}
    if exponents:
        flat = [exponent for values in exponents.values() for exponent in values]
        low, high = math.floor(min(flat) * 4) / 4, math.ceil(max(flat) * 4 + 0.1) / 4
        edges = [10 ** (low + (high - low) * step / 48) for step in range(49)]
        colours = [_GROUPS[LEDGER.index(group) % len(_GROUPS)] for group in groups]
        axis.hist(list(groups.values()), bins=edges, stacked=True, histtype="stepfilled", color=colours, label=list(groups))
        axis.set_xscale("log")
        if high - low <= 2:
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        axis.legend(fontsize=7, ncols=2)
    else:
        axis.text(0.5, 0.5, "none", ha="center", transform=axis.transAxes)
        axis.set_xticks([])
        axis.set_yticks([])
    axis.set_xlabel(label, fontsize=8)
    axis.tick_params(labelsize=8)
