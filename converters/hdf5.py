"""HDF5 files: tensors by name, as views of the file; and the same written, one tensor at a time.

A plain file has a dataset for each tensor, under its official name and in PyTorch's layout. A file of Keras (``.weights.h5``) has groups.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import mmap
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import h5py
import numpy as np

from converters import hdf5_listing, unpickle
from converters.errors import ConversionError, printable, quoted
from converters.tensor import Tensor

MAGIC = b"\x89HDF\r\n\x1a\n"
KERAS_VARIABLES = "vars"
"""The group with a layer's variables in a file of Keras."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """Path → tensor (read-only, in the file's order), and the root's text attributes."""

    tensors: dict[str, np.ndarray]
    attributes: dict[str, str]


def read(path: pathlib.Path, data: mmap.mmap, own: bool = False) -> Contents:
    """All datasets of the file ``path``, as views of ``data``, which are its bytes.

    A process of its own lists them, unless the file is our ``own``, just written.

    Raises:
        ConversionError: damaged, or a dataset that is a link, compressed, stored elsewhere, or not of numbers.
    """
    listed = hdf5_listing.listing(str(path)) if own else _listed(path)
    tensors = {name: _view(name, dtype, shape, offset, data) for name, dtype, shape, offset in listed["tensors"]}
    if not tensors:
        raise ConversionError("the HDF5 file has no datasets")
    return Contents(tensors, listed["attributes"])


def _listed(path: pathlib.Path) -> dict[str, Any]:
    # -I takes nothing from the environment or the current folder; where to find h5py it is told, for it may be from PYTHONPATH or ~/.local.
    places = [place for place in sys.path if os.path.isabs(place)]
    script = f"import runpy, sys; sys.path[:] = {places!r}; runpy.run_path({hdf5_listing.__file__!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", script, str(path.absolute())], capture_output=True, check=False)
    if done.returncode == 1:  # an exception of Python before the file was opened
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["it ended with 1"])[-1]
        raise ConversionError(f"the HDF5 file cannot be listed: {printable(last)}", f"try: {sys.executable} -c 'import h5py'")
    if done.returncode:
        how = "it took too long" if done.returncode == -signal.SIGXCPU else f"the library that reads it ended with {done.returncode}"
        raise ConversionError(f"the HDF5 file is damaged: {how}", "download or copy the file again")
    listed = json.loads(done.stdout)
    if "error" in listed:
        raise ConversionError(*listed["error"])
    return listed


def _view(name: str, dtype_name: str, shape: list[int] | None, offset: int | None, data: mmap.mmap | bytes) -> np.ndarray:
    if dtype_name[1:] not in unpickle.DTYPES:
        raise ConversionError(f"{quoted(name)} has elements of type {quoted(dtype_name)}, expected numbers")
    if shape is None:
        raise ConversionError(f"{quoted(name)} is an empty dataset without a shape")
    dtype, size = np.dtype(dtype_name), math.prod(shape)
    if size == 0:
        return np.frombuffer(b"", dtype).reshape(shape)
    if offset is None:
        raise ConversionError(f"{quoted(name)} is compressed, in pieces, or stored in another file", "save it as one plain dataset")
    if offset + size * dtype.itemsize > len(data):
        raise ConversionError(f"{quoted(name)} reaches beyond the end of the file", "download or copy the file again")
    return np.frombuffer(data, dtype, size, offset).reshape(shape)


def write(path: pathlib.Path, tensors: Mapping[str, Tensor], groups: Iterable[str], attributes: Mapping[str, str]) -> None:
    """Writes a file with these datasets, groups (also empty ones) and attributes of the root.

    Raises:
        OSError: it cannot be written.
    """
    failure = None
    try:
        with h5py.File(path, "w") as file:
            file.attrs.update(attributes)
            for group in groups:
                file.require_group(group)
            for name, tensor in tensors.items():
                array = np.asarray(tensor)
                try:
                    file.create_dataset(name, data=array)
                except (OSError, RuntimeError) as error:
                    failure = error
                    break
    except (OSError, RuntimeError) as error:  # closing a file that could not be written fails once more
        failure = failure or error
    if failure is not None:
        # HDF5 tells the system's error within its own text.
        number = re.search(r"errno = (\d+)", str(failure))
        code = int(number[1]) if number else getattr(failure, "errno", None) or errno.EIO
        raise OSError(code, os.strerror(code)) from None
