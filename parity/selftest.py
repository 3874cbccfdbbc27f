"""The harness's own proof: faults are made in TensorFlow's side, one at a time, and the check has to catch each and say where it is.

First the clean runs: models of other weights (seeds), architectures and image sizes, on which nothing may fail. Then each fault of
:mod:`parity.faults`: *killed* if the check fails, *localised* if what it names is the faulty module itself, and its *cause* right if the
diagnosis says what was done. All of it in one process, in eager mode; of the faults in float64 alone, in which a bug stays and noise drops.

The traces hold samples of large tensors (``tests/golden``), but a replay of single modules needs whole ones. So the clean TensorFlow model,
once its check has passed, completes each trace: what is stored stays as the official code made it, the rest differs from that by 1e-13.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from checkpoints import registry, synthesize
from parity import check, probes, tap_rules
from parity.judge import case_inputs
from parity.page import replaced_between
from parity.trace import Trace, TraceFileWriter, write_manifest

if TYPE_CHECKING:
    from parity.check import Check
    from parity.faults import Fault
    from tfmaskformer.model import MaskFormer

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
"""Traces lie beside the tests: an installed package has none."""

TRACES = {
    "tiny_panoptic": "selftest/tiny_panoptic_0",
    "tiny_semantic": "selftest/tiny_semantic_0",
    "tiny_deeplab": "tiny_deeplab",
    "tiny_swin": "tiny_swin",
    "tiny_per_pixel": "tiny_per_pixel",
    "tiny_per_pixel_plus": "tiny_per_pixel_plus",
    "tiny_panoptic_9": "selftest/tiny_panoptic_9",
}
"""Test model → the trace on which faults are made, below :data:`GOLDEN`."""

OTHER_SEEDS = (
    "selftest/tiny_panoptic_1",
    "selftest/tiny_semantic_2",
    "selftest/tiny_deeplab_3",
    "selftest/tiny_swin_4",
    "selftest/tiny_swin_5",
    "selftest/tiny_per_pixel_6",
    "selftest/tiny_per_pixel_plus_7",
    "selftest/tiny_panoptic_8",
)
"""Traces of other weights, for clean runs only."""

SILENCED = {("tiny_panoptic", 9): 28.0}
"""Test model and seed → what is added to the bias of "no object", so that in one image nothing is found, and in another something."""

LEAST = {"killed": 1.0, "right module": 0.95, "right cause": 0.8}
"""Shares below which the proof fails."""

LEAST_HELD_OUT = {"killed": 1.0, "right module": 0.0, "right cause": 0.0}
"""Of faults that the diagnosis had not seen (:data:`parity.faults.HELD_OUT`): none may survive, the rest is told."""


class SelftestError(RuntimeError):
    """The proof could not be run; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Clean:
    """A run of the unbroken model.

    Attributes:
        trace, case: on what; a trace's name ends with the seed of its weights.
        sizes_px: (height, width) of the images.
        failures: what failed all the same, if the verdict is not noise: false alarms.
        noise: what failed in float32 and not in float64, as the verdict says: on images this small float32 may.
    """

    trace: str
    case: str
    dtype: str
    padding: str
    sizes_px: tuple[tuple[int, int], ...]
    failures: tuple[str, ...]
    noise: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trial:
    """A fault, and what became of it.

    Attributes:
        killed: the check failed.
        told: group and name of what it named.
        localised: that is the faulty module, or what comes directly out of it.
        finding: the cause that the diagnosis found; "" for none.
        statement: what it said.
        seconds: of the check.
    """

    fault: Fault
    killed: bool
    told: tuple[str, str] = ("", "")
    localised: bool = False
    finding: str = ""
    statement: str = ""
    seconds: float = 0.0

    @property
    def named(self) -> bool:
        """The cause is right."""
        return bool(self.finding) and self.finding == self.fault.cause


