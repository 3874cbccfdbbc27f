"""The machine that reads pickles: all that checkpoints use, nothing that could run."""

from __future__ import annotations

import collections
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest

from converters.errors import ConversionError
from converters.unpickle import read_model
from tests.converters.corpus import PICKLES

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    "bytes 0 to 255": np.arange(256, dtype=np.uint8),
    "big-endian": np.array([1.5, -2.0], ">f4"),
    "half": np.array([1.5], np.float16),
    "double": np.array([np.pi, np.nan]),
    "integers": np.arange(5),
    "booleans": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.float32(2.5),
    "no axes": np.array(7, np.float32),
    "large": np.random.default_rng(0).standard_normal((64, 128), np.float32),
}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        array = np.asarray(array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "wrap", [lambda m: {"model": m, "__author__": "me", "n": [1, (2.5, None)], "b": True}, dict, collections.OrderedDict]
)
def test_every_protocol(protocol, wrap):
    model = read_model(pickle.dumps(wrap(ARRAYS), protocol))
    assert_same(model.tensors, ARRAYS)
    assert (model.author, model.others) in (("me", ("n", "b")), ("", ()))


TRAINING = {
    "optimizer": {
        "state": {0: {"step": np.float32(7), "exp_avg": ARRAYS["matrix"]}, 1: {}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "fused": None, "amsgrad": False, "params": [0, 1, 300, 70_000]}],
        "counts": collections.defaultdict(int, a=1),
    },
    "scheduler": {
        "milestones": collections.Counter({327_778: 1, 355_092: 1}),
        "base_lrs": [np.float64(1e-4)],
        "_last_lr": [1e-5],
        "big": 2**40,
        "negative": -3,
    },
    "iteration": 368_749,
    "trainer": collections.OrderedDict(hooks=collections.defaultdict(dict, x={"y": (1, (2, ()))}), none=collections.defaultdict(None)),
}
"""Of the types that the state of an optimizer, a scheduler and a trainer is made of."""


@pytest.mark.parametrize("protocol", range(6))
def test_the_state_of_a_training(protocol):
    model = read_model(pickle.dumps({"model": ARRAYS, **TRAINING, "__author__": "me"}, protocol))
    assert_same(model.tensors, ARRAYS)
    assert model.others == ("optimizer", "scheduler", "iteration", "trainer")


@pytest.mark.parametrize("protocol", range(6))
def test_bfloat16(protocol):
    arrays = {"a": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)}
    assert_same(read_model(pickle.dumps(arrays, protocol)).tensors, arrays)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_names_of_numpy_1_and_2(protocol):
    data = pickle.dumps(ARRAYS, protocol)
    one, two = data.replace(b"numpy._core.", b"numpy.core."), data.replace(b"numpy.core.", b"numpy._core.")
    assert one != two
    for named in (one, two):
        assert_same(read_model(named).tensors, ARRAYS)


@pytest.mark.parametrize("protocol", [0, 2])
def test_python_2_byte_strings(protocol):
    """As Python 2's cPickle writes {"model": {"a.weight": array}}: every text and the data are byte strings."""

    def string(value: bytes) -> bytes:
        if protocol == 0:
            return b"S'" + "".join(f"\\x{byte:02x}" for byte in value).encode() + b"'\n"
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    array = np.arange(200, dtype=np.float32).reshape(20, 10) * np.float32(np.pi)
    dtype = b"cnumpy\ndtype\n(" + string(b"f4") + b"I0\nI1\ntR(I3\n" + string(b"<") + b"NNNI-1\nI-1\nI0\ntb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + string(b"b") + b"tR"
    pickled = empty + b"(I1\n(I20\nI10\nt" + dtype + b"I00\n" + string(array.tobytes()) + b"tb"
    data = b"(d" + string(b"model") + b"(d" + string(b"a.weight") + pickled + b"ss" + string(b"__author__") + string(b"me") + b"s."
    assert_same(pickle.loads(data, encoding="latin1")["model"], {"a.weight": array})
    model = read_model(data)
    assert_same(model.tensors, {"a.weight": array})
    assert model.author == "me"


def test_arrays_are_views_of_the_file():
    data = pickle.dumps({"a": ARRAYS["large"]}, 4)
    tensor = read_model(data).tensors["a"]
    assert np.shares_memory(tensor, np.frombuffer(data, np.uint8))
    assert not tensor.flags.writeable


def test_a_refused_name_is_told_with_its_place():
    with pytest.raises(ConversionError, match=r"the global 'os\.system', which is not on the allow list, at byte 0"):
        read_model(PICKLES["os.system and its like"]["os.system, text protocol"])
    with pytest.raises(ConversionError, match="a persistent id"):
        read_model(PICKLES["persistent ids"]["persistent id, text protocol"])


SMALL = {"model": {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float32)}, "__author__": "me", "more": [1, {"x": (2.0,)}]}


@pytest.mark.parametrize("protocol", range(6))
def test_every_truncation_is_told(protocol):
    data = pickle.dumps(SMALL, protocol)
    for length in range(len(data)):
        with pytest.raises(ConversionError, match="truncated"):
            read_model(data[:length])


@pytest.mark.parametrize("protocol", range(6))
def test_damaged_files_end_in_clear_errors(protocol):
    generator = np.random.default_rng(protocol)
    clean = pickle.dumps(SMALL, protocol)
    refused = 0
    for _ in range(1000):
        data = bytearray(clean)
        for _ in range(generator.integers(1, 4)):
            at = generator.integers(len(data))
            data[at : at + generator.integers(0, 3)] = generator.bytes(generator.integers(0, 3))
        try:
            read_model(bytes(data))
        except ConversionError:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "holds a list, expected a dict of arrays"),
        ({}, "expected a dict of arrays that is not empty"),
        ({"model": [1]}, "'model' is a list"),
        ({"model": {"a": 1, "b": ARRAYS["matrix"]}}, "must hold arrays only\n  'a' is int"),
    ],
)
def test_other_contents(value, message):
    with pytest.raises(ConversionError, match=message):
        read_model(pickle.dumps(value))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"(dV\\ud800\nNs.", "the pickle is malformed at byte 2 of 13: UnicodeEncodeError"),
        (b"ccollections\ndefaultdict\n(cnumpy\ndtype\ntR.", "a defaultdict whose default is global, at byte 40"),
        (b"ccollections\nCounter\n(]tR.", "a Counter of a list, at byte 24"),
    ],
)
def test_what_is_refused_at_once(data, message):
    with pytest.raises(ConversionError, match=message):
        read_model(data)


def test_bytes_behind_the_end():
    with pytest.raises(ConversionError, match="3 bytes follow the end"):
        read_model(pickle.dumps(SMALL) + b"abc")
