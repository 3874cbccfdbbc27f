"""Hugging Face's names: the table against recorded layouts of transformers, and against renaming written anew."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from checkpoints import registry
from converters import huggingface
from converters.errors import ConversionError
from converters.huggingface import is_huggingface, official_tensors
from tests.converters.conftest import random_tensors
from tests.converters.huggingface_renaming import ENCODER, renamed

LAYOUTS = json.loads((Path(__file__).parents[1] / "golden" / "huggingface_layouts.json").read_text())["entries"]
DECODER_LAYER = "model.transformer_module.decoder.layers.0."


class Unread:
    """A tensor that must not be read."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.ndim = tuple(shape), np.dtype(dtype), len(shape)

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("read before its elements were needed")


def recorded(name, spelling="saved"):
    """The tensors of one of transformers' models, under the names in its files, or under those of the module of 5.x."""
    layout = {name: (shape, dtype) for name, shape, dtype in LAYOUTS[name]["saved"]}
    own = {name: (shape, dtype) for name, shape, dtype in LAYOUTS[name]["own"]}
    if spelling == "own":
        replaced = {name.replace(".o_proj.", ".out_proj.").replace(".mlp.fc", ".fc"): name for name in own}
        assert replaced.keys() <= layout.keys()
        layout = {replaced.get(name, name): kind for name, kind in layout.items()}
    return {name: Unread(*kind) for name, kind in layout.items()}


def tiny(name="tiny_swin"):
    tensors = random_tensors(registry.entry(name))
    return {name: np.ones(tensor.shape, np.int64) if "index" in name else tensor for name, tensor in tensors.items()}


def problems(tensors):
    with pytest.raises(ConversionError) as raised:
        official_tensors(tensors)
    head, *lines, remedy = str(raised.value).split("\n  ")
    assert head.endswith(f"{len(lines)} problem{'s' * (len(lines) > 1)}")
    assert remedy == "expected a file such as those of facebook/maskformer-swin-base-coco"
    return lines


@pytest.mark.parametrize("spelling", ["saved", "own"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_recorded_layout_is_the_official_one(name, spelling):
    tensors = recorded(name, spelling)
    assert is_huggingface(tensors)
    official, dropped = official_tensors(tensors)
    expected = {name: (spec.shape, spec.dtype) for name, spec in registry.layout(registry.entry(name)).items()}
    assert {name: (tensor.shape, tensor.dtype.name) for name, tensor in official.items()} == expected
    endings = ("num_batches_tracked",) if "_R" in name else ("encoder.model.layernorm.weight", "encoder.model.layernorm.bias")
    assert {name for name, _ in dropped} == {name for name in tensors if name.endswith(endings)}
    assert all(reason for _, reason in dropped)


@pytest.mark.parametrize("name", LAYOUTS)
def test_renaming_anew_gives_the_recorded_names(name):
    layout = registry.layout(registry.entry(name))
    anew = renamed({name: np.broadcast_to(np.zeros((), spec.dtype), spec.shape) for name, spec in layout.items()})
    dropped = {name for name, _ in official_tensors(recorded(name))[1]}
    kept = {name: (tensor.shape, tensor.dtype) for name, tensor in recorded(name).items() if name not in dropped}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in anew.items()} == kept


@pytest.mark.parametrize("name", ["tiny_swin", "tiny_semantic"])
def test_every_element_comes_back(name):
    tensors = tiny(name)
    official, dropped = official_tensors(renamed(tensors))
    assert dropped == []
    assert official.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.asarray(official[name]), tensor, err_msg=name, strict=True)


def test_only_joined_tensors_are_new():
    cut = renamed(tiny())
    official, _ = official_tensors(cut)
    given = {id(tensor) for tensor in cut.values()}
    new = {re.sub(r"\d+", "{n}", name) for name, tensor in official.items() if id(tensor) not in given}
    decoder = "sem_seg_head.predictor.transformer.decoder.layers.{n}."
    attentions = ("self_attn.in_proj_", "multihead_attn.in_proj_")
    assert new == {"backbone.layers.{n}.blocks.{n}.attn.qkv." + kind for kind in ("weight", "bias")} | {
        decoder + attention + kind for attention in attentions for kind in ("weight", "bias")
    }


def test_joining_waits_until_elements_are_needed():
    cut = {f"{DECODER_LAYER}self_attn.{letter}_proj.weight": Unread((4, 5), "float16") for letter in "kvq"}
    joined = official_tensors(cut)[0]["sem_seg_head.predictor.transformer.decoder.layers.0.self_attn.in_proj_weight"]
    assert (joined.shape, joined.dtype) == ((12, 5), np.float16)
    with pytest.raises(AssertionError, match="read before"):
        np.asarray(joined)


def test_other_files_are_not_taken_for_hugging_faces():
    for layout in ("v1", "v2"):
        key = registry.v1_key if layout == "v1" else str
        assert not is_huggingface(key(name) for name in registry.layout(registry.entry("maskformer_R50_bs16_160k")))
    assert not is_huggingface([])


# --- strictness


def test_an_unknown_tensor_is_told_with_the_nearest_rule():
    (line,) = problems({f"{DECODER_LAYER}fc3.weight": np.zeros((2, 3))})
    assert line.startswith(f"no rule for '{DECODER_LAYER}fc3.weight' (2, 3); nearest rule: 'model.transformer_module.decoder.layers.{{n}}.")


