"""One law for every tensor: how far TensorFlow (``actual``) is from PyTorch (``expected``), and how far it may be.

Pure NumPy. Errors are relative L2 errors, ``‖actual − expected‖ / ‖expected‖``, accumulated in float64, against the official
model's float64 run. Tolerances are not magic numbers: each is a factor times a noise that was measured on the official code
itself, plus a resolution below which float32 numbers cannot be told apart. The constants below are the only ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from parity.sampling import blocks, square
from parity.trace import Statistics

FLOOR_FACTOR = 1.5
"""Times the floor, the largest error of four official float32 runs. Among themselves such runs differ by up to 1.46 ×, and a correct
hand-written port by 1.14–1.21 × in the median, 1.67 × at worst (docs/parity.md)."""

FLOAT32_RESOLUTION = 3e-7
"""Added to a float32 tolerance: 5 × the unit roundoff of float32, for tensors that official runs happen to round all alike."""

MEDIAN_FACTOR = 1.1
"""The median over taps of error / floor: a port whose typical error is above the official one is worse everywhere a little."""

FLOAT64_TOLERANCE = 1e-9
"""In float64, with the recorded position embedding, 1e-13 … 1e-12 is usual. The tolerance leaves room for other libraries' rounding
and is still far below any fault: a factor that was rounded to float32 on its way shows with 1e-8."""

FLOAT64_FACTOR = 16
"""Times the error of a second official float64 run (another memory format). It matters for tensors that are zero but for rounding, such
as a gradient behind a softmax that is the same for every key: nothing but noise is there to agree, and an error near 1 says so."""

RESULT_RESOLUTION = 2e-6
"""Relative error that a float32 loss or inference result may add to what it inherits from the outputs it is taken of, and the least
tolerance of the whole: losses are sums over 1e5 pixels. 1e-7 is usual."""

RESULT_FACTOR = 3
"""Times the floor of a float32 loss or inference result. A loss is one number, into which the outputs' rounding errors add up with either
sign, and the scores of an image hang on the logits of a few queries: of four official runs one has up to 1.9 × the largest error of the
other three (a loss's term over all layers and cases taken together), where that is more than :data:`RESULT_RESOLUTION` (docs/parity.md)."""

PIXEL_SHARE = {"float32": 1e-3, "float64": 1e-5}
"""Share of the pixels of a panoptic segmentation that may go to another segment beyond what official float32 runs do themselves: pixels
where two masks are equally probable but for the error of the masks, which is 1e-5 … 1e-4 in float32 and 1e-7 in float64."""

TIE = 1e-9
"""Relative to the cost of an assignment: two assignments that cost the same to this are a tie, in every dtype."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything known of one tensor against its reference.

    Attributes:
        expected_shape, actual_shape: official layout.
        expected_dtype, actual_dtype: NumPy names.
        elements: of the whole tensor.
        compared: elements that were compared one by one: all, or those that a sampled trace stores.
        error: relative L2 error of the whole tensor, by its sketch for a sampled one; nan where it cannot be taken.
        error_bound: what the relative L2 error of a sampled tensor, whole, is at least by its exact statistics: the differences of l2,
            min and max, and that of the sum over √elements, are none of them larger than ``‖actual − expected‖``.
        expected_l2: ``‖expected‖`` of the whole tensor.
        max_difference: largest ``|actual − expected|`` of the finite elements.
        max_index: where it is, in the official layout (flat position among the samples for a sampled tensor).
        actual_at_max, expected_at_max: the two values there.
        tolerance: relative L2 error that is allowed.
        mismatched: share of the elements outside ``|actual − expected| ≤ atol + rtol · |expected|`` with ``rtol = tolerance``
            and ``atol = tolerance ·`` the root mean square of ``expected``.
        passing_tolerance: the least ``tolerance`` with which no element would be outside.
        fault: what makes the comparison fail whatever the numbers: shape, dtype kind, NaN or ±inf in other places; or None.
    """

    expected_shape: tuple[int, ...]
    actual_shape: tuple[int, ...]
    expected_dtype: str
    actual_dtype: str
    elements: int
    compared: int
    error: float
    error_bound: float
    expected_l2: float
    max_difference: float
    max_index: tuple[int, ...]
    actual_at_max: float
    expected_at_max: float
    tolerance: float
    mismatched: float
    passing_tolerance: float
    fault: str | None

    @property
    def passed(self) -> bool:
        """No fault, and the error is within the tolerance."""
        return self.fault is None and self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Whole:
    """Of a sampled tensor, what is known of all its elements.

    Attributes:
        actual, expected: exact statistics.
        shape: official layout.
        difference: ``‖actual − expected‖`` of all elements, estimated from their sketches (:func:`parity.sampling.sketch`).
    """

    actual: Statistics
    expected: Statistics
    shape: tuple[int, ...]
    difference: float


def compare(
    actual: np.ndarray,
    expected: np.ndarray,
    tolerance: float,
    *,
    whole: Whole | None = None,
    scale: float = 0.0,
    zero_scale: float = 0.0,
    dtype: str | None = None,
) -> Comparison:
    """Compares two tensors of the official layout.

    Args:
        actual, expected: the elements to compare one by one. For a sampled tensor both are one-dimensional.
        tolerance: relative L2 error that is allowed.
        whole: for a sampled tensor; None: all elements are there.
        scale: what the error is relative to in place of ``‖expected‖``, if not 0.
        zero_scale: the same if ``expected`` is zero everywhere: the size of the official float32's rounding.
        dtype: NumPy name that ``actual`` must have; None: a float for a float, an integer for an integer.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    shape = tuple(expected.shape) if whole is None else whole.shape
    known: dict[str, Any] = {
        "expected_shape": shape,
        "actual_shape": tuple(actual.shape) if actual.shape != expected.shape else shape,
        "expected_dtype": expected.dtype.name,
        "actual_dtype": actual.dtype.name,
        "elements": math.prod(shape),
        "tolerance": tolerance,
    }
    if actual.shape != expected.shape:
        return incomparable(f"shape {actual.shape}, expected {expected.shape}", **known)
    fault = _fault(actual, expected, dtype)
    bound = 0.0
    if whole is not None:
        bound = _error_bound(whole)
        if fault is None and whole.actual.nonfinite != whole.expected.nonfinite:
            fault = f"{whole.actual.nonfinite} elements of the whole tensor are not finite, expected {whole.expected.nonfinite}"
        if fault is None and bound > tolerance:
            fault = f"by its statistics the whole tensor has an error of at least {bound:.1e}, tolerance {tolerance:.1e}"
    figures = _figures(actual, expected, tolerance)
    if whole is not None:
        figures |= {"expected_l2": whole.expected.l2, "error": _over(whole.difference, whole.expected.l2)}
    if scale or (zero_scale and not figures["expected_l2"]):
        difference = np.linalg.norm(np.where(np.isfinite(expected), actual - expected.astype(np.float64), 0))
        figures["error"] = float(difference if whole is None else whole.difference) / (scale or zero_scale)
    return Comparison(**known, compared=expected.size, error_bound=bound, fault=fault, **figures)


def incomparable(fault: str, **known: Any) -> Comparison:
    """A comparison that failed before any number could be looked at."""
    blank: dict[str, Any] = {field.name: math.nan for field in dataclasses.fields(Comparison)}
    shapes = {"expected_shape": (), "actual_shape": (), "expected_dtype": "", "actual_dtype": "", "max_index": ()}
    return Comparison(**(blank | shapes | {"elements": 0, "compared": 0} | known | {"fault": fault}))


def _fault(actual: np.ndarray, expected: np.ndarray, dtype: str | None) -> str | None:
    for value, name in ((np.nan, "NaN"), (np.inf, "+inf"), (-np.inf, "-inf")):
        masks = [np.isnan(x) if name == "NaN" else x == value for x in (actual, expected)]
        if not np.array_equal(*masks):
            where = tuple(int(i) for i in np.argwhere(masks[0] != masks[1])[0])
            return f"{name} at {np.count_nonzero(masks[0])} elements, expected at {np.count_nonzero(masks[1])}; first difference at {where}"
    if dtype is not None and actual.dtype.name != dtype:
        return f"dtype {actual.dtype.name}, expected {dtype}"
    if dtype is None and (actual.dtype.kind == "f") != (expected.dtype.kind == "f"):
        return f"dtype {actual.dtype.name}, expected one like {expected.dtype.name}"
    return None


def _figures(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> dict[str, Any]:
    """All that is told of elements, one stretch of them after the other: no copy of a large tensor is made."""
    l2 = math.sqrt(sum(square(wanted) for _, wanted, _ in _finite_blocks(actual, expected)))
    rms = l2 / math.sqrt(expected.size) if expected.size else 0.0
    squares, outside, passing, largest, where, pair = 0.0, 0, 0.0, -1.0, 0, (math.nan, math.nan)
    for start, wanted, got in _finite_blocks(actual, expected):
        difference = np.abs(got - wanted)
        squares += square(difference)
        magnitude = np.abs(wanted) + rms
        with np.errstate(divide="ignore", invalid="ignore"):
            passing = max(passing, float(np.where(difference == 0, 0, difference / magnitude).max()))
            outside += int(np.count_nonzero(difference > tolerance * magnitude))  # nothing, of zeros with an infinite tolerance
        flat = int(difference.argmax())
        if difference[flat] > largest or math.isnan(difference[flat]):
            largest, where, pair = float(difference[flat]), start + flat, (float(got[flat]), float(wanted[flat]))
    return {
        "error": _over(math.sqrt(squares), l2),
        "expected_l2": l2,
        "max_difference": max(largest, 0.0),
        "max_index": tuple(int(i) for i in np.unravel_index(where, expected.shape)) if expected.size else (),
        "actual_at_max": pair[0],
        "expected_at_max": pair[1],
        "mismatched": outside / expected.size if expected.size else 0.0,
        "passing_tolerance": passing,
    }


def _finite_blocks(actual: np.ndarray, expected: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(start, expected, actual) of stretches, float64, 0 where ``expected`` is not finite."""
    for (start, wanted), (_, got) in zip(blocks(expected), blocks(actual), strict=True):
        finite = np.isfinite(wanted)
        yield start, np.where(finite, wanted, 0), np.where(finite, got, 0)


def _error_bound(whole: Whole) -> float:
    actual, expected = whole.actual, whole.expected
    difference = max(
        abs(actual.l2 - expected.l2),
        abs(actual.min - expected.min),
        abs(actual.max - expected.max),
        abs(actual.sum - expected.sum) / math.sqrt(math.prod(whole.shape)),
    )
    # Statistics are sums of rounded numbers themselves: what they cannot resolve is no difference.
    if difference <= 1e-14 * expected.l2:
        return 0.0
    return _over(difference, expected.l2)


def _over(difference: float, norm: float) -> float:
    return difference / norm if norm else math.copysign(math.inf, difference) if difference else 0.0


def tolerance(dtype: str, floor: float) -> float:
    """Relative L2 error that a tap, an output, a cost or a result may have.

    Args:
        dtype: "float32" or "float64": what TensorFlow computed in.
        floor: the largest relative L2 error, against the official float64 run, of the other official runs in that dtype.

    >>> tolerance("float32", 1e-6) == 1.5e-6 + 3e-7, tolerance("float64", 1e-16)
    (True, 1e-09)
    """
    if dtype == "float32":
        return FLOOR_FACTOR * floor + FLOAT32_RESOLUTION
    return max(FLOAT64_TOLERANCE, FLOAT64_FACTOR * floor)


def gradient_tolerance(dtype: str, floor: float) -> float:
    """Relative L2 error that a gradient may have; arguments as of :func:`tolerance`.

    Gradients are judged in float64. In float32 only shape and finiteness are: where the input of a ReLU is zero but for rounding, the
    gradient of its weights is there or not, and four official runs are too few to have met every such place.
    """
    return tolerance(dtype, floor) if dtype == "float64" else math.inf


def result_tolerance(dtype: str, floor: float) -> float:
    """Relative error that a loss or an inference result may have; arguments as of :func:`tolerance`, of a loss with the floor of its
    term over all decoder layers and cases. The total is a sum of them all: its relative error is no larger than the largest of theirs.
    In float32 what is added to the error of the outputs is held to :data:`RESULT_RESOLUTION` besides.
    """
    return tolerance(dtype, floor) if dtype == "float64" else max(RESULT_FACTOR * floor, RESULT_RESOLUTION)


def pixel_tolerance(dtype: str, floor: float) -> float:
    """Share of the pixels of a panoptic segmentation that may differ; ``floor``: the share in the official float32 run."""
    return FLOOR_FACTOR * (floor if dtype == "float32" else 0.0) + PIXEL_SHARE[dtype]


@dataclasses.dataclass(frozen=True)
class AssignmentComparison:
    """One image's assignment at one decoder layer.

    Attributes:
        label: "same"; "tie" (the costs are equal), "near-tie" (float32 only: the gap is within the cost noise, and the costs are near)
            or "different", which alone fails.
        objects: number of objects; differing: those with another query.
        gap: by how much the best other assignment costs more, official float64.
        cost_noise: largest error of a float32 cost in any official run.
        regret: cost of the actual assignment less that of the expected one, on the official float64 costs.
    """

    label: str
    objects: int
    differing: int
    gap: float
    cost_noise: float
    regret: float

    @property
    def passed(self) -> bool:
        """Everything but "different"."""
        return self.label != "different"


def compare_assignment(
    actual: np.ndarray, expected: np.ndarray, cost: np.ndarray, *, gap: float, cost_noise: float, dtype: str
) -> AssignmentComparison:
    """Tells ties and near-ties from bugs.

    Args:
        actual, expected: int [objects], the query of each object, −1 for none.
        cost: float64 [queries, objects], the official total costs.
        gap, cost_noise: see :class:`AssignmentComparison`.
        dtype: of the TensorFlow run.
    """
    differing = int(np.count_nonzero(actual != expected)) if actual.shape == expected.shape else expected.size
    if actual.shape == expected.shape and not differing:
        return AssignmentComparison("same", expected.size, 0, gap, cost_noise, 0.0)
    regret, label = math.inf, "different"
    if _is_assignment(actual, cost) and np.count_nonzero(actual >= 0) == np.count_nonzero(expected >= 0):
        best = _cost_of(expected, cost)
        regret = _cost_of(actual, cost) - best
        if abs(regret) <= TIE * max(1.0, abs(best)):
            label = "tie"
        elif dtype == "float32" and gap <= cost_noise and regret <= 2 * expected.size * cost_noise:
            # Each of the two sums has one noisy cost for every object.
            label = "near-tie"
    return AssignmentComparison(label, expected.size, differing, gap, cost_noise, regret)


def _is_assignment(queries: np.ndarray, cost: np.ndarray) -> bool:
    taken = queries[queries >= 0]
    return queries.shape == cost.shape[1:] and bool((queries < cost.shape[0]).all()) and len(set(taken.tolist())) == taken.size


def _cost_of(queries: np.ndarray, cost: np.ndarray) -> float:
    objects = np.flatnonzero(queries >= 0)
    return float(np.asarray(cost, np.float64)[queries[objects], objects].sum())
