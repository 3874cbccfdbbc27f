"""The model that an official YAML config describes.

Every key that the official model reads is either a field of :class:`~tfmaskformer.config.MaskFormerConfig`, or has one value that is
supported (:data:`SUPPORTED`); any other value is refused by name, so that nothing of a model is silently ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import registry
from tfmaskformer.config import HEADS, ConfigError, MaskFormerConfig
from tfmaskformer.official_yaml import Tree, official_tree, override, read_tree

_FEATURES = ["res2", "res3", "res4", "res5"]
_RESNET, _DEEPLAB, _SWIN = "build_resnet_backbone", "build_resnet_deeplab_backbone", "D2SwinTransformer"
_MASK_FORMER, _PER_PIXEL = "MaskFormer", "SemanticSegmentor"

_RESNET_KEYS: dict[str, tuple[Any, ...]] = {
    "MODEL.BACKBONE.FREEZE_AT": (0,),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False] * 4,),
    "MODEL.RESNETS.NORM": ("FrozenBN",),
    "MODEL.RESNETS.NUM_GROUPS": (1,),
    "MODEL.RESNETS.OUT_FEATURES": (_FEATURES,),
    "MODEL.RESNETS.RES5_DILATION": (1,),
    "MODEL.RESNETS.STRIDE_IN_1X1": (False,),
}

SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {
        "MODEL.META_ARCHITECTURE": (_MASK_FORMER, _PER_PIXEL),
        "MODEL.BACKBONE.NAME": (_RESNET, _DEEPLAB, _SWIN),
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": (_FEATURES,),
        "MODEL.SEM_SEG_HEAD.NORM": ("GN",),
        "MODEL.MASK_FORMER.PRE_NORM": (False,),
        "INPUT.FORMAT": ("RGB",),
    },
    _MASK_FORMER: {"MODEL.SEM_SEG_HEAD.NAME": HEADS[:1]},
    _PER_PIXEL: {"MODEL.SEM_SEG_HEAD.NAME": HEADS[1:], "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": (False,)},
    _SWIN: {
        "MODEL.SWIN.APE": (False,),
        "MODEL.SWIN.OUT_FEATURES": (_FEATURES,),
        "MODEL.SWIN.PATCH_NORM": (True,),
        "MODEL.SWIN.PATCH_SIZE": (4,),
        "MODEL.SWIN.QKV_BIAS": (True,),
        "MODEL.SWIN.QK_SCALE": (None,),
    },
    _RESNET: _RESNET_KEYS,
    _DEEPLAB: _RESNET_KEYS | {"MODEL.RESNETS.RES4_DILATION": (1,)},
}
"""Meta architecture or backbone ("": all of them) → key → its supported values."""


def read_config(path: str | os.PathLike[str]) -> MaskFormerConfig:
    """The model of an official YAML file; its name is the file's, without the ending.

    Raises:
        ConfigError: the file cannot be read (:func:`~tfmaskformer.official_yaml.read_tree`), or describes a model that is not supported.
    """
    tree = read_tree(path)
    try:
        return config_of(tree, Path(path).stem)
    except ConfigError as error:
        raise ConfigError(f"config '{path}': {str(error).removeprefix('config: ')}") from None


def named_tree(name: str) -> tuple[str, Tree]:
    """The whole config called ``name``, and its model's name: that of a zoo entry, or of an official YAML file (``….yaml``).

    Raises:
        ConfigError: no such entry, or a file that cannot be read.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name).stem, read_tree(name)
    try:
        entry = registry.entry(name)
    except registry.ZooError as error:
        raise ConfigError(str(error)) from None
    tree = official_tree(entry.official_config)
    override(tree, entry.official_options)
    return name, tree


def config_of(tree: Tree, name: str) -> MaskFormerConfig:
    """The model that a whole config (:func:`~tfmaskformer.official_yaml.read_tree`) describes.

    Class names and things are those of the training data set, if it is an official one; else they are left empty.

    Raises:
        ConfigError: a key has a value that is not supported, or classes that are not the data set's.
    """
    _check_supported(tree)
    return MaskFormerConfig.from_dict({"name": name, **_fields(tree), **_classes(tree)})


def _check_supported(tree: Tree) -> None:
    """All unsupported values are told together."""
    supported = dict(SUPPORTED[""])
    for key in ("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME"):
        supported |= SUPPORTED.get(_value(tree, key), {})
    problems = [
        f"'{key}' is {value!r}, supported: {' or '.join(map(repr, values))}"
        for key, values in supported.items()
        if (value := _value(tree, key)) not in values
    ]
    if problems:
        raise ConfigError("config: " + "\n  ".join(problems))