def test_a_model_without_its_heads_is_told():
    (line,) = problems({"pixel_level_module.decoder.mask_projection.bias": np.zeros(2)})
    assert line.endswith("nearest rule: 'model.pixel_level_module.decoder.mask_projection.{param:weight|bias}'")


def test_a_missing_part_is_told_with_the_nearest_name():
    tensors = renamed(tiny())
    tensors[f"{DECODER_LAYER}encoder_attn.kproj.bias"] = tensors.pop(f"{DECODER_LAYER}encoder_attn.k_proj.bias")
    del tensors[f"{ENCODER}model.encoder.layers.2.blocks.1.attention.self.value.weight"]
    swin, decoder, unknown = problems(tensors)
    assert swin == (
        f"missing: '{ENCODER}model.encoder.layers.2.blocks.1.attention.self.value.weight', for the official "
        "'backbone.layers.2.blocks.1.attn.qkv.weight'"
    )
    assert decoder.startswith(f"missing: '{DECODER_LAYER}encoder_attn.k_proj.bias'")
    assert decoder.endswith(f"nearest in the file: '{DECODER_LAYER}encoder_attn.kproj.bias'")
    assert unknown.startswith(f"no rule for '{DECODER_LAYER}encoder_attn.kproj.bias'")


@pytest.mark.parametrize("value", [np.zeros((4, 6), np.float32), np.zeros((4, 5), np.float16), np.zeros((), np.float32)])
def test_parts_must_be_alike(value):
    tensors = {f"{DECODER_LAYER}self_attn.{letter}_proj.weight": np.zeros((4, 5), np.float32) for letter in "qkv"}
    (line,) = problems(tensors | {f"{DECODER_LAYER}self_attn.v_proj.weight": value})
    assert line.startswith(
        "cannot be joined to the official 'sem_seg_head.predictor.transformer.decoder.layers.0.self_attn.in_proj_weight'"
    )
    assert f"v_proj.weight' {value.shape} {value.dtype}" in line


def test_scalars_cannot_be_joined():
    assert len(problems({f"{DECODER_LAYER}self_attn.{letter}_proj.weight": np.float32(1) for letter in "qkv"})) == 1


def test_both_spellings_at_once_are_told():
    (line,) = problems({f"{DECODER_LAYER}{name}.bias": np.zeros(4) for name in ("fc1", "mlp.fc1")})
    assert line == (
        f"'{DECODER_LAYER}fc1.bias' and '{DECODER_LAYER}mlp.fc1.bias' are both the official "
        "'sem_seg_head.predictor.transformer.decoder.layers.0.linear1.bias'"
    )


def test_two_rules_for_one_tensor_are_told(monkeypatch):
    monkeypatch.setattr(huggingface, "_LINES", [*huggingface._LINES, *huggingface._LINES])
    (line,) = problems({"criterion.empty_weight": np.ones(3)})
    assert line == "2 rules for 'criterion.empty_weight' (3,): criterion.empty_weight, criterion.empty_weight"


def test_what_no_maskformer_has_is_unknown():
    for name in (
        "model.pixel_level_module.decoder.encoder.layers.0.self_attn.sampling_offsets.weight",  # Mask2Former
        f"{ENCODER}encoder.stages.4.layers.0.shortcut.convolution.weight",
        f"{ENCODER}encoder.stages.0.layers.0.layer.3.convolution.weight",
        "model.pixel_level_module.decoder.fpn.layers.3.proj.0.weight",
    ):
        (line,) = problems({name: np.zeros((1, 1, 1, 1))})
        assert line.startswith("no rule for"), name


def test_everything_is_told_at_once():
    tensors = renamed(tiny())
    for name in [name for name in tensors if name.endswith(".key.bias")]:
        del tensors[name]
    lines = problems(tensors | {f"more.{n}": np.zeros(1) for n in range(100)})
    assert len(lines) == 8 + 13
    assert lines[-1] == "… and 88 more of this kind"


@pytest.mark.parametrize("name", ["tiny_swin", "tiny_semantic"])
@pytest.mark.parametrize("with_index", [True, False])
def test_whole_files_are_converted(name, with_index, tmp_path):
    """A file of Hugging Face's gives what the official one gives, also where it leaves out what follows from other tensors."""
    from checkpoints import synthesize
    from converters.convert import convert
    from converters.difference import diff
    from converters.safetensors_file import write_safetensors

    tensors = synthesize.synthesize(registry.entry(name))
    synthesize.write_pickle(tensors, tmp_path / "official.pkl")
    theirs = {key: value for key, value in renamed(tensors).items() if with_index or not key.endswith("relative_position_index")}
    with (tmp_path / "model.safetensors").open("wb") as file:
        write_safetensors(file, theirs, {"format": "pt"})
    conversion = convert(tmp_path / "model.safetensors", tmp_path / "tf_ckpt", name)
    assert conversion.manifest["source"]["key_layout"] == "Hugging Face"
    assert conversion.manifest["tool"]["rule_table"] == "huggingface/1, maskformer/1"
    assert diff(tmp_path / "tf_ckpt", tmp_path / "official.pkl").same
    convert(tmp_path / "model.safetensors", tmp_path / "back.pkl", name)
    assert diff(tmp_path / "back.pkl", tmp_path / "official.pkl").same
