"""Reads the tensors of a pickled checkpoint without Python's ``pickle``: a pickle is a program, and here none is run.

A pickle is a sequence of opcodes for a small stack machine. This module is such a machine with everything left out that could
do harm: there is no import, no attribute lookup and no call. The few names that files with NumPy arrays need (``ALLOWED``) are
looked up in a table and stand for functions of this module, which check their arguments and only describe an array. All others
are refused by name. Dictionary keys are text or small integers, so that nothing is hashed that could be nested, no memory is allocated
from a number in the file (payloads are views of the file's own bytes), and nothing that the file says once is copied more than once.

Reads protocols 0 to 5, Python 2 strings (latin-1) and the module names of NumPy 1 and 2. Why not a restricted
``pickle.Unpickler``: docs/decisions/0002-reading-pickles.md. Opcodes: CPython ``Lib/pickletools.py``.
"""

from __future__ import annotations

import codecs
import dataclasses
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np

from converters.errors import ConversionError, quoted

DTYPES = {name: np.dtype(name) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")}
"""The element types that an array may have: numbers and booleans, never objects, records or strings."""
DTYPES |= {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

MAX_DIMENSIONS = 32
MAX_ELEMENTS = 1 << 48
MAX_OPERATIONS = 10_000_000
"""Of one pickle. A checkpoint of MaskFormer with the state of its optimizer has 200 000."""

ByteOrder = Literal["<", ">", "=", "|"]

_UNTRUSTED = "checkpoints hold arrays, tensors and text only; do not open this file with other tools unless you trust its source"


@dataclasses.dataclass(frozen=True)
class PickledModel:
    """What a pickle holds.

    Attributes:
        tensors: name → tensor, in the order of the file.
        author: the ``__author__`` that Detectron2 writes beside them, empty where there is none.
        others: keys of what else there is beside the model: "optimizer", "scheduler", "iteration", …
    """

    tensors: dict[str, np.ndarray]
    author: str
    others: tuple[str, ...]


def read_model(data: bytes | mmap.mmap) -> PickledModel:
    """The tensors of a pickled checkpoint: ``{"model": {name: tensor}, …}`` as Detectron2 writes it, or the inner dict alone.

    Reads what ``pickle.dump`` writes, with arrays of NumPy or tensors of PyTorch, and what ``torch.save`` wrote before PyTorch 1.6. The
    arrays are read-only views of ``data`` (for text-encoded arrays of protocols 0 to 2: of one decoded copy).

    Raises:
        ConversionError: not a pickle, truncated, outside of what such a file may contain, or not a dict of tensors.
    """
    if _starts_with_magic(data):
        return _model(*_torch_sequence(data, memoryview(data)), len(data))
    machine = _Machine(data)
    root = machine.run()
    if machine.end != len(data):
        raise ConversionError(
            f"{len(data) - machine.end} bytes follow the end of the pickle at byte {machine.end}",
            "the file is damaged, or several files in one; download or copy it again",
        )
    return _model(root, {}, len(data))


def read_model_in_parts(data: bytes, storages: Mapping[str, memoryview], byte_order: ByteOrder, total_bytes: int) -> PickledModel:
    """As :func:`read_model`, where the bytes of PyTorch's storages lie elsewhere.

    Args:
        data: the pickle.
        storages: key of each storage → its bytes.
        byte_order: of the storages, "<" or ">".
        total_bytes: of all parts; the tensors may not be larger.
    """
    machine = _Machine(data, storage_keys=True)
    root = machine.run()
    return _model(root, {key: _Bytes(view, byte_order) for key, view in storages.items()}, total_bytes)


def _model(root: Any, storages: Mapping[str, _Bytes], total_bytes: int) -> PickledModel:
    if not isinstance(root, dict):
        raise ConversionError(f"the pickle holds {_kind(root)}, expected a dict of arrays, or one under the key 'model'")
    model = root.get("model", root)
    if not isinstance(model, dict) or not model:
        raise ConversionError(f"the pickle's 'model' is {_kind(model)}, expected a dict of arrays that is not empty")
    wrong = [name for name, value in model.items() if not isinstance(name, str) or not isinstance(value, _Array | _Tensor)]
    if wrong:
        lines = [f"{quoted(name)} is {_kind(model[name])}" for name in wrong[:10] if isinstance(name, str)]
        lines += [f"the key {name}, expected a name" for name in wrong[:10] if not isinstance(name, str)]
        more = [f"… and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ConversionError("the pickle's 'model' must hold arrays only", *lines, *more)
    tensors = {name: value.ndarray() if isinstance(value, _Array) else value.ndarray(name, storages) for name, value in model.items()}
    tensor_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if tensor_bytes > total_bytes:
        raise ConversionError(f"the tensors ({tensor_bytes} bytes) are larger than the file ({total_bytes} bytes): they share their data")
    author = root.get("__author__", "")
    others = tuple(str(key) for key in root if key != "model" and not str(key).startswith("__")) if "model" in root else ()
    return PickledModel(tensors, _text(author) if isinstance(author, str | memoryview) else "", others)


class _Dtype:
    """``numpy.dtype(name)``, then its pickled state, which tells the byte order."""

    def __init__(self, name: str):
        self.name = name
        self.byte_order: ByteOrder = "="

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (8, 9) or any(part is not None for part in state[2:5]):
            raise _RefusedError("a dtype with fields, a sub-array or an unknown state")
        byte_order = _text(state[1])
        if byte_order not in ("<", ">", "|", "=") or (byte_order == ">" and self.name == "bfloat16"):
            raise _RefusedError(f"the byte order {quoted(byte_order)}")
        self.byte_order = cast(ByteOrder, byte_order)

    def numpy(self) -> np.dtype:
        return DTYPES[self.name].newbyteorder(self.byte_order)


class _Array:
    """An array described by a pickle: a dtype, a shape, an order and the bytes."""

    def __init__(self) -> None:
        self._parts: tuple[_Dtype, tuple[int, ...], Literal["C", "F"], memoryview] | None = None

    def build(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5 and state[0] in (0, 1):
            state = state[1:]
        if not isinstance(state, tuple) or len(state) != 4:
            raise _RefusedError("an array with an unknown state")
        shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: str) -> None:
        if self._parts is not None:
            raise _RefusedError("an array that is filled twice")
        if not isinstance(dtype, _Dtype):
            raise _RefusedError("an array without a dtype")
        if not _are_sizes(shape) or order not in ("C", "F"):
            raise _RefusedError("an array whose shape is not a short tuple of sizes, or in an unknown order")
        if not isinstance(data, memoryview):
            raise _RefusedError(f"an array whose data is {_kind(data)} instead of bytes")
        expected_bytes = math.prod(shape) * dtype.numpy().itemsize
        if len(data) != expected_bytes:
            raise _RefusedError(f"an array of shape {shape} and dtype {dtype.name} with {len(data)} bytes instead of {expected_bytes}")
        self._parts = dtype, shape, cast(Literal["C", "F"], order), data

    def ndarray(self) -> np.ndarray:
        if self._parts is None:
            raise ConversionError("the pickle holds an array without data")
        dtype, shape, order, data = self._parts
        return np.frombuffer(data, dtype.numpy()).reshape(shape, order=order)


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """The bytes of a storage, "<" or ">" for their order."""

    view: memoryview
    byte_order: ByteOrder


class _Storage:
    """PyTorch's storage: a flat array, known by a key until its bytes are found, or with its bytes."""

    def __init__(self, element: _StorageType, key: str, count: int, found: _Bytes | None = None):
        self.element = element
        self.key = key
        self.count = count
        self.found = found


class _Tensor:
    """PyTorch's tensor: a window of a storage."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any):
        if not isinstance(storage, _Storage):
            raise _RefusedError(f"a tensor whose storage is {_kind(storage)}")
        if not _are_sizes(shape) or type(strides) is not tuple or len(strides) != len(shape) or not all(map(_is_size, (offset, *strides))):
            raise _RefusedError("a tensor whose offset, shape or strides are not whole numbers that belong together")
        count = math.prod(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if count else 0
        if count > storage.count or (count and last >= storage.count):
            raise _RefusedError(f"a tensor of shape {shape} beyond the {storage.count} elements of its storage")
        self._storage, self._offset, self._shape, self._strides = storage, offset, shape, strides

    def ndarray(self, name: str, storages: Mapping[str, _Bytes]) -> np.ndarray:
        storage = self._storage
        found = storage.found or storages.get(storage.key)
        if found is None:
            raise ConversionError(f"{quoted(name)}: the file has no storage {quoted(storage.key)}", "the file is damaged; copy it again")
        dtype = storage.element.dtype.newbyteorder(found.byte_order)
        if dtype.kind == "V" and dtype != storage.element.dtype:
            what = f"{quoted(name)} has elements of {storage.element.dtype} with their bytes swapped, which are not supported"
            raise ConversionError(what, "in PyTorch: tensor.float()")
        if len(found.view) != storage.count * dtype.itemsize:
            what = f"{quoted(name)}: its storage has {len(found.view)} bytes, expected {storage.count} elements of {dtype.name}"
            raise ConversionError(what, "the file is damaged; copy it again")
        flat = np.frombuffer(found.view, dtype)
        strides = tuple(stride * dtype.itemsize for stride in self._strides)
        if not math.prod(self._shape):
            return np.empty(self._shape, dtype)
        return np.lib.stride_tricks.as_strided(flat[self._offset :], self._shape, strides, writeable=False)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_ELEMENTS


def _are_sizes(shape: Any) -> bool:
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        return False
    return math.prod(size or 1 for size in shape) < MAX_ELEMENTS


class _RefusedError(Exception):
    """Something that the file must not contain; the machine adds where."""


class _Global:
    """An allowed name: stands for one of the functions below, and is nothing that Python could call by accident."""

    def __init__(self, name: str, call: Callable[..., Any]):
        self.name = name
        self.call = call


class _StorageType(_Global):
    """``torch.FloatStorage`` and the like, which stand for an element type."""

    def __init__(self, name: str, dtype: np.dtype):
        super().__init__(name, _not_callable)
        self.dtype = dtype


def _dtype(machine: _Machine, name: Any, align: Any = False, copy: Any = False) -> _Dtype:
    name = "bfloat16" if name is ALLOWED["ml_dtypes.bfloat16"] else _text(name)
    if name not in DTYPES:
        raise _RefusedError(f"the dtype {quoted(name)}; allowed are {', '.join(sorted(DTYPES))}")
    return _Dtype(name)


def _reconstruct(machine: _Machine, cls: Any, shape: Any, kind: Any) -> _Array:
    if not isinstance(cls, _Global) or cls.name != "numpy.ndarray" or shape != (0,) or _text(kind) != "b":
        raise _RefusedError("a numpy _reconstruct with other arguments than (numpy.ndarray, (0,), 'b')")
    return _Array()


def _frombuffer(machine: _Machine, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(data, dtype, shape, _text(order))
    return array


def _scalar(machine: _Machine, dtype: Any, data: Any) -> _Array:
    array = _Array()
    array.fill(data, dtype, (), "C")
    return array


def _encode(machine: _Machine, text: Any, encoding: Any) -> memoryview:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError("a _codecs.encode of something else than text to latin1")
    machine.charge(len(text))  # a pickle can name one text many times
    return memoryview(text.encode("latin1"))


def _empty_bytes(machine: _Machine) -> memoryview:
    return memoryview(b"")


def _ordered_dict(machine: _Machine, items: Any = ()) -> dict[str | int, Any]:
    machine.charge(len(items))
    return {machine.key(key): value for key, value in items}


def _counter(machine: _Machine, counts: Any) -> dict[str | int, Any]:
    if type(counts) is not dict:
        raise _RefusedError(f"a Counter of {_kind(counts)}")
    return counts


def _default_dict(machine: _Machine, default: Any = None) -> dict[str | int, Any]:
    if default is not None and (not isinstance(default, _Global) or default.call is not _not_callable):
        raise _RefusedError(f"a defaultdict whose default is {_kind(default)}")
    return {}


def _rebuild_tensor(
    machine: _Machine, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(machine: _Machine, tensor: Any, requires_grad: Any, hooks: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise _RefusedError(f"a parameter that is {_kind(tensor)}")
    return tensor


def _load_storage(machine: _Machine, data: Any) -> _Storage:
    """A storage inside a plain pickle: the bytes that ``torch.save`` would write of it to a file of its own, in its old format."""
    if machine.storage_keys or not isinstance(data, memoryview):
        raise _RefusedError("a torch storage inside of another, or without bytes")
    return machine.once(_lone_storage, data)


def _lone_storage(data: memoryview) -> _Storage:
    try:
        root, storages = _torch_sequence(bytes(data[:_STORAGE_HEADER_BYTES]), data)
    except ConversionError as error:
        raise _RefusedError(f"a torch storage that cannot be read ({error})") from None
    if not isinstance(root, _Storage) or root.key not in storages:
        raise _RefusedError("a torch storage that is none")
    return _Storage(root.element, root.key, root.count, storages[root.key])


def _not_callable(machine: _Machine, *args: Any) -> Any:
    raise _RefusedError("a call of a class, which is only known by name")


_CALLS: dict[Callable[..., Any], tuple[str, ...]] = {
    _reconstruct: ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    _scalar: ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    _frombuffer: ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
    _not_callable: (
        "numpy.ndarray",
        "ml_dtypes.bfloat16",
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "int", "long", "float")),
    ),
    _dtype: ("numpy.dtype",),
    _encode: ("_codecs.encode",),
    _empty_bytes: ("builtins.bytes", "__builtin__.bytes"),
    _ordered_dict: ("collections.OrderedDict",),
    _counter: ("collections.Counter",),
    _default_dict: ("collections.defaultdict",),
    _rebuild_tensor: ("torch._utils._rebuild_tensor_v2",),
    _rebuild_parameter: ("torch._utils._rebuild_parameter",),
    _load_storage: ("torch.storage._load_from_bytes",),
}

STORAGE_DTYPES = {
    f"{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Float": "f4",
        "Double": "f8",
        "Half": "f2",
        "BFloat16": ml_dtypes.bfloat16,
        "Long": "i8",
        "Int": "i4",
        "Short": "i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "b1",
    }.items()
}
"""PyTorch's types of storages → their elements."""

ALLOWED = {name: _Global(name, call) for call, names in _CALLS.items() for name in names}
"""Every global that a pickle may name."""
ALLOWED |= {f"torch.{name}": _StorageType(f"torch.{name}", dtype) for name, dtype in STORAGE_DTYPES.items()}


def _text(value: Any) -> str:
    """Text, also where Python 2 wrote a byte string."""
    if isinstance(value, memoryview):
        return bytes(value).decode("latin1")
    if not isinstance(value, str):
        raise _RefusedError(f"{_kind(value)} where text is expected")
    return value


def _kind(value: Any) -> str:
    """What ``value`` is, in words that never look into it."""
    names = {dict: "a dict", list: "a list", tuple: "a tuple", str: "text", memoryview: "bytes", type(None): "None", _Array: "an array"}
    names |= {_Tensor: "a tensor", _Storage: "a storage"}
    return names.get(type(value), type(value).__name__.lstrip("_").lower())


class _Machine:
    """Runs the opcodes of one pickle, from byte ``start``; see the module's docstring. ``storage_keys``: whether it names storages."""

    def __init__(self, data: bytes | mmap.mmap, start: int = 0, storage_keys: bool = False):
        self._data = data
        self._view = memoryview(data)
        self._at = start
        self.storage_keys = storage_keys
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._charged = 0
        self._once: dict[tuple[int, Callable[[memoryview], Any]], tuple[memoryview, Any]] = {}

    def run(self) -> Any:
        """The object that the pickle describes."""
        data, operations = self._data, _OPERATIONS
        start = 0
        try:
            for _ in range(MAX_OPERATIONS):
                start = self._at
                if start >= len(data):
                    raise _TruncatedError
                operation = operations.get(data[start])
                self._at = start + 1
                if operation is None:
                    raise _RefusedError(_REFUSED_OPCODES.get(data[start], f"the unknown opcode {data[start : start + 1]!r}"))
                if operation is _Machine._stop:
                    break
                operation(self)
            else:
                raise _RefusedError(f"more than {MAX_OPERATIONS} operations")
            root = self._stack.pop()
        except _TruncatedError:
            raise ConversionError(
                f"the pickle is truncated: it ends inside the operation at byte {start} of {len(data)}",
                "download or copy the file again",
            ) from None
        except _RefusedError as error:
            raise ConversionError(f"the pickle contains {error}, at byte {start}", _UNTRUSTED) from None
        except (IndexError, KeyError, ValueError, TypeError, OverflowError, struct.error) as error:
            raise ConversionError(
                f"the pickle is malformed at byte {start} of {len(data)}: {type(error).__name__}",
                "the file is damaged, or no checkpoint; download or copy it again",
            ) from None
        return root

    @property
    def end(self) -> int:
        """Where the pickle ended."""
        return self._at

    def charge(self, count: int) -> None:
        """Counts bytes or items that are copied, which may be no more than the pickle has bytes: it can name one of them many times."""
        self._charged += count
        if self._charged > len(self._data):
            raise _RefusedError("copies of more than it has")

    def once(self, read: Callable[[memoryview], Any], data: memoryview) -> Any:
        """``read(data)``, the same object whenever the pickle names the same ``data`` again."""
        key = id(data), read
        if key not in self._once:
            self._once[key] = data, read(data)  # with the data, so that no others get their id
        return self._once[key][1]

    def key(self, value: Any) -> str | int:
        """Text, or an integer as in the state of an optimizer."""
        if type(value) is int and abs(value) < 1 << 32:
            return value
        if not isinstance(value, str | memoryview):
            raise _RefusedError(f"a dict key that is {_kind(value)}; keys must be text or small integers")
        return self._text_once(value)

    def _text_once(self, value: Any) -> str:
        return self.once(_text, value) if isinstance(value, memoryview) else _text(value)

    def _take(self, count: int) -> memoryview:
        start, end = self._at, self._at + count
        if end > len(self._data):
            raise _TruncatedError
        self._at = end
        return self._view[start:end]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise _TruncatedError
        line = self._data[self._at : end]
        self._at = end + 1
        return line

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    # Opcodes, in the order of the pickle documentation: frame, constants, containers, memo, names and calls.

    def _stop(self) -> None:
        """Never called: the loop ends at this opcode."""

    def _proto(self) -> None:
        if (protocol := self._number(1)) > 5:
            raise _RefusedError(f"protocol {protocol}; 0 to 5 are known")

    def _frame(self) -> None:
        self._take(8)

    def _int(self) -> None:
        line = self._line()
        self._stack.append({b"00": False, b"01": True}.get(line) if line in (b"00", b"01") else int(line))

    def _long(self) -> None:
        self._stack.append(int(self._line().rstrip(b"L")))

    def _binint(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def _long1(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(1)), "little", signed=True))

    def _float(self) -> None:
        self._stack.append(float(self._line()))

    def _binfloat(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _string(self) -> None:
        line = self._line().strip()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise _RefusedError("a string without quotes")
        self._stack.append(memoryview(codecs.escape_decode(line[1:-1])[0]))

    def _unicode(self) -> None:
        text = self._line().decode("raw-unicode-escape")
        text.encode()  # raises for half a surrogate, which no file or terminal would take as a name
        self._stack.append(text)

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _tuple(self) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def _last_as_tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _list(self) -> None:
        items = self._pop_mark()
        self._stack.append(items)

    def _dict(self) -> None:
        items = self._pop_mark()
        self._stack.append({})
        self._set(items)

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise _RefusedError(f"an append to {_kind(target)}")
        target.extend(items)

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self) -> None:
        self._set(self._pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise _RefusedError(f"an item set on {_kind(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            name = self.key(key)
            if name in target:
                raise _RefusedError(f"the key {quoted(name)} twice")
            target[name] = value

    def _memoize(self, index: int | None = None) -> None:
        index = len(self._memo) if index is None else index
        if not 0 <= index < 1 << 32:  # larger ones can be chosen so that all have the same hash
            raise _RefusedError(f"the memo index {quoted(index)}")
        self._memo[index] = self._stack[-1]

    def _global(self) -> None:
        module, name = self._line().decode("latin1"), self._line().decode("latin1")
        self._push_global(module, name)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_global(_text(module), _text(name))

    def _push_global(self, module: str, name: str) -> None:
        full_name = f"{module}.{name}"
        if full_name not in ALLOWED:
            raise _RefusedError(f"the global {quoted(full_name)}, which is not on the allow list")
        self._stack.append(ALLOWED[full_name])

    def _persistent_id(self) -> None:
        """PyTorch's way to name a storage: ("storage", its type, its key, a device, its length[, None])."""
        name = self._stack.pop()
        if not self.storage_keys:
            raise _RefusedError("a persistent id")
        if not isinstance(name, tuple) or len(name) not in (5, 6) or _text(name[0]) != "storage" or name[5:] not in ((), (None,)):
            raise _RefusedError("a persistent id that is no storage of its own")
        if not isinstance(name[1], _StorageType) or type(name[4]) is not int or name[4] < 0:
            raise _RefusedError("a storage of an unknown type or size")
        storage = _Storage(name[1], self._text_once(name[2]), name[4])
        self.storages[storage.key] = storage
        self._stack.append(storage)

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise _RefusedError(f"a call of {_kind(function)}")
        self._stack.append(function.call(self, *arguments))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, _Array | _Dtype):
            target.build(state)
        elif type(target) is not dict or type(state) is not dict:  # the attributes of an OrderedDict (torch's _metadata) are not needed
            raise _RefusedError(f"a state set on {_kind(target)}")


_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What ``torch.save`` began a file with before PyTorch 1.6."""
_STORAGE_HEADER_BYTES = 4096
"""Of the pickles in front of a lone storage's bytes there are about 400."""


def _starts_with_magic(data: bytes | mmap.mmap) -> bool:
    return data[:14] == b"\x80\x02\x8a\n" + _MAGIC.to_bytes(10, "little")


def _torch_sequence(header: bytes | mmap.mmap, data: memoryview) -> tuple[Any, dict[str, _Bytes]]:
    """What ``torch.save`` wrote before PyTorch 1.6: five pickles, then for each storage its length and its bytes.

    Args:
        header: the bytes of the five pickles, at least.
        data: all bytes.

    Returns:
        The object, and the bytes of its storages.
    """
    machines: list[_Machine] = []
    roots = []
    for index in range(5):
        machines.append(_Machine(header, machines[-1].end if machines else 0, storage_keys=index == 3))
        roots.append(machines[-1].run())
    magic, protocol, system, root, keys = roots
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
        raise ConversionError("the file begins like one of torch.save, but is none")
    byte_order: ByteOrder = "<" if system.get("little_endian", True) is True else ">"
    known, at, storages = machines[3].storages, machines[4].end, {}
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in known for key in keys):
        raise ConversionError("the list of storages names others than the tensors do", "the file is damaged; copy it again")
    for key in keys:
        count = int.from_bytes(data[at : at + 8], "little" if byte_order == "<" else "big")
        start, at = at + 8, at + 8 + count * known[key].element.dtype.itemsize
        if count != known[key].count or at > len(data):
            what = f"the storage {quoted(key)} has {known[key].count} elements, but {count} follow at byte {start} of {len(data)}"
            raise ConversionError(what, "the file is truncated or damaged; copy it again")
        storages[key] = _Bytes(data[start:at], byte_order)
    if at != len(data):
        raise ConversionError(f"{len(data) - at} bytes follow the last storage", "the file is damaged; copy it again")
    return root, storages


class _TruncatedError(Exception):
    """The data end inside an operation."""


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine._stack.append(value)


def _sized_number(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine._stack.append(machine._number(size))


def _sized_bytes(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine._stack.append(machine._take(machine._number(size)))


def _sized_text(size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine._stack.append(str(machine._take(machine._number(size)), "utf-8"))


_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    ord(opcode): operation
    for opcode, operation in {
        "\x80": _Machine._proto,
        "\x95": _Machine._frame,
        ".": _Machine._stop,
        "N": _constant(None),
        "\x88": _constant(True),
        "\x89": _constant(False),
        "I": _Machine._int,
        "L": _Machine._long,
        "J": _Machine._binint,
        "K": _sized_number(1),
        "M": _sized_number(2),
        "\x8a": _Machine._long1,
        "F": _Machine._float,
        "G": _Machine._binfloat,
        "S": _Machine._string,
        "T": _sized_bytes(4),
        "U": _sized_bytes(1),
        "B": _sized_bytes(4),
        "C": _sized_bytes(1),
        "\x8e": _sized_bytes(8),
        "\x96": _sized_bytes(8),
        "V": _Machine._unicode,
        "X": _sized_text(4),
        "\x8c": _sized_text(1),
        "\x8d": _sized_text(8),
        "(": _Machine._mark,
        "0": _Machine._pop,
        "1": _Machine._pop_mark,
        "2": lambda machine: machine._stack.append(machine._stack[-1]),
        ")": _constant(()),
        "t": _Machine._tuple,
        "\x85": lambda machine: machine._last_as_tuple(1),
        "\x86": lambda machine: machine._last_as_tuple(2),
        "\x87": lambda machine: machine._last_as_tuple(3),
        "]": lambda machine: machine._stack.append([]),
        "l": _Machine._list,
        "a": _Machine._append,
        "e": _Machine._appends,
        "}": lambda machine: machine._stack.append({}),
        "d": _Machine._dict,
        "s": _Machine._setitem,
        "u": _Machine._setitems,
        "p": lambda machine: machine._memoize(int(machine._line())),
        "q": lambda machine: machine._memoize(machine._number(1)),
        "r": lambda machine: machine._memoize(machine._number(4)),
        "\x94": _Machine._memoize,
        "g": lambda machine: machine._stack.append(machine._memo[int(machine._line())]),
        "h": lambda machine: machine._stack.append(machine._memo[machine._number(1)]),
        "j": lambda machine: machine._stack.append(machine._memo[machine._number(4)]),
        "c": _Machine._global,
        "\x93": _Machine._stack_global,
        "Q": _Machine._persistent_id,
        "R": _Machine._reduce,
        "b": _Machine._build,
    }.items()
}

_REFUSED_OPCODES = {
    ord(opcode): what
    for opcode, what in {
        "P": "a persistent id",
        "i": "an instance of a class",
        "o": "an instance of a class",
        "\x81": "an instance of a class",
        "\x92": "an instance of a class",
        "\x82": "an extension code",
        "\x83": "an extension code",
        "\x84": "an extension code",
        "\x97": "an out-of-band buffer",
        "\x98": "an out-of-band buffer",
        "\x8f": "a set",
        "\x90": "a set",
        "\x91": "a set",
        "\x8b": "an integer of arbitrary size",
    }.items()
}
