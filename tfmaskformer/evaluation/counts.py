"""What an evaluation has counted, and of which images."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from checkpoints import registry
from tfmaskformer.data.records import Problem
from tfmaskformer.evaluation.instances import InstanceQuality, instance_truth
from tfmaskformer.evaluation.panoptic import PanopticQuality
from tfmaskformer.evaluation.semantic import SemanticQuality


@dataclasses.dataclass
class Counts:
    """What has been counted so far, and of which images. Counts of different images add up (``+``), and :meth:`to_dict` is JSON.

    Attributes:
        done: ids, as texts, of the images that were counted or skipped.
        skipped: how many of them were skipped.
        problems: of these.
        panoptic, semantic, instances: the metrics; None where they are not wanted.
        truth: of the instances, one document for each image.
        results: entries of the result file, if there is to be one: panoptic annotations, or semantic masks.
    """

    done: list[str] = dataclasses.field(default_factory=list)
    skipped: int = 0
    problems: list[Problem] = dataclasses.field(default_factory=list)
    panoptic: PanopticQuality | None = None
    semantic: SemanticQuality | None = None
    instances: InstanceQuality | None = None
    truth: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def none(cls, metrics: Collection[str], info: registry.DatasetInfo) -> Counts:
        """Of no image."""
        classes = len(info.class_names)
        # A label that no map has serves where the data set has none to ignore.
        ignore_label = -1 if info.ignore_label is None else info.ignore_label
        return cls(
            panoptic=PanopticQuality(classes, info.thing_classes) if "panoptic" in metrics else None,
            semantic=SemanticQuality(classes, ignore_label) if "semantic" in metrics else None,
            instances=InstanceQuality(ids_of(info)) if "instances" in metrics else None,
        )

    def __add__(self, other: Counts) -> Counts:
        """The counts of both."""
        total: dict[str, Any] = {name: None if value is None else value + getattr(other, name) for name, value in vars(self).items()}
        return Counts(**total)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        state = dict(vars(self)) | {"problems": [dataclasses.asdict(problem) for problem in self.problems]}
        return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in state.items()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Counts:
        """The counts of :meth:`to_dict`."""
        kinds: dict[str, Any] = {"panoptic": PanopticQuality, "semantic": SemanticQuality, "instances": InstanceQuality}
        read = {name: kind.from_dict(state[name]) for name, kind in kinds.items() if state[name] is not None}
        return cls(**(state | read | {"problems": [Problem(**problem) for problem in state["problems"]]}))

    def metrics(self, info: registry.DatasetInfo) -> dict[str, Any]:
        """All metrics in percent, None where there is nothing to count, overall and of each class."""
        names = info.class_names
        metrics: dict[str, Any] = {}
        if self.panoptic is not None:
            metrics["panoptic"] = {group: _percent(quality._asdict()) for group, quality in self.panoptic.result().items()}
            metrics["panoptic"]["classes"] = [
                {"name": name, **_percent({key: getattr(quality, key) if quality.num_classes else None for key in ("pq", "sq", "rq")})}
                for name, quality in zip(names, self.panoptic.per_class(), strict=True)
            ]
        if self.semantic is not None:
            semantic = self.semantic.result()
            metrics["semantic"] = _percent({name: getattr(semantic, name) for name in ("miou", "fwiou", "macc", "pacc")})
            metrics["semantic"]["classes"] = [
                {"name": name, **_percent({"iou": iou, "acc": acc})}
                for name, iou, acc in zip(names, semantic.iou.tolist(), semantic.acc.tolist(), strict=True)
            ]
        if self.instances is not None:
            instances = self.instances.result(_merged_truth(self.truth, info))._asdict()
            per_class = instances.pop("per_class")
            metrics["instances"] = _percent(instances)
            metrics["instances"]["classes"] = [{"name": name, **_percent({"ap": value})} for name, value in per_class.items()]
        return metrics


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """PQ and mIoU, those that are in :meth:`Counts.metrics`, in percent.

    >>> headline({"semantic": {"miou": 40.5}, "panoptic": {"all": {"pq": None}}})
    {'mIoU': 40.5}
    """
    found = {"PQ": metrics.get("panoptic", {}).get("all", {}).get("pq"), "mIoU": metrics.get("semantic", {}).get("miou")}
    return {name: float(value) for name, value in found.items() if value is not None}


def ids_of(info: registry.DatasetInfo) -> Sequence[int]:
    """The data set's own id of each class."""
    return info.dataset_ids or range(len(info.class_names))


def _merged_truth(documents: Sequence[dict[str, Any]], info: registry.DatasetInfo) -> dict[str, Any]:
    """One document of all images."""
    annotations = [annotation for document in documents for annotation in document["annotations"]]
    return {
        "images": [image for document in documents for image in document["images"]],
        "annotations": [annotation | {"id": number} for number, annotation in enumerate(annotations, 1)],
        "categories": instance_truth([], ids_of(info), info.class_names, info.thing_classes)["categories"],
    }


def _percent(values: dict[str, Any]) -> dict[str, Any]:
    """Shares × 100, None for those that are not a number; integers are counts and stay."""
    return {
        name: value if not isinstance(value, float) else None if np.isnan(value) else 100 * float(value) for name, value in values.items()
    }