def _value(tree: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _fields(tree: Tree) -> dict[str, Any]:
    model, head, mask_former = tree["MODEL"], tree["MODEL"]["SEM_SEG_HEAD"], tree["MODEL"]["MASK_FORMER"]
    swin = model["BACKBONE"]["NAME"] == _SWIN
    encoder = head["PIXEL_DECODER_NAME"] == "TransformerEncoderPixelDecoder"
    divisibility = mask_former["SIZE_DIVISIBILITY"]
    if divisibility < 0 or model["META_ARCHITECTURE"] == _PER_PIXEL:
        divisibility = 32 if swin else 0  # the backbone's, which both architectures fall back to; Detectron2's ResNet has none
    return {
        "num_classes": head["NUM_CLASSES"],
        "backbone": _swin(model["SWIN"]) if swin else _resnet(model["RESNETS"], model["BACKBONE"]["NAME"]),
        "head": head["NAME"],
        "pixel_decoder": {
            "name": head["PIXEL_DECODER_NAME"],
            "conv_dim": head["CONVS_DIM"],
            "mask_dim": head["MASK_DIM"],
            "transformer_enc_layers": head["TRANSFORMER_ENC_LAYERS"] if encoder else 0,  # BasePixelDecoder does not read it
        },
        "predictor": {
            "transformer_in_feature": mask_former["TRANSFORMER_IN_FEATURE"],
            "hidden_dim": mask_former["HIDDEN_DIM"],
            "num_queries": mask_former["NUM_OBJECT_QUERIES"],
            "nheads": mask_former["NHEADS"],
            "dropout": mask_former["DROPOUT"],
            "dim_feedforward": mask_former["DIM_FEEDFORWARD"],
            "enc_layers": mask_former["ENC_LAYERS"],
            "dec_layers": mask_former["DEC_LAYERS"],
            "deep_supervision": mask_former["DEEP_SUPERVISION"],
            "enforce_input_proj": mask_former["ENFORCE_INPUT_PROJ"],
        },
        "criterion": {
            "no_object_weight": mask_former["NO_OBJECT_WEIGHT"],
            "dice_weight": mask_former["DICE_WEIGHT"],
            "mask_weight": mask_former["MASK_WEIGHT"],
            "loss_weight": head["LOSS_WEIGHT"],
            "ignore_value": head["IGNORE_VALUE"],
        },
        "test": {
            "panoptic_on": mask_former["TEST"]["PANOPTIC_ON"],
            "object_mask_threshold": mask_former["TEST"]["OBJECT_MASK_THRESHOLD"],
            "overlap_threshold": mask_former["TEST"]["OVERLAP_THRESHOLD"],
            "sem_seg_postprocessing_before_inference": mask_former["TEST"]["SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE"],
            "min_size": tree["INPUT"]["MIN_SIZE_TEST"],
            "max_size": tree["INPUT"]["MAX_SIZE_TEST"],
        },
        "size_divisibility": divisibility,
        "pixel_mean": model["PIXEL_MEAN"],
        "pixel_std": model["PIXEL_STD"],
    }


def _resnet(resnet: Tree, builder: str) -> dict[str, Any]:
    deeplab = builder == _DEEPLAB  # the plain builder reads neither stem type nor grid
    return {
        "name": "ResNet",
        "depth": resnet["DEPTH"],
        "stem_type": resnet["STEM_TYPE"] if deeplab else "basic",
        "stem_out_channels": resnet["STEM_OUT_CHANNELS"],
        "width_per_group": resnet["WIDTH_PER_GROUP"],
        "res2_out_channels": resnet["RES2_OUT_CHANNELS"],
        "res5_multi_grid": resnet["RES5_MULTI_GRID"] if deeplab else [1, 1, 1],
    }


def _swin(swin: Tree) -> dict[str, Any]:
    return {
        "name": _SWIN,
        "embed_dim": swin["EMBED_DIM"],
        "depths": swin["DEPTHS"],
        "num_heads": swin["NUM_HEADS"],
        "window_size": swin["WINDOW_SIZE"],
        "mlp_ratio": swin["MLP_RATIO"],
        "drop_rate": swin["DROP_RATE"],
        "attn_drop_rate": swin["ATTN_DROP_RATE"],
        "drop_path_rate": swin["DROP_PATH_RATE"],
    }


def _classes(tree: Tree) -> dict[str, Any]:
    """Name, class names and things of the training data set."""
    known = {info.official_name: info for info in registry.datasets()}
    names = tree["DATASETS"]["TRAIN"]
    info = known.get(names[0]) if len(names) == 1 else None
    if info is None:
        return {}
    classes, expected = tree["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"], len(info.class_names)
    if classes != expected:
        raise ConfigError(
            f"config: 'MODEL.SEM_SEG_HEAD.NUM_CLASSES' is {classes}, but 'DATASETS.TRAIN' is {names[0]!r}, which has {expected} classes"
        )
    return {"dataset": info.name, "class_names": info.class_names, "thing_classes": info.thing_classes}
