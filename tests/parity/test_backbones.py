"""Swin and R101c against the official code, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import registry
from parity import check
from parity.check import Settings

GOLDEN = Path(__file__).parents[1] / "golden"
SWIN, R101C = NAMES = ("tiny_swin", "tiny_deeplab")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("padding", "mode"), [("official", "graph"), ("masked", "eager")])
def test_matches_the_official_code(converted, name, padding, mode):
    result = check.check(Settings(str(converted(name)), str(GOLDEN / name), padding=padding, mode=mode))
    assert [item for case in result.cases for item in case.failures] == []
    assert result.passed
    assert [(case.case, case.dtype) for case in result.cases] == [
        (case, dtype) for dtype in ("float32", "float64") for case in ("even", "odd")
    ]
    entry = registry.entry(name)
    backbone = "backbone.layers.3.blocks.1.attn.attn_drop#0" if name == SWIN else "backbone.res5.2.conv2.norm#0"
    for case in result.cases:
        ledger = case.ledger()
        index = [key for key in registry.layout(entry) if key.endswith(("relative_position_index", "empty_weight"))]
        assert ledger["variables"]["compared"] == len(registry.layout(entry)) - len(index)
        assert backbone in {item.name for item in case.items}
        if case.dtype == "float64":
            # What the tolerance asks, and what is usual; noise around zero (gradients of key biases) has its own tolerance.
            errors = [item.error for item in case.items if item.tolerance == pytest.approx(1e-9, rel=0.1)]
            assert len(errors) > 300
            assert max(errors) < 1e-9
