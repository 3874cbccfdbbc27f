"""What a check found, in words: for a terminal, and the sentences that every report for people has."""

from __future__ import annotations

import math
from collections.abc import Iterator

from parity import compare
from parity.check import LEDGER, CaseCheck, Check, Item
from parity.compare import AssignmentComparison, Comparison
from parity.judge import COVERAGE
from parity.report_tree import Node, grow
from parity.stages import EMPTY

SHOWN = 5
"""Nodes below one that fails, and failures, that are shown; the other reports have all."""

NAMED = 3
"""Of the names that are exempted for one reason."""

RATIO_FROM = 1e-9
"""The least floor for which error / floor is shown: below it, in float64, both are the last bits."""

_STYLES = {"green": "32", "red": "31", "bold": "1"}


def text(check: Check, colour: bool = False) -> str:
    """The report for a terminal; its last line is the verdict."""

    def paint(words: str, style: str) -> str:
        return f"\x1b[{_STYLES[style]}m{printable(words)}\x1b[0m" if colour else printable(words)

    first_case, first = check.first_failure or (None, None)
    lines = [*map(printable, heading(check)), "", *map(printable, _stages(check)), ""]
    for case in check.cases:
        told_of = _case(case, first if case is first_case else None)
        lines += [paint(title(case), "bold"), *(printable(f"  {line}".rstrip()) for line in told_of), ""]
    lines += [printable(f"not checked: {KIND_OF[left.group]} {left.name}: {left.reason}") for left in check.left_out]
    line, *more = verdict(check)
    return "\n".join([*lines, *map(printable, more), *[""][: len(more)], paint(line, "green" if check.passed else "red")])


