"""Judging: what TensorFlow computed of a case against what PyTorch recorded, name by name, and whether every name was accounted for."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from parity import compare, tap_rules
from parity.compare import AssignmentComparison, Comparison
from parity.sampling import contiguous
from parity.tensorflow_run import CaseInputs, CaseResults
from parity.trace import POSITION_EMBEDDING, Case, Record, Trace, relative_error
from tfmaskformer.config import CriterionConfig, MaskFormerConfig

if TYPE_CHECKING:
    from parity.replay import Replay

GROUPS = ("taps", "outputs", "matcher", "losses", "tap_gradients", "gradients", "inference")
"""Of what is computed of a case, in this order."""

THREADS = 2
"""So many tensors are compared at once: NumPy works on them without the interpreter's lock."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One name of one group, judged.

    Attributes:
        group, name: as in the trace.
        passed: the verdict.
        error, floor, tolerance: relative L2 errors (of ids: the share of mismatched elements); nan where there is none.
        local: the error that arises here and is not inherited from what this was computed of; nan where it is not known. In float64 it is
            that of a replay (:mod:`parity.replay`), of losses and inference in float32 what they add to the error of the outputs.
        comparison: every statistic; None where there was nothing to compare.
        note: what else is to be said, for example why there is no partner.
        local_passed: the verdict on ``local``; None where it is not known.
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
    local_passed: bool | None = None

    @property
    def judged(self) -> bool:
        """Whether there is a limit to its error. To that of a gradient in float32 there is none: only shape and finiteness are judged."""
        return self.tolerance != math.inf

    @property
    def inherited(self) -> bool:
        """Whether this fails, but would not if what it is computed of were right."""
        return not self.passed and self.local_passed is True

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


LossFloors = Mapping[tuple[str, str], float]
"""(dtype, term of a loss) → floor."""


def loss_floors_of(trace: Iterable[Case]) -> LossFloors:
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


@dataclasses.dataclass(frozen=True)
class CaseRun:
    """What there is to judge of one case in one dtype.

    Attributes:
        case: what PyTorch recorded.
        results: what TensorFlow computed, of its own inputs.
        dtype: in which.
        loss_floors: of the trace (:func:`loss_floors_of`).
        model: what computed.
        config: of a MaskFormer; None for another model.
        trace: whose case it is.
        manifest: of the checkpoint, which tells what became of every tensor of the official file.
        replay: the same of recorded inputs; None where the trace does not permit it.
        threads: how many tensors may be compared, and be in memory, at once.
    """

    case: Case
    results: CaseResults
    dtype: str
    loss_floors: LossFloors
    model: Any = None
    config: MaskFormerConfig | None = None
    trace: Trace | None = None
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    replay: Replay | None = None
    threads: int = THREADS


Found = Sequence["Item | Exemption"]
"""What the groups before have come to."""


def judge_group(group: str, run: CaseRun, found: Found) -> Iterator[Item | Exemption]:
    """Every name that one of :data:`GROUPS` has on either side, in the order of the reference."""
    actual, partners = run.results.groups.get(group, {}), run.results.names.partners
    expected = [name for name in run.case.reference.group(group) if not (group == "matcher" and name.endswith("/gap"))]
    left = dict.fromkeys(actual)
    if group == "tap_gradients":
        for name, reason in run.case.reference.facts.get("without_gradient", {}).items():
            yield Exemption(group, name, f"it has no gradient: {reason}")
    of = {}
    for name in expected:
        of[name] = name
        if group in ("taps", "tap_gradients") and name in partners:
            of[name], reason = partners[name]
            yield Exemption(group, name, f"compared with '{of[name]}': {reason}")
        left.pop(of[name], None)

    def judge(name: str) -> Item | Exemption:
        if of[name] not in actual:
            return _alone(run, group, name, "no partner in TensorFlow")
        return _with_local(run, _judge_one(run, run.results, group, name, of[name]), of[name])

    with ThreadPoolExecutor(run.threads) as pool:
        found_here = list(pool.map(judge, expected))
    yield from (one for one in found_here if isinstance(one, Exemption))
    judged = [one for one in found_here if isinstance(one, Item)]
    if group == "inference" and run.dtype == "float32":
        judged = _judge_thresholds(run.case, run.results, _items(found), judged)
    if group == "losses":
        judged = [*_with_both_assignments(run, found, judged)]
    yield from judged
    for name in left:
        yield _alone(run, group, name, "no partner in the trace")


