"""One check: a TensorFlow checkpoint against a trace, as result objects that know everything and print nothing.

The order is validate, probe the environment, run, compare, account. Nothing is skipped: what has no partner on the other side fails
the check, unless :data:`parity.tap_rules.EXEMPT` has its exact name and a reason.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import ports
from parity import compare, ends, probes, tap_rules
from parity.compare import AssignmentComparison, Comparison
from parity.evidence import Evidence, Overlay, of_failures, of_results
from parity.ports import Port
from parity.tensorflow_run import CaseInputs, CaseResults, run
from parity.trace import POSITION_EMBEDDING, Case, Record, Trace, relative_error, statistics
from tfmaskformer.config import CriterionConfig, MaskFormerConfig

GROUPS = ("taps", "outputs", "matcher", "losses", "tap_gradients", "gradients", "inference")
"""Of what is computed, in this order, which is the order in which failures are looked for."""

LEDGER = ("preprocessing", *GROUPS, "metrics", "variables")
"""Groups of what is accounted for."""

CANVAS_PX = 128
"""Without ``pad_to``, masked padding takes the next multiple of this that is larger than every image."""


class CheckError(ValueError):
    """The checkpoint, the trace or the settings cannot be used; the message says what, where and the next step."""


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
    """

    checkpoint: str
    reference: str
    dtypes: tuple[str, ...] = ("float32", "float64")
    cases: tuple[str, ...] = ()
    mode: str = "graph"
    padding: str = "official"
    pad_to: tuple[int, int] | None = None
    port: str | None = None


@dataclasses.dataclass(frozen=True)
class Item:
    """One name of one group, judged.

    Attributes:
        group, name: as in the trace.
        passed: the verdict.
        error, floor, tolerance: relative L2 errors (of ids: the share of mismatched elements); nan where there is none.
        local: the part of the error that arises here and is not inherited from what this was computed of; nan where it is not taken.
        comparison: every statistic; None where there was nothing to compare.
        note: what else is to be said, for example why there is no partner.
    """

    group: str
    name: str
    passed: bool
    error: float = math.nan
    floor: float = math.nan
    tolerance: float = math.nan
    comparison: Comparison | AssignmentComparison | None = None
    note: str = ""
    local: float = math.nan

    @property
    def ratio(self) -> float:
        """error / floor; nan where the official runs all agree with the reference to the last bit."""
        return self.error / self.floor if self.floor > 0 else math.nan


