"""PyTorch's files are read without PyTorch: every kind that it writes, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from converters.convert import convert
from converters.errors import ConversionError
from converters.source import open_source

GOLDEN = Path(__file__).parent.parent / "golden" / "torch"
FILES = sorted(path.name for path in GOLDEN.iterdir())

VALUES = np.arange(24, dtype=np.float32)
EXPECTED = {
    "matrix": VALUES.reshape(4, 6),
    "transposed": VALUES.reshape(4, 6).T,
    "channels_last": np.arange(48, dtype=np.float32).reshape(2, 2, 3, 4),
    "tail": VALUES[20:],
    "parameter": np.array([1.5, -2.0], np.float32),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "double": np.array([0.1, 0.2]),
    "half": np.array([1.5], np.float16),
    "long": np.array([[1, -2]]),
    "bool": np.array([True, False]),
}
"""What ``parity.record_init`` saved."""


def read(path):
    """Copies of the tensors in a file, and their author."""
    with open_source(path) as source:
        return {name: tensor.copy() for name, tensor in source.tensors.items()}, source.author


def assert_expected(found):
    assert list(found) == list(EXPECTED)
    for name, array in EXPECTED.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert np.array_equal(found[name], array), name


def test_the_corpus_has_every_kind():
    expected = ["checkpoint.pth", "old.pth", "state_dict.pth", *(f"tensors_protocol{protocol}.pkl" for protocol in range(6))]
    assert expected == FILES


@pytest.mark.parametrize("name", FILES)
def test_recorded_files(name):
    tensors, author = read(GOLDEN / name)
    assert_expected(tensors)
    assert author == ("third_party" if name.endswith(".pkl") else "")


@pytest.mark.parametrize("name", ["state_dict.pth", "old.pth", "tensors_protocol4.pkl"])
def test_tensors_are_views_of_the_file(name):
    with open_source(GOLDEN / name) as source:
        assert np.shares_memory(source.tensors["matrix"], np.frombuffer(source.data, np.uint8))
        assert not source.tensors["matrix"].flags.writeable


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_the_installed_pytorch(zipped, official_sources, tmp_path):
    import torch

    from parity.record_init import torch_tensors

    torch.save(
        {"model": torch_tensors(), "optimizer": {"state": {7: torch.ones(3)}}}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped
    )
    assert_expected(read(tmp_path / "a.pth")[0])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": torch_tensors()}))
    assert_expected(read(tmp_path / "a.pkl")[0])


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(count=4, key="0", kind="FloatStorage") -> bytes:
    """The persistent id of a storage."""
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(stored: bytes, shape=(2, 2), strides=(2, 1), offset=0) -> bytes:
    arguments = b"(" + stored + number(offset) + numbers(*shape) + numbers(*strides) + b"\x89}t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def state(value: bytes) -> bytes:
    """The pickle of {"a": value}."""
    return b"\x80\x02}" + text("a") + value + b"s."


FLOATS = np.arange(4, dtype=np.float32).tobytes()
COUNTED_FLOATS = struct.pack("<q", 4) + FLOATS


def archive(data: bytes, more=(("data/0", FLOATS),), name="archive", compression=zipfile.ZIP_STORED):
    def write(path):
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as file:
            warnings.simplefilter("ignore")  # of a name that is there twice
            file.writestr(f"{name}/data.pkl", data)
            for key, content in more:
                file.writestr(f"{name}/{key}", content)

    return write


SIZES, SIZE, PLACE, FLAGS = 20, 24, 42, 8
"""Where the list at the end of an archive has a file's two sizes, the second alone, its place, its flags."""


def listed(write, name, field, change):
    """The archive that ``write`` makes, with another value in its list of files."""

    def write_changed(path):
        write(path)
        data = bytearray(path.read_bytes())
        start = data.rindex(name.encode()) - 46
        code = {SIZES: "<II", SIZE: "<I", PLACE: "<I", FLAGS: "<H"}[field]
        struct.pack_into(code, data, start + field, *[change(data)] * (len(code) - 1))
        path.write_bytes(data)

    return write_changed


