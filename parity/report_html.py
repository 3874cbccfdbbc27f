"""A check as one page of HTML that needs nothing else: no network, no other file; the pictures are inside.

All text that comes from files (names, notes, reasons, provenance) is escaped. The browser folds; the script only opens and closes. The
page is light or dark as the reader's system is, and so are its pictures.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from parity import compare, report_evidence
from parity.check import LEDGER, CaseCheck, Check, Item
from parity.evidence import Evidence, Overlay
from parity.report_figures import Picture
from parity.report_text import KINDS, RATIO_FROM, facts, place, title, told, verdict
from parity.report_tree import Node, grow, share
from parity.stages import MEANINGS, PASSED

TOLD = 20
"""Failures of a case that are told in words; the tree has all."""

SEEN, OVERLAID, RANKED = 12, 8, 20
"""Tensors of which there are heat maps, results that are laid over photographs, and places in the ranked list, at most."""

COLUMNS: tuple[tuple[str, str], ...] = (
    ("error", "relative L2 error against the official model in float64"),
    ("local", "the largest error below that arises there and is not inherited"),
    ("floor", "largest error of the official runs"),
    ("ratio", "error / floor"),
    ("tolerance", "what is allowed"),
    ("of tolerance", "error / tolerance"),
)
"""Name and meaning of the columns of the tree; :func:`_figures` fills them."""


def page(check: Check, pictures: Sequence[Picture]) -> str:
    """The page.

    Args:
        check: what to tell.
        pictures: shown in their order, above the tables.
    """
    line = verdict(check)[0]
    told_in_short = [finding.statement for finding in check.findings[:1]]
    state = "passed" if check.passed else "failed"
    body = [
        f"<header class={state}><h1>{escape(line)}</h1>",
        *(f"<p>{escape(statement)}</p>" for statement in told_in_short),
        f"<p>parity-check of <b>{escape(check.settings.checkpoint)}</b> against <b>{escape(check.settings.reference)}</b></p></header>",
        _section("Stages", _stages(check)),
        _section("Diagnosis", _diagnosis(check)),
        _section("What was compared", [_table(("", ""), facts(check), "facts")]),
        _section("Cases", _cases(check)),
        _section("Failures", _failures(check)),
        _section("Results on the photographs", _results(check)),
        _section("Errors", map(_picture, pictures)),
        _section("Where errors arise", _ranked(check)),
        _section("Layers", _layers(check)),
        _section("Ledger", _ledger(check)),
        _section("Environment and provenance", _environment(check)),
    ]
    return _PAGE.format(title=escape(f"{state}: {check.settings.checkpoint}"), style=_STYLE, body="\n".join(body), script=_SCRIPT)


def _section(heading: str, lines: Iterable[str]) -> str:
    """Nothing where there are no lines."""
    inner = "\n".join(lines)
    return f"<section><h2>{heading}</h2>\n{inner}\n</section>" if inner else ""


def _stages(check: Check) -> Iterator[str]:
    """A box for each stage, in the order of computation; what it is about on hovering."""
    yield "<ol class=stages>"
    for stage in check.stages:
        words = [stage.verdict] if stage.verdict != PASSED else []
        words += [f"{stage.failed} of {stage.judged} fail" if stage.failed else f"{stage.judged}"] if stage.judged else []
        hints = filter(None, (MEANINGS.get(stage.verdict), stage.first and f"first {stage.first}"))
        hint = "; ".join([*hints, *(f"not judged: {case}" for case in stage.not_judged)])
        kind = stage.verdict.replace(" ", "-")
        yield f'<li class="{kind}" title="{escape(hint)}"><b>{escape(stage.name)}</b><small>{escape(", ".join(words))}</small></li>'
    yield "</ol>"


def _diagnosis(check: Check) -> Iterator[str]:
    """Noise or bug, and what brings the first local failure down to the floor."""
    yield f"<p><b class={check.verdict_kind}>{escape(KINDS[check.verdict_kind])}</b>: {escape(check.verdict_reason)}.</p>"
    for finding in check.findings:
        cause = f"<b>{escape(finding.cause)}</b> " if finding.cause else ""
        yield f"<p class=finding>{cause}{escape(finding.statement)}</p>"
        if finding.others:
            yield "<ul>" + "".join(f"<li>{escape(other)}</li>" for other in finding.others) + "</ul>"


def _cases(check: Check) -> Iterator[str]:
    rows = []
    for case in check.cases:
        worst = max((item for item in case.items if not math.isnan(item.error)), key=share, default=None)
        sizes = ", ".join(f"{height}×{width} px" for height, width in case.sizes_px)
        median = _number(case.median_ratio, ".4g") if case.dtype == "float32" else "–"
        result = "match" if case.passed else f"{sum(not item.passed for item in case.items)} of {len(case.items)} differ"
        nearest = f"{worst.group} {worst.name}: {_number(share(worst), '.3g')}" if worst else "–"
        rows.append((case.case, case.dtype, sizes, result, median, nearest))
    heads = (
        "case",
        "dtype",
        "images",
        "result",
        f"median error / floor (allowed for all: {compare.MEDIAN_FACTOR})",
        "largest error / tolerance",
    )
    yield _table(heads, rows)


def _failures(check: Check) -> Iterator[str]:
    """In words, with what there is to see; the first of all is open."""
    first = check.first_failure
    seen = 0
    for case in check.cases:
        failures = case.own_failures or case.failures
        if failures:
            yield f"<h3>{escape(title(case))}</h3>"
        for item in failures[:TOLD]:
            found = _evidence(case, item)[: max(SEEN - seen, 0)]
            seen += len(found)
            state = " open" if first and item is first[1] else ""
            yield f"<details{state}><summary>{escape(item.group)} <b>{escape(item.name)}</b>{_hint(found)}</summary>"
            where = place(case, item) if first and item is first[1] else ()
            yield "<pre>" + escape("\n".join((*told(item), *where))) + "</pre>"
            for each in found:
                yield from report_evidence.figure_of(each)
            yield "</details>"
        if len(failures) > TOLD:
            yield f"<p>… and {len(failures) - TOLD} more, in the order of computation; the tree below has all.</p>"
        if inherited := len(case.failures) - len(failures):
            yield f"<p>… and {inherited} that only inherit their error: computed of recorded inputs they are right.</p>"
        if case.stopped:
            yield f"<p>Not judged: what comes behind <b>{escape(case.stopped)}</b>, which is broken. --all-stages judges it too.</p>"


def _evidence(case: CaseCheck, item: Item) -> list[Evidence]:
    return [found for found in case.evidence if (found.group, found.name) == (item.group, item.name)]


def _hint(found: Sequence[Evidence]) -> str:
    return " <small>with heat maps</small>" if found and found[0].error.size else " <small>with plots</small>" if found else ""


def _results(check: Check) -> Iterator[str]:
    """Of every image of every case: in the dtype in which most differs, else the first. What differs comes first."""
    chosen: dict[tuple[str, str], tuple[CaseCheck, Overlay]] = {}
    for case in check.cases:
        for overlay in case.overlays:
            key = (case.case, overlay.name)
            if key not in chosen or overlay.share > chosen[key][1].share:
                chosen[key] = case, overlay
    ordered = sorted(chosen.values(), key=lambda pair: not pair[1].share)
    for case, overlay in ordered[:OVERLAID]:
        yield f"<h3>{escape(case.case)}, {escape(case.dtype)}</h3>"
        yield from report_evidence.results_of([overlay])
    if len(ordered) > OVERLAID:
        yield f"<p>… and {len(ordered) - OVERLAID} more results, with no larger difference.</p>"


def _ranked(check: Check) -> Iterator[str]:
    """Taps by their local error in units of what is allowed, the largest first; nothing where no local errors were taken."""
    rows = [
        (item.local / item.tolerance if item.tolerance else item.local, case, item)
        for case in check.cases
        for item in case.items
        if item.group == "taps" and not math.isnan(item.local)
    ]
    rows.sort(key=lambda row: -row[0])
    if rows:
        yield "<p>By the part of the error that arises there, or in what is computed between the recorded taps and it. "
        yield "What is only inherited is small here.</p>"
        heads = ("tap", "case", "dtype", "local error", "error", "allowed", "local / allowed")
        cells = [
            (item.name, case.case, case.dtype, _number(item.local), _number(item.error), _number(item.tolerance), format(times, ".3g"))
            for times, case, item in rows[:RANKED]
        ]
        yield _table(heads, cells)


def _picture(picture: Picture) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (picture.png, picture.dark))
    caption = escape(picture.caption)
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<figure><picture>{source}<img alt="{caption}" src="{light}"></picture><figcaption>{caption}</figcaption></figure>'


def _layers(check: Check) -> Iterator[str]:
    heads = "".join(f'<span title="{escape(meaning)}">{escape(name)}</span>' for name, meaning in COLUMNS)
    buttons = (("failed", "open what fails"), ("all", "open all"), ("none", "close all"))
    yield "<p>" + "\n".join(f"<button data-open={what}>{words}</button>" for what, words in buttons)
    yield "Each row of a module has the figures of the worst below it. The worst is first.</p>"
    for case in check.cases:
        state = "open" if not case.passed else ""
        yield f"<details class=case {state}><summary><h3>{escape(title(case))}</h3></summary>"
        if case.local:
            yield f"<p>Local errors are not known: {escape(case.local)}.</p>"
        yield "<div class=tree>"
        yield f"<div class='row head'><span>name</span>{heads}</div>"
        for group in LEDGER:
            items = [item for item in case.items if item.group == group]
            if items:
                yield from _node(grow(group, items))
        yield "</div></details>"


def _node(node: Node, depth: int = 0) -> Iterator[str]:
    name = escape(node.label.lstrip("./") if depth else node.label)
    state = ("inherited" if all(item.passed or item.inherited for item in node.items) else "failed") if node.failed else "passed"
    if not node.children:
        hint = escape("\n".join(told(node.worst)))
        yield f'<div class="row {state}" title="{hint}"><span style="--depth:{depth}">{name}</span>{_figures(node)}</div>'
        return
    count = f"{node.failed} of {len(node.items)} fail" if node.failed else f"{len(node.items)} pass"
    yield f"<details class={state}{' open' * (node.failed > 0 and depth < 2)}><summary class='row {state}'>"
    yield f"<span style='--depth:{depth}'>{name} <small>{count}</small></span>{_figures(node)}</summary>"
    for child in node.children:
        yield from _node(child, depth + 1)
    yield "</details>"


def _figures(node: Node) -> str:
    """The cells of :data:`COLUMNS`."""
    item = node.worst
    ratio = _number(item.ratio, ".3g") if item.floor > RATIO_FROM else "–"
    numbers = [*(_number(figure) for figure in (item.error, node.local, item.floor)), ratio, _number(item.tolerance)]
    cells = "".join(f"<span>{number}</span>" for number in numbers)
    filled = share(item)
    if filled < 0 or math.isnan(item.error):
        return f"{cells}<span>–</span>"
    return f"{cells}<span class=bar style='--share:{min(filled, 1):.3f}'>{filled:.3g}</span>"


def _number(value: float, form: str = ".1e") -> str:
    return "–" if math.isnan(value) else format(value, form)


def _ledger(check: Check) -> Iterator[str]:
    rows = []
    for case in check.cases:
        for group, counts in case.ledger().items():
            rows.append((case.case, case.dtype, group, *counts.values()))
    if rows:
        yield _table(("case", "dtype", "group", *next(iter(check.cases[0].ledger().values()))), rows)
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for case in check.cases:
        for exemption in case.exempted:
            reasons.setdefault((exemption.group, exemption.name, exemption.reason), []).append(f"{case.case} {case.dtype}")
    exempted = [(*exemption, ", ".join(where)) for exemption, where in reasons.items()]
    exempted += [(left.group, left.name, left.reason, "not checked") for left in check.left_out]
    if exempted:
        yield "<h3>Exempted, by exact name</h3>" + _table(("group", "name", "reason", "where"), exempted)


def _environment(check: Check) -> Iterator[str]:
    environment = check.environment
    probes = [
        (probe.name, _number(probe.error), "right" if probe.passed else "WRONG", "yes" if probe.used else "no: it is avoided")
        for probe in environment.probes
    ]
    yield "<h3>Self-test: operations against NumPy in float64</h3>"
    yield _table(("operation", "relative error", "", "used by the model"), probes)
    for heading, values in (
        ("Settings", vars(check.settings)),
        ("Environment", {name: value for name, value in vars(environment).items() if name != "probes"}),
        ("Converted from", check.source),
        ("Provenance of the trace", check.provenance),
    ):
        values_json = json.dumps(values, indent=1, ensure_ascii=False, default=str)
        yield f"<details><summary>{heading}</summary><pre>{escape(values_json)}</pre></details>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    lines = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    top = f"<thead><tr>{head}</tr></thead>" if any(heads) else ""
    return f'<table class="{kind}">{top}<tbody>' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</tbody></table>"


_STYLE = """
:root { color-scheme: light dark;
  --ground: #fff; --raised: #f5f7f9; --ink: #1c2126; --faint: #5a636e; --line: #dfe3e8; --thin: #eef0f3; --hover: #eef3f9;
  --green: #1b7f3b; --good: #1b9e4b; --crimson: #c1272d; --red: #c1272d; --amber: #b26a00; --blue: #2f7ed8; --bar: #a9cbee;
  --badbar: #f0a7a9; --amberbar: #f3d3a2; --grey: #c3cad2; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14181d; --raised: #1d232a; --ink: #dde3ea; --faint: #9aa5b1; --line: #333c46; --thin: #232a32; --hover: #222b35;
  --green: #1f6f3a; --good: #4cc07a; --crimson: #8f2329; --red: #f0696f; --amber: #e0a040; --blue: #6cb0f5; --bar: #2c5480;
  --badbar: #7c3438; --amberbar: #6b4d1c; --grey: #4a5560; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 1320px; margin: 0 auto;
  padding: 0 16px 48px; }