def printable(words: str) -> str:
    """What comes from files cannot steer the terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in words)


def verdict(check: Check) -> list[str]:
    """The result in one line, which says what was asserted in :attr:`parity.check.Check.passed`, and lines that tell more of a mismatch."""
    if check.passed:
        compared = [item for case in check.cases for item in case.items if item.group not in COVERAGE and item.comparison is not None]
        held, cases = sum(item.judged for item in compared), len({case.case for case in check.cases})
        line = f"match: all {held} comparisons of {cases} case{'s' * (cases != 1)} in {' and '.join(check.settings.dtypes)} hold"
        return [line + f"; {len(compared) - held} more are told, not judged" * (held < len(compared))]
    lines = []
    if (first := check.first_failure) is not None:
        case, item = first
        judged = [each for checked in check.cases for each in checked.items]
        inherited = sum(each.inherited for each in judged)
        count = (
            f"{sum(not each.passed for each in judged)} of {len(judged)} comparisons fail{f', {inherited} inherit it' * bool(inherited)}"
        )
        lines += [
            f"mismatch: first in {item.group} '{item.name}' (case {case.case}, {case.dtype}); {count}: {KINDS[check.verdict_kind]}",
            f"{check.verdict_kind}: {check.verdict_reason}",
            f"first: {item.group} '{item.name}'",
            *(f"  {line}" for line in (*told(item), *place(case, item))),
        ]
        lines += [
            f"diagnosis: {line}" for finding in check.findings for line in (finding.statement, *(f"or {other}" for other in finding.others))
        ]
    if not check.median_passed:
        lines.append(
            f"mismatch: the median of error / floor over the taps of all cases is {check.median_ratio:.2f}, allowed {compare.MEDIAN_FACTOR}"
        )
    return lines or ["mismatch: nothing was compared"]


def place(case: CaseCheck, item: Item) -> Iterator[str]:
    """Where the error of a first failure may arise: a tap shows what is computed between the recorded taps and it, too."""
    if item.group == "taps" and item.comparison is not None and not item.inherited:
        taps = [each.name for each in case.items if each.group == "taps"]
        before = taps[: taps.index(item.name)][-1:]
        behind = f"; the tap before it is '{before[0]}'" if before else ""
        yield f"it arises in '{item.name.partition('#')[0]}', or in what is computed between the recorded taps and it{behind}"


KINDS = {"match": "a match", "bug": "a bug", "noise": "noise"}
"""What a check came to, in words."""

KIND_OF = {"cases": "case", "steps": "training step"}
"""What was left out, in words."""


def told(item: Item) -> Iterator[str]:
    """One item in words, with every figure that helps."""
    if item.note:
        yield item.note
    found = item.comparison
    if isinstance(found, AssignmentComparison):
        yield f"gap {found.gap:.1e}, cost noise {found.cost_noise:.1e}; the actual assignment costs {found.regret:.1e} more"
    if isinstance(found, Comparison) and not math.isnan(item.error):
        times = f" ({_times(item.error / item.tolerance)})" if item.tolerance else ""
        floor = "" if math.isnan(item.floor) else f", floor {item.floor:.2e}"
        yield f"error {item.error:.2e}, tolerance {item.tolerance:.2e}{times}{floor}"
        if not math.isnan(item.local):
            here = "here, or between the recorded taps and this one" if item.group == "taps" else "here"
            whole = item.local > 0.99 * item.error
            yield f"all of it arises {here}" if whole else f"of it {item.local:.2e} arises {here}; the rest is inherited"
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


def facts(check: Check) -> Iterator[tuple[str, str]]:
    """What was compared with what, and where: name and words."""
    settings, environment, provenance = check.settings, check.environment, check.provenance
    padding = "" if settings.port else f", {settings.padding} padding"
    padding += f" on {settings.pad_to[0]}×{settings.pad_to[1]} px" if settings.pad_to else ""
    yield "weights", f"{check.source.get('file')}, SHA-256 {str(check.source.get('sha256'))[:16]}…: the same on both sides"
    commits = ", ".join(f"{name} {str(commit)[:9]}" for name, commit in provenance.get("commits", {}).items())
    model = f"port {provenance['port']}" if "port" in provenance else provenance.get("config")
    yield "reference", "; ".join(filter(None, (commits, f"torch {provenance.get('versions', {}).get('torch')}", model)))
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    yield "TensorFlow", f"{settings.mode} mode{padding}; {versions}"
    yield "machine", f"{environment.cpu}; oneDNN {environment.onednn}; threads {environment.threads}"
    used = [probe for probe in environment.probes if probe.used]
    yield "self-test", f"{sum(probe.passed for probe in used)} of {len(used)} operations that the model uses are right here"
    for note in environment.notes:
        yield "", note


def heading(check: Check) -> Iterator[str]:
    """:func:`facts` in lines."""
    yield f"parity-check  {check.settings.checkpoint} against {check.settings.reference}"
    for name, words in facts(check):
        yield f"  {name:12} {words}"


def _stages(check: Check) -> Iterator[str]:
    """A line for each stage that the model has."""
    yield f"{'stage':26} {'verdict':12} {'judged':>8} {'failed':>8}  first"
    for stage in check.stages:
        if stage.verdict != EMPTY:
            yield f"{stage.name:26} {stage.verdict:12} {stage.judged:8} {stage.failed:8}  {stage.first}"


def title(case: CaseCheck) -> str:
    """What a case is, and its result."""
    sizes = ", ".join(f"{height}×{width}" for height, width in case.sizes_px)
    sizes = f" ({sizes} px)" if sizes else ""
    stored = "all elements" if case.samples is None else f"{case.samples} elements of each large tensor, statistics of the whole"
    return f"{case.case}{sizes}, {case.dtype}, {stored}: {'match' if case.passed else 'MISMATCH'}"


def _case(case: CaseCheck, first: Item | None) -> Iterator[str]:
    yield f"{'':12} " + " ".join(f"{column:>10}" for column in next(iter(case.ledger().values())))
    for group, counts in case.ledger().items():
        if any(counts.values()):
            yield f"{group:12} " + " ".join(f"{count:10}" for count in counts.values())
    yield ""
    yield from _trees(case, first)
    if case.tap_ratios and case.dtype == "float32":
        yield f"median over taps of error / floor: {case.median_ratio:.3f}; of all cases together {compare.MEDIAN_FACTOR} is allowed"
    if not all(item.judged for item in case.items):
        yield "not judged: errors of gradients, and of what is made of them, in float32: shape and finiteness are; float64 judges all"
    if assignments := _assignments(case):
        yield f"assignments: {assignments}"
    alike: dict[tuple[str, str], list[str]] = {}
    for exemption in case.exempted:
        alike.setdefault((exemption.group, exemption.reason), []).append(f"'{exemption.name}'")
    for (group, reason), names in alike.items():
        more = f" and {len(names) - NAMED} more, which the other reports name" * (len(names) > NAMED)
        yield f"exempted: {group} {', '.join(names[:NAMED])}{more}: {reason}"
    if case.local:
        yield f"local errors: {case.local}"
    if case.stopped:
        yield f"not judged: what comes behind '{case.stopped}', which is broken; --all-stages judges it too"
    failures = case.own_failures or case.failures
    for item in failures[:SHOWN]:
        yield f"failed: {item.group} '{item.name}'"
        yield from (f"  {line}" for line in told(item))
    if len(failures) > SHOWN:
        yield f"… and {len(failures) - SHOWN} more; --report writes them all"
    if inherited := len(case.failures) - len(failures):
        yield f"… and {inherited} that only inherit their error"


def _trees(case: CaseCheck, first: Item | None) -> Iterator[str]:
    """Every group of the case, opened where something fails."""
    yield f"{'error':>8} {'local':>8} {'floor':>8} {'ratio':>7} {'allowed':>8}  of the worst below"
    for group in LEDGER:
        items = [item for item in case.items if item.group == group]
        if items and not (group in COVERAGE and all(item.passed for item in items)):
            yield from _tree(grow(group, items), first)


def _tree(node: Node, first: Item | None, indent: str = "") -> Iterator[str]:
    """A node, and of what fails below it the worst; of these the worst of all and the way to the first failure are open in turn."""
    failing = [child for child in node.children if child.failed]
    to_first = [child for child in failing if any(item is first for item in child.items)]
    shown = failing[:SHOWN] + [child for child in to_first if child not in failing[:SHOWN]]
    if node.label == "taps" and not failing:
        shown = list(node.children)  # the parts of the model
    yield _row(node, first, indent, folded=not shown)
    for child in shown:
        if child.failed and (child is failing[0] or child in to_first):
            yield from _tree(child, first, indent + "  ")
        else:
            yield _row(child, first, indent + "  ", folded=True)
    if rest := len(node.children) - len(shown) if shown else 0:
        others = len(failing) - sum(child.failed > 0 for child in shown)
        yield f"{'':45}{indent}  … {rest} more, " + (f"of which {others} fail" if others else "which pass" if rest > 1 else "which passes")


def _row(node: Node, first: Item | None, indent: str, folded: bool) -> str:
    item = node.worst
    figures = (item.error, node.local, item.floor, item.tolerance)
    error, local, floor, tolerance = (f"{'–' if math.isnan(figure) else format(figure, '.1e'):>8}" for figure in figures)
    ratio = f"{format(item.ratio, '.2f' if item.ratio < 1000 else '.1e') if item.floor > RATIO_FROM else '–':>7}"
    words = [indent + node.label.lstrip("./")]
    if node.children:
        words.append(f"({node.failed} of {len(node.items)} fail)" if node.failed else f"({len(node.items)} pass)")
    if node.children and folded:
        words.append(f"worst {item.name}")
    if not node.children and not item.passed:
        words.append("← first failure" if item is first else "← inherits" if item.inherited else "← fails")
    return f"{error} {local} {floor} {ratio} {tolerance}  {'  '.join(words)}"


def _assignments(case: CaseCheck) -> str:
    found = [item.comparison for item in case.items if isinstance(item.comparison, AssignmentComparison)]
    labels = [comparison.label for comparison in found]
    counts = ", ".join(f"{labels.count(label)} {label}" for label in ("same", "tie", "near-tie", "different") if label in labels)
    gaps = [comparison.gap / comparison.cost_noise for comparison in found if comparison.cost_noise]
    return counts + (f"; the smallest gap is {min(gaps):.1f} × the cost noise" if gaps else "")
