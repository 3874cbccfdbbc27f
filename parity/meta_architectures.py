"""What differs between the official meta-architectures when they are recorded: MaskFormer, and Detectron2's SemanticSegmentor.

Both run a backbone and a ``sem_seg_head``. A MaskFormer's head returns the outputs, and the model around it matches objects and takes
losses. A SemanticSegmentor's head returns upsampled logits or losses; the outputs are what its ``layers`` returns before that.

PyTorch and the official code are imported when they are needed, not before.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np

from parity.inputs import make_label_map

Emit = Callable[[str, str, np.ndarray], None]
"""Takes one record: group, name, array. The array may share memory with a live tensor: use it at once."""

Targets = Mapping[str, np.ndarray]
"""Of one image: ``labels`` int64 [K], ``masks`` bool [K, H, W], and, of a SemanticSegmentor, ``sem_seg`` int32 [H, W]."""


class RecordError(RuntimeError):
    """The official code did not do what a trace relies on; the message says what."""


class Task(abc.ABC):
    """One official model to be recorded.

    Attributes:
        model: the official model.
        method: of its head, which returns the network's outputs.
    """

    method: str

    def __init__(self, model: Any):
        self.model = model

    @staticmethod
    @abc.abstractmethod
    def targets(labels: np.ndarray, masks: np.ndarray, config: Any, key: str) -> Targets:
        """What is recorded of an image's made-up objects (:func:`parity.inputs.make_targets`)."""

    @staticmethod
    @abc.abstractmethod
    def outputs(returned: Any) -> dict[str, Any]:
        """The outputs by name, of what the head's method returned."""

    @abc.abstractmethod
    def losses(self, returned: Any, images: Any, targets: Sequence[Targets], emit: Emit) -> tuple[dict[str, Any], Any]:
        """The official losses and the weighted sum that is trained; what else belongs to them goes to ``emit``.

        Args:
            returned: by the head's method, with its graph.
            images: the batch that entered the backbone.
            targets: of each image.
            emit: takes records.
        """

    @contextlib.contextmanager
    def watched(self, see: Callable[[Any], None]) -> Iterator[None]:
        """Inside, ``see`` is told what the head's method returns."""
        method = getattr(self.model.sem_seg_head, self.method)

        def call(*arguments: Any) -> Any:
            returned = method(*arguments)
            see(returned)
            return returned

        with mock.patch.object(self.model.sem_seg_head, self.method, call):
            yield

    @contextlib.contextmanager
    def given(self, returned: Any) -> Iterator[None]:
        """Inside, the official code finds ``returned`` instead of computing it: its last steps run on it, at any size."""
        unread = mock.patch.object(self.model.backbone, "forward", return_value=None)
        with unread, mock.patch.object(self.model.sem_seg_head, self.method, return_value=returned):
            yield


class MaskFormer(Task):
    """``mask_former/mask_former_model.py``: losses under an assignment of queries to objects, which are recorded with its costs."""

    method = "forward"

    @staticmethod
    def targets(labels: np.ndarray, masks: np.ndarray, config: Any, key: str) -> Targets:
        return {"labels": labels, "masks": masks}

    @staticmethod
    def outputs(returned: Any) -> dict[str, Any]:
        return returned

    def losses(self, returned: Any, images: Any, targets: Sequence[Targets], emit: Emit) -> tuple[dict[str, Any], Any]:
        import torch
        from detectron2.structures import ImageList, Instances

        criterion = self.model.criterion
        sizes = [target["masks"].shape[1:] for target in targets]
        instances = [
            Instances(size, gt_classes=torch.from_numpy(target["labels"]), gt_masks=torch.from_numpy(target["masks"]))
            for size, target in zip(sizes, targets, strict=True)
        ]
        prepared = self.model.prepare_targets(instances, ImageList(images, sizes))
        with _matcher_calls() as calls:
            try:
                losses = criterion(returned, prepared)
            except ValueError as error:
                raise RecordError(f"the official matcher failed ({error}); are there NaN in the weights?") from error
        _emit_matching(criterion.matcher, returned, prepared, calls, emit)
        return losses, sum(loss * criterion.weight_dict[name] for name, loss in losses.items())


