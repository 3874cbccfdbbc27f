"""The stages of a check: everything has one, the first broken one is named, and behind it nothing is judged."""

from __future__ import annotations

import collections
import math
from pathlib import Path

import pytest

from parity import check, cli, stages
from parity.check import CaseCheck, Settings
from parity.judge import Item
from parity.stages import MASKFORMER, STAGES, plan_of, stage_of
from parity.trace import Trace

from . import made_checks
from .breaks import run_broken, weight

GOLDEN = Path(__file__).parents[1] / "golden"


def test_every_name_of_every_trace_has_a_stage_and_the_order_is_that_of_computation():
    for trace in (GOLDEN / "small_R50", *(GOLDEN / "whole").iterdir()):
        with Trace(trace).case("odd") as case:
            reference = case.reference
            taps = [STAGES.index(stage_of("taps", name)) for name in reference.group("taps")]
            assert taps == sorted(taps), trace
            assert {STAGES[index] for index in taps} >= {"normalise and pad", "backbone", "pixel decoder", "heads"}
            for group in ("outputs", "matcher", "losses", "tap_gradients", "gradients", "inference", "metrics"):
                for name in reference.group(group):
                    assert stage_of(group, name) in STAGES
    assert {stage for _, _, stage in stages.PLACES} == set(STAGES[1:])


def test_where_things_belong():
    assert stage_of("matcher", "final/0/cost_dice") == stage_of("matcher", "0/1/total") == "cost terms"
    assert stage_of("matcher", "final/0/assignment") == "assignment"
    assert stage_of("preprocessing", "0/canvas") == "normalise and pad"
    assert stage_of("preprocessing", "0/resized") == "image reading and resize"
    assert stage_of("taps", "sem_seg_head.pixel_decoder.transformer.encoder#0") == "pixel decoder"
    assert stage_of("calls", "sem_seg_head.predictor.pe_layer#0") == "transformer"
    assert stage_of("taps", "sem_seg_head.predictor#0") == "heads"
    assert stage_of("clipped", "1/clipped.each/x") == stage_of("steps", "1/clipped/backbone.norm") == "clipped gradients"
    assert [stage_of("steps", f"1/{name}") for name in ("assignment", "losses/loss_ce", "gradient_norm", "weights/x", "lr")] == [
        *("assignment", "losses", "gradients", "optimizer step", "optimizer step"),
    ]
    assert stage_of("steps", "decay") == "optimizer step"
    with pytest.raises(ValueError, match="no stage for nonsense 'x'"):
        stage_of("nonsense", "x")
    with pytest.raises(ValueError, match="no stage for taps_of 'x'"):
        stage_of("taps_of", "x")


def test_another_model_has_stages_of_its_own():
    plan = plan_of({"encoder": ["down", "stem"], "decoder": ["up"]})
    assert plan.stages == ("environment self-test", "encoder", "decoder", "outputs", "losses", "gradients")
    assert [plan.stage_of("taps", name) for name in ("stem#0", "down.1.conv#0[2]", "up#1", "upper#0")] == [
        "encoder",
        "encoder",
        "decoder",
        "decoder",
    ]
    assert plan.stage_of("outputs", "logits") == "outputs"
    assert plan.stage_of("tap_gradients", "stem#0") == plan.stage_of("gradients", "stem.weight") == "gradients"
    assert plan_of({}).stage_of("taps", "anything#0") == "model"


def case_of(*items, stopped=""):
    return CaseCheck("c", "float64", ((1, 1),), None, items, (), stopped=stopped)


def verdicts(*cases, left_out=()):
    return {stage.name: stage for stage in stages.verdicts(MASKFORMER, cases, 9, left_out)}


