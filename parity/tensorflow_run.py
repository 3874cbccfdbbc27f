"""The TensorFlow side of a check: one function computes taps, outputs, costs, assignments, losses and gradients.

Everything comes out by its official name and in the official layout; an image of a masked batch like the image alone. With a memory
budget, taps go to a temporary file while they are computed. TensorFlow is imported when a run starts, not before.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest import mock

import numpy as np

from parity import tap_rules
from parity.compiled import compiled
from parity.spool import KEPT_SHARE, Spool
from parity.tap_rules import Names, View, official_gradients, official_layout

if TYPE_CHECKING:
    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import Substitute

MODES = ("graph", "eager", "xla")
PADDINGS = ("official", "masked")
GRADIENTS = ("none", "parameters", "all")
"""Of the total loss: none, which saves the memory that they need; those of every parameter; those of every tap too."""


@dataclasses.dataclass(frozen=True)
class CaseInputs:
    """What a case feeds in.

    Attributes:
        images: uint8 [height, width, 3] RGB.
        targets: for each image ``labels`` int64 [K], ``masks`` bool [K, height, width] and, of a per-pixel baseline, ``sem_seg`` int32
            [height, width].
        forced: (layer, image) → int [K], layer 0 being the final one: assignments to take losses under, where the reference's own is
            no better than another (a tie or near-tie); elsewhere losses are taken under the model's own.
        resized: (height, width) in px of each image's second inference.
        position_embeddings: module → float32 [images, channels, height, width]: what later layers get in place of the module's own
            output, which is tapped all the same. Upstream computes position embeddings in float32 even in float64, with the sines of
            its platform's library, so their last bit differs (1e-8); in float64 that alone would flip ReLUs whose input is zero but
            for rounding, and gradients would jump by 1e-4.
    """

    images: Sequence[np.ndarray]
    targets: Sequence[Mapping[str, np.ndarray]]
    forced: Mapping[tuple[int, int], np.ndarray]
    resized: Sequence[tuple[int, int]]
    position_embeddings: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CaseResults:
    """What TensorFlow made of a case.

    Attributes:
        groups: group (as in :mod:`parity.trace`) → name → array; of taps, their gradients and outputs the whole batch in TensorFlow's
            layout, each read from a temporary file where there is a memory budget.
        names: of the model.
        view: of masked padding, which image of the batch this is.
        exact: of a float32 run, by group, the losses and the inference results that float64 makes of its own outputs: the difference is
            what the losses and the inference themselves round.
        panoptic: the panoptic results by name, with the thresholds of the score and of the overlap moved by its arguments; None without
            panoptic inference.
        losses_under: the losses of its own outputs, with assignments put in place of its own as of :attr:`CaseInputs.forced`; None where
            nothing is assigned.
    """

    groups: dict[str, Mapping[str, np.ndarray]]
    names: Names
    view: View | None = None
    exact: dict[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    panoptic: Callable[[float, float], dict[str, np.ndarray]] | None = None
    losses_under: Callable[[Mapping[tuple[int, int], np.ndarray]], dict[str, np.ndarray]] | None = None

    def official(self, group: str, name: str) -> np.ndarray:
        """One tensor in the official layout."""
        array = self.groups[group][name]
        table = {"taps": "taps", "tap_gradients": "taps", "outputs": "outputs"}.get(group)
        return array if table is None else official_layout(array, self.names.layout_of(table, name), self.view)


def run(
    model: MaskFormer,
    cases: Sequence[CaseInputs],
    *,
    mode: str = "graph",
    padding: str = "official",
    pad_to: tuple[int, int] | None = None,
    gradients: str = "parameters",
    memory_budget: int | None = None,
    substitute: Substitute | None = None,
    tapped: bool = True,
    results: bool = True,
) -> list[CaseResults]:
    """Runs the model with taps; one result for each case.

    Args:
        model: float32 or float64.
        cases: one for official padding; for masked padding any number, of one image each, which become one batch.
        mode: "graph", "eager" or "xla".
        padding: see ``MaskFormer.call``.
        pad_to: canvas (height, width) of masked padding, px; None: just large enough.
        gradients: one of :data:`GRADIENTS`.
        memory_budget: bytes; of the taps and their gradients a share of it stays in memory, the rest goes to a temporary file. Only where
            TensorFlow runs eagerly, for a compiled function hands over all taps at once. None: all stay in memory.
        substitute: is given every tap and returns what the model goes on with (:func:`tfmaskformer.record_taps`); the results then have
            no taps. Only where TensorFlow runs eagerly.
        tapped: False leaves the model alone: what comes out is what it computes when nobody looks, without taps.
        results: False tells of taps and gradients alone, and computes nothing else besides.
    """
    import tensorflow as tf

    if padding == "official" and (len(cases) > 1 or pad_to is not None):
        raise ValueError("official padding: expected one case, on its own canvas")
    if substitute is not None and mode != "eager":
        raise ValueError(f"a substitute for taps: expected mode 'eager', got '{mode}'")
    if memory_budget is not None and mode != "eager":
        raise ValueError(f"a memory budget: expected mode 'eager', got '{mode}', which hands over all taps at once")
    images = [image for case in cases for image in case.images]
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    canvas = sizes.max(0) if pad_to is None else pad_to
    divisor = max(model.config.size_divisibility, 1)
    height, width = (-(-int(side) // divisor) * divisor for side in canvas)
    task = _task(model.config)
    targets = [task.targets(case, height, width) for case in cases]
    arguments = tf.nest.map_structure(tf.constant, (padded_images(images, canvas), sizes, targets))
    spool = None if memory_budget is None else Spool(memory_budget // KEPT_SHARE)
    step = _step(model, task, padding, gradients, spool, substitute, tapped, results)
    with compiled(step, mode) as run_step, _given_position_embeddings(cases):
        taps, outputs, matchings, losses, exact_losses, of_parameters, of_taps = run_step(*arguments)

    whole: dict[str, Mapping[str, np.ndarray]] = {"taps": _numpy(taps) if spool is None else spool.group("taps")}
    if results:
        whole["outputs"] = _numpy(dict(_flat_outputs(outputs, task.outputs)))
    found = []
    for index, case in enumerate(cases):
        view, own_outputs = None, outputs
        if padding == "masked":
            own_outputs = _of_image(outputs, index)
            valid_height, valid_width = own_outputs["valid_sizes"][0].numpy().tolist()
            view = View(index, (height, width), (valid_height, valid_width))
        own: dict[str, Mapping[str, np.ndarray]] = {}
        if gradients != "none":
            own["gradients"] = official_gradients(_numpy(of_parameters[index]), model.config)
        if gradients == "all":
            own["tap_gradients"] = _numpy(of_taps[index]) if spool is None else spool.group(_of_case(index))
        if not results:
            found.append(CaseResults({**whole, **own}, tap_rules.names(model.config), view))
            continue
        own["matcher"] = dict(task.matcher_records(matchings[index], case))
        own["losses"] = _numpy(losses[index])
        own["inference"] = _kept(spool, f"inference/{index}", _semantic(own_outputs, model.config, case, _inferences(case)))
        panoptic = None
        if model.config.test.panoptic_on:
            panoptic = functools.partial(_panoptic, own_outputs, model.config, case)
            own["inference"] = collections.ChainMap(panoptic(0.0, 0.0), own["inference"])  # type: ignore[arg-type]
        exact = {}
        if model.compute_dtype == "float32":
            again = _semantic(_in_float64(own_outputs), model.config, case, _resized(case))
            exact_inference = _kept(spool, f"exact/{index}", again)
            exact = {"losses": _numpy(exact_losses[index]), "inference": exact_inference}
        losses_under = functools.partial(_losses_under, task, own_outputs, case, (height, width)) if own["matcher"] else None
        found.append(CaseResults({**whole, **own}, tap_rules.names(model.config), view, exact, panoptic, losses_under))
    return found


def _losses_under(
    task: _MaskFormerTask | _PerPixelTask,
    outputs: Mapping[str, Any],
    case: CaseInputs,
    canvas: tuple[int, int],
    forced: Mapping[tuple[int, int], np.ndarray],
) -> dict[str, np.ndarray]:
    import tensorflow as tf

    targets = tf.nest.map_structure(tf.constant, task.targets(dataclasses.replace(case, forced=forced), *canvas))
    _, losses_of = task.match(outputs, targets)
    losses = losses_of(outputs)
    return _numpy(losses | {"total": task.criterion.weighted_total(losses)})


def _step(
    model: MaskFormer,
    task: _MaskFormerTask | _PerPixelTask,
    padding: str,
    gradients: str,
    spool: Spool | None,
    substitute: Substitute | None,
    tapped: bool,
    results: bool,
) -> Callable[..., tuple[Any, ...]]:
    """The function to trace: a forward pass for the batch, then costs, losses and gradients for each case apart."""
    import tensorflow as tf

    from tfmaskformer.module import named_variables, record_taps

    weighted_total = task.criterion.weighted_total
    variables = {name: variable.value for name, variable in named_variables(model).items() if variable.trainable}

    def step(batch: Any, sizes: Any, targets: Sequence[Any]) -> tuple[Any, ...]:
        matchings, losses, totals = [], [], []
        exact_losses: list[dict[str, Any]] = []

        def spill(name: str, tensor: Any) -> Any:
            if spool is not None and substitute is None:
                spool.write("taps", name, tensor.numpy())
            if gradients != "all":
                del taps[name]
            return tensor if substitute is None else substitute(name, tensor)

        with tf.GradientTape(persistent=len(targets) > 1) if gradients != "none" else contextlib.nullcontext() as tape:
            recording: Any = record_taps(None if spool is None and substitute is None else spill) if tapped else contextlib.nullcontext({})
            with recording as taps:
                outputs = model(batch, sizes, padding=padding)
            for index, case_targets in enumerate(targets):
                own = outputs
                if padding == "masked":
                    own = _of_image(outputs, index)
                matching, losses_of = task.match(own, case_targets)
                case_losses = losses_of(own)
                totals.append(weighted_total(case_losses))
                losses.append(case_losses | {"total": totals[-1]})
                exact_losses.append({})
                if results and model.compute_dtype == "float32":
                    with contextlib.nullcontext() if tape is None else tape.stop_recording():
                        exact = losses_of(_in_float64(own))
                        exact_losses[-1] = exact | {"total": weighted_total(exact)}
                matchings.append(matching)
        of_parameters: list[dict[str, Any]] = []
        of_taps: list[dict[str, Any]] = []
        for index, total in enumerate(totals):
            if tape is None:
                break
            watched = dict(taps) if gradients == "all" else {}
            found, found_taps = tape.gradient(total, (variables, watched))
            of_parameters.append({name: tf.zeros_like(variables[name]) if of is None else of for name, of in found.items()})
            of_taps.append({name: tf.convert_to_tensor(of) for name, of in found_taps.items() if of is not None})
            if spool is not None:
                for name, of in of_taps.pop().items():
                    spool.write(_of_case(index), name, of.numpy())
        return {} if spool is not None else dict(taps), outputs, matchings, losses, exact_losses, of_parameters, of_taps

    return step


def _kept(spool: Spool | None, group: str, tensors: Iterator[tuple[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Tensors by name, each put into the spool before the next is computed."""
    if spool is None:
        return dict(tensors)
    for name, tensor in tensors:
        spool.write(group, name, tensor)
        del tensor  # before the next one
    return spool.group(group)