class SemanticSegmentor(Task):
    """Detectron2 ``modeling/meta_arch/semantic_seg.py`` with a head of ``mask_former/modeling/heads/per_pixel_baseline.py``.

    Upstream upsamples to a multiple of 4, and fails to take the loss where the padded images are none: there the targets are filled up with
    the ignore value. It also casts logits to float32, for the sake of mixed precision, which would leave no float64 loss: here it does not.
    """

    method = "layers"

    @staticmethod
    def targets(labels: np.ndarray, masks: np.ndarray, config: Any, key: str) -> Targets:
        head = config.MODEL.SEM_SEG_HEAD
        sem_seg = make_label_map(labels, masks, head.NUM_CLASSES, head.IGNORE_VALUE, key)
        return {"labels": labels, "masks": masks, "sem_seg": sem_seg}

    @staticmethod
    def outputs(returned: Any) -> dict[str, Any]:
        final, earlier = returned if isinstance(returned, tuple) else (returned, None)
        auxiliary = {} if earlier is None else {"aux_outputs": [{"sem_seg": layer["pred_masks"]} for layer in earlier]}
        return {"sem_seg": final, **auxiliary}

    def losses(self, returned: Any, images: Any, targets: Sequence[Targets], emit: Emit) -> tuple[dict[str, Any], Any]:
        import torch
        from detectron2.structures import ImageList

        backbone, head = self.model.backbone, self.model.sem_seg_head
        maps = [torch.from_numpy(target["sem_seg"]).long() for target in targets]
        labels = ImageList.from_tensors(maps, backbone.size_divisibility, head.ignore_value, backbone.padding_constraints).tensor
        assert labels.shape[1:] == images.shape[2:]
        height, width = (-(-side // head.common_stride) * head.common_stride for side in labels.shape[1:])
        labels = torch.nn.functional.pad(labels, (0, width - labels.shape[2], 0, height - labels.shape[1]), value=head.ignore_value)
        own_dtype = mock.patch.object(torch.Tensor, "float", torch.Tensor.clone)
        with self.given(returned), mock.patch.object(head, "training", True), own_dtype:
            _, losses = head(None, labels)
        return losses, sum(losses.values())


META_ARCHITECTURES: dict[str, type[Task]] = {kind.__name__: kind for kind in (MaskFormer, SemanticSegmentor)}
"""By their official name, MODEL.META_ARCHITECTURE."""


@contextlib.contextmanager
def _matcher_calls() -> Iterator[list[dict[str, Any]]]:
    """Collects what the official matcher computes for each layer and image: ``cost_mask``, ``cost_dice``, ``total``, ``pairs``."""
    from mask_former.modeling import matcher

    functions = {name: getattr(matcher, name) for name in ("batch_sigmoid_focal_loss", "batch_dice_loss", "linear_sum_assignment")}
    calls: list[dict[str, Any]] = []

    def focal(*arguments: Any) -> Any:
        calls.append({"cost_mask": functions["batch_sigmoid_focal_loss"](*arguments)})
        return calls[-1]["cost_mask"]

    def dice(*arguments: Any) -> Any:
        calls[-1]["cost_dice"] = functions["batch_dice_loss"](*arguments)
        return calls[-1]["cost_dice"]

    def assign(total: Any) -> Any:
        calls[-1]["total"] = total
        calls[-1]["pairs"] = functions["linear_sum_assignment"](total)
        return calls[-1]["pairs"]

    replacements = {"batch_sigmoid_focal_loss": focal, "batch_dice_loss": dice, "linear_sum_assignment": assign}
    for name, replacement in replacements.items():
        setattr(matcher, name, replacement)
    try:
        yield calls
    finally:
        for name, function in functions.items():
            setattr(matcher, name, function)


def _emit_matching(matcher: Any, outputs: Any, targets: Any, calls: Sequence[Mapping[str, Any]], emit: Emit) -> None:
    import torch

    layers = {"final": outputs} | {str(index): layer for index, layer in enumerate(outputs.get("aux_outputs", ()))}
    places = [(layer, index) for layer in layers for index in range(len(targets))]
    for (layer, index), call in zip(places, calls, strict=True):
        labels = targets[index]["labels"]
        cost_class = -layers[layer]["pred_logits"][index].detach().softmax(-1)[:, labels]
        total = matcher.cost_mask * call["cost_mask"] + matcher.cost_class * cost_class + matcher.cost_dice * call["cost_dice"]
        if not torch.equal(total, call["total"]):
            raise RecordError(f"the costs of layer '{layer}', image {index} do not add up to what the official matcher solved")
        assignment = np.full(len(labels), -1, np.int64)
        queries, objects = call["pairs"]
        assignment[objects] = queries
        for name, tensor in (
            ("cost_class", cost_class),
            ("cost_mask", call["cost_mask"]),
            ("cost_dice", call["cost_dice"]),
            ("total", total),
        ):
            emit("matcher", f"{layer}/{index}/{name}", numpy(tensor))
        emit("matcher", f"{layer}/{index}/assignment", assignment)


def numpy(tensor: Any) -> np.ndarray:
    """The tensor's values, sharing its memory."""
    return tensor.detach().numpy()
