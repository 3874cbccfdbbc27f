"""A trace with a training: its first step is a part of the check, with stages, a ledger and a diagnosis of its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from parity import check, cli, judge, report, trajectory
from parity.check import CaseCheck, CheckError, Settings
from parity.stages import LEFT_OUT
from tfmaskformer.training import optimizer

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = "tiny_panoptic"
STEP = "steps/plain"


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """What was recorded of the same weights: cases, and below ``steps`` two trainings."""
    folder = tmp_path_factory.mktemp("with_steps") / "trace"
    shutil.copytree(GOLDEN / "selftest" / f"{MODEL}_0", folder)
    shutil.copytree(GOLDEN / "trajectory" / MODEL, folder / trajectory.FOLDER)
    return folder


@pytest.fixture
def settings(converted, trace):
    return Settings(str(converted(MODEL)), str(trace), ("float64",), mode="eager", gradients=True)


def test_a_right_step_is_judged_in_its_own_stages(settings):
    found = check.check(dataclasses.replace(settings, cases=("odd", STEP)))
    assert found.passed
    assert {stage.name: stage.verdict for stage in found.stages if stage.verdict != "passed"} == {}
    case, step = found.cases
    assert (step.case, step.dtype, step.samples, step.sizes_px) == (STEP, "float64", 8, ((64, 96), (75, 61)))
    with trajectory.open_training(Path(settings.reference) / "steps", "plain") as opened:
        recorded = [name for group, name in opened.reference.records if group in ("scalars", "steps") and name.startswith(("1/", "decay"))]
    ledger = step.ledger()
    assert ledger["clipped"]["passed"] == sum(name.startswith("1/clipped.each/") for name in recorded) > 100
    assert ledger["clipped"]["passed"] + ledger["steps"]["passed"] == len(recorded) == len(step.items)
    assert not case.ledger()["steps"]["compared"]
    stages = {stage.name: stage for stage in found.stages}
    assert stages["clipped gradients"].judged > ledger["clipped"]["passed"]
    assert stages["optimizer step"].judged > 3 * 100
    document = json.loads(report.as_json(found))
    jsonschema.validate(document, json.loads(report.SCHEMA.read_text(encoding="utf-8")))


def test_in_float32_what_is_made_of_gradients_is_told_but_not_judged(settings):
    found = check.check(dataclasses.replace(settings, dtypes=("float32",), cases=(STEP,)))
    assert found.passed
    [step] = found.cases
    judged = {item.name.split("/")[1] if "/" in item.name else item.name for item in step.items if item.judged}
    assert judged == {"decay", "lr", "losses", "assignment", "buffers"}
    assert {stage.name: stage.verdict for stage in found.stages if stage.name in LEFT_OUT} == {
        "gradients": "not judged",
        "clipped gradients": "not judged",
        "optimizer step": "passed",
    }


def test_a_wrong_step_is_named_and_explained(settings, monkeypatch, capsys):
    monkeypatch.setattr(optimizer, "_CLIP_EPSILON", 0.0)
    options = ["--dtype", "float64", "--mode", "eager", "--case", STEP]
    assert cli.main(["--ckpt", settings.checkpoint, "--reference", settings.reference, *options]) == cli.MISMATCH
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("mismatch: first in steps '1/clipped/backbone.weight'")
    assert f"(case {STEP}, float64)" in lines[-1]
    assert lines[-1].endswith(": a bug")
    verdicts = {line[:26].strip(): line[26:].split()[0] for line in lines if line[26:].startswith(" broken")}
    assert list(verdicts) == ["clipped gradients", "optimizer step"]
    assert [line for line in lines if line.startswith("diagnosis: steps/clipped: ")]


@pytest.mark.parametrize(
    ("stopped", "all_stages", "reached"),
    [("", False, True), ("losses", False, False), ("losses", True, True), ("gradients", False, False), ("post-processing", False, True)],
)
def test_a_step_is_only_judged_where_nothing_before_it_is_broken(stopped, all_stages, reached, settings, monkeypatch):
    def case(*arguments):
        yield CaseCheck("odd", "float64", (), None, (judge.Item("losses", "total", not stopped),), (), stopped=stopped)

    asked = []

    def step(settings, name, dtype):
        asked.append((name, dtype))
        return CaseCheck(name, dtype, (), None, (judge.Item("clipped", "1/clipped.each/x", True),), ())

    monkeypatch.setattr("tfmaskformer.checkpoint.load", lambda *_: None)
    monkeypatch.setattr(check, "_check_batch", case)
    monkeypatch.setattr(check, "_check_step", step)
    found = check.check(dataclasses.replace(settings, cases=("odd", STEP), all_stages=all_stages))
    assert asked == [(STEP, "float64")] * reached
    verdict = {stage.name: stage.verdict for stage in found.stages}["clipped gradients"]
    assert verdict == ("passed" if reached else "not judged")


def test_which_steps_are_judged_and_why_others_are_not(settings):
    both = ("steps/plain", "steps/dropout")
    assert check._trainings(settings) == both
    assert check._trainings(dataclasses.replace(settings, port="p.py")) == ()
    assert check._select_trainings(settings, both) == (both, ())
    assert check._select_trainings(dataclasses.replace(settings, cases=("odd", STEP)), both) == ((STEP,), ())
    for changes, reason in (({"padding": "masked"}, "official padding"), ({"gradients": False}, "asked to leave gradients out")):
        names, left_out = check._select_trainings(dataclasses.replace(settings, **changes), both)
        assert (names, tuple(one.name for one in left_out)) == ((), both)
        assert all(one.group == "steps" and reason in one.reason for one in left_out)
    with pytest.raises(CheckError, match=r"has no case steps/other; it has .*, steps/plain, steps/dropout"):
        check.check(dataclasses.replace(settings, cases=("steps/other",)))


def test_a_training_of_other_weights_is_refused(settings, trace, tmp_path):
    shutil.copytree(trace, tmp_path / "trace", ignore=shutil.ignore_patterns("steps"))
    shutil.copytree(GOLDEN / "trajectory" / "tiny_swin", tmp_path / "trace" / "steps")
    with pytest.raises(CheckError, match=r"(?s)other weights: .*'steps/.*' started from"):
        check.check(dataclasses.replace(settings, reference=str(tmp_path / "trace")))
    arguments = ["--ckpt", settings.checkpoint, "--reference", str(tmp_path / "trace")]
    assert cli.main(arguments) == cli.BAD_INPUT
