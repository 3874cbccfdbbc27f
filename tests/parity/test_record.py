"""Recording: what a trace of the official code contains, that it can be resumed, and what is refused."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import linear_sum_assignment

from parity import official, record
from parity.sampling import sample_indices
from parity.trace import Trace, TraceFile, relative_error, statistics

TINY = """
_BASE_: {maskformer}/configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml
MODEL:
  RESNETS: {{STEM_OUT_CHANNELS: 8, WIDTH_PER_GROUP: 8, RES2_OUT_CHANNELS: 16}}
  SEM_SEG_HEAD: {{CONVS_DIM: 32, MASK_DIM: 16, TRANSFORMER_ENC_LAYERS: 1}}
  MASK_FORMER: {{HIDDEN_DIM: 32, NHEADS: 2, DIM_FEEDFORWARD: 24, NUM_OBJECT_QUERIES: 10, DEC_LAYERS: 3}}
"""
CASES = ["photo=photo.png@65x97:3", "batch=photo.png@65x97:0,photo.png@70x90:1"]
needs_official = pytest.mark.skipif(
    not all(os.environ.get(variable) for variable in official.FOLDERS.values()),
    reason="no official code: MASKFORMER_SOURCE, DETECTRON2_SOURCE",
)


def parse(arguments):
    parser = argparse.ArgumentParser()
    record.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the config of a narrow model, a random checkpoint for it and a picture."""
    folder = tmp_path_factory.mktemp("record")
    code = official.load()
    (folder / "tiny.yaml").write_text(TINY.format(maskformer=code.maskformer))
    state = code.model(code.config(folder / "tiny"), seed=1).state_dict()
    old = {key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): tensor.numpy() for key, tensor in state.items()}
    (folder / "model.pkl").write_bytes(pickle.dumps({"model": old, "__author__": "test"}))
    pixels = np.arange(60 * 80 * 3, dtype=np.uint32).reshape(60, 80, 3) * 2654435761 >> 16
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "photo.png")
    return folder


def options(folder, out, cases=CASES, flags=(), **more):
    more = {"--src": folder / "model.pkl", "--config": folder / "tiny", "--out": out, "--samples": 64} | more
    given = [item for case in cases for item in ("--case", case.replace("photo.png", f"{folder}/photo.png"))]
    return parse([*given, *flags, *(str(part) for option in more.items() if option[1] is not None for part in option)])


@pytest.fixture(scope="module")
def recorded(folder):
    assert record.run(options(folder, folder / "sampled")) == 0
    return Trace(folder / "sampled")


@pytest.fixture(scope="module")
def full(folder):
    """One case, whole in float64, sampled in float32."""
    assert record.run(options(folder, folder / "full", CASES[:1], **{"--samples": None, "--samples-float32": 64})) == 0
    return Trace(folder / "full")


@needs_official
def test_every_call_parameter_and_result_is_there_in_both_files(folder, recorded):
    import torch

    code = official.load()
    model = code.model(code.config(folder / "tiny"))
    silent = {"out_proj", "query_embed", "layers", "decoder", "encoder", "pixel_decoder"}
    for case in recorded:
        taps = set(case.reference.group("taps"))
        called = {tap.partition("#")[0] for tap in taps}
        uncalled = {name for name, _ in model.named_modules() if name and not name.startswith("criterion")} - called
        assert {name.rpartition(".")[2] for name in uncalled} <= silent
        assert {"images#0", "backbone#0[res2]", "sem_seg_head#0[aux_outputs][1][pred_masks]"} <= taps
        assert {f"sem_seg_head.predictor.transformer.decoder.norm#{index}" for index in range(4)} <= taps
        assert {f"sem_seg_head.predictor.transformer.decoder.layers.0.self_attn#0[{index}]" for index in range(2)} <= taps
        assert set(case.reference.group("gradients")) == {name for name, _ in model.named_parameters()}
        assert set(case.reference.group("losses")) == {*model.criterion.weight_dict, "total"}
        for group in ("taps", "outputs", "losses", "tap_gradients", "gradients", "inference"):
            assert list(case.reference.group(group)) == list(case.baseline.group(group))
        assert next(iter(case.reference.group("taps"))) == "images#0"
        assert {record.dtype for record in case.reference.group("taps").values()} <= {"float64", "float32"}  # position embeddings
        assert {record.dtype for record in case.baseline.group("taps").values()} == {"float32"}
    assert torch.backends.mkldnn.enabled