@dataclasses.dataclass(frozen=True)
class Proof:
    """All of it; ``least`` are the shares below which it fails."""

    clean: tuple[Clean, ...]
    trials: tuple[Trial, ...]
    least: Mapping[str, float] = dataclasses.field(default_factory=lambda: LEAST)

    @property
    def false_alarms(self) -> tuple[Clean, ...]:
        """Clean runs in which something failed."""
        return tuple(run for run in self.clean if run.failures)

    def figures(self) -> dict[str, tuple[int, int]]:
        """Killed, right module, right cause: how many, of how many. A cause that the diagnosis has no word for cannot be right."""
        return {
            "killed": (sum(trial.killed for trial in self.trials), len(self.trials)),
            "right module": (sum(trial.localised for trial in self.trials), len(self.trials)),
            "right cause": (sum(trial.named for trial in self.trials), len(self.trials)),
        }

    @property
    def passed(self) -> bool:
        """No false alarm, and no share below the least."""
        return not self.false_alarms and all(found >= self.least[name] * of for name, (found, of) in self.figures().items())


def entry_and_seed(trace: str) -> tuple[registry.Entry, int]:
    """Whose weights a trace has, by its name: ``tiny_swin_4`` has those of seed 4, without a number it is 0."""
    name = trace.rpartition("/")[2]
    found = re.fullmatch(r"(.+?)_(\d+)", name)
    return (registry.entry(found[1]), int(found[2])) if found else (registry.entry(name), 0)


def write_source(entry: registry.Entry, seed: int, destination: Path) -> None:
    """The official checkpoint of a test model with synthetic weights of a seed."""
    tensors = synthesize.synthesize(entry, seed)
    if silence := SILENCED.get((entry.name, seed)):
        tensors["sem_seg_head.predictor.class_embed.bias"][-1] += np.float32(silence)
    synthesize.write_pickle(tensors, destination)


