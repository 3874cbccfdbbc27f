"""The command: exit codes, output, reports; and that the port matches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints
from parity import check, cli, probes
from parity.report import FILES as REPORT_FILES

from .conftest import TRACE
from .made_checks import failing, passing


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_an_unbroken_port_matches_in_graph_mode(checkpoint, tmp_path, capsys):
    report = tmp_path / "new" / "report"
    arguments = ("--ckpt", checkpoint, "--reference", TRACE, "--case", "even", "--report", report, "--json", report / "check.json")
    code, out, err = run(capsys, *arguments)
    assert code == cli.MATCH, out
    assert "match: all " in out
    assert "graph mode" in out
    assert "even: float64 …" in err
    assert sorted(path.name for path in report.iterdir()) == sorted([*REPORT_FILES, "check.json"])
    assert (report / "error_along_depth.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((report / "report.json").read_text())
    assert found == json.loads((report / "check.json").read_text())
    assert found["passed"]
    assert found["first_failure"] is None
    assert [(case["case"], case["dtype"]) for case in found["cases"]] == [("even", "float32"), ("even", "float64")]
    for case in found["cases"]:
        ledger = case["ledger"]
        assert ledger["taps"] == {"compared": 337, "passed": 337, "not judged": 0, "failed": 0, "no partner": 0, "exempted": 1}
        judged = "not judged" if case["dtype"] == "float32" else "passed"
        assert ledger["gradients"][judged] == ledger["gradients"]["compared"] > 200
        assert ledger["variables"]["passed"] == 481
        assert ledger["losses"]["passed"] == 3 * 6 + 1


@pytest.mark.parametrize("padding", ["official", "masked"])
def test_every_case_matches_in_both_paddings(padding, checkpoint, capsys):
    # In float64: on images this small (12 positions in res5) four float32 runs measure some floors 8 % too low.
    options = ("--mode", "eager", "--dtype", "float64", "--padding", padding, "--json", "-")
    code, out, _ = run(capsys, "--ckpt", checkpoint, "--reference", TRACE, *options)
    found = json.loads(out)
    assert code == cli.MATCH, found["verdict"]
    expected = {"official": {"even", "odd", "batch"}, "masked": {"even", "odd"}}[padding]
    assert {case["case"] for case in found["cases"]} == expected
    assert [left["name"] for left in found["left_out"]] == [name for name in ("batch",) if name not in expected]
    for case in found["cases"]:
        assignments = [item["comparison"] for item in case["items"] if item["name"].endswith("/assignment")]
        assert {comparison["label"] for comparison in assignments} == {"same"}


def test_a_check_against_a_trace_needs_no_torch(checkpoint):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'detectron2', 'mask_former')));"
        "from parity.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--ckpt", checkpoint, "--reference", TRACE, "--case", "odd", "--dtype", "float64", "--mode", "eager"]
    ran = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == cli.MATCH, ran.stdout + ran.stderr


def test_help_answers_without_frameworks():
    code = "import sys; sys.modules.update(dict.fromkeys(('torch', 'tensorflow', 'keras')));from parity.cli import main; main(sys.argv[1:])"
    for command, told in (
        ((), "--reference DIR"),
        (("record",), "--samples N"),
        (("record-steps",), "--training {plain,dropout}"),
        (("steps",), "--steps K"),
        (("compare",), "--factor X"),
    ):
        arguments = (*command, "--help")
        ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert told in ran.stdout


def test_bad_input_is_told_and_exits_2(tmp_path, capsys):
    reference = ("--reference", TRACE)
    for arguments, told in (
        (("--ckpt", tmp_path, *reference), "has no manifest.json"),
        (("--ckpt", tmp_path, "--reference", tmp_path, "--report", __file__ + "/x"), "is no folder"),
        (("--ckpt", tmp_path, *reference, "--report", __file__), "is no folder"),
        (("--ckpt", tmp_path, *reference, "--json", tmp_path / "nowhere" / "x.json"), "there is no folder"),
        (("--ckpt", tmp_path, *reference, "--json", tmp_path), "it is a folder"),
        (("--ckpt", tmp_path, "--reference", "official", "--src", __file__, "--config", "x.yaml"), "has no manifest.json"),
        (("--ckpt", tmp_path, "--reference", "official", "--src", "x.pkl"), "give --config"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (cli.BAD_INPUT, "")
        assert err.startswith("error: ")
        assert told in err
    for arguments, told in (
        (("--ckpt", tmp_path), "--reference"),
        (("--ckpt", tmp_path, *reference, "--dtype", "float16"), "invalid choice"),
        (("--ckpt", tmp_path, *reference, "--src", "x.pkl"), "are for --reference official"),
        (("--ckpt", tmp_path, "--reference", "official"), "needs --src"),
        (("--ckpt", tmp_path, "--reference", "official", "--src", "x.pkl", "--case", "odd"), "every --image"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            cli.main([str(argument) for argument in arguments])
        assert exit_info.value.code == cli.BAD_INPUT
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("output", ["--json", "--report"])
@pytest.mark.parametrize("make", [passing, failing])
def test_a_verdict_is_told_before_a_result_that_cannot_be_written(make, output, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "check", lambda settings, progress: make())
    (tmp_path / "report" / "junit.xml").mkdir(parents=True)
    place = {"--json": "/dev/full", "--report": tmp_path / "report"}[output]
    code, out, err = run(capsys, "--ckpt", tmp_path, "--reference", TRACE, output, place)
    assert code == cli.COULD_NOT_RUN
    assert out.splitlines()[-1].startswith("match: " if make is passing else "mismatch: ")
    assert err.startswith("error: cannot write ")


def test_other_weights_exit_2(checkpoint, tmp_path, capsys):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["source"]["sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for reference in ((TRACE,), ("official", "--src", __file__)):
        code, out, err = run(capsys, "--ckpt", tmp_path, "--reference", *reference)
        assert (code, out) == (cli.BAD_INPUT, "")
        assert "error: other weights" in err
    code, out, err = run(capsys, "--ckpt", tmp_path, "--reference", "official", "--src", tmp_path / "absent.pkl")
    assert (code, out) == (cli.BAD_INPUT, "")
    assert "absent.pkl" in err


def test_an_environment_that_computes_garbage_exits_3(checkpoint, monkeypatch, capsys):
    broken = probes.Environment({}, "", "", {}, (probes.Probe("tf.nn.conv2d 3×3", True, 0.8),))
    monkeypatch.setattr(check.probes, "examine", lambda: broken)
    code, out, err = run(capsys, "--ckpt", checkpoint, "--reference", TRACE)
    assert (code, out) == (cli.COULD_NOT_RUN, "")
    assert "tf.nn.conv2d 3×3 (error 8.0e-01)" in err
    assert "TF_ENABLE_ONEDNN_OPTS=0" in err


def test_the_official_reference_takes_the_config_of_the_zoo_entry(checkpoint):
    assert cli._zoo_config(str(checkpoint)) == "coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml"
    assert cli._zoo_config("nowhere") is None
    assert cli.PHOTOS.parent == Path(checkpoints.__file__).parent
    assert all((cli.PHOTOS / name.split("@")[0]).is_file() for name in cli.DEFAULT_IMAGES)