def _with_both_assignments(run: CaseRun, found: Found, losses: Sequence[Item]) -> Iterator[Item]:
    """Where an assignment is another one than the official, says what the losses are under either."""
    assignments = [item.comparison for item in _items(found).values() if item.group == "matcher" and item.name.endswith("/assignment")]
    if run.results.losses_under is None or all(one.label == "same" for one in assignments if isinstance(one, AssignmentComparison)):
        yield from losses
        return
    forced = case_inputs(run.case, run.dtype, every_assignment=True).forced
    own, official = run.results.losses_under({}), run.results.losses_under(forced)
    for item in losses:
        name = item.name
        if name not in own or own[name] == official[name]:
            yield item
            continue
        expected = float(run.case.reference.read("losses", name))
        both = f"{own[name]:.6g} under its own assignment, {official[name]:.6g} under the official one, officially {expected:.6g}"
        yield dataclasses.replace(item, note=f"{item.note}; {both}" if item.note else both)


def _with_local(run: CaseRun, item: Item, partner: str) -> Item:
    """An item with what a replay tells of it: the error that is left where everything it is computed of is as recorded."""
    if run.replay is None:
        return item
    if item.group in ("taps", "tap_gradients"):
        errors = run.replay.errors if item.group == "taps" else run.replay.gradients
        if partner not in errors:
            return item
        local, passed = errors[partner], errors[partner] <= item.tolerance
    elif partner in run.replay.results.groups.get(item.group, {}):
        alone = _judge_one(run, run.replay.results, item.group, item.name, partner)
        local, passed = alone.error, alone.passed
    else:
        return item
    note = item.note
    if item.passed and not passed:
        note = f"by itself it is off by {local:.1e}, allowed {item.tolerance:.1e}"
    return dataclasses.replace(item, local=local, local_passed=passed, passed=item.passed and passed, note=note)


def _judge_thresholds(case: Case, results: CaseResults, outputs: Mapping[tuple[str, str], Item], items: list[Item]) -> list[Item]:
    """Lets a panoptic result pass that is the official one with a threshold moved by no more than the outputs' noise.

    Whether a query is kept depends on a probability, and whether its segment is on a share of pixels; either may be at its threshold but
    for rounding. As with assignments that is shown, not assumed: another threshold must give the official result.
    """
    failed = [item for item in items if not item.passed and item.name.endswith(PANOPTIC)]
    if not failed or results.panoptic is None:
        return items
    logits = case.reference["outputs", "pred_logits"]
    tolerance = outputs["outputs", "pred_logits"].tolerance
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


def _alone(run: CaseRun, group: str, name: str, note: str) -> Item | Exemption:
    reason = run.results.names.exempt.get(("taps" if group == "tap_gradients" else group, name))
    return Item(group, name, False, note=note) if reason is None else Exemption(group, name, reason)


def _judge_one(run: CaseRun, results: CaseResults, group: str, name: str, partner: str) -> Item:
    case, dtype, record = run.case, run.dtype, run.case.reference[group, name]
    try:
        actual = contiguous(np.asarray(results.official(group, partner)))
    except tap_rules.TapRuleError as error:
        return Item(group, name, False, comparison=compare.incomparable(str(error)), note=str(error))
    if group == "matcher" and name.endswith("/assignment"):
        return _judge_assignment(case, name, actual, dtype)
    if record.dtype.startswith("int"):
        return _judge_ids(case, group, name, actual, dtype)
    item = _judge_floats(run, record, actual)
    if name in results.exact.get(group, {}):
        item = _judge_own_rounding(item, actual, results.exact[group][name])
    return item


