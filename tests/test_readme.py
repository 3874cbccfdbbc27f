"""The README's example is run as it is written; its other commands are verbs of make, which CI and people run. Those in its sentences, and
those of docs that tell more of them, are taken by their parsers: running them would take minutes."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tfmaskformer import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERBS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_example_runs(tmp_path):
    for folder in ("parity/traces", "checkpoints/photos", "checkpoints/small"):
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = "".join(block for block in blocks("bash") if "convert --src" in block)
    [code] = blocks("python")
    for command in (["bash", "-ec", commands], [sys.executable, "-c", code + "\nassert len(segments_info) >= 3"]):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"model_final.pkl", "tf_ckpt", "report", "back.pth", "result.json"}


def test_other_commands_are_make_verbs_or_the_install():
    commands = [line for block in blocks("bash") if "convert --src" not in block for line in block.splitlines()]
    assert commands
    for command in commands:
        assert command.split() in [["make", verb] for verb in VERBS] or command == 'pip install -e ".[cpu]"'


class ParsedError(Exception):
    """The arguments were taken."""


def told() -> list[str]:
    """Commands with options in the README's sentences, and those in blocks of the pages to which these lead."""
    texts = [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("compile.md", "export.md", "predict.md")]
    lines = [
        line
        for text in texts
        for block in re.findall(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    inline: list[str] = re.findall(r"`(tfmaskformer [^`…]* --[^`…]*)`", README)
    return inline + [line for line in lines if line.startswith("tfmaskformer ")]


@pytest.mark.parametrize("command", told())
def test_commands_are_taken(command, monkeypatch):
    def only(parse):
        def parse_only(self, arguments=None, namespace=None):
            parse(self, arguments, namespace)
            raise ParsedError

        return parse_only

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, only(getattr(argparse.ArgumentParser, name)))
    with pytest.raises(ParsedError):
        cli.main(shlex.split(command)[1:])


def test_the_commands_are_there():
    assert {command.split()[1] for command in told()} >= {"compile", "predict", "export", "eval", "train"}


def test_ci_runs_the_test_command_of_the_readme():
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == "make test"
    assert "```bash\nmake test\n```" in README
