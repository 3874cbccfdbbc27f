"""The loss of the per-pixel baselines against sums written out in NumPy, and against the official function where it is there."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import tensorflow as tf

import tfmaskformer
from tfmaskformer import per_pixel_criterion
from tfmaskformer.config import CriterionConfig, MaskFormerConfig, TransformerPredictorConfig
from tfmaskformer.per_pixel_criterion import PerPixelCriterion

IGNORE = 200


def criterion_for(classes, layers=1, **criterion):
    predictor = TransformerPredictorConfig(num_queries=classes, dec_layers=layers)
    criterion = CriterionConfig(**{"ignore_value": IGNORE} | criterion)
    return PerPixelCriterion(MaskFormerConfig("test", classes, head="PerPixelBaselinePlusHead", predictor=predictor, criterion=criterion))


def upsampled(logits):
    """By 4, pixel for pixel: sample ``(i + ½) / 4 − ½``, at the border the border's; float64 [classes, 4 · height, 4 · width]."""
    classes, height, width = logits.shape
    result = np.zeros((classes, 4 * height, 4 * width))
    for row, column in np.ndindex(4 * height, 4 * width):
        y, x = (max((i + 0.5) / 4 - 0.5, 0) for i in (row, column))
        (top, left), (dy, dx) = map(int, (y, x)), (y % 1, x % 1)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        above = (1 - dx) * logits[:, top, left] + dx * logits[:, top, right]
        below = (1 - dx) * logits[:, bottom, left] + dx * logits[:, bottom, right]
        result[:, row, column] = (1 - dy) * above + dy * below
    return result


def expected_loss(images):
    """Mean of −log softmax over the labelled pixels of (logits [classes, height, width], labels [rows ≤ 4 · height, …]) pairs."""
    losses = []
    for logits, labels in images:
        scores = upsampled(logits.astype(np.float64))
        for row, column in np.argwhere(labels != IGNORE):
            pixel = scores[:, row, column]
            losses.append(math.log(sum(math.exp(value) for value in pixel)) - pixel[labels[row, column]])
    return sum(losses) / len(losses)


def example(batch=2, classes=5, height=6, width=7, rows=23, columns=26, seed=0):
    random = np.random.default_rng(seed)
    logits = 3 * random.standard_normal((batch, classes, height, width))
    labels = random.integers(0, classes, (batch, rows, columns), np.int32)
    labels[random.random(labels.shape) < 0.3] = IGNORE
    return logits, labels


def loss_and_gradient(criterion, logits, labels, mode="graph", **outputs):
    def compute(logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            losses = criterion({"sem_seg": logits, **outputs}, {"sem_seg": tf.constant(labels)})
            total = criterion.weighted_total(losses)
        return total, tape.gradient(total, logits)

    if mode != "eager":
        compute = tf.function(compute, jit_compile=mode == "xla")
    return [result.numpy() for result in compute(tf.constant(logits))]


def test_one_pixel_by_hand():
    """One labelled pixel in a corner, where upsampling leaves the logits as they are: log(1 + e^(1 − 3)) of two classes."""
    labels = np.full((1, 4, 4), IGNORE, np.int32)
    labels[0, 0, 0] = 1
    logits = np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    loss, gradient = loss_and_gradient(criterion_for(2), logits, labels)
    assert loss == pytest.approx(math.log1p(math.exp(-2)), rel=1e-15)
    np.testing.assert_allclose(gradient.ravel(), np.array([1, -1]) / (1 + math.exp(2)), rtol=1e-14)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_is_the_mean_over_labelled_pixels_of_the_upsampled_logits(mode):
    logits, labels = example()
    loss, gradient = loss_and_gradient(criterion_for(5), logits, labels, mode)
    assert loss == pytest.approx(expected_loss(zip(logits, labels, strict=True)), rel=1e-13)
    change = np.random.default_rng(1).standard_normal(logits.shape)
    step = 1e-4
    losses = [loss_and_gradient(criterion_for(5), logits + sign * step * change, labels)[0] for sign in (1, -1)]
    assert np.vdot(gradient, change) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6)


