"""Exports pass the same check as the model, after they were reloaded; and fail it where they are another model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from parity import cli, exported, recorded
from parity.check import Settings
from parity.trace import Trace
from tfmaskformer.export import MANIFEST, export

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = {
    "tiny_panoptic": "selftest/tiny_panoptic_0",
    "tiny_swin": "tiny_swin",
    "tiny_deeplab": "tiny_deeplab",
    "tiny_per_pixel": "tiny_per_pixel",
    "tiny_per_pixel_plus": "tiny_per_pixel_plus",
}


def check(directory, reference):
    return recorded.check_recorded(str(directory), str(reference), settings=Settings(str(directory), str(reference), all_stages=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny_panoptic", {"fold_batch_norm": True}),
        ("tiny_swin", {"size": (128, 160)}),
        ("tiny_per_pixel", {"format": "keras"}),
        ("tiny_per_pixel_plus", {"format": "keras"}),
        ("tiny_deeplab", {"format": "litert", "size": (128, 160), "fold_batch_norm": True}),
        ("tiny_swin", {"format": "litert", "size": (128, 160)}),
    ],
)
def test_exports_match_the_official_code(converted, tmp_path, name, options):
    if options.get("format") == "litert" and importlib.util.find_spec("ai_edge_litert") is None:
        pytest.skip("needs the extra 'litert'")
    export(converted(name), tmp_path / "export", **options)
    reference = GOLDEN / TRACES[name]
    exported.record_exported(tmp_path / "export", reference, tmp_path / "recording")
    result = check(tmp_path / "recording", reference)
    assert [item for case in result.cases for item in case.failures] == []
    assert result.passed
    assert [case.case for case in result.cases] == [name for name in Trace(reference).cases if name != "batch"]
    for case in result.cases:
        compared = {(item.group, item.name) for item in case.items if item.comparison is not None}
        outputs = {"sem_seg"} if "per_pixel" in name else {"pred_logits", "pred_masks"}
        assert {item for group, item in compared if group == "outputs"} == outputs
        assert ("inference", "0/sem_seg") in compared


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own, in save
def test_another_model_fails(converted, tmp_path, capsys):
    from tfmaskformer.checkpoint import load

    checkpoint = converted("tiny_per_pixel")
    reference = str(GOLDEN / TRACES["tiny_per_pixel"])
    export(checkpoint, tmp_path / "export", "keras")
    model = load(checkpoint)
    variable = model.backbone.res2[0].conv1.weight
    variable.assign(variable * 1.001)
    model.save(tmp_path / "export" / "model.keras")
    recording = str(tmp_path / "recording")
    given = ["--export", str(tmp_path / "export"), "--reference", reference, "--out", recording]
    assert exported.main(given) == 0
    assert Trace(recording).provenance["command"] == ["python", "-m", "parity.exported", *given]
    assert cli.main(["--actual", recording, "--reference", reference]) == 1
    assert "sem_seg" in capsys.readouterr().out

    other = str(GOLDEN / "tiny_swin")
    assert exported.main(["--export", str(tmp_path / "export"), "--reference", other, "--out", str(tmp_path / "no")]) == 2
    assert "other weights" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "export" / MANIFEST).read_text())
    for change, message in (
        ({"export": manifest["export"] | {"size": [64, 64]}}, "px, the canvas of"),
        ({"source": None}, "does not tell of which file its weights are"),
    ):
        (tmp_path / "export" / MANIFEST).write_text(json.dumps(manifest | change))
        assert exported.main(["--export", str(tmp_path / "export"), "--reference", reference, "--out", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "export" / MANIFEST).unlink()
    assert exported.main(["--export", str(tmp_path / "export"), "--reference", reference, "--out", str(tmp_path / "no")]) == 2
    assert "expected a directory written by 'tfmaskformer export'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
