"""Results as files: COCO's panoptic format (JSON and PNG), and masks in JSON as Detectron2's evaluators dump them.

Sources: cocodataset.org/#format-results; Detectron2's ``panoptic_evaluation.py``, ``sem_seg_evaluation.py`` and ``coco_evaluation.py``.
Classes are contiguous indices in memory and the data set's own ids in files; ``dataset_ids`` holds the latter in the order of the former.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PanopticResult: TypeAlias = "tuple[Any, str, np.ndarray, Sequence[Mapping[str, Any]]]"
"""Id and file name of an image, its map of segment ids, and its ``segments_info``."""

JSON_NAME, PNG_FOLDER = "predictions.json", "predictions"
"""panopticapi looks for the PNG files of X.json in the folder X."""


def encode_png(panoptic_seg: np.ndarray, pnginfo: PngInfo | None = None) -> bytes:
    """A PNG file of segment ids: id = R + 256 · G + 256² · B.

    Args:
        panoptic_seg: int [height, width], 0 … 2²⁴ − 1; 0 is no segment.
        pnginfo: texts beside the picture.

    >>> decode_png(encode_png(np.array([[0, 70000]]))).tolist()
    [[0, 70000]]
    """
    if panoptic_seg.min(initial=0) < 0 or panoptic_seg.max(initial=0) >= 2**24:
        raise ValueError(f"panoptic PNG: ids are {panoptic_seg.min()} … {panoptic_seg.max()}, expected 0 … {2**24 - 1}")
    colors = np.stack([panoptic_seg >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(colors).save(file, format="PNG", pnginfo=pnginfo)
        return file.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """int32 [height, width], the segment ids of :func:`encode_png`."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"panoptic PNG: the image is of mode {image.mode!r}, expected 'RGB', whose three values make an id")
        return np.asarray(image).astype(np.int32)[..., :3] @ np.array([1, 256, 256**2], np.int32)


def write_panoptic(
    folder: str | os.PathLike[str], truth: Mapping[str, Any], results: Iterable[PanopticResult], dataset_ids: Sequence[int]
) -> None:
    """Writes ``predictions/NAME.png`` for each image, and then ``predictions.json``, which panopticapi reads.

    Args:
        folder: is made where it is missing.
        truth: the ground truth's JSON; its images and categories become those of the results, as upstream.
        results: image id, the image's file name, ids int [height, width], and the segments_info of ``panoptic_inference``.
        dataset_ids: the data set's id of each class.
    """
    pngs = Path(folder) / PNG_FOLDER
    pngs.mkdir(parents=True, exist_ok=True)
    annotations = []
    for image_id, file_name, panoptic_seg, segments_info in results:
        png = f"{PurePath(file_name).stem}.png"
        (pngs / png).write_bytes(encode_png(panoptic_seg))
        segments = [{"id": segment["id"], "category_id": dataset_ids[segment["category_id"]]} for segment in segments_info]
        annotations.append({"image_id": image_id, "file_name": png, "segments_info": segments})
    document = {**truth, "annotations": annotations}
    (Path(folder) / JSON_NAME).write_text(json.dumps(document), encoding="utf-8")


def read_panoptic(folder: str | os.PathLike[str], dataset_ids: Sequence[int]) -> Iterator[PanopticResult]:
    """What :func:`write_panoptic` wrote, image by image; the file name is that of the PNG.

    Raises:
        ValueError: a category is none of ``dataset_ids``.
    """
    classes = {dataset_id: index for index, dataset_id in enumerate(dataset_ids)}
    for annotation in json.loads((Path(folder) / JSON_NAME).read_text(encoding="utf-8"))["annotations"]:
        if unknown := sorted({segment["category_id"] for segment in annotation["segments_info"]} - classes.keys()):
            raise ValueError(f"'{folder}': image {annotation['image_id']} has category ids {unknown}, which the data set has not")
        segments_info = [{**segment, "category_id": classes[segment["category_id"]]} for segment in annotation["segments_info"]]
        panoptic_seg = decode_png((Path(folder) / PNG_FOLDER / annotation["file_name"]).read_bytes())
        yield annotation["image_id"], annotation["file_name"], panoptic_seg, segments_info


def semantic_annotations(file_name: str, labels: np.ndarray, dataset_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The entries of an image in ``sem_seg_predictions.json`` (Detectron2 ``SemSegEvaluator``): one mask for each class it has.

    Args:
        file_name: of the image.
        labels: int [height, width], contiguous class indices.
        dataset_ids: the data set's id of each class.
    """
    return [
        {"file_name": file_name, "category_id": dataset_ids[label], "segmentation": encode_mask(labels == label)}
        for label in np.unique(labels).tolist()
    ]


def instance_annotations(
    image_id: Any, panoptic_seg: np.ndarray, segments_info: Sequence[Mapping[str, Any]], dataset_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The things of an image as entries of ``coco_instances_results.json`` (Detectron2 ``COCOEvaluator``), with boxes of their masks.

    Args:
        image_id: of the image.
        panoptic_seg: int [height, width], ids of segments.
        segments_info: with the ``"score"`` of each, as :class:`tfmaskformer.static_inference.PanopticSegments` has it.
        dataset_ids: the data set's id of each class.
    """
    annotations = []
    for segment in segments_info:
        if segment["isthing"]:
            rle = encode_mask(panoptic_seg == segment["id"])
            annotation = {
                "image_id": image_id,
                "category_id": dataset_ids[segment["category_id"]],
                "bbox": _mask_api().toBbox(rle).tolist(),
            }
            annotations.append(annotation | {"score": segment["score"], "segmentation": rle})
    return annotations


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask, bool [height, width]: ``{"size": [height, width], "counts": str}``."""
    rle = _mask_api().encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _mask_api() -> Any:
    try:
        import pycocotools.mask
    except ImportError as error:
        raise ImportError("masks in JSON and instance AP need pycocotools: pip install 'tfmaskformer[eval]'") from error
    return pycocotools.mask