def test_a_stage_that_inherits_its_error_is_not_broken():
    items = (
        Item("taps", "images#0", True),
        Item("taps", "backbone.res2.0#0", False, 1e-3, local=1e-3, local_passed=False),
        Item("taps", "backbone.res2.1#0", False, 1e-3, local=1e-16, local_passed=True),
        Item("taps", "sem_seg_head.pixel_decoder.adapter_1#0", False, 1e-3, local=1e-16, local_passed=True),
        Item("losses", "loss_ce", False, 1e-3),
    )
    found = verdicts(case_of(*items))
    assert [stage.verdict for stage in found.values()] == [
        *("passed", "not recorded", "passed", "broken", "inherits"),
        *("nothing to judge", "not recorded", "nothing to judge", "nothing to judge"),  # a model may have no transformer and no matcher
        "broken",  # nothing is known of what it inherits
        *("not recorded" for _ in range(5)),
    ]
    assert found["environment self-test"].judged == 9
    assert (found["backbone"].judged, found["backbone"].failed, found["backbone"].first) == (2, 2, "taps 'backbone.res2.0#0'")
    stopped = verdicts(case_of(items[0], items[1], stopped="backbone"))
    assert stopped["losses"].verdict == "not judged"
    assert stopped["losses"].not_judged == ("c, float64",)
    assert stopped["normalise and pad"].not_judged == ()
    both = verdicts(case_of(items[0], items[1], stopped="backbone"), case_of(Item("losses", "loss_ce", True)))
    assert (both["losses"].verdict, both["losses"].not_judged) == ("passed", ("c, float64",))


def test_what_is_not_judged_has_not_passed():
    gradient = Item("gradients", "x.weight", True, 1e-2, tolerance=math.inf)
    assert verdicts(case_of(gradient))["gradients"].verdict == "not judged"
    assert verdicts(case_of(gradient))["gradients"].judged == 0
    both = verdicts(case_of(gradient), case_of(Item("gradients", "x.weight", True, 1e-12, tolerance=1e-9)))
    assert (both["gradients"].verdict, both["gradients"].judged) == ("passed", 1)
    wrong = verdicts(case_of(Item("gradients", "x.weight", False, tolerance=math.inf)))
    assert (wrong["gradients"].verdict, wrong["gradients"].judged, wrong["gradients"].failed) == ("broken", 1, 1)
    asked = verdicts(case_of(Item("losses", "loss_ce", True)), left_out=stages.LEFT_OUT)
    assert {name for name, stage in asked.items() if stage.verdict == "not judged"} == set(stages.LEFT_OUT)
    assert asked["post-processing"].verdict == "not recorded"


@pytest.mark.parametrize("all_stages", [False, True])
def test_a_check_stops_behind_the_first_broken_stage(all_stages, converted, monkeypatch, capsys):
    kernel = weight("sem_seg_head.pixel_decoder.layer_2.weight", lambda values: values * 1.01)
    options = ("--dtype", "float64", *(["--all-stages"] if all_stages else []))
    code, report = run_broken(kernel, converted("tiny_per_pixel"), GOLDEN / "whole" / "tiny_per_pixel", monkeypatch, capsys, *options)
    assert code == cli.MISMATCH
    found = {stage["name"]: stage["verdict"] for stage in report["stages"]}
    assert [found[name] for name in ("backbone", "pixel decoder")] == ["passed", "broken"]
    later = [found[name] for name in ("heads", "losses", "gradients", "post-processing")]
    # Backwards the same kernel is wrong once more.
    assert later == (["inherits", "inherits", "broken", "inherits"] if all_stages else ["not judged"] * 4)
    [case] = report["cases"]
    assert case["stopped"] == ("" if all_stages else "pixel decoder")
    assert {item["group"] for item in case["items"]} >= ({"losses", "gradients", "variables"} if all_stages else {"taps"})
    assert report["verdict_kind"] == "bug"
    assert set(report["stages"][-1]["not_judged"]) == (set() if all_stages else {"odd, float64"})
    wrong = [item for item in case["items"] if item["group"] == "taps" and not item["passed"]]
    assert [item["name"] for item in wrong if not item["local_passed"]] == ["sem_seg_head.pixel_decoder.layer_2.norm#0"]
    assert len(wrong) > 1
    assert report["first_failure"]["name"] == wrong[0]["name"]


def test_every_group_of_a_made_check_has_a_stage():
    found = made_checks.passing()
    expected = {"passed": 8, "not recorded": 5, "not judged": 1, "nothing to judge": 1}
    assert collections.Counter(stage.verdict for stage in found.stages) == expected
    assert check.Check(Settings("", ""), made_checks.ENVIRONMENT, {}, {}, (), ()).stages[3].verdict == "not recorded"
