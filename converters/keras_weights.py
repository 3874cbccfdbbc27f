"""Names in a weights file of Keras (``.weights.h5``): the path of a layer in the model, and the place among its variables.

``backbone.stem.conv1.weight`` is ``backbone/stem/conv1/vars/0``. Keras walks the attributes of a model by name, and reaches those behind
``layers`` through its list of layers first, where they are called by their class: ``sem_seg_head`` is ``layers/mask_former_head``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from converters import hdf5
from converters.errors import ConversionError, quoted
from converters.tensor import Tensor
from tfmaskformer.config import MaskFormerConfig


def paths(config: MaskFormerConfig) -> dict[str, str]:
    """Official name → path of every variable."""
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import parameter_specs

    specs = parameter_specs(MaskFormer(config))
    layers: dict[str, list[str]] = {}
    for name in sorted(specs, key=lambda name: not specs[name].trainable):  # Keras: trainable ones first
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: f"{_layer(layer, config)}/{hdf5.KERAS_VARIABLES}/{index}"
        for layer, names in layers.items()
        for index, name in enumerate(names)
    }


def groups(config: MaskFormerConfig) -> list[str]:
    """Paths that Keras wants to find for every layer, also for those without variables."""
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import named_modules

    layers = [path for path, _ in named_modules(MaskFormer(config))]
    return [hdf5.KERAS_VARIABLES] + [f"{_layer(layer, config)}/{hdf5.KERAS_VARIABLES}" for layer in layers]


def official_names(config: MaskFormerConfig, variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official name → variable of a file that Keras wrote.

    Raises:
        ConversionError: variables of another model.
    """
    names = {path: name for name, path in paths(config).items()}
    unknown = [path for path in variables if path not in names]
    if unknown:
        more = [f"… and {len(unknown) - 10} more"] * (len(unknown) > 10)
        raise ConversionError(f"the file has variables that {config.name} has not", *map(quoted, unknown[:10]), *more)
    return {names[path]: variable for path, variable in variables.items()}


def _layer(layer: str, config: MaskFormerConfig) -> str:
    head = "layers/" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", config.head).lower()
    return re.sub(r"^sem_seg_head\b", head, layer).replace(".", "/")
