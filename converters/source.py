"""Any file with tensors that is supported → their names and arrays, without copying them and without running anything.

A file is told by its first bytes, never by its name: a pickle (``.pkl``, with arrays of NumPy or tensors of PyTorch), or what
``torch.save`` writes (``.pth``, ``.pt``). Its arrays are views of the memory-mapped file.
Why no PyTorch: docs/decisions/0010-reading-torch-files.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from converters.errors import ConversionError, quoted
from converters.torch_zip import MAGIC as ZIP
from converters.torch_zip import read_zip
from converters.unpickle import read_model

EXPECTED = "expected a checkpoint: a pickle such as model_final_6f60dc.pkl, or a .pth file of torch.save"

_FOREIGN = {
    b"\x1f\x8b": "compressed with gzip",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"\x89HDF": "HDF5",
    b"version https://git-lfs": "a Git LFS pointer: the file itself was not downloaded",
    b"<": "HTML or XML: probably an error page instead of the file",
    b"{": "JSON",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """An open file: its path, its bytes, name → tensor (read-only, in the file's order), and the ``__author__`` in it, or ""."""

    path: pathlib.Path
    data: mmap.mmap
    tensors: dict[str, np.ndarray]
    author: str


def check_source(path: pathlib.Path) -> int:
    """Size of the file in bytes.

    Raises:
        ConversionError: it cannot be read, or its first bytes tell that it is something else than a checkpoint.
    """
    name = quoted(path)
    try:
        if path.is_dir():
            raise ConversionError(f"{name} is a directory", EXPECTED)
        if not path.is_file():
            raise ConversionError(f"{name} does not exist, or is no regular file")
        with path.open("rb") as file:
            head = file.read(64)
            size_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConversionError(f"cannot read {name}: {error.strerror}") from None
    if not head:
        raise ConversionError(f"{name} is empty", "download or copy the file again")
    found = [what for magic, what in _FOREIGN.items() if head.lstrip().startswith(magic)]
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size_bytes:
        found.append("safetensors")
    if not found and head[:1] not in b"\x80(}c]" and not head.startswith(ZIP):
        found.append(f"an unknown format that begins with {head[:8]!r}")
    if found:
        raise ConversionError(f"{name} is no checkpoint but {found[0]}", EXPECTED)
    return size_bytes


@contextlib.contextmanager
def open_source(path: pathlib.Path) -> Iterator[Source]:
    """The file's tensors; what is hashed and what is converted are the same pages.

    Raises:
        ConversionError: the file holds something else, or changed while it was open.
    """
    with _mapped(path) as data:
        try:
            model = read_zip(data) if data[: len(ZIP)] == ZIP else read_model(data)
        except ConversionError as error:
            raise ConversionError(f"{quoted(path.name)}: {error}") from None
        yield Source(path, data, model.tensors, model.author)


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
