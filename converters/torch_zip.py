"""Opens what ``torch.save`` writes since PyTorch 1.6: an uncompressed zip archive of a pickle and of the bytes of each storage.

``NAME/data.pkl`` is read by :mod:`converters.unpickle`; ``NAME/data/KEY`` are views of the file. PyTorch is not needed, and nothing is run.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from typing import IO, cast

from converters.errors import ConversionError, quoted
from converters.unpickle import PickledModel, read_model_in_parts

MAGIC = b"PK\x03\x04"
_HEADER_BYTES = 30


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
