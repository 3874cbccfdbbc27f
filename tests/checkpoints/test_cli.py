"""`tfmaskformer zoo`: what it prints, what it refuses, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

from checkpoints import cli, registry


def test_list(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(registry.entries())
    row = "maskformer_panoptic_R50_bs64_554k                   panoptic  coco_panoptic     R50       45.0 M      PQ 46.5"
    assert row in lines


def test_list_json(capsys):
    assert cli.main(["list", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in facts] == [entry.name for entry in registry.entries()]
    facts = {item["name"]: item for item in facts}
    assert facts["maskformer_R50_bs16_160k"]["file_hash"] == "d8dbeb"
    assert facts["maskformer_R50_bs16_160k"]["num_parameters"] == 41254743


def test_show(capsys):
    assert cli.main(["show", "maskformer_R101_bs16_90k"]) == 0
    out = capsys.readouterr().out
    assert "semantic segmentation, cityscapes, 19 classes" in out
    assert "model_final_38c00c.pkl" in out
    assert "CC-BY-NC-4.0" in out


def test_show_json_has_every_tensor(capsys):
    assert cli.main(["show", "tiny_semantic", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    layout = registry.layout(registry.entry("tiny_semantic"))
    assert {item["key"]: tuple(item["shape"]) for item in facts["tensors"]} == {key: spec.shape for key, spec in layout.items()}
    assert facts["config"]["num_classes"] == 19


def test_synthesize(tmp_path, capsys):
    destination = tmp_path / "model_final.pkl"
    assert cli.main(["synthesize", "tiny_panoptic", "--dst", str(destination)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "synthetic weights" in captured.err
    with destination.open("rb") as file:
        assert len(pickle.load(file)["model"]) == len(registry.layout(registry.entry("tiny_panoptic")))
    seed0 = destination.read_bytes()
    assert cli.main(["synthesize", "tiny_panoptic", "--dst", str(destination), "--seed", "7", "--force"]) == 0
    assert destination.read_bytes() != seed0
    assert list(tmp_path.iterdir()) == [destination]


def test_existing_destination_is_kept(tmp_path, capsys):
    destination = tmp_path / "model_final.pkl"
    destination.write_bytes(b"mine")
    assert cli.main(["synthesize", "tiny_panoptic", "--dst", str(destination)]) == 2
    assert f"error: '{destination}' exists; --force replaces it" in capsys.readouterr().err
    assert destination.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthesize", "maskformer_R50", "--dst", "{tmp}/a.pkl"], "no zoo entry 'maskformer_R50'\n  nearest: maskformer_R50_bs"),
        (["synthesize", "tiny_panoptic", "--dst", "{tmp}/none/a.pkl"], "there is no folder"),
        (["synthesize", "tiny_panoptic", "--dst", "{tmp}"], "it is a folder"),
        (["synthesize", "tiny_panoptic", "--dst", "{tmp}/a.pkl", "--seed", "-1"], "seed is -1"),
        (["synthesize", "tiny_panoptic", "--dst", "/proc/a.pkl"], "/proc"),
        (["show", "swin"], "tfmaskformer zoo list"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
    assert cli.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert not list(tmp_path.iterdir())


def test_a_seed_must_be_a_number(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["synthesize", "tiny_panoptic", "--dst", "x", "--seed", "a"])
    assert exit_.value.code == 2


def test_help_needs_neither_framework():
    script = (
        "import sys; sys.modules.update(tensorflow=None, keras=None, torch=None)\n"
        "from checkpoints import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: sys.exit(end.code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "synthesize" in done.stdout
