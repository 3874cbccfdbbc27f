"""Two of the covered checkpoints, whole: both pixel decoders, both depths, divisor 0 and 32, panoptic and semantic.

``make zoo`` proves them all.
"""

import math

import pytest

from checkpoints import registry
from parity import prove


@pytest.mark.parametrize("name", ["maskformer_panoptic_R50_bs64_554k", "maskformer_R101_bs16_90k"])
def test_checkpoint_matches_the_official_code(name):
    proof = prove.prove(registry.entry(name))
    assert [(check.settings.padding, len(check.cases)) for check in proof.checks] == [("official", 6), ("masked", 4)]
    sizes = {size for check in proof.checks for case in check.cases for size in case.sizes_px}
    assert any(height % 2 and width % 2 for height, width in sizes)
    assert proof.passed, prove.table([prove.summary(proof)])
    # Nothing was skipped, and what passed did not pass because nothing was asked of it.
    for check in proof.checks:
        for case in check.cases:
            judged = [item for item in case.items if item.group in ("taps", "outputs", "losses")]
            assert len(judged) > 300
            assert all(math.isfinite(item.tolerance) and item.tolerance < 1e-3 for item in judged)