@needs_official
def test_the_floor_is_the_error_of_each_run_and_small(recorded):
    with recorded.case("photo") as case:
        assert case.baseline.runs == ("contiguous+onednn", "contiguous", "channels_last+onednn", "channels_last")
        assert case.reference.runs == ("channels_last+onednn",)
        for (group, name), baseline in case.baseline.records.items():
            if group == "inputs" or baseline.dtype != "float32":
                continue
            assert not any(map(math.isnan, baseline.floor))
            if baseline.samples is None:  # what is stored of the baseline run has just the error that is stored for it
                stored = relative_error(case.baseline.read(group, name), case.reference.read(group, name))
                assert baseline.floor[0] == pytest.approx(stored, rel=1e-12)
        taps = case.baseline.group("taps")
        assert 0 < max(taps["backbone.stem.conv1#0"].floor) < 1e-6
        assert len({taps["backbone#0[res5]"].floor[i] for i in range(4)}) > 1  # the runs differ
        assert max(max(tap.floor) for tap in case.reference.group("taps").values()) < 1e-9


@needs_official
def test_samples_are_elements_of_the_full_recording(full, recorded):
    with full.case("photo") as full, recorded.case("photo") as sampled:
        for (group, name), part in sampled.baseline.records.items():
            assert repr(full.baseline[group, name]) == repr(part)  # a floor that was not measured is nan
            np.testing.assert_array_equal(full.baseline.read(group, name), sampled.baseline.read(group, name))
        assert list(full.reference.records) == list(sampled.reference.records)
        for (group, name), part in sampled.reference.records.items():
            whole = full.reference.read(group, name)
            assert full.reference[group, name].samples is None
            assert part.statistics == statistics(whole)
            indices = sample_indices(name, whole.shape, 64) if part.samples else slice(None)
            np.testing.assert_array_equal(sampled.reference.read(group, name).ravel(), whole.ravel()[indices])
        # the parts fit together
        read = full.reference.read
        image = (full.images[0].transpose(2, 0, 1) - np.float64(np.float32([[[123.675]], [[116.28]], [[103.53]]]))) / np.float64(
            np.float32([[[58.395]], [[57.12]], [[57.375]]])
        )
        np.testing.assert_array_equal(read("taps", "images#0")[0], image)
        np.testing.assert_array_equal(
            read("outputs", "aux_outputs.1.pred_masks"), read("taps", "sem_seg_head#0[aux_outputs][1][pred_masks]")
        )
        np.testing.assert_array_equal(
            read("taps", "sem_seg_head.predictor.transformer.decoder#0")[1],
            read("taps", "sem_seg_head.predictor.transformer.decoder.norm#1"),
        )
        # a ReLU in place follows this call and would have changed it
        assert read("taps", "backbone.stem.conv1#0").min() < 0
        assert full.reference["inference", "0/resized/sem_seg"].shape == (133, 86, 72)
        assert full.reference["inference", "0/panoptic_seg"].shape == (65, 97)


