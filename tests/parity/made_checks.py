"""Checks made by hand, small and of every kind of result, for the tests of the reports."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from parity import compare, evidence, probes
from parity.check import CaseCheck, Check, Exemption, Item, Settings
from parity.diagnose import Finding
from parity.tap_rules import Layout
from tfmaskformer.config import MaskFormerConfig

NASTY = "<script>alert('x')</script>&\x07"
"""What a file could try to write into a report."""

ENVIRONMENT = probes.Environment(
    versions={"python": "3.11", "tensorflow": "2.21.0"},
    cpu="x86_64 (avx2)",
    onednn="default",
    threads={"intra-op": 1, "inter-op": 0},
    probes=(probes.Probe("tf.matmul", True, 1e-7), probes.Probe("tf.matmul 4-D", False, math.inf)),
)
PROVENANCE = {"commits": {"maskformer": "da3e60d85f"}, "versions": {"torch": "2.13"}, "config": "x.yaml", "command": [NASTY]}


def item(group, name, error=1e-6, *, floor=1e-6, tolerance=2e-6, note="", local=math.nan):
    """An item that fails where ``error`` is above ``tolerance``; it is right by itself where ``local`` is not."""
    expected = np.array([1.0, -2.0, 3.0])
    comparison = compare.compare(expected * (1 + error), expected, tolerance)
    local_passed = None if math.isnan(local) else local <= tolerance
    return Item(group, name, error <= tolerance, error, floor, tolerance, comparison, note, local, local_passed)


def assignment(name, actual):
    comparison = compare.compare_assignment(
        np.array(actual), np.array([0, 1]), np.array([[0.0, 9.0], [9.0, 0.0], [5.0, 5.0]]), gap=5.0, cost_noise=1e-3, dtype="float32"
    )
    return Item("matcher", name, comparison.passed, comparison=comparison, note="" if comparison.passed else "different: 1 of 2 objects")


ITEMS = (
    item("taps", "images#0", 1e-8, floor=0.0),
    item("taps", "backbone.stem.conv1#0"),
    *(item("taps", f"backbone.res2.{block}.conv{conv}#0", 1e-7 * (4 * block + conv)) for block in (0, 1) for conv in (1, 2, 3)),
    item("taps", "sem_seg_head.predictor#0[aux_outputs][0][pred_logits]"),
    item("outputs", "pred_logits"),
    item("outputs", "aux_outputs.0.pred_logits"),
    item("matcher", "final/0/total"),
    assignment("final/0/assignment", [0, 1]),
    item("losses", "loss_ce", local=1e-7),
    item("losses", "total"),
    item("gradients", "backbone.stem.conv1.weight", 4e-2, tolerance=math.inf),
    item("gradients", "backbone.res2.0.conv1.weight", 3e-2, tolerance=math.inf),
    item("inference", "0/sem_seg"),
    Item("variables", "backbone.stem.conv1.weight", True, comparison=item("gradients", "x").comparison, note="shows in gradients"),
)
EXEMPTED = (
    Exemption("taps", "backbone.res2.0.conv1#0", "compared with 'x#0': because"),
    Exemption("taps", "only.there#0", f"nobody needs it {NASTY}"),
)


def results(*differing):
    """Both models' panoptic result on a small picture: a thing and stuff, the latter another class at ``differing``."""
    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    expected = np.where(np.arange(30) < 12, 1, 2) * np.ones((20, 1), np.int32)
    actual = expected.copy()
    for place in differing:
        actual[place] = 3
    config = MaskFormerConfig(name="mini", num_classes=3, class_names=(NASTY, "b", "c"))
    return evidence.overlay("0/panoptic_seg", image, (expected, {1: 0, 2: 1}), (actual, {1: 0, 2: 1, 3: 2}), config)


def passing(*, items=ITEMS, exempted=EXEMPTED, settings=None):
    """Two cases that match."""
    settings = settings or Settings("tf_ckpt", "trace")
    cases = tuple(
        CaseCheck("odd", dtype, ((75, 101),), samples, items, exempted, overlays=(results(),))
        for dtype, samples in (("float32", 32), ("float64", None))
    )
    left_out = (Exemption("cases", "batch", "it has two images"),)
    return Check(settings, ENVIRONMENT, {"file": "model_final.pkl", "sha256": "ab" * 32}, PROVENANCE, cases, left_out)


def with_items(check, changed, dtype="float64"):
    """The check with other items in place of those of the same group and name in one dtype."""
    names = {(new.group, new.name): new for new in changed}
    cases = [
        dataclasses.replace(case, items=tuple(names.get((old.group, old.name), old) for old in case.items)) if case.dtype == dtype else case
        for case in check.cases
    ]
    return dataclasses.replace(check, cases=tuple(cases))


FAULTS = (
    item("taps", "backbone.res2.0.conv2#0", 3e-3, local=3e-3),
    item("taps", "backbone.res2.0.conv3#0", 2e-3, local=1e-7),
    item("taps", "backbone.res2.1.conv2#0", 7e-3, local=1e-7),
    Item("outputs", "pred_logits", False, note="no partner in TensorFlow"),
    assignment("final/0/assignment", [0, 2]),
    item("losses", "loss_ce", 0.1, note=NASTY),
    item("losses", "total", math.inf),
    Item(
        "inference", "0/sem_seg", False, comparison=compare.incomparable("shape (2, 2), expected (3,)"), note="shape (2, 2), expected (3,)"
    ),
)


FINDING = Finding(
    "backbone.res2.0.conv2", "kernel transposed", "transpose", "conv2: kernel transposed; 1.3 → 2e-7", 1.3, 2e-7, 1e-9, (NASTY,)
)


def seen():
    """Evidence of a map, a sampled tensor and an image."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (1, 4, 6, 5)).astype(np.float64)
    pixels = rng.integers(0, 255, (9, 7, 3))
    return (
        evidence.evidence("taps", "backbone.res2.0.conv2#0", image + (image > 250), image, layout=Layout("BHWC", "BCHW")),
        evidence.evidence("losses", "loss_ce", image.ravel() * 1.1, image.ravel(), sampled=True),
        evidence.evidence("preprocessing", "0/read/png", pixels[..., ::-1], pixels),
    )


def failing():
    """Faults of every kind, in float64."""
    check = with_items(passing(), FAULTS)
    last = dataclasses.replace(check.cases[-1], findings=(FINDING,), evidence=seen(), overlays=(results((3, 20), (3, 21)),))
    return dataclasses.replace(check, cases=(*check.cases[:-1], last))