def _of_case(index: int) -> str:
    """Group under which the gradients of the taps lie that belong to one of several cases."""
    return f"tap_gradients/{index}"


class _MaskFormerTask:
    """Losses under an assignment, of which costs are told too."""

    outputs = ("pred_logits", "pred_masks")

    def __init__(self, config: MaskFormerConfig):
        from tfmaskformer.criterion import SetCriterion

        self.criterion = SetCriterion(config)
        self.layers = config.predictor.dec_layers if config.predictor.deep_supervision else 1

    def targets(self, case: CaseInputs, height: int, width: int) -> Any:
        """The criterion's targets on a canvas of (height, width) px, and what :meth:`_assignments` makes of the case."""
        counts = np.array([len(target["labels"]) for target in case.targets], np.int32)
        labels = np.zeros((len(counts), counts.max()), np.int32)
        masks = np.zeros((*labels.shape, height, width), bool)
        for index, target in enumerate(case.targets):
            labels[index, : counts[index]] = target["labels"]
            rows, columns = target["masks"].shape[1:]
            masks[index, : counts[index], :rows, :columns] = target["masks"]
        return {"labels": labels, "masks": masks, "num_objects": counts}, self._assignments(case)

    def _assignments(self, case: CaseInputs) -> tuple[np.ndarray, np.ndarray]:
        """int32 [layers, batch, max_objects] and bool [layers, batch]: the forced assignments, and where they are."""
        most = max(len(target["labels"]) for target in case.targets)
        assignment = np.full((self.layers, len(case.targets), most), -1, np.int32)
        is_forced = np.zeros(assignment.shape[:2], bool)
        for (layer, image), queries in case.forced.items():
            assignment[layer, image, : len(queries)] = queries
            is_forced[layer, image] = True
        return assignment, is_forced

    def match(self, outputs: Mapping[str, Any], targets: Any) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
        """Costs and assignment, and what takes the losses of outputs under it."""
        import tensorflow as tf

        own, (assignment, is_forced) = targets
        matching = self.criterion.match(outputs, own)
        assignment = tf.where(is_forced[..., tf.newaxis], assignment, matching.assignment)
        return matching, lambda outputs: self.criterion.losses(outputs, own, assignment)

    @staticmethod
    def matcher_records(matching: Any, case: CaseInputs) -> Any:
        """Name → array of the group "matcher"."""
        fields = _numpy(matching._asdict())
        for layer in range(fields["assignment"].shape[0]):
            for image, target in enumerate(case.targets):
                prefix, count = f"{'final' if layer == 0 else layer - 1}/{image}", len(target["labels"])
                for name in ("cost_class", "cost_mask", "cost_dice", "total"):
                    yield f"{prefix}/{name}", fields[name][layer, image, :, :count]
                yield f"{prefix}/assignment", fields["assignment"][layer, image, :count]


