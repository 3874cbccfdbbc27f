"""Synthetic checkpoints: files in the official layout, from a name and a seed, with the same bytes on every platform.

Each tensor is drawn on its own from NumPy's raw Philox stream, keyed by the tensor's name and the seed. 32 random bits become an odd
integer of 24 bits, exact in float32; a correctly rounded multiplication and addition turn it into ``offset + gain · u``, u uniform in
(−1, 1). No other floating-point operation is used, so no library version, thread count or instruction set can change a bit.

Swin's ``relative_position_index`` is no weight: it follows from the size of the window, and is computed.

``gain`` and ``offset`` come from a recipe (``recipes/<entry>.json``), which ``parity.calibrate`` made with the official model on the
photographs in ``photos/``; what it aims at is written in ``docs/decisions/0005-synthetic-checkpoints.md``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import io
import json
import math
import os
import pathlib
import pickle
import struct
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints import registry

AUTHOR = "tfmaskformer synthetic weights"
"""The file's ``__author__``, which Detectron2 prints when it loads a zoo file."""

TRAINED_AUTHOR = "tfmaskformer trained weights"
"""The ``__author__`` of the checkpoints in ``small/``."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """How a tensor is drawn: ``offset + gain · u``.

    ``centred``: u sums to 0 over the input channels (axis 1), up to rounding, so that the mean which ReLUs leave in every channel is not
    passed on; without it a deep random network tells images apart less and less. ``replace``: elements that are set afterwards (flat index,
    negative from the end → value).
    """

    gain: float
    offset: float = 0.0
    centred: bool = False
    replace: Mapping[int, float] = dataclasses.field(default_factory=dict)


Recipe = Mapping[str, Draw]
"""v2 key → how its tensor is drawn."""


@functools.cache
def recipe(name: str) -> Recipe:
    """The committed recipe of the entry called ``name``.

    Raises:
        registry.ZooError: there is none.
    """
    file = importlib.resources.files("checkpoints") / "recipes" / f"{name}.json"
    if not file.is_file():
        raise registry.ZooError(f"no recipe for '{name}'\n  make one with the official code: python -m parity.calibrate {name}")
    tensors = json.loads(file.read_text(encoding="utf-8"))["tensors"]
    return {
        key: Draw(gain, offset, "centred" in options, {int(index): value for index, value in options.get("replace", {}).items()})
        for key, gain, offset, options in tensors
    }


def bits(name: str, seed: int, size: int) -> np.ndarray:
    """int32 [size]: odd integers, uniform in (−2²³, 2²³), the same on every platform.

    >>> bits("backbone.stem.conv1.weight", 0, 3).tolist()
    [4201937, 5885533, -5571591]
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw((size + 1) // 2).astype("<u8", copy=False).view("<u4")[:size]
    return ((words >> np.uint32(8)) | np.uint32(1)).astype(np.int32) - np.int32(2**23)


def draw(name: str, spec: registry.TensorSpec, how: Draw, seed: int) -> np.ndarray:
    """The tensor ``name`` of ``spec``'s shape and dtype: float32, or int64 for ``relative_position_index``."""
    if name.endswith(".relative_position_index"):
        return registry.relative_position_index(math.isqrt(spec.shape[0]))
    integers = bits(name, seed, spec.size).reshape(spec.shape)
    if how.centred:
        integers -= (integers.sum(axis=1, keepdims=True, dtype=np.int64) // spec.shape[1]).astype(np.int32)
    values = integers.astype(np.float32)
    values *= np.float32(2**-23)
    values *= np.float32(how.gain)
    values += np.float32(how.offset)
    for index, value in how.replace.items():
        values.flat[index] = np.float32(value)
    return values


def synthesize(of: registry.Entry, seed: int = 0, with_recipe: Recipe | None = None) -> dict[str, np.ndarray]:
    """All tensors of an entry by v2 key, in the official order.

    Args:
        of: an entry of the zoo, or a test model (``registry.entry("tiny_panoptic")``).
        seed: 0 or above; the committed recipes were calibrated and checked with 0.
        with_recipe: instead of the committed one.

    Raises:
        registry.ZooError: no recipe, or one that does not have exactly the layout's tensors; a negative seed.
    """
    if seed < 0:
        raise registry.ZooError(f"seed is {seed}, expected 0 or above")
    how = recipe(of.name) if with_recipe is None else with_recipe
    specs = registry.layout(of)
    if how.keys() != specs.keys():
        names = sorted(how.keys() ^ specs.keys())
        raise registry.ZooError(f"the recipe of '{of.name}' does not fit its layout: {', '.join(names[:5])} ({len(names)} tensors)")
    return {key: draw(key, spec, how[key], seed) for key, spec in specs.items()}


def write_pickle(tensors: Mapping[str, np.ndarray], destination: pathlib.Path, author: str = AUTHOR) -> None:
    """Writes ``{"model": {v1 key: array}, "__author__": author}``, the structure of Detectron2's zoo files, as a pickle of protocol 3.

    ``tensors`` have v2 keys. A plain pickle carries no version, so the official loader expects v1 names in it.
    The opcodes are written here rather than by ``pickle``, whose stream depends on the versions of Python and NumPy. NumPy 1's names
    are used, as in the official files; NumPy 2 reads them too. The file appears whole or not at all.

    Raises:
        OSError: ``destination`` cannot be written.
    """
    descriptor, beside = tempfile.mkstemp(prefix=f".{destination.name}.", dir=destination.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write_pickle_to(file, tensors, author)
            os.fchmod(descriptor, 0o666 & ~_umask())
        os.replace(beside, destination)
    except BaseException:
        pathlib.Path(beside).unlink(missing_ok=True)
        raise


def pickle_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The bytes that :func:`write_pickle` writes."""
    buffer = io.BytesIO()
    write_pickle_to(buffer, tensors, AUTHOR)
    return buffer.getvalue()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


PICKLE_HEAD = b"\x80\x03cnumpy.core.multiarray\n_reconstruct\nq\x000"
"""What a pickle written here begins with; ``pickle`` never does: it pops nothing that it has just memoised."""

# Memo slots of what every array needs again.
_RECONSTRUCT, _NDARRAY, _DTYPE = (bytes([slot]) for slot in range(3))
_DTYPES = {code: bytes([slot]) for slot, code in enumerate(("f4", "i8", "f2"), 3)}


def _code(dtype: np.dtype) -> str:
    return dtype.str.lstrip("<>|=")


def write_pickle_to(file: io.BufferedIOBase, tensors: Mapping[str, Any], author: str) -> None:
    """As :func:`write_pickle`, to an open file. A tensor has a shape and a dtype, and becomes an array when it is its turn."""
    put, get = pickle.BINPUT, pickle.BINGET
    # The shared objects, memoised and popped again.
    head = pickle.PROTO + b"\x03"
    for module, name, slot in (
        (b"numpy.core.multiarray", b"_reconstruct", _RECONSTRUCT),
        (b"numpy", b"ndarray", _NDARRAY),
        (b"numpy", b"dtype", _DTYPE),
    ):
        head += pickle.GLOBAL + module + b"\n" + name + b"\n" + put + slot + pickle.POP
    state = _integer(3) + _text("<") + 3 * pickle.NONE + 2 * _integer(-1) + _integer(0)
    codes = {"f4"} | {_code(tensor.dtype) for tensor in tensors.values()}
    dtypes = {code: slot for code, slot in _DTYPES.items() if code in codes}
    for code, slot in dtypes.items():
        head += get + _DTYPE + _text(code) + pickle.NEWFALSE + pickle.NEWTRUE + pickle.TUPLE3 + pickle.REDUCE + put + slot
        head += pickle.MARK + state + pickle.TUPLE + pickle.BUILD + pickle.POP
    file.write(head + pickle.EMPTY_DICT + pickle.MARK + _text("model") + pickle.EMPTY_DICT + pickle.MARK)
    for key, tensor in tensors.items():
        code = _code(tensor.dtype)
        empty = (
            get
            + _RECONSTRUCT
            + get
            + _NDARRAY
            + _integer(0)
            + pickle.TUPLE1
            + pickle.SHORT_BINBYTES
            + b"\x01b"
            + pickle.TUPLE3
            + pickle.REDUCE
        )
        shape = pickle.MARK + b"".join(_integer(dimension) for dimension in tensor.shape) + pickle.TUPLE
        file.write(_text(registry.v1_key(key)) + empty + pickle.MARK + _integer(1) + shape + get + dtypes[code] + pickle.NEWFALSE)
        file.write(pickle.BINBYTES + struct.pack("<I", tensor.nbytes))
        file.write(np.ascontiguousarray(tensor, f"<{code}").data)
        file.write(pickle.TUPLE + pickle.BUILD)
    file.write(pickle.SETITEMS + _text("__author__") + _text(author) + pickle.SETITEMS + pickle.STOP)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)
