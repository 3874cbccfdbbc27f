"""Comparing two recordings: what TensorFlow computed somewhere (:mod:`parity.tensorflow_record`) with what PyTorch did. Needs neither.

float32 and float64 are judged as in any check. A precision that no official run has is judged by its ratio: the errors of CPU
recordings of the same precision take the place of the official float32 floors, and each item is held to the rule of float32. Ids that one
of these recordings has wrong itself are exempted by name; gradients are only held to their shape and finiteness, as in float32.

The median over taps is not judged in a low precision. What it may be in float32 was measured of official runs on four kinds of kernels,
the largest of whose errors is the floor. Here the floor is of a recording or two, and sound runs are further apart: on one CPU the taps of
a small Swin model in bfloat16 are, without oneDNN, off by 1.3 × what they are with it in the median (docs/recording.md).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from parity import check, judge, probes, tap_rules
from parity.check import COMPUTED, CaseCheck, Check, CheckError, Settings
from parity.judge import CaseRun, Exemption, Found, Item
from parity.spool import Group
from parity.tensorflow_run import CaseResults
from parity.trace import Case, Record, Trace, TraceFile, file_path, relative_error
from tfmaskformer.config import MaskFormerConfig

EXACT = {"losses": "losses_float64", "inference": "inference_float64"}
"""Group → group of a TensorFlow trace with what float64 makes of the same outputs."""

CPU_RUN = "a CPU run of the same precision"

OUTPUTS_ALONE = "an export gives its final outputs alone (parity.exported)"
"""Why everything else of a trace is exempted, by name."""


def check_recorded(
    actual: str,
    reference: str,
    baselines: Sequence[str] = (),
    settings: Settings | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Check:
    """Compares a TensorFlow trace with the trace of the official code whose inputs it was recorded of.

    Args:
        actual: the TensorFlow trace.
        reference: the official trace.
        baselines: TensorFlow traces of the same precision from a CPU, whose largest error is the floor; none: as of the official code.
        settings: what else is asked for: ``cases``, ``all_stages`` and ``gradients``.
        progress: is told each step.

    Raises:
        CheckError, TraceError: the traces cannot be compared.
    """
    recorded, official = Recording(actual), Trace(reference)
    floors = [Recording(directory) for directory in baselines]
    recorded.check_against(official)
    if not floors and recorded.is_low:
        raise CheckError(
            f"'{actual}' was computed in {recorded.precision}, in which there are no official runs; give --baseline, {CPU_RUN}:\n"
            f"  parity-check record --framework tensorflow --device cpu {recorded.options} …"
        )
    for floor in floors:
        floor.check_against(official)
        floor.check_is_baseline_of(recorded)
    asked = settings or Settings(actual, reference)
    names = [name for name in official.cases if name in (asked.cases or recorded.trace.cases)]
    if missing := [name for name in asked.cases if name not in recorded.trace.cases or name not in official.cases]:
        raise CheckError(f"no case {', '.join(missing)} in both traces; '{actual}' has {', '.join(recorded.trace.cases)}")
    left_out = tuple(Exemption("cases", name, f"'{actual}' has no recording of it") for name in official.cases if name not in names)
    loss_floors: dict[tuple[str, str], float] = {}
    for name in names if floors else official.cases:
        with _opened(official, floors, name) as case:
            found = judge.loss_floors_of([case])
            loss_floors |= {key: max(loss_floors.get(key, 0.0), floor) for key, floor in found.items()}
    checked = []
    for name in names:
        progress(f"{name}: {recorded.precision}")
        with _opened(official, floors, name) as case, recorded.file(name) as file:
            checked.append(_check_case(case, file, recorded, official, loss_floors, asked))
    asked = dataclasses.replace(
        asked, checkpoint=actual, reference=reference, dtypes=(str(recorded.precision),), mode=recorded.provenance["mode"]
    )
    kind = _OfOutputs if recorded.outputs_alone else Check
    return kind(asked, recorded.environment, recorded.provenance["checkpoint"], official.provenance, tuple(checked), left_out)


class _OfOutputs(Check):
    """A median is one of taps."""

    @property
    def median_passed(self) -> bool:
        return True


class Recording:
    """A trace that TensorFlow computed.

    Raises:
        CheckError: it is none.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self.trace = Trace(directory)
        self.provenance: dict[str, Any] = self.trace.provenance
        if self.provenance.get("framework") != "tensorflow":
            raise CheckError(f"'{directory}' was not recorded with TensorFlow; give one of 'parity-check record --framework tensorflow'")

    @property
    def precision(self) -> str:
        """As it is told in reports."""
        dtype, products = self.provenance["dtype"], self.provenance["products"]
        return dtype if products == "float32" else f"{dtype} with products in {products}"

    @property
    def is_low(self) -> bool:
        """Whether no official run computes in its precision."""
        return self.precision not in ("float32", "float64")

    @property
    def outputs_alone(self) -> bool:
        """Whether it is one of an export (:mod:`parity.exported`)."""
        return bool(self.provenance.get("outputs_alone"))

    @property
    def options(self) -> str:
        """With which another recording has the same precision."""
        return f"--dtype {self.provenance['dtype']} --products {self.provenance['products']}"

    @property
    def environment(self) -> probes.Environment:
        """What computed."""
        known = self.provenance["environment"]
        return probes.Environment(**{**known, "probes": tuple(probes.Probe(**probe) for probe in known["probes"])})

    def file(self, case: str) -> TraceFile:
        """What was recorded of a case."""
        return TraceFile(file_path(self.directory, case, self.provenance["dtype"]))

    def check_against(self, official: Trace) -> None:
        """Raises CheckError unless both traces are of the same weights and inputs."""
        if official.provenance.get("framework") == "tensorflow" or official.provenance.get("inputs_only"):
            raise CheckError(f"'{official.directory}' has no results of the official code; give the trace that PyTorch recorded")
        mine, theirs = (provenance["checkpoint"].get("sha256") for provenance in (self.provenance, official.provenance))
        if mine != theirs:
            raise CheckError(
                f"other weights: '{self.directory}' was recorded of a file with SHA-256 {mine},\n"
                f"  '{official.directory}' of one with SHA-256 {theirs}"
            )
        for name in self.trace.cases:
            if name in official.cases:
                with self.file(name) as file, TraceFile(file_path(official.directory, name, "float64")) as reference:
                    if file.facts["reference"] != reference.facts["key"]:
                        raise CheckError(
                            f"case {name} of '{self.directory}' was recorded of other inputs than those of '{official.directory}'"
                        )

    def check_is_baseline_of(self, actual: Recording) -> None:
        """Raises CheckError unless this was computed on a CPU in the same precision and has the same cases."""
        if self.provenance["device"]["kind"] != "cpu":
            raise CheckError(f"--baseline '{self.directory}' was recorded on a {self.provenance['device']['kind']}; expected {CPU_RUN}")
        if self.precision != actual.precision:
            raise CheckError(f"--baseline '{self.directory}' was computed in {self.precision}, expected {actual.precision}")
        if missing := [name for name in actual.trace.cases if name not in self.trace.cases]:
            raise CheckError(f"--baseline '{self.directory}' has no case {', '.join(missing)}")


