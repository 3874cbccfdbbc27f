"""The MaskFormer table against the recorded layouts of the official checkpoints, and the key layouts."""

from __future__ import annotations

import numpy as np
import pytest

from checkpoints import registry
from converters.errors import ConversionError
from converters.rules import plan
from converters.tables import maskformer as table
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import parameter_specs

TINY = ["tiny_panoptic", "tiny_semantic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel", "tiny_per_pixel_plus"]
ENTRIES = [entry.name for entry in registry.entries()] + TINY


def shapes_only(entry):
    """v2 name → tensor of the recorded shape and dtype that needs no memory."""
    tensors = {name: np.broadcast_to(np.zeros((), spec.dtype), spec.shape) for name, spec in registry.layout(entry).items()}
    return tensors | {drop.source: drop.expected for drop in table.drops(MaskFormerConfig.from_dict(entry.config))}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_official_layout_fits_the_model(name):
    entry = registry.entry(name)
    config = MaskFormerConfig.from_dict(entry.config)
    targets = {name: spec.shape for name, spec in parameter_specs(MaskFormer(config)).items()}
    tensors = shapes_only(entry)
    for layout, key in (("v1", registry.v1_key), ("v2", str)):
        named = {key(name): tensor for name, tensor in tensors.items()}
        assert table.key_layout(named) == layout
        assert [table.v2_key(name, layout) for name in named] == list(tensors)
        moves = plan(table.rules(config, layout), table.drops(config), named, targets)
        assert {(table.v2_key(move.source, layout), move.target) for move in moves} == {(name, name) for name in targets}


@pytest.mark.parametrize(
    "entry",
    [
        "maskformer_panoptic_R50_bs64_554k",
        "maskformer_R101c_bs16_160k",
        "maskformer_swin_tiny_bs16_160k",
        "per_pixel_baseline_R50_bs16_160k",
        "per_pixel_baseline_plus_R50_bs16_160k",
    ],
)
def test_transforms_follow_the_kind_of_tensor(entry):
    """A square matrix hides a missing transpose from every shape check, so the kinds are written out here again."""
    config = MaskFormerConfig.from_dict(registry.entry(entry).config)
    for name, spec in registry.layout(registry.entry(entry)).items():
        if name.endswith(("empty_weight", "relative_position_index")):
            continue
        (rule,) = [rule for rule in table.rules(config, "v2") if rule.target_of(name)]
        expected = {4: "CONV2D", 2: "LINEAR", 1: "IDENTITY"}[len(spec.shape)]
        is_table = name.endswith(("query_embed.weight", "relative_position_bias_table"))
        assert rule.transform.name == ("IDENTITY" if is_table else expected), name


def test_empty_weight_comes_from_the_config():
    (drop,) = table.drops(MaskFormerConfig(name="mine", num_classes=3))
    assert drop.expected.tolist() == [1, 1, 1, np.float32(0.1)]


def test_per_pixel_baselines_have_no_empty_weight():
    for name in ("tiny_per_pixel", "tiny_per_pixel_plus"):
        assert table.drops(MaskFormerConfig.from_dict(registry.entry(name).config)) == []


def test_relative_position_index_must_be_the_windows():
    entry = registry.entry("tiny_swin")
    config = MaskFormerConfig.from_dict(entry.config)
    name = "backbone.layers.2.blocks.1.attn.relative_position_index"
    tensors = shapes_only(entry)
    transposed = tensors | {name: tensors[name].T}
    targets = {name: spec.shape for name, spec in parameter_specs(MaskFormer(config)).items()}
    with pytest.raises(ConversionError, match=rf"'{name}' \(25, 25\) is not \[40, 39, …, 40\] \(25, 25\)"):
        plan(table.rules(config, "v2"), table.drops(config), transposed, targets)


def test_mixed_key_layouts_are_refused():
    with pytest.raises(ConversionError, match=r"mixed\n.*1 tensors, e.g. 'sem_seg_head.layer_1.weight'\n.*1 tensors"):
        table.key_layout(["sem_seg_head.layer_1.weight", "sem_seg_head.pixel_decoder.layer_2.weight", "backbone.x"])


def test_a_file_without_a_head_is_refused():
    with pytest.raises(ConversionError, match="no MaskFormer"):
        table.key_layout(["backbone.stem.conv1.weight", "sem_seg_head.predictor.query_embed.weight"])


def test_v2_names_are_never_prefixed_twice():
    for name in ("sem_seg_head.pixel_decoder.layer_1.weight", "sem_seg_head.predictor.x", "backbone.x"):
        assert table.v2_key(name, "v2") == name


def test_the_classifier_of_a_per_pixel_baseline_is_no_pixel_decoder():
    for name in ("sem_seg_head.predictor.weight", "sem_seg_head.predictor.bias"):
        assert table.v2_key(name, "v1") == registry.v1_key(name) == name
