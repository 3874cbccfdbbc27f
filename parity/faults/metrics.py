"""Metrics that count something else."""

from __future__ import annotations

import numpy as np

from parity.faults.fault import PANOPTIC, Fault, replaced
from tfmaskformer.evaluation import panoptic
from tfmaskformer.evaluation.panoptic import VOID, PanopticQuality, _Segments
from tfmaskformer.evaluation.semantic import SemanticQuality


def reset_every_image(right):
    def update(self, *arguments):
        self.__init__(len(self._is_thing), np.flatnonzero(self._is_thing).tolist())
        right(self, *arguments)

    return update


def counted(*, void=True, crowd=True, beyond_half=True, category=True):
    """The counting, without one of its rules."""

    def make(right):
        def update(self, true_seg, true_info, seg, info):
            truth = _Segments("ground truth", true_seg, true_info, len(self._iou))
            found = _Segments("prediction", seg, info, len(self._iou))
            crowds = set(truth.crowds) if crowd else set()
            matched_true, matched = set(), set()
            for true_id, true_area in truth.areas.items():
                for index, area in found.areas.items():
                    same = truth.categories[true_id] == found.categories[index]
                    if true_id in crowds or (category and not same):
                        continue
                    overlap = int(np.count_nonzero((truth.ids == true_id) & (found.ids == index)))
                    on_void = int(np.count_nonzero((truth.ids == VOID) & (found.ids == index))) if void else 0
                    iou = overlap / (true_area + area - overlap - on_void)
                    if iou > 0.5 or (iou == 0.5 and not beyond_half):
                        self._iou[truth.categories[true_id]] += int(iou * 2**53)
                        self.true_positives[truth.categories[true_id]] += 1
                        matched_true.add(true_id)
                        matched.add(index)
            for true_id, of in truth.categories.items():
                self.false_negatives[of] += true_id not in matched_true and true_id not in crowds
            for index, of in found.categories.items():
                excused = np.zeros(truth.ids.shape, bool)
                if void:
                    excused |= truth.ids == VOID
                for true_id in crowds:
                    if truth.categories[true_id] == of:
                        excused |= truth.ids == true_id
                share = int(np.count_nonzero(excused & (found.ids == index)))
                self.false_positives[of] += index not in matched and 2 * share <= found.areas[index]

        return update

    return replaced(PanopticQuality, "update", make)


def mean_of_all_classes(right):
    """Also of classes that were never met."""

    def mean(classes):
        pq, sq, rq = (float(np.mean(values)) for values in list(zip(*classes, strict=True))[:3])
        return panoptic.Quality(pq, sq, rq, len(classes))

    return mean


def ignored_counts(right):
    def update(self, truth, prediction):
        last = len(self.confusion) - 1
        right(self, np.where(truth == self._ignore_label, last, truth), prediction)

    return update


def exchanged(right):
    def update(self, truth, prediction):
        ignored = truth == self._ignore_label
        right(self, np.where(ignored, truth, prediction), np.where(ignored, prediction, truth))

    return update


def absent_classes_are_zero(right):
    def result(self):
        found = right(self)
        return found._replace(miou=float(np.nan_to_num(found.iou).mean()), macc=float(np.nan_to_num(found.acc).mean()))

    return result


# fmt: off
FAULTS = (
    Fault("panoptic quality reset every image", "metrics", PANOPTIC, "odd", "metrics", "panoptic", "normaliser",
          replaced(PanopticQuality, "update", reset_every_image)),
    Fault("void in the union", "metrics", PANOPTIC, "odd", "metrics", "panoptic", "mask missing", counted(void=False)),
    Fault("crowds are missed", "metrics", PANOPTIC, "odd", "metrics", "panoptic", "mask missing", counted(crowd=False)),
    Fault("an IoU of ½ matches", "metrics", PANOPTIC, "odd", "metrics", "panoptic", "threshold", counted(beyond_half=False)),
    Fault("absent classes are 0 in the panoptic quality", "metrics", PANOPTIC, "odd", "metrics", "panoptic", "normaliser",
          replaced(panoptic, "_mean", mean_of_all_classes)),
    Fault("ignored pixels count", "metrics", PANOPTIC, "odd", "metrics", "semantic", "mask missing",
          replaced(SemanticQuality, "update", ignored_counts)),
    Fault("truth and prediction exchanged", "metrics", PANOPTIC, "odd", "metrics", "semantic", "transpose",
          replaced(SemanticQuality, "update", exchanged)),
    Fault("absent classes are 0 in the mean IoU", "metrics", PANOPTIC, "odd", "metrics", "semantic", "normaliser",
          replaced(SemanticQuality, "result", absent_classes_are_zero)),
)
# fmt: on
