"""Semantic segmentation quality, as Detectron2's ``SemSegEvaluator`` computes it (detectron2/evaluation/sem_seg_evaluation.py).

Its boundary IoU is left out: it needs OpenCV there, and no published number of MaskFormer is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class SemanticResult(NamedTuple):
    """Shares, 0 … 1 (upstream: percent); not a number where there is nothing to count.

    Attributes:
        miou: mean of ``iou`` over the classes that the ground truth has.
        fwiou: the same, weighted by their pixels in the ground truth.
        macc: mean of ``acc`` over the classes that the ground truth has.
        pacc: pixels with the right class.
        iou, acc: float64 [classes]; not a number for classes that the ground truth has not, also where they were predicted.
    """

    miou: float
    fwiou: float
    macc: float
    pacc: float
    iou: np.ndarray
    acc: np.ndarray


class SemanticQuality:
    """Counts pixels by predicted and true class, image after image.

    Counts of different images add up (``+``), and :meth:`to_dict` is JSON.

    >>> quality = SemanticQuality(num_classes=3)
    >>> quality.update(np.array([[0, 0, 1, 255]]), np.array([[0, 1, 1, 2]]))
    >>> quality.result().iou.tolist(), quality.result().miou
    ([0.5, 0.5, nan], 0.5)

    Attributes:
        confusion: int64 [classes, classes + 1], pixels by predicted and true class; the last true class is "ignored".
    """

    def __init__(self, num_classes: int, ignore_label: int = 255):
        """Args:
        num_classes: without "no object".
        ignore_label: of pixels in the ground truth that do not count.
        """
        self._ignore_label = ignore_label
        self.confusion = np.zeros((num_classes, num_classes + 1), np.int64)

    def update(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Counts one image.

        Args:
            truth: int [height, width], class indices or the label to ignore.
            prediction: int [height, width], class indices.

        Raises:
            ValueError: sizes or types are not these, or an index is no class. Nothing is counted then.
        """
        truth, prediction = np.asarray(truth), np.asarray(prediction)
        num_classes = len(self.confusion)
        for what, labels, allowed in (("ground truth", truth, self._ignore_label), ("prediction", prediction, None)):
            if labels.ndim != 2 or labels.dtype.kind not in "iu" or labels.shape != truth.shape:
                raise ValueError(
                    f"semantic quality: the {what} is {labels.dtype} {labels.shape}, expected integers [height, width] as the ground "
                    f"truth, {truth.shape}; give the original (height, width) to the inference as output_sizes"
                )
            found = np.unique(labels)
            unknown = found[((found < 0) | (found >= num_classes)) & (found != allowed)].tolist()
            if unknown:
                raise ValueError(
                    f"semantic quality: the {what} has labels {unknown}, expected 0 … {num_classes - 1}"
                    + f" or {allowed} (ignored)" * (allowed is not None)
                )
        columns = np.where(truth == self._ignore_label, num_classes, truth).astype(np.int64)
        pairs = prediction.astype(np.int64) * (num_classes + 1) + columns
        self.confusion += np.bincount(pairs.ravel(), minlength=self.confusion.size).reshape(self.confusion.shape)

    def __add__(self, other: SemanticQuality) -> SemanticQuality:
        """The counts of both, which must have the same classes and ignored label."""
        mine, others = ((len(quality.confusion), quality._ignore_label) for quality in (self, other))
        if mine != others:
            raise ValueError(f"semantic quality: counts with (num_classes, ignore_label) {mine} and {others} do not add up")
        total = SemanticQuality(*mine)
        total.confusion = self.confusion + other.confusion
        return total

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: of the flat confusion matrix the entries that are not 0."""
        indices = np.flatnonzero(self.confusion)
        return {
            "num_classes": len(self.confusion),
            "ignore_label": self._ignore_label,
            "indices": indices.tolist(),
            "counts": self.confusion.ravel()[indices].tolist(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> SemanticQuality:
        """The counts of :meth:`to_dict`."""
        quality = cls(state["num_classes"], state["ignore_label"])
        quality.confusion.ravel()[np.array(state["indices"], int)] = state["counts"]
        return quality

    def result(self) -> SemanticResult:
        """Means over the classes, and each class's own."""
        counted = self.confusion[:, :-1]
        correct, true, predicted = counted.diagonal().astype(float), counted.sum(0).astype(float), counted.sum(1).astype(float)
        met = true > 0
        iou, acc = np.full((2, len(counted)), np.nan)
        iou[met] = correct[met] / (true + predicted - correct)[met]
        acc[met] = correct[met] / true[met]
        if not met.any():
            return SemanticResult._make([float("nan")] * 4 + [iou, acc])
        frequencies = true / true.sum()
        return SemanticResult(
            miou=float(iou[met].sum() / met.sum()),
            fwiou=float((iou[met] * frequencies[met]).sum()),
            macc=float(acc[met].sum() / met.sum()),
            pacc=float(correct.sum() / true.sum()),
            iou=iou,
            acc=acc,
        )
