"""Traces: what is written is read; what is damaged, foreign or half done is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest

from parity import trace
from parity.sampling import sample_indices
from parity.trace import Trace, TraceError, TraceFile, TraceFileWriter, relative_error, statistics

RUNS = ("contiguous", "channels_last")


@pytest.fixture
def tensors():
    random = np.random.default_rng(0)
    return {
        ("inputs", "images/0"): random.integers(0, 256, (5, 7, 3), np.uint8),
        ("inputs", "targets/0/labels"): np.array([3, 1], np.int64),
        ("inputs", "targets/0/masks"): random.random((2, 5, 7)) > 0.5,
        ("taps", "backbone.stem.conv1#0"): random.standard_normal((1, 8, 20, 30)),
        ("taps", "sem_seg_head.predictor.class_embed#0"): random.standard_normal((2, 3)).astype(np.float32),
        ("matcher", "final/0/gap"): np.array(0.25),
        ("matcher", "final/0/total"): random.standard_normal((30, 4)),
        ("inference", "0/segments"): np.zeros((0, 3), np.int64),
        ("inference", "0/panoptic_seg"): random.integers(0, 4, (5, 7), np.int32),
    }


def write(directory, tensors, samples=None, case="photo", dtype="float64", facts=None):
    with TraceFileWriter(directory, case, dtype, runs=RUNS, samples=samples, facts=facts or {"key": "k"}) as writer:
        for (group, name), tensor in tensors.items():
            writer.add(group, name, tensor)
        writer.set_floor("taps", "backbone.stem.conv1#0", (1e-7, 2e-7))
    return writer.path


def test_full_round_trip_keeps_everything(tmp_path, tensors):
    with TraceFile(write(tmp_path, tensors, facts={"key": "k", "silent": ["a"]})) as file:
        assert (file.case, file.dtype, file.runs, file.facts) == ("photo", "float64", RUNS, {"key": "k", "silent": ["a"]})
        assert list(file.records) == list(tensors)
        for (group, name), tensor in tensors.items():
            read = file.read(group, name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            np.testing.assert_array_equal(read, tensor)
            np.testing.assert_array_equal(file[group, name].select(tensor), tensor)
        conv = file["taps", "backbone.stem.conv1#0"]
        assert conv.floor == (1e-7, 2e-7)
        assert all(math.isnan(error) for error in file["taps", "sem_seg_head.predictor.class_embed#0"].floor)
        assert list(file.group("inference")) == ["0/segments", "0/panoptic_seg"]


def test_sampled_round_trip_keeps_samples_and_exact_statistics(tmp_path, tensors):
    full = tensors["taps", "backbone.stem.conv1#0"]
    path = write(tmp_path, tensors, samples=16)
    with TraceFile(path) as file:
        record = file["taps", "backbone.stem.conv1#0"]
        assert (record.samples, record.stored, record.size) == (16, 16, full.size)
        expected = full.ravel()[sample_indices(record.name, full.shape, 16)]
        np.testing.assert_array_equal(file.read("taps", record.name), expected)
        np.testing.assert_array_equal(record.select(full), expected)
        transposed_view = np.ascontiguousarray(full.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)  # as a channels_last tensor arrives
        np.testing.assert_array_equal(record.select(transposed_view), expected)
        assert record.statistics == statistics(full)
        figures, sums = record.statistics_and_sketch(full)
        assert figures == statistics(full)
        np.testing.assert_array_equal(file.read_sketch("taps", record.name), sums)
        for key, tensor in tensors.items():  # small tensors, integers and the matcher are whole
            if key != ("taps", record.name):
                np.testing.assert_array_equal(file.read(*key), tensor)
        with pytest.raises(TraceError, match=r"expected shape \(1, 8, 20, 30\), got \(1, 20, 30, 8\)"):
            record.select(full.transpose(0, 2, 3, 1))


def test_statistics_are_exact_and_count_what_is_not_finite():
    values = np.array([[1.0, -2.0], [np.nan, np.inf]], np.float32)
    assert statistics(values) == (math.sqrt(5), -1.0, -2.0, 1.0, 2)
    assert statistics(np.zeros((0, 3))) == (0.0, 0.0, 0.0, 0.0, 0)
    assert statistics(np.array([True, False, True])) == (math.sqrt(2), 2.0, 0.0, 1.0, 0)
    small = np.full(1 << 14, 0.1, np.float32)  # float32 accumulation would be off in the 6th digit
    assert statistics(small).sum == pytest.approx((1 << 14) * float(np.float32(0.1)), rel=1e-12)


def test_relative_error():
    assert relative_error(np.float32([0, 0]), np.zeros(2)) == 0
    assert relative_error(np.array([1e-9, 0]), np.zeros(2)) == math.inf
    assert relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1, rel=1e-15)
    assert math.isnan(relative_error(np.array([np.nan]), np.ones(1)))


def test_an_exception_leaves_no_file(tmp_path, tensors):
    with pytest.raises(TraceError), TraceFileWriter(tmp_path, "photo", "float64", runs=RUNS, samples=None, facts={}) as writer:
        writer.add("no group", "a#0", np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_file_under_its_name_and_does_not_block_the_next_try(tmp_path, tensors):
    program = f"""
