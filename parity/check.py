"""One check: a TensorFlow checkpoint against a trace, as result objects that know everything and print nothing.

Beside its cases a trace may have trainings (:mod:`parity.trajectory`): their first step is judged as a case of its own.

The order is validate, probe the environment, run, compare, account. Nothing is skipped: what has no partner on the other side fails
the check, unless :data:`parity.tap_rules.EXEMPT` has its exact name and a reason.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters import ports
from parity import compare, ends, judge, probes, stages, trajectory, verdict
from parity.converted import CheckError, read_manifest, require_same_weights
from parity.evidence import Evidence, Overlay, of_failures, of_results
from parity.judge import COVERAGE, GROUPS, CaseRun, Exemption, Found, Item, LossFloors, case_inputs
from parity.ports import Port, inputs_of
from parity.replay import Replay, replay, replay_port, why_not
from parity.tensorflow_run import CaseResults, run
from parity.trace import Case, Trace

if TYPE_CHECKING:
    from parity.diagnose import Finding

__all__ = ["Check", "CaseCheck", "CheckError", "EnvironmentBrokenError", "Exemption", "Item", "LEDGER", "Settings", "check"]

LEDGER = ("preprocessing", *GROUPS[:-1], "clipped", "steps", "inference", "metrics", *COVERAGE)
"""Groups of what is accounted for, in the order of computation."""

ASKED_OUT = "this check was asked to leave gradients out"
"""Why there are none."""

CANVAS_PX = 128
"""Without ``pad_to``, masked padding takes the next multiple of this that is larger than every image."""


class EnvironmentBrokenError(RuntimeError):
    """An operation that the model uses computes garbage on this machine: no check can be trusted."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        checkpoint: directory written by ``convert``.
        reference: a trace.
        dtypes: "float32", "float64" or both.
        cases: names; empty: all (with masked padding all of one image).
        mode, padding, pad_to: see :func:`parity.tensorflow_run.run`.
        port: file or module of a :class:`parity.ports.Port`; None: MaskFormer.
        all_stages: whether to judge what comes behind the first broken stage.
        gradients: False leaves them out, the training step too, and the memory that they need.
        memory_budget: bytes; see :func:`parity.tensorflow_run.run`.
    """

    checkpoint: str
    reference: str
    dtypes: tuple[str, ...] = ("float32", "float64")
    cases: tuple[str, ...] = ()
    mode: str = "graph"
    padding: str = "official"
    pad_to: tuple[int, int] | None = None
    port: str | None = None
    all_stages: bool = False
    gradients: bool = True
    memory_budget: int | None = None


@dataclasses.dataclass(frozen=True)
class CaseCheck:
    """One case, or the first step of one training, in one dtype.

    Attributes:
        case: its name, or that of the training.
        sizes_px: (height, width) of its images.
        samples: elements stored of each large tensor; None: all.
        local: why local errors are not known; "" where they are.
        stopped: the broken stage behind which nothing was judged; "" without one.
        plan: which stages there are.
        findings: the diagnosis of its first local failure (:mod:`parity.diagnose`), if it has one.
        evidence, overlays: what there is to see of the first failures and of the results.
    """

    case: str
    dtype: str
    sizes_px: tuple[tuple[int, int], ...]
    samples: int | None
    items: tuple[Item, ...]
    exempted: tuple[Exemption, ...]
    local: str = ""
    stopped: str = ""
    plan: stages.Plan = dataclasses.field(default=stages.MASKFORMER, repr=False, compare=False)
    findings: tuple[Finding, ...] = ()
    evidence: tuple[Evidence, ...] = dataclasses.field(default=(), repr=False, compare=False)
    overlays: tuple[Overlay, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def is_step(self) -> bool:
        """Whether this is a step of a training."""
        return self.case.startswith(f"{trajectory.FOLDER}/")

    @property
    def failures(self) -> tuple[Item, ...]:
        """What failed, earliest first; see :meth:`place`."""
        return tuple(sorted((item for item in self.items if not item.passed), key=self.place))

    def place(self, item: Item) -> tuple[int, int]:
        """When an item was computed. Gradients are computed backwards: there the last parameter comes first, and taps lie as they came."""
        position = self._positions[item.group, item.name]
        return self.plan.place(item), -position if item.group == "gradients" else position

    @functools.cached_property
    def _positions(self) -> dict[tuple[str, str], int]:
        return {(item.group, item.name): position for position, item in enumerate(self.items)}

    @property
    def own_failures(self) -> tuple[Item, ...]:
        """The failures that are not known to be inherited, earliest first."""
        return tuple(item for item in self.failures if not item.inherited)

    @property
    def tap_ratios(self) -> list[float]:
        """Error / floor of every tap that has a floor."""
        return [item.ratio for item in self.items if item.group == "taps" and not math.isnan(item.ratio)]

    @property
    def median_ratio(self) -> float:
        """Median over taps of error / floor; nan where no tap has a floor."""
        return _median(self.tap_ratios)

    @property
    def passed(self) -> bool:
        """Every item."""
        return all(item.passed for item in self.items)

    def ledger(self) -> dict[str, dict[str, int]]:
        """Group → how many names were compared, passed, were not judged, failed, had no partner, were exempted.

        Each is passed, not judged (:attr:`parity.judge.Item.judged`) or failed, and compared or without a partner.
        """
        table = {}
        for group in LEDGER:
            items = [item for item in self.items if item.group == group]
            table[group] = {
                "compared": sum(_has_partner(item) for item in items),
                "passed": sum(item.passed and item.judged for item in items),
                "not judged": sum(item.passed and not item.judged for item in items),
                "failed": sum(not item.passed for item in items),
                "no partner": sum(not _has_partner(item) for item in items),
                "exempted": sum(exemption.group == group for exemption in self.exempted),
            }
        return table


def _has_partner(item: Item) -> bool:
    return item.passed if item.group in COVERAGE else item.comparison is not None


@dataclasses.dataclass(frozen=True)
class Check:
    """A whole check.

    Attributes:
        settings: what was asked for.
        environment: what computed.
        source: of the checkpoint's manifest, what it was converted from.
        provenance: of the trace.
        cases: one for each case, or training, and dtype.
        left_out: cases and trainings of the trace that were not checked, and why.
    """

    settings: Settings
    environment: probes.Environment
    source: dict[str, Any]
    provenance: dict[str, Any]
    cases: tuple[CaseCheck, ...]
    left_out: tuple[Exemption, ...]

    @property
    def median_ratio(self) -> float:
        """Median of error / floor over the taps of all cases in float32, for the taps of one case inherit one another's error; else nan."""
        return _median([ratio for case in self.cases if case.dtype == "float32" for ratio in case.tap_ratios])

    @property
    def median_passed(self) -> bool:
        """Judged in float32 only, and of cases: a training step has no taps."""
        return "float32" not in {case.dtype for case in self.cases if not case.is_step} or self.median_ratio <= compare.MEDIAN_FACTOR

    @property
    def passed(self) -> bool:
        """All of it; never of nothing."""
        return bool(self.cases) and self.median_passed and all(case.passed for case in self.cases)

    @property
    def first_failure(self) -> tuple[CaseCheck, Item] | None:
        """The first thing that is wrong by itself; where float64 tells it, of that: it sees faults below float32's noise.

        Of all cases the earliest. Where all failures are inherited, the earliest of those.
        """
        found = [(case, failures[0]) for case in self.cases if (failures := case.own_failures or case.failures)]
        return min(found, key=lambda pair: (pair[1].inherited, pair[0].dtype != "float64", *pair[0].place(pair[1]))) if found else None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The diagnoses of all cases, each told once; that of the first failure first."""
        first = self.first_failure
        cases = sorted(self.cases, key=lambda case: first is None or case is not first[0])
        found = {(finding.where, finding.cause): finding for case in reversed(cases) for finding in case.findings}
        return tuple(reversed(found.values()))

    @property
    def stages(self) -> tuple[stages.Stage, ...]:
        """A verdict for each stage, in the order of computation."""
        plan = self.cases[0].plan if self.cases else stages.MASKFORMER
        return stages.verdicts(plan, self.cases, len(self.environment.probes), () if self.settings.gradients else stages.LEFT_OUT)

    @property
    def verdict_kind(self) -> str:
        """ "match", "bug" or "noise": see :func:`parity.verdict.tell`."""
        return verdict.tell(self).kind

    @property
    def verdict_reason(self) -> str:
        """What the verdict rests on, in a sentence."""
        return verdict.tell(self).reason


def _median(ratios: Sequence[float]) -> float:
    return float(np.median(ratios)) if ratios else math.nan


def check(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> Check:
    """Runs a check.

    Args:
        settings: what to check.
        progress: is told each step.

    Raises:
        CheckError, parity.trace.TraceError, parity.trajectory.StepsError, tfmaskformer.CheckpointError: bad input.
        EnvironmentBrokenError: TensorFlow computes garbage here.
    """
    source = read_manifest(settings.checkpoint)["source"]
    trace = Trace(settings.reference)
    require_same_weights(settings.checkpoint, source, f"'{settings.reference}' was recorded from", trace.provenance.get("checkpoint", {}))
    recorded = _trainings(settings)
    names, left_out = _select(settings, trace, recorded)
    trainings, steps_left_out = _select_trainings(settings, recorded)

    progress("probing the environment")
    environment = probes.examine()
    if environment.broken:
        wrong = ", ".join(f"{probe.name} (error {probe.error:.1e})" for probe in environment.broken)
        raise EnvironmentBrokenError(f"TensorFlow computes garbage on this machine: {wrong}\n  {probes.REMEDY}")

    port = settings.port and ports.read(settings.port)
    if port:
        load = port.load
    else:
        from tfmaskformer.checkpoint import load

    loss_floors = judge.loss_floors_of(trace)
    batches = [names] if settings.padding == "masked" else [(name,) for name in names]
    checked: list[CaseCheck] = []

    def run_all(dtype: str, batches: Sequence[Sequence[str]], trainings: Sequence[str]) -> None:
        model = load(settings.checkpoint, dtype) if batches else None
        for batch in batches:
            progress(f"{', '.join(batch)}: {dtype}")
            if port:
                checked.append(_check_port(settings, trace, batch[0], port, model, dtype, loss_floors))
            else:
                checked.extend(_check_batch(settings, trace, batch, model, dtype, loss_floors))
        del model
        reached = [case for case in checked if case.dtype == dtype]
        for name in trainings:
            if settings.all_stages or not any(_is_before_steps(case.stopped) for case in reached):
                progress(f"training step '{name}': {dtype}")
                checked.append(_check_step(settings, name, dtype))

    for dtype in settings.dtypes:
        run_all(dtype, batches, trainings)
    if "float64" not in settings.dtypes and (failed := {case.case for case in checked if not case.passed}):
        progress("something failed: float64 tells noise from a bug")
        run_all("float64", [batch for batch in batches if failed & set(batch)], [name for name in trainings if name in failed])
    return Check(settings, environment, source, trace.provenance, tuple(checked), left_out + steps_left_out)


def _select(settings: Settings, trace: Trace, trainings: Sequence[str]) -> tuple[tuple[str, ...], tuple[Exemption, ...]]:
    """Names of the cases to check, and those that are left out; ``trainings``: what may be asked for besides."""
    known = (*trace.cases, *trainings)
    unknown = [name for name in settings.cases if name not in known]
    if unknown or not trace.cases:
        raise CheckError(f"trace '{settings.reference}' has no case {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    wanted = tuple(name for name in trace.cases if not settings.cases or name in settings.cases)
    if settings.port and settings.padding != "official":
        raise CheckError("--padding masked is for MaskFormer: a port has the inputs that it was recorded with")
    if settings.port and settings.memory_budget is not None:
        raise CheckError("--memory-budget is for MaskFormer: the taps of a port are in memory")
    if settings.padding == "official":
        if settings.pad_to is not None:
            raise CheckError("--pad-to is for --padding masked: official padding has no canvas to choose")
        return tuple(wanted), ()
    sizes = {name: [image["size_px"] for image in trace.manifest["cases"][name]["images"]] for name in wanted}
    several = [name for name in wanted if len(sizes[name]) > 1]
    if several and settings.cases:
        raise CheckError(f"case {several[0]} has {len(sizes[several[0]])} images: masked padding is compared with each image's own trace")
    if not (chosen := tuple(name for name in wanted if name not in several)):
        raise CheckError(f"trace '{settings.reference}' has no case of one image, which masked padding is compared with")
    for name in chosen:
        if settings.pad_to and any(side > limit for side, limit in zip(sizes[name][0], settings.pad_to, strict=True)):
            raise CheckError(f"case {name} is {_px(sizes[name][0])} px, which is larger than --pad-to {_px(settings.pad_to)}")
    reason = "its images share a batch with official padding, which the network sees; masked padding is compared with single images"
    return chosen, tuple(Exemption("cases", name, reason) for name in several)


def _trainings(settings: Settings) -> tuple[str, ...]:
    """Names of the trainings that a trace has, as they are asked for: ``steps/plain``."""
    folder = Path(settings.reference) / trajectory.FOLDER
    return tuple(f"{trajectory.FOLDER}/{name}" for name in trajectory.trainings(folder)) if folder.is_dir() and not settings.port else ()


def _select_trainings(settings: Settings, recorded: Sequence[str]) -> tuple[tuple[str, ...], tuple[Exemption, ...]]:
    """Names of the trainings whose first step is judged, and those that are left out.

    Raises:
        CheckError, TraceError, StepsError: one of them is damaged, or began with other weights.
    """
    names = tuple(name for name in recorded if not settings.cases or name in settings.cases)
    source = read_manifest(settings.checkpoint)["source"]
    for name in names:
        with _open_training(settings, name) as case:
            require_same_weights(settings.checkpoint, source, f"'{name}' started from", case.reference.facts["checkpoint"])
    if settings.gradients and settings.padding == "official":
        return names, ()
    reason = "it was recorded with official padding" if settings.gradients else ASKED_OUT
    return (), tuple(Exemption("steps", name, reason) for name in names)


def _open_training(settings: Settings, name: str) -> Case:
    return trajectory.open_training(Path(settings.reference) / trajectory.FOLDER, name.rpartition("/")[2])


def _check_step(settings: Settings, name: str, dtype: str) -> CaseCheck:
    """The first step of a training, quantity by quantity in the order of computation."""
    with _open_training(settings, name) as case:
        items = tuple(trajectory.judge(settings.checkpoint, case, dtype, steps=1, mode=settings.mode, by_drift=False))
        found = trajectory.diagnosis(settings.checkpoint, case, dtype, items)
        sizes = tuple((image.shape[0], image.shape[1]) for image in case.images)
        samples = _samples(case)
    return CaseCheck(name, dtype, sizes, samples, items, (), "a training step is not replayed", findings=(found,) if found else ())


def _samples(case: Case) -> int | None:
    """How many elements are stored of each large tensor; None: all."""
    return next((record.samples for record in case.reference.records.values() if record.samples is not None), None)


def _px(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"


def _check_batch(
    settings: Settings, trace: Trace, names: Sequence[str], model: Any, dtype: str, loss_floors: LossFloors
) -> Iterator[CaseCheck]:
    cases = [trace.case(name) for name in names]
    try:
        inputs = [case_inputs(case, dtype) for case in cases]
        without = _why_no_gradients(settings, trace)
        judges = JUDGES if without is None else without_gradients(JUDGES, without)
        has_taps = any(case.reference.group("tap_gradients") for case in cases)
        gradients = "none" if without else "all" if has_taps else "parameters"
        pad_to = settings.pad_to
        if settings.padding == "masked" and pad_to is None:
            largest = np.max([image.shape[:2] for case in inputs for image in case.images], axis=0)
            pad_to = tuple((int(side) // CANVAS_PX + 1) * CANVAS_PX for side in largest)  # type: ignore[assignment]
        limits: dict[str, Any] = {"gradients": gradients, "memory_budget": settings.memory_budget}
        in_mode = {"mode": settings.mode, "padding": settings.padding, "pad_to": pad_to}
        found = _run(functools.partial(run, model, inputs), dtype, limits | in_mode)
        for case, results in zip(cases, found, strict=True):
            how: dict[str, Any] = {"padding": settings.padding, "pad_to": pad_to, "gradients": gradients != "none"}
            how["memory_budget"] = settings.memory_budget
            local, replayed = _local(case, dtype, functools.partial(replay, model, case, **how))
            manifest = read_manifest(settings.checkpoint)
            threads = judge.THREADS if settings.memory_budget is None else 1
            one = CaseRun(case, results, dtype, loss_floors, model, model.config, trace, manifest, replayed, threads)
            judged, seen = judge_case(one, judges, all_stages=settings.all_stages)
            findings = _diagnose(one, judged, settings.padding, pad_to)
            sizes = tuple((image.shape[0], image.shape[1]) for image in case.images)
            seen += of_failures(case, results, judged.own_failures or judged.failures)
            overlays = tuple(of_results(case, results, model.config))
            yield dataclasses.replace(judged, sizes_px=sizes, local=local, findings=findings, evidence=tuple(seen), overlays=overlays)
    finally:
        for case in cases:
            case.close()


ALONE = ("outputs", "matcher", "losses", "inference")
"""What is judged as it comes out when nobody looks."""


def _run(run: Callable[..., list[CaseResults]], dtype: str, how: Mapping[str, Any]) -> list[CaseResults]:
    """What TensorFlow computes.

    In eager mode taps change no bit of it. A compiled function fuses operations otherwise with taps than without, which moves float32's
    last bits; so what comes out of it is taken of a run without taps.
    """
    if how["mode"] == "eager" or dtype == "float64":
        return run(**how)
    found = run(**how, results=False)
    alone = run(**{**how, "gradients": "none", "tapped": False})
    return [
        dataclasses.replace(one, groups={**tapped.groups, **{group: one.groups[group] for group in ALONE if group in one.groups}})
        for tapped, one in zip(found, alone, strict=True)
    ]


def _why_no_gradients(settings: Settings, trace: Trace) -> str | None:
    if not settings.gradients:
        return ASKED_OUT
    return "the trace was recorded without gradients" if trace.provenance.get("gradients") is False else None


def _local(case: Case, dtype: str, replayed: Callable[[], Replay]) -> tuple[str, Replay | None]:
    """Why local errors are not known, or what tells them."""
    if dtype == "float32":
        return "local errors are taken in float64", None
    if reason := why_not(case):
        return reason, None
    return "", replayed()


def _diagnose(run: CaseRun, judged: CaseCheck, padding: str, pad_to: tuple[int, int] | None) -> tuple[Finding, ...]:
    """The diagnosis of the first failure that is not inherited, in float64."""
    if judged.passed or run.dtype != "float64":
        return ()
    from parity.diagnose import Finding
    from parity.diagnose_results import examine

    failing = [(item.group, item.name) for item in judged.own_failures]
    results = run.results if run.replay is None else run.replay.results
    try:
        found = examine(run.model, run.case, failing, results, padding=padding, pad_to=pad_to)
    except Exception as error:  # the check stands without it
        where = failing[0][1] if failing else run.case.name
        words = f"the diagnosis itself failed ({type(error).__name__}: {error})"
        found = Finding(where, "", "", f"{where}: {words}", math.nan, math.nan, math.nan)
    return () if found is None else (found,)


def _is_before_steps(stage: str) -> bool:
    """Whether a stage, if it is broken, breaks a training step too."""
    return stage in stages.STAGES[: stages.STAGES.index("clipped gradients")]


Judge = Callable[[CaseRun, Found], Iterable[Item | Exemption | Evidence]]
"""Judges one group; is given what the groups before it have come to."""


def _judge_preprocessing(run: CaseRun, found: Found) -> Iterator[Item | Exemption | Evidence]:
    assert run.trace is not None
    described = run.trace.manifest["cases"][run.case.name]["images"]
    assert run.config is not None
    return ends.judge_preprocessing(run.case, described, run.trace.directory, run.results, run.config, run.dtype)


def _judge_matcher(run: CaseRun, found: Found) -> Iterator[Item | Exemption]:
    yield from judge.judge_group("matcher", run, found)
    if run.case.reference.group("matcher"):
        yield judge.judge_not_a_number()


def _judge_metrics(run: CaseRun, found: Found) -> Iterator[Item | Exemption]:
    assert run.config is not None
    return ends.judge_metrics(run.case, run.results, run.config, [one for one in found if isinstance(one, Item)])


COMPUTED: Mapping[str, Judge] = {group: functools.partial(judge.judge_group, group) for group in GROUPS}

JUDGES: Mapping[str, Judge] = {
    "preprocessing": _judge_preprocessing,
    **COMPUTED,
    "matcher": _judge_matcher,
    "metrics": _judge_metrics,
    "calls": judge.judge_calls,
    "images": judge.judge_images,
    "variables": judge.judge_variables,
    "sources": judge.judge_sources,
}
"""Group → what judges it, in the order of computation."""


def without_gradients(judges: Mapping[str, Judge], reason: str) -> dict[str, Judge]:
    """The same without gradients: they, and what would show in them alone, are exempted by their exact names."""

    def of_gradients(group: str, run: CaseRun, found: Found) -> Iterator[Exemption]:
        for name in run.case.reference.group(group):
            yield Exemption(group, name, reason)

    def of_coverage(group: str, run: CaseRun, found: Found) -> Iterator[Any]:
        exempt = {f"shows in variables '{one.name}'" for one in found if isinstance(one, Exemption) and one.group == "variables"}
        for one in judges[group](run, found):
            if isinstance(one, Item) and not one.passed and (one.note in exempt or one.note.startswith("shows in gradients")):
                yield Exemption(group, one.name, f"it would show in a gradient, but {reason}")
            else:
                yield one

    others = {group: functools.partial(of_gradients, group) for group in ("tap_gradients", "gradients") if group in judges}
    others |= {group: functools.partial(of_coverage, group) for group in ("variables", "sources") if group in judges}
    return {**judges, **others}


def judge_case(
    run: CaseRun, judges: Mapping[str, Judge], plan: stages.Plan = stages.MASKFORMER, all_stages: bool = False
) -> tuple[CaseCheck, list[Evidence]]:
    """Every group, stage by stage, up to the first broken one or, with ``all_stages``, to the end; and what there is to see of it."""
    found: list[Item | Exemption] = []
    seen: list[Evidence] = []
    broken: int | None = None
    for group, judge_of in judges.items():
        if broken is not None and (group in COVERAGE or plan.first(group) > broken):
            continue
        for one in judge_of(run, found):
            if isinstance(one, Evidence):
                seen.append(one)
            else:
                found.append(one)
        if not all_stages:
            broken = plan.broken(one for one in found if isinstance(one, Item))
    items = tuple(one for one in found if isinstance(one, Item) and (broken is None or plan.place(one) <= broken))
    exempted = tuple(one for one in found if isinstance(one, Exemption))
    stopped = "" if broken is None or broken == len(plan.stages) - 1 else plan.stages[broken]
    return CaseCheck(run.case.name, run.dtype, (), _samples(run.case), items, exempted, stopped=stopped, plan=plan), seen


def _check_port(settings: Settings, trace: Trace, name: str, port: Port, model: Any, dtype: str, loss_floors: LossFloors) -> CaseCheck:
    with trace.case(name) as case:
        without = _why_no_gradients(settings, trace)
        judges = judges_of(port) if without is None else without_gradients(judges_of(port), without)
        how = {"mode": settings.mode, "gradients": "all" if without is None else "none"}
        [results] = _run(lambda results=True, **how: [port.run(model, inputs_of(case), **how)], dtype, how)
        local, replayed = _local(case, dtype, lambda: replay_port(port, model, case, gradients=without is None))
        one = CaseRun(case, results, dtype, loss_floors, model, manifest=read_manifest(settings.checkpoint), replay=replayed)
        judged, seen = judge_case(one, judges, stages.plan_of(port.stages), settings.all_stages)
        seen += of_failures(case, results, judged.own_failures or judged.failures)
        return dataclasses.replace(judged, local=local, evidence=tuple(seen))


def judges_of(port: Port) -> Mapping[str, Judge]:
    """:data:`JUDGES` of another model."""
    computed = {group: judge_of for group, judge_of in COMPUTED.items() if group not in ("matcher", "inference")}
    return {**computed, "variables": functools.partial(_judge_variables, port), "sources": judge.judge_sources}


def _judge_variables(port: Port, run: CaseRun, found: Found) -> Iterator[Item | Exemption]:
    """Every variable of a port, but for those that it exempts; and that list, and that of partners, are held to what there is."""
    used = {(one.group, one.name) for one in found if isinstance(one, Exemption)}
    variable_of = {line["source"]: line["target"] for line in run.manifest["tensors"]}
    for shown in judge.variables_of(port.trained(run.model), found):
        item = dataclasses.replace(shown, name=variable_of[shown.name])
        if not item.passed and (reason := port.exempt.get((item.group, item.name))):
            used.add((item.group, item.name))
            yield Exemption(item.group, item.name, reason)
        else:
            yield item
    note = f"port '{port.name}' exempts it or names its partner, but it is compared, or there is no such name: remove the line"
    for key in (*port.exempt, *(("taps", name) for name in port.partners)):
        if key not in used:
            yield Item(*key, False, note=note)
