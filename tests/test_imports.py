"""The direction of imports, proven in processes where the forbidden packages cannot be imported."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata

import pytest

from tfmaskformer.cli import GROUP

PYTORCH = ("torch", "detectron2", "mask_former")
FRAMEWORKS = (*PYTORCH, "tensorflow", "keras", "jax")
COMMANDS = sorted(entry.name for entry in metadata.entry_points(group=GROUP))

IMPORT_ALL = """
import importlib, pkgutil
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if module.name != "tfmaskformer.model_garden.task":  # whose classes are the Model Garden's
        importlib.import_module(module.name)
"""
COMMAND_LINE = """
from tfmaskformer.cli import main
raise SystemExit(main({argv!r}))
"""


def run_without(blocked: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a new interpreter where importing any of ``blocked`` raises ImportError."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("package", "blocked"),
    [
        ("tfmaskformer", (*PYTORCH, "jax", "converters", "parity")),
        ("converters", (*PYTORCH, "jax", "parity")),
        ("checkpoints", (*FRAMEWORKS, "tfmaskformer", "converters", "parity")),
        ("parity", (*PYTORCH, "jax")),
    ],
)
def test_every_module_imports_without(package, blocked):
    result = run_without(blocked, IMPORT_ALL.format(package=package))
    assert result.returncode == 0, result.stderr


def test_blocking_works():
    result = run_without(("numpy",), IMPORT_ALL.format(package="checkpoints"))
    assert "numpy" in result.stderr
    assert result.returncode == 1


@pytest.mark.parametrize("argv", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_needs_no_framework(argv):
    result = run_without(FRAMEWORKS, COMMAND_LINE.format(argv=argv))
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert not result.stderr


def test_help_lists_every_command_in_a_line():
    result = run_without(FRAMEWORKS, COMMAND_LINE.format(argv=["--help"]))
    told = dict(re.findall(r"^  (\S+) +(\S.*)$", result.stdout, flags=re.MULTILINE))
    assert set(COMMANDS) == set(told) == {"compile", "convert", "data", "eval", "export", "parity-check", "predict", "train", "zoo"}


def test_unknown_command_is_refused_with_the_nearest():
    result = run_without(FRAMEWORKS, COMMAND_LINE.format(argv=["convrt"]))
    assert result.returncode == 2
    assert not result.stdout
    assert "did you mean 'tfmaskformer convert'?" in result.stderr


def test_no_command_shows_usage():
    result = run_without(FRAMEWORKS, COMMAND_LINE.format(argv=[]))
    assert result.returncode == 2
    assert result.stderr.startswith("usage:")