def test_the_weight_is_in_the_losses_and_layers_are_apart():
    logits, labels = example(batch=1)
    criterion = criterion_for(5, layers=3, loss_weight=0.25)
    outputs = {"sem_seg": tf.constant(logits), "aux_outputs": [{"sem_seg": tf.constant(factor * logits)} for factor in (2.0, 3.0)]}
    losses = criterion(outputs, {"sem_seg": labels})
    assert list(losses) == ["loss_sem_seg", "loss_sem_seg_0", "loss_sem_seg_1"] == list(criterion.weights)
    for factor, loss in zip((1, 2, 3), losses.values(), strict=True):
        assert float(loss) == pytest.approx(0.25 * expected_loss([(factor * logits[0], labels[0])]), rel=1e-12)
    assert float(criterion.weighted_total(losses)) == pytest.approx(sum(map(float, losses.values())), rel=1e-15)


def test_keys_follow_the_head():
    plain = MaskFormerConfig("plain", 3, head="PerPixelBaselineHead")
    assert PerPixelCriterion(plain).weights == {"loss_sem_seg": 1.0}
    with pytest.raises(ValueError, match="MaskFormerHead, whose losses are those of SetCriterion"):
        PerPixelCriterion(MaskFormerConfig("other", 3))
    with pytest.raises(ValueError, match="PerPixelBaselineHead, whose loss is that of PerPixelCriterion"):
        tfmaskformer.SetCriterion(plain)


def test_chunks_are_the_whole(monkeypatch):
    logits, labels = example(height=11, rows=44)
    small = loss_and_gradient(criterion_for(5), logits, labels)
    monkeypatch.setattr(per_pixel_criterion, "CHUNK_ROWS", 64)
    whole = loss_and_gradient(criterion_for(5), logits, labels)
    for actual, expected in zip(small, whole, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-17)


