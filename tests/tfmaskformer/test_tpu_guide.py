"""docs/tpu.md: its numbers are the registry's, its commands are ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkpoints import registry
from converters import cli as convert_cli
from tfmaskformer.data import cli as data_cli
from tfmaskformer.evaluation import cli

PAGE = (Path(__file__).parents[2] / "docs" / "tpu.md").read_text(encoding="utf-8")


def test_numbers_are_those_of_the_registry():
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| (maskformer|per_pixel)", line)]
    expected = []
    for entry in registry.entries():
        name = "PQ" if "PQ" in entry.metrics else "mIoU"
        expected.append([entry.name, entry.dataset, f"{name} {entry.metrics[name]}", str(entry.metrics.get("mIoU (ms+flip)", "–"))])
    assert rows == expected


def test_commands_are_understood():
    """Every option is one that the command has; none of them finds its files."""
    commands = [
        line.split() for line in PAGE.replace("$BUCKET", "no/bucket").splitlines() if line.startswith(("tfmaskformer ", "convert "))
    ]
    assert len(commands) == 4
    for program, *arguments in commands:
        main = convert_cli.main if program == "convert" else {"data": data_cli.main, "eval": cli.main}[arguments.pop(0)]
        if main is data_cli.main and arguments[0] == "check":
            assert main(arguments) == data_cli.BAD_INPUT
        elif main is cli.main:
            parsed = cli._arguments(arguments)
            assert (parsed.tpu, parsed.device) == ("local", "tpu")
        else:
            assert main(arguments) == 2


@pytest.mark.parametrize("name", ["tensorflow-tpu", "enable_tensor_float_32_execution(False)", "operand_precision={highest,highest}"])
def test_facts_are_in_the_code(name):
    root = Path(__file__).parents[2]
    files = ("pyproject.toml", "tfmaskformer/evaluation/devices.py", "tests/tfmaskformer/test_evaluate.py")
    assert name in PAGE
    assert any(name in (root / file).read_text(encoding="utf-8") for file in files)
