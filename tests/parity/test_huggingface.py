"""The model of Hugging Face's transformers and ours, from the same tensors: every logit in float64. Runs where transformers is installed."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import tensorflow as tf

from checkpoints import registry
from converters.huggingface import official_tensors
from converters.tables import maskformer as table
from parity.inputs import ImageSpec
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import record_taps

from ..golden.record_huggingface import transformers_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PHOTO = registry.__file__.replace("registry.py", "photos/chelsea.png")

CASES = {
    "maskformer_panoptic_swin_tiny_bs64_554k": (235, 333),
    "maskformer_swin_base_IN21k_384_bs16_160k_res640": (160, 224),
    "maskformer_R50_bs32_60k": (160, 224),
    "maskformer_R101_bs16_90k": (160, 224),
}
"""Entry → image size, px. The first model pads nothing: windows and merged patches are padded inside, at odd sizes."""


def random_model(entry):
    """transformers' model; no tensor is left at a value that hides a mistake (zero biases, unit norms)."""
    torch.manual_seed(0)
    model = transformers.MaskFormerForInstanceSegmentation(transformers_config(entry)).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and name != "criterion.empty_weight":
            tensor.add_(torch.randn_like(tensor), alpha=0.5 if "bias_table" in name else 0.1 if tensor.ndim < 2 else 0.02)
    return model


def converted_model(entry, tensors):
    """Our model in float64, with the tensors of transformers."""
    config = MaskFormerConfig.from_dict(entry.config)
    official, _ = official_tensors(tensors)
    layout = {name: (spec.shape, spec.dtype) for name, spec in registry.layout(entry).items()}
    assert {name: (tensor.shape, tensor.dtype.name) for name, tensor in official.items()} == layout
    for drop in table.drops(config):
        np.testing.assert_array_equal(np.asarray(official[drop.source]), drop.expected)

    def value(name):
        (rule,) = [rule for rule in table.rules(config, "v2") if rule.target_of(name)]
        return rule.transform.apply(np.asarray(official[name]).astype(np.float64))

    model = MaskFormer(config, "float64")
    model.build_parameters(value)
    return model


def relative(actual, expected):
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_same_logits(name):
    entry = registry.entry(name)
    reference = random_model(entry)
    ours = converted_model(entry, {name: tensor.numpy() for name, tensor in reference.state_dict().items()})
    image = ImageSpec(PHOTO, *CASES[name]).read()[None]
    pixels = ours.preprocess(image).numpy().transpose(0, 3, 1, 2)
    with record_taps() as taps:
        outputs = ours(image)
    actual = {key: outputs[key].numpy() for key in ("pred_logits", "pred_masks")}
    embedding = taps["sem_seg_head.predictor.pe_layer#0"].numpy().transpose(0, 3, 1, 2)
    del ours, outputs, taps
    gc.collect()

    reference.double()
    embedder = reference.model.transformer_module.position_embedder
    compute = embedder.forward

    def expected(forward):
        embedder.forward = forward
        with torch.no_grad():
            outputs = reference(torch.from_numpy(pixels))
        return {"pred_logits": outputs.class_queries_logits.numpy(), "pred_masks": outputs.masks_queries_logits.numpy()}

    def given(*_, **__):
        # transformers computes it in the model's precision; upstream, and we, in float32.
        own = compute(*_, **__).numpy()
        assert 0 < relative(embedding, own) < 1e-6
        return torch.from_numpy(embedding.astype(np.float64))

    same, own = expected(given), expected(compute)
    errors = {key: relative(actual[key], same[key]) for key in actual}
    print(name, errors, {key: relative(actual[key], own[key]) for key in actual}, {key: same[key].std() for key in same})
    assert max(errors.values()) < 1e-12
