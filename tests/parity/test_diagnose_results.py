"""Hypotheses on the two ends of the pipeline, on costs, losses, results, gradients and steps: told where they hold, and only there."""

from __future__ import annotations

import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from converters.named_config import named_config
from parity import diagnose_ends, diagnose_results, diagnose_steps, ends
from parity import formulas_results as formulas
from parity.diagnose import diagnose
from parity.diagnose_results import GradientSite, Results, ResultSite, probe_site
from parity.trace import Trace
from tfmaskformer import criterion, matcher, per_pixel_criterion
from tfmaskformer.assignment import Assignment
from tfmaskformer.criterion import SetCriterion
from tfmaskformer.data import preprocessing
from tfmaskformer.per_pixel_criterion import PerPixelCriterion

GOLDEN = Path(__file__).parents[1] / "golden"
PANOPTIC, PER_PIXEL = "tiny_panoptic", "tiny_per_pixel"


def replaced(owner, name, make):
    return mock.patch.object(owner, name, make(getattr(owner, name)))


# --- reading and resizing


def by_tensorflow(**options):
    def make(right):
        def resize(image, min_size, max_size):
            size = preprocessing.resized_shape(*image.shape[:2], min_size, max_size)
            return tf.cast(tf.round(tf.image.resize(image, size, **options)), tf.uint8).numpy()

        return resize

    return make


def truncated(height, width, min_size, max_size):
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return int(height * scale), int(width * scale)


