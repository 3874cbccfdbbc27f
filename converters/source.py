"""Any checkpoint that is supported → its tensors by name, read when they are needed, and without running anything in it.

What a file is, its first bytes tell, never its name: a pickle (``.pkl``, with arrays of NumPy or tensors of PyTorch), what ``torch.save``
writes (``.pth``, ``.pt``), safetensors or HDF5. A directory is a TensorFlow checkpoint. The arrays of a file are views of it, mapped into
memory.
Why no PyTorch: docs/decisions/0010-reading-torch-files.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import pathlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from converters import checkpoint, hdf5, safetensors_file, torch_zip, unpickle
from converters.errors import ConversionError, quoted
from converters.tensor import Tensor
from tfmaskformer.config import ConfigError, MaskFormerConfig

EXPECTED = (
    "expected a checkpoint: a pickle such as model_final_6f60dc.pkl, a .pth file of torch.save, .safetensors, .h5, or a directory with a "
    "TensorFlow checkpoint"
)

CONFIG_KEY = "tfmaskformer.config"
AUTHOR_KEY = "tfmaskformer.author"
"""Where a safetensors or HDF5 file has the model's config, as JSON, and its author."""

PICKLE, TORCH, SAFETENSORS, HDF5, KERAS, TENSORFLOW = (
    "pickle",
    "PyTorch archive",
    "safetensors",
    "HDF5",
    "Keras weights",
    "TensorFlow checkpoint",
)
"""Kinds of checkpoints."""

VARIABLES = (KERAS, TENSORFLOW)
"""The kinds that hold variables of TensorFlow, in its layout."""

_FOREIGN = {
    b"\x1f\x8b": "compressed with gzip",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"version https://git-lfs": "a Git LFS pointer: the file itself was not downloaded",
    b"<": "HTML or XML: probably an error page instead of the file",
    b"{": "JSON",
}
_PAGE = mmap.PAGESIZE
_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Source:
    """An open checkpoint.

    Attributes:
        path: of the file or directory.
        kind: one of the kinds above.
        size_bytes: of the file, or of all files of the checkpoint.
        data: the bytes of a file; None for a directory.
        files: what a directory's checkpoint consists of.
        tensors: name → tensor, in the file's order, with the file's own names and layout.
        author: the ``__author__`` that Detectron2 writes into its files, or "".
        others: what else is in it: "optimizer", "iteration", …
        config: the model's, where the file or directory has one.
        manifest: of the conversion that wrote the directory, or empty.
        digest: what ``sha256`` tells, where it is being worked out.
    """

    path: pathlib.Path
    kind: str
    size_bytes: int
    data: mmap.mmap | None
    tensors: Mapping[str, Tensor]
    author: str = ""
    others: tuple[str, ...] = ()
    config: MaskFormerConfig | None = None
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: tuple[pathlib.Path, ...] = ()
    digest: Future[str] | None = None

    def sha256(self) -> str:
        """Of the file that is open. Of a directory: of the names and digests of its checkpoint's files."""
        if self.digest:
            return self.digest.result()
        if self.data is None:
            lines = (f"{hashlib.sha256(_bytes(file)).hexdigest()}  {file.name}\n" for file in self.files)
            return hashlib.sha256("".join(lines).encode()).hexdigest()
        return _sha256(self.data)

    def release(self, tensor: Tensor) -> None:
        """Lets the memory go that a tensor's part of the file takes; it is read again when it is needed."""
        if self.data is None or not isinstance(tensor, np.ndarray) or tensor.nbytes < _PAGE:
            return
        offset = tensor.__array_interface__["data"][0] - np.frombuffer(self.data, np.uint8).__array_interface__["data"][0]
        if 0 <= offset < len(self.data) and tensor.flags.forc:
            start = offset // _PAGE * _PAGE
            self.data.madvise(mmap.MADV_DONTNEED, start, min(offset + tensor.nbytes, len(self.data)) - start)


