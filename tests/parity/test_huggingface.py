"""The model of Hugging Face's transformers and ours, from the same tensors: every logit in float64. Skips without transformers."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from checkpoints import registry, synthesize
from converters.huggingface import official_tensors
from converters.tables import maskformer as table
from parity.inputs import ImageSpec
from tests.converters.huggingface_renaming import renamed
from tests.golden.record_huggingface import transformers_config
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import record_taps

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

MORE = ("encoder.model.layernorm.weight", "encoder.model.layernorm.bias", "num_batches_tracked")
"""What transformers' model has and the official one has not."""


def reference_model(entry):
    """transformers' model with the entry's synthetic checkpoint, under the names of its files; what it has more is random."""
    tensors = renamed(synthesize.synthesize(entry))
    model, loading = transformers.MaskFormerForInstanceSegmentation.from_pretrained(
        None,
        config=transformers_config(entry),
        state_dict={name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()},
        output_loading_info=True,
    )
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    assert all(name.endswith(MORE) for name in loading["missing_keys"])
    for name, tensor in model.state_dict().items():
        if name.endswith(MORE):
            tensor.random_(2, 9)
    return model.eval()


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
    reference = reference_model(entry)
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

    def given(*arguments):
        # Recent versions of transformers compute it in the model's precision; upstream, and we, in float32.
        assert relative(embedding, compute(*arguments).numpy()) < 1e-6
        return torch.from_numpy(embedding.astype(np.float64))

    same, own = expected(given), expected(compute)
    for key in actual:  # measured: at most 2.9e-14, and 2.5e-7 with its own embedding
        assert relative(actual[key], same[key]) < 1e-12, key
        assert relative(actual[key], own[key]) < 1e-6, key