@needs_official
def test_the_gradient_of_a_tap_is_that_of_what_the_module_returned(full):
    with full.case("photo") as case:
        read = case.reference.read
        found, without = set(case.reference.group("tap_gradients")), case.reference.facts["without_gradient"]
        assert found | without.keys() == set(case.reference.group("taps"))
        assert not found & without.keys()
        decoder = "sem_seg_head.predictor.transformer.decoder"
        assert without["images#0"] == without["sem_seg_head.predictor.pe_layer#0"] == "it depends on no parameter"
        assert without[f"{decoder}.norm#2"] == without[f"{decoder}.layers.0.self_attn#0[1]"] == "the loss does not depend on it"
        assert all("_attn#0[1]" in tap or "pe_layer" in tap or tap in NO_GRADIENT for tap in without)
        # A ReLU in place follows: nothing reaches the loss from where it cuts off, though the tensor is its output by then.
        for tap in ("backbone.stem.conv1#0", "backbone.res2.0.conv2.norm#0"):
            negative = read("taps", tap) < 0
            assert 0.1 < negative.mean() < 0.9
            assert not read("tap_gradients", tap)[negative].any()
            assert np.count_nonzero(read("tap_gradients", tap)[~negative]) > 0.2 * np.count_nonzero(~negative)
        # The gradient of a bias is the sum of those of what it is added to.
        for module in ("sem_seg_head.predictor.class_embed", f"{decoder}.layers.1.linear1", "sem_seg_head.predictor.mask_embed.layers.0"):
            bias = read("gradients", f"{module}.bias")
            summed = read("tap_gradients", f"{module}#0").reshape(-1, bias.size).sum(0)
            np.testing.assert_allclose(summed, bias, rtol=1e-9, atol=1e-12 * np.abs(bias).max())
        for name in ("[pred_logits]", "[aux_outputs][0][pred_masks]"):
            ends = [read("tap_gradients", f"sem_seg_head{module}#0{name}") for module in ("", ".predictor")]
            np.testing.assert_array_equal(*ends)
        floors = [record_.floor for record_ in case.baseline.group("tap_gradients").values()]
        assert not np.isnan(floors).any()


NO_GRADIENT = {"images#0", "sem_seg_head.predictor.transformer#0[1]", "sem_seg_head.predictor.transformer.decoder.norm#2"}


@needs_official
def test_what_the_backward_pass_needs_may_lie_on_disk(folder, recorded, tmp_path, capsys):
    assert record.run(options(folder, tmp_path, CASES[:1], **{"--memory-budget": "4000"})) == 0
    for dtype in ("float64", "float32"):
        file = f"photo.{dtype}.h5"
        with TraceFile(tmp_path / file) as spilled, TraceFile(recorded.directory / file) as kept:
            assert repr(spilled.records) == repr(kept.records)
            for group, name in kept.records:
                np.testing.assert_array_equal(spilled.read(group, name), kept.read(group, name))
    assert "more than the budget of 0.00 GB" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "photo.float32.h5", "photo.float64.h5"]


@needs_official
def test_gradients_can_be_left_out(folder, recorded, tmp_path):
    assert record.run(options(folder, tmp_path, CASES[:1], ["--no-gradients"])) == 0
    trace = Trace(tmp_path)
    assert trace.provenance["gradients"] is False
    assert "--no-gradients" in trace.provenance["command"]
    with trace.case("photo") as without, recorded.case("photo") as case:
        kept = {key: record_.statistics for key, record_ in case.reference.records.items() if "gradients" not in key[0]}
        assert {key: record_.statistics for key, record_ in without.reference.records.items()} == kept
        assert set(without.reference.facts["without_gradient"].values()) == {"no gradients were recorded"}
    assert record.run(options(folder, tmp_path, CASES[:1])) == 2  # not to be mixed


@needs_official
def test_costs_assignments_losses_and_gaps_agree(recorded):
    weights = {"ce": 1, "mask": 20, "dice": 1}
    for case in recorded:
        read = case.reference.read
        losses = {name: float(read("losses", name)) for name in case.reference.group("losses")}
        total = losses.pop("total")
        assert total == pytest.approx(sum(weights[name.split("_")[1]] * loss for name, loss in losses.items()), rel=1e-12)
        assert len(losses) == 9
        for layer in ("final", "0", "1"):
            for image, target in enumerate(case.targets):
                cost = {name: read("matcher", f"{layer}/{image}/cost_{name}") for name in ("class", "mask", "dice")}
                totals = read("matcher", f"{layer}/{image}/total")
                assert totals.shape == (10, len(target["labels"]))
                np.testing.assert_array_equal(totals, 20.0 * cost["mask"] + cost["class"] + cost["dice"])
                queries, objects = linear_sum_assignment(totals)
                assignment = read("matcher", f"{layer}/{image}/assignment")
                np.testing.assert_array_equal(assignment[objects], queries)
                assert float(read("matcher", f"{layer}/{image}/gap")) == record.assignment_gap(totals)
                noise = float(case.baseline.read("matcher", f"{layer}/{image}/cost_noise"))
                error = np.abs(case.baseline.read("matcher", f"{layer}/{image}/total") - totals).max(initial=0)
                assert error <= noise < 1e-2


