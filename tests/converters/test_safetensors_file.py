"""The files of safetensors: what its own package writes is read, what is written its package reads, what it refuses is refused."""

from __future__ import annotations

import io
import json
import mmap
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from converters import safetensors_file
from converters.errors import ConversionError
from converters.safetensors_file import DTYPES, read_safetensors, write_safetensors
from converters.source import SAFETENSORS, kind_of


def array_of(dtype, shape, seed=0):
    return np.frombuffer(np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize), np.uint8).view(dtype).reshape(shape)


EVERY = {f"a.{name}": array_of(dtype, (3, 5)) for name, dtype in DTYPES.items() if name != "BOOL"}
EVERY |= {"a.BOOL": np.array([True, False, True]), "scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float16)}
EVERY |= {'ä 名 🙂 \\ " \n': np.arange(3), "": np.arange(2)}
METADATA = {"format": "np", "more": "ä\n"}


def written(tensors, metadata=METADATA):
    file = io.BytesIO()
    write_safetensors(file, tensors, metadata)
    return file.getvalue()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def test_what_the_package_writes_is_read(tmp_path):
    safetensors.numpy.save_file(EVERY, tmp_path / "a.safetensors", METADATA)
    found = read_safetensors((tmp_path / "a.safetensors").read_bytes())
    assert_same(found.tensors, EVERY)
    assert found.metadata == METADATA


def test_what_is_written_the_package_reads(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(written(EVERY))
    assert_same(safetensors.numpy.load_file(tmp_path / "a.safetensors"), EVERY)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == METADATA


def test_the_bytes_are_those_of_the_package():
    """Where the order leaves no choice: elements of one size, names in their order."""
    tensors = {name: array_of(np.dtype(np.float32), (2, 3), seed) for seed, name in enumerate("abc")}
    for metadata in ({}, {"format": "pt"}):
        assert written(tensors, metadata) == safetensors.numpy.save(tensors, metadata or None)


def test_to_and_fro():
    found = read_safetensors(written(EVERY))
    assert_same(found.tensors, EVERY)
    assert found.metadata == METADATA
    assert read_safetensors(written({}, {})).tensors == {}


def test_all_is_aligned_and_in_order():
    names = ["a", "z", "b", "y"]
    tensors = {name: np.ones(3, np.uint8 if name in "zy" else np.float64) for name in names}
    found = read_safetensors(written(tensors, {"length": "odd"})).tensors
    assert list(found) == ["a", "b", "z", "y"]
    assert all(tensor.flags.aligned for tensor in found.values())


def test_tensors_are_views_of_the_map(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(written(EVERY))
    with (tmp_path / "a.safetensors").open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for name, tensor in read_safetensors(data).tensors.items():
        assert not tensor.flags.writeable
        assert not tensor.size or np.shares_memory(tensor, np.frombuffer(data, np.uint8)), name


class Lazy:
    """Makes its array when asked."""

    shape, dtype = (256, 1024), np.dtype(np.float32)
    made = 0

    def __array__(self, dtype=None, copy=None):
        self.made += 1
        return np.full(self.shape, 7, np.float32)


class Discarded(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        return len(data)


def test_one_tensor_at_a_time_is_in_memory():
    tensors = {str(index): Lazy() for index in range(20)}
    tracemalloc.start()
    try:
        write_safetensors(Discarded(), tensors, {})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [tensor.made for tensor in tensors.values()] == [1] * 20
    assert peak_bytes < 1.2 * 2**20


def test_transposed_and_big_endian_arrays_keep_their_values():
    tensors = {"t": np.arange(6, dtype=np.float32).reshape(2, 3).T, "big": np.array([1.5, -2.0], ">f4"), "step": np.arange(10)[::3]}
    for name, found in read_safetensors(written(tensors)).tensors.items():
        assert np.array_equal(found, tensors[name]), name


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": np.array([1j])}, "'a' has elements of complex128"),
        ({"a": np.array(["text"])}, "'a' has elements of <U4"),
        ({"a": np.array([None])}, "'a' has elements of object"),
        ({"a": np.zeros(2, ml_dtypes.float8_e4m3fn)}, "'a' has elements of float8_e4m3fn"),
        ({"__metadata__": np.zeros(2)}, "a tensor is called __metadata__"),
        ({"n" * 1000: np.zeros(2)}, "the names take 10.. bytes; safetensors allows 500"),
    ],
)
def test_what_cannot_be_written(tensors, message, monkeypatch):
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 500)
    file = io.BytesIO()
    with pytest.raises(ConversionError, match=message):
        write_safetensors(file, tensors, {})
    assert file.getvalue() == b""


def test_a_tensor_must_be_what_it_announced():
    class Liar(Lazy):
        shape = (2, 2)

        def __array__(self, dtype=None, copy=None):
            return np.zeros(4, np.float32)

    with pytest.raises(ValueError, match="as announced"):
        written({"a": Liar()})


def file_of(header, content=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


ONE = {"a": entry()}

REFUSED = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "a header of 8 EiB": file_of(ONE, length=2**63),
    "a header longer than the file": file_of(ONE, bytes(8), length=100_000),
    "a header over 100 MB": struct.pack("<Q", 100_000_001) + b"{}" + bytes(100),
    "a list": file_of(b"[]"),
    "two values": file_of(b"{}{}"),
    "zeros behind the header": file_of(b"{}\0\0"),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "half a surrogate": file_of(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "100 000 nested lists": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a number of 100 000 digits": file_of(b'{"a":' + b"9" * 100_000 + b"}"),
    "NaN": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
    "infinity by overflow": file_of(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', bytes(8)),
    "a size with a fraction": file_of({"a": entry() | {"shape": [2.0]}}, bytes(8)),
    "a size that is true": file_of({"a": entry(shape=(True,), end=4)}, bytes(4)),
    "a negative size": file_of({"a": entry(shape=(-2,))}, bytes(8)),
    "a shape that is a number": file_of({"a": entry() | {"shape": 2}}, bytes(8)),
    "an unknown type": file_of({"a": entry("F33")}, bytes(8)),
    "a type that is a list": file_of({"a": entry(["F32"])}, bytes(8)),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "offsets in a wrong order": file_of({"a": entry(shape=(0,), begin=8, end=0)}, bytes(8)),
    "negative offsets": file_of({"a": entry(begin=-8, end=0)}, bytes(8)),
    "a hole in front": file_of({"a": entry(begin=4, end=12)}, bytes(12)),
    "a hole": file_of({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)),
    "an overlap": file_of({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
    "the same bytes twice": file_of({"a": entry(), "b": entry()}, bytes(8)),
    "a tensor larger than its bytes": file_of({"a": entry(shape=(3,))}, bytes(8)),
    "a size that overflows": file_of({"a": entry(shape=(2**40, 2**40))}, bytes(8)),
    "an empty tensor whose size overflows": file_of({"a": entry(shape=(2**40, 2**40, 0), end=0)}),
    "a tensor that wraps around to its size": file_of({"a": entry(shape=(2**62, 4, 2), end=8)}, bytes(8)),
    "bytes behind the end": file_of(ONE, bytes(9)),
    "a truncated tensor": file_of(ONE, bytes(7)),
    "a tensor of 8 EiB": file_of({"a": entry(shape=(2**61,), end=2**63)}, bytes(8)),
    "metadata that are a list": file_of({"__metadata__": []}),
    "metadata that are no text": file_of({"__metadata__": {"a": 1}}),
    "a field twice": file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
}
"""What the package refuses too."""

STRICTER = {
    "a name twice": file_of(b'{"a":%b,"\\u0061":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "a text twice": file_of(b'{"__metadata__":{"a":"b","a":"c"}}'),
    "a blank in front": file_of(b" {}"),
    "further fields": file_of({"a": entry() | {"run": "os.system"}}, bytes(8)),
    "65 dimensions": file_of({"a": entry(shape=(1,) * 65, end=4)}, bytes(4)),
    "floats of 8 bits": file_of({"a": entry("F8_E4M3", end=2)}, bytes(2)),
}
"""What the format's text forbids and the package lets pass, and what is not supported."""


@pytest.mark.parametrize("name", [*REFUSED, *STRICTER])
def test_files_against_the_rules(name):
    data = (REFUSED | STRICTER)[name]
    tracemalloc.start()
    try:
        with pytest.raises(ConversionError) as refused:
            read_safetensors(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100_000 + 20 * len(data)
    assert len(str(refused.value)) < 1500


@pytest.mark.parametrize("name", REFUSED)
def test_the_package_refuses_them_too(name):
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(REFUSED[name])


def test_the_file_that_is_changed_is_a_good_one():
    assert_same(read_safetensors(file_of(ONE, bytes(8))).tensors, {"a": np.zeros(2, np.float32)})
    two = {"b": entry(begin=8, end=16), "a": entry(), "none": entry(shape=(0,), begin=8, end=8)}
    assert list(read_safetensors(file_of(two, bytes(16))).tensors) == ["a", "none", "b"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a hole", "'b' leaves a hole: it begins at byte 12 of the data, expected 8"),
        ("an overlap", "'b' overlaps another tensor: it begins at byte 4 of the data, expected 8"),
        ("a truncated tensor", r"'a' ends at byte \d+ of \d+"),
        ("a name twice", "the header has 'a' twice"),
        ("a header over 100 MB", "the header has 100000001 bytes"),
        ("floats of 8 bits", "'a' has elements of 'F8_E4M3'"),
    ],
)
def test_errors_say_what_is_wrong(name, message):
    with pytest.raises(ConversionError, match=message):
        read_safetensors((REFUSED | STRICTER)[name])


def test_every_truncation_is_told():
    data = written({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float16)})
    for length in range(len(data)):
        with pytest.raises(ConversionError):
            read_safetensors(data[:length])


@pytest.mark.parametrize("first_bytes", [b" <", b" {", b"\x80\x02", b"PK", b"\x1f\x8b", b"(d"])
def test_a_length_that_looks_like_another_format(first_bytes, tmp_path):
    length = int.from_bytes(first_bytes, "little")
    header = json.dumps(ONE).encode().ljust(length)
    (tmp_path / "a").write_bytes(file_of(header, bytes(8)))
    assert kind_of(tmp_path / "a") == SAFETENSORS
