"""Weights of a backbone → a model to be trained: the backbone from the file, everything else at its initial value."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from converters import checkpoint
from converters.convert import Conversion, Plan, Progress, parameter_specs_of, run
from converters.infer import Inference, flatten
from converters.named_config import named_config
from converters.rules import plan
from converters.source import Source
from converters.tables import init as table
from tfmaskformer.config import MaskFormerConfig

if TYPE_CHECKING:
    from tfmaskformer.module import ParameterSpec

LICENSE = "unknown: that of the file, which the initial values of the other variables do not change"


def initialize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None,
    config: str,
    seed: int = 0,
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = lambda step, share: None,
) -> Conversion:
    """Makes the new directory ``destination``, from which the training of a model can start.

    Args:
        source: weights of the model's backbone, trained on ImageNet: R-50.pkl, R-101.pkl, R-103.pkl, swin_….pkl or swin_….pth.
        destination: of any kind, as :func:`converters.convert.convert` makes it. None: a dry run.
        config: the model: a zoo entry, an official YAML file or a JSON file.
        seed: of the initial values that are random. The same seed gives the same bytes.
        dtype: to which the weights are rounded; None: float32.
        force: whether to replace what an earlier conversion wrote there.
        progress: told what is being done.

    Raises:
        ConversionError: the source, the config or the destination cannot be used; a tensor of the backbone is missing, left over or
            misshapen (all of them are told). Nothing was written.
    """
    model = named_config(config)
    return run(source, destination, lambda file: _plan(file, model, seed), dtype=dtype, force=force, progress=progress)


def initial_values(specs: Mapping[str, ParameterSpec], seed: int) -> dict[str, np.ndarray]:
    """Official name → float32 values, as the official code draws them, for variables that no file fills.

    Each variable has a seed of its own, made from ``seed`` and its name: its values do not depend on the others.
    """
    import keras

    values = {}
    for name, spec in specs.items():
        initializer = keras.initializers.get(spec.initializer)
        settings = initializer.get_config()
        if "seed" in settings:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            initializer = type(initializer).from_config(settings | {"seed": int.from_bytes(digest[:4], "little") >> 1})
        values[name] = checkpoint.aligned_empty(spec.shape)
        values[name][...] = np.asarray(initializer(spec.shape, dtype="float32"))
    return values


def _plan(file: Source, config: MaskFormerConfig, seed: int) -> Plan:
    specs = parameter_specs_of(config)
    filled = {name: specs[name].shape for name in table.filled(config, specs)}
    drops = table.drops(config, file.tensors)
    initial = initial_values({name: spec for name, spec in specs.items() if name not in filled}, seed)
    origins = dict.fromkeys(flatten(config.to_dict()).keys() - {"name"}, f"config {config.name}")
    return Plan(
        table=table.TABLE,
        key_layout="backbone",
        inference=Inference(config, None, origins),
        tensors=file.tensors,
        moves=plan(table.rules(config), drops, file.tensors, filled),
        drops=drops,
        initial=initial,
        more={
            "weights_license": LICENSE,
            "seed": seed,
            "initial": [{"target": name, "target_shape": list(value.shape)} for name, value in initial.items()],
        },
    )