@needs_official
def test_a_recording_is_resumed_and_not_mixed(folder, recorded, capsys):
    first = {file.name: file.read_bytes() for file in recorded.directory.iterdir()}
    (recorded.directory / "batch.float32.h5").unlink()
    assert record.run(options(folder, recorded.directory)) == 0
    progress = capsys.readouterr().err
    assert "photo: float64 and float32 there already" in progress
    assert "batch: float64 there already" in progress
    again = {file.name: file.read_bytes() for file in recorded.directory.iterdir()}
    assert again.pop("manifest.json") != b""
    assert again == {name: content for name, content in first.items() if name != "manifest.json"}  # to the last bit
    assert record.run(options(folder, recorded.directory, **{"--seed": 1})) == 2
    assert "holds a trace with other seed; give another folder" in capsys.readouterr().err


@needs_official
def test_the_manifest_tells_how_it_was_recorded_and_nothing_of_this_machine(folder, recorded):
    text = (recorded.directory / "manifest.json").read_text()
    assert str(folder) not in text
    assert recorded.provenance["commits"] == official.load().commits
    assert recorded.provenance["command"][:5] == ["parity-check", "record", "--src", "model.pkl", "--config"]
    assert json.loads(text)["cases"]["batch"]["images"][1] | {"sha256": ""} == {
        "file": "photo.png",
        "size_px": [70, 90],
        "objects": 1,
        "sha256": "",
    }
    with TraceFile(recorded.directory / "photo.float64.h5") as file:
        assert file.facts["key"] == json.loads(text)["cases"]["photo"]["key"]


@needs_official
def test_hooks_that_change_the_outputs_are_noticed(folder, tmp_path, monkeypatch, capsys):
    def meddling(tensor):
        array = tensor.detach().numpy()
        array *= 1.0000001
        return array

    monkeypatch.setattr(record, "numpy", meddling)
    assert record.run(options(folder, tmp_path / "out", CASES[:1])) == 3
    assert "without taps, outputs 'pred_logits' has other bits" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["manifest.json"]


@needs_official
@pytest.mark.parametrize(
    ("changes", "cases", "message"),
    [
        ({"--src": "absent.pkl"}, CASES, "no checkpoint 'absent.pkl'"),
        ({"--config": "absent"}, CASES, "no official config 'absent'"),
        ({"--samples": 1}, CASES, "--samples 1: expected 2 or more"),
        ({"--samples-float32": 1}, CASES, "--samples-float32 1: expected 2 or more"),
        ({"--memory-budget": "much"}, CASES, "--memory-budget: 'much' is no amount of memory"),
        ({}, ["photo.png"], "expected [NAME=]FILE@HEIGHTxWIDTH"),
        ({}, ["a/b=photo.png@65x97"], "case name 'a/b'"),
        ({}, ["photo.png@65x97", "photo.png@65x97"], "two cases have one name"),
        ({"--detectron2": "."}, CASES, "is no source folder of detectron2"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folder, tmp_path, capsys, changes, cases, message):
    assert record.run(options(folder, tmp_path / "out", cases, **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_gap_is_that_of_the_best_other_assignment():
    random = np.random.default_rng(0)
    for _ in range(20):
        costs = random.random((4, 3))
        every = sorted(
            sum(costs[query, index] for index, query in enumerate(queries)) for queries in np.ndindex(4, 4, 4) if len(set(queries)) == 3
        )
        assert record.assignment_gap(costs) == pytest.approx(every[1] - every[0], abs=1e-12)
    assert record.assignment_gap(np.zeros((4, 0))) == math.inf
    assert record.assignment_gap(np.ones((1, 1))) == math.inf
    assert record.assignment_gap(np.ones((5, 2))) == 0
    assert record.assignment_gap(np.array([[1.0, 4.0, 6.0]])) == 3  # more objects than queries


def test_help_needs_no_torch():
    import subprocess
    import sys

    program = (
        "import argparse, sys; from parity import record; record.add_arguments(argparse.ArgumentParser()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=60).returncode == 0
