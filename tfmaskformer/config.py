"""What a MaskFormer is made of: frozen dataclasses, one for each part of the module tree, in upstream's words.

The values are those of the official YAML files (facebookresearch/MaskFormer ``configs/``, ``mask_former/config.py``);
the comment behind a field names the official key. A config is plain data: it reads and writes JSON and imports nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from checkpoints import registry

RESNET_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Bottleneck blocks in res2…res5 for each depth (Detectron2 ``modeling/backbone/resnet.py``)."""

PIXEL_DECODERS = ("BasePixelDecoder", "TransformerEncoderPixelDecoder")
STEMS = ("basic", "deeplab")
HEADS = ("MaskFormerHead", "PerPixelBaselineHead", "PerPixelBaselinePlusHead")


class ConfigError(ValueError):
    """A config that no official model could have; the message names the field, the value and what is allowed."""


def _require(name, value, condition, expected):
    if not condition:
        raise ConfigError(f"config: '{name}' is {value!r}, expected {expected}")


def _require_positive(part, config, field):
    value = getattr(config, field)
    _require(f"{part}.{field}".lstrip("."), value, value > 0, "a positive number")


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A Detectron2 ResNet with frozen batch norm: R50, R101, and, with the DeepLab stem, R101c."""

    name: str = "ResNet"
    depth: int = 50  # MODEL.RESNETS.DEPTH
    stem_type: str = "basic"  # MODEL.RESNETS.STEM_TYPE: "basic" (one 7×7 convolution) or "deeplab" (three 3×3)
    stem_out_channels: int = 64  # MODEL.RESNETS.STEM_OUT_CHANNELS
    width_per_group: int = 64  # MODEL.RESNETS.WIDTH_PER_GROUP: bottleneck channels of res2
    res2_out_channels: int = 256  # MODEL.RESNETS.RES2_OUT_CHANNELS
    res5_multi_grid: tuple[int, ...] = (1, 1, 1)  # MODEL.RESNETS.RES5_MULTI_GRID: dilation of the 3×3 in each block of res5

    def __post_init__(self):
        _require("backbone.name", self.name, self.name == "ResNet", "'ResNet'")
        _require("backbone.depth", self.depth, self.depth in RESNET_BLOCKS, f"one of {sorted(RESNET_BLOCKS)}")
        _require("backbone.stem_type", self.stem_type, self.stem_type in STEMS, f"one of {STEMS}")
        for field in ("stem_out_channels", "width_per_group", "res2_out_channels"):
            _require_positive("backbone", self, field)
        grid = self.res5_multi_grid
        _require("backbone.res5_multi_grid", grid, len(grid) == self.blocks[-1] and min(grid) > 0, "a positive dilation for each block")

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        """Bottleneck blocks in res2, res3, res4, res5."""
        return RESNET_BLOCKS[self.depth]

    @property
    def out_channels(self) -> dict[str, int]:
        """Channels of ``res2``…``res5``; their strides are 4, 8, 16, 32."""
        return {f"res{level}": self.res2_out_channels * 2 ** (level - 2) for level in (2, 3, 4, 5)}


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """MaskFormer's Swin Transformer (``D2SwinTransformer``): patches of 4 px, no absolute position embedding."""

    name: str = "D2SwinTransformer"
    embed_dim: int = 96  # MODEL.SWIN.EMBED_DIM: channels of the first stage, doubled by each further one
    depths: tuple[int, ...] = (2, 2, 6, 2)  # MODEL.SWIN.DEPTHS: blocks of each stage
    num_heads: tuple[int, ...] = (3, 6, 12, 24)  # MODEL.SWIN.NUM_HEADS
    window_size: int = 7  # MODEL.SWIN.WINDOW_SIZE, in patches; at most registry.MAX_WINDOW
    mlp_ratio: float = 4.0  # MODEL.SWIN.MLP_RATIO
    drop_rate: float = 0.0  # MODEL.SWIN.DROP_RATE
    attn_drop_rate: float = 0.0  # MODEL.SWIN.ATTN_DROP_RATE
    drop_path_rate: float = 0.3  # MODEL.SWIN.DROP_PATH_RATE: stochastic depth of the last block, rising linearly from 0

    def __post_init__(self):
        _require("backbone.name", self.name, self.name == "D2SwinTransformer", "'D2SwinTransformer'")
        for field in ("embed_dim", "window_size", "mlp_ratio"):
            _require_positive("backbone", self, field)
        _require("backbone.window_size", self.window_size, self.window_size <= registry.MAX_WINDOW, f"at most {registry.MAX_WINDOW}")
        _require("backbone.depths", self.depths, len(self.depths) == 4 and min(self.depths) > 0, "four positive numbers")
        fits = len(self.num_heads) == 4 and all(heads > 0 and self.embed_dim * 2**i % heads == 0 for i, heads in enumerate(self.num_heads))
        _require("backbone.num_heads", self.num_heads, fits, "four numbers that divide the channels of their stage")
        for field in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            value = getattr(self, field)
            _require(f"backbone.{field}", value, 0 <= value < 1, "in [0, 1)")

    @property
    def out_channels(self) -> dict[str, int]:
        """Channels of ``res2``…``res5``; their strides are 4, 8, 16, 32."""
        return {f"res{stage + 2}": self.embed_dim * 2**stage for stage in range(4)}


