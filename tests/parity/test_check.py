"""What is judged, how it is accounted for, and that nothing is skipped."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from parity import check, compare, judge, prove, tap_rules
from parity.check import COMPUTED, CheckError, Settings, judge_case
from parity.judge import CaseRun, case_inputs, loss_floors_of, variables_of
from parity.replay import Replay
from parity.tap_rules import TAPS, Layout, TapRuleError, View, layout_of, official_layout
from parity.tensorflow_run import CaseResults, run
from parity.trace import Case, Trace, TraceFileWriter, write_manifest
from tfmaskformer.checkpoint import load
from tfmaskformer.config import MaskFormerConfig, TransformerPredictorConfig

from .breaks import run_broken, weight
from .conftest import TRACE

CONFIG = MaskFormerConfig(name="mini", num_classes=3, predictor=TransformerPredictorConfig(dec_layers=2))
NORM = "sem_seg_head.predictor.transformer.decoder.norm"
RUNS = ("contiguous+onednn", "contiguous", "channels_last+onednn", "channels_last")


@pytest.fixture
def tensors():
    """A mini trace: a bit of every group, official layout."""
    random = np.random.default_rng(0)
    total = random.random((5, 2))
    return {
        ("taps", "images#0"): random.standard_normal((1, 3, 20, 30)),
        ("taps", "backbone.stem.conv1#0"): random.standard_normal((1, 8, 10, 15)),
        ("taps", "sem_seg_head.predictor.transformer.encoder#0"): random.standard_normal((1, 1, 6)),
        **{("taps", f"{NORM}#{call}"): random.standard_normal((5, 1, 6)) for call in (0, 1)},
        ("taps", "sem_seg_head.predictor.class_embed#0"): random.standard_normal((2, 1, 5, 4)),
        ("outputs", "pred_logits"): random.standard_normal((1, 5, 4)),
        **{("matcher", f"final/0/{name}"): total * share for name, share in (("cost_class", 0.2), ("cost_mask", 0.02), ("total", 1.0))},
        ("matcher", "final/0/assignment"): np.array([3, 1]),
        ("losses", "loss_ce"): np.array(0.7),
        ("losses", "loss_ce_0"): np.array(0.9),
        ("losses", "total"): np.array(1.6),
        ("gradients", "sem_seg_head.predictor.class_embed.weight"): random.standard_normal((4, 6)),
        ("inference", "0/sem_seg"): random.random((3, 20, 30)),
        ("inference", "0/panoptic_seg"): random.integers(0, 4, (20, 30), np.int32),
        ("inference", "0/segments"): np.array([[1, 2, 1], [2, 0, 0]]),
    }


@pytest.fixture
def case(tmp_path, tensors):
    """The mini trace on disk; official float32 runs are off by 1e-6 everywhere."""
    last = {("taps", f"{NORM}#2"): tensors["taps", f"{NORM}#1"]}
    for dtype in ("float64", "float32"):
        with TraceFileWriter(tmp_path, "mini", dtype, runs=RUNS, samples=64, facts={"key": "k"}) as writer:
            for (group, name), tensor in (tensors | last).items():
                is_float = tensor.dtype.kind == "f"
                writer.add(group, name, tensor.astype(dtype) if is_float else tensor)
                if is_float:
                    writer.set_floor(group, name, [1e-6 if dtype == "float32" else 1e-15] * 4)
            extra = ("gap", 0.1) if dtype == "float64" else ("cost_noise", 1e-3)
            writer.add("matcher", f"final/0/{extra[0]}", np.array(extra[1]))
    write_manifest(tmp_path, {}, {"mini": {}})
    with Case(tmp_path, "mini") as opened:
        yield opened


def tensorflow(tensors, dtype="float64"):
    """The same tensors as TensorFlow has them."""
    groups = {group: {} for group in check.GROUPS}
    for (group, name), tensor in tensors.items():
        if group in ("taps", "outputs"):
            layout = layout_of(group, name)
            tensor = tensor.transpose([layout.expected.index(axis) for axis in layout.actual])
        groups[group][name] = tensor.astype(dtype) if tensor.dtype.kind == "f" else tensor
    return CaseResults(
        groups, tap_rules.names(CONFIG), exact={"losses": {name: loss.astype(np.float64) for name, loss in groups["losses"].items()}}
    )


def judged(case, results, dtype="float64", floors=None):
    """All stages of it."""
    run = CaseRun(case, results, dtype, floors or loss_floors_of([case]), config=CONFIG)
    return judge_case(run, COMPUTED, all_stages=True)[0]


def failed(case, results, dtype="float64"):
    return {(item.group, item.name): item for item in judged(case, results, dtype).failures}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equal_sides_match_and_everything_is_accounted_for(case, tensors, dtype):
    found = judged(case, tensorflow(tensors, dtype), dtype)
    items, exempted = found.items, found.exempted
    assert [(item.group, item.name) for item in items if not item.passed] == []
    assert {(item.group, item.name) for item in items} == {*tensors, ("taps", f"{NORM}#2")}
    assert [(exemption.group, exemption.name) for exemption in exempted] == [("taps", f"{NORM}#2")]
    assert f"compared with '{NORM}#1'" in exempted[0].reason


def test_every_tensor_that_is_off_fails_alone(case, tensors):
    for key, tensor in tensors.items():
        changed = tensor.copy()
        changed.flat[-1] += 1 if changed.dtype.kind != "f" else 1e-3 * np.linalg.norm(changed)
        names = set(failed(case, tensorflow({**tensors, key: changed})))
        assert names == ({key, ("taps", f"{NORM}#2")} if key[1] == f"{NORM}#1" else {key})


def test_what_has_no_partner_fails_in_both_directions(case, tensors):
    for key in tensors:
        without = {name: tensor for name, tensor in tensors.items() if name != key}
        item = failed(case, tensorflow(without))[key]
        assert item.note == "no partner in TensorFlow"
    results = tensorflow(tensors)
    for group, name in (("taps", "backbone.res9#0"), ("gradients", "backbone.new.weight"), ("losses", "loss_new")):
        results.groups[group][name] = np.zeros(3)
        assert failed(case, results)[group, name].note == "no partner in the trace"
        del results.groups[group][name]
    assert not failed(case, results)


def test_only_an_exact_name_with_a_reason_exempts(case, tensors, monkeypatch):
    results = tensorflow(tensors)
    results.groups["taps"]["backbone.res9#0"] = np.zeros(3)
    monkeypatch.setitem(tap_rules.EXEMPT, ("taps", "backbone.res9"), "a prefix is not enough")
    assert failed(case, results)
    monkeypatch.setitem(tap_rules.EXEMPT, ("taps", "backbone.res9#0"), "a test")
    found = judged(case, results)
    assert found.passed
    assert [exemption.reason for exemption in found.exempted if exemption.name == "backbone.res9#0"] == ["a test"]


def test_a_wrong_layout_is_a_mismatch_and_never_permuted_to_fit(case, tensors):
    results = tensorflow(tensors)
    results.groups["taps"]["images#0"] = results.groups["taps"]["images#0"].transpose(0, 2, 1, 3)
    item = failed(case, results)["taps", "images#0"]
    assert item.note == "shape (1, 3, 30, 20), expected (1, 3, 20, 30)"


def test_a_fault_outside_the_samples_fails(case, tensors):
    key = ("taps", "backbone.stem.conv1#0")
    record = case.reference[key]
    assert record.stored < record.size
    sampled = record.select(np.arange(record.size).reshape(record.shape))
    changed = tensors[key].copy()
    outside = np.setdiff1d(np.arange(record.size), sampled)
    changed.flat[outside] *= 1.01
    item = failed(case, tensorflow({**tensors, key: changed}))[key]
    assert item.comparison.max_difference == 0  # of the samples
    assert item.error == pytest.approx(0.01, rel=0.3)  # of the whole, by its sketch


def test_float32_is_judged_by_the_floor(case, tensors):
    key = ("taps", "images#0")
    random = np.random.default_rng(1)
    for factor, passes in ((1.0, True), (1.5, True), (2.1, False)):
        noise = random.standard_normal(tensors[key].shape)
        noise *= factor * 1e-6 * np.linalg.norm(tensors[key]) / np.linalg.norm(noise)
        found = judged(case, tensorflow({**tensors, key: tensors[key] + noise}, "float32"), "float32")
        item = next(item for item in found.items if item.name == key[1])
        assert item.tolerance == pytest.approx(1.8e-6)
        assert item.error == pytest.approx(factor * 1e-6, rel=0.15)
        assert item.passed == passes


def test_a_float32_loss_is_held_to_what_it_adds_and_to_the_floor_of_its_term(case, tensors):
    key = ("losses", "loss_ce_0")
    for inherited, added, passes in ((1.5e-6, 1e-6, True), (3.5e-6, 0, False), (-4e-6, 4e-6, False)):
        exact = tensors[key] * (1 + inherited)
        results = tensorflow({**tensors, key: exact * (1 + added)}, "float32")
        results.exact["losses"]["loss_ce_0"] = exact
        floors = {("float32", "loss_ce"): 1e-6, ("float32", "total"): 1e-6}
        item = next(item for item in judged(case, results, "float32", floors).items if item.name == "loss_ce_0")
        assert item.passed == passes, (inherited, added, item)
        assert item.local == pytest.approx(added, abs=1e-7)
    assert item.note.startswith("it adds 4.")
    assert item.note.endswith("allowed 2.0e-06")


def test_a_panoptic_result_at_a_threshold_is_a_near_tie_only_if_a_moved_threshold_gives_the_official_one(case, tensors):
    official = {name: tensors["inference", name] for name in ("0/panoptic_seg", "0/segments")}
    other = {"0/panoptic_seg": np.roll(official["0/panoptic_seg"], 3, axis=0), "0/segments": official["0/segments"][:1]}
    moves = []

    def results_of(dtype, below):
        def panoptic(score, overlap):
            moves.append((score, overlap))
            return official if score < 0 and below else other

        results = tensorflow(tensors | {("inference", name): array for name, array in other.items()}, dtype)
        found = judged(case, dataclasses.replace(results, panoptic=panoptic), dtype)
        return {item.name: item for item in found.items if item.name in official}

    for item in results_of("float32", below=True).values():
        assert item.passed
        assert item.note.startswith("near-tie: the official result with the score threshold moved by -")
    logits = tensors["outputs", "pred_logits"]
    noise = (1.5 * 1e-6 + 3e-7) * np.linalg.norm(logits) / np.sqrt(logits.size)
    assert sorted({abs(score) for score, _ in moves}) == pytest.approx([0.0, noise])
    assert not any(item.passed for item in results_of("float32", below=False).values())
    assert {overlap for _, overlap in moves} == {0.0, -1e-3, 1e-3}
    assert not any(item.passed for item in results_of("float64", below=True).values())


def test_the_median_is_judged_in_float32_only(case, tensors):
    found = judged(case, tensorflow(tensors))
    items, exempted = found.items, found.exempted
    off = [dataclasses.replace(item, error=1.2 * item.floor) for item in items]
    for dtype, passes in (("float32", False), ("float64", True)):
        one = check.CaseCheck("mini", dtype, ((20, 30),), None, tuple(off), tuple(exempted))
        good = check.CaseCheck("good", dtype, ((20, 30),), None, tuple(items), tuple(exempted))
        assert one.median_ratio == pytest.approx(1.2)
        assert one.passed
        result = check.Check(check.Settings("a", "b", (dtype,)), None, {}, {}, (one,), ())
        assert result.passed == passes
        assert math.isnan(result.median_ratio) == passes
        together = check.Check(check.Settings("a", "b", (dtype,)), None, {}, {}, (one, good), ())
        assert together.passed


def test_failures_come_in_the_order_of_computation_and_gradients_backwards():
    def item(group, name, passed=False):
        return check.Item(group, name, passed)

    items = (item("taps", "a#0", True), item("taps", "b#0"), item("losses", "x"), item("gradients", "first"), item("gradients", "last"))
    result = check.CaseCheck("c", "float64", ((1, 1),), None, items, ())
    assert [failure.name for failure in result.failures] == ["b#0", "x", "last", "first"]
    only_gradients = check.CaseCheck("c", "float64", ((1, 1),), None, items[3:], ())
    assert only_gradients.failures[0].name == "last"
    environment = check.probes.Environment({}, "", "", {}, ())
    both = check.Check(Settings("", ""), environment, {}, {}, (only_gradients, result), ())
    assert both.first_failure == (result, items[1])


def test_what_is_wrong_by_itself_comes_before_what_inherits_and_float64_before_float32():
    def case(dtype, *items):
        return check.CaseCheck("c", dtype, ((1, 1),), None, items, ())

    inherits = check.Item("taps", "backbone.a#0", False, 1e-3, local=1e-16, local_passed=True)
    wrong = check.Item("losses", "loss_ce", False, 1e-3, local=1e-3, local_passed=False)
    noisy = check.Item("taps", "images#0", False, 1e-6)
    assert inherits.inherited
    assert not wrong.inherited
    assert not noisy.inherited
    exact = case("float64", inherits, wrong)
    assert exact.failures == (inherits, wrong)
    assert exact.own_failures == (wrong,)
    environment = check.probes.Environment({}, "", "", {}, ())
    both = check.Check(Settings("", ""), environment, {}, {}, (case("float32", noisy), exact), ())
    assert both.first_failure == (exact, wrong)
    only = check.Check(Settings("", ""), environment, {}, {}, (case("float64", inherits),), ())
    assert only.first_failure[1] is inherits


def verdict_of(single, double, **changes):
    """Of one tap with an error of ``single`` times its float32 tolerance, and of ``double`` in float64; None: not run."""
    ok = check.Item("taps", "backbone.b#0", True, 1e-6, 1e-6, 2e-6)
    cases = []
    for dtype, error, floor, tolerance in (("float32", single, 1e-6, 2e-6), ("float64", double, 1e-16, 1e-9)):
        if error is not None:
            error = error * tolerance if dtype == "float32" else error
            item = dataclasses.replace(
                check.Item("taps", "backbone.a#0", error <= tolerance, error, floor, tolerance, compare.incomparable("")), **changes
            )
            cases.append(check.CaseCheck("c", dtype, ((1, 1),), None, (item, ok, ok), ()))
    environment = check.probes.Environment({}, "", "", {}, ())
    return check.Check(Settings("", ""), environment, {}, {}, tuple(cases), ())


def test_noise_drops_in_float64_and_a_bug_stays():
    match = verdict_of(0.4, 1e-13)
    assert match.passed
    assert (match.verdict_kind, match.verdict_reason) == (
        "match",
        "over 3 taps of all cases the error is 1.00 × the official floor in the median (at most 1.1) and 1.00 × at worst",
    )
    noise = verdict_of(1.2, 2.4e-13)
    assert not noise.passed  # a failure stays a failure
    assert noise.verdict_kind == "noise"
    assert noise.verdict_reason == "what fails in float32 holds in float64, where its error falls by a factor of at least 1e+07"
    bug = verdict_of(1.2, 1e-8)
    assert bug.verdict_kind == "bug"
    assert "it stays in float64, where there is no noise: taps 'backbone.a#0' is off by 1.0e-08" in bug.verdict_reason
    hidden = verdict_of(0.4, 1e-8)  # below float32's noise
    assert (hidden.passed, hidden.verdict_kind) == (False, "bug")


def test_a_float32_error_that_no_rounding_makes_is_a_bug_even_if_float64_is_right():
    only_float32 = verdict_of(11, 1e-13)
    assert only_float32.verdict_kind == "bug"
    assert "in float32 off by 2.2e-05, 11 × what may be expected of float32" in only_float32.verdict_reason
    assert verdict_of(1.2, None).verdict_kind == "bug"  # nothing shows that it is noise
    missing = verdict_of(math.nan, 1e-13, passed=False, note="no partner in TensorFlow")
    assert missing.verdict_kind == "bug"


def test_the_median_alone_is_noise_if_float64_holds():
    ok = check.Item("taps", "backbone.a#0", True, 1.2e-6, 1e-6, 2e-6)
    exact = check.Item("taps", "backbone.a#0", True, 1e-13, 1e-16, 1e-9)
    cases = tuple(check.CaseCheck("c", dtype, ((1, 1),), None, (one,), ()) for dtype, one in (("float32", ok), ("float64", exact)))
    environment = check.probes.Environment({}, "", "", {}, ())
    result = check.Check(Settings("", ""), environment, {}, {}, cases, ())
    assert not result.passed
    assert result.verdict_kind == "noise"
    assert "1.20 × the official floor in the median (at most 1.1)" in result.verdict_reason


def test_losses_are_told_under_both_assignments_where_these_differ(case, tensors):
    asked = []

    def losses_under(forced):
        asked.append(forced)
        return {name: np.float64(0.7 if forced and name == "loss_ce" else 0.9) for name in ("loss_ce", "loss_ce_0")}

    other = {**tensors, ("matcher", "final/0/assignment"): np.array([1, 3]), ("losses", "loss_ce"): np.array(0.9)}
    for actual, told in ((other, "0.9 under its own assignment, 0.7 under the official one, officially 0.7"), (tensors, "")):
        results = dataclasses.replace(tensorflow(actual), losses_under=losses_under)
        items = {item.name: item for item in judged(case, results).items}
        assert items["loss_ce"].note == told
        assert items["loss_ce_0"].note == ""
    own, official = asked
    assert own == {}
    np.testing.assert_array_equal(official[0, 0], [3, 1])


def test_what_is_wrong_by_itself_fails_even_if_its_error_is_made_up_for(case, tensors):
    conv, logits = ("taps", "backbone.stem.conv1#0"), ("outputs", "pred_logits")
    off = tensorflow({**tensors, logits: tensors[logits] * 1.5})
    replayed = Replay({conv[1]: 1e-3, "images#0": 1e-16}, {}, tensorflow(tensors), {})
    run = CaseRun(case, off, "float64", loss_floors_of([case]), config=CONFIG, replay=replayed)
    items = {(item.group, item.name): item for item in judge_case(run, COMPUTED, all_stages=True)[0].items}
    assert (items[conv].passed, items[conv].inherited, items[conv].local) == (False, False, 1e-3)
    assert items[conv].note == "by itself it is off by 1.0e-03, allowed 1.0e-09"
    assert (items["taps", "images#0"].passed, items["taps", "images#0"].local_passed) == (True, True)
    assert (items[logits].passed, items[logits].inherited, items[logits].local) == (False, True, 0.0)
    assert items["matcher", "final/0/assignment"].local_passed
    norm = items["taps", f"{NORM}#0"]  # which the replay did not see
    assert (norm.passed, norm.local_passed) == (True, None)


def test_nothing_is_judged_behind_the_first_broken_stage(case, tensors):
    key = ("taps", "backbone.stem.conv1#0")
    results = tensorflow({**tensors, key: tensors[key] * 2})
    run = CaseRun(case, results, "float64", loss_floors_of([case]), config=CONFIG)
    found, _ = judge_case(run, COMPUTED)
    assert found.stopped == "backbone"
    assert [item.name for item in found.items] == ["images#0", "backbone.stem.conv1#0"]
    assert found.failures[0].name == key[1]
    assert judge_case(run, COMPUTED, all_stages=True)[0].items[-1].group == "inference"


def test_a_right_port_is_right_in_every_place_and_everything_is_accounted_for(converted):
    checkpoint, trace = converted("tiny_panoptic"), TRACE.parent / "whole" / "tiny_panoptic"
    result = check.check(Settings(str(checkpoint), str(trace), ("float64",), mode="eager"))
    assert (result.passed, result.verdict_kind) == (True, "match")
    assert {stage.name: stage.verdict for stage in result.stages if stage.verdict != "passed"} == dict.fromkeys(
        ("clipped gradients", "optimizer step"), "not recorded"
    )
    [case] = result.cases
    assert (case.local, case.stopped) == ("", "")
    for item in case.items:
        if item.group in judge.GROUPS and not item.name.startswith("probe/"):
            assert item.local_passed, item
            assert item.local <= 1e-12 or item.tolerance > 1e-9 or item.name.endswith("/assignment"), item
    ledger = case.ledger()
    assert not any(row["failed"] or row["no partner"] for row in ledger.values())
    with Trace(trace).case("odd") as opened:
        calls = {name.partition("[")[0] for name in opened.reference.group("taps")}
        gradients = opened.reference.group("tap_gradients")
    assert ledger["calls"]["compared"] == len(calls)
    assert {one.name for one in case.exempted if one.group == "calls"} >= {
        "sem_seg_head.pixel_decoder",
        "sem_seg_head.predictor.query_embed",
        "sem_seg_head.predictor.transformer.decoder.layers.0.self_attn.out_proj",
        "sem_seg_head.predictor.transformer.decoder.layers",
    }
    assert ledger["tap_gradients"]["compared"] == len(gradients)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert ledger["sources"]["compared"] == len(manifest["tensors"]) == ledger["variables"]["compared"]
    assert ledger["sources"]["exempted"] == len(manifest["dropped"])
    assert ledger["images"]["compared"] == 1


def test_a_module_that_nobody_calls_is_exempted_by_name_or_fails(converted):
    run = CaseRun(None, None, "float64", {}, load(str(converted("tiny_per_pixel")), "float64"))
    found = {one.name: one for one in judge.judge_calls(run, [check.Item("taps", "backbone.stem#0", True)])}
    assert not found["backbone.stem#0"].passed  # the tap has no partner
    assert not found["backbone.stem.conv1"].passed
    assert "UNCALLED" in found["backbone.stem.conv1"].note
    assert isinstance(found["sem_seg_head.pixel_decoder"], check.Exemption)
    assert "backbone.stem" not in found


def test_a_tensor_of_the_official_file_that_became_nothing_fails():
    manifest = {
        "tensors": [{"source": name, "target": target} for name, target in (("a.weight", "a.weight"), ("b.weight", "b.gone"))],
        "dropped": [{"source": "index", "reason": "derived"}],
    }
    run = CaseRun(None, None, "float64", {}, manifest=manifest)
    a, b, index = judge.judge_sources(run, [check.Item("variables", "a.weight", True)])
    assert (a.passed, b.passed) == (True, False)
    assert index == check.Exemption("sources", "index", "not converted: derived")


def test_float64_is_run_where_float32_alone_fails(converted, monkeypatch, capsys):
    kernel = weight("backbone.res4.1.conv2.weight", lambda values: values * 1.01)
    trace = TRACE.parent / "whole" / "tiny_per_pixel"
    code, report = run_broken(kernel, converted("tiny_per_pixel"), trace, monkeypatch, capsys, "--dtype", "float32")
    assert code == 1
    assert [case["dtype"] for case in report["cases"]] == ["float32", "float64"]
    assert report["verdict_kind"] == "bug"
    assert report["first_failure"] == {"case": "odd", "dtype": "float64", "group": "taps", "name": "backbone.res4.1.conv2.norm#0"}
    code, report = run_broken(lambda *_: None, converted("tiny_per_pixel"), trace, monkeypatch, capsys, "--dtype", "float32")
    assert {case["dtype"] for case in report["cases"]} == ({"float32"} if code == 0 else {"float32", "float64"})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_taps_change_no_bit_in_eager_mode(dtype, converted):
    model = load(str(converted("tiny_per_pixel")), dtype)
    with Trace(TRACE.parent / "whole" / "tiny_per_pixel").case("odd") as opened:
        inputs = [case_inputs(opened, dtype)]
    [tapped], [alone] = (run(model, inputs, mode="eager", tapped=tapped) for tapped in (True, False))
    assert tapped.groups["taps"]
    assert not alone.groups["taps"]
    for group in (*check.ALONE, "gradients"):
        assert tapped.groups[group].keys() == alone.groups[group].keys()
        for name, array in alone.groups[group].items():
            np.testing.assert_array_equal(tapped.groups[group][name], array)


@pytest.mark.parametrize(
    ("mode", "dtype", "runs"), [("eager", "float32", 1), ("graph", "float64", 1), ("graph", "float32", 2), ("xla", "float32", 2)]
)
def test_what_a_compiled_function_gives_is_judged_as_it_is_without_taps(mode, dtype, runs):
    asked = []

    def fake(*, tapped=True, gradients="all", **how):
        asked.append((tapped, gradients))
        groups = {group: {"tapped": tapped} for group in ("taps", "gradients", *check.ALONE)}
        return [CaseResults(groups, tap_rules.names(CONFIG))]

    [found] = check._run(fake, dtype, {"mode": mode, "gradients": "all"})
    assert asked == [(True, "all"), (False, "none")][:runs]
    assert {group for group, of in found.groups.items() if of["tapped"]} == {"taps", "gradients", *(check.ALONE if runs == 1 else ())}


def test_a_check_of_nothing_does_not_pass():
    environment = check.probes.Environment({}, "", "", {}, ())
    assert not check.Check(Settings("", ""), environment, {}, {}, (), ()).passed


def test_a_near_tie_is_labelled_and_a_bug_fails(case, tensors):
    key = ("matcher", "final/0/assignment")
    other = {**tensors, key: np.array([1, 3])}
    item = failed(case, tensorflow(other, "float32"), "float32")[key]
    assert item.comparison.label == "different"
    assert math.isfinite(item.comparison.regret)


# --- tables


def test_every_tap_of_every_trace_has_exactly_one_line_and_every_line_is_needed():
    traces = [TRACE, *(TRACE.parent / f"tiny_per_pixel{plus}" for plus in ("", "_plus"))]
    traces += [prove.TRACES / f"maskformer_{backbone}_bs16_160k" for backbone in ("R101c", "swin_tiny")]
    used = set()
    for trace in map(Trace, traces):
        with trace.case(trace.cases[0]) as case:
            for group, lines in (("taps", TAPS), ("outputs", tap_rules.OUTPUTS)):
                for name, record in case.reference.group(group).items():
                    layout = layout_of(group, name)
                    assert len(record.shape) == len(re.findall(r"\(\w+\)|\w", layout.expected))
                    used |= {pattern for pattern, _ in lines if tap_rules._matcher(pattern)(name) is not None}
    # No model has a transformer encoder in its predictor (the lines serve both encoders), and all other lines are used.
    assert [pattern for pattern, _ in (*TAPS, *tap_rules.OUTPUTS) if pattern not in used] == []


def test_unknown_names_are_errors():
    for name in ("backbone.res6#0", "backbone.stem.conv1", "criterion#0", "backbone.res2.0.conv1.norm#x", "images#0[0]"):
        with pytest.raises(TapRuleError, match="no lines"):
            layout_of("taps", name)


def test_layouts_name_the_same_axes_on_both_sides():
    for _, layout in (*TAPS, *tap_rules.OUTPUTS):
        assert sorted(layout.actual) == sorted(layout.expected.replace("(", "").replace(")", ""))
        assert len(set(layout.actual)) == len(layout.actual)


def test_masked_views_take_the_true_part_of_one_image():
    view = View(1, (128, 160), (101, 75))
    stride_4 = np.arange(2 * 32 * 40 * 3).reshape(2, 32, 40, 3)
    np.testing.assert_array_equal(official_layout(stride_4, Layout("BHWC", "BCHW"), view), stride_4[1:, :26, :19].transpose(0, 3, 1, 2))
    sequence = np.arange(2 * 20 * 3).reshape(2, 4 * 5, 3)
    true = sequence.reshape(2, 4, 5, 3)[1:, :4, :3].reshape(1, 12, 3)
    np.testing.assert_array_equal(official_layout(sequence, Layout("BSC", "SBC", 32), view), true.transpose(1, 0, 2))
    weights = np.arange(2 * 7 * 20).reshape(2, 7, 20)
    np.testing.assert_array_equal(
        official_layout(weights, Layout("BQS", "BQS", 32), view), weights.reshape(2, 7, 4, 5)[1:, :, :4, :3].reshape(1, 7, 12)
    )
    # 101 × 75 px are 13 × 10 patches of 8 px, in 3 × 2 windows of 5 × 5 of the canvas' 4 × 4.
    windows = np.arange(2 * 4 * 4 * 25 * 3).reshape(2, 4, 4, 25, 3)
    np.testing.assert_array_equal(official_layout(windows, Layout("BYXPC", "(BYX)PC", 8), view), windows[1, :3, :2].reshape(6, 25, 3))
    np.testing.assert_array_equal(official_layout(windows, Layout("BYXPC", "(BYX)PC", 8)), windows.reshape(32, 25, 3))
    np.testing.assert_array_equal(official_layout(stride_4, Layout("BHWC", "B(HW)C"), view), stride_4[1:, :26, :19].reshape(1, 26 * 19, 3))
    with pytest.raises(TapRuleError, match="33 positions for 128 px"):
        official_layout(np.zeros((2, 33, 40, 3)), Layout("BHWC", "BCHW"), view)


def test_gradients_go_back_through_the_weights_own_rules():
    gradient = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    names = {"backbone.stem.conv1.weight": gradient, "sem_seg_head.predictor.class_embed.weight": gradient[0, 0], "backbone.x": gradient}
    found = tap_rules.official_gradients(dict(list(names.items())[:2]), CONFIG)
    np.testing.assert_array_equal(found["backbone.stem.conv1.weight"], gradient.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(found["sem_seg_head.predictor.class_embed.weight"], gradient[0, 0].T)
    with pytest.raises(TapRuleError):
        tap_rules.official_gradients(names, CONFIG)


# --- bad input


@pytest.fixture
def as_converted(tmp_path):
    """A checkpoint directory as far as it is looked at before TensorFlow is imported."""
    sha256 = json.loads((TRACE / "manifest.json").read_text())["provenance"]["checkpoint"]["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps({"source": {"file": "x.pkl", "sha256": sha256}}))
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cases": ("night",)}, "no case night; it has even, odd"),
        ({"pad_to": (128, 128)}, "official padding has no canvas"),
        ({"padding": "masked", "cases": ("batch",)}, "case batch has 2 images"),
        ({"padding": "masked", "pad_to": (96, 127)}, "case even is 96×128 px, which is larger than --pad-to 96×127"),
    ],
)
def test_settings_that_do_not_fit_the_trace(as_converted, settings, told):
    with pytest.raises(CheckError, match=told):
        check.check(Settings(str(as_converted), str(TRACE), **settings))


def test_other_weights_and_missing_manifests(as_converted, tmp_path):
    (as_converted / "manifest.json").write_text(json.dumps({"source": {"file": "other.pkl", "sha256": "0" * 64}}))
    with pytest.raises(CheckError, match=r"other weights: .* converted from other\.pkl"):
        check.check(Settings(str(as_converted), str(TRACE)))
    (as_converted / "manifest.json").write_text("[]")
    with pytest.raises(CheckError, match="cannot be read"):
        check.check(Settings(str(as_converted), str(TRACE)))
    with pytest.raises(CheckError, match=r"no manifest\.json"):
        check.check(Settings(str(tmp_path / "nothing"), str(TRACE)))


def test_variables_without_a_witness_fail():
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import parameter_specs

    specs = parameter_specs(MaskFormer(CONFIG))
    witness = check.Item("taps", "backbone.stem.conv1.norm#0", True, comparison=compare.incomparable("x"))
    found = {item.name: item.passed for item in variables_of({name: spec.trainable for name, spec in specs.items()}, [witness])}
    assert found.keys() == specs.keys()
    assert sorted(name for name, passed in found.items() if passed) == [
        f"backbone.stem.conv1.norm.{stat}" for stat in ("bias", "running_mean", "running_var", "weight")
    ]
