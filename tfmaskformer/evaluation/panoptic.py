"""Panoptic quality (Kirillov et al., Panoptic Segmentation, CVPR 2019, arXiv 1801.00868, section 4), as panopticapi computes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfmaskformer.data.records import VOID as VOID

_UNIT = 2**53
"""An IoU above ½ is a float64 of at least ½, hence a whole number of 2⁻⁵³: sums of such numbers are exact, in any order."""

_COUNTS = ("true_positives", "false_positives", "false_negatives")


class Quality(NamedTuple):
    """Means over classes, 0 … 1; not a number where there is no class.

    Attributes:
        pq: panoptic quality; of one class it is sq · rq.
        sq: segmentation quality, the mean IoU of matched segments.
        rq: recognition quality, the F1 score of segments.
        num_classes: classes that were met, in the ground truth or in predictions that count; the others are left out.
    """

    pq: float
    sq: float
    rq: float
    num_classes: int


class PanopticQuality:
    """Counts matched, missed and surplus segments, image after image.

    A predicted and a true segment of one class match if their IoU exceeds one half; void pixels do not count in it. What is unmatched is
    a false negative, unless it is a crowd, or a false positive, unless more than half of it lies on void and a crowd of its class.

    Counts of different images add up (``+``), to the same bits however they are grouped and ordered, and :meth:`to_dict` is JSON.

    >>> import numpy as np
    >>> quality = PanopticQuality(num_classes=2, thing_classes=[0])
    >>> truth = np.array([[1, 1, 1, 2]]), [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 1}]
    >>> prediction = np.array([[7, 7, 8, 8]]), [{"id": 7, "category_id": 0}, {"id": 8, "category_id": 1}]
    >>> quality.update(*truth, *prediction)
    >>> {name: round(value.pq, 3) for name, value in quality.result().items()}
    {'all': 0.333, 'things': 0.667, 'stuff': 0.0}
    >>> (quality + quality).true_positives.tolist()
    [2, 0]

    Attributes:
        true_positives, false_positives, false_negatives: int64 [classes].
    """

    def __init__(self, num_classes: int, thing_classes: Collection[int]):
        """Args:
        num_classes: without "no object".
        thing_classes: contiguous indices; the other classes are stuff.
        """
        self._is_thing = np.isin(np.arange(num_classes), list(thing_classes))
        self._iou = [0] * num_classes  # in units of 2⁻⁵³
        self.true_positives, self.false_positives, self.false_negatives = np.zeros((3, num_classes), np.int64)

    @property
    def iou(self) -> np.ndarray:
        """float64 [classes], sum over matched pairs, rounded once."""
        return np.array([total / _UNIT for total in self._iou])

    def update(
        self,
        true_panoptic_seg: np.ndarray,
        true_segments_info: Sequence[Mapping[str, Any]],
        panoptic_seg: np.ndarray,
        segments_info: Sequence[Mapping[str, Any]],
    ) -> None:
        """Counts one image.

        Args:
            true_panoptic_seg, panoptic_seg: int [height, width], ids of segments, :data:`VOID` for none. Both of the same size.
            true_segments_info, segments_info: one ``{"id": int, "category_id": int, …}`` for each segment, ``category_id`` the contiguous
                class index. A true one with a true ``"iscrowd"`` is a region of several objects that are not told apart; as in panopticapi,
                only the last crowd of a class excuses predictions. The ``"area"`` of a true one (px; default: its pixels in the map) counts
                in the union even where it differs from the map, and a true one may be absent from the map and is missed then: in ADE20K's
                panoptic annotations things were pasted over stuff after the areas had been taken, and so is the published PQ.

        Raises:
            ValueError: sizes differ, ids of a map are not in its list, a predicted segment has no pixels, an id is listed twice, or a
                category is unknown. Nothing is counted then.
        """
        num_classes = len(self._iou)
        truth = _Segments("ground truth", true_panoptic_seg, true_segments_info, num_classes)
        prediction = _Segments("prediction", panoptic_seg, segments_info, num_classes)
        if absent := sorted(prediction.categories.keys() - prediction.areas):
            raise ValueError(f"panoptic quality: the prediction's segments_info lists ids {absent}, which its map has not")
        truth.areas |= {int(segment["id"]): segment["area"] for segment in true_segments_info if "area" in segment}
        if empty := sorted(index for index, area in truth.areas.items() if area < 1):
            raise ValueError(f"panoptic quality: the ground truth's segments {empty} have areas below 1 px")
        if truth.ids.shape != prediction.ids.shape:
            raise ValueError(
                f"panoptic quality: the ground truth is {truth.ids.shape}, the prediction {prediction.ids.shape}; "
                "give the original (height, width) to the inference as output_sizes"
            )
        pairs, counts = np.unique(truth.ids << 32 | prediction.ids, return_counts=True)
        overlaps = {(pair >> 32, pair & 0xFFFFFFFF): count for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)}

        matched = set()
        for (true_id, predicted_id), overlap in overlaps.items():
            if VOID in (true_id, predicted_id) or true_id in truth.crowds:
                continue
            category = truth.categories[true_id]
            if category != prediction.categories[predicted_id]:
                continue
            on_void = overlaps.get((VOID, predicted_id), 0)
            iou = overlap / (truth.areas[true_id] + prediction.areas[predicted_id] - overlap - on_void)
            if iou > 0.5:
                self._iou[category] += int(iou * _UNIT)
                self.true_positives[category] += 1
                matched |= {("true", true_id), ("predicted", predicted_id)}
        for true_id, category in truth.categories.items():
            if ("true", true_id) not in matched and true_id not in truth.crowds:
                self.false_negatives[category] += 1
        crowds = {truth.categories[true_id]: true_id for true_id in truth.crowds}
        for predicted_id, category in prediction.categories.items():
            if ("predicted", predicted_id) in matched:
                continue
            excused = overlaps.get((VOID, predicted_id), 0) + overlaps.get((crowds.get(category), predicted_id), 0)
            if 2 * excused <= prediction.areas[predicted_id]:
                self.false_positives[category] += 1

    def __add__(self, other: PanopticQuality) -> PanopticQuality:
        """The counts of both, which must have the same classes."""
        if not np.array_equal(self._is_thing, other._is_thing):
            raise ValueError(
                "panoptic quality: counts of different classes do not add up; give both the same num_classes and thing_classes"
            )
        total = PanopticQuality(len(self._iou), np.flatnonzero(self._is_thing).tolist())
        total._iou = [a + b for a, b in zip(self._iou, other._iou, strict=True)]
        for name in _COUNTS:
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: ints, ``iou`` in units of 2⁻⁵³."""
        counts = {name: getattr(self, name).tolist() for name in _COUNTS}
        return {"thing_classes": np.flatnonzero(self._is_thing).tolist(), "iou": list(self._iou)} | counts

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> PanopticQuality:
        """The counts of :meth:`to_dict`."""
        quality = cls(len(state["iou"]), state["thing_classes"])
        quality._iou = list(state["iou"])
        for name in _COUNTS:
            setattr(quality, name, np.array(state[name], np.int64))
        return quality

    def per_class(self) -> list[Quality]:
        """Each class's own quality, 0 (and ``num_classes`` 0) where it was not met."""
        counts = zip(
            self.iou.tolist(), self.true_positives.tolist(), self.false_positives.tolist(), self.false_negatives.tolist(), strict=True
        )
        return [_quality(*count) for count in counts]

    def result(self) -> dict[str, Quality]:
        """Means over "all" classes, "things" and "stuff"."""
        classes = self.per_class()
        groups = {"all": np.ones_like(self._is_thing), "things": self._is_thing, "stuff": ~self._is_thing}
        return {name: _mean([classes[index] for index in np.flatnonzero(members)]) for name, members in groups.items()}


