"""A checkpoint of a MaskFormer → a directory that ``tfmaskformer.load`` and ``tf.train.Checkpoint`` read."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import mmap
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from converters import checkpoint
from converters.destination import Destination
from converters.errors import ConversionError, quoted
from converters.infer import Inference, infer
from converters.manifest import CONFIG_FILE, MANIFEST_FILE, encoded, manifest
from converters.named_config import named_config
from converters.rules import Drop, Move, plan
from converters.source import Source, check_source, open_source
from converters.tables import maskformer as table
from tfmaskformer.config import MaskFormerConfig

if TYPE_CHECKING:
    from tfmaskformer.module import ParameterSpec

THREADS = 2

Progress = Callable[[str, float], None]
"""Told the step and the share of it that is done, 0 … 1."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted: the destination, the manifest in it, and the config with its origins."""

    destination: pathlib.Path
    manifest: dict[str, Any]
    inference: Inference


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    config: str | None = None,
    *,
    force: bool = False,
    progress: Progress = lambda step, share: None,
) -> Conversion:
    """Converts the checkpoint ``source`` into the new directory ``destination``.

    Args:
        source: a checkpoint, ``{"model": {name: float32 tensor}}`` or the inner dict alone, in either key layout: a pickle with arrays
            of NumPy or tensors of PyTorch, or a file of ``torch.save``.
        destination: appears whole, after it was re-read and found equal, or not at all.
        config: name of the zoo entry, official YAML file or JSON file to take the settings from that tensors cannot tell. None: the
            entry that fits.
        force: whether to replace what an earlier conversion wrote there.
        progress: told what is being done.

    Raises:
        ConversionError: the source, the config or the destination cannot be used. Nothing was written.
    """
    base = named_config(config) if config else None
    return run(source, destination, lambda file: _plan(file, base), force=force, progress=progress)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done with a file.

    Attributes:
        table: name and version of the rule table.
        key_layout: of the file.
        inference: the config of the model, with its origins.
        moves: what becomes a variable.
        drops: what does not.
        initial: name → value of the variables that the file does not fill.
        more: further lines of the manifest.
    """

    table: str
    key_layout: str
    inference: Inference
    moves: list[Move]
    drops: list[Drop]
    initial: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    planner: Callable[[Source], Plan],
    *,
    force: bool,
    progress: Progress,
) -> Conversion:
    """Does with ``source`` what ``planner`` says; see :func:`convert`."""
    source = pathlib.Path(source)
    size_bytes = check_source(source)
    target = Destination(destination, force, (MANIFEST_FILE, CONFIG_FILE, *checkpoint.FILES))
    with target.staging() as directory, _no_garbage_collection():
        if (free_bytes := shutil.disk_usage(directory).free) < size_bytes:
            what = f"cannot write {quoted(target.path)}: {free_bytes} bytes are free, the checkpoint has about {size_bytes}"
            raise ConversionError(what, "free space on the disk, or choose another --dst")
        conversion = _convert(source, directory, planner, progress)
        target.commit(directory)
    return dataclasses.replace(conversion, destination=target.path)


def parameter_specs_of(config: MaskFormerConfig) -> dict[str, ParameterSpec]:
    """Official name → what is declared of every variable of the model; none is made."""
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import parameter_specs

    return parameter_specs(MaskFormer(config))


def _plan(file: Source, base: MaskFormerConfig | None) -> Plan:
    key_layout = table.key_layout(file.tensors)
    inference = infer({table.v2_key(name, key_layout): tensor for name, tensor in file.tensors.items()}, file.path.name, base)
    shapes = {name: spec.shape for name, spec in parameter_specs_of(inference.config).items()}
    drops = table.drops(inference.config)
    moves = plan(table.rules(inference.config, key_layout), drops, file.tensors, shapes)
    return Plan(table.TABLE, key_layout, inference, moves, drops)


def _convert(source: pathlib.Path, directory: pathlib.Path, planner: Callable[[Source], Plan], progress: Progress) -> Conversion:
    """Fills the staging directory. What needs no interpreter lock (hashing, copying, TensorFlow's writing) goes on side by side."""
    progress("reading", 0)
    with ThreadPoolExecutor(THREADS) as pool, open_source(source) as file:
        file_digest = pool.submit(_sha256, file.data)
        todo = planner(file)
        tensors = file.tensors
        progress("transforming", 0)
        _check_finite({move.source: tensors[move.source] for move in todo.moves}, pool)
        variables = dict(todo.initial)
        variables |= pool.map(lambda move: (move.target, _transformed(move, tensors[move.source])), todo.moves)
        progress("writing", 0)
        digests = {name: pool.submit(lambda tensor: _sha256(np.ascontiguousarray(tensor).data), tensor) for name, tensor in tensors.items()}
        checkpoint.write(directory, variables)
    config = todo.inference.config
    contents = manifest(
        source={
            "file": source.name,
            "bytes": len(file.data),
            "sha256": file_digest.result(),
            "author": file.author,
            "key_layout": todo.key_layout,
        },
        table=todo.table,
        inference=todo.inference,
        tensors=tensors,
        digests={name: digest.result() for name, digest in digests.items()},
        moves=todo.moves,
        drops=todo.drops,
    )
    contents |= todo.more
    (directory / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    (directory / MANIFEST_FILE).write_text(encoded(contents), encoding="utf-8")
    checkpoint.verify(directory, variables, lambda share: progress("verifying", share))
    return Conversion(directory, contents, todo.inference)


def _transformed(move: Move, tensor: np.ndarray) -> np.ndarray:
    variable = checkpoint.aligned_empty(move.transform.shape(tensor.shape))
    move.transform.copy(tensor, variable)
    return variable


def _check_finite(tensors: Mapping[str, np.ndarray], pool: ThreadPoolExecutor) -> None:
    """Raises where a value is NaN or infinite; tells every such tensor."""
    all_finite = pool.map(lambda tensor: bool(np.isfinite(tensor).all()), tensors.values())
    wrong = [name for name, finite in zip(tensors, all_finite, strict=True) if not finite]
    if wrong:
        lines = [_not_finite(name, tensors[name]) for name in wrong[:20]]
        more = [f"… and {len(wrong) - 20} more"] * (len(wrong) > 20)
        raise ConversionError(
            f"{len(wrong)} of {len(tensors)} tensors have values that are not finite", *lines, *more, "use an earlier file"
        )


def _not_finite(name: str, tensor: np.ndarray) -> str:
    indices = np.argwhere(~np.isfinite(tensor))
    first = tuple(int(index) for index in indices[0])
    return f"{quoted(name)} {tensor.shape}: {len(indices)} of {tensor.size} values, the first is {tensor[first]} at {first}"


def _sha256(data: bytes | mmap.mmap | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Naming the model's modules makes many small objects, at which Python would search all of TensorFlow's for cycles, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
