"""What docs/convergence.md claims, and that a model trained in TensorFlow is the same model for the official code."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest

from parity import convergence, overfit, train_shapes

DOCS = Path(__file__).parents[2] / "docs"
PHOTOGRAPHS = os.environ.get("COCO_SAMPLE")
"""The folder of parity.overfit; the photographs' licence keeps them out of here."""


@pytest.fixture(scope="module")
def results():
    return json.loads((DOCS / "convergence.json").read_text(encoding="utf-8"))


def test_claims_hold(results):
    assert convergence.holds(results)
    for run in results["tensorflow"].values():
        assert run["official"]["same_counts"]
        assert run["official"]["differing_pixels"] <= 1  # where two masks are equally probable but for rounding
        assert [int(step) for step in run["curves"]["loss"]] == list(range(100, 4001, 100))
        assert run["curves"]["pq"]["4000"] == run["quality"]["all"]["pq"]
    for run in results["pytorch"].values():
        assert run["padded"]["all"]["pq"] > run["quality"]["all"]["pq"] + 1


def test_committed_model_is_pytorchs_seed_0(results):
    made = json.loads((DOCS.parent / "checkpoints" / "small" / "shapes_panoptic.json").read_text(encoding="utf-8"))
    first = results["pytorch"]["0"]["quality"]
    assert first == {group: made["validation"]["first_200_images"][group] for group in first}


CHANGES = {
    "too bad": lambda runs: runs["tensorflow"]["1"]["quality"]["all"].update(pq=59.9),
    "means apart": lambda runs: [run["quality"]["all"].update(pq=90) for run in runs["pytorch"].values()],
    "deviation": lambda runs: runs["pytorch"]["2"]["quality"]["all"].update(pq=70),
    "other officially": lambda runs: runs["tensorflow"]["0"]["official"]["quality"]["all"].update(pq=81),
    "not by heart": lambda runs: runs["photographs"]["evaluations"]["3000"]["all"].update(pq=89),
    "too few": lambda runs: runs["tensorflow"].pop("2"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_results_do_not_hold(results, change):
    like = {side: results[side]["0"] for side in convergence.SIDES}
    runs = {side: {str(seed): copy.deepcopy(run) for seed in range(convergence.SEEDS)} for side, run in like.items()}
    runs["photographs"] = copy.deepcopy(results["photographs"])
    assert convergence.holds(runs)
    change(runs)
    assert not convergence.holds(runs)


def test_page_is_made_of_the_results(results, tmp_path):
    page = (DOCS / "convergence.md").read_text(encoding="utf-8")
    assert convergence.page_of(page, results) == page
    convergence.draw(results, tmp_path / "curves.svg")
    assert "convergence.svg" in page
    assert (DOCS / "convergence.svg").read_text(encoding="utf-8").startswith("<?xml")
    with pytest.raises(ValueError, match="no lines '<!-- runs -->'"):
        convergence.page_of("", results)


def test_trained_here_converted_back_evaluated_officially(official_sources, uncompiled, tmp_path, monkeypatch):
    """Some steps from the small model; a whole training from scratch takes minutes, and what came of three is in the results."""
    from converters.convert import convert
    from parity.train_shapes_tensorflow import CANVAS, OPTIONS
    from tfmaskformer.data import shapes
    from tfmaskformer.training import cli

    monkeypatch.setattr(train_shapes, "PARTS", (6,))
    monkeypatch.setattr(train_shapes, "LOSS_STEPS", 2)
    data, start, run = (tmp_path / name for name in ("data", "start", "run"))
    for split in shapes.SPLITS:
        shapes.write(data, split, 6)
    convert(DOCS.parent / "checkpoints" / "small" / "shapes_panoptic.pkl", start, train_shapes.NAME)
    options = OPTIONS | {"SEED": 5, "SOLVER.MAX_ITER": 4, "TEST.EVAL_PERIOD": 4, "SOLVER.WARMUP_ITERS": 0, "SOLVER.IMS_PER_BATCH": 1}
    command = ["--config", train_shapes.NAME, "--data", str(data), "--init", str(start), "--out", str(run), "--cpu"]
    command += ["--canvas", *map(str, CANVAS)]
    assert cli.main([*command, *(str(part) for option in options.items() for part in option)]) == cli.OK

    found = convergence.tensorflow_run(run)
    assert found["seed"] == 5
    assert list(found["curves"]["loss"]) == [2, 4]
    assert found["curves"]["pq"] == {4: found["quality"]["all"]["pq"]}
    officially = convergence.evaluated_officially(run, data)
    assert officially["quality"] == found["quality"]
    assert officially["quality"]["all"]["pq"] > 20
    assert officially["same_counts"]
    assert officially["differing_pixels"] <= 10 < 6 * 96**2 < officially["pixels"]


def test_training_in_pytorch_tells_its_curves(official_sources, tmp_path, monkeypatch):
    for name, value in {"STEPS": 2, "BATCH": 1, "LOSS_STEPS": 1, "EVALUATION_STEPS": 2, "PARTS": (1,), "CALIBRATION_IMAGES": 1}.items():
        monkeypatch.setattr(train_shapes, name, value)
    seen = []
    official_inputs = train_shapes.official_inputs
    monkeypatch.setattr(
        train_shapes, "official_inputs", lambda split, index, **how: (seen.append((split, index)), official_inputs(split, index, **how))[1]
    )
    assert train_shapes.main(["--out", str(tmp_path / "model.pkl"), "--seed", "1"]) == 0
    assert [index for split, index in seen if split == "train"] == [0, 2, 3]  # the first calibrates; seed 0 has 0 and 1
    run = convergence.pytorch_run(tmp_path / "model.json")
    assert run["seed"] == 1
    assert list(run["curves"]["loss"]) == ["1", "2"]
    assert run["curves"]["pq"] == {"2": run["quality"]["all"]["pq"]}


@pytest.mark.skipif(PHOTOGRAPHS is None, reason="needs the two photographs of COCO: set COCO_SAMPLE")
def test_limit_of_the_photographs(results, tmp_path):
    from tfmaskformer.data.datasets import open_dataset
    from tfmaskformer.official_config import config_of, named_tree

    overfit.lay_out(Path(PHOTOGRAPHS), tmp_path)
    dataset = open_dataset("coco_panoptic", tmp_path, "train")
    found = overfit.limit(dataset, config_of(named_tree(overfit.CONFIG)[1], overfit.CONFIG))
    assert round(100 * found["all"].pq, 2) == results["photographs"]["limit"]["all"]["pq"]
    assert found["all"].rq == 1  # nothing is so small that its mask would be lost