READING = {
    # name: (item, what is broken, how, cause)
    "right": ("0/read/upright", "decode_image", lambda right: lambda data: right(ends.png(right(data))), None),
    "truncated": ("0/resized/shortest_edge", "resized_shape", lambda right: truncated, "dtype rounding"),
    "truncated sizes": ("resized/shapes", "resized_shape", lambda right: truncated, "dtype rounding"),
    "no limit": ("resized/shapes", "resized_shape", lambda right: lambda *sizes: right(*sizes[:3], 10**6), "clip"),
    "by the longer side": (
        "resized/shapes",
        "resized_shape",
        lambda right: lambda h, w, low, high: tuple(int(side * min(low, high) / max(h, w) + 0.5) for side in (h, w)),
        "axis order",
    ),
    "rounded once": ("0/resized/shortest_edge", "resize_shortest_edge", by_tensorflow(antialias=True), "dtype rounding"),
    "not antialiased": ("0/resized/shortest_edge", "resize_shortest_edge", by_tensorflow(), "interpolation"),
    "cubic": ("0/resized/shortest_edge", "resize_shortest_edge", by_tensorflow(method="bicubic"), ""),
    "brighter": ("0/resized/shortest_edge", "resize_shortest_edge", lambda right: lambda *a: right(*a) // 2 + 60, ""),
}


@pytest.mark.parametrize("name", READING)
def test_reading_and_resizing(name):
    item, function, make, cause = READING[name]
    image = np.random.default_rng(0).integers(0, 256, (50, 71, 3)).astype(np.uint8)
    with replaced(preprocessing, function, make):
        site = diagnose_ends.site_of(types.SimpleNamespace(images=[image]), None, "preprocessing", item)
    finding = diagnose(site)
    assert (finding and finding.cause) == cause, finding


def test_an_orientation_that_is_ignored():
    """Of an image that is not square: its pixels lie in another shape."""
    image = np.random.default_rng(0).integers(0, 256, (20, 31, 3)).astype(np.uint8)
    lying = {orientation: lie(image) for orientation, lie in ends.UPRIGHT.items()}
    files = {ends.png(pixels, orientation): pixels for orientation, pixels in lying.items()}
    with mock.patch.object(preprocessing, "decode_image", files.get):
        site = diagnose_ends.site_of(types.SimpleNamespace(images=[image]), None, "preprocessing", "0/read/upright")
    assert diagnose(site).cause == "axis flip"


# --- assignment


def greedy(costs, count):
    costs, queries = costs.numpy().copy(), np.full(2, -1)
    for _ in range(int(count)):
        query, thing = np.unravel_index(costs.argmin(), costs.shape)
        queries[thing] = query
        costs[query], costs[:, thing] = np.inf, np.inf
    return Assignment(tf.constant(queries), tf.constant(True))


ASSIGNED = {
    "right": (lambda right: right, None),
    "cheapest pair first": (lambda right: greedy, "assignment"),
    "largest": (lambda right: lambda costs, count: right(-costs, count), "assignment"),
    "100 for NaN": (lambda right: lambda costs, count: right(tf.where(tf.math.is_nan(costs), 100.0, costs), count), "not finite"),
    "0 for NaN": (lambda right: lambda costs, count: right(tf.where(tf.math.is_nan(costs), 0.0, costs), count), "not finite"),
    "nothing": (lambda right: lambda costs, count: Assignment(tf.constant([-1, -1]), tf.constant(False)), ""),
}


@pytest.mark.parametrize("name", ASSIGNED)
def test_assignments_of_a_probe(name):
    make, cause = ASSIGNED[name]
    with replaced(matcher, "linear_assignment", make):
        finding = diagnose(probe_site())
    assert (finding and finding.cause) == cause, finding


# --- losses


def of_criterion(name, change):
    """An attribute of the criterion, behind its constructor."""

    def make(right):
        def init(self, *arguments):
            right(self, *arguments)
            setattr(self, name, change(getattr(self, name)))

        return init

    return SetCriterion, "__init__", make


def exchanged(weights):
    other = {"loss_mask": "loss_dice", "loss_dice": "loss_mask"}
    return {key: weights[key.replace(key[:9], other.get(key[:9], key[:9]))] for key in weights}


def with_gamma(gamma):
    def make(right):
        def losses(logits, masks, sizes):
            found = criterion.resize_bilinear(logits, tf.shape(masks)[2:])
            wrong, alpha = tf.where(masks, -found, found), tf.where(masks, tf.constant(0.25, found.dtype), 0.75)
            return tf.reduce_mean(alpha * tf.sigmoid(wrong) ** gamma * tf.nn.softplus(wrong), [2, 3]), right(logits, masks, sizes)[1]

        return losses

    return criterion, "_mask_losses", make


def labelled(change):
    """Of the per-pixel baselines."""
    return PerPixelCriterion, "_labels", lambda right: lambda self, labels, outputs: right(self, change(labels, self.ignore_value), outputs)


def doubled(right):
    """Resized as it is not in any list."""
    return lambda logits, size, *sizes: 0.5 * (right(logits, size, *sizes) + right(tf.roll(logits, 1, -1), size, *sizes))


LOSSES = {
    # name: (trace, name of the loss, what is broken, where, cause)
    "gamma": (PANOPTIC, "loss_mask", with_gamma(1.5), "loss_mask", "exponent"),
    "weight of no object": (PANOPTIC, "loss_ce", of_criterion("no_object_weight", lambda weight: 1.0), "loss_ce", "scale"),
    "class of no object": (PANOPTIC, "loss_ce", of_criterion("num_classes", lambda classes: 0), "loss_ce", "class order"),
    "layers": (
        PANOPTIC,
        "loss_ce_0",
        (criterion, "decoder_layers", lambda right: lambda outputs: [right(outputs)[0], *right(outputs)[:0:-1]]),
        "loss_ce",
        "layer order",
    ),
    "weights": (PANOPTIC, "total", of_criterion("weights", exchanged), "total", "scale"),
    "another weight": (PANOPTIC, "total", of_criterion("weights", lambda weights: weights | {"loss_dice": 1.23}), "total", ""),
    "another resize": (PANOPTIC, "loss_dice", (criterion, "resize_bilinear", doubled), "loss_dice", ""),
    "ignored": (
        PER_PIXEL,
        "loss_sem_seg",
        labelled(lambda labels, none: tf.where(labels == none, 0, labels)),
        "loss_sem_seg",
        "mask missing",
    ),
    "from 1": (
        PER_PIXEL,
        "loss_sem_seg",
        labelled(lambda labels, none: tf.where(labels == 0, none, labels - 1)),
        "loss_sem_seg",
        "class order",
    ),
    "one more": (PER_PIXEL, "loss_sem_seg", labelled(lambda labels, none: labels + 1), "loss_sem_seg", "not finite"),
    "all pixels": (
        PER_PIXEL,
        "loss_sem_seg",
        (
            per_pixel_criterion,
            "_cross_entropy",
            lambda right: lambda logits, labels, sizes: right(logits, labels, sizes) * tf.reduce_mean(tf.cast(labels >= 0, logits.dtype)),
        ),
        "loss_sem_seg",
        "normaliser",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    """Of recorded outputs, as TensorFlow's broken criterion takes them."""
    model, loss, (owner, function, make), where, cause = LOSSES[name]
    config = named_config(model)
    with Trace(GOLDEN / "whole" / model).case("odd") as case, replaced(owner, function, make):
        reference = case.reference
        outputs = {each: "sem_seg_head#0" + "".join(f"[{part}]" for part in each.split(".")) for each in reference.group("outputs")}
        groups = {
            "outputs": {each: reference.read("taps", tap) for each, tap in outputs.items()},  # which are whole
            "losses": {each: reference.read("losses", each) for each in reference.group("losses")},
        }
        results = types.SimpleNamespace(groups=groups, view=None, official=lambda group, each: groups[group][each])
        sites = Results(case, results, config)
        own = sites._losses_of(lambda labels: labels, lambda maps: maps)
        task = diagnose_results._task(config)
        groups["losses"] = {key: own[key] for key in groups["losses"] if key in own}
        groups["losses"]["total"] = float(task.criterion.weighted_total({key: reference.read("losses", key) for key in own}))
        site = sites.site("losses", loss)
        assert site.residual() > site.floor
        finding = diagnose(site)
    assert (finding.where, finding.cause) == (where, cause), finding.statement


def test_pairs_that_padding_makes():
    """Padded objects on the first query, as where −1 is taken for 0."""
    random = np.random.default_rng(0)
    masks, targets = random.standard_normal((2, 5, 4, 6)), [random.random((count, 16, 24)) > 0.5 for count in (3, 1)]
    assignments = [np.array([2, 0, 4]), np.array([1])]
    padded = np.zeros((2, 3, 16, 24), bool)
    for index, own in enumerate(targets):
        padded[index, : len(own)] = own
    assignment = tf.constant([[[2, 0, 4], [1, -1, -1]]])
    outputs = {"pred_masks": tf.constant(masks), "pred_logits": tf.zeros((2, 5, 3), tf.float64)}
    for padding, chosen in (("left out", assignment), ("on the first query", tf.maximum(assignment, 0))):
        losses = criterion._losses_masks(outputs, {"masks": tf.constant(padded)}, chosen)
        for formula, [loss] in zip((formulas.mask_loss, formulas.dice_loss), losses, strict=True):
            found = formula(masks, targets, assignments, padded=padding)
            np.testing.assert_allclose(found, loss.numpy() / 4, rtol=1e-12)


# --- results


@pytest.mark.parametrize(("present", "cause"), [((0, 1), "axis order"), ((0,), "id")])
def test_results_of_the_other_image(present, cause):
    with Trace(GOLDEN / "selftest" / "tiny_panoptic_0").case("batch") as case:
        rest, reference = "resized/panoptic_seg", case.reference
        groups = {
            "inference": {f"{image}/{rest}": reference.read("inference", f"{1 - image}/{rest}") for image in present},
            "outputs": {each: np.zeros(record.shape) for each, record in reference.group("outputs").items()},
        }
        results = types.SimpleNamespace(groups=groups, view=None, official=lambda group, each: groups[group][each])
        finding = diagnose(Results(case, results, named_config(PANOPTIC)).site("inference", f"0/{rest}"))
    assert (finding.where, finding.cause) == ("inference/panoptic_seg", cause)


@pytest.mark.parametrize(
    ("choices", "before"),
    [
        ({"cropped": "no"}, True),
        ({"cropped": "squeezed into the image"}, False),
        ({"rule": "bilinear, no half pixels"}, True),
        ({"canvas": "the image"}, True),
        ({"applied": "softmax before resizing"}, None),
    ],
)
def test_choices_of_resizing_differ(choices, before):
    """From the official result, and from one another."""
    sizes = {"canvas": (16, 24), "image": (13, 22), "output": (20, 31)}
    maps = np.random.default_rng(0).standard_normal((4, 4, 6))

    def formula(**choices):
        if before is None:
            return formulas.pixel_logits(maps, sizes, **choices)
        return formulas.semantic(np.eye(4)[:, :3], maps, sizes, not before, **choices)

    official, wrong = formula(), formula(**choices)
    assert official.shape == wrong.shape
    table = formulas.LOGITS_CHOICES if before is None else formulas.SEMANTIC_CHOICES
    finding = diagnose(ResultSite("x", wrong, official, formula, table))
    causes = {choice.keyword: choice.cause_of(choices[choice.keyword]) for choice in table if choice.keyword in choices}
    assert [finding.cause] == list(causes.values()), finding.statement


def test_another_shape_or_kind_breaks_nothing():
    expected = np.arange(12.0).reshape(3, 4)
    for actual in (np.zeros((4, 3)), np.zeros(0), np.full((3, 4), np.nan), np.array(3), np.zeros((3, 4), bool)):
        finding = diagnose(ResultSite("x", actual, expected, lambda turned=False: expected.T if turned else expected))
        assert finding is None or finding.cause in ("", "not finite")


# --- gradients


def gradient_of(function):
    def rerun():
        x = tf.constant(np.linspace(-1, 1, 6))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x).numpy()

    return rerun


def overwritten(x):
    @tf.custom_gradient
    def cube(x):
        return x**3, lambda upstream: 2.9 * upstream * x**2

    return tf.reduce_sum(cube(x))


def cut_short(x):
    @tf.custom_gradient
    def cube(x):
        return x**3, lambda upstream: 3 * upstream * x**2 * tf.constant([0.0, 0, 0, 1, 1, 1], tf.float64)

    return tf.reduce_sum(cube(x))


def constant_factor(x):
    return tf.reduce_sum(x**2 * tf.stop_gradient(x))


def two_constants(x):
    mean = tf.stop_gradient(x)
    return tf.reduce_sum(x * mean * tf.stop_gradient(x))


def looked_up(x):
    @tf.custom_gradient
    def picked(x):
        return tf.gather(x**3, range(6)), lambda upstream: 2.9 * upstream * x**2

    return tf.reduce_sum(picked(x))


def noisy(x):
    return tf.reduce_sum(x**3) + 1e-3 * tf.reduce_sum(tf.sin(9 * x))


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (overwritten, "derivative"),
        (cut_short, "missing term"),
        (constant_factor, "missing term"),
        (two_constants, "missing term"),
        (looked_up, "derivative"),
        (noisy, None),
    ],
)
def test_gradients(function, cause):
    expected = 3 * np.linspace(-1, 1, 6) ** 2
    rerun = gradient_of(function)
    finding = diagnose(GradientSite("x", rerun(), expected, rerun))
    assert (finding and finding.cause) == cause, finding
    if cause:
        assert "test_diagnose_results.py:" in finding.hypothesis
    assert tf.custom_gradient.__name__ == "custom_gradient"


