"""Cases for a trace: photographs at a given size, and made-up targets that are the same on every platform."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from parity.sampling import hashed_numbers

DEFAULT_OBJECTS = 6
_IMAGE = re.compile(r"(?P<path>.+)@(?P<height>[1-9]\d*)x(?P<width>[1-9]\d*)(?::(?P<objects>\d+))?")


class InputError(ValueError):
    """A case that cannot be read; the message says what was expected and the next step."""


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """A photograph, the size in px to which it is resized, and how many objects are made up for it."""

    path: Path
    height: int
    width: int
    objects: int = DEFAULT_OBJECTS

    def read(self) -> np.ndarray:
        """uint8 [height, width, 3] RGB, resized by PIL's bilinear filter (antialiased), as Detectron2 does.

        Raises:
            InputError: no readable image there.
        """
        from PIL import Image

        try:
            with Image.open(self.path) as image:
                resized = image.convert("RGB").resize((self.width, self.height), Image.Resampling.BILINEAR)
        except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, ValueError, struct.error, DecompressionBombError …
            raise InputError(f"cannot read image '{self.path}': {error}") from error
        return np.asarray(resized)


@dataclasses.dataclass(frozen=True)
class CaseSpec:
    """Images that go through the model together, and the case's name."""

    name: str
    images: tuple[ImageSpec, ...]


def parse_case(text: str) -> CaseSpec:
    """Reads ``[NAME=]FILE@HEIGHTxWIDTH[:OBJECTS][,FILE@…]``.

    >>> case = parse_case("odd=photos/cat.png@301x415:3,dog.png@320x448")
    >>> case.name, [(image.height, image.width, image.objects) for image in case.images]
    ('odd', [(301, 415, 3), (320, 448, 6)])
    >>> parse_case("photos/cat.png@301x415").name
    'cat_301x415'

    Raises:
        InputError: the text reads otherwise.
    """
    name, equals, files = text.partition("=")
    if not equals:
        name, files = "", text
    images = []
    for part in files.split(","):
        match = _IMAGE.fullmatch(part)
        if not match:
            raise InputError(f"case '{text}': expected [NAME=]FILE@HEIGHTxWIDTH[:OBJECTS][,FILE@…], for example photo=cat.png@320x448")
        objects = DEFAULT_OBJECTS if match["objects"] is None else int(match["objects"])
        images.append(ImageSpec(Path(match["path"]), int(match["height"]), int(match["width"]), objects))
    return CaseSpec(name or "+".join(f"{image.path.stem}_{image.height}x{image.width}" for image in images), tuple(images))


def make_targets(height: int, width: int, objects: int, num_classes: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and masks of made-up objects: cells around scattered centres, one cell belonging to nobody, and, of two or more
    objects, the last an ellipse that lies over some cells.

    Exact integer arithmetic from hashed numbers, so the same on every platform.

    Args:
        height, width: of the image, px.
        objects: how many, K; 0 or more.
        num_classes: labels are below it.
        key: names the targets; another key, other targets.

    Returns:
        ``labels`` int64 [K] and ``masks`` bool [K, height, width], none of them empty.

    Raises:
        InputError: too many objects for the size.
    """
    numbers = hashed_numbers(f"{key} {height}x{width} {objects}", 4 * (objects + 2)).astype(object)  # Python's integers, which are exact
    labels = np.array([number % num_classes for number in numbers[:objects]], np.int64)
    masks = np.zeros((objects, height, width), bool)
    if objects == 0:
        return labels, masks
    rows, columns = np.ogrid[:height, :width]
    has_ellipse = objects >= 2
    cells = objects - has_ellipse
    centres = [(int(y % height), int(x % width)) for y, x in numbers[objects : objects + 2 * (cells + 1)].reshape(-1, 2)]
    if len(set(centres)) < len(centres):
        raise InputError(f"{objects} objects do not fit into {height}x{width} px; ask for fewer")
    distances = np.stack([(rows - y) ** 2 + (columns - x) ** 2 for y, x in centres])
    nearest = distances.argmin(0)  # the first of equals
    for cell in range(cells):  # the last cell is nobody's
        masks[cell] = nearest == cell
    if has_ellipse:
        semi_y, semi_x = height // 5 + 1, width // 4 + 1
        y, x = (int(number % size) for number, size in zip(numbers[-2:], (height, width), strict=True))
        masks[-1] = (rows - y) ** 2 * semi_x**2 + (columns - x) ** 2 * semi_y**2 <= semi_y**2 * semi_x**2
    return labels, masks


def make_label_map(labels: np.ndarray, masks: np.ndarray, num_classes: int, ignore_value: int, key: str) -> np.ndarray:
    """The class of each pixel, for objects of :func:`make_targets`: later objects lie over earlier ones.

    Of the pixels that are nobody's, the first half in reading order has no label, and the others a class of their own.

    Args:
        labels, masks, key: as there.
        ignore_value: of pixels without a label.

    Returns:
        int32 [height, width].
    """
    background = int(hashed_numbers(f"{key} background", 1)[0] % np.uint64(num_classes))
    label_map = np.full(masks.shape[1:], background, np.int32)
    for label, mask in zip(labels, masks, strict=True):
        label_map[mask] = label
    nobodys = np.flatnonzero(~masks.any(0))
    label_map.flat[nobodys[: len(nobodys) // 2]] = ignore_value
    return label_map
