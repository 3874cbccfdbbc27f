"""Archives of ``torch.save``, written and read without PyTorch; PyTorch judges them where it is installed."""

from __future__ import annotations

import collections
import io
import mmap
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from converters import torch_zip
from converters.errors import ConversionError
from converters.torch_zip import read_zip, write_zip
from converters.unpickle import STORAGE_DTYPES, read_model


def read(data):
    memory = mmap.mmap(-1, len(data))
    memory.write(data)
    return read_zip(memory)


def written(tensors, versions):
    file = io.BytesIO()
    write_zip(file, tensors, versions)
    return file.getvalue()


WRITABLE = {f"a.{name}": np.arange(6).astype(dtype).reshape(2, 3) for name, dtype in STORAGE_DTYPES.items()}
WRITABLE |= {
    "a.b.transposed": np.arange(24, dtype=np.float32).reshape(2, 3, 4).T,
    "a.b.scalar": np.array(2.5, np.float32),
    "empty": np.zeros((3, 0, 2), np.float32),
    "a.big": np.array([1.5, -2.0], ">f4"),
    "ä.名": np.array([7]),
}


def test_archives_that_are_written_are_read():
    data = written(WRITABLE, {})
    found = read(data).tensors
    assert list(found) == list(WRITABLE)
    for name, array in WRITABLE.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype.newbyteorder("="), array.shape), name
        assert np.array_equal(found[name], array), name
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert data == written(WRITABLE, {})


def test_storages_are_aligned_also_in_large_archives(monkeypatch):
    """With the fields that files of 2 GB need (where one byte is called large)."""
    for limit in (1, 1 << 30):
        monkeypatch.setattr(torch_zip, "_ZIP64_BYTES", limit)
        data = written(WRITABLE, {})
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None
            for entry in archive.infolist():
                header = data[entry.header_offset : entry.header_offset + 30]
                assert (entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))) % 64 == 0
        assert len(read(data).tensors) == len(WRITABLE)


def test_one_tensor_at_a_time_is_in_memory():
    class Lazy:
        shape, dtype = (256, 1024), np.dtype(np.float32)
        made = 0

        def __array__(self, dtype=None, copy=None):
            self.made += 1
            return np.full(self.shape, 7, np.float32)

    tensors = {f"a.{index}": Lazy() for index in range(20)}
    tracemalloc.start()
    try:
        with open(os.devnull, "wb") as file:
            write_zip(file, tensors, {})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [tensor.made for tensor in tensors.values()] == [1] * 20
    assert peak_bytes < 1.2 * 2**20


def test_what_an_archive_cannot_hold():
    with pytest.raises(ConversionError, match="'a' has elements of uint64"):
        written({"a": np.zeros(2, np.uint64)}, {})


@pytest.mark.parametrize("mapped", [True, False])
def test_pytorch_loads_what_is_written(mapped, tmp_path):
    torch = pytest.importorskip("torch")
    versions = {"": 2, "a": 3, "without.tensors": 4}
    (tmp_path / "a.pth").write_bytes(written(WRITABLE, versions))
    found = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mapped)
    assert list(found) == ["model"]
    assert type(found["model"]) is collections.OrderedDict
    assert list(found["model"]) == list(WRITABLE)
    for name, tensor in found["model"].items():
        array = np.ascontiguousarray(WRITABLE[name]).reshape(WRITABLE[name].shape)
        as_bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{array.dtype.name}", array.shape)
        assert as_bytes.tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes(), name
        assert tensor.is_contiguous()
    expected = {"": 2, "a": 3, "a.b": 1, "ä": 1, "without.tensors": 4}
    assert {name: dict(data) for name, data in found["model"]._metadata.items()} == {
        name: {"version": version} for name, version in expected.items()
    }


def test_pytorch_writes_the_same_state_dict(tmp_path):
    """What PyTorch's own state dict of a module becomes: the same names, tensors and _metadata."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
    torch.save({"model": model.state_dict()}, tmp_path / "theirs.pth")
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    (tmp_path / "ours.pth").write_bytes(written(tensors, {"1": 2}))
    theirs, ours = (torch.load(tmp_path / f"{who}.pth", weights_only=True)["model"] for who in ("theirs", "ours"))
    assert ours._metadata == theirs._metadata
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["zip", "zip, protocol 4", "legacy"])
def test_checkpoints_of_a_training_are_read(kind, tmp_path):
    """As Detectron2's DetectionCheckpointer saves them: AdamW, a schedule with milestones, a warm-up, the iteration."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).to(torch.float64)
    model[1].half()
    optimizer = torch.optim.AdamW([{"params": [parameter], "lr": 1e-4} for parameter in model.parameters()])
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), torch.optim.lr_scheduler.MultiStepLR(optimizer, [7, 9])]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedulers[1].state_dict(),
        "iteration": 7,
        "trainer": {
            "hooks": {"LRScheduler": schedulers[0].state_dict()},
            "_trainer": {"grad_scaler": torch.amp.GradScaler("cpu").state_dict()},
        },
    }
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=kind != "legacy", pickle_protocol=4 if "4" in kind else 2)
    data = (tmp_path / "a.pth").read_bytes()
    found = read_model(data) if kind == "legacy" else read(data)
    assert found.others == ("optimizer", "scheduler", "iteration", "trainer")
    assert list(found.tensors) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.numpy().dtype, tensor.shape)
        assert np.array_equal(found.tensors[name], tensor.numpy()), name


@pytest.mark.parametrize("zipped", [True, False])
def test_bfloat16_of_pytorch(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.arange(6).to(torch.bfloat16).reshape(2, 3)
    torch.save({"model": {"a": values, "t": values.T}}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "a.pth").read_bytes()
    found = (read(data) if zipped else read_model(data)).tensors
    assert {tensor.dtype.name for tensor in found.values()} == {"bfloat16"}
    assert found["a"].astype(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["t"].astype(np.float32).tolist() == [[0, 3], [1, 4], [2, 5]]