def _judge_own_rounding(item: Item, actual: np.ndarray, exact: np.ndarray) -> Item:
    """A float32 result against the float64 one of the same outputs: what it adds to their error is held to its own tolerance."""
    local = relative_error(actual, exact)
    if local <= compare.RESULT_RESOLUTION:
        return dataclasses.replace(item, local=local, local_passed=True)
    note = f"it adds {local:.1e} to the error of the outputs it is taken of, allowed {compare.RESULT_RESOLUTION:.1e}"
    return dataclasses.replace(item, local=local, local_passed=False, passed=False, note=item.note or note)


LAWS = {
    "losses": compare.result_tolerance,
    "tap_gradients": compare.gradient_tolerance,
    "gradients": compare.gradient_tolerance,
    "inference": compare.result_tolerance,
}
"""How a floor becomes a tolerance, by group; :func:`parity.compare.tolerance` for the others."""


def _judge_floats(run: CaseRun, record: Record, actual: np.ndarray) -> Item:
    case, dtype, group, name = run.case, run.dtype, record.group, record.name
    baseline = case.baseline[group, name]
    file = case.baseline if dtype == "float32" else case.reference
    law = LAWS.get(group, compare.tolerance)
    floor, scale = _largest(file[group, name].floor), 0.0
    if group == "losses":
        floor = run.loss_floors[dtype, _term(name)]
    elif group == "matcher":
        # The matcher adds the costs, so what counts is their error on the scale of the sum.
        floor = max(_largest(other.floor) for other in file.group(group).values() if other.name.endswith("/total"))
        assert run.config is not None
        place, what = name.rsplit("/", 1)
        scale = case.reference[group, f"{place}/total"].statistics.l2 / COST_WEIGHTS[what](run.config.criterion)
    precision = "float32" if name.partition("#")[0].endswith(POSITION_EMBEDDING) else dtype
    tolerance = law(precision, floor)
    if actual.shape != record.shape:
        fault = f"shape {actual.shape}, expected {record.shape}"
        comparison = compare.incomparable(fault, expected_shape=record.shape, actual_shape=actual.shape, tolerance=tolerance)
    else:
        whole = None
        if record.samples is not None:
            figures, sums = record.statistics_and_sketch(actual)
            difference = float(np.linalg.norm(sums - case.reference.read_sketch(group, name)))
            whole = compare.Whole(figures, record.statistics, record.shape, difference)
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


def judge_not_a_number() -> Item:
    """A probe, for no trace has such costs: where one is not a number, nothing may be assigned (upstream's SciPy raises there). Other ports
    put a constant in its place, and train on.
    """
    import tensorflow as tf

    from tfmaskformer import matcher

    assign = vars(matcher)["linear_assignment"]  # as the matcher calls it
    found = assign(tf.constant([[1.0, math.nan], [2.0, 3.0], [0.5, 4.0]]), tf.constant(2))
    expected = np.array([0, -1, -1], np.int64)  # valid, and the query of each object
    comparison = compare.compare(np.array([found.valid.numpy(), *found.queries.numpy()], np.int64), expected, 0.0)
    note = "" if comparison.passed else "a cost that is not a number was assigned as if it were one"
    return Item("matcher", "probe/not a number", comparison.passed, 0.0, comparison=comparison, note=note)


def _judge_assignment(case: Case, name: str, actual: np.ndarray, dtype: str) -> Item:
    place = name.rpartition("/")[0]
    gap, noise = gap_and_noise(case, place)
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


def case_inputs(case: Case, dtype: str, *, every_assignment: bool = False) -> CaseInputs:
    """What a case feeds in.

    Args:
        case: of a trace.
        dtype: what TensorFlow computes in.
        every_assignment: whether losses are taken under the recorded assignments everywhere; else where those are no better than others.
    """
    reference = case.reference
    forced = {}
    for name in reference.group("matcher"):
        layer, image, what = name.split("/")
        if what == "assignment" and (every_assignment or is_near_tie(case, f"{layer}/{image}", dtype)):
            forced[0 if layer == "final" else int(layer) + 1, int(image)] = reference.read("matcher", name)
    images = case.images
    embeddings = {}
    if dtype == "float64":
        for name in case.reference.group("taps"):
            module, _, call = name.partition("#")
            if module.endswith(POSITION_EMBEDDING) and call == "0":
                embeddings[module] = case.reference.read("taps", name)
    return CaseInputs(images, case.targets, forced, case.resized_px, embeddings)


