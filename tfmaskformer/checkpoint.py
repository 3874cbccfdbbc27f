"""Checkpoint directories: a TensorFlow checkpoint whose keys are the official names, and the config beside it.

``config.json`` holds the :class:`~tfmaskformer.config.MaskFormerConfig`; ``checkpoint``, ``ckpt.index`` and ``ckpt.data-*`` are
what ``tf.train.Checkpoint(model=model)`` reads and writes: ``backbone.stem.conv1.weight`` has the key
``model/backbone/stem/conv1/weight/.ATTRIBUTES/VARIABLE_VALUE``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from tfmaskformer.config import ConfigError, MaskFormerConfig
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import parameter_specs

CONFIG_FILE, MANIFEST_FILE = "config.json", "manifest.json"
_AGAIN = "convert the source again, or name a directory written by 'convert' or 'train'"
_PREFIX, _SUFFIX = "model/", "/.ATTRIBUTES/VARIABLE_VALUE"


class CheckpointError(ValueError):
    """A directory that holds no MaskFormer, or not the one its config describes; the message lists everything that is wrong."""


def checkpoint_key(name: str) -> str:
    """Key of the variable with an official name.

    >>> checkpoint_key("backbone.stem.conv1.weight")
    'model/backbone/stem/conv1/weight/.ATTRIBUTES/VARIABLE_VALUE'
    """
    return _PREFIX + name.replace(".", "/") + _SUFFIX


def stored_variables(reader: Any) -> dict[str, str]:
    """Official name → key of every variable of the model in a checkpoint.

    The names are those of the attributes that lead from the checkpoint's root through ``model`` to the variable. The key is another one
    where TensorFlow came to the variable by another way: what an optimizer trains, it calls ``optimizer/_trainable_variables/…``.

    Args:
        reader: of ``tf.train.load_checkpoint``.

    Raises:
        ValueError: the checkpoint's own list of objects is damaged or missing.
    """
    graph = TrackableObjectGraph()
    try:
        graph.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
        nodes = graph.nodes
        todo = [("", child.node_id) for child in nodes[0].children if child.local_name == "model"]
        found: dict[str, str] = {}
        seen = set()
        while todo:
            path, node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            for attribute in nodes[node].attributes:
                if attribute.name == "VARIABLE_VALUE":
                    found[path] = attribute.checkpoint_key
            for child in nodes[node].children:
                if not child.local_name.startswith("_"):  # Keras's own lists of what there is
                    todo.append((f"{path}.{child.local_name}" if path else child.local_name, child.node_id))
    except (tf.errors.OpError, DecodeError, IndexError) as error:
        raise ValueError(f"the checkpoint's list of objects cannot be read: {error}") from error
    return found


def read_config(directory: str | os.PathLike[str]) -> MaskFormerConfig:
    """The config of a checkpoint directory.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    path = os.path.join(directory, CONFIG_FILE)
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            return MaskFormerConfig.from_dict(json.loads(file.read().decode("utf-8")))
    except (tf.errors.OpError, OSError) as error:
        raise CheckpointError(
            f"{directory}: cannot read {CONFIG_FILE} ({_reason(error)}); expected a directory written by 'convert'"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``convert`` tells of a checkpoint; empty where training wrote it.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    path = os.path.join(directory, MANIFEST_FILE)
    try:
        if not tf.io.gfile.exists(path):
            return {}
        with tf.io.gfile.GFile(path, "rb") as file:
            manifest = json.loads(file.read().decode("utf-8"))
    except (tf.errors.OpError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}\n  convert the source again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("source"), dict):
        raise CheckpointError(f"{path}: expected what 'convert' tells of the source, got something else\n  convert the source again")
    return manifest


def latest_prefix(directory: str | os.PathLike[str]) -> str:
    """Of the checkpoint that the directory's file ``checkpoint`` names.

    Raises:
        CheckpointError: there is none, or the file is damaged.
        OpError: of TensorFlow; it cannot be read.
    """
    try:
        prefix = tf.train.latest_checkpoint(os.fspath(directory))
    except ValueError as error:  # not UTF-8
        path = os.path.join(directory, "checkpoint")
        raise CheckpointError(f"{path}: expected TensorFlow's list of checkpoints, got something else ({error})\n  {_AGAIN}") from error
    if prefix is None:
        raise CheckpointError(f"{directory}: no TensorFlow checkpoint in it\n  {_AGAIN}")
    return prefix


