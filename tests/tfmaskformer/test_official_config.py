"""From official YAML keys to a MaskFormerConfig: equal to the registry for every official file, anything else refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import registry
from tfmaskformer.config import ConfigError, MaskFormerConfig
from tfmaskformer.official_config import SUPPORTED, config_of, read_config
from tfmaskformer.official_yaml import decode, defaults

RECORDED = json.loads((Path(__file__).parents[2] / "tfmaskformer" / "official_configs.json").read_text())["configs"]
"""Official YAML file → the keys to which the official code gives another value than the default."""


def changed(tree, changes):
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = tree
        for parent in parents:
            inner = inner[parent]
        assert last in inner, key
        inner[last] = decode(value)
    return tree


def official_tree(entry, changes=()):
    return changed(changed(defaults(), RECORDED[entry.official_config]), dict(changes))


R50 = registry.entry("maskformer_R50_bs16_160k")
PANOPTIC = registry.entry("maskformer_panoptic_R50_bs64_554k")
R101C = registry.entry("maskformer_R101c_bs16_160k")
SWIN = registry.entry("maskformer_panoptic_swin_tiny_bs64_554k")
PER_PIXEL = registry.entry("per_pixel_baseline_R50_bs16_160k")


def test_every_official_model_is_there():
    assert len(registry.entries()) == 30
    assert {entry.official_config for entry in registry.entries()} == {path for path in RECORDED if "/Base-" not in path}


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_recorded_keys_give_the_config_of_the_registry(entry):
    assert config_of(official_tree(entry), entry.name) == MaskFormerConfig.from_dict(entry.config)


def test_official_files_give_the_configs_of_the_registry(official_sources):
    for entry in registry.entries():
        assert read_config(official_sources[0] / entry.official_config) == MaskFormerConfig.from_dict(entry.config)


@pytest.mark.parametrize("name", ["tiny_panoptic", "tiny_semantic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel", "tiny_per_pixel_plus"])
def test_changed_official_configs_give_the_test_models(name):
    entry = registry.entry(name)
    changes = dict(zip(entry.official_options[::2], entry.official_options[1::2], strict=True))
    tree = official_tree(entry, {key: list(value) if isinstance(value, tuple) else value for key, value in changes.items()})
    assert config_of(tree, name) == MaskFormerConfig.from_dict(entry.config)


@pytest.mark.parametrize("path", [path for path in RECORDED if "/Base-" in path])
def test_bases_alone_are_no_models(path):
    with pytest.raises(
        ConfigError, match=r"'MODEL.META_ARCHITECTURE' is 'GeneralizedRCNN', supported: 'MaskFormer' or 'SemanticSegmentor'"
    ):
        config_of(changed(defaults(), RECORDED[path]), "base")


UNSUPPORTED = [
    (R50, "MODEL.META_ARCHITECTURE", "PanopticFPN"),
    (R50, "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"),
    (PER_PIXEL, "MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHead"),
    (PER_PIXEL, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True),
    (R50, "MODEL.BACKBONE.NAME", "build_mobilenet"),
    (R50, "MODEL.BACKBONE.FREEZE_AT", 2),
    (R50, "MODEL.RESNETS.NORM", "SyncBN"),
    (R101C, "MODEL.RESNETS.NORM", "BN"),
    (R50, "MODEL.RESNETS.NUM_GROUPS", 32),
    (R50, "MODEL.RESNETS.STRIDE_IN_1X1", True),
    (R50, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True]),
    (R50, "MODEL.RESNETS.OUT_FEATURES", ["res4"]),
    (R50, "MODEL.RESNETS.RES5_DILATION", 2),
    (R101C, "MODEL.RESNETS.RES4_DILATION", 2),
    (R50, "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3"]),
    (R50, "MODEL.SEM_SEG_HEAD.NORM", ""),
    (R50, "MODEL.MASK_FORMER.PRE_NORM", True),
    (R50, "INPUT.FORMAT", "BGR"),
    (SWIN, "MODEL.SWIN.APE", True),
    (SWIN, "MODEL.SWIN.PATCH_NORM", False),
    (SWIN, "MODEL.SWIN.PATCH_SIZE", 8),
    (SWIN, "MODEL.SWIN.QKV_BIAS", False),
    (SWIN, "MODEL.SWIN.QK_SCALE", 0.5),
    (SWIN, "MODEL.SWIN.OUT_FEATURES", ["res5"]),
    # Refused by the config itself.
    (R50, "MODEL.RESNETS.DEPTH", 18),
    (R101C, "MODEL.RESNETS.STEM_TYPE", "other"),
    (R50, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MSDeformAttnPixelDecoder"),
    (R50, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res4"),
    (R50, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7),
    (R50, "MODEL.PIXEL_MEAN", [1.0, 2.0]),
]


@pytest.mark.parametrize(("entry", "key", "value"), UNSUPPORTED, ids=lambda item: str(getattr(item, "name", item)))
def test_what_is_not_supported_is_refused_by_name(entry, key, value):
    tree = official_tree(entry, {key: value})
    with pytest.raises(ConfigError) as refused:
        config_of(tree, "mine")
    field = {"DEPTH": "depth", "PIXEL_DECODER_NAME": "pixel_decoder.name"}.get(key.rpartition(".")[2], key.rpartition(".")[2].lower())
    assert f"'{key}' is {value!r}" in str(refused.value) or field in str(refused.value)
    assert repr(value).strip("[]()") in str(refused.value)


def test_every_supported_key_is_tested():
    assert {key for keys in SUPPORTED.values() for key in keys} <= {key for _, key, _ in UNSUPPORTED}


def test_all_problems_are_told_together():
    with pytest.raises(
        ConfigError, match=r"'INPUT.FORMAT' is 'BGR', supported: 'RGB'\n  'MODEL.RESNETS.NORM' is 'BN', supported: 'FrozenBN'"
    ):
        config_of(official_tree(R50, {"MODEL.RESNETS.NORM": "BN", "INPUT.FORMAT": "BGR"}), "mine")


def test_own_data_sets_have_no_names():
    config = config_of(official_tree(PANOPTIC, {"DATASETS.TRAIN": ("mine",), "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 7}), "mine")
    assert (config.dataset, config.class_names, config.thing_classes, config.num_classes) == ("", (), (), 7)


def test_backbone_tells_the_divisor_where_the_model_does_not():
    assert config_of(official_tree(SWIN, {"MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1}), "swin").size_divisibility == 32
    assert config_of(official_tree(R50, {"MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1}), "resnet").size_divisibility == 0
    assert config_of(official_tree(R50, {"MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 64}), "resnet").size_divisibility == 64


def test_files(tmp_path):
    (tmp_path / "mine.yaml").write_text("MODEL: {META_ARCHITECTURE: Mine}\nINPUT: {FORMAT: RGB}")
    with pytest.raises(ConfigError, match=r"^config '.*mine\.yaml': 'MODEL.META_ARCHITECTURE' is 'Mine', supported: "):
        read_config(tmp_path / "mine.yaml")
