"""What a check found, for people and for programs: pure functions of one :class:`parity.check.Check`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parity import compare
from parity.check import CaseCheck, Check, Item
from parity.compare import AssignmentComparison, Comparison

FORMAT = "tfmaskformer-parity-report"
VERSION = 1
WORST = 5
"""Rows in a table of the worst."""

_STYLES = {"green": "32", "red": "31", "bold": "1"}


def text(check: Check, colour: bool = False) -> str:
    """The report for a terminal."""

    def paint(words: str, style: str) -> str:
        return f"\x1b[{_STYLES[style]}m{words}\x1b[0m" if colour else words

    lines = [*_heading(check), ""]
    for case in check.cases:
        lines += [paint(_title(case), "bold"), *(f"  {line}" for line in _case(case)), ""]
    lines += [f"not checked: case {exemption.name}: {exemption.reason}" for exemption in check.left_out]
    lines += [paint(line, "green" if check.passed else "red") for line in verdict(check)]
    return "\n".join(lines)


def verdict(check: Check) -> list[str]:
    """The result in words; what it says was asserted in :attr:`parity.check.Check.passed`."""
    if check.passed:
        compared = sum(item.comparison is not None for case in check.cases for item in case.items if item.group != "variables")
        cases = len({case.case for case in check.cases})
        return [f"match: all {compared} comparisons of {cases} case{'s' * (cases != 1)} in {' and '.join(check.settings.dtypes)} hold"]
    lines = []
    if check.first_failure is not None:
        case, item = check.first_failure
        lines += [f"mismatch: first in {item.group} '{item.name}' (case {case.case}, {case.dtype})", *(f"  {line}" for line in told(item))]
    if not check.median_passed:
        lines.append(
            f"mismatch: the median of error / floor over the taps of all cases is {check.median_ratio:.2f}, allowed {compare.MEDIAN_FACTOR}"
        )
    return lines


def told(item: Item) -> Iterator[str]:
    """One item in words, with every figure that helps."""
    if item.note:
        yield item.note
    found = item.comparison
    if isinstance(found, AssignmentComparison):
        yield f"gap {found.gap:.1e}, cost noise {found.cost_noise:.1e}; the actual assignment costs {found.regret:.1e} more"
    if isinstance(found, Comparison) and not math.isnan(item.error):
        yield f"error {item.error:.2e}, tolerance {item.tolerance:.2e} ({_times(item.error / item.tolerance)}), floor {item.floor:.2e}"
        if not math.isnan(item.local):
            yield f"of it {item.local:.2e} arises here, the rest is inherited"
        place = "sample" if found.compared < found.elements else "index"
        yield (
            f"largest difference {found.max_difference:.3e} at {place} {found.max_index}: "
            f"actual {found.actual_at_max:.8g}, expected {found.expected_at_max:.8g}"
        )
        yield (
            f"{found.mismatched:.2%} of {found.compared} compared elements outside; a tolerance of {found.passing_tolerance:.1e} "
            "would have taken all in"
        )


def _times(factor: float) -> str:
    return f"{factor:.3g} ×" if math.isfinite(factor) else "beyond any factor"


def _heading(check: Check) -> Iterator[str]:
    settings, environment, provenance = check.settings, check.environment, check.provenance
    canvas = f" on {settings.pad_to[0]}×{settings.pad_to[1]} px" if settings.pad_to else ""
    yield f"parity-check  {settings.checkpoint} against {settings.reference}"
    yield f"  weights      {check.source.get('file')}, SHA-256 {str(check.source.get('sha256'))[:16]}…: the same on both sides"
    commits = ", ".join(f"{name} {str(commit)[:9]}" for name, commit in provenance.get("commits", {}).items())
    yield f"  reference    {commits}; torch {provenance.get('versions', {}).get('torch')}; {provenance.get('config')}"
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    yield f"  TensorFlow   {settings.mode} mode, {settings.padding} padding{canvas}; {versions}"
    yield f"  machine      {environment.cpu}; oneDNN {environment.onednn}; threads {environment.threads}"
    used = [probe for probe in environment.probes if probe.used]
    yield f"  self-test    {sum(probe.passed for probe in used)} of {len(used)} operations that the model uses are right here"
    for note in environment.notes:
        yield f"               {note}"


def _title(case: CaseCheck) -> str:
    sizes = ", ".join(f"{height}×{width}" for height, width in case.sizes_px)
    stored = "all elements" if case.samples is None else f"{case.samples} elements of each large tensor, statistics of the whole"
    return f"{case.case} ({sizes} px), {case.dtype}, {stored}: {'match' if case.passed else 'MISMATCH'}"


def _case(case: CaseCheck) -> Iterator[str]:
    yield f"{'':12} " + " ".join(f"{column:>10}" for column in next(iter(case.ledger().values())))
    for group, counts in case.ledger().items():
        yield f"{group:12} " + " ".join(f"{count:10}" for count in counts.values())
    taps = _with_error(case, "taps")
    if case.dtype == "float32":
        yield f"median over taps of error / floor: {case.median_ratio:.3f}; of all cases together {compare.MEDIAN_FACTOR} is allowed"
    if taps:
        yield f"worst of {len(taps)} taps by error / tolerance:"
        yield from _table(_worst(taps))
    if assignments := _assignments(case):
        yield f"assignments: {assignments}"
    losses = _with_error(case, "losses")
    if losses:
        yield f"worst of {len(losses)} losses by error / tolerance:"
        yield from _table(_worst(losses))
    gradients = _with_error(case, "gradients")
    if gradients:
        judged = "" if case.dtype == "float64" else " (in float32 shape and finiteness are judged, the error is judged in float64)"
        yield f"worst of {len(gradients)} gradients{judged}:"
        yield from _table(sorted(gradients, key=lambda item: -item.error)[:WORST])
    others = [item for group in ("outputs", "matcher", "inference") for item in _with_error(case, group)]
    if others:
        yield f"worst of {len(others)} outputs, costs and inference results by error / tolerance:"
        yield from _table(_worst(others))
    for exemption in case.exempted:
        yield f"exempted: {exemption.group} '{exemption.name}': {exemption.reason}"
    for item in case.failures[:WORST]:
        yield f"failed: {item.group} '{item.name}'"
        yield from (f"  {line}" for line in told(item))
    if len(case.failures) > WORST:
        yield f"… and {len(case.failures) - WORST} more; all are in report.json"


def _with_error(case: CaseCheck, group: str) -> list[Item]:
    return [item for item in case.items if item.group == group and not math.isnan(item.error)]


def _worst(items: Sequence[Item]) -> list[Item]:
    def share(item: Item) -> float:
        return item.error / item.tolerance if item.tolerance else item.error

    return sorted(items, key=share, reverse=True)[:WORST]


def _table(items: Sequence[Item]) -> Iterator[str]:
    yield f"  {'error':>8} {'floor':>8} {'ratio':>6} {'allowed':>8}"
    for item in items:
        ratio = f"{item.ratio:6.2f}" if item.floor > 1e-9 else f"{'–':>6}"
        mark = "" if item.passed else "  ← fails"
        yield f"  {item.error:8.1e} {item.floor:8.1e} {ratio} {item.tolerance:8.1e}  {item.name}{mark}"


def _assignments(case: CaseCheck) -> str:
    found = [item.comparison for item in case.items if isinstance(item.comparison, AssignmentComparison)]
    labels = [comparison.label for comparison in found]
    counts = ", ".join(f"{labels.count(label)} {label}" for label in ("same", "tie", "near-tie", "different") if label in labels)
    gaps = [comparison.gap / comparison.cost_noise for comparison in found if comparison.cost_noise]
    return counts + (f"; the smallest gap is {min(gaps):.1f} × the cost noise" if gaps else "")


def as_dict(check: Check) -> dict[str, Any]:
    """The whole result as JSON types; a number that is not finite is the text "nan", "inf" or "-inf"."""
    values = dataclasses.asdict(check)
    for case, case_values in zip(check.cases, values["cases"], strict=True):
        for item, item_values in zip(case.items, case_values["items"], strict=True):
            item_values["ratio"] = item.ratio
        case_values |= {"passed": case.passed, "median_ratio": case.median_ratio, "ledger": case.ledger()}
    for probe, probe_values in zip(check.environment.probes, values["environment"]["probes"], strict=True):
        probe_values["passed"] = probe.passed
    first = check.first_failure
    head = {
        "format": FORMAT,
        "version": VERSION,
        "passed": check.passed,
        "median_ratio": check.median_ratio,
        "verdict": verdict(check),
        "first_failure": first and {"case": first[0].case, "dtype": first[0].dtype, "group": first[1].group, "name": first[1].name},
    }
    return _plain(head | values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def as_json(check: Check) -> str:
    """:func:`as_dict` as text."""
    return json.dumps(as_dict(check), indent=1, allow_nan=False) + "\n"


def write(check: Check, directory: Path) -> None:
    """Writes ``report.txt``, ``report.json`` and ``error_along_depth.png`` into a directory that exists."""
    (directory / "report.txt").write_text(text(check) + "\n", encoding="utf-8")
    (directory / "report.json").write_text(as_json(check), encoding="utf-8")
    draw(check, directory / "error_along_depth.png")


def draw(check: Check, path: Path) -> None:
    """The error of every tap in the order of computation, with the floor and the tolerance; one panel for each case and dtype."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    panels = len(check.cases)
    figure, axes = plt.subplots(panels, 1, figsize=(14, 0.9 + 3.4 * panels), squeeze=False, layout="constrained")
    figure.suptitle("Error of TensorFlow against the official model in float64, along the computation", fontsize=13)
    for axis, case in zip(axes[:, 0], check.cases, strict=True):
        _draw_case(axis, case)
    figure.savefig(path, dpi=110)
    plt.close(figure)


