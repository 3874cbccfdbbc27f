"""Where a command may write, and that what it writes is whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tfmaskformer.cli import BAD_INPUT, COULD_NOT_RUN, OutputError, require_writable, write_whole


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old").write_text("before")
    Path("a").mkdir()
    Path("link").symlink_to("a/new")
    return tmp_path


@pytest.mark.parametrize("path", [None, "-", "new", "a/new", "old", Path("old"), "link", "/dev/null", "x" * 255])
def test_files_that_can_be_written(folder, path):
    require_writable(path)
    if path not in (None, "-"):
        write_whole(path, "after")
        assert path == "/dev/null" or Path(path).read_text() == "after"
    assert sum(len(names) for _, _, names in os.walk(".")) <= 3  # nothing lies beside it


@pytest.mark.parametrize("path", [None, "-", "a", "a/b/c", "new"])
def test_folders_that_can_be_made(folder, path):
    require_writable(path, folder=True)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("path", "is_folder", "told"),
    [
        ("nowhere/x.json", False, r"cannot write 'nowhere/x.json': there is no folder '.*/nowhere'; give another place"),
        ("a", False, "it is a folder, expected a file"),
        ("", False, "it is a folder"),
        ("old/x.json", False, "there is no folder '.*/old'"),
        ("old", True, "'.*/old' is no folder"),
        ("old/x", True, "'.*/old' is no folder"),
    ],
)
def test_what_cannot_be_written_is_told_before(folder, path, is_folder, told):
    with pytest.raises(OutputError, match=told) as raised:
        require_writable(path, folder=is_folder)
    assert raised.value.exit_code == BAD_INPUT


def test_permission_is_needed_of_the_file_and_of_its_folder(folder, monkeypatch):
    for locked in ("old", "."):
        monkeypatch.setattr(os, "access", lambda path, mode, locked=locked: not os.path.samefile(path, locked))
        with pytest.raises(OutputError, match="no permission"):
            require_writable("old")
    require_writable("a/b", folder=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="no permission"):
        require_writable("a/b", folder=True)


def test_a_file_is_never_seen_in_part(folder, monkeypatch):
    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(os.listdir())
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="cannot write 'old': No space left on device; give another place") as raised:
        write_whole("old", "after")
    assert raised.value.exit_code == COULD_NOT_RUN
    assert Path("old").read_text() == "before"
    assert sorted(os.listdir()) == before


def test_a_link_stays_one_and_special_files_stay_what_they_are(folder):
    write_whole("link", b"after")
    assert Path("link").is_symlink()
    assert Path("a/new").read_text() == "after"
    with pytest.raises(OutputError, match="No space left on device"):
        write_whole("/dev/full", "after")
    assert Path("/dev/full").is_char_device()
