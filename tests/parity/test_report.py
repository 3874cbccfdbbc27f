"""The reports: what they say, that they are valid, and that nothing in a file can break out of them."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from parity import cli, compare, evidence, regression, report, report_figures, report_html, report_junit, report_text
from parity.check import LEDGER, Exemption, Item
from parity.report_tree import block, grow, share
from parity.tap_rules import Layout

from .breaks import run_broken, weight
from .made_checks import FAULTS, FINDING, ITEMS, NASTY, failing, item, passing, results, seen, with_items

SCHEMA = json.loads(report.SCHEMA.read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
CHECKS = {"passing": passing, "failing": failing, "empty": lambda: dataclasses.replace(passing(), cases=())}
MAKE = pytest.mark.parametrize("make", CHECKS.values(), ids=CHECKS)
FIRST = "backbone.res2.0.conv2#0"


def rows(check):
    """Of the tree in words: indentation, name and what is said of it."""
    found = []
    for line in report.text(check).splitlines():
        if match := re.fullmatch(r"  ((?: *(?:[\d.e+-]+|inf|–)){5}| {43})  ( *)(\S+|… .*?)(?:  (.+))?", line):
            found.append((len(match[2]) // 2, match[3], match[4] or ""))
    return found


# --- words


def test_a_passing_check_is_folded_and_ends_with_the_verdict():
    text = report.text(passing())
    assert text.splitlines()[-1] == "match: all 32 comparisons of 1 case in float32 and float64 hold; 4 more are told, not judged"
    found = rows(passing())
    assert found[:5] == [
        (0, "taps", "(9 pass)"),
        (1, "backbone", "(7 pass)  worst backbone.stem.conv1#0"),
        (1, "sem_seg_head.predictor#0[aux_outputs][0][pred_logits]", ""),
        (1, "images#0", ""),
        (0, "outputs", "(2 pass)  worst pred_logits"),
    ]
    assert "variables" not in [name for _, name, _ in found]  # their figures are those of their witnesses
    assert "fails" not in text
    assert "not checked: case batch: it has two images" in text.splitlines()


def test_the_worst_is_first_in_every_level_and_the_way_to_the_first_failure_is_open():
    found = rows(failing())
    start = found.index((0, "taps", "(3 of 9 fail)"))
    assert found[start : start + 11] == [
        (0, "taps", "(3 of 9 fail)"),
        (1, "backbone", "(3 of 7 fail)"),
        (2, "res2", "(3 of 6 fail)"),
        (3, "0", "(2 of 3 fail)"),  # what fails by itself is worse than what inherits its error, however large
        (4, "conv2#0", "← first failure"),
        (4, "conv3#0", "← inherits"),
        (4, "… 1 more, which passes", ""),
        (3, "1", "(1 of 3 fail)  worst backbone.res2.1.conv2#0"),
        (2, "… 1 more, which passes", ""),
        (1, "… 2 more, which pass", ""),
        (0, "outputs", "(1 of 2 fail)"),
    ]
    last = report.text(failing()).splitlines()[-1]
    assert last == f"mismatch: first in taps '{FIRST}' (case odd, float64); 8 of 38 comparisons fail, 2 inherit it: a bug"


def test_both_errors_are_beside_each_other_and_what_is_inherited_is_only_counted():
    lines = report.text(failing()).splitlines()
    [inherits] = [line for line in lines if line.endswith("← inherits")]
    assert inherits.split()[:2] == ["2.0e-03", "1.0e-07"]
    assert "    all of it arises here, or between the recorded taps and this one" in lines
    assert "  … and 2 that only inherit their error" in lines
    assert not [line for line in lines if line.startswith("  failed: taps 'backbone.res2.1")]


def test_stages_verdict_and_diagnosis_are_told_in_words():
    check = failing()
    lines = report.text(check).splitlines()
    rows = {
        found[1].strip(): [found[2], *found[3].split(maxsplit=2)]
        for line in lines
        if (found := re.match(r"([a-z -]{26}) (passed|broken|not recorded|not judged|nothing to judge) (.*)", line))
    }
    assert rows["normalise and pad"] == ["passed", "2", "0"]
    assert rows["backbone"] == ["broken", "16", "3", f"taps '{FIRST}'"]
    assert rows["assignment"][:3] == ["broken", "2", "1"]
    assert rows["clipped gradients"] == rows["optimizer step"] == ["not recorded", "0", "0"]
    assert rows["gradients"] == ["not judged", "0", "0"]  # in both dtypes there is no limit to the error
    assert "transformer" not in rows  # the model has none
    where = "'backbone.res2.0.conv2', or in what is computed between the recorded taps and it"
    assert f"  it arises in {where}; the tap before it is 'backbone.res2.0.conv1#0'" in lines
    assert f"bug: {check.verdict_reason}" in lines
    at = lines.index("diagnosis: conv2: kernel transposed; 1.3 → 2e-7")
    assert lines[at + 1].startswith("diagnosis: or <script>")
    assert not [line for line in report.text(passing()).splitlines() if line.startswith(("diagnosis", "bug"))]


def test_what_is_exempted_for_one_reason_is_one_line():
    for count, names in ((3, "'a0#0', 'a1#0', 'a2#0'"), (5, "'a0#0', 'a1#0', 'a2#0' and 2 more, which the other reports name")):
        exempted = tuple(Exemption("calls", f"a{index}#0", "nobody calls it") for index in range(count))
        lines = [line for line in report.text(passing(exempted=exempted)).splitlines() if "exempted:" in line]
        assert lines == [f"  exempted: calls {names}: nobody calls it"] * 2


def test_a_training_step_has_no_depth():
    check = passing()
    step = dataclasses.replace(check.cases[0], case="steps/plain", items=(item("steps", "1/weights/backbone.norm"),))
    with_step = dataclasses.replace(check, cases=(*check.cases, step))
    depths = [report_figures.error_along_depth(each).png for each in (check, with_step)]
    assert depths[0] == depths[1]
    assert "steps/plain (75×101 px), float32" in report.text(with_step)
    heights = [int.from_bytes(report_figures.histograms(each).png[20:24], "big") for each in (check, with_step)]
    assert heights[1] > 1.3 * heights[0]


def test_many_failures_are_few_lines_and_the_first_is_among_them():
    blocks = [item("taps", f"backbone.res4.{block}.conv1#0", 1e-3 * (block + 1)) for block in range(40)]
    check = passing(items=tuple(blocks))
    found = rows(check)
    assert len([row for row in found if "fails" in row[2] or "first" in row[2]]) == 2 * report_text.SHOWN + 1
    assert [name for _, name, words in found if words == "← first failure"] == ["0.conv1#0"]
    assert any("of which 34 fail" in name for _, name, _ in found)
    assert any("of which 35 fail" in name for _, name, _ in found)


def test_the_median_alone_can_fail():
    check = passing(items=tuple(item("taps", f"a.{index}#0", 1.2e-6) for index in range(3)))
    line, *_ = report_text.verdict(check)
    assert line == f"mismatch: the median of error / floor over the taps of all cases is 1.20, allowed {compare.MEDIAN_FACTOR}"
    assert report.text(check).splitlines()[-1] == line
    assert report_text.verdict(CHECKS["empty"]()) == ["mismatch: nothing was compared"]


def test_the_median_of_a_low_precision_is_not_judged_and_its_report_is_valid():
    check = passing(items=tuple(item("taps", f"a.{index}#0", 1.2e-6) for index in range(3)))
    for precision in ("bfloat16", "float32 with products in tf32"):
        settings = dataclasses.replace(check.settings, dtypes=(precision,))
        low, broken = (
            dataclasses.replace(one, settings=settings, cases=(dataclasses.replace(one.cases[1], dtype=precision),))
            for one in (check, failing())
        )
        assert (check.passed, low.passed, broken.passed) == (False, True, False)
        for one in (low, broken):
            VALIDATOR.validate(report.as_dict(one))


def test_colour_only_when_asked_for_and_never_from_files():
    check = with_items(passing(), [dataclasses.replace(FAULTS[0], note="\x1b[2J\x07")])
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", report.text(check))
    assert report.text(check, colour=True).splitlines()[-1].startswith("\x1b[31mmismatch")
    assert report.text(passing(), colour=True).splitlines()[-1].startswith("\x1b[32mmatch")


# --- tree


def test_every_item_is_in_the_tree_once_and_labels_are_names():
    def leaves(node, name):
        if not node.children:
            assert len(node.items) == 1
            yield name, node.items[0]
        for child in node.children:
            yield from leaves(child, name + child.label)

    for case in (*passing().cases, *failing().cases):
        for group in {each.group for each in case.items}:
            items = [each for each in case.items if each.group == group]
            found = list(leaves(grow(group, items), ""))
            assert sorted(name for name, _ in found) == sorted(each.name for each in items)
            assert all(each.name == name for name, each in found)


def test_a_module_and_what_is_below_it_are_apart():
    root = grow("taps", [item("taps", name) for name in ("a.b#0", "a.b#1", "a.b.c#0")])
    [node] = root.children
    assert (node.label, sorted(child.label for child in node.children)) == ("a.b", ["#0", "#1", ".c#0"])


def test_failures_come_before_whatever_passes():
    passes = item("taps", "b#0", 1.9e-6)
    for fails in (Item("taps", "a#0", False), item("taps", "a#0", 2.1e-6), dataclasses.replace(passes, name="a#0", passed=False)):
        assert [child.label for child in grow("taps", [passes, fails]).children] == ["a#0", "b#0"]
    assert share(Item("taps", "a#0", False)) == float("inf")


# --- JSON


def strict(schema):
    """Every object of the schema that describes what the report itself has names all of it."""
    if isinstance(schema, dict):
        if "properties" in schema:
            assert schema["additionalProperties"] is False
            assert set(schema["required"]) == set(schema["properties"])
        for inner in schema.values():
            strict(inner)
    elif isinstance(schema, list):
        for inner in schema:
            strict(inner)


def test_the_schema_is_a_schema_and_strict():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    strict(SCHEMA)
    assert SCHEMA["properties"]["version"] == {"const": report.VERSION}
    assert SCHEMA["properties"]["format"] == {"const": report.FORMAT}
    assert SCHEMA["$defs"]["group"]["enum"] == list(LEDGER)


@MAKE
def test_every_report_is_valid(make):
    found = json.loads(report.as_json(make()))
    jsonschema.validate(found, SCHEMA)
    assert found == report.as_dict(make()) == json.loads(json.dumps(found))
    assert found["passed"] is make().passed


def test_the_schema_notices_what_is_missing_new_or_of_another_kind():
    right = report.as_dict(failing())

    def places(value, path=()):
        yield path
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield from places(inner, (*path, key))

    # One item of each kind stands for all.
    right["cases"] = right["cases"][-1:]
    items = right["cases"][0]["items"]
    right["cases"][0]["items"] = list({item["comparison"] and tuple(item["comparison"]): item for item in items}.values())
    assert VALIDATOR.is_valid(right)
    free = ("provenance", "source", "versions", "threads", "ledger")
    seen = set()
    for path in places(right):
        kind = tuple(part for part in path if isinstance(part, str))
        if not path or kind in seen or set(kind[:-1]) & set(free):
            continue
        seen.add(kind)
        broken = copy.deepcopy(right)
        owner = broken
        for part in path[:-1]:
            owner = owner[part]
        owner[path[-1]] = [None]
        assert not VALIDATOR.is_valid(broken), path
        if isinstance(owner, dict):
            del owner[path[-1]]
            assert not VALIDATOR.is_valid(broken), path
    assert len(seen) > 60
    assert not VALIDATOR.is_valid(right | {"new": 1})


def test_the_ledger_tells_what_was_compared_without_a_judgement(written):
    check, _, page = written
    for row in report.as_dict(check)["cases"]:
        assert [name for name, count in row["ledger"]["gradients"].items() if count] == ["compared", "not judged"]
        for group, counts in row["ledger"].items():
            judged = counts["passed"] + counts["not judged"] + counts["failed"]
            assert judged == counts["compared"] + counts["no partner"] == sum(item["group"] == group for item in row["items"])
    assert "not judged" in page.words
    assert re.search(r"^ +compared +passed +not judged +failed +no partner +exempted$", report.text(check), re.M)


# --- JUnit

ATTRIBUTES = {
    "testsuites": ({"tests", "failures", "errors"}, {"name"}),
    "testsuite": ({"name", "tests", "failures", "errors"}, {"skipped"}),
    "testcase": ({"name"}, {"classname"}),
    "failure": (set(), {"type", "message"}),
    "skipped": (set(), {"message"}),
    "system-out": (set(), set()),
}
"""Of junit-10.xsd: required and optional attributes, as far as they are used."""
CHILDREN = {"testsuites": {"testsuite"}, "testsuite": {"testcase", "system-out"}, "testcase": {"failure", "skipped"}}


@MAKE
def test_junit_is_valid_and_fails_where_the_check_does(make):
    check = make()
    root = ET.fromstring(report_junit.as_xml(check))
    assert root.tag == "testsuites"
    for element in root.iter():
        required, optional = ATTRIBUTES[element.tag]
        assert required <= element.attrib.keys() <= required | optional
        assert {child.tag for child in element} <= CHILDREN.get(element.tag, set())
        assert len(element) <= 1 or element.tag != "testcase"
    for suite in root:
        tests = suite.findall("testcase")
        assert int(suite.get("tests")) == len(tests) > 0
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped"))
        names = [(test.get("classname"), test.get("name")) for test in tests]
        assert len(set(names)) == len(names)
    assert int(root.get("tests")) == len(list(root.iter("testcase")))
    assert int(root.get("failures")) == len(list(root.iter("failure")))
    assert (root.get("failures") == "0") is check.passed


def test_junit_has_a_suite_for_each_case_and_a_test_for_each_block():
    root = ET.fromstring(report_junit.as_xml(failing()))
    assert [suite.get("name") for suite in root] == ["stages", "odd.float32", "odd.float64", "batch", "all cases"]
    tests = {(test.get("classname"), test.get("name")): test for test in root[2].findall("testcase")}
    taps = [name for owner, name in tests if owner == "odd.float64.taps"]
    assert taps[:-1] == ["images", "backbone.stem", "backbone.res2.0", "backbone.res2.1", "sem_seg_head"]
    assert tests["odd.float64.taps", taps[-1]].find("skipped").get("message").startswith("exempted: nobody needs it <script>")
    failure = tests["odd.float64.taps", "backbone.res2.0"].find("failure")
    assert failure.get("message").startswith(f"2 of 3 differ; first '{FIRST}': error 3.00e-03, tolerance 2.00e-06")
    assert "actual 3.009, expected 3" in failure.text
    assert "taps 'backbone.res2.0.conv3#0'" in failure.text
    unjudged = {name: test.find("skipped").get("message") for (owner, name), test in tests.items() if owner == "odd.float64.gradients"}
    assert all(message.startswith("not judged: ") for message in unjudged.values())
    assert len(unjudged) == 2
    failed = {key for key, test in tests.items() if test.find("failure") is not None}
    assert {name for _, name in failed} == {"backbone.res2.0", "backbone.res2.1", "outputs", "final/0", "losses", "0"}
    assert root[3].find("testcase/skipped").get("message") == "it has two images"


def test_junit_has_a_test_for_each_stage():
    check = failing()
    check = dataclasses.replace(check, cases=tuple(dataclasses.replace(case, stopped="losses") for case in check.cases))
    stages = {test.get("name"): [child.tag for child in test] for test in ET.fromstring(report_junit.as_xml(check))[0]}
    assert list(stages)[:4] == ["environment self-test", "image reading and resize", "normalise and pad", "backbone"]
    assert "transformer" not in stages
    assert stages["backbone"] == stages["losses"] == ["failure"]
    assert stages["normalise and pad"] == stages["cost terms"] == []
    assert stages["optimizer step"] == ["skipped"]
    inherited = with_items(passing(), FAULTS[1:2])
    found = {
        name: ET.fromstring(report_junit.as_xml(inherited))[0].find(f"*[@name='{name}']/skipped").get("message")
        for name in ("backbone", "gradients", "optimizer step")
    }
    assert found["backbone"].startswith("inherits: ")
    assert found["gradients"].startswith("not judged: ")
    assert found["optimizer step"] == "not recorded: the reference has nothing to judge it by"


def test_junit_tells_a_median_that_is_too_large():
    check = passing(items=tuple(item("taps", f"a.{index}#0", 1.2e-6) for index in range(3)))
    root = ET.fromstring(report_junit.as_xml(check))
    [failure] = root.iter("failure")
    assert failure.get("message") == "got 1.200, allowed 1.1"


@pytest.mark.parametrize(
    ("group", "name", "expected"),
    [
        ("taps", "backbone.layers.3.blocks.1.attn.attn_drop#0", "backbone.layers.3.blocks.1"),
        ("taps", "sem_seg_head.pixel_decoder.layer_4.norm#0", "sem_seg_head.pixel_decoder.layer_4"),
        ("gradients", "sem_seg_head.predictor.mask_embed.layers.2.weight", "sem_seg_head.predictor.mask_embed.layers.2"),
        ("variables", "backbone.stem.conv1.norm.running_var", "backbone.stem.conv1.norm"),
        ("matcher", "final/1/cost_mask", "final/1"),
        ("inference", "0/resized/sem_seg", "0/resized"),
        ("losses", "loss_dice_3", "losses"),
    ],
)
def test_blocks(group, name, expected):
    assert block(Item(group, name, True)) == expected


# --- HTML


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects text, tags and addresses."""

    VOID = ("meta", "img", "br", "link", "input", "source")

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.addresses, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)


