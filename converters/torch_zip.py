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

MARK = "__tfmaskformer__"
"""The key beside "model" that tells what was written here; the official loader passes over it."""
MAGIC = b"PK\x03\x04"
_HEADER_BYTES = 30
_UTF_8 = 1 << 11
_ALIGNMENT_BYTES = 64
_ZIP64_BYTES = 1 << 30
_UNTRUSTED = "the file was made by something else than torch.save; do not open it with other tools unless you trust its source"


def read_zip(data: mmap.mmap) -> PickledModel:
    """The tensors of an archive, as read-only views of ``data``.

    Raises:
        ConversionError: no such archive, damaged, compressed, or outside of what a checkpoint may contain.
    """
    try:
        with zipfile.ZipFile(cast(IO[bytes], data)) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError, OSError) as error:
        raise ConversionError(f"the zip archive is damaged: {error}", "download or copy the file again") from None
    contents = _contents(data, listed)
    pickles = [name for name in contents if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ConversionError(
            "a zip archive that torch.save did not write: it has no file NAME/data.pkl", "expected a .pth or .pt checkpoint"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in contents:
        raise ConversionError("the file is a TorchScript program", "expected a checkpoint: torch.save(model.state_dict(), file)")
    prefix = f"{folder}data/"
    storages = {name.removeprefix(prefix): content for name, content in contents.items() if name.startswith(prefix)}
    order = contents.get(f"{folder}byteorder", b"little")
    if order not in (b"little", b"big"):
        raise ConversionError(f"the byte order {quoted(bytes(order[:10]))}, expected little or big")
    return read_model_in_parts(bytes(contents[pickles[0]]), storages, "<" if order == b"little" else ">", len(data))


def _contents(data: mmap.mmap, listed: list[zipfile.ZipInfo]) -> dict[str, memoryview]:
    """Name → view of each file in the archive. Names are only looked up, never used as paths.

    Raises:
        ConversionError: one is compressed, listed twice, not where it should be, or shares bytes with another.
    """
    view = memoryview(data)
    contents: dict[str, memoryview] = {}
    end = 0
    for entry in sorted(listed, key=lambda entry: entry.header_offset):
        name = quoted(entry.orig_filename)
        at, start = entry.header_offset, entry.header_offset + _HEADER_BYTES
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            what = f"{name} in the archive is compressed or encrypted, which torch.save never does"
            raise ConversionError(what, "save the checkpoint again")
        if entry.filename != entry.orig_filename or not {"", ".."}.isdisjoint(entry.filename.rstrip("/").split("/")):
            raise ConversionError(f"the archive has the name {name}, which torch.save never writes", _UNTRUSTED)
        if entry.filename in contents:
            raise ConversionError(f"the archive has {name} twice", _UNTRUSTED)
        if at < end:
            raise ConversionError(f"{name} begins at byte {at} of the archive, inside of another file", _UNTRUSTED)
        name_bytes, more_bytes = struct.unpack("<HH", data[start - 4 : start]) if start <= len(data) else (0, 0)
        stored_name = data[start : start + name_bytes].decode("utf-8" if entry.flag_bits & _UTF_8 else "cp437", "replace")
        if data[at : at + 4] != MAGIC or stored_name != entry.filename:
            raise ConversionError(f"{name} is not where the archive says", "download or copy the file again")
        start += name_bytes + more_bytes
        end = start + entry.file_size
        if end > len(data):
            raise ConversionError(f"{name} reaches beyond the end of the archive", "download or copy the file again")
        contents[entry.filename] = view[start:end]
    return contents


def write_zip(file: BinaryIO, tensors: Mapping[str, Tensor], versions: Mapping[str, int]) -> None:
    """Writes what ``torch.save({"model": state_dict}, file)`` would, one tensor at a time; the same input gives the same bytes.

    The state dict is an ``OrderedDict`` whose ``_metadata`` have the version of every module, from which PyTorch's and the official code's
    modules know how old their tensors are.

    Args:
        file: is written from its start on.
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
    mark = _text(MARK) + pickle.NEWTRUE + pickle.SETITEM
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + mark + _text("model") + model + pickle.SETITEM + pickle.STOP


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + value.to_bytes(8, "little")


def _tuple(values: Iterable[int]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE
