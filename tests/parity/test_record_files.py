"""What :func:`parity.record.write` makes of any model's tensors, and that it goes on where it was broken off. Needs no PyTorch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from parity import record, trace
from parity.meta_architectures import RecordError
from parity.trace import Trace

SAMPLES = {"whole": {"float64": None, "float32": None}, "sampled": {"float64": 8, "float32": 8}, "mixed": {"float64": None, "float32": 8}}
RUN_NAMES = ("contiguous+onednn", "contiguous", "channels_last+onednn", "channels_last")


def emit_all(run, emit, seed=0):
    """A model that is off by another amount in each way to run it."""
    values = np.random.default_rng(seed).standard_normal((3, 40))
    step = 1e-7 * (1 + RUN_NAMES.index(run.name)) if run.dtype == "float32" else 0 if run == record.REFERENCE else 1e-15
    tensors = {
        ("taps", "a#0"): values,
        ("taps", "b#0"): values[:, :4],
        ("matcher", "final/0/total"): np.abs(values[:, :2]),
        ("losses", "total"): values.sum(),
        ("tap_gradients", "a#0"): 2 * values,
        ("gradients", "a.weight"): values.T,
    }
    for (group, name), tensor in tensors.items():
        emit(group, name, (np.asarray(tensor) * (1 + step)).astype(run.dtype))
    emit("matcher", "final/0/assignment", np.array([0, 2]))
    return {"b#0": "the loss does not depend on it"}


def write(directory, samples, run=emit_all, runs=None, cases=("one", "two")):
    def run_of(name):
        def once(run_, emit):
            if runs is not None:
                runs.append((name, run_.dtype, run_.name))
            return run(run_, emit)

        return once

    inputs = {name: {"images/0": np.zeros((2, 2, 3), np.uint8)} for name in cases}
    return record.write(directory, {"seed": 0}, {name: {"images": [name]} for name in cases}, inputs, run_of, SAMPLES[samples], ["x"])


@pytest.mark.parametrize("samples", SAMPLES)
def test_files_hold_the_reference_the_baseline_and_the_errors_of_all_runs(tmp_path, samples):
    recorded = write(tmp_path, samples)
    assert recorded.cases == ("one", "two")
    with recorded.case("one") as case:
        assert case.reference.facts["without_gradient"] == {"b#0": "the loss does not depend on it"}
        assert list(case.reference.group("tap_gradients")) == ["a#0"]
        for file, wanted in ((case.reference, SAMPLES[samples]["float64"]), (case.baseline, SAMPLES[samples]["float32"])):
            for key in (("taps", "a#0"), ("tap_gradients", "a#0"), ("gradients", "a.weight")):
                assert file[key].samples == wanted
            assert file["taps", "b#0"].samples is None if wanted is None else file["taps", "b#0"].samples == 8
        floor = case.baseline["taps", "a#0"].floor
        assert floor == pytest.approx([1e-7, 2e-7, 3e-7, 4e-7], rel=0.5)
        assert case.reference["taps", "a#0"].floor == pytest.approx([1e-15], abs=1e-15)
        assert float(case.reference.read("matcher", "final/0/gap")) == record.assignment_gap(
            case.reference.read("matcher", "final/0/total")
        )
        assert 0 < float(case.baseline.read("matcher", "final/0/cost_noise")) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        *(f"{case}.float{bits}.h5" for case in ("one", "two") for bits in (32, 64)),
    ]


KILLER = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import test_record_files as tests
def run(run, emit):
    def stop(group, name, array):
        emit(group, name, array)
        if (run.dtype, run.name, group) == ({dtype!r}, {name!r}, "losses"):
            os.kill(os.getpid(), signal.SIGKILL)
    return tests.emit_all(run, stop)
tests.write({directory!r}, {samples!r}, run, cases=("one",))
"""