def kind_of(path: pathlib.Path) -> str:
    """What a file is by its first bytes; a directory is taken for a TensorFlow checkpoint.

    Raises:
        ConversionError: it cannot be read, or it is something else than a checkpoint.
    """
    name = quoted(path)
    try:
        if path.is_dir():
            if not checkpoint.is_checkpoint(path):
                raise ConversionError(f"{name} is a directory without a TensorFlow checkpoint", EXPECTED)
            return TENSORFLOW
        if path.with_name(f"{path.name}.index").is_file() or path.suffix == ".index" or ".data-0" in path.suffix:
            raise ConversionError(f"{name} is part of a TensorFlow checkpoint", f"name its directory: {path.parent}")
        if not path.is_file():
            raise ConversionError(f"{name} does not exist" if not path.exists() else f"{name} is no regular file")
        with path.open("rb") as file:
            head = file.read(64)
            size_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConversionError(f"cannot read {name}: {error.strerror}") from None
    if not head:
        raise ConversionError(f"{name} is empty", "download or copy the file again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size_bytes:  # first: a length can look like anything
        return SAFETENSORS
    for magic, what in _FOREIGN.items():
        if head.lstrip().startswith(magic):
            raise ConversionError(f"{name} is no checkpoint but {what}", EXPECTED)
    if head.startswith(torch_zip.MAGIC):
        return TORCH
    if head.startswith(hdf5.MAGIC):
        return HDF5
    if head[:1] in b"\x80(}c]":
        return PICKLE
    raise ConversionError(f"{name} is no checkpoint but an unknown format that begins with {head[:8]!r}", EXPECTED)


@contextlib.contextmanager
def open_source(path: pathlib.Path, own: bool = False, pool: Executor | None = None) -> Iterator[Source]:
    """The checkpoint's tensors; what is hashed and what is converted are the same bytes.

    Args:
        path: of the file or directory.
        own: it was written just now, by us.
        pool: where it is hashed, from the moment that it is opened.

    Raises:
        ConversionError: the file holds something else, or changed while it was open.
    """
    kind = kind_of(path)
    if kind == TENSORFLOW:
        source = _open_directory(path)
        before = _state(source.files)
        yield dataclasses.replace(source, digest=pool.submit(source.sha256)) if pool else source
        if _state(source.files) != before:
            raise ConversionError(f"{quoted(path)} changed while it was being read", "wait until it is complete")
        return
    with _mapped(path) as data:
        digest = pool.submit(_sha256, data) if pool else None
        try:
            source = _read_hdf5(path, data, own) if kind == HDF5 else _READERS[kind](path, data)
        except ConversionError as error:
            raise ConversionError(f"{quoted(path.name)}: {error}") from None
        yield dataclasses.replace(source, digest=digest)


def _sha256(data: mmap.mmap) -> str:
    digest = hashlib.sha256()
    with memoryview(data) as view:
        for start in range(0, len(view), _BLOCK_BYTES):
            with view[start : start + _BLOCK_BYTES] as block:  # not a copy: reading the file holds up nobody else
                digest.update(block)
                data.madvise(mmap.MADV_DONTNEED, start, len(block))
    return digest.hexdigest()


def _read_pickle(path: pathlib.Path, data: mmap.mmap) -> Source:
    model = unpickle.read_model(data)
    return Source(path, PICKLE, len(data), data, model.tensors, model.author, model.others)


def _read_torch(path: pathlib.Path, data: mmap.mmap) -> Source:
    model = torch_zip.read_zip(data)
    return Source(path, TORCH, len(data), data, model.tensors, model.author, model.others)


def _read_safetensors(path: pathlib.Path, data: mmap.mmap) -> Source:
    contents = safetensors_file.read_safetensors(data)
    config = _config(contents.metadata.get(CONFIG_KEY), "its metadata")
    return Source(path, SAFETENSORS, len(data), data, contents.tensors, contents.metadata.get(AUTHOR_KEY, ""), config=config)


def _read_hdf5(path: pathlib.Path, data: mmap.mmap, own: bool) -> Source:
    contents = hdf5.read(path, data, own)
    kind = KERAS if any(f"/{hdf5.KERAS_VARIABLES}/" in name for name in contents.tensors) else HDF5
    config = _config(contents.attributes.get(CONFIG_KEY), "its attributes")
    tensors, others = contents.tensors, tuple[str, ...]()
    if kind == KERAS and (optimizer := {name for name in tensors if name.startswith("optimizer/")}):
        tensors, others = {name: tensor for name, tensor in tensors.items() if name not in optimizer}, ("optimizer",)
    return Source(path, kind, len(data), data, tensors, contents.attributes.get(AUTHOR_KEY, ""), others, config)


_READERS = {PICKLE: _read_pickle, TORCH: _read_torch, SAFETENSORS: _read_safetensors}


def _open_directory(path: pathlib.Path) -> Source:
    contents = checkpoint.read(path)
    config = None
    if (file := path / checkpoint.CONFIG_FILE).is_file():
        config = _config(_text(file), quoted(file))
    manifest: Any = {}
    if (file := path / checkpoint.MANIFEST_FILE).is_file():
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            manifest = json.loads(_text(file))
    manifest = manifest if isinstance(manifest, dict) else {}
    author = manifest.get("source", {}).get("author", "") if isinstance(manifest.get("source"), dict) else ""
    return Source(
        path,
        TENSORFLOW,
        sum(file.stat().st_size for file in contents.files),
        None,
        contents.tensors,
        author if isinstance(author, str) and author.isprintable() else "",
        contents.others,
        config,
        manifest,
        contents.files,
    )


def _state(files: tuple[pathlib.Path, ...]) -> list[tuple[int, int, int]]:
    """What changes when a file does; raises nothing where one is gone."""
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def _bytes(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConversionError(f"cannot read {quoted(file)}: {error.strerror}") from None


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"cannot read {quoted(file)}: {error}") from None


def _config(text: str | None, where: str) -> MaskFormerConfig | None:
    if text is None:
        return None
    try:
        return MaskFormerConfig.from_dict(json.loads(text))
    except (json.JSONDecodeError, ConfigError, RecursionError, TypeError, AttributeError) as error:
        raise ConversionError(f"the config in {where} is none: {error}", "name another with --config") from None


@contextlib.contextmanager
def _mapped(path: pathlib.Path) -> Iterator[mmap.mmap]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            before = os.fstat(file.fileno())
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ConversionError(f"cannot read {quoted(path)}: {error}") from None
        yield data
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ConversionError(f"{quoted(path)} changed while it was being read", "wait until it is complete")
