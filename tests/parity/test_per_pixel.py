"""The per-pixel baselines against the official code, whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from checkpoints import registry
from parity import check
from parity.check import Settings
from parity.inputs import make_label_map, make_targets
from parity.trace import Trace

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("tiny_per_pixel", "tiny_per_pixel_plus")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["official", "masked"])
def test_matches_the_official_code(converted, name, padding):
    dtypes = ("float32", "float64") if padding == "official" else ("float64",)
    result = check.check(Settings(str(converted(name)), str(GOLDEN / name), dtypes, padding=padding))
    assert [item for case in result.cases for item in case.failures] == []
    assert result.passed
    plus = name == "tiny_per_pixel_plus"
    assert [case.case for case in result.cases if case.dtype == "float64"] == (["odd"] + ["batch"] * (plus and padding == "official"))
    for case in result.cases:
        compared = {group: counts["compared"] for group, counts in case.ledger().items()}
        assert compared["matcher"] == 0  # there is none, on neither side
        assert compared["losses"] == (4 if plus else 2)
        assert compared["outputs"] == (3 if plus else 1)
        assert compared["inference"] == 2 * len(case.sizes_px)
        assert compared["variables"] == len(registry.layout(registry.entry(name)))
        if case.dtype == "float64":
            # What the tolerance asks, and what is usual; noise around zero (gradients of key biases) has its own tolerance.
            errors = [item.error for item in case.items if item.tolerance == pytest.approx(1e-9, rel=0.1)]
            assert len(errors) > 200
            assert max(errors) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_trace_asks_for_what_it_should(name):
    """Every pixel kind occurs, sizes are no multiples of 4, and the matcher is absent because the official code has none."""
    for case in Trace(GOLDEN / name):
        assert any(side % 4 for image in case.images for side in image.shape[:2])
        assert not case.reference.group("matcher")
        for image, target in zip(case.images, case.targets, strict=True):
            sem_seg = target["sem_seg"]
            assert sem_seg.shape == image.shape[:2]
            assert sem_seg.dtype == np.int32
            assert (sem_seg == 255).any()
            assert {255, *target["labels"].tolist()} < set(np.unique(sem_seg).tolist())  # and a class of what is nobody's


def test_label_maps_lay_later_objects_over_earlier_ones():
    labels, masks = make_targets(40, 61, 5, 19, "k")
    label_map = make_label_map(labels, masks, 19, 65535, "k")
    for row, column in np.ndindex(40, 61):
        covering = [label for label, mask in zip(labels, masks, strict=True) if mask[row, column]]
        if covering:
            assert label_map[row, column] == covering[-1]
    nobodys = label_map[~masks.any(0)]
    half = len(nobodys) // 2
    assert set(nobodys[:half]) == {65535}
    assert len(set(nobodys[half:])) == 1
    assert nobodys[-1] < 19
    empty = make_label_map(labels[:0], masks[:0], 19, 255, "k")
    assert set(np.unique(empty)) == {255, empty[-1, -1]}
