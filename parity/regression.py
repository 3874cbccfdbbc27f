"""Two runs of a check, by their JSON reports: what changed from the first to the second, and whether anything became worse."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from parity import compare
from parity.report import FORMAT, VERSION
from parity.report_text import printable

FACTOR = 1.5
"""By how much an error may grow, if nothing else is asked for: official runs differ among themselves by up to 1.46 × (docs/parity.md)."""

VERSIONS = range(1, VERSION + 1)
"""Of reports that can be compared: version 1 knows no stages, no findings and fewer groups."""

RESOLUTION = {"float32": compare.FLOAT32_RESOLUTION, "float64": 1e-12}
"""Errors up to this are the last bits: that they grow means nothing. In float64 1e-13 … 1e-12 is usual. A low precision (a recording's,
:mod:`parity.recorded`) has no entry and takes float32's: its sums are in float32, and its own errors are far above that."""

EXPECTED = "expected the report.json that parity-check --report or --json writes"

SHOWN = 20
"""Lines of one kind of change for a terminal; the JSON has all."""


class ReportError(ValueError):
    """A file is no JSON report of this version; the message says which and why."""


class Key(NamedTuple):
    """What is paired in the two reports."""

    case: str
    dtype: str
    group: str
    name: str

    def __str__(self) -> str:
        return f"{self.case} {self.dtype} {self.group} '{self.name}'"


@dataclasses.dataclass(frozen=True)
class Change:
    """One item in both reports; errors are nan where there is none."""

    key: Key
    before: float
    after: float

    @property
    def factor(self) -> float:
        """after / before; inf from nothing."""
        return self.after / self.before if self.before else math.inf


@dataclasses.dataclass(frozen=True)
class Regression:
    """What changed from the run ``before`` to the run ``after``.

    Attributes:
        factor: by which an error may grow.
        verdicts: whether each run passed.
        newly_failing, newly_passing: items of both runs.
        grown: other items whose error is more than ``factor`` times as large and above :data:`RESOLUTION`, the worst first. What is
            judged without a limit (gradients in float32) is left out.
        vanished, appeared: items of one run only.
        appeared_failing: those of ``appeared`` that fail.
        environment: dotted name of a setting, version, machine, source or provenance → its two values, as JSON text, where they differ.
    """

    before: str
    after: str
    factor: float
    verdicts: tuple[bool, bool]
    newly_failing: tuple[Change, ...]
    newly_passing: tuple[Change, ...]
    grown: tuple[Change, ...]
    vanished: tuple[Key, ...]
    appeared: tuple[Key, ...]
    appeared_failing: tuple[Key, ...]
    environment: dict[str, tuple[str, str]]

    @property
    def regressed(self) -> bool:
        """Something fails that did not, is less exact, or is no longer looked at."""
        was, now = self.verdicts
        return bool(self.newly_failing or self.grown or self.vanished or self.appeared_failing or (was and not now))


