"""The machine that reads pickles: all that checkpoints use, nothing that could run."""

from __future__ import annotations

import collections
import importlib
import os
import pickle
import struct
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from converters.errors import ConversionError
from converters.unpickle import read_model

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


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


RUN = "os.mkdir('was-run')"
DTYPE = b"cnumpy\ndtype\n(" + text("f4") + b"tR"
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + b"C\x01b" + b"tR"
ENCODE, LATIN1 = b"c_codecs\nencode\n", text("latin1")
SHARED = EMPTY + b"(K\x01M\x10\x27\x85" + DTYPE + b"\x89B\x40\x9c\x00\x00" + bytes(40_000) + b"tb"
OBJECTS = np.array([Call(os.mkdir, "was-run"), None], dtype=object)

MALICIOUS = {
    "os.mkdir": pickle.dumps({"model": Call(os.mkdir, "was-run")}),
    "os.system, text protocol": b"cos\nsystem\n(S'mkdir was-run'\ntR.",
    "posix.system, inner value": pickle.dumps({"model": {"a": Call(os.system, "mkdir was-run")}}, 2),
    "eval": pickle.dumps(Call(eval, f"__import__('os') and {RUN}")),
    "exec": pickle.dumps(Call(exec, f"import os; {RUN}")),
    "import_module": pickle.dumps(Call(importlib.import_module, "this")),
    "getattr": pickle.dumps(Call(getattr, "x", "__class__")),
    "dotted name of an allowed module": b"\x80\x04" + text("numpy") + text("ndarray.__class__") + b"\x93.",
    "allowed name, other module": b"cos\n_reconstruct\n.",
    "object array": pickle.dumps({"a": OBJECTS}),
    "call in an array's state": b"}"
    + text("a")
    + EMPTY
    + b"(K\x01K\x00\x85"
    + DTYPE
    + b"\x89cos\nsystem\n("
    + text("mkdir was-run")
    + b"tRtbs.",
    "array of a subclass": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nmatrix\n(K\x00tC\x01btR.",
    "record dtype": pickle.dumps({"a": np.zeros(2, [("x", "f4")])}),
    "string dtype": pickle.dumps({"a": np.array(["text"])}),
    "instance, text protocol": b"(S'mkdir was-run'\nios\nsystem\n.",
    "instance, obj": b"(cos\nsystem\nS'mkdir was-run'\no.",
    "instance, newobj": b"\x80\x02cos\nsystem\n(S'mkdir was-run'\nt\x81.",
    "instance, newobj of an array": b"\x80\x02cnumpy\nndarray\n(K\x04t\x81.",
    "instance, newobj_ex": b"\x80\x04" + text("os") + text("system") + b"\x93(S'mkdir was-run'\nt}\x92.",
    "persistent id": b"(dS'model'\nPmkdir was-run\ns.",
    "binary persistent id": b"}" + text("model") + text("id") + b"Qs.",
    "extension code": b"\x80\x02\x82\x01.",
    "numpy.load": b"cnumpy\nload\n(S'was-run.npy'\ntR.",
    "torch tensor": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "torch storage from bytes": b"ctorch.storage\n_load_from_bytes\n(C\x00tR.",
    "copyreg": b"ccopyreg\n_reconstructor\n(cos\n_Environ\nc__builtin__\nobject\nNtR.",
    "other codec": b"c_codecs\nencode\n(" + text("x") + text("bz2") + b"tR.",
    "bytes of a number": b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.",
    "state of a function": b"cnumpy.core.multiarray\n_reconstruct\n}" + text("__code__") + b"Nsb.",
    "state of a class": b"ccollections\nOrderedDict\n}" + text("update") + b"Nsb.",
    "item of a dtype": DTYPE + b"K\x00K\x00s.",
    "append to an array": EMPTY + b"K\x00a.",
    "array filled twice": EMPTY + 2 * (b"(K\x01K\x00\x85" + DTYPE + b"\x89C\x00tb") + b".",
    "array larger than its data": EMPTY + b"(K\x01J\xff\xff\xff\x7f\x85" + DTYPE + b"\x89C\x04abcdtb.",
    "array of negative size": EMPTY + b"(K\x01J\xff\xff\xff\xff\x85" + DTYPE + b"\x89C\x00tb.",
    "array of many axes": EMPTY + b"(K\x01(" + 100 * b"K\x01" + b"t" + DTYPE + b"\x89C\x04abcdtb.",
    "set": b"\x80\x04\x8f(" + text("a") + b"\x90.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "8 EiB of bytes": b"\x8e" + b"\xff" * 7 + b"\x7f" + b"abc.",
    "2 GiB of text": b"X\xff\xff\xff\x7fabc.",
    "memo index of 4 billion": b"}r\xff\xff\xff\xff.",
    "number of 100 000 digits": b"L" + 100_000 * b"9" + b"L\n.",
    "number of 2 GiB": b"\x8b\xff\xff\xff\x7f.",
    "key of tuples, 2^60 to hash": b"}" + b")" + 60 * b"2\x86" + b"Ns.",
    "key of 100 000 nested tuples": b"}" + b")" + 100_000 * b"\x85" + b"Ns.",
    "100 000 nested lists": b"}" + text("model") + 100_000 * b"]" + 99_999 * b"a" + b"s.",
    "dict in itself": b"}q\x00" + text("model") + b"h\x00s.",
    "two keys": b"}(" + text("a") + b"N" + text("a") + b"Nu.",
    "one text encoded 1000 times": b"X\x10\x27\x00\x00"
    + 10_000 * b"a"
    + b"q\x00]"
    + 1000 * (ENCODE + b"h\x00" + LATIN1 + b"\x86Ra")
    + b".",
    "one array under 1000 names": b"}" + text("x") + SHARED + b"q\x00s" + b"".join(text(f"x{n}") + b"h\x00s" for n in range(1000)) + b".",
}

WATCHED: list[str] | None = None
HARMFUL = (
    "import",
    "exec",
    "compile",
    "open",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "pickle.",
    "shutil.",
    "marshal.",
    "code.__new__",
)


def watch(event, arguments):
    if WATCHED is not None and event.startswith(HARMFUL):
        WATCHED.append(f"{event} {arguments}")


@pytest.fixture(scope="module")
def audit():
    """Python's own audit hook, which cannot be taken away again; it only looks while a test asks for it."""
    sys.addaudithook(watch)
    read_model(pickle.dumps(ARRAYS, 0))  # imports the codecs of text protocols


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_pickles_run_nothing(name, audit, tmp_path, monkeypatch):
    global WATCHED
    monkeypatch.chdir(tmp_path)
    data = MALICIOUS[name]
    tracemalloc.start()
    WATCHED = []
    try:
        with pytest.raises(ConversionError) as refused:
            read_model(data)
        events = WATCHED
    finally:
        WATCHED = None
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert events == []
    assert list(tmp_path.iterdir()) == []
    assert peak_bytes < 100_000 + 100 * len(data)
    assert len(str(refused.value)) < 1500


def test_the_audit_sees_what_pickle_would_run(audit, tmp_path, monkeypatch):
    global WATCHED
    monkeypatch.chdir(tmp_path)
    WATCHED = []
    try:
        pickle.loads(MALICIOUS["os.mkdir"])
        events = WATCHED
    finally:
        WATCHED = None
    assert any(event.startswith("os.mkdir") for event in events)


def test_a_refused_name_is_told_with_its_place():
    with pytest.raises(ConversionError, match=r"the global 'os\.system', which is not on the allow list, at byte 0"):
        read_model(MALICIOUS["os.system, text protocol"])
    with pytest.raises(ConversionError, match="a persistent id"):
        read_model(MALICIOUS["persistent id"])


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


def test_bytes_behind_the_end():
    with pytest.raises(ConversionError, match="3 bytes follow the end"):
        read_model(pickle.dumps(SMALL) + b"abc")
