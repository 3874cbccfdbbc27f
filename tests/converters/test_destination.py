"""Directories that appear whole: names, locks, leftovers."""

from __future__ import annotations

import os

import pytest

from converters.destination import Destination
from converters.errors import ConversionError
from tfmaskformer.destination import exchange

OWN = ("manifest.json", "data")


def make(path, text, force=False):
    target = Destination(path, force, OWN)
    with target.staging() as directory:
        for name in OWN:
            (directory / name).write_text(text)
        target.commit(directory)


def read(path):
    return [(path / name).read_text() for name in sorted(os.listdir(path))]


def test_nothing_is_there_until_the_commit(tmp_path):
    target = Destination(tmp_path / "out", False, OWN)
    with target.staging() as directory:
        assert directory.parent == tmp_path
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == []


def test_the_result_has_the_usual_permissions(tmp_path):
    make(tmp_path / "out", "new")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_exchange_swaps_in_one_step(tmp_path):
    make(tmp_path / "a", "a")
    make(tmp_path / "b", "b")
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert read(tmp_path / "a") == ["b", "b"]
    assert read(tmp_path / "b") == ["a", "a"]


def test_a_second_run_sees_the_first(tmp_path):
    with Destination(tmp_path / "out", False, OWN).staging() as directory:
        with pytest.raises(ConversionError, match=r"another conversion into '.*/out' is running"):
            make(tmp_path / "out", "second")
        assert directory.is_dir()
        make(tmp_path / "out2", "other name")


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(ConversionError, match=r"exists\n  choose another --dst, or add --force"):
        make_while(tmp_path / "out", lambda: make_foreign(tmp_path / "out"))
    assert read(tmp_path / "out") == ["other", "other"]
    assert os.listdir(tmp_path) == ["out"]


def make_foreign(path):
    path.mkdir()
    for name in OWN:
        (path / name).write_text("other")


def make_while(path, event):
    target = Destination(path, False, OWN)
    with target.staging() as directory:
        (directory / OWN[0]).write_text("new")
        event()
        target.commit(directory)


def test_leftovers_of_killed_runs_are_removed_and_others_are_not(tmp_path):
    for name in (".out.converting-1", ".out2.converting-1", ".o[u]t.converting-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text("half")
    make(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path)) == [".o[u]t.converting-1", ".out2.converting-1", "out"]
    make(tmp_path / "o[u]t", "new")
    assert sorted(os.listdir(tmp_path)) == [".out2.converting-1", "o[u]t", "out"]


def test_a_replacement_that_was_killed_between_two_renames_is_undone(tmp_path):
    """Only where the system cannot exchange names: the old directory was moved away, the new one not yet into place."""
    make(tmp_path / ".out.replaced-1", "old")
    (tmp_path / ".out.converting-1").mkdir()
    with pytest.raises(ConversionError, match=r"exists\n  choose another --dst, or add --force"):
        make(tmp_path / "out", "new")
    assert read(tmp_path / "out") == ["old", "old"]
    make(tmp_path / "out", "new", force=True)
    assert read(tmp_path / "out") == ["new", "new"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_replacement_that_was_killed_before_the_old_was_removed(tmp_path):
    make(tmp_path / "out", "new")
    make(tmp_path / ".out.replaced-1", "old")
    make(tmp_path / "out", "newer", force=True)
    assert read(tmp_path / "out") == ["newer", "newer"]
    assert os.listdir(tmp_path) == ["out"]