def test_a_relu_that_lets_gradients_pass():
    values = np.array([-2.0, -1, 1, 2])
    arriving = np.array([0.3, 0.4, 0.5, 0.6])
    site = GradientSite("x", arriving, arriving * (values > 0), lambda: arriving, values)
    assert diagnose(site).cause == "derivative"
    site = GradientSite("x", arriving, arriving * (values > 1.5), lambda: arriving, values)
    assert (found := diagnose(site)) is None or not found.cause


def test_outputs_at_other_places():
    random = np.random.default_rng(0)
    official = {f"head#0[aux_outputs][{index}]": random.standard_normal((2, 3)) for index in range(3)}
    names = list(official)

    def site(own):
        tensors = {name: (own[name], official[name]) for name in names}
        failing = [name for name in names if not np.array_equal(*tensors[name])]
        level = types.SimpleNamespace(tensors=tensors, failing=failing)
        return types.SimpleNamespace(tap=failing[0], where="head", floor=1e-9, levels=[level])

    backwards = {name: official[other] for name, other in zip(names, names[::-1], strict=True)}
    finding = diagnose(diagnose_results._of_other_taps(site(backwards)))
    assert (finding.where, finding.cause) == ("head", "layer order")
    assert finding.hypothesis == "0[aux_outputs][0] is 0[aux_outputs][2], 0[aux_outputs][2] is 0[aux_outputs][0]"
    assert diagnose_results._of_other_taps(site(backwards | {names[1]: official[names[1]] + 1e-6})) is None


