"""The config of a checkpoint, from its tensors and the zoo."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from checkpoints import registry
from converters import infer as module
from converters.errors import ConversionError
from converters.infer import flatten, infer, unflatten
from converters.named_config import named_config
from tfmaskformer.config import MaskFormerConfig

OFFICIAL = [entry.name for entry in registry.entries()]
R50_PANOPTIC = "maskformer_panoptic_R50_bs64_554k"


def tensors_of(entry, **changes):
    """Tensors of the recorded layout that need no memory; ``changes``: v2 name with __ for dots → shape, or None to leave it out."""
    shapes = {name: spec.shape for name, spec in registry.layout(entry).items()} | {k.replace("__", "."): v for k, v in changes.items()}
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items() if shape is not None}
    if "criterion.empty_weight" in tensors:
        weight = np.ones(shapes["criterion.empty_weight"], np.float32)
        weight[-1] = 0.1
        tensors["criterion.empty_weight"] = weight
    return tensors


PREDICTOR = "sem_seg_head__predictor__"


def with_classes(entry, classes):
    shapes = {"class_embed__weight": (classes + 1, 256), "class_embed__bias": (classes + 1,)}
    return tensors_of(entry, **{PREDICTOR + key: shape for key, shape in shapes.items()}, criterion__empty_weight=(classes + 1,))


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_model_is_recognised(name):
    entry = registry.entry(name)
    inference = infer(tensors_of(entry), "model.pkl")
    assert inference.config == MaskFormerConfig.from_dict(entry.config)
    assert inference.entry == entry
    assert inference.assumed == {}
    assert inference.origins["backbone.name"] == "tensors"
    assert inference.origins["test.object_mask_threshold"] == f"zoo entry {name}"
    assert inference.origins.keys() == flatten(inference.config.to_dict()).keys() - {"name"}


@pytest.mark.parametrize("name", ["tiny_panoptic", "tiny_semantic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel", "tiny_per_pixel_plus"])
def test_named_config(name):
    entry = registry.entry(name)
    inference = infer(tensors_of(entry), "model.pkl", named_config(name))
    assert inference.config == MaskFormerConfig.from_dict(entry.config)
    assert inference.assumed == {}
    assert inference.origins["predictor.nheads"] == f"config {name}"


def test_unknown_architecture_needs_a_config(tiny):
    with pytest.raises(ConversionError, match=r"no official model has this architecture(.|\n)*pixel_decoder.conv_dim: (.|\n)*--config"):
        infer(tensors_of(tiny), "model.pkl")


def test_own_queries_take_the_settings_of_the_same_classes():
    queries = {PREDICTOR + "query_embed__weight": (37, 256)}
    for name in ("maskformer_panoptic_R50_bs64_554k", "maskformer_panoptic_R50_bs16_720k"):
        entry = registry.entry(name)
        inference = infer(tensors_of(entry, **queries), "model.pkl")
        assert inference.entry is None
        assert inference.config.predictor.num_queries == 37
        assert inference.config.name == f"{name}-finetuned"
        assert inference.config.class_names == tuple(entry.config["class_names"])
        assert inference.config.size_divisibility == entry.config["size_divisibility"]
        assert inference.assumed["size_divisibility"] == entry.config["size_divisibility"]
        assert "predictor.num_queries" not in inference.assumed


def test_own_classes_have_no_names_and_settings_are_assumed():
    inference = infer(with_classes(registry.entry(R50_PANOPTIC), 7), "model.pkl")
    assert inference.config.num_classes == 7
    assert inference.config.class_names == inference.config.thing_classes == ()
    assert inference.config.dataset == ""
    assert inference.origins["class_names"] == "unknown"
    assert inference.origins["test.overlap_threshold"] == f"assumed from {R50_PANOPTIC}"
    assert inference.alternatives == ("maskformer_panoptic_R50_bs16_720k",)
    assert {"class_names", "thing_classes", "dataset", "predictor.nheads", "size_divisibility"} <= set(inference.assumed)
    assert not {"num_classes", "backbone.depth"} & set(inference.assumed)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("per_pixel_baseline_R50_bs16_160k", {"weight": (7, 256, 1, 1), "bias": (7,)}),
        ("per_pixel_baseline_plus_R50_bs16_160k", {"query_embed__weight": (7, 256)}),
    ],
)
def test_own_classes_of_a_per_pixel_baseline(name, changes):
    inference = infer(tensors_of(registry.entry(name), **{PREDICTOR + key: shape for key, shape in changes.items()}), "model.pkl")
    assert inference.config.num_classes == 7
    assert inference.config.head == registry.entry(name).config["head"]
    assert inference.origins["head"] == inference.origins["num_classes"] == "tensors"
    assert "criterion.ignore_value" in inference.assumed
    assert inference.origins["test.min_size"] == f"assumed from {name}"


def test_a_head_is_told_by_what_it_has():
    """A MaskFormer that lost its classifier is broken, not a per-pixel baseline."""
    lost = {PREDICTOR + "class_embed__weight": None, PREDICTOR + "class_embed__bias": None}
    with pytest.raises(ConversionError, match=r"missing: 'sem_seg_head\.predictor\.class_embed\.weight'"):
        infer(tensors_of(registry.entry(R50_PANOPTIC), **lost), "model.pkl")
    with pytest.raises(
        ConversionError, match="head: the tensors say 'PerPixelBaselineHead', maskformer_R50_bs16_160k has 'MaskFormerHead'"
    ):
        infer(tensors_of(registry.entry("per_pixel_baseline_R50_bs16_160k")), "model.pkl", named_config("maskformer_R50_bs16_160k"))


def test_named_config_decides_for_own_classes():
    name = "maskformer_panoptic_R50_bs16_720k"
    inference = infer(with_classes(registry.entry(R50_PANOPTIC), 7), "model.pkl", named_config(name))
    assert inference.config.test.object_mask_threshold == registry.entry(name).config["test"]["object_mask_threshold"]
    assert inference.config.num_classes == 7
    assert set(inference.assumed) == {"class_names", "thing_classes", "dataset"}


def test_named_config_of_another_architecture_is_refused():
    with pytest.raises(ConversionError) as raised:
        infer(tensors_of(registry.entry(R50_PANOPTIC)), "model.pkl", named_config("maskformer_R101_bs16_90k"))
    lines = str(raised.value).split("\n  ")
    assert lines[0] == "the tensors are not those of maskformer_R101_bs16_90k"
    assert "backbone.depth: the tensors say 50, maskformer_R101_bs16_90k has 101" in lines
    assert lines[-1] == f"the tensors are those of {R50_PANOPTIC}: leave --config out, or name another"


def test_named_config_is_refused_where_another_entry_is_exact():
    with pytest.raises(ConversionError, match=f"num_classes: the tensors say 133, (.|\n)*the tensors are those of {R50_PANOPTIC}"):
        infer(tensors_of(registry.entry(R50_PANOPTIC)), "model.pkl", named_config("maskformer_panoptic_R50_bs16_720k"))


def test_entries_with_the_same_tensors_are_told_apart_by_file_name_or_user(monkeypatch):
    """No two official models have the same tensors; if there were two with other settings, nothing would be guessed."""
    entry = registry.entry(R50_PANOPTIC)
    twin = dataclasses.replace(entry, name="twin", file_hash="abc123", config=entry.config | {"name": "twin", "size_divisibility": 32})
    monkeypatch.setattr(module.registry, "entries", lambda: (entry, twin))
    with pytest.raises(ConversionError, match=rf"several official models(.|\n)*--config {R50_PANOPTIC}\n  --config twin"):
        infer(tensors_of(entry), "model_final.pkl")
    assert infer(tensors_of(entry), "model_final_abc123.pkl").entry == twin
    assert infer(tensors_of(entry), "model_final_6f60dc.pkl").entry == entry


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({PREDICTOR + "query_embed__weight": None}, "missing: 'sem_seg_head.predictor.query_embed.weight'"),
        ({PREDICTOR + "query_embed__weight": (100,)}, r"has shape \(100,\), expected 2 axes"),
        ({PREDICTOR + "query_embed__weight": (10**12, 0)}, "none of length 0"),
        ({"backbone__res4__6__conv1__weight": (1,)}, r"has 7 blocks; known: 6 \(ResNet-50\), 23 \(ResNet-101\)"),
        ({PREDICTOR + "transformer__decoder__layers__7__x": (1,)}, "has 7 indices up to 7, but not 6"),
        ({PREDICTOR + "class_embed__weight": (1, 256)}, "describe no MaskFormer that can be built: config: 'num_classes' is 0"),
        ({"criterion__empty_weight": None}, "missing: 'criterion.empty_weight'"),
        ({"backbone__patch_embed__proj__weight": (1,)}, r"'backbone.patch_embed.proj.weight' has shape \(1,\)"),
    ],
)
def test_what_cannot_be_told_is_an_error(changes, message):
    entry = registry.entry(R50_PANOPTIC)
    with pytest.raises(ConversionError, match=message):
        infer(tensors_of(entry, **changes), "model.pkl")


def test_nan_in_empty_weight():
    tensors = tensors_of(registry.entry(R50_PANOPTIC))
    tensors["criterion.empty_weight"][-1] = np.nan
    with pytest.raises(ConversionError, match=r"'criterion\.empty_weight' ends with nan"):
        infer(tensors, "model.pkl")


def test_config_files(tmp_path, tiny):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.config))
    assert named_config(str(path)) == MaskFormerConfig.from_dict(tiny.config)
    path.write_text('{"name": "x"}')
    with pytest.raises(ConversionError, match="is no config: config: missing field 'num_classes'"):
        named_config(str(path))
    with pytest.raises(ConversionError, match="cannot read the config"):
        named_config(str(tmp_path / "none.json"))
    with pytest.raises(ConversionError, match="no zoo entry 'tiny_panoptik'\n  nearest: tiny_panoptic"):
        named_config("tiny_panoptik")


def test_flatten_leads_back(tiny):
    assert unflatten(flatten(tiny.config)) == tiny.config