class _Segments:
    """One side of an image: ids int64 [height, width]; class and area in px of each segment; ids of crowds in their order."""

    def __init__(self, what: str, panoptic_seg: np.ndarray, segments_info: Sequence[Mapping[str, Any]], num_classes: int):
        panoptic_seg = np.asarray(panoptic_seg)
        if panoptic_seg.ndim != 2 or panoptic_seg.dtype.kind not in "iu":
            raise ValueError(
                f"panoptic quality: the {what} is {panoptic_seg.dtype} {panoptic_seg.shape}, expected integers [height, width]"
            )
        if panoptic_seg.size and not 0 <= panoptic_seg.min() <= panoptic_seg.max() < 2**32:
            raise ValueError(f"panoptic quality: the {what} has ids {panoptic_seg.min()} … {panoptic_seg.max()}, expected 0 … {2**32 - 1}")
        self.ids = panoptic_seg.astype(np.int64)
        found, areas = np.unique(self.ids, return_counts=True)
        self.areas = {int(index): int(area) for index, area in zip(found, areas, strict=True) if index != VOID}
        self.categories = {int(segment["id"]): int(segment["category_id"]) for segment in segments_info}
        self.crowds = [int(segment["id"]) for segment in segments_info if segment.get("iscrowd")]
        unlisted, repeated = sorted(self.areas.keys() - self.categories), len(segments_info) - len(self.categories)
        if unlisted or repeated or VOID in self.categories:
            raise ValueError(
                f"panoptic quality: the {what}'s map has ids {unlisted} that its segments_info lacks, which lists {repeated} twice"
                + f" and {VOID}, the id of no segment" * (VOID in self.categories)
            )
        unknown = sorted({category for category in self.categories.values() if not 0 <= category < num_classes})
        if unknown:
            raise ValueError(
                f"panoptic quality: the {what} has categories {unknown}, expected contiguous indices 0 … {num_classes - 1}; "
                "a data set's own ids have to be mapped first"
            )


def _quality(iou: float, true_positives: int, false_positives: int, false_negatives: int) -> Quality:
    segments = true_positives + 0.5 * false_positives + 0.5 * false_negatives
    if segments == 0:
        return Quality(0.0, 0.0, 0.0, 0)
    return Quality(iou / segments, iou / true_positives if true_positives else 0.0, true_positives / segments, 1)


def _mean(classes: Sequence[Quality]) -> Quality:
    met = [quality for quality in classes if quality.num_classes]
    if not met:
        return Quality(float("nan"), float("nan"), float("nan"), 0)
    pq, sq, rq = (sum(values) / len(met) for values in list(zip(*met, strict=True))[:3])
    return Quality(pq, sq, rq, len(met))