def load(
    directory: str | os.PathLike[str], dtype: str = "float32", config: MaskFormerConfig | None = None, *, new_classes: bool = False
) -> MaskFormer:
    """The model in a checkpoint directory, with its weights.

    Args:
        directory: written by ``convert`` or by ``tf.train.CheckpointManager`` on ``Checkpoint(model=model)`` beside a config; local or
            on any file system of TensorFlow (``gs://…``).
        dtype: "float32", "float64" (variables and computation, for parity) or "mixed_bfloat16" (float32 variables).
        config: of the model, in the place of the directory's.
        new_classes: whether the layers named by :func:`other_classes` get their initial values, as upstream's loader leaves them.

    Raises:
        CheckpointError: something is missing, left over or misshapen; all of it is listed.
    """
    model = MaskFormer(config or read_config(directory), dtype)
    prefix = os.fspath(directory)
    try:
        prefix = latest_prefix(directory)
        reader = tf.compat.v1.train.NewCheckpointReader(prefix)
        keys, stored = stored_variables(reader), _shapes(reader)
        drawn = _other_classes(model, stored) if new_classes else ()
        _check(directory, model, {name: shape for name, shape in stored.items() if name not in drawn}, drawn)
        model.build_parameters(lambda name: None if name in drawn else reader.get_tensor(keys[name]))
    except CheckpointError:
        raise
    except (tf.errors.OpError, RuntimeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{prefix}: not a readable TensorFlow checkpoint ({error}); convert the source again") from error
    return model


def other_classes(directory: str | os.PathLike[str], config: MaskFormerConfig) -> tuple[str, ...]:
    """Official names of the parameters that have a checkpoint's number of classes in their shape, where ``config`` has another.

    Raises:
        CheckpointError: it cannot be read.
    """
    prefix = latest_prefix(directory)
    try:
        return _other_classes(MaskFormer(config), _shapes(tf.compat.v1.train.NewCheckpointReader(prefix)))
    except (tf.errors.OpError, RuntimeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{prefix}: not a readable TensorFlow checkpoint ({error}); convert the source again") from error


def _shapes(reader: tf.train.CheckpointReader) -> dict[str, tuple[int, ...]]:
    """Official name → shape of every variable of the model."""
    shapes = reader.get_variable_to_shape_map()
    return {name: tuple(shapes[key]) for name, key in stored_variables(reader).items() if key in shapes}


def _other_classes(model: MaskFormer, stored: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    config, specs = model.config, parameter_specs(model)
    more: dict[str, Any] = {"num_classes": config.num_classes + 1, "class_names": (), "thing_classes": ()}
    if config.head == "PerPixelBaselinePlusHead":  # a query for each class
        more["predictor"] = dataclasses.replace(config.predictor, num_queries=config.num_classes + 1)
    with_more = parameter_specs(MaskFormer(dataclasses.replace(config, **more)))
    return tuple(name for name in specs if with_more[name].shape != specs[name].shape != stored.get(name, specs[name].shape))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def _check(directory: str | os.PathLike[str], model: MaskFormer, stored: Mapping[str, tuple[int, ...]], drawn: Collection[str]) -> None:
    specs = {name: spec for name, spec in parameter_specs(model).items() if name not in drawn}
    problems = [f"missing variable '{name}' {specs[name].shape}" for name in specs.keys() - stored.keys()]
    problems += [f"variable '{name}' {stored[name]} is not in the model" for name in stored.keys() - specs.keys()]
    problems += [
        f"variable '{name}' has shape {stored[name]}, expected {specs[name].shape}"
        for name in specs.keys() & stored.keys()
        if stored[name] != specs[name].shape
    ]
    if problems:
        listing = "\n  ".join(sorted(problems))
        raise CheckpointError(f"{directory}: the checkpoint does not fit the config of {model.config.name}\n  {listing}")
