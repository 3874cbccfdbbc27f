"""Draws what ``parity-check steps --json`` wrote: how far the port is from the official float64 training, and how far official float32 ones
are, after every step.

    python -m parity.trajectory_figure trajectory.png tiny_swin.json …
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parity.report_figures import _BLUE, _GREY, _ORANGE, SMALLEST, _drawn

COLUMNS = {"losses": "losses", "gradient_norm": "gradient norm", "weights": "weights moved"}


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


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture that is named first, of the reports that are named after it."""
    picture, *reports = map(Path, sys.argv[1:] if argv is None else argv)
    picture.write_bytes(draw(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
