"""Small checkpoints in the official layout: the tensors of the tiny entries, filled with random numbers."""

from __future__ import annotations

import pickle
import struct
import zipfile

import numpy as np
import pytest

from checkpoints import registry


def random_tensors(entry, seed=0):
    """v2 name → tensor."""
    generator = np.random.default_rng(seed)
    tensors = {name: generator.standard_normal(spec.shape, np.float32) for name, spec in registry.layout(entry).items()}
    tensors["criterion.empty_weight"] = np.ones(entry.config["num_classes"] + 1, np.float32)
    tensors["criterion.empty_weight"][-1] = entry.config["criterion"]["no_object_weight"]
    return tensors


@pytest.fixture(scope="session")
def tiny():
    """The entry of a small panoptic model."""
    return registry.entry("tiny_panoptic")


@pytest.fixture
def tensors(tiny):
    """v2 name → tensor of the tiny model; a test may change it."""
    return random_tensors(tiny)


@pytest.fixture
def checkpoint_file(tmp_path):
    """Writes tensors (v2 names) as a pickle, v1 key layout unless told otherwise, and returns its path."""

    def write(tensors, key_layout="v1", name="model_final.pkl", protocol=4):
        path = tmp_path / name
        model = {registry.v1_key(key) if key_layout == "v1" else key: value for key, value in tensors.items()}
        path.write_bytes(pickle.dumps({"model": model, "__author__": "a test"}, protocol))
        return path

    return write


@pytest.fixture
def torch_zip():
    """Writes tensors as ``torch.save({"model": tensors}, path)`` would, without PyTorch."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    def write(tensors, path):
        model = b""
        with zipfile.ZipFile(path, "w") as archive:
            for key, (name, tensor) in enumerate(tensors.items()):
                kind = {"float32": "FloatStorage", "int64": "LongStorage"}[tensor.dtype.name]
                stored = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(str(key)) + text("cpu") + numbers([tensor.size])[1:-1]
                strides = [stride // tensor.itemsize for stride in tensor.strides]
                arguments = b"(" + stored + b"tQJ" + bytes(4) + numbers(tensor.shape) + numbers(strides) + b"\x89}t"
                model += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
                archive.writestr(f"archive/data/{key}", tensor.tobytes())
            archive.writestr("archive/data.pkl", b"\x80\x02}" + text("model") + b"}(" + model + b"us.")

    return write
