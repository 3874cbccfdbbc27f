"""Two runs compared: every change is told, what is worse is a regression, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from parity import cli, compare, regression, report
from parity.check import Item, Settings

from .made_checks import ITEMS, failing, item, passing, with_items

TAP = "backbone.stem.conv1#0"


def found(before, after, **options):
    return regression.regression(report.as_dict(before), report.as_dict(after), ("A", "B"), **options)


def grown(times, *, dtype="float32", error=5e-7, **options):
    """One tap's error in two runs; tolerances are far away."""
    before, after = (with_items(passing(), [item("taps", TAP, value, tolerance=1.0)], dtype) for value in (error, times * error))
    return found(before, after, **options)


def test_the_same_run_twice_is_no_regression():
    for check in (passing(), failing()):
        result = found(check, check)
        assert not result.regressed
        assert [value for name, value in vars(result).items() if name not in ("before", "after", "factor", "verdicts")] == [*[()] * 6, {}]
        assert regression.text(result).splitlines()[-1].startswith("no regression: ")


def test_what_newly_fails_is_a_regression_and_what_newly_passes_is_none():
    worse, better = found(passing(), failing()), found(failing(), passing())
    names = {(each.group, each.name) for case in failing().cases for each in case.failures}
    assert {(change.key.group, change.key.name) for change in worse.newly_failing} == names
    assert {(change.key.group, change.key.name) for change in better.newly_passing} == names
    assert {change.key.dtype for change in worse.newly_failing} == {"float64"}
    assert (worse.regressed, better.regressed) == (True, False)
    assert (worse.newly_passing, worse.grown, better.newly_failing, better.grown) == ((), (), (), ())
    assert "newly passes: 8" in regression.text(better)
    assert "  odd float64 taps 'backbone.res2.0.conv2#0': error 2.00e-07 → 3.00e-03" in regression.text(worse).splitlines()


@pytest.mark.parametrize(("factor", "regressed"), [(1.0, False), (1.49, False), (1.51, True), (40, True), (0.1, False)])
def test_errors_may_grow_by_the_factor(factor, regressed):
    result = grown(factor)
    assert result.regressed is regressed
    assert [str(change.key) for change in result.grown] == [f"odd float32 taps '{TAP}'"] * regressed
    assert (result.newly_failing, result.vanished, result.appeared) == ((), (), ())


def test_the_factor_can_be_chosen_and_is_told():
    assert not grown(1.9, factor=2).regressed
    assert "error grew by more than 2 ×: 1" in regression.text(grown(2.1, factor=2))
    assert regression.FACTOR == 1.5 == compare.FLOOR_FACTOR


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_last_bits_may_grow(dtype):
    resolution = regression.RESOLUTION[dtype]
    assert not grown(10, dtype=dtype, error=resolution / 11).regressed
    assert grown(10, dtype=dtype, error=resolution / 9).regressed


@pytest.mark.parametrize("precision", ["bfloat16", "float32 with products in tf32"])
def test_reports_of_a_low_precision_are_compared_with_the_resolution_of_float32(precision):
    def at(error):
        check = with_items(passing(), [item("taps", TAP, error, tolerance=1.0)], "float32")
        return dataclasses.replace(check, cases=(dataclasses.replace(check.cases[0], dtype=precision),))

    resolution = regression.RESOLUTION["float32"]
    assert not found(at(resolution / 11), at(resolution / 1.1)).regressed
    result = found(at(resolution / 9), at(resolution * 1.1))
    assert [str(change.key) for change in result.grown] == [f"odd {precision} taps '{TAP}'"]


def test_from_nothing_to_something_is_an_infinite_factor():
    before, after = (with_items(passing(), [item("taps", TAP, error, tolerance=1.0)]) for error in (0.0, 1e-6))
    assert [change.factor for change in found(before, after).grown] == [math.inf]


def test_what_has_no_limit_cannot_regress():
    old = next(each for each in ITEMS if each.group == "gradients")
    before, after = passing(), with_items(passing(), [item(old.group, old.name, 100 * old.error, tolerance=math.inf)], "float32")
    assert not found(before, after).regressed