# --- steps


def test_clipping_by_value():
    random = np.random.default_rng(0)
    before = [random.standard_normal(5) for _ in range(3)]
    norm = float(np.linalg.norm(np.concatenate(before)))

    def site(clip):
        official = [formulas.clipped(each, norm, 0.5) for each in before]
        pairs = [(clip(each), expected) for each, expected in zip(before, official, strict=True)]
        return diagnose_steps.ClipSite(
            pairs, lambda **choices: formulas.clipped(np.concatenate(before), norm, 0.5, **choices), formulas.CLIP_CHOICES
        )

    finding = diagnose(site(lambda each: np.clip(each, -0.5, 0.5)))
    assert (finding.cause, finding.hypothesis) == ("clip", "clipped 'by value' instead of 'by the norm of all'")
    assert "a factor of its own" in diagnose(site(lambda each: formulas.clipped(each, float(np.linalg.norm(each)), 0.5))).hypothesis
    assert diagnose(site(lambda each: np.tanh(each))).cause == ""
    assert diagnose(site(lambda each: formulas.clipped(each, norm, 0.5))) is None


def test_moments_that_are_not_corrected():
    weight, gradient, nothing = np.ones(5), np.linspace(0.1, 1, 5), np.zeros(5)

    def moved(**choices):
        return formulas.adamw(weight, gradient, (nothing, nothing), 1, 1e-3, 0.01, **choices)["moved"]

    finding = diagnose(ResultSite("weights", moved(corrected="neither"), moved(), moved, formulas.STEP_CHOICES))
    assert (finding.cause, finding.others) == ("missing term", ())