def _opened(official: Trace, floors: Sequence[Recording], name: str) -> Case:
    case = official.case(name)
    if floors:
        config = MaskFormerConfig.from_dict(floors[0].provenance["config"])
        files = [floor.file(name) for floor in floors]
        case.baseline = _Floors(case, files, tap_rules.names(config).partners)  # type: ignore[assignment]
    return case


class _Floors:
    """TensorFlow recordings in place of the official float32 file: their errors against the reference are the floors."""

    dtype = "float32"

    def __init__(self, case: Case, files: Sequence[TraceFile], partners: Mapping[str, tuple[str, str]]):
        self._reference, self._official, self._files, self._partners = case.reference, case.baseline, files, partners

    def __getitem__(self, key: tuple[str, str]) -> Record:
        record = self._official[key]
        if not record.dtype.startswith("float") or key[1].endswith("/cost_noise"):
            return record
        return dataclasses.replace(record, floor=self._errors(*key))

    def group(self, group: str) -> dict[str, Record]:
        return {name: self[group, name] for name in self._official.group(group)}

    def read(self, group: str, name: str) -> np.ndarray:
        if name.endswith("/cost_noise"):
            total = name.replace("cost_noise", "total")
            expected = self._reference.read(group, total)
            return np.max([np.abs(file.read(group, total) - expected).max(initial=0) for file in self._files])
        return self._files[0].read(group, name)

    def unstable(self, group: str, name: str) -> bool:
        """Whether one of the recordings has other ids than the reference."""
        expected = self._reference.read(group, name)
        return not all(np.array_equal(file.read(group, name), expected) for file in self._files)

    @functools.cache  # noqa: B019 it lives as long as its case
    def _errors(self, group: str, name: str) -> tuple[float, ...]:
        return tuple(self._error(file, group, name) for file in self._files)

    def _error(self, file: TraceFile, group: str, name: str) -> float:
        """Relative L2 error of the whole tensor, by the sketch of a sampled one; nan where there is none to compare."""
        partner = self._partners.get(name, (name,))[0] if group in ("taps", "tap_gradients") else name
        if (group, partner) not in file.records or file[group, partner].shape != self._reference[group, name].shape:
            return math.nan
        record, tensor = self._reference[group, name], file.read(group, partner)
        if record.samples is None:
            return relative_error(tensor, self._reference.read(group, name))
        _, sums = record.statistics_and_sketch(tensor)
        difference = float(np.linalg.norm(sums - self._reference.read_sketch(group, name)))
        return difference / record.statistics.l2 if record.statistics.l2 else math.inf if difference else 0.0

    def close(self) -> None:
        for file in (*self._files, self._official):
            file.close()


