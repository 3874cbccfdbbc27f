"""The tensors of any kind of checkpoint under their official names and in PyTorch's layout: what everything else works on."""

from __future__ import annotations

from collections.abc import Mapping

from converters import keras_weights
from converters.errors import ConversionError, quoted
from converters.source import KERAS, VARIABLES, Source
from converters.tables import maskformer as table
from converters.tensor import Tensor, inverted
from tfmaskformer.config import MaskFormerConfig


def official(source: Source, config: MaskFormerConfig | None = None) -> tuple[Mapping[str, Tensor], str]:
    """Official name → tensor, and the key layout that the names have: "v1", "v2", or the kind of a checkpoint that has its own names.

    Names in one of the two official layouts stay as they are; :func:`converters.tables.maskformer.v2_key` makes them one. Of variables
    of TensorFlow, the official tensors that are no variables are added.

    Args:
        source: the checkpoint.
        config: the model's, where the checkpoint does not have one beside it.

    Raises:
        ConversionError: it has no MaskFormer, or variables without a config that says which.
    """
    if source.kind in VARIABLES:
        return _of_variables(source, config or source.config), source.kind
    return source.tensors, table.key_layout(source.tensors)


def _of_variables(source: Source, config: MaskFormerConfig | None) -> dict[str, Tensor]:
    if config is None:
        raise ConversionError(f"{quoted(source.path.name)}: variables without the model's config", "name it: --config")
    variables = source.tensors
    if source.kind == KERAS:
        variables = keras_weights.official_names(config, variables)
    transforms = table.transforms(config, variables)
    tensors = {name: inverted(variable, transforms[name]) for name, variable in variables.items()}
    return tensors | {drop.source: drop.expected for drop in table.drops(config) if drop.expected is not None}


def v2_names(tensors: Mapping[str, Tensor], key_layout: str) -> dict[str, Tensor]:
    """The same under v2 names."""
    return {table.v2_key(name, key_layout): tensor for name, tensor in tensors.items()}
