"""Rules for facebookresearch/MaskFormer checkpoints.

Variables carry the official names (v2 key layout), so a line is one pattern and its transform. Sizes are not here: they come from
the config through the model. A tuple belongs to a part of the architecture and is used when the config has that part.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from checkpoints import registry
from converters.errors import ConversionError, quoted
from converters.rules import Drop, Rule
from converters.transforms import CONV2D, IDENTITY, LINEAR, Transform
from tfmaskformer.config import MaskFormerConfig, SwinConfig

TABLE = "maskformer/1"
"""Name and version; the version grows with every change of what a rule does."""

Lines = tuple[tuple[str, Transform], ...]

# fmt: off
RESNET: Lines = (
    ("backbone.stem.conv{i:1|2|3}.weight", CONV2D),
    ("backbone.stem.conv{i:1|2|3}.norm.{stat:weight|bias|running_mean|running_var}", IDENTITY),
    ("backbone.res{stage}.{block}.{conv:conv1|conv2|conv3|shortcut}.weight", CONV2D),
    ("backbone.res{stage}.{block}.{conv:conv1|conv2|conv3|shortcut}.norm.{stat:weight|bias|running_mean|running_var}", IDENTITY),
)
SWIN: Lines = (
    ("backbone.patch_embed.proj.weight", CONV2D),
    ("backbone.patch_embed.proj.bias", IDENTITY),
    ("backbone.patch_embed.norm.{param:weight|bias}", IDENTITY),
    ("backbone.layers.{stage}.blocks.{block}.norm{i:1|2}.{param:weight|bias}", IDENTITY),
    ("backbone.layers.{stage}.blocks.{block}.attn.relative_position_bias_table", IDENTITY),
    ("backbone.layers.{stage}.blocks.{block}.attn.{linear:qkv|proj}.weight", LINEAR),
    ("backbone.layers.{stage}.blocks.{block}.attn.{linear:qkv|proj}.bias", IDENTITY),
    ("backbone.layers.{stage}.blocks.{block}.mlp.{linear:fc1|fc2}.weight", LINEAR),
    ("backbone.layers.{stage}.blocks.{block}.mlp.{linear:fc1|fc2}.bias", IDENTITY),
    ("backbone.layers.{stage}.downsample.norm.{param:weight|bias}", IDENTITY),
    ("backbone.layers.{stage}.downsample.reduction.weight", LINEAR),
    ("backbone.norm{stage}.{param:weight|bias}", IDENTITY),
)
PIXEL_DECODER: Lines = (
    ("sem_seg_head.pixel_decoder.adapter_{level}.weight", CONV2D),
    ("sem_seg_head.pixel_decoder.adapter_{level}.norm.{param:weight|bias}", IDENTITY),
    ("sem_seg_head.pixel_decoder.layer_{level}.weight", CONV2D),
    ("sem_seg_head.pixel_decoder.layer_{level}.norm.{param:weight|bias}", IDENTITY),
    ("sem_seg_head.pixel_decoder.mask_features.weight", CONV2D),
    ("sem_seg_head.pixel_decoder.mask_features.bias", IDENTITY),
)
PIXEL_DECODER_ENCODER: Lines = (
    ("sem_seg_head.pixel_decoder.input_proj.weight", CONV2D),
    ("sem_seg_head.pixel_decoder.input_proj.bias", IDENTITY),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{n}.self_attn.in_proj_weight", LINEAR),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{n}.self_attn.in_proj_bias", IDENTITY),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{n}.self_attn.out_proj.weight", LINEAR),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{n}.self_attn.out_proj.bias", IDENTITY),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{n}.linear{i:1|2}.weight", LINEAR),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{n}.linear{i:1|2}.bias", IDENTITY),
    ("sem_seg_head.pixel_decoder.transformer.encoder.layers.{n}.norm{i:1|2}.{param:weight|bias}", IDENTITY),
)
PREDICTOR: Lines = (
    ("sem_seg_head.predictor.query_embed.weight", IDENTITY),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.{attention:self_attn|multihead_attn}.in_proj_weight", LINEAR),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.{attention:self_attn|multihead_attn}.in_proj_bias", IDENTITY),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.{attention:self_attn|multihead_attn}.out_proj.weight", LINEAR),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.{attention:self_attn|multihead_attn}.out_proj.bias", IDENTITY),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.linear{i:1|2}.weight", LINEAR),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.linear{i:1|2}.bias", IDENTITY),
    ("sem_seg_head.predictor.transformer.decoder.layers.{n}.norm{i:1|2|3}.{param:weight|bias}", IDENTITY),
    ("sem_seg_head.predictor.transformer.decoder.norm.{param:weight|bias}", IDENTITY),
    ("sem_seg_head.predictor.mask_embed.layers.{n}.weight", LINEAR),
    ("sem_seg_head.predictor.mask_embed.layers.{n}.bias", IDENTITY),
)
PREDICTOR_CLASSES: Lines = (
    ("sem_seg_head.predictor.class_embed.weight", LINEAR),
    ("sem_seg_head.predictor.class_embed.bias", IDENTITY),
)
PREDICTOR_INPUT_PROJ: Lines = (
    ("sem_seg_head.predictor.input_proj.weight", CONV2D),
    ("sem_seg_head.predictor.input_proj.bias", IDENTITY),
)
PREDICTOR_ENCODER: Lines = (
    ("sem_seg_head.predictor.transformer.encoder.layers.{n}.self_attn.in_proj_weight", LINEAR),
    ("sem_seg_head.predictor.transformer.encoder.layers.{n}.self_attn.in_proj_bias", IDENTITY),
    ("sem_seg_head.predictor.transformer.encoder.layers.{n}.self_attn.out_proj.weight", LINEAR),
    ("sem_seg_head.predictor.transformer.encoder.layers.{n}.self_attn.out_proj.bias", IDENTITY),
    ("sem_seg_head.predictor.transformer.encoder.layers.{n}.linear{i:1|2}.weight", LINEAR),
    ("sem_seg_head.predictor.transformer.encoder.layers.{n}.linear{i:1|2}.bias", IDENTITY),
    ("sem_seg_head.predictor.transformer.encoder.layers.{n}.norm{i:1|2}.{param:weight|bias}", IDENTITY),
)
PREDICTOR_PER_PIXEL: Lines = (
    ("sem_seg_head.predictor.weight", CONV2D),
    ("sem_seg_head.predictor.bias", IDENTITY),
)
# fmt: on

BACKBONES = {"ResNet": RESNET, "D2SwinTransformer": SWIN}


def rules(config: MaskFormerConfig, key_layout: str) -> list[Rule]:
    """The rules of every part that ``config`` has, with source patterns in the file's key layout ("v1" or "v2")."""
    lines = BACKBONES[config.backbone.name] + PIXEL_DECODER + _predictor(config)
    if config.pixel_decoder.transformer_enc_layers:
        lines += PIXEL_DECODER_ENCODER
    return [Rule(registry.v1_key(name) if key_layout == "v1" else name, name, transform) for name, transform in lines]


