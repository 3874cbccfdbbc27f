"""Average precision of instances, by pycocotools, from panoptic results.

The official MaskFormer has no instance predictions and evaluates none: its COCO models are judged by ``COCOPanopticEvaluator`` alone. Here
the things of the panoptic result are the instances. They do not overlap, and what the panoptic thresholds dropped is missing, so that AP is
lower than that of a detector; each has the probability of its query's class for a score. From there on everything is Detectron2's
``COCOEvaluator`` (detectron2/evaluation/coco_evaluation.py) for masks, with pycocotools itself and not its faster copy.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfmaskformer.evaluation.results import _mask_api, encode_mask, instance_annotations

MAX_DETECTIONS = 100
"""For each image and class, those of the highest score."""


class InstanceResult(NamedTuple):
    """Average precisions of masks, 0 … 1 (upstream: percent); not a number where there is nothing to find, or nothing was found at all.

    Attributes:
        ap: mean over classes and the IoU thresholds 0.5, 0.55, … 0.95.
        ap50, ap75: at one threshold.
        aps, apm, apl: of objects below 32² px, up to 96² px, and above.
        per_class: ``ap`` of each of the truth's categories, by name; empty if nothing was found at all.
    """

    ap: float
    ap50: float
    ap75: float
    aps: float
    apm: float
    apl: float
    per_class: dict[str, float]


class InstanceQuality:
    """Collects the things of panoptic results, image after image. Collections add up (``+``), and :meth:`to_dict` is JSON.

    Attributes:
        detections: the entries of ``coco_instances_results.json``.
    """

    def __init__(self, dataset_ids: Sequence[int]):
        """Args:
        dataset_ids: the data set's id of each class, in the order of contiguous indices.
        """
        self._dataset_ids = list(dataset_ids)
        self.detections: list[dict[str, Any]] = []

    def update(self, image_id: Any, panoptic_seg: np.ndarray, segments_info: Sequence[Mapping[str, Any]]) -> None:
        """Takes the things of one image; see :func:`tfmaskformer.evaluation.results.instance_annotations`."""
        self.detections += instance_annotations(image_id, panoptic_seg, segments_info, self._dataset_ids)

    def __add__(self, other: InstanceQuality) -> InstanceQuality:
        """The things of both; no image may be in both."""
        total = InstanceQuality(self._dataset_ids)
        total.detections = self.detections + other.detections
        return total

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"dataset_ids": self._dataset_ids, "detections": self.detections}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> InstanceQuality:
        """What :meth:`to_dict` gave."""
        quality = cls(state["dataset_ids"])
        quality.detections = list(state["detections"])
        return quality

    def result(self, truth: Mapping[str, Any]) -> InstanceResult:
        """Average precisions; the order of images does not matter.

        Args:
            truth: COCO's instance annotations (``instances_val2017.json``), or :func:`instance_truth`. All of its images count, whether
                there are results for them or not.
        """
        _mask_api()  # for its error
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if not self.detections:  # pycocotools fails on them
            return InstanceResult._make([float("nan")] * 6 + [{}])
        with contextlib.redirect_stdout(io.StringIO()):
            actual = COCO()
            # pycocotools writes into annotations. It would take a detection's area from its box.
            actual.dataset = {**truth, "annotations": [dict(annotation) for annotation in truth["annotations"]]}
            actual.createIndex()
            found = actual.loadRes([{key: value for key, value in item.items() if key != "bbox"} for item in self.detections])
            evaluation = COCOeval(actual, found, "segm")
            evaluation.params.maxDets = [1, 10, MAX_DETECTIONS]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        names = {category["id"]: category["name"] for category in truth["categories"]}
        # [IoU, recall, class, area, detections]: any area, all detections; -1 where the truth has nothing.
        precisions = evaluation.eval["precision"][:, :, :, 0, -1]
        per_class = {names[category]: _mean_of_met(precisions[:, :, index]) for index, category in enumerate(evaluation.params.catIds)}
        return InstanceResult._make([*(float(value) if value >= 0 else float("nan") for value in evaluation.stats[:6]), per_class])


def _mean_of_met(precision: np.ndarray) -> float:
    met = precision[precision > -1]
    return float(met.mean()) if met.size else float("nan")


def instance_truth(
    images: Iterable[tuple[Any, np.ndarray, Sequence[Mapping[str, Any]]]],
    dataset_ids: Sequence[int],
    names: Sequence[str],
    thing_classes: Collection[int],
) -> dict[str, Any]:
    """COCO's instance annotations of the things in panoptic ones, for data sets that come with nothing else.

    COCO's own instances overlap and its panoptic segments do not: published instance AP is judged by ``instances_val2017.json``.

    Args:
        images: for each its id, its ids of segments int [height, width], and its segments_info with contiguous ``"category_id"``, and
            ``"iscrowd"`` where it is true.
        dataset_ids, names: of each class.
        thing_classes: contiguous indices.
    """
    truth: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": dataset_ids[index], "name": names[index]} for index in sorted(thing_classes)],
    }
    for image_id, panoptic_seg, segments_info in images:
        truth["images"].append({"id": image_id, "height": panoptic_seg.shape[0], "width": panoptic_seg.shape[1]})
        for segment in segments_info:
            if segment["category_id"] in thing_classes:
                mask = panoptic_seg == segment["id"]
                truth["annotations"].append(
                    {
                        "id": len(truth["annotations"]) + 1,  # pycocotools takes 0 for "no match"
                        "image_id": image_id,
                        "category_id": dataset_ids[segment["category_id"]],
                        "segmentation": encode_mask(mask),
                        "area": int(mask.sum()),
                        "iscrowd": int(bool(segment.get("iscrowd"))),
                    }
                )
    return truth