def is_near_tie(case: Case, place: str, dtype: str) -> bool:
    """Whether another assignment than the recorded one may come out, but for rounding."""
    gap, noise = gap_and_noise(case, place)
    return gap <= (noise if dtype == "float32" else compare.TIE)


def gap_and_noise(case: Case, place: str) -> tuple[float, float]:
    """How much the second best assignment of a layer and image costs more, and how far float32 costs are off."""
    return float(case.reference.read("matcher", f"{place}/gap")), float(case.baseline.read("matcher", f"{place}/cost_noise"))


COVERAGE = ("calls", "images", "variables", "sources")
"""Groups of names that show in what other groups compare."""

UNCALLED: tuple[tuple[str, str], ...] = (
    (r".*\.layers|.*\.blocks", "a list of modules, each of which is called by itself"),
    (r".*\.(self_attn|multihead_attn)\.out_proj", "upstream reads its parameters and never calls it: they show in the attention's tap"),
    (r"sem_seg_head\.predictor\.query_embed", "upstream reads its weight and never calls it: the weight shows in its gradient"),
    (r"sem_seg_head\.pixel_decoder", "upstream calls its forward_features: it shows in the taps of its modules"),
)
"""Modules that have no tap on either side, and why."""


def judge_calls(run: CaseRun, found: Found) -> Iterator[Item | Exemption]:
    """Every call of a module that either side made, and every module that was never called."""
    from tfmaskformer.module import named_modules

    calls: dict[str, list[Item]] = {}
    for item in _items(found).values():
        if item.group == "taps":
            calls.setdefault(item.name.partition("[")[0], []).append(item)
    for call, taps in calls.items():
        yield Item("calls", call, all(tap.comparison is not None for tap in taps), note="shows in its taps")
    called = {call.partition("#")[0] for call in calls}
    for module, _ in named_modules(run.model):
        if module in called:
            continue
        reasons = [reason for pattern, reason in UNCALLED if re.fullmatch(pattern, module)]
        if len(reasons) == 1:
            yield Exemption("calls", module, reasons[0])
        else:
            yield Item("calls", module, False, note="no call was recorded; UNCALLED in parity/judge.py must have exactly one line for it")


def judge_images(run: CaseRun, found: Found) -> Iterator[Item]:
    """Every image of the case."""
    for index in range(len(run.case.images)):
        yield _witnessed("images", f"{index}", _items(found), "taps", "images#0")


def judge_variables(run: CaseRun, found: Found) -> Iterator[Item]:
    """Every variable of a MaskFormer."""
    from tfmaskformer.module import parameter_specs

    return variables_of({name: spec.trainable for name, spec in parameter_specs(run.model).items()}, found)


def variables_of(trained: Mapping[str, bool], found: Found) -> Iterator[Item]:
    """Every variable shows somewhere: trained ones in their gradient, buffers in the output of their module."""
    items = _items(found)
    for name, is_trained in trained.items():
        witness = ("gradients", name) if is_trained else ("taps", f"{name.rpartition('.')[0]}#0")
        yield _witnessed("variables", name, items, *witness)


def judge_sources(run: CaseRun, found: Found) -> Iterator[Item | Exemption]:
    """Every tensor of the official file became a variable that shows somewhere, or was left out for a reason."""
    items = _items(found)
    for tensor in run.manifest.get("tensors", ()):
        yield _witnessed("sources", tensor["source"], items, "variables", tensor["target"])
    for tensor in run.manifest.get("dropped", ()):
        yield Exemption("sources", tensor["source"], f"not converted: {tensor['reason']}")


def _items(found: Found) -> Mapping[tuple[str, str], Item]:
    return {(one.group, one.name): one for one in found if isinstance(one, Item)}


def _witnessed(group: str, name: str, items: Mapping[tuple[str, str], Item], *witness: str) -> Item:
    item = items.get((witness[0], witness[1]))
    passed = item is not None and (item.comparison is not None or (item.group in COVERAGE and item.passed))
    return Item(group, name, passed, note=f"shows in {witness[0]} '{witness[1]}'")