BACKBONES: dict[str, type[ResNetConfig] | type[SwinConfig]] = {cls.name: cls for cls in (ResNetConfig, SwinConfig)}
"""Config class of each backbone, by its ``name``."""


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
    """The FPN that makes ``mask_features``, with or without a transformer encoder on res5."""

    name: str = "BasePixelDecoder"  # MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    conv_dim: int = 256  # MODEL.SEM_SEG_HEAD.CONVS_DIM
    mask_dim: int = 256  # MODEL.SEM_SEG_HEAD.MASK_DIM
    transformer_enc_layers: int = 0  # MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS

    def __post_init__(self):
        _require("pixel_decoder.name", self.name, self.name in PIXEL_DECODERS, f"one of {PIXEL_DECODERS}")
        for field in ("conv_dim", "mask_dim"):
            _require_positive("pixel_decoder", self, field)
        _require("pixel_decoder.conv_dim", self.conv_dim, self.conv_dim % 32 == 0, "a multiple of GroupNorm's 32 groups")
        _require(
            "pixel_decoder.transformer_enc_layers",
            self.transformer_enc_layers,
            (self.transformer_enc_layers > 0) == (self.name == "TransformerEncoderPixelDecoder"),
            "above 0 for TransformerEncoderPixelDecoder, 0 for BasePixelDecoder",
        )


