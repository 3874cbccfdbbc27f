"""The check's own proof, fault by fault and clean run by clean run, and the command that tells of it.

What the last whole proof came to is kept in docs/selftest.json, where there is one: a fault must not become harder to place or to name than
it was then.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from parity import cli, selftest
from parity.faults import FAULTS, HELD_OUT, KINDS
from parity.faults.fault import OTHER, weight
from parity.selftest import Clean, Proof, Trial
from tfmaskformer.module import named_modules, named_variables

DOCS = Path(__file__).parents[2] / "docs"
PROOF = DOCS / "selftest.json"
RECORD = {fault["name"]: fault for fault in json.loads(PROOF.read_text(encoding="utf-8"))["faults"]} if PROOF.is_file() else {}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return selftest.Bench(tmp_path_factory.mktemp("selftest"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught_and_named(fault, bench):
    trial = bench.trial(fault)
    record = RECORD.get(fault.name, {"localised": False, "finding": None})
    assert trial.killed
    assert trial.localised or not record["localised"], (trial.told, fault.where)
    assert trial.finding == fault.cause or record["finding"] != fault.cause, (trial.finding, trial.statement)


@pytest.mark.parametrize("fault", HELD_OUT, ids=lambda fault: fault.name)
def test_a_fault_that_the_diagnosis_had_not_seen_is_caught(fault, bench):
    assert bench.trial(fault).killed


@pytest.mark.parametrize("run", list(selftest.clean_runs()), ids=" ".join)
def test_nothing_fails_without_a_fault(run, bench):
    assert bench.clean(*run).failures == ()


@pytest.mark.skipif(not RECORD, reason="the whole proof is not there; parity-check selftest --json docs/selftest.json makes it")
def test_the_record_is_the_proof_of_these_faults():
    assert list(RECORD) == [fault.name for fault in FAULTS]
    for fault in FAULTS:
        record = RECORD[fault.name]
        for field in ("kind", "model", "case", "padding", "group", "where", "cause", "first"):
            assert record[field] == getattr(fault, field)
    document = json.loads((DOCS / "selftest.json").read_text(encoding="utf-8"))
    assert document["passed"]
    assert len({(run["trace"], run["case"]) for run in document["clean"]}) >= 20
    assert document["false_alarms"] == 0
    trials = tuple(
        Trial(fault, record["killed"], tuple(record["told"]), record["localised"], record["finding"], record["statement"])
        for fault, record in zip(FAULTS, RECORD.values(), strict=True)
    )
    clean = tuple(Clean(**run | {name: tuple(run[name]) for name in ("failures", "noise")}) for run in document["clean"])
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert f"{selftest.MARKS[0]}\n{selftest.table(Proof(clean, trials))}\n{selftest.MARKS[1]}" in readme


def test_there_are_faults_of_every_kind():
    assert {fault.kind for fault in FAULTS} == set(KINDS)
    assert len(FAULTS) >= 64
    assert len({fault.name for fault in (*FAULTS, *HELD_OUT)}) == len(FAULTS) + len(HELD_OUT)
    assert sum(fault.first for fault in FAULTS) == 59
    assert {fault.model for fault in FAULTS} == set(selftest.TRACES)


def test_the_first_float32_failure_is_the_same(bench):
    """Without replay and without float64."""
    [fault] = [fault for fault in FAULTS if fault.name == "transposed 256×256 kernel"]
    trace = selftest.TRACES[fault.model]
    model = bench.model(trace, "float32")
    with fault.apply(model):
        found = bench.check(trace, selftest.GOLDEN / trace, fault.case, "float32", "official")
    [case] = [case for case in found.cases if case.dtype == "float32"]
    assert case.failures[0].name == f"{fault.where}#0"


def test_a_fault_leaves_nothing_behind(bench):
    """Variables, attributes of modules and the functions of the package."""

    def state(model):
        variables = {name: variable.numpy().tobytes() for name, variable in named_variables(model).items()}
        attributes = {(path, name): id(value) for path, module in named_modules(model) for name, value in vars(module).items()}
        own = {name: module for name, module in sys.modules.items() if name.startswith(("tfmaskformer", "tensorflow.nn"))}
        functions = {(name, key): id(value) for name, module in own.items() for key, value in list(vars(module).items())}
        classes = {
            (name, key, method): id(function)
            for name, module in own.items()
            if name.startswith("tfmaskformer")
            for key, value in vars(module).items()
            if isinstance(value, type)
            for method, function in vars(value).items()
            if callable(function)
        }
        return variables | attributes | functions | classes | {"config": model.config}

    for name in {fault.model for fault in FAULTS}:
        model = bench.model(selftest.TRACES[name], "float64")
        before = state(model)
        for fault in (*FAULTS, *HELD_OUT):
            if fault.model == name:
                with fault.apply(model):
                    pass
        after = state(model)
        assert {key for key in before if before[key] != after[key]} == set()


def test_a_fault_acts_while_it_lasts(bench):
    model = bench.model(selftest.TRACES["tiny_per_pixel"], "float64")
    variable = named_variables(model)["sem_seg_head.predictor.bias"]
    before = variable.numpy()
    with pytest.raises(ZeroDivisionError), weight("sem_seg_head.predictor.bias", lambda values: values + 1)(model):  # noqa: PT012
        np.testing.assert_array_equal(variable.numpy(), before + 1)
        raise ZeroDivisionError
    np.testing.assert_array_equal(variable.numpy(), before)


def test_a_check_that_breaks_off_places_nothing(bench, monkeypatch):
    [fault] = [fault for fault in FAULTS if fault.name == "missing bias of the classifier"]
    bench.completed(selftest.TRACES[fault.model], fault.case, False)
    monkeypatch.setattr(bench, "check", lambda *_, **__: [][0])
    trial = bench.trial(fault)
    assert (trial.killed, trial.localised, trial.told) == (True, False, ("error", "IndexError: list index out of range"))


def test_what_counts_as_the_same_place(bench):
    model = bench.model(selftest.TRACES["tiny_panoptic"], "float64")
    fault = dataclasses.replace(FAULTS[0], group="taps", where="backbone.res2.0.conv1")
    for group, name, expected in (
        ("taps", "backbone.res2.0.conv1#0", True),
        ("taps", "backbone.res2.0.conv1.norm#0", True),  # one operation
        ("taps", "backbone.res2.0.conv2.norm#0", False),
        ("taps", "backbone.res2.0#0", False),
        ("gradients", "backbone.res2.0.conv1.weight", False),
    ):
        assert selftest.is_at(model, fault, group, name) is expected
    norm = dataclasses.replace(fault, where="sem_seg_head.predictor.transformer.decoder.norm")
    assert not selftest.is_at(model, norm, "taps", "sem_seg_head.predictor.transformer.decoder#0")  # a norm of no convolution
    loss = dataclasses.replace(fault, group="losses", where="loss_ce")
    assert selftest.is_at(model, loss, "losses", "loss_ce")
    assert not selftest.is_at(model, loss, "losses", "loss_ce_0")
    gradient = dataclasses.replace(fault, group="gradients")
    assert selftest.is_at(model, gradient, "gradients", "backbone.res2.0.conv1.weight")
    assert selftest.is_at(model, gradient, "tap_gradients", "backbone.res2.0.conv1#0")
    assert not selftest.is_at(model, gradient, "taps", "backbone.res2.0.conv1#0")
    read = dataclasses.replace(fault, group="preprocessing", where="read")
    assert selftest.is_at(model, read, "preprocessing", "0/read/png")
    assert not selftest.is_at(model, read, "preprocessing", "0/resized/photograph")
    images = dataclasses.replace(fault, where="images")
    assert selftest.is_at(model, images, "taps", "images#0")
    assert selftest.is_at(model, images, "preprocessing", "0/canvas")
    step = dataclasses.replace(fault, group="steps", where="clipped")
    assert selftest.is_at(model, step, "clipped", "1/clipped.each/backbone.stem.conv1.weight")
    assert not selftest.is_at(model, step, "steps", "1/lr")


# --- what is told


def trial(killed=True, localised=True, finding=None, **fault):
    base = next(one for one in FAULTS if one.cause == "transpose")
    made = dataclasses.replace(base, **fault)
    return Trial(made, killed, ("taps", "a#0"), localised, made.cause if finding is None else finding)


CLEAN = Clean("selftest/tiny_swin_4", "one", "float64", "official", ((61, 87),), ())


@pytest.mark.parametrize(
    ("trials", "clean", "passed"),
    [
        ([trial()] * 20, [CLEAN], True),
        ([trial()] * 20, [dataclasses.replace(CLEAN, failures=("taps 'a#0'",))], False),
        ([*[trial()] * 99, trial(killed=False, localised=False, finding="")], [CLEAN], False),
        ([*[trial()] * 95, *[trial(localised=False)] * 5], [CLEAN], True),
        ([*[trial()] * 94, *[trial(localised=False)] * 6], [CLEAN], False),
        ([*[trial()] * 80, *[trial(finding="eps")] * 20], [CLEAN], True),
        ([*[trial()] * 79, *[trial(finding="")] * 21], [CLEAN], False),
        ([*[trial()] * 79, *[trial(cause=OTHER)] * 21], [CLEAN], False),
    ],
)
def test_what_is_proven(trials, clean, passed):
    assert Proof(tuple(clean), tuple(trials)).passed is passed


def test_told_by_name():
    trials = (
        trial(name="one that lives", killed=False, localised=False, finding=""),
        trial(name="one elsewhere", localised=False),
        trial(name="one misnamed", finding="eps"),
        trial(name="one without a word", cause=OTHER, kind="losses", finding="eps"),
        trial(name="one that is right"),
    )
    proof = Proof((CLEAN, dataclasses.replace(CLEAN, dtype="float32", failures=("taps 'a#0'",))), trials)
    text = selftest.text(proof)
    assert "false alarm: selftest/tiny_swin_4 one, float32, official padding: taps 'a#0'" in text
    assert "survives: one that lives (weights, " in text
    assert "elsewhere: one elsewhere: told taps 'a#0', expected taps '" in text
    assert "cause: one misnamed: told eps, expected transpose" in text
    assert "cause: one without a word: told eps, expected none" in text
    assert "one that is right" not in text
    assert "| weights | 4 | 3 of 4 | 2 of 4 | 2 of 4 | – |" in text
    assert "| losses | 1 | 1 of 1 | 1 of 1 | 0 of 1 | 0 of 1 |" in text
    assert "| all | 5 | 4 of 5 | 3 of 5 | 2 of 5 | 0 of 1 |" in text
    assert text.splitlines()[-1].startswith("NOT PROVEN: killed 4 of 5 (at least 100%), right module 3 of 5 (at least 95%)")
    document = json.loads(selftest.as_json(proof))
    assert (document["passed"], document["false_alarms"], document["figures"]["killed"]) == (False, 1, {"found": 4, "of": 5, "least": 1.0})
    assert document["faults"][2]["finding"] == "eps"


@pytest.fixture
def quick(monkeypatch):
    """A proof without runs; what becomes of each fault is given."""
    outcome = {}
    monkeypatch.setattr(selftest.Bench, "clean", lambda self, *run: dataclasses.replace(CLEAN, trace=run[0], case=run[1]))
    monkeypatch.setattr(
        selftest.Bench,
        "trial",
        lambda self, fault: Trial(fault, outcome.get("killed", True), ("taps", "a#0"), True, outcome.get("finding", fault.cause)),
    )
    return outcome


def test_command(quick, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{selftest.MARKS[0]}\nold\n{selftest.MARKS[1]}\nafter\n", encoding="utf-8")
    assert cli.main(["selftest", "--json", str(tmp_path / "a.json"), "--readme", str(readme)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("proven: ")
    assert f"{len(FAULTS)} of {len(FAULTS)}: " in printed.err
    assert json.loads((tmp_path / "a.json").read_text())["passed"]
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{selftest.MARKS[0]}\n| faults in |")
    assert text.endswith(f"{selftest.MARKS[1]}\nafter\n")
    assert "old" not in text
    assert cli.main(["selftest", "--only", "losses", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {fault["kind"] for fault in document["faults"]} == {"losses"}
    assert document["clean"] == []
    assert cli.main(["selftest", "--json", "/dev/full", "--readme", str(readme)]) == 3
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("proven: ")
    assert "error: cannot write '/dev/full'" in printed.err
    quick["finding"] = ""  # as it may be of faults that the diagnosis had not seen
    assert cli.main(["selftest", "--only", "losses"]) == 1
    assert cli.main(["selftest", "--only", "held-out"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith(f"proven: killed {len(HELD_OUT)} of {len(HELD_OUT)} (at least 100%), right module ")
    assert HELD_OUT[-1].name in printed.err
    quick["killed"] = False
    assert cli.main(["selftest", "--only", "held-out"]) == 1
    assert "NOT PROVEN" in capsys.readouterr().out
    assert cli.main(["selftest", "--only", "matcher"]) == 1
    assert "survives: greedy assignment (matcher, tiny_panoptic odd)" in capsys.readouterr().out


def test_what_cannot_be_run(quick, tmp_path, capsys, monkeypatch):
    assert cli.main(["selftest", "--only", "typos"]) == 2
    assert "there is no kind of faults 'typos'; expected one of weights, layers, " in capsys.readouterr().err
    (tmp_path / "a.md").write_text("no place")
    assert cli.main(["selftest", "--readme", str(tmp_path / "a.md")]) == 2
    assert "has no lines '<!-- made by parity-check selftest -->'" in capsys.readouterr().err
    for place in (tmp_path, tmp_path / "nowhere" / "x.json"):
        assert cli.main(["selftest", "--json", str(place)]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)  # nothing was begun
        assert printed.err.startswith(f"error: cannot write '{place}'")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["selftest", "--only", "losses", "--readme", str(tmp_path / "a.md")])
    assert "--readme takes the whole proof" in capsys.readouterr().err
    monkeypatch.setattr(selftest, "GOLDEN", tmp_path)
    assert cli.main(["selftest"]) == 3
    message = capsys.readouterr().err
    assert "selftest/tiny_panoptic_0/manifest.json" in message
    assert "they belong to the repository, not to the package" in message