def _predictor(config: MaskFormerConfig) -> Lines:
    if config.head == "PerPixelBaselineHead":
        return PREDICTOR_PER_PIXEL
    lines = PREDICTOR
    if config.head == "MaskFormerHead":
        lines += PREDICTOR_CLASSES
    if config.predictor_has_input_proj:
        lines += PREDICTOR_INPUT_PROJ
    if config.predictor.enc_layers:
        lines += PREDICTOR_ENCODER
    return lines


def transforms(config: MaskFormerConfig, names: Iterable[str]) -> dict[str, Transform]:
    """Name → transform of the variables called so; IDENTITY for a name that no rule has."""
    table = rules(config, "v2")
    return {name: next((rule.transform for rule in table if rule.source_of(name)), IDENTITY) for name in names}


def versions(names: Iterable[str]) -> dict[str, int]:
    """Module → version in ``state_dict()._metadata``, where it is not 1: the head's tells v2 names from v1; frozen batch norms have 3.

    As ``state_dict()`` of the official models has them (facebookresearch/MaskFormer da3e60d, Detectron2 02b5c4e).
    """
    norms = {name.removesuffix(".running_mean"): 3 for name in names if name.endswith(".running_mean")}
    return {"sem_seg_head": 2, **norms}


def drops(config: MaskFormerConfig) -> list[Drop]:
    """Official tensors that are no variables."""
    found = []
    if config.head == "MaskFormerHead":
        empty_weight = np.ones(config.num_classes + 1, np.float32)
        empty_weight[-1] = config.criterion.no_object_weight
        found.append(
            Drop("criterion.empty_weight", "class weights of the loss, derived from the config; checked to be equal", empty_weight)
        )
    if isinstance(config.backbone, SwinConfig):
        reason = "which bias belongs to which two patches of a window, derived from the window's size; checked to be equal"
        index = registry.relative_position_index(config.backbone.window_size)
        for stage, depth in enumerate(config.backbone.depths):
            found += [Drop(f"backbone.layers.{stage}.blocks.{block}.attn.relative_position_index", reason, index) for block in range(depth)]
    return found


def key_layout(names: Iterable[str]) -> str:
    """Which of the two official key layouts a file has.

    "v2": ``sem_seg_head.pixel_decoder.…``. "v1", as in plain pickles: the pixel decoder's tensors lie directly in ``sem_seg_head.``.

    Raises:
        ConversionError: both at once, or neither.
    """
    heads = [name for name in names if name.startswith("sem_seg_head.") and not name.startswith("sem_seg_head.predictor.")]
    v2 = [name for name in heads if name.startswith("sem_seg_head.pixel_decoder.")]
    v1 = [name for name in heads if not name.startswith("sem_seg_head.pixel_decoder.")]
    if v1 and v2:
        raise ConversionError(
            "the key layouts v1 and v2 are mixed",
            f"v1 (sem_seg_head.…): {len(v1)} tensors, e.g. {quoted(v1[0])}",
            f"v2 (sem_seg_head.pixel_decoder.…): {len(v2)} tensors, e.g. {quoted(v2[0])}",
            "a file that was renamed twice or merged looks like this; use the original",
        )
    if not heads:
        raise ConversionError(
            "no MaskFormer: the file has no tensors of a pixel decoder ('sem_seg_head.…')",
            "expected a checkpoint of the whole model, such as model_final_6f60dc.pkl",
        )
    return "v2" if v2 else "v1"


def v2_key(name: str, layout: str) -> str:
    """The v2 name of a tensor in a file of this key layout.

    >>> v2_key("sem_seg_head.layer_1.weight", "v1"), v2_key("sem_seg_head.predictor.query_embed.weight", "v1")
    ('sem_seg_head.pixel_decoder.layer_1.weight', 'sem_seg_head.predictor.query_embed.weight')
    """
    if layout == "v1" and name.startswith("sem_seg_head.") and not name.startswith("sem_seg_head.predictor."):
        return name.replace("sem_seg_head.", "sem_seg_head.pixel_decoder.", 1)
    return name
