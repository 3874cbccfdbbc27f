"""Which model a checkpoint holds: the architecture from its tensors' names and shapes, the rest from the zoo.

Tensors cannot tell heads, dropout, thresholds, padding, normalisation or class names. These come from the config that the user names,
from the official entry whose tensors are the same, or, for a fine-tuned file with its own classes or queries, from the official entry
with the same architecture: then they are assumed, and listed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints import registry
from converters.errors import ConversionError
from converters.tensor import Tensor, is_float
from tfmaskformer.config import RESNET_BLOCKS, ConfigError, MaskFormerConfig

OWN = ("num_classes", "predictor.num_queries", "criterion.no_object_weight")
"""What a fine-tuned model may have of its own, on the architecture of an official one."""

CLASS_FIELDS = ("dataset", "class_names", "thing_classes")
"""What is only true for the classes of the data set that the settings come from."""

_DECODER = "sem_seg_head.pixel_decoder."
_PREDICTOR = "sem_seg_head.predictor."


@dataclasses.dataclass(frozen=True)
class Inference:
    """A config and where each of its settings comes from.

    Attributes:
        config: of the checkpoint.
        entry: the official entry that the tensors fit exactly, or None.
        origins: dotted field → "tensors", "zoo entry NAME", "config FILE", "assumed from NAME" or "unknown".
        alternatives: other official entries of this architecture, from which the assumed settings might come instead.
    """

    config: MaskFormerConfig
    entry: registry.Entry | None
    origins: dict[str, str]
    alternatives: tuple[str, ...] = ()

    @property
    def assumed(self) -> dict[str, Any]:
        """The settings that are neither in the file nor known: field → value."""
        values = flatten(self.config.to_dict())
        return {field: values[field] for field, origin in self.origins.items() if origin.startswith(("assumed", "unknown"))}


def infer(tensors: Mapping[str, Tensor], file_name: str, base: MaskFormerConfig | None = None, origin: str = "") -> Inference:
    """The config of a checkpoint.

    Args:
        tensors: v2 name → tensor in PyTorch's layout.
        file_name: of the source; the six digits in an official name decide between entries with the same tensors.
        base: the config that the user names, or that lies beside the tensors, instead of what the zoo offers.
        origin: where ``base`` comes from; default: "config NAME".

    Raises:
        ConversionError: no MaskFormer that is known, tensors that contradict ``base``, or several entries that fit.
    """
    observed = _observe(tensors)
    entries = {entry.name: (entry, flatten(MaskFormerConfig.from_dict(entry.config).to_dict())) for entry in registry.entries()}
    exact = [name for name, (_, values) in entries.items() if _differences(values, observed) == []]
    related = [name for name, (_, values) in entries.items() if set(_differences(values, observed)) <= set(OWN)]
    if base is not None:
        values = flatten(base.to_dict())
        _check_base(base.name, values, observed, exact)
        return _merge(
            values, observed, entries[base.name][0] if base.name in exact else None, origin or f"config {base.name}", base.name, ()
        )
    if len(exact) > 1:
        exact = [name for name in exact if entries[name][0].file_hash and entries[name][0].file_hash in file_name] or exact
        if len(exact) > 1:
            lines = [f"--config {name}" for name in exact]
            raise ConversionError("several official models have these tensors, with different settings", "add one of:", *lines)
    if exact:
        entry, values = entries[exact[0]]
        return _merge(values, observed, entry, f"zoo entry {entry.name}", entry.name, ())
    if not related:
        raise ConversionError(
            "no official model has this architecture, so the settings that tensors cannot tell are unknown",
            *(f"{field}: {value}" for field, value in observed.items()),
            "add --config with the name of a model to take them from, or a config.json: tfmaskformer zoo list",
        )
    related.sort(key=lambda name: entries[name][1]["num_classes"] != observed["num_classes"])
    name, others = related[0], tuple(related[1:])
    return _merge(entries[name][1], observed, None, f"assumed from {name}", f"{name}-finetuned", others)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict → dotted fields.

    >>> flatten({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b.c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def unflatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`flatten`."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested


def _observe(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Dotted field → value of everything that tensors tell."""
    file = _File(tensors)
    observations = _OBSERVATIONS | (_SWIN if file.has("backbone.patch_embed.") else _RESNET)
    if file.head() != "PerPixelBaselineHead":
        observations |= _TRANSFORMER
    observed = {field: read(file) for field, read in observations.items()}
    if file.problems:
        raise ConversionError("cannot tell the architecture from the tensors", *dict.fromkeys(file.problems))
    return {field: value for field, value in observed.items() if value is not None}


