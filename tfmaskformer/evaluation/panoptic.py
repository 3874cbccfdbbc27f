"""Panoptic quality (Kirillov et al., Panoptic Segmentation, CVPR 2019, arXiv 1801.00868, section 4), as panopticapi computes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

VOID = 0
"""The id of pixels without a segment."""


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

    >>> import numpy as np
    >>> quality = PanopticQuality(num_classes=2, thing_classes=[0])
    >>> truth = np.array([[1, 1, 1, 2]]), [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 1}]
    >>> prediction = np.array([[7, 7, 8, 8]]), [{"id": 7, "category_id": 0}, {"id": 8, "category_id": 1}]
    >>> quality.update(*truth, *prediction)
    >>> {name: round(value.pq, 3) for name, value in quality.result().items()}
    {'all': 0.333, 'things': 0.667, 'stuff': 0.0}

    Attributes:
        iou: float64 [classes], sum over matched pairs.
        true_positives, false_positives, false_negatives: int64 [classes].
    """

    def __init__(self, num_classes: int, thing_classes: Collection[int]):
        """Args:
        num_classes: without "no object".
        thing_classes: contiguous indices; the other classes are stuff.
        """
        self._is_thing = np.isin(np.arange(num_classes), list(thing_classes))
        self.iou = np.zeros(num_classes)
        self.true_positives, self.false_positives, self.false_negatives = np.zeros((3, num_classes), np.int64)

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
                only the last crowd of a class excuses predictions.

        Raises:
            ValueError: sizes differ, a map and its list do not have the same ids, or a category is unknown. Nothing is counted then.
        """
        truth = _Segments("ground truth", true_panoptic_seg, true_segments_info, len(self.iou))
        prediction = _Segments("prediction", panoptic_seg, segments_info, len(self.iou))
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
                self.iou[category] += iou
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
        if sorted(self.areas) != sorted(int(segment["id"]) for segment in segments_info):
            unlisted, absent = sorted(self.areas.keys() - self.categories), sorted(self.categories.keys() - self.areas)
            raise ValueError(
                f"panoptic quality: the {what}'s map and its segments_info differ: ids only in the map {unlisted}, only in the list "
                f"{absent}, {len(segments_info) - len(self.categories)} listed twice"
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