@dataclasses.dataclass(frozen=True)
class Exemption:
    """A name that may be on one side only, or is compared under another one."""

    group: str
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class CaseCheck:
    """One case in one dtype.

    Attributes:
        sizes_px: (height, width) of its images.
        samples: elements stored of each large tensor; None: all.
        evidence, overlays: what there is to see of the first failures and of the results.
    """

    case: str
    dtype: str
    sizes_px: tuple[tuple[int, int], ...]
    samples: int | None
    items: tuple[Item, ...]
    exempted: tuple[Exemption, ...]
    evidence: tuple[Evidence, ...] = dataclasses.field(default=(), repr=False, compare=False)
    overlays: tuple[Overlay, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def failures(self) -> tuple[Item, ...]:
        """What failed, earliest first; see :meth:`place`."""
        return tuple(sorted((item for item in self.items if not item.passed), key=self.place))

    def place(self, item: Item) -> tuple[int, int]:
        """When an item was computed. Gradients are computed backwards: there the last parameter comes first."""
        position = self.items.index(item)
        return LEDGER.index(item.group), -position if item.group == "gradients" else position

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
        """Group → how many names were compared, passed, failed, had no partner, were exempted."""
        table = {}
        for group in LEDGER:
            items = [item for item in self.items if item.group == group]
            table[group] = {
                "compared": sum(item.comparison is not None for item in items),
                "passed": sum(item.passed for item in items),
                "failed": sum(not item.passed for item in items),
                "no partner": sum(item.comparison is None for item in items),
                "exempted": sum(exemption.group == group for exemption in self.exempted),
            }
        return table


@dataclasses.dataclass(frozen=True)
class Check:
    """A whole check.

    Attributes:
        settings: what was asked for.
        environment: what computed.
        source: of the checkpoint's manifest, what it was converted from.
        provenance: of the trace.
        cases: one for each case and dtype.
        left_out: cases of the trace that were not checked, and why.
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
        """Judged in float32 only."""
        return "float32" not in {case.dtype for case in self.cases} or self.median_ratio <= compare.MEDIAN_FACTOR

    @property
    def passed(self) -> bool:
        """All of it; never of nothing."""
        return bool(self.cases) and self.median_passed and all(case.passed for case in self.cases)

    @property
    def first_failure(self) -> tuple[CaseCheck, Item] | None:
        """The first thing that truly differs: of all cases and dtypes the earliest, for float64 sees faults below float32's noise."""
        found = [(case, case.failures[0]) for case in self.cases if case.failures]
        return min(found, key=lambda pair: pair[0].place(pair[1])) if found else None


def _median(ratios: Sequence[float]) -> float:
    return float(np.median(ratios)) if ratios else math.nan


def check(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> Check:
    """Runs a check.

    Args:
        settings: what to check.
        progress: is told each step.

    Raises:
        CheckError, parity.trace.TraceError, tfmaskformer.CheckpointError: bad input.
        EnvironmentBrokenError: TensorFlow computes garbage here.
    """
    source = _source(Path(settings.checkpoint))
    trace = Trace(settings.reference)
    _check_same_weights(settings, source, trace)
    names, left_out = _select(settings, trace)

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

    loss_floors = _loss_floors(trace)
    batches = [names] if settings.padding == "masked" else [(name,) for name in names]
    checked: list[CaseCheck] = []
    for dtype in settings.dtypes:
        model = load(settings.checkpoint, dtype)
        for batch in batches:
            progress(f"{', '.join(batch)}: {dtype}")
            if port:
                checked.append(_check_port(settings, trace, batch[0], port, model, dtype, loss_floors))
            else:
                checked += _check_batch(settings, trace, batch, model, dtype, loss_floors)
    return Check(settings, environment, source, trace.provenance, tuple(checked), left_out)


def _source(checkpoint: Path) -> dict[str, Any]:
    """What the checkpoint was converted from, by its manifest."""
    path = checkpoint / "manifest.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["source"])
    except FileNotFoundError as error:
        raise CheckError(
            f"'{checkpoint}' has no manifest.json, which tells whose weights it has; expected a directory from 'convert'"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"'{path}' cannot be read ({error!r}); convert the checkpoint again") from error


def _check_same_weights(settings: Settings, source: Mapping[str, Any], trace: Trace) -> None:
    recorded = trace.provenance.get("checkpoint", {})
    if recorded.get("sha256") != source.get("sha256"):
        raise CheckError(
            f"other weights: '{settings.checkpoint}' was converted from {source.get('file')} (SHA-256 {source.get('sha256')}),\n"
            f"  but '{settings.reference}' was recorded from {recorded.get('file')} (SHA-256 {recorded.get('sha256')})\n"
            "  convert that file, or record a trace of this one: parity-check record --src …"
        )


def _select(settings: Settings, trace: Trace) -> tuple[tuple[str, ...], tuple[Exemption, ...]]:
    """Names of the cases to check, and those that are left out."""
    unknown = [name for name in settings.cases if name not in trace.cases]
    if unknown or not trace.cases:
        raise CheckError(f"trace '{settings.reference}' has no case {', '.join(unknown)}; it has {', '.join(trace.cases) or 'none'}")
    wanted = settings.cases or trace.cases
    if settings.port and settings.padding != "official":
        raise CheckError("--padding masked is for MaskFormer: a port has the inputs that it was recorded with")
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


def _px(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"


LossFloors = Mapping[tuple[str, str], float]
"""(dtype, term of a loss) → floor."""


def _loss_floors(trace: Iterable[Case]) -> LossFloors:
    """The floor of each term, over all decoder layers and cases of the trace, and of the total, over all terms.

    A loss is one number, and four errors of one number can all be small by chance; those of six layers and all cases cannot.
    """
    floors: dict[tuple[str, str], float] = collections.defaultdict(float)
    for case in trace:
        for file in (case.reference, case.baseline):
            for name, record in file.group("losses").items():
                for term in {_term(name), "total"}:
                    floors[file.dtype, term] = max(floors[file.dtype, term], _largest(record.floor))
    return floors


def _check_batch(
    settings: Settings, trace: Trace, names: Sequence[str], model: Any, dtype: str, loss_floors: LossFloors
) -> Iterator[CaseCheck]:
    from tfmaskformer.module import parameter_specs

    cases = [trace.case(name) for name in names]
    try:
        inputs = [_inputs(case, dtype) for case in cases]
        gradients = "all" if any(case.reference.group("tap_gradients") for case in cases) else "parameters"
        pad_to = settings.pad_to
        if settings.padding == "masked" and pad_to is None:
            largest = np.max([image.shape[:2] for case in inputs for image in case.images], axis=0)
            pad_to = tuple((int(side) // CANVAS_PX + 1) * CANVAS_PX for side in largest)  # type: ignore[assignment]
        found = run(model, inputs, mode=settings.mode, padding=settings.padding, pad_to=pad_to, gradients=gradients)
        for case, case_inputs, results in zip(cases, inputs, found, strict=True):
            items, exempted = _judge(case, results, model.config, dtype, loss_floors)
            described = trace.manifest["cases"][case.name]["images"]
            first = [*ends.judge_preprocessing(case, described, trace.directory, results, model.config, dtype)]
            last = [*ends.judge_metrics(case, results, model.config, items)]
            items = [*(found for found in first if isinstance(found, Item)), *items, *(found for found in last if isinstance(found, Item))]
            exempted += [found for found in (*first, *last) if isinstance(found, Exemption)]
            items += _judge_variables({name: spec.trainable for name, spec in parameter_specs(model).items()}, items)
            samples = next((record.samples for record in case.reference.records.values() if record.samples is not None), None)
            sizes = tuple((image.shape[0], image.shape[1]) for image in case_inputs.images)
            judged = CaseCheck(case.name, dtype, sizes, samples, tuple(items), tuple(exempted))
            seen = [found for found in first if isinstance(found, Evidence)]
            seen += of_failures(case, results, judged.failures)
            yield dataclasses.replace(judged, evidence=tuple(seen), overlays=tuple(of_results(case, results, model.config)))
    finally:
        for case in cases:
            case.close()


def _check_port(settings: Settings, trace: Trace, name: str, port: Port, model: Any, dtype: str, loss_floors: LossFloors) -> CaseCheck:
    with trace.case(name) as case:
        inputs = {key: case.reference.read("inputs", key) for key in case.reference.group("inputs")}
        results = port.run(model, inputs, settings.mode, tap_gradients=bool(case.reference.group("tap_gradients")))
        items, exempted = _judge(case, results, None, dtype, loss_floors)
        dropped = ports.read_manifest(Path(settings.checkpoint))["dropped"]
        exempted += [Exemption("variables", drop["source"], f"not converted: {drop['reason']}") for drop in dropped]
        items += _judge_variables(port.trained(model), items)
        items, exempted = _account(port, items, exempted)
        samples = next((record.samples for record in case.reference.records.values() if record.samples is not None), None)
        judged = CaseCheck(name, dtype, (), samples, tuple(items), tuple(exempted))
        return dataclasses.replace(judged, evidence=tuple(of_failures(case, results, judged.failures)))


def _account(port: Port, items: Sequence[Item], exempted: Sequence[Exemption]) -> tuple[list[Item], list[Exemption]]:
    """Exempts variables by the port's own list, and holds that list, and that of partners, to what there is."""
    kept, accounted = list[Item](), list(exempted)
    for item in items:
        if item.group == "variables" and not item.passed and (reason := port.exempt.get((item.group, item.name))):
            accounted.append(Exemption(item.group, item.name, reason))
        else:
            kept.append(item)
    used = {(exemption.group, exemption.name) for exemption in accounted}
    lines = [*port.exempt, *(("taps", name) for name in port.partners)]
    note = f"port '{port.name}' exempts it or names its partner, but it is compared, or there is no such name: remove the line"
    return [*kept, *(Item(group, name, False, note=note) for group, name in lines if (group, name) not in used)], accounted


def _inputs(case: Case, dtype: str) -> CaseInputs:
    reference = case.reference
    forced = {}
    for name in reference.group("matcher"):
        layer, image, what = name.split("/")
        if what == "assignment" and _is_near_tie(case, f"{layer}/{image}", dtype):
            forced[0 if layer == "final" else int(layer) + 1, int(image)] = reference.read("matcher", name)
    images = case.images
    resized = [reference["inference", f"{index}/resized/sem_seg"].shape[1:] for index in range(len(images))]
    embeddings = {}
    if dtype == "float64":
        for name in case.reference.group("taps"):
            module, _, call = name.partition("#")
            if module.endswith(POSITION_EMBEDDING) and call == "0":
                embeddings[module] = case.reference.read("taps", name)
    return CaseInputs(images, case.targets, forced, [(height, width) for height, width in resized], embeddings)


def _is_near_tie(case: Case, place: str, dtype: str) -> bool:
    gap, noise = _gap_and_noise(case, place)
    return gap <= (noise if dtype == "float32" else compare.TIE)


def _gap_and_noise(case: Case, place: str) -> tuple[float, float]:
    return float(case.reference.read("matcher", f"{place}/gap")), float(case.baseline.read("matcher", f"{place}/cost_noise"))


def _judge(
    case: Case, results: CaseResults, config: MaskFormerConfig | None, dtype: str, loss_floors: LossFloors
) -> tuple[list[Item], list[Exemption]]:
    """Every name of both sides, in the order of the reference; only of MaskFormer there is a config."""
    items: list[Item] = []
    exempted: list[Exemption] = []
    partners, exempt = results.names.partners, results.names.exempt
    for group in GROUPS:
        expected = [name for name in case.reference.group(group) if not (group == "matcher" and name.endswith("/gap"))]
        left = dict.fromkeys(results.groups.get(group, ()))
        if group == "tap_gradients":
            without = case.reference.facts.get("without_gradient", {})
            exempted += [Exemption(group, name, f"it has no gradient: {reason}") for name, reason in without.items()]
        for name in expected:
            partner = name
            if group in ("taps", "tap_gradients") and name in partners:
                partner, reason = partners[name]
                exempted.append(Exemption(group, name, f"compared with '{partner}': {reason}"))
            left.pop(partner, None)
            if partner in results.groups.get(group, ()):
                items.append(_judge_one(case, results, group, name, partner, config, dtype, loss_floors))
            else:
                _alone(group, name, "no partner in TensorFlow", exempt, items, exempted)
        for name in left:
            _alone(group, name, "no partner in the trace", exempt, items, exempted)
    if dtype == "float32":
        items = _judge_thresholds(case, results, items)
    return items, exempted


def _judge_thresholds(case: Case, results: CaseResults, items: list[Item]) -> list[Item]:
    """Lets a panoptic result pass that is the official one with a threshold moved by no more than the outputs' noise.

    Whether a query is kept depends on a probability, and whether its segment is on a share of pixels; either may be at its threshold but
    for rounding. As with assignments that is shown, not assumed: another threshold must give the official result.
    """
    failed = [item for item in items if item.group == "inference" and not item.passed and item.name.endswith(PANOPTIC)]
    if not failed or results.panoptic is None:
        return items
    logits = case.reference["outputs", "pred_logits"]
    tolerance = next(item.tolerance for item in items if (item.group, item.name) == ("outputs", "pred_logits"))
    # Root mean square of the logits' errors; a probability moves by at most as much.
    noise = tolerance * logits.statistics.l2 / math.sqrt(math.prod(logits.shape))
    for score, share in itertools.product((0.0, -noise, noise), (0.0, -SHARE_NOISE, SHARE_NOISE)):
        moved = results.panoptic(score, share)
        again = [_judge_ids(case, "inference", item.name, moved[item.name], "float32") for item in items if item.name in moved]
        if all(item.passed for item in again):
            note = f"near-tie: the official result with the score threshold moved by {score:.1e}, that of overlap by {share:.1e}"
            return [dataclasses.replace(item, passed=True, note=note) if item in failed else item for item in items]
    return items


PANOPTIC = ("panoptic_seg", "segments")
"""How the names of panoptic results end."""

SHARE_NOISE = compare.PIXEL_SHARE["float32"]
"""Share of a mask's pixels that may be on the other side of ½ but for rounding."""


def _alone(group: str, name: str, note: str, exempt: Mapping[tuple[str, str], str], items: list[Item], exempted: list[Exemption]) -> None:
    reason = exempt.get(("taps" if group == "tap_gradients" else group, name))
    if reason is None:
        items.append(Item(group, name, False, note=note))
    else:
        exempted.append(Exemption(group, name, reason))


def _judge_one(
    case: Case,
    results: CaseResults,
    group: str,
    name: str,
    partner: str,
    config: MaskFormerConfig | None,
    dtype: str,
    loss_floors: LossFloors,
) -> Item:
    record = case.reference[group, name]
    try:
        actual = np.asarray(results.official(group, partner), order="C")
    except tap_rules.TapRuleError as error:
        return Item(group, name, False, comparison=compare.incomparable(str(error)), note=str(error))
    if group == "matcher" and name.endswith("/assignment"):
        return _judge_assignment(case, name, actual, dtype)
    if record.dtype.startswith("int"):
        return _judge_ids(case, group, name, actual, dtype)
    item = _judge_floats(case, record, actual, config, dtype, loss_floors)
    if name in results.exact.get(group, {}):
        item = _judge_own_rounding(item, actual, results.exact[group][name])
    return item


def _judge_own_rounding(item: Item, actual: np.ndarray, exact: np.ndarray) -> Item:
    """A float32 result against the float64 one of the same outputs: what it adds to their error is held to its own tolerance."""
    local = relative_error(actual, exact)
    if local <= compare.RESULT_RESOLUTION:
        return dataclasses.replace(item, local=local)
    note = f"it adds {local:.1e} to the error of the outputs it is taken of, allowed {compare.RESULT_RESOLUTION:.1e}"
    return dataclasses.replace(item, local=local, passed=False, note=item.note or note)


LAWS = {
    "losses": compare.result_tolerance,
    "tap_gradients": compare.gradient_tolerance,
    "gradients": compare.gradient_tolerance,
    "inference": compare.result_tolerance,
}
"""How a floor becomes a tolerance, by group; :func:`parity.compare.tolerance` for the others."""


def _judge_floats(
    case: Case, record: Record, actual: np.ndarray, config: MaskFormerConfig | None, dtype: str, loss_floors: LossFloors
) -> Item:
    group, name = record.group, record.name
    baseline = case.baseline[group, name]
    file = case.baseline if dtype == "float32" else case.reference
    law = LAWS.get(group, compare.tolerance)
    floor, scale = _largest(file[group, name].floor), 0.0
    if group == "losses":
        floor = loss_floors[dtype, _term(name)]
    elif group == "matcher":
        # The matcher adds the costs, so what counts is their error on the scale of the sum.
        floor = max(_largest(other.floor) for other in file.group(group).values() if other.name.endswith("/total"))
        assert config is not None
        place, what = name.rsplit("/", 1)
        scale = case.reference[group, f"{place}/total"].statistics.l2 / COST_WEIGHTS[what](config.criterion)
    precision = "float32" if name.partition("#")[0].endswith(POSITION_EMBEDDING) else dtype
    tolerance = law(precision, floor)
    if actual.shape != record.shape:
        fault = f"shape {actual.shape}, expected {record.shape}"
        comparison = compare.incomparable(fault, expected_shape=record.shape, actual_shape=actual.shape, tolerance=tolerance)
    else:
        whole = None
        if record.samples is not None:
            difference = np.linalg.norm(record.sketch(actual) - case.reference.read_sketch(group, name))
            whole = compare.Whole(statistics(actual), record.statistics, record.shape, float(difference))
        comparison = compare.compare(
            record.select(actual),
            case.reference.read(group, name),
            tolerance,
            whole=whole,
            scale=scale,
            zero_scale=baseline.statistics.l2,
            dtype=precision,
        )
    return Item(group, name, comparison.passed, comparison.error, floor, tolerance, comparison, comparison.fault or "")


COST_WEIGHTS: dict[str, Callable[[CriterionConfig], float]] = {
    "cost_class": lambda criterion: criterion.class_weight,
    "cost_mask": lambda criterion: criterion.mask_weight,
    "cost_dice": lambda criterion: criterion.dice_weight,
    "total": lambda criterion: 1.0,
}
"""The weight of each term in the matcher's total cost."""


def _term(loss: str) -> str:
    """The term of a loss, without the decoder layer: loss_dice_3 → loss_dice."""
    return loss.rstrip("0123456789").rstrip("_")


def _largest(floors: Sequence[float]) -> float:
    """The floor. Where the reference is zero and an official run is not, that run is the scale of the error, and the floor is 1."""
    return 1.0 if math.inf in floors else max(floors)


def _judge_ids(case: Case, group: str, name: str, actual: np.ndarray, dtype: str) -> Item:
    """Panoptic ids and segments: equal, but for pixels where two masks are equally probable but for rounding."""
    expected, official = case.reference.read(group, name), case.baseline.read(group, name)
    comparison = compare.compare(actual, expected, 0.0)
    if actual.shape != expected.shape:
        return Item(group, name, False, comparison=comparison, note=comparison.fault or "")
    share = float(np.mean(actual != expected)) if expected.size else 0.0
    floor = float(np.mean(official != expected)) if official.shape == expected.shape and expected.size else 0.0
    tolerance = compare.pixel_tolerance(dtype, floor) if name.endswith("panoptic_seg") else 0.0
    comparison = dataclasses.replace(comparison, tolerance=tolerance, mismatched=share)
    return Item(group, name, comparison.fault is None and share <= tolerance, share, floor, tolerance, comparison, comparison.fault or "")


def _judge_assignment(case: Case, name: str, actual: np.ndarray, dtype: str) -> Item:
    place = name.rpartition("/")[0]
    gap, noise = _gap_and_noise(case, place)
    comparison = compare.compare_assignment(
        actual,
        case.reference.read("matcher", name),
        case.reference.read("matcher", f"{place}/total"),
        gap=gap,
        cost_noise=noise,
        dtype=dtype,
    )
    note = "" if comparison.label == "same" else f"{comparison.label}: {comparison.differing} of {comparison.objects} objects"
    return Item("matcher", name, comparison.passed, comparison=comparison, note=note)


def _judge_variables(trained: Mapping[str, bool], items: Sequence[Item]) -> Iterator[Item]:
    """Every variable shows somewhere: trained ones in their gradient, buffers in the output of their module."""
    judged = {(item.group, item.name): item for item in items}
    for name, is_trained in trained.items():
        group, witness = ("gradients", name) if is_trained else ("taps", f"{name.rpartition('.')[0]}#0")
        found = judged.get((group, witness))
        note = f"shows in {group} '{witness}'"
        yield Item("variables", name, found is not None, comparison=found.comparison if found else None, note=note)
