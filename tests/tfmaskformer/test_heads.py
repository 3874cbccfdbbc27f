"""The per-pixel baselines' contract: outputs, dtypes, both kinds of padding. That they equal PyTorch is parity's to prove."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tests.tfmaskformer.conftest import SMALL, random_values
from tfmaskformer import PerPixelCriterion
from tfmaskformer.config import ConfigError
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import parameter_specs

BASE = SMALL["base"].replace(size_divisibility=0)
QUERIES = dataclasses.replace(BASE.predictor, num_queries=BASE.num_classes)
CONFIGS = {
    "plain": BASE.replace(head="PerPixelBaselineHead"),
    "plus": BASE.replace(head="PerPixelBaselinePlusHead", predictor=QUERIES),
    "encoder": SMALL["encoder"].replace(
        head="PerPixelBaselinePlusHead", predictor=dataclasses.replace(SMALL["encoder"].predictor, num_queries=SMALL["encoder"].num_classes)
    ),
}
SIZES = ((75, 91), (60, 50))


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    config = CONFIGS[request.param]
    model = MaskFormer(config, "float64")
    model.build_parameters(random_values(config).__getitem__)
    return model


def photo(height, width, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_per_pixel_head_has_no_classes_of_queries():
    for name, config in CONFIGS.items():
        names = set(parameter_specs(MaskFormer(config)))
        assert not any("class_embed" in each for each in names)
        assert ("sem_seg_head.predictor.weight" in names) == (name == "plain")
        assert ("sem_seg_head.predictor.query_embed.weight" in names) == (name != "plain")
    with pytest.raises(ConfigError, match="one for each class"):
        BASE.replace(head="PerPixelBaselinePlusHead")


def test_outputs_are_the_logits_of_classes_before_upsampling(model):
    config = model.config
    outputs = model(photo(75, 91)[None])
    layers = 0 if config.head == "PerPixelBaselineHead" else config.predictor.dec_layers - 1
    assert outputs.keys() == {"sem_seg", "padded_size", *["aux_outputs"] * bool(layers)}
    assert outputs["sem_seg"].shape == (1, config.num_classes, 19, 23)
    assert [list(layer) for layer in outputs.get("aux_outputs", ())] == [["sem_seg"]] * layers
    assert outputs["padded_size"].numpy().tolist() == [75, 91]


def test_masked_padding_gives_what_each_image_gives_alone(model):
    """On a canvas that fits neither; losses and gradients too."""
    criterion = PerPixelCriterion(model.config)
    images = [photo(*size, seed) for seed, size in enumerate(SIZES)]
    canvas = np.full((2, 93, 100, 3), 255, np.uint8)
    labels = np.full((2, 93, 100), 255, np.int32)
    for index, image in enumerate(images):
        canvas[index, : image.shape[0], : image.shape[1]] = image
        labels[index, : image.shape[0], : image.shape[1]] = image[..., 0] % (model.config.num_classes)
    variables = [variable.value for variable in model.trainable_variables]

    def step(images, sizes, labels, padding):
        with tf.GradientTape() as tape:
            outputs = model(images, sizes, padding=padding)
            total = criterion.weighted_total(criterion(outputs, {"sem_seg": labels}))
        return outputs, total, tape.gradient(total, variables)

    together, total, gradients = step(canvas, tf.constant(SIZES), labels, "masked")
    alone = [step(image[None], None, labels[i : i + 1, : image.shape[0], : image.shape[1]], "official") for i, image in enumerate(images)]
    for index, (outputs, _, _) in enumerate(alone):
        layers = zip((together, *together.get("aux_outputs", ())), (outputs, *outputs.get("aux_outputs", ())), strict=True)
        for actual, expected in layers:
            height, width = expected["sem_seg"].shape[2:]
            own = actual["sem_seg"][index].numpy()
            # The float32 position embedding is the only thing above 1e-12.
            assert np.linalg.norm(own[:, :height, :width] - expected["sem_seg"][0]) < 1e-6 * np.linalg.norm(expected["sem_seg"])
            own[:, :height, :width] = 0
            assert not own.any()
    shares = np.array([height * width for height, width in SIZES]) / sum(height * width for height, width in SIZES)
    assert float(total) == pytest.approx(sum(share * float(loss) for share, (_, loss, _) in zip(shares, alone, strict=True)), rel=1e-6)
    for together_gradient, *own in zip(gradients, *(each[2] for each in alone), strict=True):
        expected = sum(share * gradient.numpy() for share, gradient in zip(shares, own, strict=True))
        assert np.linalg.norm(together_gradient - expected) <= 1e-5 * np.linalg.norm(expected) + 1e-9


def test_mixed_bfloat16_takes_the_loss_in_float32():
    model = MaskFormer(CONFIGS["plus"], "mixed_bfloat16")
    outputs = model(photo(75, 91)[None])
    assert outputs["sem_seg"].dtype == tf.bfloat16
    losses = PerPixelCriterion(model.config)(outputs, {"sem_seg": np.zeros((1, 75, 91), np.int32)})
    assert {loss.dtype for loss in losses.values()} == {tf.float32}
    assert np.isfinite(list(map(float, losses.values()))).all()
