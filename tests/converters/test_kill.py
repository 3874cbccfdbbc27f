"""``kill -9`` at 100 moments of a conversion: no destination, or a complete verified one; never anything between."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from converters.convert import convert

CONFIG = "tiny_panoptic"


def run_killer(*arguments):
    script = pathlib.Path(__file__).with_name("conversion_killer.py")
    result = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("force", [False, True])
def test_killed_conversions(force, tensors, checkpoint_file, tmp_path):
    source, out = checkpoint_file(tensors), tmp_path / "out"
    if force:
        old = {name: tensor + (0 if name == "criterion.empty_weight" else 1) for name, tensor in tensors.items()}
        convert(checkpoint_file(old, name="old.pkl"), out, CONFIG)
    results = run_killer(source, CONFIG, out, 50, *["--force"] * force)
    assert len(results) == 50
    assert all(result["whole"] for result in results)
    assert sum(bool(result["left"]) for result in results) >= 25  # most kills did hit while files were being written
    assert max(len(result["left"]) for result in results) == 1  # each run cleans up after the one before
    convert(source, out, CONFIG, force=True)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == {
        name: (tmp_path / "out-reference" / name).read_bytes() for name in os.listdir(out)
    }