@dataclasses.dataclass(frozen=True)
class TransformerPredictorConfig:
    """The transformer decoder and its heads; heads, dropout and feed-forward width also serve the pixel decoder's encoder."""

    transformer_in_feature: str = "res5"  # MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE: "res5" or "transformer_encoder"
    hidden_dim: int = 256  # MODEL.MASK_FORMER.HIDDEN_DIM
    num_queries: int = 100  # MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
    nheads: int = 8  # MODEL.MASK_FORMER.NHEADS
    dropout: float = 0.1  # MODEL.MASK_FORMER.DROPOUT
    dim_feedforward: int = 2048  # MODEL.MASK_FORMER.DIM_FEEDFORWARD
    enc_layers: int = 0  # MODEL.MASK_FORMER.ENC_LAYERS
    dec_layers: int = 6  # MODEL.MASK_FORMER.DEC_LAYERS
    deep_supervision: bool = True  # MODEL.MASK_FORMER.DEEP_SUPERVISION
    enforce_input_proj: bool = False  # MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ

    def __post_init__(self):
        allowed = ("res5", "transformer_encoder")
        _require(
            "predictor.transformer_in_feature", self.transformer_in_feature, self.transformer_in_feature in allowed, f"one of {allowed}"
        )
        for field in ("hidden_dim", "num_queries", "nheads", "dim_feedforward", "dec_layers"):
            _require_positive("predictor", self, field)
        _require("predictor.enc_layers", self.enc_layers, self.enc_layers >= 0, "0 or more")
        _require("predictor.hidden_dim", self.hidden_dim, self.hidden_dim % (2 * self.nheads) == 0, "a multiple of 2 · nheads")
        _require("predictor.dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class CriterionConfig:
    """Weights of the losses, of which the first four are also those of the matcher's costs; the last two are the per-pixel heads'."""

    no_object_weight: float = 0.1  # MODEL.MASK_FORMER.NO_OBJECT_WEIGHT
    class_weight: float = 1.0  # fixed at 1 upstream
    dice_weight: float = 1.0  # MODEL.MASK_FORMER.DICE_WEIGHT
    mask_weight: float = 20.0  # MODEL.MASK_FORMER.MASK_WEIGHT
    loss_weight: float = 1.0  # MODEL.SEM_SEG_HEAD.LOSS_WEIGHT
    ignore_value: int = 255  # MODEL.SEM_SEG_HEAD.IGNORE_VALUE: pixels of this label have no loss


@dataclasses.dataclass(frozen=True)
class TestConfig:
    """Inference: what comes out, at which thresholds."""

    __test__ = False  # not a pytest class

    panoptic_on: bool = False  # MODEL.MASK_FORMER.TEST.PANOPTIC_ON
    object_mask_threshold: float = 0.0  # MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD
    overlap_threshold: float = 0.0  # MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD
    sem_seg_postprocessing_before_inference: bool = False  # MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE
    min_size: int = 800  # INPUT.MIN_SIZE_TEST, px
    max_size: int = 1333  # INPUT.MAX_SIZE_TEST, px


@dataclasses.dataclass(frozen=True)
class MaskFormerConfig:
    """One MaskFormer, whole.

    ``thing_classes`` are contiguous class indices (0 … num_classes − 1); every other class is stuff. ``class_names`` is empty
    or has ``num_classes`` names. ``size_divisibility``: images are padded to a multiple of it; 0 means no padding
    (Detectron2 ``ImageList.from_tensors``). ``PerPixelBaselineHead`` has no use for ``predictor``. ``pixel_mean`` and ``pixel_std``
    are in RGB order, 0…255.
    """

    name: str
    num_classes: int  # MODEL.SEM_SEG_HEAD.NUM_CLASSES, without "no object", which is the last logit
    backbone: ResNetConfig | SwinConfig = ResNetConfig()
    head: str = "MaskFormerHead"  # MODEL.SEM_SEG_HEAD.NAME
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    predictor: TransformerPredictorConfig = TransformerPredictorConfig()
    criterion: CriterionConfig = CriterionConfig()
    test: TestConfig = TestConfig()
    size_divisibility: int = 32  # MODEL.MASK_FORMER.SIZE_DIVISIBILITY; of the per-pixel baselines, the backbone's
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # MODEL.PIXEL_MEAN
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)  # MODEL.PIXEL_STD
    dataset: str = ""  # the registry's name of the data set, e.g. "coco_panoptic"
    class_names: tuple[str, ...] = ()
    thing_classes: tuple[int, ...] = ()

    def __post_init__(self):
        _require_positive("", self, "num_classes")
        _require("size_divisibility", self.size_divisibility, self.size_divisibility >= 0, "0 (no padding) or a positive size in px")
        _require(
            "class_names",
            f"{len(self.class_names)} names",
            len(self.class_names) in (0, self.num_classes),
            f"0 or {self.num_classes} names",
        )
        _require(
            "thing_classes",
            self.thing_classes,
            all(0 <= index < self.num_classes for index in self.thing_classes),
            f"indices below {self.num_classes}",
        )
        _require("head", self.head, self.head in HEADS, f"one of {HEADS}")
        _require(
            "predictor.num_queries",
            self.predictor.num_queries,
            self.head != "PerPixelBaselinePlusHead" or self.predictor.num_queries == self.num_classes,
            f"{self.num_classes}, one for each class, as PerPixelBaselinePlusHead has it",
        )
        encoder_memory = self.predictor.transformer_in_feature == "transformer_encoder"
        _require(
            "predictor.transformer_in_feature",
            self.predictor.transformer_in_feature,
            not encoder_memory or self.pixel_decoder.name == "TransformerEncoderPixelDecoder",
            '"res5", unless the pixel decoder is a TransformerEncoderPixelDecoder',
        )

    @property
    def predictor_in_channels(self) -> int:
        """Channels of the feature that the transformer predictor attends to."""
        if self.predictor.transformer_in_feature == "transformer_encoder":
            return self.pixel_decoder.conv_dim
        return self.backbone.out_channels[self.predictor.transformer_in_feature]

    @property
    def predictor_has_input_proj(self) -> bool:
        """Whether ``predictor.input_proj`` is a 1×1 convolution; upstream leaves it empty where the channels already fit."""
        return self.predictor.enforce_input_proj or self.predictor_in_channels != self.predictor.hidden_dim

    @property
    def postprocess_before_inference(self) -> bool:
        """Whether mask logits are resized to the output before they become probabilities (upstream: forced by panoptic)."""
        return self.test.sem_seg_postprocessing_before_inference or self.test.panoptic_on

    def replace(self, **changes: Any) -> MaskFormerConfig:
        """A copy with some top-level fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of JSON types; ``from_dict`` is its inverse.

        >>> config = MaskFormerConfig(name="mine", num_classes=3)
        >>> MaskFormerConfig.from_dict(config.to_dict()) == config
        True
        """
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MaskFormerConfig:
        """Inverse of :meth:`to_dict`. Missing fields take their default.

        Raises:
            ConfigError: an unknown field, a value of the wrong type, or a combination no model can have.
        """
        return _from_dict(cls, values, "")


