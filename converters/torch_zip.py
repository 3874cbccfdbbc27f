"""Reads and writes what ``torch.save`` writes since PyTorch 1.6: an uncompressed zip archive of a pickle and of the bytes of each storage.

``NAME/data.pkl`` is read by :mod:`converters.unpickle`; ``NAME/data/KEY`` are views of the file. PyTorch is not needed, and nothing is run.
"""

from __future__ import annotations

import itertools
import math
import mmap
import operator
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import IO, BinaryIO, cast

from converters.errors import ConversionError, quoted
from converters.tensor import Tensor, little_endian
from converters.unpickle import STORAGE_DTYPES, PickledModel, read_model_in_parts

MAGIC = b"PK\x03\x04"
_HEADER_BYTES = 30
_ALIGNMENT_BYTES = 64
_ZIP64_BYTES = 1 << 30


def read_zip(data: mmap.mmap) -> PickledModel:
    """The tensors of an archive, as read-only views of ``data``.

    Raises:
        ConversionError: no such archive, damaged, compressed, or outside of what a checkpoint may contain.
    """
    try:
        with zipfile.ZipFile(cast(IO[bytes], data)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError, OSError) as error:
        raise ConversionError(f"the zip archive is damaged: {error}", "download or copy the file again") from None
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ConversionError(
            "a zip archive that torch.save did not write: it has no file NAME/data.pkl", "expected a .pth or .pt checkpoint"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise ConversionError("the file is a TorchScript program", "expected a checkpoint: torch.save(model.state_dict(), file)")
    prefix = f"{folder}data/"
    storages = {name.removeprefix(prefix): _content(data, entry) for name, entry in entries.items() if name.startswith(prefix)}
    order = _content(data, entries[f"{folder}byteorder"]) if f"{folder}byteorder" in entries else b"little"
    if bytes(order[:10]) not in (b"little", b"big"):
        raise ConversionError(f"the byte order {quoted(bytes(order[:10]))}, expected little or big")
    return read_model_in_parts(bytes(_content(data, entries[pickles[0]])), storages, "<" if bytes(order) == b"little" else ">", len(data))


def _content(data: mmap.mmap, entry: zipfile.ZipInfo) -> memoryview:
    """A file of the archive: a view."""
    name = quoted(entry.filename)
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ConversionError(f"{name} in the archive is compressed or encrypted, which torch.save never does", "save the checkpoint again")
    header = data[entry.header_offset : entry.header_offset + _HEADER_BYTES]
    if len(header) < _HEADER_BYTES or header[:4] != MAGIC:
        raise ConversionError(f"{name} is not where the archive says", "download or copy the file again")
    start = entry.header_offset + _HEADER_BYTES + sum(struct.unpack("<HH", header[26:30]))
    if start + entry.file_size > len(data):
        raise ConversionError(f"{name} reaches beyond the end of the archive", "download or copy the file again")
    return memoryview(data)[start : start + entry.file_size]


def write_zip(file: BinaryIO, tensors: Mapping[str, Tensor], versions: Mapping[str, int]) -> None:
    """Writes what ``torch.save({"model": state_dict}, file)`` would, one tensor at a time; the same input gives the same bytes.

    The state dict is an ``OrderedDict`` whose ``_metadata`` have the version of every module, from which PyTorch's and the official code's
    modules know how old their tensors are.

    Args:
        file: is written from its start on, and must be able to move back.
        tensors: name → array of one of ``STORAGE_DTYPES``, or what becomes one when it is written.
        versions: path of a module, "" for the model itself → its version; all others, as far as names of tensors tell them, have 1.

    Raises:
        ConversionError: a type of elements that is not supported.
    """
    contents = _pickled(tensors, versions)
    with zipfile.ZipFile(file, "w") as archive:

        def add(name: str, content: bytes | memoryview) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}")  # of 1980, the earliest time that there is
            zip64 = len(content) >= _ZIP64_BYTES
            # A field of padding, with PyTorch's mark, so that the content starts at a multiple of 64 bytes and can be mapped.
            start = archive.start_dir + _HEADER_BYTES + len(entry.filename) + 4 + (20 if zip64 else 0)
            padding = -start % _ALIGNMENT_BYTES
            entry.extra = struct.pack("<2sH", b"FB", padding) + padding * b"Z"
            with archive.open(entry, "w", force_zip64=zip64) as opened:
                opened.write(content)

        add("data.pkl", contents)
        add("byteorder", b"little")
        for key, tensor in enumerate(tensors.values()):
            add(f"data/{key}", little_endian(tensor))
        add("version", b"3\n")


def _pickled(tensors: Mapping[str, Tensor], versions: Mapping[str, int]) -> bytes:
    """``data.pkl``: {"model": OrderedDict of tensors, with ``_metadata``}. Opcodes, not ``pickle``, which would need PyTorch's classes."""
    types = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
    ordered_dict = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    model = b""
    for key, (name, tensor) in enumerate(tensors.items()):
        if (dtype := tensor.dtype.newbyteorder("=")) not in types:
            raise ConversionError(f"{quoted(name)} has elements of {tensor.dtype}", f".pth files may have {', '.join(map(str, types))}")
        storage = _text("storage") + pickle.GLOBAL + f"torch\n{types[dtype]}\n".encode() + _text(str(key)) + _text("cpu")
        storage = pickle.MARK + storage + _integer(math.prod(tensor.shape)) + pickle.TUPLE + pickle.BINPERSID
        strides = [*itertools.accumulate((max(size, 1) for size in tensor.shape[:0:-1]), operator.mul, initial=1)][::-1]
        window = _integer(0) + _tuple(tensor.shape) + _tuple(strides[: len(tensor.shape)])
        arguments = pickle.MARK + storage + window + pickle.NEWFALSE + ordered_dict + pickle.TUPLE
        model += _text(name) + pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE
    modules = {"": 1}
    for name in tensors:
        modules |= dict.fromkeys(itertools.accumulate(name.split(".")[:-1], "{}.{}".format), 1)
    metadata = b""
    for name, version in (modules | dict(versions)).items():
        metadata += _text(name) + pickle.EMPTY_DICT + _text("version") + _integer(version) + pickle.SETITEM
    metadata = ordered_dict + pickle.MARK + metadata + pickle.SETITEMS
    state = pickle.EMPTY_DICT + _text("_metadata") + metadata + pickle.SETITEM
    model = ordered_dict + pickle.MARK + model + pickle.SETITEMS + state + pickle.BUILD
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + _text("model") + model + pickle.SETITEM + pickle.STOP


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + value.to_bytes(8, "little")


def _tuple(values: Iterable[int]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE
