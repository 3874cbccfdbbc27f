"""Shows what ``parity-check steps --json`` wrote: how far the port is from the official float64 training, and how far official float32 ones
are, after every step.

    python -m parity.trajectory_figure trajectory.png tiny_swin.json … [--results docs/trajectory.json --page docs/training_parity.md]

With ``--results`` the largest figures of each training are kept, with ``--page`` shown in its table. Exit code 1 where a training does not
match.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parity.page import replaced_between
from parity.report_figures import _BLUE, _GREY, _ORANGE, SMALLEST, _drawn

COLUMNS = {"losses": "losses", "gradient_norm": "gradient norm", "weights": "weights moved"}
"""Quantity → its name in the picture."""

TABLE = {
    "losses": ("losses",),
    "gradient norm": ("gradient_norm",),
    "clipped gradients": ("clipped",),
    "moments": ("exp_avg", "exp_avg_sq"),
    "weights moved": ("weights",),
}
"""Column of the table → quantities."""

MARKS = ("<!-- made by python -m parity.trajectory_figure -->", "<!-- end -->")
"""Lines around the table in the page."""


def draw(reports: Sequence[Path]) -> bytes:
    """A PNG with a row for each training and a column for each of :data:`COLUMNS`."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in reports:
        for training in json.loads(path.read_text(encoding="utf-8"))["trainings"]:
            rows.setdefault(f"{path.stem}, {training['training']}", []).append(training)

    def fill(_figure: Any, axes: Any) -> None:
        for (title, trainings), of_row in zip(rows.items(), axes, strict=True):
            for (quantity, label), axis in zip(COLUMNS.items(), of_row, strict=True):
                for training in trainings:
                    name, colour = training["dtype"], _BLUE if training["dtype"] == "float64" else _ORANGE
                    errors, drifts = _largest(training, quantity, "error"), _largest(training, quantity, "drift")
                    if name == "float32":
                        axis.fill_between(list(drifts), list(drifts.values()), SMALLEST, color=_GREY, alpha=0.35, label="official float32")
                    axis.plot(list(errors), list(errors.values()), color=colour, marker=".", label=f"the port, {name}")
                axis.set_yscale("log")
                axis.xaxis.get_major_locator().set_params(integer=True)
                axis.set_ylim(1e-16, 10)
                axis.set_title(f"{title}: {label}")
                axis.grid(alpha=0.5)
        axes[0][0].legend(loc="center right")
        for axis in axes[-1]:
            axis.set_xlabel("step")

    return _drawn("", len(rows), len(COLUMNS), 2.6, fill).png


def _largest(training: dict[str, Any], quantity: str, field: str) -> dict[int, float]:
    """Step → the largest error or drift of the quantity's parts."""
    largest: dict[int, float] = {}
    for item in training["items"]:
        step, _, rest = item["name"].partition("/")
        if rest.partition("/")[0] == quantity and item[field] is not None:
            largest[int(step)] = max(largest.get(int(step), SMALLEST), item[field])
    return largest


def digest(reports: Sequence[Path]) -> list[dict[str, Any]]:
    """Of each training: steps, comparisons, the largest error of each column of :data:`TABLE`, and of float32 the largest multiple of the
    official trainings' drift after the same step."""
    found = []
    for path in reports:
        for training in json.loads(path.read_text(encoding="utf-8"))["trainings"]:
            errors: dict[str, float] = {}
            multiples: dict[str, float] = {}
            for column, quantities in TABLE.items():
                for quantity in quantities:
                    largest, drifts = _largest(training, quantity, "error"), _largest(training, quantity, "drift")
                    errors[column] = max([errors.get(column, 0.0), *largest.values()])
                    if training["dtype"] == "float32":
                        of_drift = [error / drifts[step] for step, error in largest.items() if step in drifts]
                        multiples[column] = max([multiples.get(column, 0.0), *of_drift])
            found.append(
                {
                    "recording": path.stem,
                    **{key: training[key] for key in ("training", "dtype", "mode", "steps", "passed")},
                    "comparisons": len(training["items"]),
                    "errors": {column: float(f"{error:.3g}") for column, error in errors.items()},
                    "of_drift": {column: float(f"{multiple:.3g}") for column, multiple in multiples.items()},
                }
            )
    return found


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A line for each training: its largest errors and, of float32, in brackets what multiple of the drift of the official ones."""
    lines = [["recording", "training", "steps", "comparisons", "", *TABLE], ["---"] * (5 + len(TABLE))]
    for of in results:
        cells = [f"{of['errors'][column]:.0e}" + (f" ({of['of_drift'][column]:.1f})" if of["of_drift"] else "") for column in TABLE]
        verdict = "match" if of["passed"] else "**MISMATCH**"
        lines.append([of["recording"], f"{of['training']}, {of['dtype']}", str(of["steps"]), str(of["comparisons"]), verdict, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page_of(text: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The page with the table between its :data:`MARKS`.

    Raises:
        ValueError: it does not have them.
    """
    return replaced_between(text, *MARKS, f"\n{table(results)}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture that is named first, of the reports that are named after it, and the table; 1 where a training does not match."""
    parser = argparse.ArgumentParser(prog="python -m parity.trajectory_figure", description="Shows what 'parity-check steps --json' wrote.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--results", type=Path, metavar="JSON", help="for the largest figures")
    parser.add_argument("--page", type=Path, metavar="MD", help="that shows them")
    arguments = parser.parse_args(argv)
    arguments.picture.write_bytes(draw(arguments.reports))
    results = digest(arguments.reports)
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        arguments.page.write_text(page_of(arguments.page.read_text(encoding="utf-8"), results), encoding="utf-8")
    return 0 if all(of["passed"] for of in results) else 1


if __name__ == "__main__":
    sys.exit(main())