@pytest.fixture(scope="module", params=["passing", "failing"])
def written(request, tmp_path_factory):
    """The check, the folder with its reports, and the page."""
    check, folder = CHECKS[request.param](), tmp_path_factory.mktemp("report")
    report.write(check, folder)
    return check, folder, Page((folder / "report.html").read_text(encoding="utf-8"))


def test_all_files_are_written(written):
    check, folder, _ = written
    assert sorted(path.name for path in folder.iterdir()) == sorted(report.FILES)
    assert (folder / "error_along_depth.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report.txt").read_text(encoding="utf-8") == report.text(check) + "\n"


def test_the_page_needs_nothing_else(written):
    _, folder, page = written
    assert all(re.match("data:image/(png|jpeg);base64,", address) for address in page.addresses)
    assert len(page.addresses) >= 4
    assert {attributes.get("media") for tag, attributes in page.tags if tag == "source"} == {"(prefers-color-scheme: dark)"}
    assert not re.search(r"https?:|@import|url\(", (folder / "report.html").read_text(encoding="utf-8"))
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base"}


def test_text_of_files_is_escaped(written):
    _, _, page = written
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert any(NASTY.rstrip("\x07") in words for words in page.words)


def test_the_page_tells_everything(written):
    check, _, page = written
    words = "".join(page.words)
    assert words.index(report_text.verdict(check)[0]) < words.index("weights")  # the verdict is on top
    assert ("header", {"class": "passed" if check.passed else "failed"}) in page.tags
    for told in ("da3e60d85", "tf.matmul 4-D", "2.21.0", "nobody needs it", "it has two images", "no partner"):
        assert told in words
    for column, _ in report_html.COLUMNS:
        assert column in page.words
    leaves = [attributes for tag, attributes in page.tags if tag == "div" and attributes.get("class", "").startswith("row ")]
    assert len(leaves) - len(check.cases) == sum(len(case.items) for case in check.cases)
    if not check.passed:
        assert sum("failed" in attributes["class"] for attributes in leaves) == len(FAULTS) - 2
        assert sum("inherited" in attributes["class"] for attributes in leaves) == 2
        assert "actual 3.009, expected 3" in words


