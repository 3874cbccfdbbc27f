"""What the official packages make of official results: panopticapi's panoptic quality and Detectron2's ``SemSegEvaluator``, for a trace.

Both work on files and data sets; here these are temporary, and hold one image. The ground truths are those of :mod:`parity.ends`.
Detectron2 and panopticapi are imported when figures are taken; what is not installed is not recorded, and a check then compares with the
definitions.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity import ends

FILE = "image.png"


def figures(result: Mapping[str, Any], target: Mapping[str, np.ndarray], model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Name below ``{i}/`` of the group "metrics" and its array, for one image.

    Args:
        result: of the official model at the image's own size, torch tensors.
        target: of the trace.
        model: the official model.
    """
    with contextlib.suppress(ImportError):
        yield from _semantic(result["sem_seg"], target, len(result["sem_seg"]), model.sem_seg_head.ignore_value)
    if "panoptic_seg" in result:
        things = model.metadata.get("thing_dataset_id_to_contiguous_id", {}).values()
        with contextlib.suppress(ImportError):
            ids, segments = result["panoptic_seg"]
            yield from _panoptic(ids.numpy(), segments, target, model.sem_seg_head.num_classes, set(things))


def _semantic(scores: Any, target: Mapping[str, np.ndarray], num_classes: int, ignore: int) -> Iterator[tuple[str, np.ndarray]]:
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import SemSegEvaluator

    classes = scores.argmax(0).numpy()
    truths = {"targets": ends.target_sem_seg(target, ignore), "shifted": ends.moved(classes, ignore)}
    yield "semantic/classes", classes.astype(np.int32)
    data_set = "parity_metrics"
    logging.getLogger("detectron2.evaluation.sem_seg_evaluation").setLevel(logging.ERROR)  # it warns of OpenCV, which is not needed
    DatasetCatalog.register(data_set, lambda: [{"file_name": name, "sem_seg_file_name": name} for name in truths])
    MetadataCatalog.get(data_set).set(stuff_classes=[str(index) for index in range(num_classes)], ignore_label=ignore)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of Detectron2's own making, and means of nothing
            evaluator = SemSegEvaluator(data_set, distributed=False, sem_seg_loading_fn=lambda name, dtype: truths[name].astype(dtype))
            evaluator._compute_boundary_iou = False  # as where OpenCV is missing
            evaluator.reset()
            matrices = [evaluator._conf_matrix.copy()]
            for name in truths:
                evaluator.process([{"file_name": name}], [{"sem_seg": scores}])
                matrices.append(evaluator._conf_matrix.copy())
            results = evaluator.evaluate()["sem_seg"]
    finally:
        DatasetCatalog.remove(data_set)
        MetadataCatalog.remove(data_set)
    for name, before, after in zip(truths, matrices, matrices[1:], strict=False):
        predicted, true = np.nonzero(after - before)
        yield f"semantic/{name}", np.stack([predicted, true, (after - before)[predicted, true]], axis=1)
    yield "semantic/quality", np.array([results[name] / 100 for name in ("mIoU", "fwIoU", "mACC", "pACC")])


def _panoptic(
    ids: np.ndarray, segments: Sequence[Mapping[str, Any]], target: Mapping[str, np.ndarray], num_classes: int, things: set[int]
) -> Iterator[tuple[str, np.ndarray]]:
    from panopticapi.evaluation import PQStat, pq_compute_single_core
    from panopticapi.utils import id2rgb
    from PIL import Image

    classes = {int(segment["id"]): int(segment["category_id"]) for segment in segments}
    categories = {index: {"id": index, "isthing": int(index in things)} for index in range(num_classes)}
    total = PQStat()
    with tempfile.TemporaryDirectory() as scratch:
        for name, (truth, found, labels) in ends.panoptic_pairs(target, ids, classes, num_classes).items():
            folders = [Path(scratch, name, side) for side in ("truth", "result")]
            for folder, values in zip(folders, (truth.ids, found), strict=True):
                folder.mkdir(parents=True)
                Image.fromarray(id2rgb(values)).save(folder / FILE)
            given = [{"id": index, "category_id": label} for index, label in labels.items()]
            wanted = [{**info, "area": int((truth.ids == info["id"]).sum())} for info in truth.segments_info]
            pair = tuple({"image_id": 0, "file_name": FILE, "segments_info": info} for info in (wanted, given))
            with contextlib.redirect_stdout(io.StringIO()):
                stat = pq_compute_single_core(0, [pair], *map(str, folders), categories)
            total += stat
            of_class = [stat[index] for index in range(num_classes)]
            yield f"panoptic/{name}", np.array([[each.iou, each.tp, each.fp, each.fn] for each in of_class], np.float64)
    rows = []
    for is_thing in (None, True, False):
        try:
            average, _ = total.pq_average(categories, is_thing)
            rows.append([average[name] for name in ("pq", "sq", "rq")])
        except ZeroDivisionError:  # no class was met
            rows.append([math.nan] * 3)
    yield "panoptic/quality", np.array(rows)