_PARTS = {
    "pixel_decoder": PixelDecoderConfig,
    "predictor": TransformerPredictorConfig,
    "criterion": CriterionConfig,
    "test": TestConfig,
}


def _from_dict(cls, values, where):
    if not isinstance(values, Mapping):
        raise ConfigError(f"config: '{where or 'config'}' must be a mapping, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"config: unknown field {', '.join(repr(where + name) for name in unknown)}; known: {', '.join(fields)}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ConfigError(f"config: missing field {', '.join(repr(where + name) for name in missing)}")
    arguments = {}
    for name, value in values.items():
        if name == "backbone":
            arguments[name] = _from_dict(_backbone(value), value, "backbone.")
        elif name in _PARTS and cls is MaskFormerConfig:
            arguments[name] = _from_dict(_PARTS[name], value, f"{name}.")
        else:
            arguments[name] = _checked(where + name, value, fields[name].type)
    return cls(**arguments)


def _backbone(values):
    name = values.get("name", ResNetConfig.name) if isinstance(values, Mapping) else ResNetConfig.name
    _require("backbone.name", name, isinstance(name, str) and name in BACKBONES, f"one of {tuple(BACKBONES)}")
    return BACKBONES[name]


_SCALARS = {"int": int, "float": (int, float), "bool": bool, "str": str}
_TUPLES = {
    "tuple[float, float, float]": ((int, float), 3),
    "tuple[str, ...]": (str, None),
    "tuple[int, ...]": (int, None),
}


def _checked(name, value, annotation):
    """``value`` if it is of the annotated type (int is accepted for float, a list for a tuple, bool never for a number)."""

    def is_a(item, kinds):
        return isinstance(item, kinds) and (kinds is bool or not isinstance(item, bool))

    if annotation in _SCALARS:
        if is_a(value, _SCALARS[annotation]):
            return float(value) if annotation == "float" else value
    else:
        kinds, length = _TUPLES[annotation]
        if isinstance(value, list | tuple) and length in (None, len(value)) and all(is_a(item, kinds) for item in value):
            return tuple(value)
    raise ConfigError(f"config: '{name}' must be {annotation}, got {value!r}")