def read(path: str | Path) -> dict[str, Any]:
    """A ``report.json``.

    Raises:
        ReportError: it cannot be read, or is not one of this version.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"cannot read '{path}': {error}\n  {EXPECTED}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ReportError(f"'{path}' is no report: 'format' is not '{FORMAT}'\n  {EXPECTED}")
    if report.get("version") not in VERSIONS:
        known = " or ".join(map(str, VERSIONS))
        raise ReportError(f"'{path}' has report version {report.get('version')}, expected {known}; run that check again")
    return report


def regression(before: Mapping[str, Any], after: Mapping[str, Any], names: tuple[str, str], factor: float = FACTOR) -> Regression:
    """Compares two reports as :func:`read` returns them.

    Args:
        names: of the two, for people and for errors.
        factor: by which an error may grow; 1 or more.

    Raises:
        ReportError: something that is needed is missing in one of them.
    """
    old, new = _items(before, names[0]), _items(after, names[1])
    both = [key for key in old if key in new]
    changes = {key: Change(key, old[key].error, new[key].error) for key in both}
    appeared = tuple(key for key in new if key not in old)
    failing = {key: changes[key] for key in both if old[key].passed and not new[key].passed}
    grown = [
        change
        for key, change in changes.items()
        if new[key].limited and key not in failing and change.after > max(factor * change.before, _resolution(key.dtype))
    ]
    return Regression(
        *names,
        factor=factor,
        verdicts=(before["passed"], after["passed"]),
        newly_failing=tuple(failing.values()),
        newly_passing=tuple(changes[key] for key in both if new[key].passed and not old[key].passed),
        grown=tuple(sorted(grown, key=lambda change: -change.factor)),
        vanished=tuple(key for key in old if key not in new),
        appeared=appeared,
        appeared_failing=tuple(key for key in appeared if not new[key].passed),
        environment=dict(_differences(before, after)),
    )


def _resolution(dtype: str) -> float:
    return RESOLUTION.get(dtype, RESOLUTION["float32"])


class _Judged(NamedTuple):
    """What is needed of one item; ``limited``: there is a limit to its error."""

    passed: bool
    error: float
    limited: bool


def _items(report: Mapping[str, Any], name: str) -> dict[Key, _Judged]:
    """The items of a report, in its order."""
    found = {}
    try:
        bool(report["passed"])
        for case in report["cases"]:
            if not isinstance(case["dtype"], str):
                raise TypeError(f"dtype {case['dtype']!r}")
            for item in case["items"]:
                judged = _Judged(bool(item["passed"]), float(item["error"]), float(item["tolerance"]) < math.inf)
                found[Key(case["case"], case["dtype"], item["group"], item["name"])] = judged
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"'{name}' is damaged: {error!r}\n  its schema is parity/report.schema.json; run that check again") from error
    return found


SURROUNDINGS = ("settings", "environment", "source", "provenance")
"""Parts of a report that say what was run, and where."""


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    old, new = ({name: value for part in SURROUNDINGS for name, value in _flat(part, report.get(part))} for report in (before, after))
    for name in old | new:
        values = old.get(name, "nothing"), new.get(name, "nothing")
        if values[0] != values[1]:
            yield name, values


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Dotted names and their values as JSON text; lists are values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif name != "environment.probes":  # errors of operations, which passed or there would be no report
        yield name, json.dumps(value, ensure_ascii=False)


def text(found: Regression) -> str:
    """For a terminal; the last line is the verdict."""
    lines = [f"before  {found.before}", f"after   {found.after}", ""]
    for heading, changes in (
        ("newly fails", found.newly_failing),
        (f"error grew by more than {found.factor:g} ×", found.grown),
        ("newly passes", found.newly_passing),
    ):
        lines += _listed(heading, [f"{change.key}: error {change.before:.2e} → {change.after:.2e}" for change in changes])
    lines += _listed("vanished", [str(key) for key in found.vanished])
    lines += _listed("appeared", [f"{key}{': fails' * (key in found.appeared_failing)}" for key in found.appeared])
    lines += _listed("other surroundings", [f"{name}: {old} → {new}" for name, (old, new) in found.environment.items()])
    return "\n".join(map(printable, [*lines, verdict(found)]))


def _listed(heading: str, entries: Sequence[str]) -> Iterator[str]:
    if entries:
        yield f"{heading}: {len(entries)}"
        yield from (f"  {entry}" for entry in entries[:SHOWN])
        if len(entries) > SHOWN:
            yield f"  … and {len(entries) - SHOWN} more; --json has all"
        yield ""


def verdict(found: Regression) -> str:
    """One line."""
    if not found.regressed:
        return f"no regression: nothing newly fails or vanished, and no error above the last bits grew by more than {found.factor:g} ×"
    counts = (
        (len(found.newly_failing), "newly fail"),
        (len(found.grown), f"grew by more than {found.factor:g} ×"),
        (len(found.vanished), "vanished"),
        (len(found.appeared_failing), "appeared and fail"),
    )
    told = ", ".join(f"{count} {words}" for count, words in counts if count)
    return f"regression: {told or 'the check as a whole passed before and fails now'}"


def as_json(found: Regression) -> str:
    """All of it; a number that is not finite is the text "nan" or "inf"."""
    values = dataclasses.asdict(found) | {"regressed": found.regressed, "verdict": verdict(found)}
    for name in ("newly_failing", "newly_passing", "grown"):
        values[name] = [
            {**change.key._asdict(), "before": _plain(change.before), "after": _plain(change.after)} for change in getattr(found, name)
        ]
    for name in ("vanished", "appeared", "appeared_failing"):
        values[name] = [key._asdict() for key in getattr(found, name)]
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
