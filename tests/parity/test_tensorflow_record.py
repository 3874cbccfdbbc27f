"""Recording with TensorFlow, comparing two recordings without either framework, and low precisions against a CPU's."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import jsonschema
import numpy as np
import pytest

from checkpoints import registry, synthesize
from parity import check, cli, recorded, regression, report, tensorflow_record
from parity.inputs import InputError
from parity.tensorflow_record import Precision, copy_inputs, record_tensorflow, rounded_products
from parity.trace import Trace, TraceError, TraceFile, file_path

REFERENCE = Path(__file__).parents[1] / "golden" / "selftest" / "tiny_swin_4"
CASE = "one"
PRECISIONS = {
    "float32": Precision(),
    "float64": Precision("float64"),
    "bfloat16": Precision("bfloat16"),
    "tf32": Precision(products="tf32"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The converted checkpoint ``ckpt``, the reference's ``inputs``, and one recording for each of PRECISIONS."""
    from converters.convert import convert

    folder = tmp_path_factory.mktemp("recordings")
    synthesize.write_pickle(synthesize.synthesize(registry.entry("tiny_swin"), 4), folder / "model_final.pkl")
    convert(folder / "model_final.pkl", folder / "ckpt", config="tiny_swin")
    copy_inputs(REFERENCE, folder / "inputs")
    for name, precision in PRECISIONS.items():
        record_tensorflow(folder / "ckpt", folder / "inputs", folder / name, precision=precision, mode="eager", command=["x"])
    return folder


def compare(folder, name, *baselines, reference=REFERENCE):
    settings = check.Settings(str(folder / name), str(reference), all_stages=True)
    return recorded.check_recorded(
        str(folder / name), str(reference), [str(folder / one) for one in baselines], settings, lambda step: None
    )


def failures(result):
    [case] = result.cases
    return {(item.group, item.name) for item in case.items if not item.passed}


def changed(folder, name, copy, group, tensor, change):
    """A copy of a recording in which one tensor is another."""
    shutil.copytree(folder / name, copy)
    dtype = PRECISIONS[name].dtype
    with TraceFile(file_path(copy, CASE, dtype)) as file:
        record = file[group, tensor]
    with h5py.File(file_path(copy, CASE, dtype), "r+") as file:
        place = slice(record.offset, record.offset + record.size)
        file[f"values/{record.dtype}"][place] = change(file[f"values/{record.dtype}"][place])
    return copy.name


TAP = "backbone.layers.1.blocks.0.attn.qkv#0"


def test_a_copy_of_the_inputs_has_no_results(folder):
    with Trace(folder / "inputs").case(CASE) as copy, Trace(REFERENCE).case(CASE) as whole:
        assert copy.resized_px == whole.resized_px
        np.testing.assert_array_equal(copy.images[0], whole.images[0])
        assert copy.targets[0].keys() == whole.targets[0].keys()
        assert {group for group, _ in copy.reference.records} == {"inputs", "taps", "matcher"}
        assert list(copy.reference.group("taps")) == ["sem_seg_head.predictor.pe_layer#0"]
        assert {name.rpartition("/")[2] for name in copy.reference.group("matcher")} == {"assignment", "gap"}
        assert {name.rpartition("/")[2] for name in copy.baseline.group("matcher")} == {"assignment", "cost_noise"}
    with pytest.raises(TraceError, match="is not empty; give another folder"):
        copy_inputs(REFERENCE, folder / "inputs")


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_recording_has_the_official_names_shapes_and_everything_whole(folder, name):
    trace = Trace(folder / name)
    assert trace.provenance["device"]["kind"] == "cpu"
    with TraceFile(file_path(folder / name, CASE, PRECISIONS[name].dtype)) as file, Trace(REFERENCE).case(CASE) as case:
        norm = "sem_seg_head.predictor.transformer.decoder.norm"  # TensorFlow does not norm the last layer's output twice
        for group in ("taps", "outputs", "losses", "tap_gradients", "gradients", "inference"):
            expected = {key: record.shape for key, record in case.reference.group(group).items()}
            found = {key: record.shape for key, record in file.group(group).items()}
            differing = {key.partition("#")[0] for key in expected.keys() ^ found.keys()}
            assert differing <= ({norm} if "tap" in group else set())
            assert all(found[key] == shape for key, shape in expected.items() if key in found and not key.endswith("/segments"))
        assert {record.samples for record in file.records.values()} == {None}
        floats = {record.dtype for tap, record in file.group("taps").items() if "pe_layer" not in tap}
        assert floats == {"float64" if name == "float64" else "float32"}
        assert bool(file.group("losses_float64")) == (PRECISIONS[name].dtype == "float32")