class _PerPixelTask:
    """Losses of each pixel; nothing is matched. See :class:`_MaskFormerTask`."""

    outputs = ("sem_seg",)

    def __init__(self, config: MaskFormerConfig):
        from tfmaskformer.per_pixel_criterion import PerPixelCriterion

        self.criterion = PerPixelCriterion(config)

    def targets(self, case: CaseInputs, height: int, width: int) -> Any:
        sem_seg = np.full((len(case.targets), height, width), self.criterion.ignore_value, np.int32)
        for index, target in enumerate(case.targets):
            rows, columns = target["sem_seg"].shape
            sem_seg[index, :rows, :columns] = target["sem_seg"]
        return {"sem_seg": sem_seg}

    def match(self, outputs: Mapping[str, Any], targets: Any) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
        return (), lambda outputs: self.criterion(outputs, targets)

    @staticmethod
    def matcher_records(matching: Any, case: CaseInputs) -> Any:
        return ()


def _task(config: MaskFormerConfig) -> _MaskFormerTask | _PerPixelTask:
    return _MaskFormerTask(config) if config.head == "MaskFormerHead" else _PerPixelTask(config)


@contextlib.contextmanager
def _given_position_embeddings(cases: Sequence[CaseInputs]) -> Iterator[None]:
    """Inside, position embeddings are those that the cases give, each in the top left corner of the grid that it is asked for."""
    import tensorflow as tf

    from tfmaskformer.transformer import PositionEmbeddingSine

    original = PositionEmbeddingSine.__call__

    def call(module: Any, *arguments: Any) -> Any:
        own = original(module, *arguments)
        given = [image for case in cases for image in case.position_embeddings.get(module.official_name, ())]
        if not given:
            return own
        grid = np.zeros(own.shape, np.float32)
        for index, image in enumerate(given):
            grid[index, : image.shape[1], : image.shape[2]] = image.transpose(1, 2, 0)
        return tf.constant(grid)

    with mock.patch.object(PositionEmbeddingSine, "__call__", call):
        yield


