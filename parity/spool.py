"""Whole tensors of a run until they are written or compared: in memory up to a limit, beyond it in a temporary file."""

from __future__ import annotations

import functools
import math
import os
import re
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

KEPT_SHARE = 8
"""A run keeps no more than this part of its memory budget in memory for later; the rest is for the computation itself."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_bytes(text: str) -> int:
    """Reads an amount of memory.

    >>> parse_bytes("6GB"), parse_bytes("1.5 GiB"), parse_bytes("1000000000")
    (6000000000, 1610612736, 1000000000)

    Raises:
        ValueError: the text reads otherwise.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"'{text}' is no amount of memory; expected a number of bytes, or for example 6GB or 500 MiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def peak_bytes() -> int:
    """The most memory that this process has had resident so far."""
    import resource  # no Windows has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def over_budget(budget_bytes: int | None) -> str | None:
    """What is to be said if the process needed more than its budget; None if it did not, or there is none."""
    if budget_bytes is None or (peak := peak_bytes()) <= budget_bytes:
        return None
    return f"needed {peak / 1e9:.2f} GB of memory, more than the budget of {budget_bytes / 1e9:.2f} GB; the results are complete"


def prepare(budget_bytes: int | None) -> None:
    """To be called before TensorFlow is imported: within a budget it runs without oneDNN, whose allocator gives nothing back.

    The environment's own ``TF_ENABLE_ONEDNN_OPTS`` is respected.
    """
    if budget_bytes is not None:
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def raw(array: np.ndarray) -> memoryview:
    """An array's bytes, of any dtype: bfloat16 has no buffer of its own. They are the array's own memory if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class _Place(NamedTuple):
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Spool:
    """Keeps arrays by group and name, as long as anybody has it or one of its groups; a context manager too.

    Args:
        kept_bytes: what may stay in memory; None: everything.
        directory: of the temporary file; None: the system's.
    """

    def __init__(self, kept_bytes: int | None = None, directory: Path | None = None):
        self._left = math.inf if kept_bytes is None else kept_bytes
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 closed by the finalizer
        self.close = weakref.finalize(self, self._file.close)
        self._kept: dict[tuple[str, str], np.ndarray | _Place] = {}
        self._lock = threading.Lock()  # of the file's place

    def write(self, group: str, name: str, array: np.ndarray) -> None:
        """Keeps an array, which must not change where there is no limit."""
        if array.nbytes <= self._left:
            self._left -= array.nbytes
            self._kept[group, name] = array
            return
        with self._lock:
            self._kept[group, name] = _Place(self._file.seek(0, 2), array.dtype, array.shape)
            self._file.write(raw(array))

    def read(self, group: str, name: str) -> np.ndarray:
        """What was written; KeyError if nothing was."""
        kept = self._kept[group, name]
        if isinstance(kept, np.ndarray):
            return kept
        array = np.empty(kept.shape, kept.dtype)
        with self._lock:
            self._file.seek(kept.offset)
            self._file.readinto(raw(array))
        return array

    def keys(self) -> set[tuple[str, str]]:
        """(group, name) of everything."""
        return set(self._kept)

    def group(self, group: str) -> Mapping[str, np.ndarray]:
        """The arrays of one group by name, in the order in which they were written; each is read when it is asked for."""
        return Group([name for of, name in self._kept if of == group], functools.partial(self.read, group))

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Group(Mapping[str, np.ndarray]):
    """Arrays by name, each read when it is asked for, and not kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], np.ndarray]):
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