class Bench:
    """Models and traces, each made once.

    Args:
        scratch: a folder for converted checkpoints and completed traces.
    """

    def __init__(self, scratch: Path):
        probes.examine()  # is remembered: not what it finds while a fault is there
        self.scratch = scratch
        self.checkpoint = functools.cache(self._checkpoint)
        self.model = functools.cache(self._model)
        self.completed = functools.cache(self._completed)
        self.first_step = functools.cache(self._first_step)

    def _checkpoint(self, trace: str) -> Path:
        from converters.convert import convert

        entry, seed = entry_and_seed(trace)
        folder = self.scratch / f"{entry.name}_{seed}"
        folder.mkdir()
        source = folder / "model_final.pkl"
        write_source(entry, seed, source)
        convert(source, folder / "tf_ckpt", config=entry.name)
        return folder / "tf_ckpt"

    def _model(self, trace: str, dtype: str) -> MaskFormer:
        from tfmaskformer.checkpoint import load

        return load(self.checkpoint(trace), dtype)

    def check(self, trace: str, reference: Path, case: str, dtype: str, padding: str, gradients: bool = True) -> Check:
        """A check in eager mode, of the model as it is now."""
        checkpoint = str(self.checkpoint(trace))
        settings = check.Settings(checkpoint, str(reference), (dtype,), (case,), "eager", padding, gradients=gradients)
        models = {name: self.model(trace, name) for name in {dtype, "float64"}}  # what fails in float32 is run again in float64
        with mock.patch("tfmaskformer.checkpoint.load", side_effect=lambda _, dtype: models[dtype]):
            return check.check(settings)

    def _completed(self, trace: str, case: str, backwards: bool) -> Path:
        """A trace of one case, with whole tensors where the golden has samples; with gradients only if ``backwards``."""
        from parity.tensorflow_run import run

        model, golden = self.model(trace, "float64"), Trace(GOLDEN / trace)
        folder = self.scratch / "completed" / trace.replace("/", "_") / f"{case}{'_backwards' * backwards}"
        folder.mkdir(parents=True)
        partners = tap_rules.partners(model.config)
        with golden.case(case) as opened:
            reference = opened.reference
            [results] = run(model, [case_inputs(opened, "float64")], mode="eager", gradients="all")
            with TraceFileWriter(folder, case, "float64", runs=reference.runs, samples=None, facts=reference.facts) as writer:
                for (group, name), record in reference.records.items():
                    partner = partners.get(name, (name, ""))[0] if group in ("taps", "tap_gradients") else name
                    whole = reference.read(group, name) if record.samples is None else results.official(group, partner)
                    writer.add(group, name, whole)
                    writer.set_floor(group, name, record.floor)
        shutil.copyfile(opened.baseline.path, folder / opened.baseline.path.name)
        write_manifest(folder, golden.provenance, {case: golden.manifest["cases"][case]})
        return folder

    def clean(self, trace: str, case: str, dtype: str, padding: str) -> Clean:
        """A run of the model as it should be."""
        found = self.check(trace, GOLDEN / trace, case, dtype, padding)
        failures = [f"{item.group} '{item.name}'" for run in found.cases for item in run.failures]
        if not found.median_passed:
            failures.append(f"median of error / floor {found.median_ratio:.2f}")
        told = {"noise" if found.verdict_kind == "noise" else "failures": tuple(failures)}
        return Clean(trace, case, dtype, padding, found.cases[0].sizes_px, **({"failures": ()} | told))

    def trial(self, fault: Fault) -> Trial:
        """Makes a fault and checks; afterwards the model is as it was."""
        if fault.group == "steps":
            return self._trial_of_a_step(fault)
        trace = TRACES[fault.model]
        model = self.model(trace, "float64")
        backwards = fault.kind == "gradients"  # all others have to show on the way forwards
        reference = self.completed(trace, fault.case, backwards)  # by the unbroken model
        start = time.perf_counter()
        try:
            with fault.apply(model):
                found = self.check(trace, reference, fault.case, "float64", fault.padding, gradients=backwards)
        except Exception as error:  # it has not been missed, but nothing is said of where it is
            return Trial(fault, True, ("error", f"{type(error).__name__}: {error}"), seconds=time.perf_counter() - start)
        seconds = time.perf_counter() - start
        if found.first_failure is None:
            return Trial(fault, False, seconds=seconds)
        case, item = found.first_failure
        cause, statement = next(((finding.cause, finding.statement) for finding in case.findings), ("", ""))
        return Trial(fault, True, (item.group, item.name), is_at(model, fault, item.group, item.name), cause, statement, seconds)

    def _trial_of_a_step(self, fault: Fault) -> Trial:
        """The first step of a training, with the losses and gradients of the unbroken model: what comes behind them is broken."""
        from parity import trajectory
        from tfmaskformer.criterion import SetCriterion
        from tfmaskformer.module import named_variables
        from tfmaskformer.training.step import TrainStep

        trace = TRACES[fault.model]
        checkpoint, reference = self.checkpoint(trace), GOLDEN / "trajectory" / fault.model
        model, honest = self.model(trace, "float64"), self.first_step(fault.model)

        def gradients(step: TrainStep, *batch: Any) -> Any:
            step.criterion({}, {})  # whose assignment is judged too
            return honest.gradients

        start = time.perf_counter()
        with (
            fault.apply(model),
            _kept(named_variables(model)) as restore,
            mock.patch("tfmaskformer.checkpoint.load", side_effect=lambda *_: restore() or model),
            mock.patch.object(SetCriterion, "__call__", return_value=honest.matched),
            mock.patch.object(TrainStep, "gradients", gradients),
        ):
            [found] = trajectory.check(checkpoint, reference, names=[fault.case], dtypes=["float64"], steps=1, mode="eager")
        seconds = time.perf_counter() - start
        item = found.first_failure
        if item is None:
            return Trial(fault, False, seconds=seconds)
        cause, statement = (found.finding.cause, found.finding.statement) if found.finding else ("", "")
        return Trial(fault, True, (item.group, item.name), is_at(model, fault, item.group, item.name), cause, statement, seconds)

    def _first_step(self, model_name: str) -> _Step:
        """Of the unbroken model, which must be right."""
        from parity import trajectory
        from tfmaskformer.criterion import SetCriterion
        from tfmaskformer.module import named_variables
        from tfmaskformer.training.step import TrainStep

        trace, seen = TRACES[model_name], {}
        model, reference = self.model(trace, "float64"), GOLDEN / "trajectory" / model_name
        take_gradients, match = TrainStep.gradients, SetCriterion.__call__

        def gradients(step: TrainStep, *batch: Any) -> Any:
            seen["gradients"] = take_gradients(step, *batch)
            return seen["gradients"]

        def matched(criterion: SetCriterion, *arguments: Any) -> Any:
            seen["matched"] = match(criterion, *arguments)
            return seen["matched"]

        with (
            _kept(named_variables(model)),
            mock.patch("tfmaskformer.checkpoint.load", return_value=model),
            mock.patch.object(TrainStep, "gradients", gradients),
            mock.patch.object(SetCriterion, "__call__", matched),
        ):
            [found] = trajectory.check(self.checkpoint(trace), reference, names=["plain"], dtypes=["float64"], steps=1, mode="eager")
        if not found.passed:
            raise SelftestError(f"the first step of '{reference}' fails without a fault: {found.first_failure}")
        return _Step(**seen)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What the losses of a training step come to: results of ``TrainStep.gradients`` and of the criterion."""

    gradients: Any
    matched: Any


@contextlib.contextmanager
def _kept(variables: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Variables are afterwards, and whenever the function is called, what they were."""
    before = {name: variable.numpy() for name, variable in variables.items()}

    def restore() -> None:
        for name, variable in variables.items():
            variable.assign(before[name])

    try:
        yield restore
    finally:
        restore()


