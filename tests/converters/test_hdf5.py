"""HDF5 files are listed by a process of its own: what happens to it is told, and does not happen here."""

from __future__ import annotations

import ast
import mmap
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from converters import hdf5, hdf5_listing
from converters.errors import ConversionError

ROOT = Path(__file__).parent.parent.parent


def read(path):
    data = mmap.mmap(-1, path.stat().st_size)
    data.write(path.read_bytes())
    return hdf5.read(path, data)


@pytest.fixture
def path(tmp_path):
    """A file with a dataset of each kind that is read."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["group/matrix"] = np.arange(6, dtype=np.float32).reshape(2, 3)
        file["empty"] = np.zeros((0, 2), np.float16)
        file["scalar"] = np.int64(7)
        file["flags"] = np.array([True, False])
        file["big"] = np.array([1.5], ">f8")
        file.attrs["format"] = "x"
        file.attrs["number"] = 3
    return tmp_path / "a.h5"


def test_datasets_are_views(path):
    found = read(path)
    assert found.attributes == {"format": "x"}
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {
        "group/matrix": [[0, 1, 2], [3, 4, 5]],
        "empty": [],
        "scalar": 7,
        "flags": [True, False],
        "big": [1.5],
    }
    assert found.tensors["group/matrix"].dtype == np.float32
    assert found.tensors["empty"].shape == (0, 2)


REFUSED = {
    "a link": (lambda file: file.__setitem__("link", h5py.SoftLink("/etc")), "'link' is a link"),
    "a link to a file": (lambda file: file.__setitem__("link", h5py.ExternalLink("/etc/passwd", "/")), "'link' is a link"),
    "two names": (lambda file: file.__setitem__("again", file["group/matrix"]), "is there under two names"),
    "a group in itself": (lambda file: file["group"].__setitem__("again", file["group"]), "is there under two names"),
    "compression": (lambda file: file.create_dataset("z", data=np.zeros(99), compression="gzip"), "'z' is compressed"),
    "another file": (
        lambda file: file.create_dataset("z", (4,), "u1", external=[("/etc/passwd", 0, 4)]),
        "'z' is .* stored in another file",
    ),
    "text": (lambda file: file.__setitem__("z", "text"), "'z' has elements of type"),
    "records": (lambda file: file.__setitem__("z", np.zeros(2, [("x", "f4")])), "'z' has elements of type"),
    "no shape": (lambda file: file.__setitem__("z", h5py.Empty("f4")), "'z' is an empty dataset without a shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, path):
    change, message = REFUSED[name]
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(ConversionError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", "damaged: the library that reads it ended with -11"),
        ("while True: pass", "damaged: it took too long"),
        ("bytes(1 << 32)", "damaged"),
    ],
)
def test_a_failure_of_the_library_is_told(fault, message, path, tmp_path, monkeypatch):
    script = tmp_path / "listing.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom converters import hdf5_listing\n"
        f"def listing(path):\n    {fault}\nhdf5_listing.listing, hdf5_listing.MAX_CPU_S = listing, 1\nhdf5_listing.main()"
    )
    monkeypatch.setattr(hdf5_listing, "__file__", str(script))
    with pytest.raises(ConversionError, match=message):
        read(path)


def test_h5py_is_found_where_this_process_found_it(path, tmp_path, monkeypatch):
    """As where PYTHONPATH or ~/.local holds it, which an isolated Python does not read; a current folder is not handed on."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "only_here.py").touch()
    (tmp_path / "in_the_current_folder.py").touch()
    script = tmp_path / "listing.py"
    script.write_text("import json, sys, only_here\nattributes = {'argv': sys.argv[1], 'path': repr(sys.path)}\n")
    with script.open("a") as file:
        file.write("json.dump({'tensors': [('a', '<f4', [0], None)], 'attributes': attributes}, sys.stdout)")
    monkeypatch.setattr(hdf5_listing, "__file__", str(script))
    with pytest.raises(ConversionError, match=r"cannot be listed: ModuleNotFoundError: No module named 'only_here'\n  try: .*import h5py"):
        read(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", ".", str(place), *sys.path])
    found = read(path)
    assert found.attributes["argv"] == str(path)
    assert str(place) in found.attributes["path"]
    assert not {"", "."} & set(ast.literal_eval(found.attributes["path"]))
    script.write_text("import in_the_current_folder")
    with pytest.raises(ConversionError, match="No module named 'in_the_current_folder'"):
        read(path)