header { color: #fff; padding: 14px 20px; border-radius: 0 0 8px 8px; overflow-wrap: anywhere; }
header.passed { background: var(--green); } header.failed { background: var(--crimson); }
header h1 { font-size: 19px; margin: 0 0 6px; } header p { margin: 6px 0 0; }
h2 { font-size: 17px; margin: 28px 0 8px; border-bottom: 2px solid var(--line); padding-bottom: 4px; }
h3 { font-size: 14px; margin: 14px 0 6px; } summary h3 { display: inline; }
pre { margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 12px/1.5 ui-monospace, monospace; }
section pre { background: var(--raised); padding: 8px 12px; border-radius: 4px; }
table { border-collapse: collapse; margin: 8px 0; } table.facts td:first-child { font-weight: 600; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 600; } td { font-variant-numeric: tabular-nums; }
figure { margin: 12px 0 20px; } img { max-width: 100%; } figcaption, small { color: var(--faint); font-weight: 400; }
summary { cursor: pointer; }
.figures { display: flex; flex-wrap: wrap; gap: 12px 26px; align-items: flex-end; } .figures figure { margin: 6px 0; max-width: 420px; }
.results { align-items: flex-start; }
.figures figcaption { font-size: 12px; overflow-wrap: anywhere; } .figures b { display: block; font-size: 12px; font-weight: 600; }
.map { image-rendering: pixelated; display: block; max-width: none; }
.scale { display: flex; gap: 6px; font: 11px ui-monospace, monospace; color: var(--faint); margin: 3px 0; }
.scale i { flex: 1; border-radius: 2px; }
.stages { list-style: none; display: flex; flex-wrap: wrap; gap: 6px; padding: 0; margin: 8px 0; }
.stages li { border: 1px solid var(--line); border-left: 5px solid var(--grey); border-radius: 4px; padding: 3px 10px; min-width: 120px; }
.stages b, .stages small { display: block; font-size: 12px; } .stages .passed { border-left-color: var(--good); }
.stages .broken { border-left-color: var(--red); background: var(--raised); } .stages .broken b { color: var(--red); }
.stages .inherits { border-left-color: var(--amber); }
.stages .not-judged, .stages .not-recorded, .stages .nothing-to-judge { opacity: .65; }
.finding { background: var(--raised); border-left: 5px solid var(--blue); padding: 8px 14px; border-radius: 4px; }
b.bug { color: var(--red); } b.noise { color: var(--amber); } b.match { color: var(--good); }
svg { background: var(--raised); display: block; } svg text { font: 10px ui-monospace, monospace; fill: var(--faint); }
svg circle { fill: var(--blue); fill-opacity: .6; } svg .axis { stroke: var(--faint); stroke-width: 1; } svg .old { fill: var(--grey); }
svg .new { fill: var(--blue); } svg polyline { fill: none; stroke: var(--blue); stroke-width: 1.5; }
.case { margin: 8px 0; }
.tree { font: 12px/1.6 ui-monospace, monospace; overflow-x: auto; }
.row { display: grid; grid-template-columns: minmax(340px, 1fr) repeat(5, 80px) 100px; min-width: 860px;
  border-bottom: 1px solid var(--thin); }
.row > span { text-align: right; } .row > span:first-child { text-align: left; padding-left: calc(var(--depth, 0) * 18px + 16px);
  overflow-wrap: anywhere; }
.tree summary { list-style: none; } .tree summary > span:first-child::before { content: "▸ "; margin-left: -14px; }
.tree details[open] > summary > span:first-child::before { content: "▾ "; }
.tree .row:hover { background: var(--hover); }
.head { color: var(--faint); font-weight: 600; position: sticky; top: 0; background: var(--ground); }
.failed > span:first-child { color: var(--red); font-weight: 600; } .inherited > span:first-child { color: var(--amber); }
.bar { background: linear-gradient(var(--bar), var(--bar)) left / calc(var(--share) * 100%) 84% no-repeat; margin-left: 10px; }
.inherited > .bar { background-image: linear-gradient(var(--amberbar), var(--amberbar)); }
.failed > .bar { background-image: linear-gradient(var(--badbar), var(--badbar)); }
button { font: inherit; padding: 2px 10px; }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("button[data-open]")) button.addEventListener("click", () => {
  for (const node of document.querySelectorAll(".tree details"))
    node.open = button.dataset.open === "all" || (button.dataset.open === "failed" && node.classList.contains("failed"));
});
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>parity-check {title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