def is_at(model: MaskFormer, fault: Fault, group: str, name: str) -> bool:
    """Whether what a check named is what a fault is in.

    Of modules that is the module itself; a convolution and the norm in it are one operation. The network's input is judged as the tap
    ``images`` or, with masked padding, as the canvas. Of the two ends and of a training, the fault tells the step.
    """
    if fault.where == "images":
        return name.endswith("/canvas") or name == "images#0"
    if fault.group == "steps":
        return fault.where in name.replace(".each", "").split("/")
    if group != fault.group and group != f"tap_{fault.group}":
        return False
    if group in ("preprocessing", "metrics"):
        return f"/{fault.where}/" in f"/{name}/"
    if group == "gradients":
        name = name.rpartition(".")[0]
    if group in ("taps", "gradients", "tap_gradients"):
        return _operation(model, name.partition("#")[0]) == _operation(model, fault.where)
    return name == fault.where


def _operation(model: MaskFormer, module: str) -> str:
    from tfmaskformer.layers import Conv2d
    from tfmaskformer.module import named_modules

    owner, _, last = module.rpartition(".")
    return owner if last == "norm" and isinstance(dict(named_modules(model)).get(owner), Conv2d) else module


def clean_runs() -> Iterator[tuple[str, str, str, str]]:
    """Trace, case, dtype and padding of each: all cases in both dtypes; of one image with masked padding too, in float64."""
    for trace in (*TRACES.values(), *OTHER_SEEDS):
        manifest = Trace(GOLDEN / trace).manifest
        for case, facts in manifest["cases"].items():
            for dtype in ("float32", "float64"):
                yield trace, case, dtype, "official"
            if len(facts["images"]) == 1:
                yield trace, case, "float64", "masked"


def prove(only: str = "", progress: Callable[[str], None] = lambda text: None) -> Proof:
    """Runs everything.

    Args:
        only: a kind of faults (:data:`parity.faults.KINDS`), "held-out", or "clean"; "": all but those held out.
        progress: is told each step.

    Raises:
        ValueError: there is no such kind.
        SelftestError: the traces are not here.
    """
    needed = [f"{trace}/manifest.json" for trace in (*TRACES.values(), *OTHER_SEEDS)]
    needed += [f"trajectory/{name}/plain.float64.h5" for name in ("tiny_panoptic", "tiny_swin")]
    if missing := [file for file in needed if not (GOLDEN / file).is_file()]:
        raise SelftestError(
            f"the traces that the proof needs are not in '{GOLDEN}': {', '.join(missing)}\n"
            "  they belong to the repository, not to the package: clone it, and run parity-check there"
        )
    from parity.faults import FAULTS, HELD_OUT, KINDS

    if only not in ("", "clean", "held-out", *KINDS):
        raise ValueError(f"there is no kind of faults '{only}'; expected one of {', '.join(KINDS)}, held-out, or clean")
    with tempfile.TemporaryDirectory(prefix="parity-selftest-") as scratch:
        bench = Bench(Path(scratch))
        clean, trials = [], []
        for run in clean_runs() if only in ("", "clean") else ():
            progress("clean: {}, {}, {}, {} padding".format(*run))
            clean.append(bench.clean(*run))
        chosen = HELD_OUT if only == "held-out" else [fault for fault in FAULTS if only in ("", fault.kind)]
        for number, fault in enumerate(chosen, 1):
            progress(f"{number} of {len(chosen)}: {fault.name}")
            trials.append(bench.trial(fault))
    return Proof(tuple(clean), tuple(trials), LEAST_HELD_OUT if only == "held-out" else LEAST)


