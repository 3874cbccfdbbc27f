"""The folder of a training: what it is of, its checkpoints, its evaluations, its curves.

::

    config.yaml            the whole resolved config, as the official code reads it
    run.json               what else the result depends on
    config.json            of the model, so that the folder is one that ``tfmaskformer eval`` and ``convert`` take
    checkpoint, ckpt-N.*   model, optimizer and guard after N steps; the last few are kept
    evaluation-N.json      what ``tfmaskformer eval --json`` would write
    events/                for TensorBoard

Everything but a checkpoint is whole or not there; a checkpoint counts when ``checkpoint`` names it. So a kill at any moment costs the steps
since the last one, and the same command goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import yaml

from tfmaskformer.checkpoint import CONFIG_FILE
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.data.listing import read_file, told
from tfmaskformer.evaluation.evaluate import _write
from tfmaskformer.official_yaml import Tree, dump

KEEP = 3
"""Checkpoints, the last ones."""

FORMAT = 1
_TREE_FILE, _PLAN_FILE = "config.yaml", "run.json"


class RunError(ValueError):
    """A folder, a config or weights that a training cannot use; nothing was trained."""


class Run:
    """A training's folder, new or to be gone on with.

    Args:
        folder: a path or ``gs://…``; made where it is missing.
        config: of the model.
        tree: the whole resolved config.
        plan: whatever else the result depends on, of JSON types.
        write: whether this process is the one of a cluster that writes.

    Raises:
        RunError: the folder holds another training, or something that is none, or cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], config: MaskFormerConfig, tree: Tree, plan: Mapping[str, Any], *, write: bool = True
    ):
        self.folder, self.writes = os.fspath(folder), write
        files = {
            _TREE_FILE: dump(tree),
            CONFIG_FILE: json.dumps(config.to_dict(), indent=1) + "\n",
            _PLAN_FILE: json.dumps({"format": FORMAT, **plan}, indent=1) + "\n",  # last: where it is, the others are
        }
        try:
            tf.io.gfile.makedirs(self.folder)
            there = [name for name in tf.io.gfile.listdir(self.folder) if not name.endswith(".new")]
            if _PLAN_FILE in there:
                self._check({name: read_file(self.path(name)).decode() for name in files}, files)
            elif set(there) - files.keys():
                raise RunError(f"'{self.folder}' is not empty, and holds no training\n  choose another --out")
            elif write:
                for name, text in files.items():
                    self.write(name, text.encode())
        except (tf.errors.OpError, OSError) as error:
            raise RunError(f"cannot write '{self.folder}': {_told(error)}\n  choose another --out") from error

    def _check(self, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
        problems: dict[str, str] = {}
        for name, text in expected.items():
            old, new = _flat(yaml.safe_load(found[name])), _flat(yaml.safe_load(text))
            problems |= {key: f"{key}: {new.get(key)}, there {old.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)}
        if problems:
            lines = "\n  ".join(list(problems.values())[:5])
            raise RunError(f"'{self.folder}' holds another training:\n  {lines}\n  choose another --out, or the settings of that training")

    def path(self, name: str) -> str:
        """Of a file in the folder."""
        return os.path.join(self.folder, name)

    def write(self, name: str, content: bytes) -> None:
        """A file that is there whole, or not at all."""
        _write(self.path(name), content)

    def checkpoints(self, **objects: Any) -> tf.train.CheckpointManager:
        """What saves and restores these objects here."""
        return tf.train.CheckpointManager(tf.train.Checkpoint(**objects), self.folder, max_to_keep=KEEP, checkpoint_name="ckpt")


def _flat(values: Any, where: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {key: item for part, inner in values.items() for key, item in _flat(inner, f"{where}.{part}").items()}
    return {where.removeprefix("."): values}


def _told(error: Exception) -> str:
    return told(error) if isinstance(error, tf.errors.OpError) else getattr(error, "strerror", None) or str(error)