SMALLEST = 1e-17
"""Below it an error is drawn at the edge: 0 has no place on a logarithmic axis."""


def _draw_case(axis: Any, case: CaseCheck) -> None:
    taps = [item for item in case.items if item.group == "taps" and item.comparison is not None]
    places = range(len(taps))

    def clipped(values: Iterator[float]) -> list[float]:
        return [max(value, SMALLEST) if not math.isnan(value) else math.nan for value in values]

    errors = clipped(item.error for item in taps)
    axis.fill_between(places, SMALLEST, clipped(item.floor for item in taps), color="#cfd8e3", step="mid", label="floor: official runs")
    axis.step(places, clipped(item.tolerance for item in taps), where="mid", color="#8a8f98", linewidth=1, label="tolerance")
    axis.plot(places, errors, ".", color="#1f5fa8", markersize=4, label="TensorFlow")
    failed = [place for place in places if not taps[place].passed]
    if failed:
        top = max((value for value in errors if math.isfinite(value)), default=1.0)
        heights = [errors[place] if math.isfinite(errors[place]) else top for place in failed]
        axis.plot(failed, heights, "x", color="#c1272d", markersize=7, markeredgewidth=1.8, label=f"fails ({len(failed)})")
        axis.annotate(
            taps[failed[0]].name,
            (failed[0], heights[0]),
            xytext=(6, 8),
            textcoords="offset points",
            color="#c1272d",
            fontsize=9,
            clip_on=False,
        )
    drawn = [value for item in taps for value in (item.error, item.floor, item.tolerance) if value > SMALLEST and math.isfinite(value)]
    low, high = min(drawn, default=1e-8) / 3, max(drawn, default=1.0)
    axis.set_yscale("log")
    axis.set_ylim(low, high * max((high / low) ** 0.15, 2))  # leaves room for the name of the first failure
    axis.set_xlim(-1, len(taps))
    starts = [place for place in places if place == 0 or _part(taps[place].name) != _part(taps[place - 1].name)]
    ends = [*starts[1:], len(taps)]
    for start in starts[1:]:
        axis.axvline(start - 0.5, color="#b7bcc4", linewidth=0.8)
    wide = [(start, end) for start, end in zip(starts, ends, strict=True) if end - start > len(taps) / 60]
    axis.set_xticks([(start + end - 1) / 2 for start, end in wide], [_part(taps[start].name) for start, _ in wide], fontsize=9)
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel("relative L2 error")
    axis.set_title(_title(case), loc="left", fontsize=10, color="#111111" if case.passed else "#c1272d")
    axis.legend(loc="lower right", fontsize=8, ncols=4, framealpha=0.9)


def _part(tap: str) -> str:
    """The part of the model that a tap belongs to, short enough for an axis."""
    module = tap.split("#")[0].removeprefix("sem_seg_head.")
    parts = module.split(".")
    if parts[0] == "backbone":
        return parts[1] if len(parts) > 1 else "res5"
    if "encoder" in parts:
        return "encoder"
    if "decoder" in parts:
        return "decoder"
    return {"pixel_decoder": "pixel decoder", "predictor": "heads"}.get(parts[0], "heads" if parts[0] == "sem_seg_head" else parts[0])