import numpy as np, os, signal
from parity.trace import TraceFileWriter
with TraceFileWriter({str(tmp_path)!r}, "photo", "float64", runs=("a",), samples=None, facts={{}}) as writer:
    writer.add("taps", "a#0", np.zeros(100000))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["photo.float64.h5.partial"]
    with pytest.raises(TraceError, match="no trace file"):
        TraceFile(trace.file_path(tmp_path, "photo", "float64"))
    write(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.float64.h5"]


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, -1])
def test_truncated_files_are_refused(tmp_path, tensors, keep):
    path = write(tmp_path, tensors)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(TraceError, match="truncated"):
        TraceFile(path)


def test_a_flipped_bit_in_the_values_is_noticed(tmp_path, tensors):
    path = write(tmp_path, tensors)
    pattern = tensors["taps", "backbone.stem.conv1#0"].tobytes()[:64]
    content = bytearray(path.read_bytes())
    content[content.index(pattern)] ^= 1
    path.write_bytes(content)
    with TraceFile(path) as file, pytest.raises(TraceError, match=r"damaged at taps 'backbone\.stem\.conv1#0'"):
        file.read("taps", "backbone.stem.conv1#0")


def test_foreign_and_other_version_files_are_refused(tmp_path, tensors):
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["x"] = 1
    with pytest.raises(TraceError, match="is no trace"):
        TraceFile(foreign)
    path = write(tmp_path, tensors)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 1
    with pytest.raises(TraceError, match="version 1, expected 3; record it again"):
        TraceFile(path)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = trace.VERSION
        del file["floor"]
    with pytest.raises(TraceError, match="damaged"):
        TraceFile(path)


def test_what_cannot_be_recorded_is_refused(tmp_path):
    with TraceFileWriter(tmp_path, "photo", "float64", runs=RUNS, samples=None, facts={}) as writer:
        writer.add("taps", "a#0", np.zeros(3))
        for group, name, array in [("taps", "a#0", np.zeros(3)), ("tap", "b#0", np.zeros(3)), ("taps", "b#0", np.zeros(3, np.complex64))]:
            with pytest.raises(TraceError, match=r"record .*'[ab]#0'"):
                writer.add(group, name, array)
        with pytest.raises(TraceError, match="no record taps 'b#0'"):
            writer.set_floor("taps", "b#0", np.zeros((2, 2)))
    with pytest.raises(TraceError, match=r"case name '\.\./x'"):
        trace.file_path(tmp_path, "../x", "float64")
    with pytest.raises(TraceError, match="cannot write"):
        TraceFileWriter(tmp_path / "absent", "photo", "float64", runs=RUNS, samples=None, facts={})


def test_a_trace_opens_its_cases(tmp_path, tensors):
    write(tmp_path, tensors)
    write(tmp_path, {key: value for key, value in tensors.items() if key[0] == "taps"}, dtype="float32")
    trace.write_manifest(tmp_path, {"seed": 0}, {"photo": {"images": []}})
    recorded = Trace(tmp_path)
    assert (recorded.cases, recorded.provenance) == (("photo",), {"seed": 0})
    for case in recorded:
        np.testing.assert_array_equal(case.images[0], tensors["inputs", "images/0"])
        np.testing.assert_array_equal(case.targets[0]["masks"], tensors["inputs", "targets/0/masks"])
        assert (case.baseline.dtype, len(case.images), len(case.targets)) == ("float32", 1, 1)
    with pytest.raises(TraceError, match="no case 'other'; it has photo"):
        recorded.case("other")


def test_files_of_two_recordings_do_not_mix(tmp_path, tensors):
    write(tmp_path, tensors)
    write(tmp_path, tensors, dtype="float32", facts={"key": "other"})
    trace.write_manifest(tmp_path, {}, {"photo": {}})
    with pytest.raises(TraceError, match="key other, expected k; record both again"):
        Trace(tmp_path).case("photo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no manifest.json"),
        ("{", "cannot read"),
        ("[]", "no trace's manifest"),
        (json.dumps({"format": "other"}), "no trace's manifest"),
        (json.dumps({"format": trace.FORMAT, "version": 99}), "version 99, expected 3"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(TraceError, match=message):
        Trace(tmp_path)
