"""Recipes of all official configs, against what the official Trainer made of them (golden/training/record.py)."""

from __future__ import annotations

import dataclasses

import pytest

from checkpoints import registry
from tests.tfmaskformer.recorded_recipes import ENTRIES, RECORDED, flat, official_tree
from tfmaskformer.config import ConfigError, MaskFormerConfig
from tfmaskformer.model import MaskFormer
from tfmaskformer.official_yaml import defaults
from tfmaskformer.training.optimizer import AdamW, parameters
from tfmaskformer.training.recipe import SUPPORTED, UNREAD, Recipe, read_recipe, recipe_of


def test_every_official_recipe_is_recorded():
    assert len(registry.entries()) == 30
    assert RECORDED.keys() == {entry.name for entry in ENTRIES}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_recipe_has_the_values_of_the_official_config(entry):
    recipe, recorded = recipe_of(official_tree(entry.official_config)), RECORDED[entry.name]
    solver = flat(recorded["solver"])
    for field, value in dataclasses.asdict(recipe).items():
        if field != "clip_norm":
            assert (list(value) if field == "steps" else value) == solver[field.upper()], field
    assert {"ADAMW": "AdamW", "SGD": "SGD"}[recipe.optimizer] == recorded["optimizer"]
    assert (recipe.clip_norm > 0) == recorded["clips"]
    assert recipe.clip_norm == solver["CLIP_GRADIENTS.CLIP_VALUE"] == 0.01
    optimizer = AdamW(0.1, [])
    assert {"betas": list(optimizer.betas), "eps": optimizer.eps} == recorded["defaults"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_parameter_has_the_official_learning_rate_and_decay(entry):
    recipe, recorded = recipe_of(official_tree(entry.official_config)), RECORDED[entry.name]
    order = [name for name, spec in registry.layout(entry).items() if spec.kind == "parameter"]
    expected = {name: tuple(recorded["kinds"][int(kind)]) for name, kind in zip(order, recorded["parameters"], strict=True) if kind != "-"}
    found = parameters(MaskFormer(MaskFormerConfig.from_dict(entry.config)), recipe)
    assert {item.name: (recipe.base_lr * item.lr_factor, item.weight_decay) for item in found} == expected
    assert len(found) == len(expected)


def test_groups_tell_why():
    swin = MaskFormer(MaskFormerConfig.from_dict(registry.entry("tiny_swin").config))
    recipe = Recipe(backbone_multiplier=0.5, weight_decay=0.1, weight_decay_norm=0.2, weight_decay_embed=0.3)
    found = {item.name: item[1:] for item in parameters(swin, recipe)}
    assert found["backbone.layers.0.blocks.0.attn.qkv.bias"] == ("backbone.weight", 0.5, 0.1)
    assert found["backbone.layers.0.blocks.0.attn.relative_position_bias_table"] == ("backbone.position", 0.5, 0.0)
    assert found["backbone.norm0.weight"] == ("backbone.norm", 0.5, 0.2)
    assert found["sem_seg_head.pixel_decoder.adapter_1.norm.bias"] == ("sem_seg_head.norm", 1.0, 0.2)
    assert found["sem_seg_head.predictor.query_embed.weight"] == ("sem_seg_head.embed", 1.0, 0.3)
    assert found["sem_seg_head.predictor.class_embed.weight"] == ("sem_seg_head.weight", 1.0, 0.1)
    resnet = MaskFormer(MaskFormerConfig.from_dict(registry.entry("tiny_panoptic").config))
    assert not [item.name for item in parameters(resnet, recipe) if ".norm." in item.name and item.group.startswith("backbone")]


def test_every_key_of_solver_is_accounted_for():
    keys = set(flat(defaults()["SOLVER"]))
    fields = {field.name.upper() for field in dataclasses.fields(Recipe)} - {"CLIP_NORM"}
    clip = {"CLIP_GRADIENTS.ENABLED", "CLIP_GRADIENTS.CLIP_TYPE", "CLIP_GRADIENTS.CLIP_VALUE"}
    assert fields | clip | set(SUPPORTED) | set(UNREAD) == keys
    assert len(fields) + len(clip) + len(SUPPORTED) + len(UNREAD) == len(keys)


def test_defaults_are_the_official_ones():
    assert recipe_of(defaults()) == Recipe()


R50 = "configs/ade20k-150/maskformer_R50_bs16_160k.yaml"
PANOPTIC = "configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AMP.ENABLED": True}, r"'SOLVER.AMP.ENABLED' is True, supported: False"),
        ({"REFERENCE_WORLD_SIZE": 8}, r"'SOLVER.REFERENCE_WORLD_SIZE' is 8, supported: 0"),
        ({"RESCALE_INTERVAL": True}, r"'SOLVER.RESCALE_INTERVAL' is True, supported: False"),
        ({"CLIP_GRADIENTS.CLIP_TYPE": "value"}, r"'SOLVER.CLIP_GRADIENTS.CLIP_TYPE' is 'value', supported: 'full_model'"),
        ({"OPTIMIZER": "ADAM"}, r"'SOLVER.OPTIMIZER' is 'ADAM', expected one of \('ADAMW', 'SGD'\)"),
        ({"LR_SCHEDULER_NAME": "WarmupCosineLR"}, r"'SOLVER.LR_SCHEDULER_NAME' is 'WarmupCosineLR', expected one of"),
        ({"WARMUP_METHOD": "exp"}, r"'SOLVER.WARMUP_METHOD' is 'exp', expected one of"),
        ({"BASE_LR": 0.0}, r"'SOLVER.BASE_LR' is 0.0, expected a positive number"),
        ({"MAX_ITER": 0}, r"'SOLVER.MAX_ITER' is 0, expected a positive number"),
        ({"WEIGHT_DECAY": -0.1}, r"'SOLVER.WEIGHT_DECAY' is -0.1, expected 0 or more"),
        ({"WARMUP_ITERS": -1}, r"'SOLVER.WARMUP_ITERS' is -1, expected 0 or more"),
        ({"STEPS": (500, 400)}, r"'SOLVER.STEPS' is \(500, 400\), expected ascending numbers above 0, none of them max_iter \(554400\)"),
        ({"STEPS": (0, 400)}, r"'SOLVER.STEPS' is \(0, 400\)"),
        ({"STEPS": (554_400,)}, r"'SOLVER.STEPS' is \(554400,\)"),
    ],
    ids=lambda item: next(iter(item)) if isinstance(item, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=f"recipe: {message}"):
        recipe_of(official_tree(PANOPTIC, {f"SOLVER.{key}": value for key, value in changes.items()}))