def table(proof: Proof) -> str:
    """Markdown: how many faults of each kind were killed, localised and rightly named, and the clean runs."""
    kinds = list(dict.fromkeys(trial.fault.kind for trial in proof.trials))
    lines = ["| faults in | made | killed | right module | right cause | no word for the cause: silent |", "|---|---:|---:|---:|---:|---:|"]
    for name in (*kinds, "all"):
        part = Proof((), tuple(trial for trial in proof.trials if name in (trial.fault.kind, "all")))
        others = [trial for trial in part.trials if not trial.fault.cause]
        shares = [_share(*share) for share in part.figures().values()]
        shares.append(_share(sum(not trial.finding for trial in others), len(others)))
        lines.append(f"| {name} | {len(part.trials)} | {' | '.join(shares)} |")
    distinct = len({(run.trace, run.case) for run in proof.clean})
    models = len({entry_and_seed(run.trace)[0].name for run in proof.clean})
    noisy = sum(bool(run.noise) for run in proof.clean)
    lines += [
        "",
        f"{len(proof.clean)} clean runs ({distinct} combinations of weights and sizes, {models} architectures, float32 and float64, both "
        f"kinds of padding): {len(proof.false_alarms)} false alarms. {noisy} of those in float32 failed by so little that the verdict is "
        "noise: their images are too small for float32 ([why](docs/parity.md)).",
    ]
    return "\n".join(lines)


def _share(found: int, of: int) -> str:
    return f"{found} of {of}" if of else "–"


def text(proof: Proof) -> str:
    """For a terminal: what went wrong by name, the table, the verdict."""
    lines = [f"false alarm: {run.trace} {run.case}, {run.dtype}, {run.padding} padding: {run.failures[0]}" for run in proof.false_alarms]
    for trial in proof.trials:
        fault = trial.fault
        expected = f"{fault.group} '{fault.where}'"
        if not trial.killed:
            lines.append(f"survives: {fault.name} ({fault.kind}, {fault.model} {fault.case})")
        elif not trial.localised:
            lines.append(f"elsewhere: {fault.name}: told {trial.told[0]} '{trial.told[1]}', expected {expected}")
        elif trial.finding != fault.cause:
            lines.append(f"cause: {fault.name}: told {trial.finding or 'none'}, expected {fault.cause or 'none'}")
    shares = ", ".join(f"{name} {_share(*share)} (at least {proof.least[name]:.0%})" for name, share in proof.figures().items())
    verdict = (
        f"{'proven' if proof.passed else 'NOT PROVEN'}: {shares}, {len(proof.false_alarms)} false alarms in {len(proof.clean)} clean runs"
    )
    return "\n".join([*lines, "" * bool(lines), table(proof), "", verdict])


def as_json(proof: Proof) -> str:
    """Everything, for machines."""
    trials = [
        {
            **{
                field: getattr(trial.fault, field)
                for field in ("name", "kind", "model", "case", "padding", "group", "where", "cause", "first")
            },
            "killed": trial.killed,
            "localised": trial.localised,
            "told": list(trial.told),
            "finding": trial.finding,
            "statement": trial.statement,
            "seconds": round(trial.seconds, 3),
        }
        for trial in proof.trials
    ]
    document = {
        "format": "parity-selftest",
        "passed": proof.passed,
        "figures": {name: {"found": found, "of": of, "least": proof.least[name]} for name, (found, of) in proof.figures().items()},
        "false_alarms": len(proof.false_alarms),
        "clean": [dataclasses.asdict(run) for run in proof.clean],
        "faults": trials,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


MARKS = ("<!-- made by parity-check selftest -->", "<!-- end of parity-check selftest -->")
"""Between these a Markdown file has the table."""


def page_with(readme: Path, content: str) -> str:
    """What a Markdown file has, with other content between its :data:`MARKS`.

    Raises:
        OSError, ValueError: it cannot be read, or does not have them.
    """
    try:
        return replaced_between(readme.read_text(encoding="utf-8"), *MARKS, content)
    except ValueError as error:
        raise ValueError(f"'{readme}': {error}") from error