def test_the_worst_growth_is_first_and_long_lists_are_cut():
    errors = [(1e-6 * (1 + index), index) for index in range(30)]
    before = passing(items=tuple(item("taps", f"a.{index}#0", 1e-6, tolerance=1) for _, index in errors))
    after = passing(items=tuple(item("taps", f"a.{index}#0", error, tolerance=1) for error, index in errors))
    result = found(before, after)
    assert [change.key.name for change in result.grown[:3]] == ["a.29#0", "a.29#0", "a.28#0"]
    assert len(result.grown) == 2 * 29
    assert f"  … and {58 - regression.SHOWN} more; --json has all" in regression.text(result).splitlines()


def test_what_vanished_is_a_regression_and_what_appeared_only_where_it_fails():
    less = passing(items=ITEMS[1:])
    result = found(passing(), less)
    assert [str(key) for key in result.vanished] == ["odd float32 taps 'images#0'", "odd float64 taps 'images#0'"]
    assert result.regressed
    assert regression.verdict(result) == "regression: 2 vanished"
    more = found(less, passing())
    assert more.appeared == result.vanished
    assert not more.regressed
    fails = Item("taps", "old#0", False)
    new = found(passing(items=(*ITEMS, fails)), passing(items=(*ITEMS, fails, Item("taps", "new#0", False))))
    assert [key.name for key in new.appeared_failing] == ["new#0"] * 2
    assert new.regressed
    assert "  odd float32 taps 'new#0': fails" in regression.text(new).splitlines()


def test_a_case_that_vanished_is_a_regression():
    check = passing()
    result = found(check, dataclasses.replace(check, cases=check.cases[:1]))
    assert len(result.vanished) == len(ITEMS)
    assert result.regressed


def test_a_median_that_newly_fails_is_a_regression():
    before, after = (passing(items=tuple(item("taps", f"a.{index}#0", error) for index in range(3))) for error in (1e-6, 1.2e-6))
    result = found(before, after)
    assert result.regressed
    assert regression.verdict(result) == "regression: the check as a whole passed before and fails now"


def test_other_surroundings_are_told_and_are_no_regression():
    check = passing()
    environment = dataclasses.replace(check.environment, versions={"python": "3.12", "tensorflow": "2.21.0", "numpy": "2.4"})
    other = dataclasses.replace(
        passing(settings=Settings("tf_ckpt", "trace", mode="xla")), environment=environment, source={"sha256": "cd" * 32}, provenance={}
    )
    result = found(check, other)
    assert result.environment["environment.versions.python"] == ('"3.11"', '"3.12"')
    assert result.environment["environment.versions.numpy"] == ("nothing", '"2.4"')
    assert result.environment["settings.mode"] == ('"graph"', '"xla"')
    assert {"source.sha256", "source.file", "provenance.config", "provenance.commits.maskformer"} <= result.environment.keys()
    assert "environment.versions.tensorflow" not in result.environment
    assert not result.regressed
    assert '  settings.mode: "graph" → "xla"' in regression.text(result).splitlines()


def test_names_of_files_cannot_steer_the_terminal():
    result = found(passing(items=()), passing(items=(item("taps", "x\x1b[2J#0", 1.0),)))
    assert "\x1b" not in regression.text(result)
    assert len(result.appeared_failing) == 2


# --- the command


@pytest.fixture
def files(tmp_path):
    """Reports of a passing and a failing check."""
    for name, check in (("A", passing()), ("B", failing())):
        (tmp_path / f"{name}.json").write_text(report.as_json(check), encoding="utf-8")
    return tmp_path / "A.json", tmp_path / "B.json"


def run(capsys, *arguments):
    code = cli.main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_exit_codes_and_output(files, capsys, tmp_path):
    good, bad = files
    code, out, err = run(capsys, good, bad)
    assert (code, err) == (cli.MISMATCH, "")
    assert out.splitlines()[-1] == "regression: 8 newly fail"
    code, out, _ = run(capsys, bad, good, "--json", tmp_path / "out.json")
    assert code == cli.MATCH
    assert out.splitlines()[0] == f"before  {bad}"
    told = json.loads((tmp_path / "out.json").read_text())
    assert (told["regressed"], told["factor"], len(told["newly_passing"])) == (False, 1.5, 8)


