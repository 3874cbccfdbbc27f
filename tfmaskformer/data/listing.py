"""Lists of images with their ground truth, from folders and JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from checkpoints import registry
from tfmaskformer.data.layouts import Layout
from tfmaskformer.data.records import VOID, DataError, Problem, Record, Segment

_PREPARE = "see docs/data.md for the folders of each data set and how they are prepared"


def list_semantic(layout: Layout, paths: Mapping[str, str]) -> tuple[list[Record], list[Problem]]:
    """Images and semantic maps, paired by name, in alphabetical order; an image or map without the other is a problem.

    Args:
        layout: how names end.
        paths: of the folders ``images`` and ``semantic``.

    Raises:
        DataError: a folder has no such file.
    """
    images = _stems(paths["images"], layout.image_suffix, layout.cities)
    labels = _stems(paths["semantic"], layout.semantic_suffix, layout.cities)
    for folder, found, suffix in ((paths["images"], images, layout.image_suffix), (paths["semantic"], labels, layout.semantic_suffix)):
        if not found:
            raise DataError(Problem("empty folder", folder, f"files …{suffix}", "none"), _PREPARE)
    image = {stem: f"{os.path.join(paths['images'], stem)}{layout.image_suffix}" for stem in images | labels}
    label = {stem: f"{os.path.join(paths['semantic'], stem)}{layout.semantic_suffix}" for stem in images | labels}
    problems = [Problem("missing file", label[stem], f"the ground truth of {image[stem]}", "none") for stem in sorted(images - labels)]
    problems += [Problem("missing file", image[stem], f"the image of {label[stem]}", "none") for stem in sorted(labels - images)]

    def image_id(stem):
        name = os.path.basename(stem)
        return int(name) if layout.integer_ids and name.isdecimal() else name

    return [Record(image_id(stem), image[stem], semantic=label[stem]) for stem in sorted(images & labels)], problems


def list_panoptic(layout: Layout, paths: Mapping[str, str], *, empty: bool = False) -> tuple[list[Record], list[Problem]]:
    """The annotations of a panoptic JSON in its order; those that are malformed or of an image listed before are problems.

    Args:
        layout: how names end.
        paths: of ``images``, ``panoptic``, ``panoptic_json`` and, where the layout has it, ``semantic``.
        empty: whether an annotation without segments is listed; otherwise it is a problem.

    Raises:
        DataError: no JSON there, or not one of panoptic annotations.
    """
    file = paths["panoptic_json"]
    content = _read_json(file)
    contiguous = {dataset_id: index for index, dataset_id in enumerate(registry.dataset(layout.dataset).dataset_ids or ())}
    sizes = _sizes(content, file)
    records: list[Record] = []
    problems: list[Problem] = []
    seen: set[int | str] = set()
    for index, annotation in enumerate(content["annotations"]):
        place = f"{file}, annotation {index}"
        try:
            image_id, png, segments = _annotation(annotation, place, layout, contiguous)
            if not segments and not empty:
                raise DataError(Problem("empty annotation", f"{place} ({png})", "at least one segment", "none"))
            if image_id in seen:
                raise DataError(Problem("duplicate image id", place, "one annotation for each image", f"a second one for {image_id!r}"))
        except DataError as error:
            problems.append(error.problem)
            continue
        seen.add(image_id)
        stem = f"{str(image_id).split('_')[0]}/{image_id}" if layout.cities else os.path.splitext(png)[0]
        height, width = sizes.get(image_id) or sizes.get(stem) or (None, None)
        record = Record(
            image_id=image_id,
            image=f"{os.path.join(paths['images'], stem)}{layout.image_suffix}",
            height=height,
            width=width,
            panoptic=os.path.join(paths["panoptic"], png),
            segments=segments,
            semantic=f"{os.path.join(paths['semantic'], stem)}{layout.semantic_suffix}" if layout.semantic else None,
        )
        records.append(record)
    return records, problems


def _annotation(annotation: Any, place: str, layout: Layout, contiguous: Mapping[int, int]) -> tuple[int | str, str, tuple[Segment, ...]]:
    _require(annotation, place, "an annotation", {"image_id": (int, str), "file_name": str, "segments_info": list})
    place = f"{place} ({annotation['file_name']})"
    image_id = annotation["image_id"]
    if layout.integer_ids:
        try:
            image_id = int(image_id)
        except ValueError:
            raise DataError(Problem("malformed annotation", place, "an integer image_id", repr(image_id))) from None
    segments: dict[int, Segment] = {}
    for segment in annotation["segments_info"]:
        _require(segment, place, "a segment", {"id": int, "category_id": int, "area": int, "iscrowd": int})
        if segment["category_id"] not in contiguous:
            got = f"{segment['category_id']} of segment {segment['id']}"
            raise DataError(Problem("unknown category", place, f"an id of {layout.dataset}'s table", got))
        if segment["id"] in segments or not VOID < segment["id"] < 256**3:
            raise DataError(Problem("malformed annotation", place, "ids between 1 and 2²⁴ − 1, each once", str(segment["id"])))
        category = contiguous[segment["category_id"]]
        segments[segment["id"]] = Segment(segment["id"], category, bool(segment["iscrowd"]), segment["area"])
    return image_id, annotation["file_name"], tuple(segments.values())


def _read_json(file: str) -> dict[str, Any]:
    try:
        content = json.loads(read_file(file))
    except tf.errors.OpError as error:
        raise DataError(Problem("missing file", file, "the JSON of the panoptic annotations", told(error)), _PREPARE) from error
    except ValueError as error:
        raise DataError(Problem("malformed JSON", file, "JSON", str(error)), "download or make it again") from error
    _require(content, file, "the file", {"annotations": list})
    return content


def _sizes(content: Mapping[str, Any], file: str) -> dict[int | str, tuple[int, int]]:
    """(height, width) of each image by its id and by its name without suffix; ADE20K's images have no id."""
    sizes: dict[int | str, tuple[int, int]] = {}
    if "images" in content:
        _require(content, file, "the file", {"images": list})
    for index, image in enumerate(content.get("images", ())):
        _require(image, f"{file}, image {index}", "an image", {"file_name": str, "height": int, "width": int})
        for key in (os.path.splitext(image["file_name"])[0], image.get("id")):
            if isinstance(key, int | str):
                sizes[key] = image["height"], image["width"]
    return sizes