def replaced(write, *pairs):
    """The archive that ``write`` makes, with other bytes."""

    def write_changed(path):
        write(path)
        data = path.read_bytes()
        for old, new, count in pairs:
            data = data.replace(old, new, count)
        path.write_bytes(data)

    return write_changed


def archive_with_bomb(path):
    archive(SMALL)(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/code/bomb", bytes(20_000_000))


MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
HEADER = MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)


def old_file(data: bytes, keys=("0",), storages=COUNTED_FLOATS) -> bytes:
    return HEADER + data + pickle.dumps(list(keys), 2) + storages


def from_bytes(content: bytes) -> bytes:
    """A call of torch.storage._load_from_bytes."""
    return b"ctorch.storage\n_load_from_bytes\n(B" + struct.pack("<I", len(content)) + content + b"tR"


LONE = b"\x80\x02" + storage() + b"."


def test_the_helpers_write_what_pytorch_would(tmp_path):
    expected = np.arange(4, dtype=np.float32).reshape(2, 2)
    archive(state(tensor(storage())))(tmp_path / "zip.pth")
    (tmp_path / "old.pth").write_bytes(old_file(state(tensor(storage()))))
    (tmp_path / "plain.pkl").write_bytes(state(tensor(from_bytes(old_file(LONE)))))
    for name in ("zip.pth", "old.pth", "plain.pkl"):
        assert np.array_equal(read(tmp_path / name)[0]["a"], expected), name


def test_big_endian_archives(tmp_path):
    values = np.arange(4, dtype=">f4")
    archive(state(tensor(storage())), [("data/0", values.tobytes()), ("byteorder", b"big")])(tmp_path / "a.pth")
    assert np.array_equal(read(tmp_path / "a.pth")[0]["a"], values.reshape(2, 2))


SYSTEM = b"cos\nsystem\n(" + text("touch was-run") + b"tR"
SMALL = state(tensor(storage()))

