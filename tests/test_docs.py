"""The code in the documentation is run as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PORTING = (ROOT / "docs" / "porting_another_model.md").read_text(encoding="utf-8")
GOLDEN = ROOT / "tests" / "golden" / "fpn_head"


def blocks(language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", PORTING, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def dtype_policy():
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


def run(code: str, **names: object) -> None:
    exec(compile(code, "docs/porting_another_model.md", "exec"), {"__name__": "porting_another_model", **names})


def test_porting_another_model(monkeypatch, dtype_policy):
    monkeypatch.chdir(ROOT)
    code = blocks("python")
    assert code.count("assert ") >= 6
    run(code)


def test_the_example_is_small():
    assert len([line for line in blocks("python").splitlines() if line.strip()]) <= 120


def test_a_wrong_layer_is_noticed(monkeypatch, dtype_policy):
    monkeypatch.chdir(ROOT)
    code = blocks("python").replace("activation=tf.nn.relu", "activation=tf.nn.gelu")
    with pytest.raises(AssertionError):
        run(code)


def test_recording(official_sources, tmp_path):
    from converters.source import open_source
    from parity import official
    from parity.trace import TraceFile, file_path

    code = official.load(*official_sources)
    assert code.detectron2 == official_sources[1].resolve()
    run(blocks("python recording"), folder=str(tmp_path))
    with open_source(tmp_path / "fpn_head.pth") as new, open_source(GOLDEN / "fpn_head.pth") as recorded:
        assert list(new.tensors) == list(recorded.tensors)
        for name, tensor in recorded.tensors.items():
            assert np.array_equal(new.tensors[name], tensor), name
    with TraceFile(file_path(tmp_path, "features", "float64")) as new, TraceFile(file_path(GOLDEN, "features", "float64")) as recorded:
        assert list(new.records) == list(recorded.records)
        for key in recorded.records:
            assert np.allclose(new.read(*key), recorded.read(*key), rtol=1e-12, atol=1e-14), key


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
