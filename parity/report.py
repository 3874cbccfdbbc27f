"""What a check found, for people and for programs: every format is a pure function of one :class:`parity.check.Check`.

The formats: words for a terminal (:mod:`parity.report_text`), JSON (here; its schema is ``report.schema.json`` beside this file), JUnit XML
(:mod:`parity.report_junit`) and a page of HTML (:mod:`parity.report_html`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from parity import report_figures, report_html, report_junit
from parity.check import Check
from parity.report_text import text, verdict
from tfmaskformer.cli import COULD_NOT_RUN, OutputError, write_whole

__all__ = ["FILES", "FORMAT", "SCHEMA", "VERSION", "as_dict", "as_json", "text", "write"]

FORMAT = "tfmaskformer-parity-report"
VERSION = 3
"""Of the JSON report; another number for any change of ``report.schema.json``."""

SCHEMA = Path(__file__).parent / "report.schema.json"

FILES = ("report.html", "report.txt", "report.json", "junit.xml", "error_along_depth.png")
"""What :func:`write` writes."""


def as_dict(check: Check) -> dict[str, Any]:
    """The whole result as JSON types; a number that is not finite is the text "nan", "inf" or "-inf"."""
    unseen = tuple(dataclasses.replace(case, evidence=(), overlays=()) for case in check.cases)
    values = dataclasses.asdict(dataclasses.replace(check, cases=unseen))
    for case_values in values["cases"]:
        del case_values["evidence"], case_values["overlays"], case_values["plan"]
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
        "verdict_kind": check.verdict_kind,
        "verdict_reason": check.verdict_reason,
        "findings": [dataclasses.asdict(finding) for finding in check.findings],
        "stages": [dataclasses.asdict(stage) for stage in check.stages],
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
    """Writes :data:`FILES` into a directory, which is made if it is not there.

    Raises:
        tfmaskformer.cli.OutputError: one of them cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(directory, error.strerror, COULD_NOT_RUN) from error
    write_whole(directory / "report.txt", text(check) + "\n")
    write_whole(directory / "report.json", as_json(check))
    write_whole(directory / "junit.xml", report_junit.as_xml(check))
    depth = report_figures.error_along_depth(check)
    write_whole(directory / "error_along_depth.png", depth.png)
    pictures = [depth, report_figures.histograms(check)]
    write_whole(directory / "report.html", report_html.page(check, pictures))
