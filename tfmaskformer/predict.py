"""The command ``tfmaskformer predict``: what a checkpoint finds in photographs, as pictures to look at and as data.

Each photograph is read, resized and segmented as in an evaluation (:mod:`tfmaskformer.evaluation.evaluate`), on a canvas with masked
padding, so that photographs of similar sizes, and all frames of a video, share one traced graph.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tfmaskformer.cli import BAD_INPUT, COULD_NOT_RUN, OK, Progress, failed

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.model import MaskFormer


SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of files in a folder that are taken for photographs."""

KINDS = ("panoptic", "semantic")

PICTURES = (".panoptic.png", ".semantic.png", ".ids.png")
"""What is written beside NAME.json; a file so named is a result, and no photograph where a folder is searched for such."""

_TOLD_AS = {".panoptic.png": "segments_info", ".ids.png": "segments_info", ".semantic.png": "classes"}
"""Picture → the key of the JSON that is there where the picture is."""

_MARK = ("Software", "tfmaskformer")
"""Keyword and text of a chunk of PNG files: what has it is a result of this command, and may be replaced."""

CANVAS_PX = 128
"""A canvas is the resized photograph's size rounded up to a multiple of this."""


class PredictError(ValueError):
    """Photographs, names or a folder that cannot be used; the message says which, why and what to do."""


class Prediction(NamedTuple):
    """What was found in a photograph.

    Attributes:
        image: uint8 [height, width, 3] RGB, upright, at the size of the results.
        panoptic: ids int32 [height, width], 0 for none, and ``segments_info``; None for a model without panoptic inference.
        semantic: int32 [height, width], the class of each pixel.

    A kind that was not asked for is None.
    """

    image: np.ndarray
    panoptic: tuple[np.ndarray, list[dict[str, Any]]] | None
    semantic: np.ndarray | None