class _File:
    """Looks into the tensors; collects what is wrong, so that it can be told at once."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self.problems: list[str] = []

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._tensors)

    def size(self, name: str, axis: int, axes: int) -> int:
        """Length of one axis of a tensor that must have ``axes`` of them."""
        tensor = self._tensors.get(name)
        if tensor is None:
            self.problems.append(f"missing: '{name}'")
        elif tensor.ndim != axes or not tensor.size:
            self.problems.append(f"'{name}' has shape {tensor.shape}, expected {axes} axes, none of length 0")
        else:
            return tensor.shape[axis]
        return 1

    def count(self, prefix: str) -> int:
        """How many modules ``prefix0``, ``prefix1``, … there are."""
        pattern = re.compile(re.escape(prefix) + r"([0-9]{1,9})\.")
        indices = {int(match[1]) for name in self._tensors if (match := pattern.match(name))}
        absent = sorted(set(range(len(indices))) - indices)
        if absent:
            self.problems.append(f"'{prefix}…' has {len(indices)} indices up to {max(indices)}, but not {absent[0]}")
        return len(indices)

    def head(self) -> str:
        if self.has(f"{_PREDICTOR}weight"):
            return "PerPixelBaselineHead"
        classified = self.has(f"{_PREDICTOR}class_embed.") or self.has("criterion.empty_weight")
        return "MaskFormerHead" if classified else "PerPixelBaselinePlusHead"

    def num_classes(self) -> int:
        """Logits of the classifier, without "no object"; of the plus head, one query for each."""
        if self.head() == "MaskFormerHead":
            return self.size(f"{_PREDICTOR}class_embed.weight", 0, 2) - 1
        return self.size(f"{_PREDICTOR}weight", 0, 4) if self.head() == "PerPixelBaselineHead" else self.num_queries()

    def num_queries(self) -> int:
        return self.size(f"{_PREDICTOR}query_embed.weight", 0, 2)

    def depth(self) -> int:
        blocks = self.count("backbone.res4.")
        depths = [depth for depth, of_stage in RESNET_BLOCKS.items() if of_stage[2] == blocks]
        if not depths:
            known = ", ".join(f"{of_stage[2]} (ResNet-{depth})" for depth, of_stage in RESNET_BLOCKS.items())
            self.problems.append(f"'backbone.res4' has {blocks} blocks; known: {known}")
        return depths[0] if depths else 0

    def swin_depths(self) -> list[int]:
        return [self.count(f"backbone.layers.{stage}.blocks.") for stage in range(self.count("backbone.layers."))]

    def swin_heads(self) -> list[int]:
        return [self.size(_BIAS_TABLE.format(stage), 1, 2) for stage in range(self.count("backbone.layers."))]

    def swin_window(self) -> int:
        """The bias table has a row for each offset: (2 · window − 1)² of them."""
        window = (math.isqrt(self.size(_BIAS_TABLE.format(0), 0, 2)) + 1) // 2
        if window > registry.MAX_WINDOW:
            self.problems.append(f"'{_BIAS_TABLE.format(0)}' is of windows of {window}; expected {registry.MAX_WINDOW} at most")
        return window

    def swin_mlp_ratio(self) -> float:
        outputs, inputs = (self.size("backbone.layers.0.blocks.0.mlp.fc1.weight", axis, 2) for axis in (0, 1))
        return outputs / inputs

    def in_feature(self) -> str:
        """The predictor reads the pixel decoder's encoder, unless its projection takes the backbone's channels only."""
        if not _encoder_layers(self):
            return "res5"
        conv_dim = self.size(f"{_DECODER}mask_features.weight", 1, 4)
        takes = self.size(f"{_PREDICTOR}input_proj.weight", 1, 4) if self.has(f"{_PREDICTOR}input_proj.") else conv_dim
        return "transformer_encoder" if takes == conv_dim else "res5"

    def enforces_input_proj(self) -> bool | None:
        """None where the channels need a projection anyway."""
        if not self.has(f"{_PREDICTOR}input_proj."):
            return False
        return self.size(f"{_PREDICTOR}input_proj.weight", 1, 4) == self.size(f"{_PREDICTOR}query_embed.weight", 1, 2) or None

    def no_object_weight(self) -> float | None:
        """The shortest decimal that the file's type rounds so: 0.1, not 0.10000000149. None where nothing is classified."""
        if self.head() != "MaskFormerHead":
            return None
        if not (classes := self.size("criterion.empty_weight", 0, 1)) > 1:
            return 0.0
        weight = np.asarray(self._tensors["criterion.empty_weight"])[classes - 1]
        if not (is_float(weight.dtype) and np.isfinite(weight)):
            self.problems.append(f"'criterion.empty_weight' ends with {weight} ({weight.dtype.name})")
            return 0.0
        decimals = (float(f"{float(weight):.{digits}g}") for digits in range(1, 18))
        return next(decimal for decimal in decimals if weight.dtype.type(decimal) == weight)