def _require(value: Any, place: str, what: str, keys: Mapping[str, Any]) -> None:
    if not isinstance(value, dict):
        raise DataError(Problem("malformed annotation", place, f"{what} that is an object", type(value).__name__))
    for key, kinds in keys.items():
        if key not in value or not isinstance(value[key], kinds):
            names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            got = f"{type(value[key]).__name__} {value[key]!r:.40}" if key in value else f"only {', '.join(value) or 'no keys'}"
            raise DataError(Problem("malformed annotation", place, f"{what} with '{key}' ({names})", got))


def _stems(folder: str, suffix: str, cities: bool) -> set[str]:
    """Names in ``folder`` that end with ``suffix``, without it; with ``cities`` those in its folders, as city/name."""
    if cities:
        return {f"{city}/{stem}" for city in names_in(folder) for stem in _stems(os.path.join(folder, city), suffix, cities=False)}
    return {name.removesuffix(suffix) for name in names_in(folder) if name.endswith(suffix)}


def names_in(folder: str) -> list[str]:
    """Names of files and folders in ``folder``; none where there is no such folder."""
    try:
        return [name.rstrip("/") for name in tf.io.gfile.listdir(folder)] if tf.io.gfile.isdir(folder) else []
    except tf.errors.OpError as error:
        raise DataError(Problem("unreadable folder", folder, "a folder", told(error)), _PREPARE) from error


def read_file(path: str) -> bytes:
    """A file's bytes, through ``tf.io.gfile``."""
    with tf.io.gfile.GFile(path, "rb") as file:
        return file.read()


def write_file(path: str, content: bytes) -> None:
    """A file that is there whole, or not at all, through ``tf.io.gfile``; its folder is made where it is missing."""
    tf.io.gfile.makedirs(os.path.dirname(path))
    with tf.io.gfile.GFile(f"{path}.new", "wb") as file:
        file.write(content)
    tf.io.gfile.rename(f"{path}.new", path, overwrite=True)


def told(error: tf.errors.OpError) -> str:
    """The first line of what TensorFlow says."""
    return error.message.partition("\n")[0]
