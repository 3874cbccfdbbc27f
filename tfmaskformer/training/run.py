"""The folder of a training: what it is of, its checkpoints, its evaluations, its curves.

::

    config.yaml            the whole resolved config, as the official code reads it
    run.json               what else the result depends on
    config.json            of the model, so that the folder is one that ``tfmaskformer eval`` and ``convert`` take
    checkpoint, ckpt-N.*   model, optimizer and guard after N steps; the last few are kept
    evaluation-N.json      what ``tfmaskformer eval --json`` would write
    events/                for TensorBoard

Everything but a checkpoint is whole or not there; a checkpoint counts when ``checkpoint`` names it, or when that names none and it can be
read. So a kill at any moment costs the steps since the last one, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf
import yaml

from tfmaskformer.checkpoint import CONFIG_FILE, CheckpointError, latest_prefix
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.data.listing import read_file, told, write_file
from tfmaskformer.evaluation.devices import gathered
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

    Attributes:
        latest: prefix of the checkpoint to go on from; None: there is none.

    Raises:
        RunError: the folder holds another training, or something that is none or damaged, or cannot be read.
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
        self._files = files
        try:
            there = tf.io.gfile.listdir(self.folder) if tf.io.gfile.exists(self.folder) else []
            there = [name.rstrip("/") for name in there if not name.endswith(".new")]
            self._is_new = _PLAN_FILE not in there
            if not self._is_new:
                self._check({name: self._read(name) for name in files})
            elif set(there) - files.keys():
                raise RunError(f"'{self.folder}' is not empty, and holds no training\n  choose another --out")
            self.latest = _latest(self.folder, there)
        except (tf.errors.OpError, OSError) as error:
            raise RunError(f"cannot read '{self.folder}': {_told(error)}\n  choose another --out") from error

    def agree(self, strategy: tf.distribute.Strategy, **more: str) -> None:
        """Compares what the workers of a cluster are to do; each must call this.

        Args:
            strategy: whose workers they are.
            more: whatever has to be the same for all of them, beside the settings and the checkpoint.

        Raises:
            RunError: on all of them, where one has settings, data or a checkpoint of its own.
        """
        its = {name: yaml.safe_load(text) for name, text in self._files.items()} | more
        its["last checkpoint"] = self.latest and os.path.basename(self.latest)
        first, *others = (_flat(json.loads(line)) for line in gathered(strategy, json.dumps(its)))
        for index, other in enumerate(others, 1):
            if differing := [key for key in {**first, **other} if first.get(key) != other.get(key)]:
                lines = "\n  ".join(f"{key}: {other.get(key)}, worker 0 {first.get(key)}" for key in differing[:5])
                remedy = "give all workers the same command, the same data, and one folder --out that all of them see"
                raise RunError(f"worker {index} is to do something else:\n  {lines}\n  {remedy}")

    def begin(self) -> None:
        """Makes the folder of a new training.

        Raises:
            RunError: it cannot be written.
        """
        if not (self._is_new and self.writes):
            return
        try:
            tf.io.gfile.makedirs(self.folder)
            for name, text in self._files.items():
                self.write(name, text.encode())
        except (tf.errors.OpError, OSError) as error:
            raise RunError(f"cannot write '{self.folder}': {_told(error)}\n  choose another --out") from error

    def _read(self, name: str) -> Any:
        try:
            return yaml.safe_load(read_file(self.path(name)).decode())
        except (tf.errors.NotFoundError, UnicodeDecodeError, yaml.YAMLError) as error:
            why = "is missing" if isinstance(error, tf.errors.NotFoundError) else "is damaged"
            raise RunError(f"'{self.path(name)}' {why}, and tells of which training the folder is\n  choose another --out") from error

    def _check(self, found: Mapping[str, Any]) -> None:
        problems: dict[str, str] = {}
        for name, text in self._files.items():
            old, new = _flat(found[name]), _flat(yaml.safe_load(text))
            problems |= {key: f"{key}: {new.get(key)}, there {old.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)}
        if problems:
            lines = "\n  ".join(list(problems.values())[:5])
            raise RunError(f"'{self.folder}' holds another training:\n  {lines}\n  choose another --out, or the settings of that training")

    def path(self, name: str) -> str:
        """Of a file in the folder."""
        return os.path.join(self.folder, name)

    def write(self, name: str, content: bytes) -> None:
        """A file that is there whole, or not at all."""
        write_file(self.path(name), content)

    def restore(self, **objects: Any) -> tf.train.CheckpointManager:
        """Gives these objects the values of :attr:`latest`, if there is one; what they are saved with.

        Raises:
            RunError: it cannot be read.
        """
        if self.latest and self.writes and _named(self.folder) is None:
            names = [os.path.basename(prefix) for prefix in _prefixes(self.folder, tf.io.gfile.listdir(self.folder))]
            names = names[: names.index(os.path.basename(self.latest)) + 1]
            text = [f'model_checkpoint_path: "{names[-1]}"', *(f'all_model_checkpoint_paths: "{name}"' for name in names)]
            self.write("checkpoint", ("\n".join(text) + "\n").encode())
        manager = tf.train.CheckpointManager(tf.train.Checkpoint(**objects), self.folder, max_to_keep=KEEP, checkpoint_name="ckpt")
        if self.latest:
            try:
                manager.checkpoint.restore(self.latest).assert_existing_objects_matched()
            except (tf.errors.OpError, AssertionError, IndexError, ValueError) as error:
                older = [prefix for prefix in manager.checkpoints if prefix != self.latest][-1:]
                its = f"{os.path.basename(self.latest)}.*"
                remedy = f"remove its files ({its}) to go on from '{older[0]}'" if older else "choose another --out"
                raise RunError(f"'{self.latest}' cannot be read: {str(error).splitlines()[0]}\n  {remedy}") from error
        return manager


def _prefixes(folder: str, there: Iterable[str]) -> list[str]:
    """Of all checkpoints, the oldest first."""
    numbers = [int(match[1]) for name in there if (match := re.fullmatch(r"ckpt-(\d+)\.index", name))]
    return [os.path.join(folder, f"ckpt-{number}") for number in sorted(numbers)]


def _latest(folder: str, there: Iterable[str]) -> str | None:
    """Prefix of the checkpoint that the file ``checkpoint`` names or, where it is gone or damaged, of the newest that can be read."""
    if named := _named(folder):
        return named
    for prefix in reversed(_prefixes(folder, there)):
        with contextlib.suppress(tf.errors.OpError, IndexError, ValueError):
            tf.train.load_checkpoint(prefix)
            return prefix
    return None


def _named(folder: str) -> str | None:
    with contextlib.suppress(CheckpointError):
        return latest_prefix(folder)
    return None


def _flat(values: Any, where: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {key: item for part, inner in values.items() for key, item in _flat(inner, f"{where}.{part}").items()}
    return {where.removeprefix("."): values}


def _told(error: Exception) -> str:
    return told(error) if isinstance(error, tf.errors.OpError) else getattr(error, "strerror", None) or str(error)