def test_each_row_of_the_tree_has_every_column(written):
    _, folder, _ = written
    rows = re.findall(
        r"<(?:div|summary) class=['\"]row .*?(?=</div>|</summary>)", (folder / "report.html").read_text(encoding="utf-8"), re.S
    )
    assert len(rows) > 40
    assert {len(re.findall(r"<span", row)) for row in rows} == {1 + len(report_html.COLUMNS)}


def test_the_page_has_stages_and_what_was_found(written):
    check, _, page = written
    boxes = [attributes["class"] for tag, attributes in page.tags if tag == "li" and "class" in attributes]
    assert boxes == [stage.verdict.replace(" ", "-") for stage in check.stages]
    words = "".join(page.words)
    assert f"{report_text.KINDS[check.verdict_kind]}: {check.verdict_reason}." in words
    assert (FINDING.statement in words) is not check.passed
    assert ("or in what is computed between the recorded taps and it" in words) is not check.passed
    assert ("Where errors arise" in words) is not check.passed


def test_what_there_is_to_see_is_shown(written):
    check, _, page = written
    images = [attributes.get("alt", "") for tag, attributes in page.tags if tag == "img"]
    drawings = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    overlays = [caption for caption in images if caption.startswith("0/panoptic_seg: ")]
    assert overlays[:2] == ["0/panoptic_seg: PyTorch", "0/panoptic_seg: TensorFlow"]
    if check.passed:
        assert overlays[2:] == ["0/panoptic_seg: no pixel differs"]
        assert drawings == []
    else:
        assert overlays[2:] == ["0/panoptic_seg: 0.333% of the pixels differ"]
        place = " at channel "
        assert [caption.split(place)[0] for caption in images if place in caption] == ["expected (PyTorch)", "actual (TensorFlow)"]
        assert "largest |actual − expected|, row × column" in images
        assert drawings == [
            *("actual against expected", "values", "|actual − expected|", "difference by channel"),
            *("actual against expected", "values", "|actual − expected|"),  # of a sampled tensor
        ]