def test_nothing_of_the_whole_is_kept_for_the_gradient():
    """In a graph the largest tensor is a chunk, not the upsampled logits."""
    classes, height, width = 40, 32, 8
    logits, labels = example(1, classes, height, width, 4 * height, 4 * width)
    criterion = criterion_for(classes)

    @tf.function
    def compute(logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            (loss,) = criterion({"sem_seg": logits}, {"sem_seg": labels}).values()
        return tape.gradient(loss, logits)

    graph = compute.get_concrete_function(tf.constant(logits)).graph
    bodies = [getattr(function, "graph", None) for function in graph._functions.values()]
    sizes = [
        tensor.shape.num_elements() for each in (graph, *filter(None, bodies)) for op in each.get_operations() for tensor in op.outputs
    ]
    largest = max(size for size in sizes if size is not None)
    assert largest < classes * 16 * height * width  # the whole


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_masked_padding_is_each_image_alone(mode):
    criterion = criterion_for(5)
    sizes = np.array([[21, 26], [12, 9]], np.int32)
    logits, labels = example(height=8, width=7, rows=30, columns=27)
    alone = []
    for index, (rows, columns) in enumerate(sizes):
        height, width = -(-rows // 4), -(-columns // 4)
        alone.append((logits[index, :, :height, :width], labels[index, :rows, :columns]))
        logits[index, :, height:] = 0
        logits[index, :, :, width:] = 0  # as the model leaves it; labels outside mean nothing
    loss, gradient = loss_and_gradient(criterion, logits, labels, mode, valid_sizes=tf.constant(sizes))
    assert loss == pytest.approx(expected_loss(alone), rel=1e-13)
    for index, (own, own_labels) in enumerate(alone):
        _, expected = loss_and_gradient(criterion, own[None], own_labels[None])
        share = (own_labels != IGNORE).sum() / sum((image != IGNORE).sum() for _, image in alone)
        height, width = own.shape[1:]
        np.testing.assert_allclose(gradient[index, :, :height, :width], share * expected[0], rtol=1e-10, atol=1e-15)
        assert not gradient[index, :, height:].any()
        assert not gradient[index, :, :, width:].any()


def test_without_labels_the_loss_is_nan_and_the_gradient_zero():
    """As ``torch.nn.functional.cross_entropy``."""
    logits, labels = example()
    loss, gradient = loss_and_gradient(criterion_for(5), logits, np.full_like(labels, IGNORE))
    assert math.isnan(loss)
    assert not gradient.any()


@pytest.mark.parametrize("label", [5, -1, 255])
def test_a_label_that_is_no_class_makes_everything_nan(label):
    logits, labels = example()
    labels[1, 3, 4] = label
    loss, gradient = loss_and_gradient(criterion_for(5), logits, labels)
    assert math.isnan(loss)
    assert np.isnan(gradient).all()


def test_minus_one_may_be_the_ignore_value_and_so_may_a_class():
    logits, labels = example()
    expected = loss_and_gradient(criterion_for(5), logits, labels)[0]
    assert loss_and_gradient(criterion_for(5, ignore_value=-1), logits, np.where(labels == IGNORE, -1, labels))[0] == expected
    ignoring = np.where(labels == 2, IGNORE, labels)
    assert (
        loss_and_gradient(criterion_for(5, ignore_value=2), logits, np.where(labels == IGNORE, 2, labels))[0]
        == loss_and_gradient(criterion_for(5), logits, ignoring)[0]
    )


def test_bfloat16_is_measured_in_float32_and_large_logits_stay_finite():
    logits, labels = example()
    rounded = tf.cast(logits, tf.bfloat16)
    for factor in (1, 1000):
        (loss,) = criterion_for(5)({"sem_seg": factor * rounded}, {"sem_seg": labels}).values()
        assert loss.dtype == tf.float32
        assert float(loss) == pytest.approx(
            loss_and_gradient(criterion_for(5), np.asarray(factor * rounded, np.float64), labels)[0], rel=1e-6
        )


@pytest.mark.parametrize(
    ("shapes", "extra", "message"),
    [
        (
            ((2, 5, 6, 7), (2, 20, 26)),
            {},
            r"on \[20, 26\] px and outputs\['sem_seg'\] on \[6, 7\], expected a canvas of which they are a fourth",
        ),
        (((2, 5, 6, 7), (2, 24, 28)), {"padded_size": tf.constant([23, 26])}, r"expected \[23, 26\] px, the padded canvas"),
        (((2, 5, 6, 7), (1, 23, 26)), {}, "the batch of the targets"),
        (((2, 5, 6), (2, 23, 26)), {}, r"outputs\['sem_seg'\] must have 4 dimensions"),
        (((2, 5, 6, 7), (23, 26)), {}, r"targets\['sem_seg'\] must have 3 dimensions"),
    ],
)
def test_shapes_that_do_not_fit_are_told(shapes, extra, message):
    logits, labels = (np.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        criterion_for(5)({"sem_seg": tf.constant(logits), **extra}, {"sem_seg": labels.astype(np.int32)})


def test_is_the_official_loss_in_float32(official_sources):
    from parity import official

    torch = pytest.importorskip("torch")
    official.load()
    from mask_former.modeling.heads.per_pixel_baseline import PerPixelBaselineHead

    head = types.SimpleNamespace(ignore_value=IGNORE, common_stride=4, loss_weight=0.5)
    logits, labels = (values[..., : 4 * 6, : 4 * 7] for values in example(rows=24, columns=28))
    tensor = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    (expected,) = PerPixelBaselineHead.losses(head, tensor, torch.tensor(labels, dtype=torch.long)).values()
    expected.backward()
    loss, gradient = loss_and_gradient(criterion_for(5, loss_weight=0.5), logits.astype(np.float32), labels)
    assert loss == pytest.approx(float(expected.detach()), rel=5e-7)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-4, atol=1e-7)
