"""Arrays kept in memory up to a limit and in a file beyond it."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

from parity import spool
from parity.spool import Spool


@pytest.mark.parametrize(("kept_bytes", "kept"), [(None, {"a", "b", "c", "d", "e"}), (0, set()), (200, {"a", "c", "d", "e"})])
def test_what_does_not_fit_is_in_the_file_and_reads_the_same(tmp_path, kept_bytes, kept):
    arrays = {
        "a": np.arange(10.0),
        "b": np.arange(600, dtype=np.float32).reshape(20, 30).T,
        "c": np.array(3, np.int64),
        "d": np.ones((2, 3), bool),
        "e": np.arange(200, 203).astype(ml_dtypes.bfloat16),
    }
    with Spool(kept_bytes, tmp_path) as spooled:
        for name, array in arrays.items():
            spooled.write("taps", name, array)
        spooled.write("other", "a", np.zeros((0, 4)))
        in_file = sum(array.nbytes for name, array in arrays.items() if name not in kept)
        assert spooled._file.seek(0, 2) == in_file
        for name, array in list(arrays.items())[::-1]:
            read = spooled.read("taps", name)
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(read, array)
            assert (read is array) == (name in kept)
        group = spooled.group("taps")
        assert (list(group), len(group), "b" in group, "z" in group) == (list(arrays), 5, True, False)
        np.testing.assert_array_equal(group["b"], arrays["b"])
        assert spooled.read("other", "a").shape == (0, 4)
        assert list(tmp_path.iterdir()) == []  # the file has no name, so nothing can be left behind
        with pytest.raises(KeyError):
            spooled.read("taps", "z")


def test_the_file_is_there_as_long_as_a_group_is_used_and_is_closed_behind_it():
    spooled = Spool(0)
    spooled.write("taps", "a", np.arange(3.0))
    group, file = spooled.group("taps"), spooled._file
    del spooled
    np.testing.assert_array_equal(group["a"], np.arange(3.0))
    del group
    assert file.closed


def test_the_array_on_disk_is_a_copy():
    array = np.zeros(3)
    with Spool(0) as spooled:
        spooled.write("taps", "a", array)
        array += 1
        assert not spooled.read("taps", "a").any()


@pytest.mark.parametrize("text", ["", "6 apples", "-1", "6GB more", "GB"])
def test_amounts_that_are_none(text):
    with pytest.raises(ValueError, match="is no amount of memory; expected a number of bytes, or for example 6GB"):
        spool.parse_bytes(text)


def test_a_budget_takes_another_allocator_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    spool.prepare(6 * 10**9)
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1"
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS")
    spool.prepare(None)
    assert "TF_ENABLE_ONEDNN_OPTS" not in os.environ
    spool.prepare(6 * 10**9)
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "0"


def test_more_than_the_budget_is_said():
    assert spool.peak_bytes() > 10_000_000  # a Python with NumPy
    assert spool.over_budget(None) is None
    assert spool.over_budget(1 << 50) is None
    assert "more than the budget of 0.00 GB" in spool.over_budget(1000)