REFUSED = {
    "os.system in an archive": (archive(state(SYSTEM)), r"the global 'os\.system', which is not on the allow list"),
    "os.system in an old file": (old_file(state(SYSTEM)), r"the global 'os\.system'"),
    "os.system instead of the magic number": (b"\x80\x02" + SYSTEM + b".", r"the global 'os\.system'"),
    "os.system in the header": (MAGIC + b"\x80\x02" + SYSTEM + b".", r"the global 'os\.system'"),
    "os.system in the list of storages": (HEADER + SMALL + b"\x80\x02" + SYSTEM + b".", r"the global 'os\.system'"),
    "os.system in a storage": (state(tensor(from_bytes(HEADER + b"\x80\x02" + SYSTEM + b"."))), r"the global 'os\.system'"),
    "os.system as a storage type": (archive(state(tensor(storage().replace(b"ctorch\nFloatStorage", b"cos\nsystem")))), "'os.system'"),
    "torch.load": (archive(state(b"ctorch\nload\n(" + text("x") + b"tR")), r"the global 'torch\.load'"),
    "a type of tensor": (archive(state(b"ctorch._tensor\n_rebuild_from_type_v2\n)R")), "_rebuild_from_type_v2"),
    "a module": (archive(state(b"ctorch.nn.modules.linear\nLinear\n)\x81")), r"the global 'torch\.nn\.modules\.linear\.Linear'"),
    "a call of a storage type": (archive(state(b"ctorch\nFloatStorage\n" + numbers(8) + b"R")), "a call of a class"),
    "a storage in a storage": (
        state(tensor(from_bytes(HEADER + b"\x80\x02" + from_bytes(old_file(LONE)) + b"."))),
        "a torch storage that",
    ),
    "a storage that is a list": (state(tensor(from_bytes(old_file(b"\x80\x02].", (), b"")))), "a torch storage that is none"),
    "a storage that is no file": (state(tensor(from_bytes(b"abc"))), "a torch storage that cannot be read"),
    "a persistent id in a plain pickle": (SMALL, "a persistent id"),
    "a persistent id that is text": (archive(state(text("x") + b"Q")), "a persistent id that is no storage"),
    "a persistent id of another kind": (archive(state(b"(" + text("module") + b"NNNNtQ")), "a persistent id that is no storage"),
    "a view of a storage": (archive(state(tensor(storage()[:-2] + numbers(0, 1) + b"tQ"))), "a persistent id that is no storage"),
    "a storage of negative size": (archive(state(tensor(storage(-1)))), "a storage of an unknown type or size"),
    "a missing storage": (archive(state(tensor(storage(key="7")))), "'a': the file has no storage '7'"),
    "a storage outside": (archive(state(tensor(storage(key="../../../etc/passwd")))), "the file has no storage '../../../etc/passwd'"),
    "a storage that is too short": (archive(state(tensor(storage(4000), (2000, 2)))), "its storage has 16 bytes, expected 4000 elements"),
    "a tensor behind its storage": (archive(state(tensor(storage(), offset=1))), r"a tensor of shape \(2, 2\) beyond the 4 elements"),
    "a tensor far behind its storage": (archive(state(tensor(storage(), strides=(2**31 - 1, 1)))), "beyond the 4 elements"),
    "a tensor before its storage": (archive(state(tensor(storage(), offset=-1))), "are not whole numbers"),
    "negative strides": (archive(state(tensor(storage(), strides=(-1, 1)))), "are not whole numbers"),
    "one element a billion times": (archive(state(tensor(storage(), (2**15, 2**15), (0, 0)))), "beyond the 4 elements"),
    "fewer strides than sizes": (archive(state(tensor(storage(), (2, 2), (1,)))), "are not whole numbers"),
    "many dimensions": (archive(state(tensor(storage(), (1,) * 40, (1,) * 40))), "are not whole numbers"),
    "a tensor without a storage": (archive(state(tensor(b"N"))), "a tensor whose storage is None"),
    "a parameter without a tensor": (archive(state(b"ctorch._utils\n_rebuild_parameter\n(N\x89}tR")), "a parameter that is None"),
    "a large key": (archive(b"\x80\x02}\x8a\x20" + bytes(31) + b"\x01Ns."), "keys must be text or small integers"),
    "numbers as names": (archive(b"\x80\x02}K\x05" + tensor(storage()) + b"s."), "the key 5, expected a name"),
    "one storage under 1000 names": (
        archive(b"\x80\x02}(" + text("x") + tensor(storage()) + b"q\x00" + b"".join(text(f"{n}") + b"h\x00" for n in range(1000)) + b"u."),
        "larger than the file",
    ),
    "bfloat16 of a big-endian machine": (
        archive(state(tensor(storage(kind="BFloat16Storage"))), [("data/0", bytes(8)), ("byteorder", b"big")]),
        "'a' has elements of bfloat16 with their bytes swapped",
    ),
    "no pickle in the archive": (archive(b"", name="deep/archive"), "a zip archive that torch.save did not write"),
    "TorchScript": (archive(SMALL, [("constants.pkl", b"")]), "a TorchScript program"),
    "a compressed archive": (archive(SMALL * 9, compression=zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "an unknown byte order": (archive(SMALL, [("byteorder", b"middle")]), "expected little or big"),
    "a zip bomb": (archive(SMALL + bytes(20_000_000), compression=zipfile.ZIP_DEFLATED), "'archive/data.pkl' .* is compressed"),
    "a zip bomb beside the model": (
        archive_with_bomb,
        "'archive/code/bomb' in the archive is compressed or encrypted",
    ),
    "an encrypted storage": (listed(archive(SMALL), "archive/data/0", FLAGS, lambda data: 1), "is compressed or encrypted"),
    "a path for a name": (
        archive(SMALL, [("data/0", FLOATS), ("../../../was-run", b"x")]),
        r"the name 'archive/\.\./\.\./\.\./was-run', which torch\.save never writes",
    ),
    "a path from the root for a name": (archive(SMALL, name="/etc"), r"the name '/etc/data\.pkl'"),
    "a name that ends early": (
        replaced(archive(SMALL, [("data/0_evil", FLOATS)]), (b"data/0_evil", b"data/0\0evil", 2)),
        r"the name 'archive/data/0\\x00evil'",
    ),
    "a storage twice": (archive(SMALL, [("data/0", FLOATS), ("data/0", FLOATS)]), "the archive has 'archive/data/0' twice"),
    "a pickle twice": (archive(SMALL, [("data/0", FLOATS), ("data.pkl", state(SYSTEM))]), "the archive has 'archive/data.pkl' twice"),
    "two pickles": (archive(SMALL, [("data/0", FLOATS), ("../other/data.pkl", SMALL)]), "which torch.save never writes"),
    "two storages in one place": (
        listed(
            archive(SMALL, [("data/0", FLOATS), ("data/1", FLOATS)]),
            "archive/data/1",
            PLACE,
            lambda data: data.index(b"archive/data/0") - 30,
        ),
        "'archive/data/1' begins at byte .* inside of another file",
    ),
    "a storage over the next": (
        listed(archive(SMALL, [("data/0", FLOATS), ("data/1", FLOATS)]), "archive/data/0", SIZES, lambda data: 40),
        "'archive/data/1' begins at byte .* inside of another file",
    ),
    "a storage over the list": (
        listed(archive(SMALL), "archive/data/0", SIZES, lambda data: 100),
        "inside of|reaches beyond|'a': its storage",
    ),
    "a storage of two sizes": (listed(archive(SMALL), "archive/data/0", SIZE, lambda data: 15), "is compressed or encrypted"),
    "a storage of 4 GiB": (
        listed(archive(SMALL), "archive/data/0", SIZES, lambda data: 2**32 - 2),
        "reaches beyond the end of the archive",
    ),
    "a storage behind the end": (listed(archive(SMALL), "archive/data/0", PLACE, lambda data: 2**31), "is not where the archive says"),
    "another name at the storage": (
        replaced(archive(SMALL), (b"archive/data/0", b"archive/data/9", 1)),
        "'archive/data/0' is not where the archive says",
    ),
    "half of an archive": (b"PK\x03\x04" + bytes(100), "the zip archive is damaged"),
    "an old file that ends early": (old_file(SMALL)[:-1], "the storage '0' has 4 elements, but 4 follow"),
    "an old file with more": (old_file(SMALL) + b"x", "1 bytes follow the last storage"),
    "an old file with other storages": (old_file(SMALL, keys=("0", "9")), "names others than the tensors do"),
    "an old file with a huge storage": (
        old_file(SMALL, storages=struct.pack("<q", 2**62)),
        "has 4 elements, but 4611686018427387904 follow",
    ),
    "an old file of another protocol": (MAGIC + pickle.dumps(7, 2) + 3 * pickle.dumps({}, 2), "begins like one of torch.save"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files_run_nothing(name, tmp_path, monkeypatch):
    content, message = REFUSED[name]
    path = tmp_path / "evil.pth"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(ConversionError, match=message) as refused:
            read(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert os.listdir(tmp_path) == ["evil.pth"]
    assert peak_bytes < 200_000 + 200 * path.stat().st_size
    assert len(str(refused.value)) < 1500
    assert "'evil.pth'" in str(refused.value)


@pytest.mark.parametrize("name", ["state_dict.pth", "old.pth", "tensors_protocol4.pkl"])
def test_truncated_and_damaged_files_end_in_clear_errors(name, tmp_path):
    clean = (GOLDEN / name).read_bytes()
    path = tmp_path / "damaged"

    def refused(data):
        path.write_bytes(data)
        try:
            read(path)
        except ConversionError:
            return True
        return False

    for length in range(0, len(clean), 11):
        assert refused(clean[:length]), length
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        data = bytearray(clean)
        for _ in range(generator.integers(1, 4)):
            at = generator.integers(len(data))
            data[at : at + generator.integers(0, 3)] = generator.bytes(generator.integers(0, 3))
        found += refused(bytes(data))
    assert found > 60


def test_whole_checkpoints_are_converted_from_them_too(tensors, checkpoint_file, torch_zip, tmp_path):
    torch_zip(tensors, tmp_path / "model_final.pth")
    convert(tmp_path / "model_final.pth", tmp_path / "a", "tiny_panoptic")
    convert(checkpoint_file(tensors), tmp_path / "b", "tiny_panoptic")
    for file in ("ckpt.index", "ckpt.data-00000-of-00001", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