def test_json_has_everything(files, capsys):
    code, out, _ = run(capsys, *files, "--json", "-", "--factor", "3")
    assert code == cli.MISMATCH
    told = json.loads(out)
    assert told["newly_failing"][0] == {
        "case": "odd", "dtype": "float64", "group": "taps", "name": "backbone.res2.0.conv2#0", "before": 2e-7, "after": 3e-3,
    }  # fmt: skip
    assert told["factor"] == 3
    assert {change["after"] for change in told["newly_failing"] if change["name"] == "pred_logits"} == {"nan"}
    assert {field.name for field in dataclasses.fields(regression.Regression)} | {"regressed", "verdict"} == told.keys()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("[]", "is no report"),
        ('{"format": "tfmaskformer-trace"}', "is no report"),
        (json.dumps({"format": report.FORMAT, "version": 99}), "has report version 99, expected 1 or 2"),
        (json.dumps({"format": report.FORMAT, "version": 1}), "is damaged: KeyError('passed')"),
        (json.dumps({"format": report.FORMAT, "version": 1, "passed": True, "cases": 3}), "is damaged: TypeError"),
        (json.dumps({"format": report.FORMAT, "version": 1, "passed": True, "cases": [{"dtype": 32}]}), "is damaged: TypeError"),
    ],
)
def test_bad_input_exits_2(files, capsys, tmp_path, content, told):
    path = tmp_path / "C.json"
    if content is not None:
        path.write_text(content)
    for names in ((files[0], path), (path, files[0])):
        code, out, err = run(capsys, *names, "--json", tmp_path / "out.json")
        assert (code, out) == (cli.BAD_INPUT, "")
        assert err.startswith("error: ")
        assert told in err
        assert str(path) in err
        assert not (tmp_path / "out.json").exists()


def test_where_json_cannot_be_written(files, capsys, tmp_path):
    for place in (tmp_path / "nowhere" / "x.json", tmp_path):
        code, out, err = run(capsys, *files, "--json", place)
        assert (code, out) == (cli.BAD_INPUT, "")
        assert err.startswith(f"error: cannot write '{place}'")
    code, out, err = run(capsys, *files, "--json", "/dev/full")
    assert code == cli.COULD_NOT_RUN
    assert out.splitlines()[-1] == "regression: 8 newly fail"
    assert err == "error: cannot write '/dev/full': No space left on device; give another place\n"


@pytest.mark.parametrize("arguments", [["--factor", "0.5"], ["--factor", "nan"], ["--factor", "x"], ["C.json"]])
def test_wrong_usage_exits_2(files, capsys, arguments):
    with pytest.raises(SystemExit) as exit_info:
        run(capsys, *files, *arguments)
    assert exit_info.value.code == cli.BAD_INPUT


def test_reports_of_version_1_are_read(files, capsys, tmp_path):
    """They know fewer groups and nothing of stages; what only the new one has appears."""
    new = json.loads(files[0].read_text(encoding="utf-8"))
    old = {name: value for name, value in new.items() if name not in ("stages", "findings", "verdict_kind", "verdict_reason")} | {
        "version": 1
    }
    for case in old["cases"]:
        for name in ("findings", "local", "stopped"):
            del case[name]
        case["items"] = [
            {name: value for name, value in item.items() if name != "local_passed"} for item in case["items"] if item["group"] != "losses"
        ]
    (tmp_path / "old.json").write_text(json.dumps(old), encoding="utf-8")
    code, out, _ = run(capsys, tmp_path / "old.json", files[0])
    assert code == cli.MATCH
    assert "appeared: 4" in out
    code, out, _ = run(capsys, tmp_path / "old.json", files[1])
    assert code == cli.MISMATCH
    assert run(capsys, files[0], tmp_path / "old.json")[1].splitlines()[-1] == "regression: 4 vanished"


def test_reports_written_by_a_check_can_be_read(files):
    for path in files:
        assert regression.read(path)["version"] == report.VERSION