def _of_image(outputs: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The model's outputs for one image of the batch."""
    import tensorflow as tf

    own = tf.nest.map_structure(lambda tensor: tensor[index : index + 1], dict(outputs))
    return own | {"padded_size": outputs["padded_size"]}


def _in_float64(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same numbers, for a criterion that computes in float64."""
    import tensorflow as tf

    return tf.nest.map_structure(lambda tensor: tf.cast(tensor, tf.float64) if tensor.dtype.is_floating else tensor, dict(outputs))


def padded_images(images: Sequence[np.ndarray], canvas: Sequence[int]) -> np.ndarray:
    """uint8 [batch, height, width, 3], each image in the top left corner."""
    batch = np.zeros((len(images), int(canvas[0]), int(canvas[1]), 3), np.uint8)
    for index, image in enumerate(images):
        batch[index, : image.shape[0], : image.shape[1]] = image
    return batch


def _flat_outputs(outputs: Mapping[str, Any], keys: Sequence[str]) -> Any:
    for key in keys:
        yield key, outputs[key]
    for layer, auxiliary in enumerate(outputs.get("aux_outputs", ())):
        for key in keys:
            yield f"aux_outputs.{layer}.{key}", auxiliary[key]


def _semantic(outputs: Mapping[str, Any], config: MaskFormerConfig, case: CaseInputs, inferences: Sequence[Inference]) -> Any:
    from tfmaskformer.inference import semantic_inference

    for suffix, sizes, output_sizes in inferences:
        found = semantic_inference(outputs, config, sizes, output_sizes)
        for index in range(len(sizes)):
            yield f"{index}/{suffix}sem_seg", np.asarray(found.pop(0))


def _panoptic(
    outputs: Mapping[str, Any], config: MaskFormerConfig, case: CaseInputs, score: float, overlap: float
) -> dict[str, np.ndarray]:
    from tfmaskformer.inference import panoptic_inference

    thresholds: dict[str, Any] = {
        "object_mask_threshold": config.test.object_mask_threshold + score,
        "overlap_threshold": config.test.overlap_threshold + overlap,
    }
    found = {}
    for suffix, sizes, output_sizes in _inferences(case):
        for index, (segmentation, segments) in enumerate(panoptic_inference(outputs, config, sizes, output_sizes, **thresholds)):
            rows = [[segment["id"], segment["category_id"], segment["isthing"]] for segment in segments]
            found[f"{index}/{suffix}panoptic_seg"] = segmentation
            found[f"{index}/{suffix}segments"] = np.array(rows, np.int64).reshape(-1, 3)
    return found


Inference: TypeAlias = "tuple[str, Sequence[Sequence[int]], Sequence[Sequence[int]]]"
"""Prefix, sizes of the images, and sizes of the results."""


def _inferences(case: CaseInputs) -> list[Inference]:
    """One at the images' own size, and one at another."""
    sizes = [image.shape[:2] for image in case.images]
    return [("", sizes, sizes), *_resized(case)]


def _resized(case: CaseInputs) -> list[Inference]:
    """The one at another size, which computes all that the first one does: enough to tell what float64 makes of the same outputs."""
    return [("resized/", [image.shape[:2] for image in case.images], case.resized)]


def _numpy(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors' own memory, where it is this machine's."""
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}