def _encoder_layers(file: _File) -> int:
    return file.count(f"{_DECODER}transformer.encoder.layers.")


_OBSERVATIONS: dict[str, Callable[[_File], Any]] = {
    "head": _File.head,
    "num_classes": _File.num_classes,
    "pixel_decoder.name": lambda file: "TransformerEncoderPixelDecoder" if _encoder_layers(file) else "BasePixelDecoder",
    "pixel_decoder.conv_dim": lambda file: file.size(f"{_DECODER}mask_features.weight", 1, 4),
    "pixel_decoder.mask_dim": lambda file: file.size(f"{_DECODER}mask_features.weight", 0, 4),
    "pixel_decoder.transformer_enc_layers": _encoder_layers,
}
"""Field → what tells it; None where tensors cannot."""

_TRANSFORMER: dict[str, Callable[[_File], Any]] = {
    "predictor.transformer_in_feature": _File.in_feature,
    "predictor.hidden_dim": lambda file: file.size(f"{_PREDICTOR}query_embed.weight", 1, 2),
    "predictor.num_queries": _File.num_queries,
    "predictor.dim_feedforward": lambda file: file.size(f"{_PREDICTOR}transformer.decoder.layers.0.linear1.weight", 0, 2),
    "predictor.enc_layers": lambda file: file.count(f"{_PREDICTOR}transformer.encoder.layers."),
    "predictor.dec_layers": lambda file: file.count(f"{_PREDICTOR}transformer.decoder.layers."),
    "predictor.enforce_input_proj": _File.enforces_input_proj,
    "criterion.no_object_weight": _File.no_object_weight,
}

_RESNET: dict[str, Callable[[_File], Any]] = {
    "backbone.name": lambda file: "ResNet",
    "backbone.depth": _File.depth,
    "backbone.stem_type": lambda file: "deeplab" if file.has("backbone.stem.conv2.") else "basic",
    "backbone.stem_out_channels": lambda file: file.size(f"backbone.stem.conv{3 if file.has('backbone.stem.conv2.') else 1}.weight", 0, 4),
    "backbone.width_per_group": lambda file: file.size("backbone.res2.0.conv1.weight", 0, 4),
    "backbone.res2_out_channels": lambda file: file.size("backbone.res2.0.conv3.weight", 0, 4),
}

_BIAS_TABLE = "backbone.layers.{}.blocks.0.attn.relative_position_bias_table"

_SWIN: dict[str, Callable[[_File], Any]] = {
    "backbone.name": lambda file: "D2SwinTransformer",
    "backbone.embed_dim": lambda file: file.size("backbone.patch_embed.proj.weight", 0, 4),
    "backbone.depths": _File.swin_depths,
    "backbone.num_heads": _File.swin_heads,
    "backbone.window_size": _File.swin_window,
    "backbone.mlp_ratio": _File.swin_mlp_ratio,
}


def _differences(values: Mapping[str, Any], observed: Mapping[str, Any]) -> list[str]:
    return [field for field, value in observed.items() if values.get(field) != value]


def _check_base(name: str, values: Mapping[str, Any], observed: Mapping[str, Any], exact: Sequence[str]) -> None:
    """The named config has the file's architecture, and no official entry fits better."""
    different = _differences(values, observed)
    if (different and exact) or not set(different) <= set(OWN):
        lines = (f"{field}: the tensors say {observed[field]!r}, {name} has {values[field]!r}" for field in different if field in values)
        remedy = f"the tensors are those of {' and '.join(exact)}: " if exact else ""
        raise ConversionError(f"the tensors are not those of {name}", *lines, f"{remedy}leave --config out, or name another")


def _merge(
    values: Mapping[str, Any],
    observed: Mapping[str, Any],
    entry: registry.Entry | None,
    origin: str,
    name: str,
    alternatives: Iterable[str],
) -> Inference:
    origins = {field: "tensors" if field in observed else origin for field in values if field != "name"}
    merged = {**values, **observed, "name": name}
    if values["num_classes"] != observed["num_classes"]:
        merged |= {"dataset": "", "class_names": (), "thing_classes": ()}
        origins |= dict.fromkeys(CLASS_FIELDS, "unknown")
    try:
        config = MaskFormerConfig.from_dict(unflatten(merged))
    except ConfigError as error:
        raise ConversionError(f"the tensors describe no MaskFormer that can be built: {error}") from None
    return Inference(config, entry, origins, tuple(alternatives))
