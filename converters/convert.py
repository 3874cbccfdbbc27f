"""A Detectron2 pickle of a MaskFormer → a directory that ``tfmaskformer.load`` and ``tf.train.Checkpoint`` read."""

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
from typing import Any

import numpy as np

from converters import checkpoint
from converters.destination import Destination
from converters.errors import ConversionError, quoted
from converters.infer import Inference, infer
from converters.manifest import CONFIG_FILE, MANIFEST_FILE, encoded, manifest
from converters.named_config import named_config
from converters.rules import Move, plan
from converters.tables import maskformer as table
from converters.transforms import Shape
from converters.unpickle import read_model
from tfmaskformer.config import MaskFormerConfig

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
        source: a pickle as Detectron2 writes it, ``{"model": {name: float32 array}}``, in either key layout.
        destination: appears whole, after it was re-read and found equal, or not at all.
        config: name of the zoo entry, official YAML file or JSON file to take the settings from that tensors cannot tell. None: the
            entry that fits.
        force: whether to replace what an earlier conversion wrote there.
        progress: told what is being done.

    Raises:
        ConversionError: the source, the config or the destination cannot be used. Nothing was written.
    """
    source = pathlib.Path(source)
    size_bytes = _check_source(source)
    base = named_config(config) if config else None
    target = Destination(destination, force, (MANIFEST_FILE, CONFIG_FILE, *checkpoint.FILES))
    with target.staging() as directory, _no_garbage_collection():
        if (free_bytes := shutil.disk_usage(directory).free) < size_bytes:
            what = f"cannot write {quoted(target.path)}: {free_bytes} bytes are free, the checkpoint has about {size_bytes}"
            raise ConversionError(what, "free space on the disk, or choose another --dst")
        conversion = _convert(source, directory, base, progress)
        target.commit(directory)
    return dataclasses.replace(conversion, destination=target.path)


def _convert(source: pathlib.Path, directory: pathlib.Path, base: MaskFormerConfig | None, progress: Progress) -> Conversion:
    """Fills the staging directory. What needs no interpreter lock (hashing, copying, TensorFlow's writing) goes on side by side."""
    with ThreadPoolExecutor(THREADS) as pool, _mapped(source) as data:
        progress("reading", 0)
        file_digest = pool.submit(_sha256, data)
        try:
            pickled = read_model(data)
        except ConversionError as error:
            raise ConversionError(f"{quoted(source.name)}: {error}") from None
        tensors = pickled.tensors
        key_layout = table.key_layout(tensors)
        inference = infer({table.v2_key(name, key_layout): tensor for name, tensor in tensors.items()}, source.name, base)
        drops = table.drops(inference.config)
        moves = plan(table.rules(inference.config, key_layout), drops, tensors, _variable_shapes(inference.config))
        progress("transforming", 0)
        _check_finite(tensors, pool)
        variables = dict(pool.map(lambda move: (move.target, _transformed(move, tensors[move.source])), moves))
        progress("writing", 0)
        digests = {name: pool.submit(lambda tensor: _sha256(np.ascontiguousarray(tensor).data), tensor) for name, tensor in tensors.items()}
        checkpoint.write(directory, variables)
    contents = manifest(
        source={
            "file": source.name,
            "bytes": len(data),
            "sha256": file_digest.result(),
            "author": pickled.author,
            "key_layout": key_layout,
        },
        table=table.TABLE,
        inference=inference,
        tensors=tensors,
        digests={name: digest.result() for name, digest in digests.items()},
        moves=moves,
        drops=drops,
    )
    (directory / CONFIG_FILE).write_text(json.dumps(inference.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    (directory / MANIFEST_FILE).write_text(encoded(contents), encoding="utf-8")
    checkpoint.verify(directory, variables, lambda share: progress("verifying", share))
    return Conversion(directory, contents, inference)


def _variable_shapes(config: MaskFormerConfig) -> dict[str, Shape]:
    """Official name → shape of every variable of the model; none is made."""
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import parameter_specs

    return {name: spec.shape for name, spec in parameter_specs(MaskFormer(config)).items()}


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


_FOREIGN = {
    b"PK\x03\x04": "a zip archive, such as torch.save writes (.pth)",
    b"\x1f\x8b": "compressed with gzip",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"\x89HDF": "HDF5",
    b"version https://git-lfs": "a Git LFS pointer: the file itself was not downloaded",
    b"<": "HTML or XML: probably an error page instead of the file",
    b"{": "JSON",
}


def _check_source(source: pathlib.Path) -> int:
    """Size of the source in bytes; raises where its first bytes tell that it is no pickle."""
    name = quoted(source)
    try:
        if source.is_dir():
            raise ConversionError(f"{name} is a directory", "expected a pickle such as model_final_6f60dc.pkl")
        if not source.is_file():
            raise ConversionError(f"{name} does not exist, or is no regular file")
        with source.open("rb") as file:
            head = file.read(64)
            size_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConversionError(f"cannot read {name}: {error.strerror}") from None
    if not head:
        raise ConversionError(f"{name} is empty", "download or copy the file again")
    found = [what for magic, what in _FOREIGN.items() if head.lstrip().startswith(magic)]
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size_bytes:
        found.append("safetensors")
    if not found and head[:1] not in b"\x80(}c]":
        found.append(f"an unknown format that begins with {head[:8]!r}")
    if found:
        raise ConversionError(f"{name} is no pickle but {found[0]}", "expected a pickle such as model_final_6f60dc.pkl")
    return size_bytes


@contextlib.contextmanager
def _mapped(source: pathlib.Path) -> Iterator[mmap.mmap]:
    """The file's bytes, without a copy. What is hashed and what is converted are the same pages."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(source.open("rb"))
            before = os.fstat(file.fileno())
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ConversionError(f"cannot read {quoted(source)}: {error}") from None
        yield data
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ConversionError(f"{quoted(source)} changed while it was being read", "wait until it is complete")


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
