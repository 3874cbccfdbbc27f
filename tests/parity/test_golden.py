"""The committed traces of the test models are what the official code computes."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from parity.trace import Trace

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["tiny_swin", "tiny_deeplab", "tiny_per_pixel", "tiny_per_pixel_plus"])
def test_recorded_again_it_is_the_same(name, official_sources, tmp_path):
    runpy.run_path(str(GOLDEN / "record_tiny.py"))["main"](tmp_path, name)
    for case in Trace(tmp_path / name):
        with Trace(GOLDEN / name).case(case.name) as golden:
            groups = {group for group, _ in golden.reference.records}  # there were fewer of them when it was recorded
            assert {key for key in case.reference.records if key[0] in groups} == golden.reference.records.keys()
            for group, record in golden.reference.records:
                actual, expected = (each.reference.read(group, record) for each in (case, golden))
                scale = max(golden.reference[group, record].statistics.l2, 1e-9)
                assert np.abs(actual.astype(np.float64) - expected).max(initial=0) <= 1e-9 * scale, (group, record)
