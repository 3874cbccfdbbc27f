"""The malicious corpus: nothing is run, each file is refused with a clear error, in bounded memory and time."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from converters import unpickle
from converters.errors import ConversionError
from converters.torch_zip import read_zip
from converters.unpickle import read_model
from tests.converters.corpus import LONE_STORAGE, PICKLES

KINDS = {f"{group}: {name}": data for group, kinds in PICKLES.items() for name, data in kinds.items()}
MAGIC = LONE_STORAGE[: LONE_STORAGE.index(b"\x80\x02(")]


def plain(data):
    """The pickle alone; like those below: what reads it."""
    return lambda: read_model(data)


def archive(data):
    """As the pickle in a file of ``torch.save``."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(16))
    content = file.getvalue()
    memory = mmap.mmap(-1, len(content))
    memory.write(content)
    return lambda: read_zip(memory)


def before_1_6(data):
    """As the fourth pickle of an old file of ``torch.save``."""
    return lambda: read_model(MAGIC + data + pickle.dumps([], 2))


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
    for protocol in (0, 2):
        for file in (plain, archive):
            file(pickle.dumps({"a": np.arange(256, dtype=np.uint8)}, protocol))()  # imports codecs


@pytest.mark.parametrize("file", [plain, archive, before_1_6])
@pytest.mark.parametrize("name", KINDS)
def test_malicious_pickles_run_nothing(name, file, audit, tmp_path, monkeypatch):
    global WATCHED
    monkeypatch.chdir(tmp_path)
    data = KINDS[name]
    read = file(data)
    start_s = time.process_time()
    tracemalloc.start()
    WATCHED = []
    try:
        with pytest.raises(ConversionError) as refused:
            read()
        events = WATCHED
    finally:
        WATCHED = None
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert events == []
    assert list(tmp_path.iterdir()) == []
    assert peak_bytes < 65_536 + 200 * len(data)
    assert time.process_time() - start_s < 5
    assert len(str(refused.value)) < 1500


def test_the_audit_sees_what_pickle_would_run(audit, tmp_path, monkeypatch):
    global WATCHED
    monkeypatch.chdir(tmp_path)
    WATCHED = []
    try:
        pickle.loads(KINDS["os.system and its like: os.mkdir"])
        events = WATCHED
    finally:
        WATCHED = None
    assert any(event.startswith("os.mkdir") for event in events)
    assert os.listdir(tmp_path) == ["was-run"]


def test_every_operation_is_counted(monkeypatch):
    monkeypatch.setattr(unpickle, "MAX_OPERATIONS", 1000)
    with pytest.raises(ConversionError, match="more than 1000 operations, at byte 999"):
        read_model(1000 * b"]" + b".")
