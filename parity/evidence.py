"""What there is to see of a check: of the first failures, and of both models' results on the photographs.

Small arrays, taken while the tensors are at hand; reports draw them. A map has at most :data:`SIDE` rows and columns whatever the size of
the tensor, and of a cell that stands for several elements the error is the largest of them: nothing that is wrong disappears.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from parity import ends, tap_rules

if TYPE_CHECKING:
    from parity.check import Item
    from parity.tensorflow_run import CaseResults
    from parity.trace import Case
    from tfmaskformer.config import MaskFormerConfig

FAILURES = 3
"""Failures of a case, from the first on, of which there is something to see."""

SIDE, POINTS, BINS = 128, 400, 40
"""Rows and columns of a map at most; points of a scatter plot; bins of a histogram."""

SHOWN_PX = 512
"""Longer side of a photograph that is shown, at most."""

AXES = {"inference": "CHW", "matcher": "QK", "preprocessing": "HWC"}
"""Letters of the axes (see :mod:`parity.tap_rules`; K: objects) of groups that have no layouts."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One tensor of both sides, made small. Of a sampled tensor the maps are empty, and what is there is of the samples.

    Attributes:
        group, name: as the item's.
        axes: what the rows and columns of the maps are.
        place: which part of the tensor ``expected`` and ``actual`` show: that with the largest difference.
        expected, actual: float32 [rows, columns], single elements; of pixels [rows, columns, 3], 0 … 1.
        error: float32 [rows, columns], the largest |actual − expected| of each cell, over all other axes.
        profile: float32 [length], the root mean square of the difference along the longest other axis, called ``profile_axis``.
        points: float64 [n, 2], (expected, actual) of single elements, the one with the largest difference among them.
        edges: float64 [bins + 1], of the values; ``counts``: int64 [2, bins], of expected and actual.
        difference_edges, difference_counts: float64 [bins + 1] and int64 [bins], of log10 |actual − expected| where it is not 0.
        equal: share of the elements that are equal to the last bit.
    """

    group: str
    name: str
    axes: tuple[str, str]
    place: str
    expected: np.ndarray
    actual: np.ndarray
    error: np.ndarray
    profile_axis: str
    profile: np.ndarray
    points: np.ndarray
    edges: np.ndarray
    counts: np.ndarray
    difference_edges: np.ndarray
    difference_counts: np.ndarray
    equal: float


@dataclasses.dataclass(frozen=True)
class Overlay:
    """Both models' result on one photograph.

    Attributes:
        name: of the result, as in the group "inference".
        image: uint8 [height, width, 3].
        expected, actual: int32 [height, width], ids of segments or, of a semantic result, classes.
        expected_classes, actual_classes: id → class; of a semantic result, each class itself.
        differing: bool [height, width], where the two results differ; of the whole that is the share ``share``.
        config: of the model, for names and colours.
    """

    name: str
    image: np.ndarray
    expected: np.ndarray
    actual: np.ndarray
    expected_classes: dict[int, int]
    actual_classes: dict[int, int]
    differing: np.ndarray
    share: float
    config: MaskFormerConfig


def of_failures(case: Case, results: CaseResults, failures: Sequence[Item]) -> Iterator[Evidence]:
    """Of the first :data:`FAILURES` failures that are two tensors of one shape."""
    shown = 0
    for item in failures:
        partner = results.names.partners.get(item.name, (item.name,))[0] if item.group in ("taps", "tap_gradients") else item.name
        if shown == FAILURES:
            return
        if partner not in results.groups.get(item.group, {}) or (item.group, item.name) not in case.reference.records:
            continue
        record = case.reference[item.group, item.name]
        try:
            actual = np.asarray(results.official(item.group, partner))
        except tap_rules.TapRuleError:
            continue
        if record.dtype.startswith("int") or actual.shape != record.shape or not record.shape:
            continue
        layout, lengths = None, dict[str, int]()
        if item.group in ("taps", "tap_gradients", "outputs"):
            layout = results.names.layout_of(item.group.replace("tap_gradients", "taps"), partner)
            if results.view is None:
                lengths = dict(zip(layout.actual, results.groups[item.group][partner].shape, strict=True))
        expected = case.reference.read(item.group, item.name)
        sampled = record.samples is not None
        yield evidence(item.group, item.name, record.select(actual), expected, sampled=sampled, layout=layout, lengths=lengths)
        shown += 1


def evidence(
    group: str,
    name: str,
    actual: np.ndarray,
    expected: np.ndarray,
    *,
    sampled: bool = False,
    layout: tap_rules.Layout | None = None,
    lengths: Mapping[str, int] | None = None,
) -> Evidence:
    """Makes a tensor of both sides small.

    Args:
        group, name: as the item's.
        actual, expected: of one shape, official layout; of a sampled tensor the samples.
        layout: of a tap or an output.
        lengths: letter of an axis → its length, for axes that the official layout has in one; None: these stay in one.
    """
    actual, expected = _finite(np.asarray(actual, np.float64), np.asarray(expected, np.float64))
    difference = np.abs(actual - expected)
    maps = _NO_MAPS
    if not sampled and difference.size:
        names, shape = _axes(group, expected.shape, layout, lengths or {})
        maps = _maps(names, expected.reshape(shape), actual.reshape(shape), difference.reshape(shape))
    spread = np.linspace(0, difference.size - 1, min(POINTS, difference.size)).astype(int)
    chosen = np.unique(np.append(spread, difference.argmax())) if difference.size else spread
    values = np.stack([expected.ravel(), actual.ravel()])
    low, high = (values.min(), values.max()) if difference.size else (0.0, 0.0)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    difference_counts, difference_edges = np.histogram(np.log10(difference[difference > 0]), BINS)
    return Evidence(
        group,
        name,
        **maps,
        points=values[:, chosen].T,
        edges=edges,
        counts=np.stack([np.histogram(side, edges)[0] for side in values]),
        difference_edges=difference_edges,
        difference_counts=difference_counts,
        equal=float(np.mean(difference == 0)) if difference.size else 1.0,
    )


def _finite(*sides: np.ndarray) -> Iterator[np.ndarray]:
    """The same, with twice the largest magnitude of all where there is no number, so that it is seen."""
    largest = max((float(np.abs(values[np.isfinite(values)]).max(initial=0)) for values in sides), default=0.0)
    limit = 2 * min(largest, 1e37) or 1.0
    for values in sides:
        yield np.clip(np.nan_to_num(values, nan=limit, posinf=limit, neginf=-limit), -limit, limit)


_NO_MAPS: dict[str, Any] = {
    "axes": ("", ""),
    "place": "",
    **dict.fromkeys(("expected", "actual", "error"), np.zeros((0, 0), np.float32)),
    "profile_axis": "",
    "profile": np.zeros(0, np.float32),
}

WORDS = {
    "B": "image",
    "H": "row",
    "W": "column",
    "C": "channel",
    "Q": "query",
    "R": "query",
    "K": "object",
    "N": "decoder layer",
    "S": "position",
    "T": "position",
    "P": "position",
    "O": "position",
    "Y": "window row",
    "X": "window column",
    "A": "head",
}
"""Letter of an axis → what it counts."""


def _axes(
    group: str, shape: tuple[int, ...], layout: tap_rules.Layout | None, lengths: Mapping[str, int]
) -> tuple[list[str], tuple[int, ...]]:
    """What the axes are, and their lengths: those that the official layout has in one are apart where ``lengths`` knows them."""
    parts: list[str]
    if layout is not None:
        parts = ["".join(found) for found in re.findall(r"\((\w+)\)|(\w)", layout.expected)]
    elif len(AXES.get(group, "")) == len(shape):
        parts = list(AXES[group])
    else:  # a parameter
        return (["out", "in, row, column"], (shape[0], -1)) if len(shape) > 1 else (["channel"], shape)
    apart = ["".join(letters) for part in parts for letters in (part if set(part) <= lengths.keys() else (part,))]
    known = dict(zip(parts, shape, strict=True)) | dict(lengths)
    return [" and ".join(WORDS.get(letter, letter) for letter in part) for part in apart], tuple(known[part] for part in apart)


def _maps(names: Sequence[str], expected: np.ndarray, actual: np.ndarray, difference: np.ndarray) -> dict[str, Any]:
    """The fields of :class:`Evidence` that are maps: rows and columns of the image, else the last two axes that are longer than 1."""
    long = [axis for axis, name in enumerate(names) if difference.shape[axis] > 1 and name != "image"]
    plane = [axis for axis in long if names[axis] in ("row", "column")]
    plane = plane if len(plane) == 2 else long[-2:]
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    others = [axis for axis in range(difference.ndim) if axis not in plane]
    slices = tuple(slice(None) if axis in plane else worst[axis] for axis in range(difference.ndim))
    shape = [1] * (2 - len(plane)) + [difference.shape[axis] for axis in plane]
    rows, columns = (np.linspace(0, length, min(length, SIDE) + 1).astype(int)[:-1] for length in shape)
    error = np.maximum.reduceat(np.maximum.reduceat(difference.max(tuple(others)).reshape(shape), rows), columns, axis=1)
    longest = max(others, key=lambda axis: difference.shape[axis], default=None)
    profile = np.zeros(0)
    if longest is not None and difference.shape[longest] > 1:
        profile = np.sqrt(np.square(difference).mean(tuple(axis for axis in range(difference.ndim) if axis != longest)))
    is_rgb = [names[axis] for axis in plane] == ["row", "column"] and names[-1] == "channel" and difference.shape[-1] == 3
    if is_rgb:
        low, high = min(expected.min(), actual.min()), max(expected.max(), actual.max())
        expected, actual = ((values - low) / ((high - low) or 1) for values in (expected, actual))
        others, slices, shape = [], (), [*shape, 3]
    expected, actual = (values[slices].reshape(shape)[rows][:, columns].astype(np.float32) for values in (expected, actual))
    return {
        "axes": ("", "", *(names[axis] for axis in plane))[-2:],
        "place": ", ".join(
            f"{names[axis]} {worst[axis]} of 0…{difference.shape[axis] - 1}" for axis in others if difference.shape[axis] > 1
        ),
        "expected": expected,
        "actual": actual,
        "error": error.astype(np.float32),
        "profile_axis": names[longest] if profile.size and longest is not None else "",
        "profile": profile.astype(np.float32),
    }


def of_results(case: Case, results: CaseResults, config: MaskFormerConfig) -> Iterator[Overlay]:
    """Of every image the panoptic result, where there is one, and the semantic one, where the trace has the class of each pixel."""
    own = results.groups["inference"]
    for index, image in enumerate(case.images):
        pairs = {}
        if config.test.panoptic_on and {f"{index}/panoptic_seg", f"{index}/segments"} <= own.keys():
            official = ends.panoptic_result(case.reference.read, f"{index}")
            pairs["panoptic_seg"] = official, ends.panoptic_result(lambda group, name: own[name], f"{index}")
        if f"{index}/sem_seg" in own and (official_classes := ends.official_classes(case, f"{index}")) is not None:
            sides = (official_classes, ends.classes_of(np.asarray(own[f"{index}/sem_seg"])))
            expected, actual = ((classes.astype(np.int32), {int(label): int(label) for label in np.unique(classes)}) for classes in sides)
            pairs["sem_seg"] = expected, actual
        for name, (expected, actual) in pairs.items():
            if expected[0].shape == actual[0].shape == image.shape[:2]:
                yield overlay(f"{index}/{name}", image, expected, actual, config)


def overlay(
    name: str,
    image: np.ndarray,
    expected: tuple[np.ndarray, dict[int, int]],
    actual: tuple[np.ndarray, dict[int, int]],
    config: MaskFormerConfig,
) -> Overlay:
    """Makes two results small: of both a map of ids [height, width], and id → class. Ids are names: each expected segment is compared with
    the actual one that has most of its pixels.
    """
    differing = _differing(expected, actual)
    step = -(-max(image.shape[:2]) // SHOWN_PX)
    rows, columns = (np.arange(0, length, step) for length in image.shape[:2])
    pooled = np.logical_or.reduceat(np.logical_or.reduceat(differing, rows), columns, axis=1)
    small, expected_ids, actual_ids = (np.ascontiguousarray(values[::step, ::step]) for values in (image, expected[0], actual[0]))
    return Overlay(name, small, expected_ids, actual_ids, expected[1], actual[1], pooled, float(differing.mean()), config)


def _differing(expected: tuple[np.ndarray, dict[int, int]], actual: tuple[np.ndarray, dict[int, int]]) -> np.ndarray:
    """Bool [height, width]: pixels outside the partner of their expected segment, or of another class."""
    (expected_ids, expected_classes), (actual_ids, actual_classes) = expected, actual
    differing = np.zeros(expected_ids.shape, bool)
    for index in np.unique(expected_ids).tolist():
        mask = expected_ids == index
        ids, counts = np.unique(actual_ids[mask], return_counts=True)
        partner = int(ids[counts.argmax()])
        same_class = actual_classes.get(partner, -1) == expected_classes.get(index, -1)
        differing |= mask & (actual_ids != partner) if same_class else mask
    return differing
