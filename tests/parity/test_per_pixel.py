"""The per-pixel baselines against the official code, whole, and the check's own proof for them: broken, they are caught and named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from checkpoints import registry
from parity import check, cli
from parity.check import Settings
from parity.inputs import make_label_map, make_targets
from parity.trace import Trace
from tfmaskformer import heads, inference, per_pixel_criterion

from .breaks import replace, run_broken, weight

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


# --- breaks


def other_order(right):
    def call(self, features, sizes):
        outputs = right(self, features, sizes)
        return {**outputs, "aux_outputs": outputs["aux_outputs"][::-1]}

    return call


def align_corners(right):
    def weights(in_size, out_size, in_length, out_length, dtype):
        (into,), (out,) = np.unique(in_size), np.unique(out_size)
        positions = np.minimum(np.arange(out_length) * (into - 1) / (out - 1), into - 1)
        table = np.maximum(1 - np.abs(positions[:, np.newaxis] - np.arange(in_length)), 0)
        return tf.constant(np.broadcast_to(table, (len(in_size), *table.shape)), dtype)

    return weights


def over_all_pixels(right):
    """The sum divided by the number of all pixels, not of those with a label."""

    def mean(logits, labels, sizes):
        return right(logits, labels, sizes) * tf.reduce_mean(tf.cast(labels >= 0, logits.dtype))

    return mean


def ignored_is_the_last_class(model, monkeypatch):
    right = per_pixel_criterion.PerPixelCriterion._labels

    def labels(self, labels, outputs):
        return right(self, tf.where(labels == self.ignore_value, model.config.num_classes - 1, labels), outputs)

    monkeypatch.setattr(per_pixel_criterion.PerPixelCriterion, "_labels", labels)


def final_layer_everywhere(right):
    def call(self, features, sizes):
        outputs = right(self, features, sizes)
        return {**outputs, "aux_outputs": [{"sem_seg": outputs["sem_seg"]} for _ in outputs["aux_outputs"]]}

    return call


PLAIN, PLUS = NAMES
HEAD, QUERIES = heads.PerPixelBaselinePlusHead, "sem_seg_head.predictor.query_embed.weight"
BREAKS = {
    # name: (model, padding, break, (group, name) that must be told)
    "classes in another order": (
        PLAIN,
        "official",
        weight("sem_seg_head.predictor.weight", lambda values: np.roll(values, 1, -1)),
        ("taps", "sem_seg_head.predictor#0"),
    ),
    "missing bias of the classifier": (
        PLAIN,
        "official",
        lambda model, _: setattr(model.sem_seg_head.predictor, "use_bias", False),
        ("taps", "sem_seg_head.predictor#0"),
    ),
    "queries in another order": (
        PLUS,
        "official",
        weight(QUERIES, lambda values: np.roll(values, 1, 0)),
        ("taps", "sem_seg_head.predictor.transformer.decoder.layers.0.self_attn#0[1]"),
    ),
    "deep supervision in another order": (
        PLUS,
        "official",
        replace(HEAD, "call", other_order),
        ("taps", "sem_seg_head#0[aux_outputs][0][sem_seg]"),
    ),
    "deep supervision of the final layer only": (
        PLUS,
        "official",
        replace(HEAD, "call", final_layer_everywhere),
        ("taps", "sem_seg_head#0[aux_outputs][0][sem_seg]"),
    ),
    "ignored pixels are a class": (PLAIN, "official", ignored_is_the_last_class, ("losses", "loss_sem_seg")),
    "mean over ignored pixels too": (
        PLAIN,
        "official",
        replace(per_pixel_criterion, "_cross_entropy", over_all_pixels),
        ("losses", "loss_sem_seg"),
    ),
    "align_corners in the loss": (
        PLAIN,
        "official",
        replace(per_pixel_criterion, "bilinear_weights", align_corners),
        ("losses", "loss_sem_seg"),
    ),
    "upsampled across the true border": (
        PLAIN,
        "masked",
        replace(per_pixel_criterion, "_cross_entropy", lambda right: lambda logits, labels, sizes: right(logits, labels, None)),
        ("losses", "loss_sem_seg"),
    ),
    "a chunk without a gradient": (
        PLAIN,
        "official",
        replace(
            tf, "foldl", lambda right: lambda add, pieces, *more, **options: right(add, [piece[1:] for piece in pieces], *more, **options)
        ),
        ("gradients", "sem_seg_head.predictor.bias"),
    ),
    "probabilities instead of logits": (
        PLAIN,
        "official",
        replace(inference, "_at_least_float32", lambda right: lambda values: tf.nn.softmax(right(values), 1)),
        ("inference", "0/sem_seg"),
    ),
    "upsampled to the image instead of by 4": (
        PLAIN,
        "official",
        replace(inference, "_axis_weights", lambda right: lambda maps, canvas, image, output: right(maps, image, image, output)),
        ("inference", "0/sem_seg"),
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_caught_and_named(name, converted, monkeypatch, capsys):
    model, padding, broken, culprit = BREAKS[name]
    options = ("--dtype", "float64", "--case", "odd", "--padding", padding)
    code, report = run_broken(broken, converted(model), GOLDEN / model, monkeypatch, capsys, *options)
    assert code == cli.MISMATCH
    assert (report["first_failure"]["group"], report["first_failure"]["name"]) == culprit
