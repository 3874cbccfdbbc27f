"""JUnit XML of a check, for GitHub, GitLab, Jenkins and others: valid by the xUnit plugin's junit-10.xsd, which all of them read.

One suite for the stages, with a test for each; one suite for each case and dtype, with a test for each group of names of one module
(:func:`parity.report_tree.block`); and one last suite for what is judged over all cases. The file has a failure exactly where the check
fails.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from parity import compare
from parity.check import LEDGER, CaseCheck, Check, Item
from parity.report_text import SHOWN, heading, told, verdict
from parity.report_tree import block
from parity.stages import BROKEN, EMPTY, MEANINGS, PASSED

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_xml(check: Check) -> bytes:
    """The whole file, in UTF-8."""
    root = ET.Element("testsuites", name="parity-check")
    _stages(_add_suite(root, "stages"), check)
    for case in check.cases:
        root.append(_suite(case))
    for exemption in check.left_out:
        ET.SubElement(_test(_add_suite(root, exemption.name), exemption.name, "all"), "skipped", message=exemption.reason)
    _over_all_cases(_add_suite(root, "all cases"), check)
    for suite in root:
        tests = suite.findall("testcase")
        failures, skipped = (sum(test.find(tag) is not None for test in tests) for tag in ("failure", "skipped"))
        suite.attrib |= {"tests": str(len(tests)), "failures": str(failures), "errors": "0", "skipped": str(skipped)}
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.attrib[name]) for suite in root)))
    for element in root.iter():
        element.text = element.text and _NOT_XML.sub("\ufffd", element.text)
        for name, value in element.attrib.items():
            element.set(name, _NOT_XML.sub("\ufffd", value))
    ET.indent(root, " ")
    return ET.tostring(root, "utf-8", xml_declaration=True) + b"\n"


def _suite(case: CaseCheck) -> ET.Element:
    suite = ET.Element("testsuite", name=f"{case.case}.{case.dtype}")
    for group in LEDGER:
        blocks: dict[str, list[Item]] = {}
        for item in case.items:
            if item.group == group:
                blocks.setdefault(block(item), []).append(item)
        for name, items in blocks.items():
            test = _test(suite, f"{case.case}.{case.dtype}.{group}", name)
            if failed := [item for item in items if not item.passed]:
                _fail(test, failed, len(items))
            elif not any(item.judged for item in items):
                ET.SubElement(test, "skipped", message="not judged: there is no limit to the error in this dtype")
        compared = {item.name for items in blocks.values() for item in items}
        for exemption in case.exempted:
            if exemption.group == group and exemption.name not in compared:
                test = _test(suite, f"{case.case}.{case.dtype}.{group}", exemption.name)
                ET.SubElement(test, "skipped", message=f"exempted: {exemption.reason}")
    return suite


def _stages(suite: ET.Element, check: Check) -> None:
    """A stage that the model does not have is no test; one that only inherits its error is skipped, like one that was not judged."""
    for stage in check.stages:
        if stage.verdict == EMPTY:
            continue
        test = _test(suite, "stages", stage.name)
        if stage.verdict == BROKEN:
            message = f"{stage.failed} of {stage.judged} differ; first {stage.first}"
            ET.SubElement(test, "failure", type="mismatch", message=message)
        elif stage.verdict != PASSED:
            ET.SubElement(test, "skipped", message=f"{stage.verdict}: {MEANINGS[stage.verdict]}")


def _add_suite(root: ET.Element, name: str) -> ET.Element:
    return ET.SubElement(root, "testsuite", name=name)


def _test(suite: ET.Element, classname: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=classname, name=name)


def _fail(test: ET.Element, failed: Sequence[Item], judged: int) -> None:
    """Tells the first failures of a test with every figure."""
    details = [line for item in failed[:SHOWN] for line in (f"{item.group} '{item.name}'", *(f"  {line}" for line in told(item)))]
    if len(failed) > SHOWN:
        details.append(f"… and {len(failed) - SHOWN} more")
    first = next(told(failed[0]), "not compared")
    message = f"{len(failed)} of {judged} differ; first '{failed[0].name}': {first}"
    ET.SubElement(test, "failure", type="mismatch", message=message).text = "\n".join(details)


def _over_all_cases(suite: ET.Element, check: Check) -> None:
    ET.SubElement(suite, "system-out").text = "\n".join([*heading(check), *verdict(check)])
    test = _test(suite, "all cases", "median of error / floor over all taps")
    if not (check.cases and check.median_passed):
        message = f"got {check.median_ratio:.3f}, allowed {compare.MEDIAN_FACTOR}" if check.cases else "nothing was compared"
        ET.SubElement(test, "failure", type="mismatch", message=message).text = "\n".join(verdict(check))