@pytest.mark.parametrize(
    ("samples", "dtype", "name"),
    [
        ("whole", "float64", "contiguous+onednn"),
        ("sampled", "float64", "channels_last+onednn"),
        *((samples, "float32", "contiguous") for samples in SAMPLES),
    ],
)
def test_a_killed_recording_goes_on_with_the_first_file_that_is_not_complete(tmp_path, samples, dtype, name):
    whole = {path.name: path.read_bytes() for path in write(tmp_path / "whole", samples, cases=("one",)).directory.glob("*.h5")}
    directory = tmp_path / "killed"
    program = KILLER.format(tests=os.path.dirname(__file__), directory=str(directory), samples=samples, dtype=dtype, name=name)
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    complete = ["one.float64.h5"] if dtype == "float32" else []
    assert [path.name for path in directory.glob("*.h5")] == complete
    before = [(directory / path).stat().st_mtime_ns for path in complete]
    runs = []
    write(directory, samples, runs=runs, cases=("one",))
    assert [(directory / path).stat().st_mtime_ns for path in complete] == before
    assert {path.name: path.read_bytes() for path in directory.glob("*.h5")} == whole
    again = [("one", "float64", "contiguous+onednn")] * (dtype == "float64" or samples == "sampled")  # the whole reference is in no file
    again += [("one", "float64", "channels_last+onednn")] * (dtype == "float64")
    assert runs == again + [("one", "float32", name) for name in RUN_NAMES]
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "one.float32.h5", "one.float64.h5"]
    runs.clear()
    write(directory, samples, runs=runs, cases=("one",))
    assert runs == []


def test_files_of_other_inputs_are_recorded_again(tmp_path):
    write(tmp_path, "whole", cases=("one",))
    runs = []

    def run_of(name):
        return lambda run, emit: runs.append(run.name) or emit_all(run, emit)

    for hashed, again in (("one", 0), ("other", 6)):
        record.write(tmp_path, {"seed": 0}, {"one": {"images": [hashed]}}, {"one": {}}, run_of, SAMPLES["whole"], [])
        assert len(runs) == again


def test_a_float64_file_of_other_values_is_not_gone_on_with(tmp_path):
    write(tmp_path, "sampled", cases=("one",))
    (tmp_path / "one.float32.h5").unlink()
    with pytest.raises(RecordError, match=r"taps 'a#0' is not what '.*one\.float64\.h5' was recorded of; delete that file"):
        write(tmp_path, "sampled", lambda run, emit: emit_all(run, emit, seed=1), cases=("one",))
    assert not (tmp_path / "one.float32.h5").exists()


def test_runs_that_have_other_tensors_are_refused(tmp_path):
    def more(run, emit):
        if run.dtype == "float32":
            emit("taps", "c#0", np.zeros(3, np.float32))
        return emit_all(run, emit)

    def fewer(run, emit):
        def drop(group, name, array):
            if (run.dtype, name) != ("float32", "b#0"):
                emit(group, name, array)

        return emit_all(run, drop)

    for run, message in (
        (more, r"taps 'c#0' of float32 contiguous\+onednn is not in the reference"),
        (fewer, "lacks what the reference has"),
    ):
        with pytest.raises(RecordError, match=message):
            write(tmp_path / message[:5], "whole", run)


def test_the_bits_of_the_second_pass_are_compared():
    emitted = []
    bits = record.Bits(lambda *record_: emitted.append(record_), "here")
    bits.remember("outputs", "b", np.ones((), ml_dtypes.bfloat16))
    bits.compare("outputs", "b", np.ones((), ml_dtypes.bfloat16))
    array = np.arange(6.0).reshape(2, 3).T
    bits.remember("outputs", "a", array)
    bits.compare("outputs", "a", array.copy())
    assert len(emitted) == 2
    with pytest.raises(RecordError, match="here: without taps, outputs 'a' has other bits"):
        bits.compare("outputs", "a", np.nextafter(array, np.inf, where=array == 5, out=array.copy()))


def test_a_trace_that_was_recorded_otherwise_is_not_touched(tmp_path):
    write(tmp_path, "whole")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(trace.TraceError, match="holds a trace with other seed; give another folder"):
        record.write(tmp_path, {"seed": 1}, {"one": {}}, {"one": {}}, lambda name: emit_all, SAMPLES["whole"], [])
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert Trace(tmp_path).cases == ("one", "two")