class Predictor:
    """A model that takes photographs of any size.

    Args:
        model: with its weights.
        max_size: the longer side of results in px, so that memory is bounded: semantic scores take 4 bytes for each class and pixel.
            0: always the photograph's own size.
        kinds: of :data:`KINDS`, what is computed.
    """

    def __init__(self, model: MaskFormer, max_size: int = 0, kinds: Sequence[str] = KINDS):
        import tensorflow as tf

        self._model, self._max_size, self._kinds = model, max_size, kinds

        @functools.cache  # a graph for each canvas: one tf.function for all of them warns of retracing
        def step(*canvas: int) -> Callable[..., Any]:
            traced = tf.function(lambda images, sizes: model(images, sizes, padding="masked"))
            return traced.get_concrete_function(tf.TensorSpec(canvas, tf.uint8), tf.TensorSpec((1, 2), tf.int32))

        self._step = step

    @property
    def config(self) -> MaskFormerConfig:
        """Of the model."""
        return self._model.config

    def __call__(self, photograph: np.ndarray) -> Prediction:
        """``photograph``: uint8 [height, width, 3] RGB."""
        import tensorflow as tf

        from tfmaskformer.data.preprocessing import resize_shortest_edge
        from tfmaskformer.inference import panoptic_inference, semantic_inference

        config = self._model.config
        resized = resize_shortest_edge(photograph, config.test.min_size, config.test.max_size)
        size = resized.shape[:2]
        canvas = np.zeros((1, *(-(-side // CANVAS_PX) * CANVAS_PX for side in size), 3), np.uint8)
        canvas[0, : size[0], : size[1]] = resized
        outputs = self._step(*canvas.shape)(tf.constant(canvas), tf.constant([size], tf.int32))

        image = photograph
        if 0 < self._max_size < max(photograph.shape[:2]):
            image = resize_shortest_edge(photograph, max(photograph.shape[:2]), self._max_size)
        sizes, output_sizes = [size], [image.shape[:2]]
        panoptic = semantic = None
        if "panoptic" in self._kinds and config.test.panoptic_on:
            [(ids, segments_info)] = panoptic_inference(outputs, config, sizes, output_sizes)
            panoptic = np.asarray(ids, np.int32), segments_info
        if "semantic" in self._kinds:
            [scores] = semantic_inference(outputs, config, sizes, output_sizes)
            semantic = tf.argmax(scores, 0, tf.int32).numpy()
        return Prediction(image, panoptic, semantic)


def photographs(arguments: Sequence[str]) -> list[tuple[Path, Path]]:
    """Every photograph that the arguments name, and the name of its results: without its suffix, below the folder it was found in.

    A folder stands for all photographs in it and below it, without results (:data:`PICTURES`) and what is hidden by a leading dot; a
    pattern for what fits it. Numbers in names count as numbers, so that frames of a video keep their order. b.jpg and b.png beside each
    other keep their suffixes.

    Raises:
        PredictError: an argument names none, or two photographs would have one result.
    """
    found: list[tuple[Path, Path]] = []
    for argument in arguments:
        path = Path(argument)
        is_folder = os.path.isdir(argument)  # Path("") would be the current one
        if is_folder:
            inside = [file for file in path.rglob("*") if _is_photograph(file.relative_to(path)) and file.is_file()]
            named = [(file, file.relative_to(path).with_suffix("")) for file in sorted(inside, key=_natural)]
        else:
            files = [path] if path.exists() else sorted(map(Path, glob.glob(argument, recursive=True)), key=_natural)
            named = [(file, Path(file.stem)) for file in files if file.is_file()]
        if not named:
            what = "holds no photographs" if is_folder else "is no file, and no file fits it"
            raise PredictError(f"'{argument}' {what}\n  expected files, folders or patterns of {', '.join(SUFFIXES)}")
        found += named
    claims = Counter(name for _, name in dict.fromkeys(found))
    results: dict[Path, Path] = {}
    for file, name in found:
        name = name.with_name(file.name) if claims[name] > 1 else name
        if results.setdefault(name, file) != file:
            raise PredictError(
                f"'{results[name]}' and '{file}' would both be '{name}'\n  give the folder that holds both, or each its own --out"
            )
    return [(file, name) for name, file in results.items()]


def _check_free(out: Path, todo: Sequence[tuple[Path, Path]]) -> None:
    """Refuses to replace a JSON that is no result, as of labels that lie beside their photographs, and pictures that are none.

    Pictures are results where they are marked, or the JSON beside them tells of them: they were not marked in earlier versions.
    """
    for _, name in todo:
        path = _with_suffix(out / name, ".json")
        found: Any = {}
        with contextlib.suppress(FileNotFoundError):
            try:
                found = json.loads(path.read_bytes())
            except ValueError:
                found = None
            if not (isinstance(found, dict) and {"file", "model"} <= found.keys()):
                raise PredictError(f"'{path}' is there already, and no result of this command\n  choose another --out")
        for suffix in PICTURES:
            path = _with_suffix(out / name, suffix)
            if _TOLD_AS[suffix] not in found and path.exists() and not _is_marked(path):
                raise PredictError(f"'{path}' is there already, and no result of this command\n  choose another --out, or move it away")


def _is_marked(png: Path) -> bool:
    chunk = "tEXt{}\0{}".format(*_MARK).encode()  # Pillow writes it behind the header, of 33 bytes
    with png.open("rb") as file:
        return chunk in file.read(256)


def _is_photograph(path: Path) -> bool:
    """By its name, below the folder that is searched."""
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden and not path.name.endswith(PICTURES)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", os.fspath(path))]


def main(argv: Sequence[str] | None = None) -> int:
    """Segment photographs: overlays with class names, ids and JSON.

    Returns 0; 2 for usage or bad input; 3 where it could not run.
    """
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf

        from tfmaskformer.checkpoint import CheckpointError, load
        from tfmaskformer.evaluation.devices import multiply_in_float32
    except ImportError as error:
        return failed(f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[cpu]'", COULD_NOT_RUN)
    progress = Progress()
    try:
        todo = photographs(arguments.photographs)
        _check_free(Path(arguments.out), todo)
        multiply_in_float32()
        model = load(arguments.ckpt)
        predictor = Predictor(model, arguments.max_size, _kinds(arguments.kind, model))
        out = Path(arguments.out)
        out.mkdir(parents=True, exist_ok=True)
        unread = list(_predict_all(predictor, todo, out, progress))
    except (PredictError, CheckpointError) as error:
        return failed(str(error), BAD_INPUT)
    except OSError as error:
        return failed(f"cannot write '{error.filename or arguments.out}': {error.strerror or error}\n  choose another --out", BAD_INPUT)
    except (MemoryError, tf.errors.ResourceExhaustedError):
        return failed("out of memory\n  take a smaller --max-size", COULD_NOT_RUN)
    except KeyboardInterrupt:
        return failed("interrupted; what is written is whole", COULD_NOT_RUN)
    finally:
        progress.end()
    for message in unread:
        print(f"error: {message}", file=sys.stderr)
    print(f"{len(todo) - len(unread)} of {len(todo)} photographs: {out}")
    return BAD_INPUT if unread else OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfmaskformer predict",
        description="Segments photographs with a converted checkpoint. For each photograph, NAME.panoptic.png and NAME.semantic.png are "
        "overlays to look at, with class names and a legend; NAME.ids.png has the segments' ids (R + 256 G + 65536 B, 0 for none), and "
        "NAME.json tells what they are.",
        epilog="exit codes: 0 all done, 2 usage or bad input (photographs that cannot be read are told at the end), 3 could not run",
    )
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="directory written by 'convert'; may be gs://…")
    parser.add_argument("photographs", nargs="+", metavar="PHOTO", help="files, patterns, and folders, of video frames for example")
    parser.add_argument("--out", default="predictions", metavar="DIR", help="made where it is missing (default: %(default)s)")
    parser.add_argument("--kind", choices=KINDS, help="one kind of overlay only (default: all that the model is for)")
    parser.add_argument(
        "--max-size",
        type=_size,
        default=1600,
        metavar="PX",
        help="longer side of the results; 0: that of the photograph, however much memory it takes (default: %(default)s)",
    )
    return parser


def _size(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no size in px, nor 0")
    return int(text)


def _kinds(asked: str | None, model: MaskFormer) -> tuple[str, ...]:
    if asked == "panoptic" and not model.config.test.panoptic_on:
        raise PredictError(f"{model.config.name} is for semantic segmentation: it has no panoptic result\n  leave --kind out")
    return (asked,) if asked else KINDS


def _predict_all(predictor: Predictor, todo: Sequence[tuple[Path, Path]], out: Path, progress: Callable[[int, int], None]) -> Iterator[str]:
    """Writes all results; yields what is wrong with photographs that cannot be read."""
    from PIL import UnidentifiedImageError

    for done, (file, name) in enumerate(todo):
        progress(done, len(todo))
        try:
            photograph = _read(file.read_bytes())
        except Exception as error:  # Pillow raises many kinds
            reason = "it is of no kind that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            yield f"cannot read '{file}' as an image: {reason}"
            continue
        _write_all(predictor(photograph), predictor.config, file, out / name)
    progress(len(todo), len(todo))


def _read(data: bytes) -> np.ndarray:
    """:func:`~tfmaskformer.data.preprocessing.decode_image`, but for what comes out wrong as Detectron2 reads it: greys of 16 bits, which
    are cut off at 255, and a TIFF's orientation, which Pillow has applied already. Of 16 bits the high byte counts, as for TensorFlow.
    """
    from PIL import Image, ImageOps

    from tfmaskformer.data.preprocessing import decode_image

    with Image.open(io.BytesIO(data)) as image:
        is_16_bit = image.mode.startswith("I;16") or (image.format, image.mode) == ("PNG", "I")  # the latter in Pillow before 11
        if image.mode in ("I", "F") and not is_16_bit:
            raise ValueError("its pixels have 32 bits, and nothing tells which value is white; save it with 8 or 16")
        if not is_16_bit and image.format != "TIFF":
            return decode_image(data)
        image.load()
        upright = ImageOps.exif_transpose(image)
        if is_16_bit:
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return np.asarray(upright.convert("RGB"))


def _write_all(prediction: Prediction, config: Any, file: Path, place: Path) -> None:
    """The JSON goes first and comes last, so that where it is, all is, and of one run."""
    from tfmaskformer.evaluation.results import encode_png
    from tfmaskformer.visualize import panoptic_overlay, semantic_overlay

    place.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", *PICTURES):
        _with_suffix(place, suffix).unlink(missing_ok=True)
    height, width = prediction.image.shape[:2]
    told: dict[str, Any] = {"file": file.name, "height": height, "width": width, "model": config.name}
    names = config.class_names or [f"class {index}" for index in range(config.num_classes)]
    if prediction.panoptic is not None:
        ids, segments = prediction.panoptic
        areas = np.bincount(ids.ravel(), minlength=1)
        told["segments_info"] = [
            {**segment, "category": names[segment["category_id"]], "area": int(areas[segment["id"]]), "bbox": _box(ids == segment["id"])}
            for segment in segments
        ]
        _write(place, ".panoptic.png", _png(panoptic_overlay(prediction.image, ids, segments, config)))
        _write(place, ".ids.png", encode_png(ids, pnginfo=_mark()))
    if prediction.semantic is not None:
        areas = np.bincount(prediction.semantic.ravel(), minlength=config.num_classes)
        present = sorted(np.flatnonzero(areas).tolist(), key=lambda index: -areas[index])
        told["classes"] = [{"category_id": index, "category": names[index], "area": int(areas[index])} for index in present]
        _write(place, ".semantic.png", _png(semantic_overlay(prediction.image, prediction.semantic, config)))
    _write(place, ".json", (json.dumps(told) + "\n").encode())


def _box(mask: np.ndarray) -> list[int]:
    """x, y, width and height in px of the pixels of a mask, as COCO has them."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(picture).save(file, format="PNG", pnginfo=_mark())
        return file.getvalue()


def _mark() -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(*_MARK)
    return info


def _with_suffix(place: Path, suffix: str) -> Path:
    return place.with_name(place.name + suffix)


def _write(place: Path, suffix: str, content: bytes) -> None:
    """A file that is whole, or not there."""
    path = _with_suffix(place, suffix)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
