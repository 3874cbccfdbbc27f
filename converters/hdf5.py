"""HDF5 files: tensors by name, as views of the file; and the same written, one tensor at a time.

A plain file has a dataset for each tensor, under its official name and in PyTorch's layout. A file of Keras (``.weights.h5``) has groups.
"""

from __future__ import annotations

import dataclasses
import mmap
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import h5py
import numpy as np

from converters.errors import ConversionError, quoted
from converters.tensor import BFLOAT16, Tensor

MAGIC = b"\x89HDF\r\n\x1a\n"
KERAS_VARIABLES = "vars"
"""The group with a layer's variables in a file of Keras."""

_MAX_DATASETS = 100_000


@dataclasses.dataclass(frozen=True)
class Contents:
    """Path → tensor (read-only, in the file's order), and the root's text attributes."""

    tensors: dict[str, np.ndarray]
    attributes: dict[str, str]


def read(data: mmap.mmap) -> Contents:
    """All datasets of a file, as views of ``data``.

    Links are not followed, neither within the file nor out of it, and no filter (compression) is run: such datasets are refused.

    Raises:
        ConversionError: damaged, or a dataset that is compressed, stored elsewhere, or not of numbers.
    """
    tensors: dict[str, np.ndarray] = {}
    try:
        with h5py.File(data, "r") as file:
            attributes = {str(name): value for name, value in file.attrs.items() if isinstance(value, str)}
            _collect(file, data, tensors)
    except ConversionError:
        raise
    except Exception as error:  # h5py raises what it likes for a damaged file: KeyError, RuntimeError, ValueError, OSError, …
        raise ConversionError(f"the HDF5 file is damaged: {error}", "download or copy the file again") from None
    if not tensors:
        raise ConversionError("the HDF5 file has no datasets")
    return Contents(tensors, attributes)


def _collect(file: h5py.File, data: mmap.mmap, tensors: dict[str, np.ndarray]) -> None:
    todo: list[tuple[str, Any]] = [("", file)]
    seen = set()
    while todo:
        path, group = todo.pop()
        for name in group:
            where = f"{path}/{name}" if path else name
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ConversionError(f"{quoted(where)} is a link", "links are not followed; save the file again without them")
            item = group[name]
            place = h5py.h5o.get_info(item.id).addr
            if place in seen:
                raise ConversionError(f"{quoted(where)} is there under two names", "save the file again without links")
            seen.add(place)
            if len(seen) > _MAX_DATASETS:
                raise ConversionError(f"more than {_MAX_DATASETS} groups and datasets")
            if isinstance(item, h5py.Group):
                todo.append((where, item))
            elif isinstance(item, h5py.Dataset):
                tensors[where] = _view(where, item, data)


def _view(name: str, dataset: h5py.Dataset, data: mmap.mmap) -> np.ndarray:
    dtype = dataset.dtype
    if dtype.kind not in "fiub" or dtype.fields or dtype.itemsize > 8:
        raise ConversionError(f"{quoted(name)} has elements of type {dtype}, expected numbers")
    if dataset.shape is None:
        raise ConversionError(f"{quoted(name)} is an empty dataset without a shape")
    if 0 in dataset.shape:
        return np.empty(dataset.shape, dtype)
    offset = dataset.id.get_offset()
    if offset is None or dataset.external or dataset.is_virtual or dataset.chunks or dataset.id.get_create_plist().get_nfilters():
        raise ConversionError(f"{quoted(name)} is compressed, in pieces, or stored in another file", "save it as one plain dataset")
    if offset + dataset.nbytes > len(data):
        raise ConversionError(f"{quoted(name)} reaches beyond the end of the file", "download or copy the file again")
    return np.frombuffer(data, dtype, dataset.size, offset).reshape(dataset.shape)


def write(path: pathlib.Path, tensors: Mapping[str, Tensor], groups: Iterable[str], attributes: Mapping[str, str]) -> None:
    """Writes a file with these datasets, groups (also empty ones) and attributes of the root.

    Raises:
        ConversionError: an element type that HDF5 has not.
        OSError: it cannot be written.
    """
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        for group in groups:
            file.require_group(group)
        for name, tensor in tensors.items():
            if tensor.dtype == BFLOAT16:
                raise ConversionError("HDF5 has no bfloat16", "take --dtype float16, or another format")
            file.create_dataset(name, data=np.asarray(tensor))