def test_a_check_that_stops_before_the_network_is_reported(tmp_path):
    broken = passing(items=(item("preprocessing", "0/read/png", 0.5, floor=float("nan"), tolerance=0.0), *ITEMS[-1:]))
    case = dataclasses.replace(broken.cases[0], stopped="image reading and resize", evidence=seen())
    report.write(dataclasses.replace(broken, cases=(case,)), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"][:2] == ["expected (PyTorch)", "actual (TensorFlow)"]
    assert (
        (tmp_path / "report.txt").read_text(encoding="utf-8").splitlines()[-1].startswith("mismatch: first in preprocessing '0/read/png'")
    )


def test_the_page_stays_small(tmp_path):
    check = failing()
    case = check.cases[-1]
    names = [f"backbone.res2.{block}.conv1#0" for block in range(2 * report_html.SEEN)]
    large = np.random.default_rng(0).random((2, 1, 3, 300, 400))
    [one] = [evidence.evidence("taps", "x", *large, layout=Layout("BHWC", "BCHW"))]
    case = dataclasses.replace(
        case,
        items=tuple(item("taps", name, 1.0) for name in names),
        evidence=tuple(dataclasses.replace(one, name=name) for name in names),
        overlays=tuple(dataclasses.replace(results((1, 1)), name=f"{index}/sem_seg") for index in range(2 * report_html.OVERLAID)),
    )
    page = report_html.page(dataclasses.replace(check, cases=(case,)), [])
    assert page.count("with heat maps") == report_html.SEEN
    assert page.count(": TensorFlow</figcaption>") == report_html.OVERLAID
    assert f"… and {report_html.OVERLAID} more results" in page
    assert 1e5 < len(page) < 5e6


# --- CI and documentation

ROOT = Path(__file__).parents[2]


def test_ci_runs_the_verb_and_keeps_the_reports():
    workflow = (ROOT / ".github" / "workflows" / "parity-check.yml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"run: (.*)", workflow) == ["make parity-check"]
    [kept] = re.findall(r" path: (.*)", workflow)
    assert f"parity-check --ckpt parity-report/tf_ckpt --reference parity/traces/$(ENTRY) --report {kept}\n" in makefile
    assert "if: ${{ !cancelled() }}" in workflow


def test_the_guide_tells_what_is_written_and_the_rules_of_compare():
    guide = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w.]+)` \|", guide, re.M)) == set(report.FILES)
    assert f"[--factor {regression.FACTOR}]" in guide
    assert "3e-7 in float32, 1e-12 in float64" in guide
    assert regression.RESOLUTION == {"float32": 3e-7, "float64": 1e-12}


# --- a real check


def test_a_broken_port_is_reported_in_every_format(converted, tmp_path, monkeypatch, capsys):
    name, culprit = "tiny_per_pixel", "backbone.res3.0.conv2.norm"
    trace = Path(__file__).parents[1] / "golden" / name
    options = ("--dtype", "float64", "--no-gradients", "--report", str(tmp_path))
    code, found = run_broken(weight(f"{culprit}.bias", lambda value: value + 0.1), converted(name), trace, monkeypatch, capsys, *options)
    assert code == cli.MISMATCH
    jsonschema.validate(found, SCHEMA)
    assert found == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    root = ET.parse(tmp_path / "junit.xml").getroot()
    failures = {test.get("name"): test.find("failure") for test in root.iter("testcase") if test.get("classname") == "odd.float64.taps"}
    assert f"first '{culprit}#0'" in failures["backbone.res3.0"].get("message")
    assert failures["backbone.res2.2"] is None
    assert 2 * len(list(root.iter("testcase"))) < len(found["cases"][0]["items"])
    stages = {test.get("name"): [child.tag for child in test] for test in root[0]}
    assert (stages["normalise and pad"], stages["backbone"]) == ([], ["failure"])
    [finding] = found["findings"]
    assert culprit.startswith(finding["where"])
    for file in ("report.html", "report.txt"):
        assert f"{culprit}#0" in (tmp_path / file).read_text(encoding="utf-8")
