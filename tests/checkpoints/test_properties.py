"""A synthetic checkpoint in the official model is what docs/decisions/0005 promises (needs the official code)."""

from __future__ import annotations

import pytest

from checkpoints import registry


@pytest.mark.parametrize("name", ["tiny_panoptic", "tiny_semantic"])
def test_properties(official_sources, name):
    from parity import calibrate

    entry = registry.entry(name)
    figures = calibrate.check(entry)
    assert max(figures["float32 error of outputs"].values()) < 1e-4
    assert figures["float32 error of taps"]["worst"] < 1e-4
    assert all(least > 0.05 for least, _ in figures["distance between queries, least and median"].values())
    assert all(distance > 0.2 for distance in figures["distance between two photos"].values())
    assert all(effect > 2e-5 for effect in figures["effect of eps 1e-6"].values())
    assert figures["least gap over noise"] > 10
    assert len({tuple(queries) for queries in figures["assignments"]}) == entry.config["predictor"]["dec_layers"]
    lowest, highest = figures["share of positive elements before or after a ReLU"]
    assert 0.2 < lowest < highest < 0.8
    lowest, highest = figures["root mean square of taps"]
    assert 0.01 < lowest < highest < 100
    assert figures["without a gradient"] == ["sem_seg_head.predictor.transformer.decoder.layers.0.self_attn.in_proj_weight"]
    for found in figures["found"].values():
        if entry.task == "panoptic":
            assert found["things"] >= 1
            assert found["stuff"] >= 1
            assert found["things"] + found["stuff"] >= 3
        else:
            assert found["semantic classes above 1 %"] >= 3


def test_calibration_gives_the_committed_recipe(official_sources, tmp_path):
    """To a thousandth: PyTorch's sums depend on the machine, and four digits are kept."""
    from checkpoints import synthesize
    from parity import calibrate

    calibrated = calibrate.Calibration(registry.entry("tiny_semantic")).run()
    committed = synthesize.recipe("tiny_semantic")
    assert calibrated.keys() == committed.keys()
    for key, draw in calibrated.items():
        assert draw.gain == pytest.approx(committed[key].gain, rel=1e-3), key
        assert draw.offset == pytest.approx(committed[key].offset, rel=1e-3), key
        assert dict(draw.replace) == pytest.approx(dict(committed[key].replace), rel=1e-2, abs=1e-3), key