@dataclasses.dataclass(frozen=True)
class _Results(CaseResults):
    """What a TensorFlow trace has: the official layout already."""

    def official(self, group: str, name: str) -> np.ndarray:
        return self.groups[group][name]


def _group(file: TraceFile, group: str) -> Group:
    return Group(file.group(group), functools.partial(file.read, group))


def _check_case(
    case: Case, file: TraceFile, recorded: Recording, official: Trace, loss_floors: judge.LossFloors, settings: Settings
) -> CaseCheck:
    config = MaskFormerConfig.from_dict(recorded.provenance["config"])
    groups: dict[str, Mapping[str, np.ndarray]] = {group: _group(file, group) for group in COMPUTED}
    if not case.reference.group("tap_gradients"):
        del groups["tap_gradients"]
    # What losses and inference round themselves is held to float32's own precision.
    exact = {group: _group(file, stored) for group, stored in EXACT.items() if file.group(stored) and not recorded.is_low}
    results = _Results(groups, tap_rules.names(config), None, exact, None)  # type: ignore[arg-type]
    dtype = "float64" if recorded.provenance["dtype"] == "float64" else "float32"
    one = CaseRun(case, results, dtype, loss_floors, config=config, trace=official, manifest=recorded.provenance["sources"])
    judges: dict[str, check.Judge] = {group: functools.partial(_judge_computed, judge_of) for group, judge_of in COMPUTED.items()}
    judges["variables"] = lambda run, found: judge.variables_of(recorded.provenance["variables"], found)
    judges["sources"] = judge.judge_sources
    if recorded.outputs_alone:
        judges = {group: functools.partial(_judge_outputs_alone, group, judge_of) for group, judge_of in judges.items()}
    elif without := _why_no_gradients(recorded, official, settings):
        judges = check.without_gradients(judges, without)
    judged, _ = check.judge_case(one, judges, all_stages=settings.all_stages)
    sizes = tuple((image.shape[0], image.shape[1]) for image in case.images)
    return dataclasses.replace(judged, dtype=recorded.precision, sizes_px=sizes, local="two recordings are compared; nothing is replayed")


def _why_no_gradients(recorded: Recording, official: Trace, settings: Settings) -> str | None:
    if not settings.gradients:
        return check.ASKED_OUT
    for provenance, which in ((recorded.provenance, recorded.directory), (official.provenance, official.directory)):
        if provenance.get("gradients") is False:
            return f"'{which}' was recorded without gradients"
    return None


def _judge_computed(judge_of: check.Judge, run: CaseRun, found: Found) -> Iterator[Any]:
    """A group; of ids, what the CPU run of the same precision has wrong too is exempted by name."""
    floors: Any = run.case.baseline
    for one in judge_of(run, found):
        if isinstance(one, Item) and not one.passed and isinstance(floors, _Floors) and (reason := _unstable(floors, one)):
            yield Exemption(one.group, one.name, reason)
        else:
            yield one


def _judge_outputs_alone(group: str, judge_of: check.Judge, run: CaseRun, found: Found) -> Iterator[Any]:
    """Final outputs and results as ever; what an export cannot show is exempted by name."""
    if group not in ("outputs", "inference"):
        yield from (Exemption(group, name, OUTPUTS_ALONE) for name in run.case.reference.group(group))
        return
    for one in judge_of(run, found):
        is_inner = isinstance(one, Item) and one.name.startswith("aux_outputs.") and one.comparison is None
        yield Exemption(group, one.name, OUTPUTS_ALONE) if is_inner else one


def _unstable(floors: _Floors, item: Item) -> str | None:
    """Why an id or an assignment cannot be judged in a precision, if it cannot."""
    if not item.name.endswith(("/segments", "/panoptic_seg", "/assignment")):
        return None
    name = item.name.replace("/panoptic_seg", "/segments")  # of which pixels belong to which a share may differ
    return f"{CPU_RUN} has another result than float64, too" if floors.unstable(item.group, name) else None
