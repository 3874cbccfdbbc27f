"""The tensors of any kind of checkpoint under their official names and in PyTorch's layout: what everything else works on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from checkpoints import registry
from converters import keras_weights
from converters.errors import ConversionError, quoted
from converters.huggingface import is_huggingface, official_tensors
from converters.source import KERAS, VARIABLES, Source
from converters.tables import maskformer as table
from converters.tensor import Tensor, inverted
from tfmaskformer.config import MaskFormerConfig

HUGGING_FACE = "Hugging Face"
"""The key layout of transformers' MaskFormer."""

_PARALLEL = "module."
"""What PyTorch's DistributedDataParallel puts before every name."""

_TABLE, _INDEX = ".relative_position_bias_table", ".relative_position_index"


class Official(NamedTuple):
    """A checkpoint's tensors.

    Attributes:
        tensors: official name → tensor.
        key_layout: of these names, "v1" or "v2"; or where they come from, when the checkpoint has names of its own.
        dropped: name and reason of what has no official counterpart.
    """

    tensors: Mapping[str, Tensor]
    key_layout: str
    dropped: Sequence[tuple[str, str]] = ()

    def v2(self) -> dict[str, Tensor]:
        """The tensors under v2 names."""
        return {table.v2_key(name, self.key_layout): tensor for name, tensor in self.tensors.items()}


def official(source: Source, config: MaskFormerConfig | None = None) -> Official:
    """The tensors under official names.

    Names in one of the two official layouts stay as they are; :meth:`Official.v2` makes them one. To variables of TensorFlow the official
    tensors that are no variables are added, to Hugging Face's those that follow from others.

    Args:
        source: the checkpoint.
        config: the model's, where the checkpoint does not have one beside it.

    Raises:
        ConversionError: it has no MaskFormer, or variables without a config that says which.
    """
    if source.kind in VARIABLES:
        return Official(_of_variables(source, config or source.config), source.kind)
    if is_huggingface(source.tensors):
        tensors, dropped = official_tensors(source.tensors)
        windows = {
            name.removesuffix(_TABLE): (math.isqrt(tensor.shape[0]) + 1) // 2
            for name, tensor in tensors.items()
            if name.endswith(_TABLE) and tensor.ndim == 2
        }
        try:
            indices = {window: registry.relative_position_index(window) for window in set(windows.values())}
        except registry.ZooError as error:
            raise ConversionError(f"the tables of relative positions are those of no Swin: {error}") from None
        derived = {f"{block}{_INDEX}": indices[window] for block, window in windows.items()}
        return Official(derived | tensors, HUGGING_FACE, dropped)
    prefix = _PARALLEL if all(name.startswith(_PARALLEL) for name in source.tensors) else ""
    named = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items()}
    return Official(named, table.key_layout(named))


def _of_variables(source: Source, config: MaskFormerConfig | None) -> dict[str, Tensor]:
    if config is None:
        raise ConversionError(f"{quoted(source.path.name)}: variables without the model's config", "name it: --config")
    variables = source.tensors
    if source.kind == KERAS:
        variables = keras_weights.official_names(config, variables)
    transforms = table.transforms(config, variables)
    tensors = {name: inverted(variable, transforms[name]) for name, variable in variables.items()}
    return tensors | {drop.source: drop.expected for drop in table.drops(config) if drop.expected is not None}
