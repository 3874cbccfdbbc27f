"""Reads and writes .safetensors files: 8 bytes for the length of a JSON header, the header, the tensors' bytes without a gap.

Tensors are views of the mapped file, and are written one after another. Why not the package ``safetensors``:
docs/decisions/0011-safetensors.md. The format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from converters.errors import ConversionError, quoted
from converters.tensor import Tensor, little_endian

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""The format's name → element type. It also has types of less than 8 bits, of 8-bit floats and of complex numbers."""

_MAX_DIMENSIONS = 32
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_DAMAGED = "the file is truncated or damaged; download or copy it again"


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """Name → tensor in the order of their bytes in the file, read-only views; and the texts that the header has beside them."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_safetensors(data: mmap.mmap | bytes) -> SafetensorsFile:
    """The tensors of a file, as views of ``data``.

    Raises:
        ConversionError: it breaks one of the format's rules, or has elements of another type than ``DTYPES``.
    """
    header, start = _header(data)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ConversionError("the header's __metadata__ is no map from text to text", _DAMAGED)
    view = memoryview(data)
    tensors = {}
    position = 0
    for (begin, end), name, dtype, shape in sorted((_described(name, entry) for name, entry in header.items()), key=lambda line: line[0]):
        if begin != position:
            what = "leaves a hole" if begin > position else "overlaps another tensor"
            raise ConversionError(f"{quoted(name)} {what}: it begins at byte {begin} of the data, expected {position}", _DAMAGED)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ConversionError(f"{quoted(name)} has {end - begin} bytes, expected those of {dtype} {shape}", _DAMAGED)
        if start + end > len(data):
            raise ConversionError(f"{quoted(name)} ends at byte {start + end} of {len(data)}", _DAMAGED)
        tensors[name] = np.frombuffer(view[start + begin : start + end], dtype).reshape(shape)
        position = end
    if start + position != len(data):
        raise ConversionError(f"{len(data) - start - position} bytes follow the last tensor", _DAMAGED)
    return SafetensorsFile(tensors, metadata)


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes ``tensors``, one at a time: larger elements first, so that all are aligned, else in their order.

    Args:
        file: is written from its position on, and never moved back.
        tensors: name → array, or what becomes one when it is written.
        metadata: further text for the header.

    Raises:
        ConversionError: a name, or a type of elements, that the format does not have.
    """
    if _METADATA in tensors:
        raise ConversionError(f"a tensor is called {_METADATA}, which has another meaning in safetensors")
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    position = 0
    for name, tensor in ordered.items():
        if (dtype := tensor.dtype.newbyteorder("<")) not in names:
            raise ConversionError(f"{quoted(name)} has elements of {tensor.dtype}", f"safetensors has {', '.join(map(str, names))}")
        begin, position = position, position + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(tensor.shape), "data_offsets": [begin, position]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ConversionError(f"the names take {len(text)} bytes; safetensors allows {MAX_HEADER_BYTES}")
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in ordered.values():
        file.write(little_endian(tensor))


def _header(data: mmap.mmap | bytes) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the tensors' bytes begin."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER_BYTES):
        what = f"the header has {length} bytes, of {len(data)} in the file; at most {MAX_HEADER_BYTES} are allowed"
        raise ConversionError(what, "the file is truncated, or not of safetensors")
    text = data[8 : 8 + length]
    if text[:1] != b"{":
        raise ConversionError("the header does not begin with {", "the file is damaged, or not of safetensors")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique, parse_float=_no_number, parse_constant=_no_number)
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"the header is no JSON text in UTF-8: {error}", _DAMAGED) from None
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    "".join(text for pair in pairs for text in pair if isinstance(text, str)).encode()  # JSON can escape what is no character
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ConversionError(f"the header has {quoted(twice)} twice", _DAMAGED)
    return found


def _no_number(text: str) -> Any:
    raise ConversionError(f"the header has the number {quoted(text)}, expected whole ones", _DAMAGED)


def _described(name: str, entry: Any) -> tuple[tuple[int, int], str, np.dtype, tuple[int, ...]]:
    """Offsets, name, element type and shape of one tensor."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ConversionError(f"the header's {quoted(name)} has not exactly dtype, shape and data_offsets", _DAMAGED)
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        what = f"{quoted(name)} has elements of {quoted(entry['dtype'])}"
        raise ConversionError(what, f"{', '.join(DTYPES)} are supported; convert it to one of them first")
    for field in ("shape", "data_offsets"):
        if not isinstance(entry[field], list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in entry[field]):
            raise ConversionError(f"{quoted(name)}: its {field} are no list of sizes", _DAMAGED)
    dtype, shape, offsets = DTYPES[entry["dtype"]], tuple(entry["shape"]), tuple(entry["data_offsets"])
    if len(offsets) != 2 or len(shape) > _MAX_DIMENSIONS or math.prod(size or 1 for size in shape) * dtype.itemsize >= 1 << 63:
        raise ConversionError(f"{quoted(name)}: its shape or its data_offsets are impossible", _DAMAGED)
    return offsets, name, dtype, shape