WITHOUT_FRAMEWORKS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "keras", "torch"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from parity import cli
code = cli.main(sys.argv[1:])
assert not {"tensorflow", "keras", "torch"} & sys.modules.keys()
sys.exit(code)
"""


@pytest.mark.parametrize("command", ["record --framework tensorflow", "inputs"])
def test_help_needs_no_framework(command):
    program = [sys.executable, "-c", WITHOUT_FRAMEWORKS, *command.split(), "--help"]
    done = subprocess.run(program, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: parity-check")


@pytest.mark.parametrize(("name", "passes"), [("float64", True), ("broken", False)])
def test_comparing_needs_neither_framework(folder, tmp_path, name, passes):
    if not passes:
        changed(folder, "float64", folder / name, "taps", TAP, lambda values: values * (1 + 1e-7))
    argv = [
        "--actual",
        str(folder / name),
        "--reference",
        str(REFERENCE),
        "--report",
        str(tmp_path / "report"),
        "--json",
        str(tmp_path / "r"),
    ]
    program = [sys.executable, "-c", WITHOUT_FRAMEWORKS, *argv]
    done = subprocess.run(program, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=180)
    assert done.returncode == (0 if passes else 1), done.stderr
    assert json.loads((tmp_path / "r").read_text())
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert (f"mismatch: first in taps '{TAP}'" in done.stdout) == (not passes)


GROUPS = ("taps", "outputs", "matcher", "losses", "tap_gradients", "gradients", "inference", "variables", "sources")


def errors_of(result, group):
    return {item.name: item.error for item in result.cases[0].items if item.group == group}


def test_a_recording_is_judged_like_a_run(folder):
    settings = check.Settings(str(folder / "ckpt"), str(REFERENCE), ("float64",), mode="eager", all_stages=True)
    direct, apart = check.check(settings), compare(folder, "float64")
    frugal = check.check(dataclasses.replace(settings, gradients=False, memory_budget=100_000))
    assert apart.passed
    assert frugal.passed
    for group in GROUPS:
        wanted, found, less = (errors_of(result, group) for result in (direct, apart, frugal))
        assert wanted
        wanted = {name: error for name, error in wanted.items() if not name.startswith("probe/")}  # which need the model
        assert found.keys() == wanted.keys()
        assert found == pytest.approx({name: wanted[name] for name in found}, abs=0, rel=0, nan_ok=True)
        less = {name: error for name, error in less.items() if not name.startswith("probe/")}
        assert less == pytest.approx({name: wanted[name] for name in less}, abs=0, rel=0, nan_ok=True)
        exempted = {one.name for one in frugal.cases[0].exempted if one.group == group and "asked to leave gradients out" in one.reason}
        if group in ("gradients", "tap_gradients"):
            assert not less
            assert exempted >= wanted.keys()
        elif group in ("variables", "sources"):
            assert less.keys() | exempted == wanted.keys()
        else:
            assert less.keys() == wanted.keys()
    trained = [name for name, is_trained in Trace(folder / "float64").provenance["variables"].items() if is_trained]
    assert {one.name for one in frugal.cases[0].exempted if one.group == "variables"} == set(trained)


def test_float32_is_judged_by_the_official_floors(folder):
    result = compare(folder, "float32")
    assert failures(result) == set()
    item = next(item for item in result.cases[0].items if item.name == TAP and item.group == "taps")
    with Trace(REFERENCE).case(CASE) as case:
        assert item.floor == max(case.baseline["taps", TAP].floor)
    assert not any(np.isnan(item.local) for item in result.cases[0].items if item.group == "losses")


def test_a_low_precision_is_judged_by_a_cpu_run_of_the_same(folder):
    with pytest.raises(check.CheckError, match=r"computed in bfloat16, in which there are no official runs; give --baseline"):
        compare(folder, "bfloat16")
    result = compare(folder, "bfloat16", "bfloat16")
    assert failures(result) == set()
    [case] = result.cases
    assert case.dtype == "bfloat16"
    taps = [item for item in case.items if item.group == "taps" and item.floor > 0]
    assert 1e-4 < np.median([item.floor for item in taps]) < 1e-1
    assert [item.error for item in taps] == [item.floor for item in taps]
    assert failures(compare(folder, "float32", "float32")) == set()
    for found in (result, compare(folder, "tf32", "tf32")):
        told = report.as_dict(found)
        jsonschema.validate(told, json.loads(report.SCHEMA.read_text(encoding="utf-8")))
        assert not regression.regression(told, told, ("A", "B")).regressed


@pytest.mark.parametrize(("name", "factor", "fails"), [("bfloat16", 0.5, False), ("bfloat16", 2.0, True), ("tf32", 2.0, True)])
def test_a_low_precision_that_is_worse_than_a_cpu_run_fails(folder, name, factor, fails):
    with Trace(REFERENCE).case(CASE) as case, TraceFile(file_path(folder / name, CASE, PRECISIONS[name].dtype)) as file:
        floor = recorded._Floors(case, [file], {})["taps", TAP].floor[0]
    signs = np.random.default_rng(0).choice([-1, 1], 1 << 20)
    copy = folder / f"{name}_{factor}"
    changed(folder, name, copy, "taps", TAP, lambda values: values * (1 + factor * floor * signs[: values.size]))
    assert failures(compare(folder, copy.name, name)) == ({("taps", TAP)} if fails else set())


def test_of_several_cpu_runs_the_worst_is_the_floor(folder):
    worse = changed(folder, "bfloat16", folder / "worse", "taps", TAP, lambda values: values * 1.5)
    assert failures(compare(folder, worse, "bfloat16")) == {("taps", TAP)}
    for baselines in (("bfloat16", worse), (worse, "bfloat16")):
        result = compare(folder, worse, *baselines)
        assert failures(result) == set()
        assert errors_of(result, "taps")[TAP] == pytest.approx(0.5, rel=0.2)


def test_ids_that_the_cpu_run_has_wrong_too_are_exempted_by_name(folder):
    name = "final/0/assignment"
    other = changed(folder, "bfloat16", folder / "other_ids", "matcher", name, lambda queries: (queries + 1) % 5)
    assert ("matcher", name) in failures(compare(folder, other, "bfloat16"))
    result = compare(folder, other, other)
    assert ("matcher", name) not in failures(result)
    reasons = [one.reason for one in result.cases[0].exempted if (one.group, one.name) == ("matcher", name)]
    assert reasons == ["a CPU run of the same precision has another result than float64, too"]


def edited(folder, name, copy, **changes):
    shutil.copytree(folder / name, folder / copy)
    path = folder / copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["provenance"] |= changes
    path.write_text(json.dumps(manifest))
    return copy


def test_recordings_that_cannot_be_compared(folder):
    for actual, baselines, message in (
        ("bfloat16", [edited(folder, "bfloat16", "gpu", device={"kind": "gpu", "name": "x"})], "was recorded on a gpu; expected a CPU run"),
        ("bfloat16", ["bfloat16", "tf32"], "was computed in float32 with products in tf32, expected bfloat16"),
        (edited(folder, "float32", "weights", checkpoint={"sha256": "0"}), [], "other weights"),
        ("inputs", [], "was not recorded with TensorFlow"),
    ):
        with pytest.raises(check.CheckError, match=message):
            compare(folder, actual, *baselines)
    with pytest.raises(check.CheckError, match="has no results of the official code"):
        compare(folder, "float32", reference=folder / "inputs")
    shutil.copytree(REFERENCE, folder / "other_key")
    with h5py.File(file_path(folder / "other_key", CASE, "float64"), "r+") as file:
        file.attrs["facts"] = json.dumps(json.loads(file.attrs["facts"]) | {"key": "other"})
    with pytest.raises(check.CheckError, match="was recorded of other inputs"):
        compare(folder, "float32", reference=folder / "other_key")


def test_what_is_there_is_kept_and_not_mixed(folder, capsys):
    before = {path: path.read_bytes() for path in (folder / "float32").glob("*.h5")}
    record_tensorflow(folder / "ckpt", folder / "inputs", folder / "float32", mode="eager", command=["x"])
    assert f"{CASE}: there already" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (folder / "float32").glob("*.h5")}
    with pytest.raises(TraceError, match="holds a trace with other dtype; give another folder"):
        record_tensorflow(folder / "ckpt", folder / "inputs", folder / "float32", precision=Precision("float64"), mode="eager")


def test_taps_on_disk_and_no_gradients(folder, tmp_path, capsys):
    out = tmp_path / "out"
    record_tensorflow(folder / "ckpt", folder / "inputs", out, mode="eager", gradients=False, memory_budget=100_000)
    assert "more than the budget" in capsys.readouterr().err
    with TraceFile(file_path(out, CASE, "float32")) as file, TraceFile(file_path(folder / "float32", CASE, "float32")) as kept:
        assert set(kept.records) - set(file.records) == {key for key in kept.records if "gradients" in key[0]}
        for group, name in file.records:
            np.testing.assert_array_equal(file.read(group, name), kept.read(group, name))
    result = compare(tmp_path, "out")
    assert failures(result) == set()
    exempted = {(one.group, one.name): one.reason for one in result.cases[0].exempted}
    with Trace(REFERENCE).case(CASE) as case:
        for group in ("gradients", "tap_gradients"):
            for name in case.reference.group(group):
                assert (group, name) in exempted
    assert exempted["variables", "sem_seg_head.predictor.query_embed.weight"].endswith("was recorded without gradients")


def test_taps_that_change_the_results_are_noticed(folder, tmp_path, monkeypatch, capsys):
    from tfmaskformer.module import Taps

    monkeypatch.setattr(Taps, "_add", lambda self, key, outputs, add=Taps._add: add(self, key, outputs * 1.001 if key == TAP else outputs))
    command = ["record", "--framework", "tensorflow", "--mode", "eager", "--ckpt", str(folder / "ckpt"), "--reference", str(REFERENCE)]
    assert cli.main([*command, "--out", str(tmp_path)]) == 3
    assert "one, float32, eager: without taps, " in (told := capsys.readouterr().err)
    assert "has other bits; the recording would not show what the model computes" in told
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cases": ["night"]}, InputError, "has no case night; it has one"),
        ({"precision": Precision("float64", "tf32")}, InputError, "products in tf32 are for float32, not for float64"),
        ({"memory_budget": 1000}, InputError, "a memory budget needs mode 'eager'"),
        ({"device": "gpu"}, tensorflow_record.DeviceUnavailableError, "TensorFlow sees no GPU here"),
    ],
)
def test_what_cannot_be_recorded(folder, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        record_tensorflow(folder / "ckpt", folder / "inputs", tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_exit_codes(folder, tmp_path, capsys):
    common = ["record", "--framework", "tensorflow", "--ckpt", str(folder / "ckpt"), "--reference", str(folder / "inputs"), "--out"]
    assert cli.main([*common, str(folder / "float32"), "--mode", "eager"]) == 0
    assert capsys.readouterr().out == f"{folder / 'float32'}\n"
    assert cli.main([*common, str(tmp_path / "x"), "--case", "night"]) == 2
    assert cli.main([*common, str(tmp_path / "x"), "--device", "gpu"]) == 3
    assert cli.main(["inputs", str(REFERENCE), str(tmp_path / "inputs")]) == 0
    assert cli.main(["inputs", str(tmp_path), str(tmp_path / "again")]) == 2
    assert cli.main(["--actual", str(folder / "float32"), "--reference", str(tmp_path)]) == 2
    for wrong in (["--actual", "a", "--ckpt", "b"], ["--ckpt", "a", "--baseline", "b"], ["--actual", "a", "--mode", "xla"], []):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*wrong, "--reference", "r"])
        assert exit_.value.code == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("products", "bits"), [("tf32", 10), ("bfloat16", 7)])
def test_products_round_their_operands_and_gradients_pass(products, bits):
    import ml_dtypes
    import tensorflow as tf

    random = np.random.default_rng(0)
    left, right = random.standard_normal((3, 5)).astype(np.float32), random.standard_normal((5, 4)).astype(np.float32)

    def rounded(values):
        mantissa, exponent = np.frexp(values.astype(np.float64))
        return np.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1) * 2.0**exponent

    if products == "bfloat16":
        np.testing.assert_array_equal(rounded(left), left.astype(ml_dtypes.bfloat16).astype(np.float64))
    expected = rounded(left) @ rounded(right)
    kernel = right.reshape(1, 1, 5, 4)
    with rounded_products(tensorflow_record.PRODUCTS[products]):
        results = [tf.matmul(left, right), tf.constant(left) @ right, tf.nn.conv2d(left.reshape(1, 3, 1, 5), kernel, 1, "SAME")]
        with tf.GradientTape() as tape:
            variable = tf.Variable(left)
            total = tf.reduce_sum(tf.matmul(variable, right))
        np.testing.assert_allclose(tape.gradient(total, variable), np.broadcast_to(rounded(right).sum(1), left.shape), rtol=1e-6)
        exact = tf.matmul(left.astype(np.float64), right.astype(np.float64))
    for result in results:
        np.testing.assert_allclose(np.reshape(result, expected.shape), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(exact, left.astype(np.float64) @ right.astype(np.float64))
    assert np.abs(np.asarray(tf.matmul(left, right)) - expected).max() > 1e-5  # outside, nothing is rounded