def test_steps_do_not_matter_where_they_are_not_read():
    assert recipe_of(official_tree(R50, {"SOLVER.STEPS": (5, 4)})).steps == (5, 4)


def test_clipping_can_be_switched_off():
    for changes in ({"ENABLED": False}, {"CLIP_VALUE": 0.0}, {"CLIP_VALUE": -1.0}, {"ENABLED": False, "CLIP_TYPE": "value"}):
        assert recipe_of(official_tree(R50, {f"SOLVER.CLIP_GRADIENTS.{key}": value for key, value in changes.items()})).clip_norm == 0


def test_files(tmp_path):
    (tmp_path / "mine.yaml").write_text("SOLVER: {BASE_LR: 0.5, STEPS: '(3, 4)', MAX_ITER: 9, AMP: {ENABLED: False}}")
    assert read_recipe(tmp_path / "mine.yaml") == Recipe(base_lr=0.5, steps=(3, 4), max_iter=9)
    (tmp_path / "wrong.yaml").write_text("SOLVER: {OPTIMIZER: LION, AMP: {ENABLED: False}}")
    with pytest.raises(ConfigError, match=r"^config '.*wrong\.yaml': 'SOLVER.OPTIMIZER' is 'LION'"):
        read_recipe(tmp_path / "wrong.yaml")


def test_official_files_give_the_recorded_recipes(official_sources):
    for entry in registry.entries():
        assert read_recipe(official_sources[0] / entry.official_config) == recipe_of(official_tree(entry.official_config))
