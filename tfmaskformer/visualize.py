"""Pictures of segmentations, with NumPy and Pillow alone: colour by class, shade by instance, borders, names where they fit, a legend."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tfmaskformer.config import MaskFormerConfig

OPACITY = 0.55
"""Share of a segment's colour in its pixels; the rest is the image in greys, so that the colour can be found in the legend."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_GOLDEN_RATIO = 0.6180339887498949
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


def palette(num_classes: int) -> np.ndarray:
    """One colour a class, uint8 [num_classes, 3] RGB, always the same; neighbouring indices are far apart in hue."""
    colours = [
        colorsys.hsv_to_rgb((0.02 + index * _GOLDEN_RATIO) % 1, (0.85, 0.55, 1.0)[index % 3], (0.95, 0.8, 0.65)[index // 3 % 3])
        for index in range(num_classes)
    ]
    return np.round(np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)


def panoptic_overlay(
    image: np.ndarray,
    panoptic_seg: np.ndarray,
    segments_info: Sequence[Mapping[str, Any]],
    config: MaskFormerConfig,
    colors: np.ndarray | None = None,
) -> np.ndarray:
    """An image under its panoptic segmentation. Pixels without a segment keep their colours.

    Args:
        image: RGB, 0…255 [height, width, 3].
        panoptic_seg: int [height, width], ids of segments, 0 for none; ``segments_info`` describes them: see
            :func:`tfmaskformer.panoptic_inference`.
        config: its ``class_names`` are written; without names it is "class 17".
        colors: uint8 [classes, 3] RGB, default :func:`palette`. Instances of a thing class are shades of its colour.

    Returns:
        uint8 [height + legend, width, 3] RGB: the picture, and below it the colour and name of every class in it, largest first, with the
        number of its instances where there are several. A name stands in a segment only where it fits without covering another.

    Raises:
        ValueError: image and segmentation differ in size, or a category has no colour.
    """
    image, panoptic_seg = np.asarray(image), np.asarray(panoptic_seg)
    if image.shape != (*panoptic_seg.shape, 3) or panoptic_seg.ndim != 2:
        raise ValueError(
            f"visualize: image must be [height, width, 3] and the segmentation [height, width] of the same size; got {image.shape} and "
            f"{panoptic_seg.shape}; give output_sizes to the inference, or resize the image"
        )
    class_colours = palette(config.num_classes) if colors is None else np.asarray(colors)
    categories = [segment["category_id"] for segment in segments_info]
    if categories and not 0 <= min(categories) <= max(categories) < len(class_colours):
        raise ValueError(f"visualize: category ids are {min(categories)} … {max(categories)}, but there are {len(class_colours)} colours")

    picture = np.clip(image, 0, 255).astype(np.float32)
    greys = picture @ _LUMA[:, np.newaxis]
    instances: Counter[int] = Counter()
    labels = []
    for segment in segments_info:
        category = segment["category_id"]
        mask = panoptic_seg == segment["id"]
        colour = _shade(class_colours[category], instances[category])
        picture[mask] = greys[mask] + OPACITY * (colour - greys[mask])
        instances[category] += 1
        labels.append((int(mask.sum()), mask, category))
    size = max(11, round((image.shape[0] * image.shape[1]) ** 0.5 / 45))
    picture[_borders(panoptic_seg, thickness=1 + size // 16)] = 255
    canvas = Image.fromarray(np.round(picture).astype(np.uint8))
    _write_names(canvas, [(mask, _name(config, category)) for _, mask, category in sorted(labels, key=lambda label: label[0])], size)

    areas: Counter[int] = Counter()
    for area, _, category in labels:
        areas[category] += area
    entries = []
    for category, _ in areas.most_common():
        count = f" ({instances[category]})" if instances[category] > 1 else ""
        entries.append((tuple(class_colours[category].tolist()), _name(config, category) + count))
    return np.concatenate([np.asarray(canvas), _legend(entries, canvas.width, size)])


def semantic_overlay(image: np.ndarray, classes: np.ndarray, config: MaskFormerConfig, colors: np.ndarray | None = None) -> np.ndarray:
    """An image under its semantic segmentation.

    Args:
        image, config, colors: see :func:`panoptic_overlay`.
        classes: int [height, width], the class of each pixel (argmax of :func:`tfmaskformer.semantic_inference`'s scores over its first
            axis); anything outside 0 … classes − 1, such as an ignore value, stays without colour.

    Returns:
        As :func:`panoptic_overlay`.
    """
    classes = np.asarray(classes)
    segments = np.where((classes >= 0) & (classes < config.num_classes), classes.astype(np.int64) + 1, 0)
    present = [int(segment) for segment in np.unique(segments) if segment]
    return panoptic_overlay(image, segments, [{"id": segment, "category_id": segment - 1} for segment in present], config, colors)


def side_by_side(images: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Pictures in a row on white, each with its title above.

    Args:
        images: uint8 [height, width, 3] RGB, sizes may differ.
        titles: one for each image; a title wider than its image is written smaller, at 6 px at least.

    Returns:
        uint8 [height, width, 3] RGB.
    """
    if len(images) != len(titles) or not images:
        raise ValueError(f"visualize: {len(images)} images with {len(titles)} titles; give at least one image and a title for each")
    size = max(14, round(max(image.shape[1] for image in images) / 30))
    gap = size // 2
    top = 2 * size
    width = sum(image.shape[1] for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (width, top + max(image.shape[0] for image in images)), _WHITE)
    draw = ImageDraw.Draw(canvas)
    left = 0
    for image, title in zip(images, titles, strict=True):
        font = _font(size)
        while font.getlength(title) > image.shape[1] and font.size > 6:
            font = _font(font.size - 1)
        draw.text((left + image.shape[1] / 2, top / 2), title, _BLACK, font, anchor="mm")
        canvas.paste(Image.fromarray(image), (left, top))
        left += image.shape[1] + gap
    return np.asarray(canvas)


def _name(config: MaskFormerConfig, category: int) -> str:
    return config.class_names[category] if config.class_names else f"class {category}"


def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("visualize: this Pillow was built without FreeType and has no scalable font; install Pillow's own wheel")
    return font


def _shade(colour: np.ndarray, instance: int) -> np.ndarray:
    """The colour of an instance of a class, the first that of the class: hue and brightness vary, less than between classes."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(colour / 255.0))
    step = (0, 1, -1)[instance % 3]
    value = (value, 0.55 * value, value, 0.75 * value)[instance % 4]
    saturation = (saturation, saturation, 0.5 * saturation, 0.75 * saturation)[instance % 4]
    return np.array(colorsys.hsv_to_rgb((hue + 0.025 * step) % 1, saturation, value)) * 255


def _borders(segments: np.ndarray, thickness: int) -> np.ndarray:
    """Bool [height, width]: pixels with another segment within ``thickness`` px to the right or below."""
    borders = np.zeros(segments.shape, bool)
    for offset in range(1, thickness + 1):
        borders[:-offset] |= segments[:-offset] != segments[offset:]
        borders[:, :-offset] |= segments[:, :-offset] != segments[:, offset:]
    return borders


def _write_names(canvas: Image.Image, labels: Sequence[tuple[np.ndarray, str]], size: int) -> None:
    """Writes each name into its segment's largest piece: where three quarters of it lie inside and no other name is, or nowhere."""
    draw = ImageDraw.Draw(canvas)
    taken = np.zeros((canvas.height, canvas.width), bool)
    for mask, name in labels:
        mask = _largest_piece(mask)
        for scale in (1.0, 0.8):
            font = _font(max(size * scale, 10))
            stroke = max(1, round(font.size / 9))
            box = draw.textbbox((0, 0), name, font, stroke_width=stroke)
            width, height = int(box[2] - box[0]) + 1, int(box[3] - box[1]) + 1
            place = _place(mask, taken, width, height)
            if place is not None:
                top, left = place
                taken[top : top + height, left : left + width] = True
                draw.text((left - box[0], top - box[1]), name, _WHITE, font, stroke_width=stroke, stroke_fill=_BLACK)
                break


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    """Of a mask, bool [height, width], the most pixels that hang together by their edges."""
    width = mask.shape[1] + 1
    steps = np.flatnonzero(np.diff(np.pad(mask, ((0, 0), (0, 1))).ravel(), prepend=False))
    starts, ends = steps[::2], steps[1::2]  # of runs along rows, which a column of False keeps apart
    first, last = np.searchsorted(ends, starts + width, "right"), np.searchsorted(starts, ends + width)  # runs that touch it from below
    upper = np.repeat(np.arange(starts.size), last - first)
    lower = np.arange(upper.size) + np.repeat(last - np.cumsum(last - first), last - first)
    pieces = np.arange(starts.size)
    while (pieces[upper] != pieces[lower]).any():
        least = np.minimum(pieces[upper], pieces[lower])
        np.minimum.at(pieces, upper, least)
        np.minimum.at(pieces, lower, least)
        pieces = pieces[pieces]
    largest = np.zeros(mask.shape, bool)
    largest[mask] = np.repeat(pieces == np.bincount(pieces, ends - starts, minlength=1).argmax(), ends - starts)
    return largest


def _place(mask: np.ndarray, taken: np.ndarray, width: int, height: int) -> tuple[int, int] | None:
    """Top and left of a free box within the bounding box of ``mask``, as much inside the mask and as close to its middle as may be."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size or rows[-1] - rows[0] + 1 < height or columns[-1] - columns[0] + 1 < width:
        return None
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside, occupied = (_box_sums(values[window], width, height) for values in (mask, taken))
    y, x = np.nonzero(mask[window])
    tops, lefts = np.ogrid[: inside.shape[0], : inside.shape[1]]
    distance = np.hypot(tops - (y.mean() - height / 2), lefts - (x.mean() - width / 2))
    quality = inside / (width * height) - 0.3 * distance / np.hypot(*mask[window].shape)
    quality[(occupied > 0) | (inside < 0.75 * width * height)] = -np.inf
    top, left = np.unravel_index(quality.argmax(), quality.shape)
    return None if np.isneginf(quality[top, left]) else (int(rows[0] + top), int(columns[0] + left))


def _box_sums(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Number of True in every box of that size that lies inside ``values``, by the box's top left corner."""
    sums = np.pad(values.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]


def _legend(entries: Sequence[tuple[tuple[int, ...], str]], width: int, size: int) -> np.ndarray:
    """Swatches and names in rows on white, uint8 [height, width, 3]."""
    font, line, margin = _font(size), round(1.6 * size), size // 2
    places = []
    left, top = margin, margin
    for _, text in entries:
        needed = int(1.4 * size + font.getlength(text))
        if left > margin and left + needed > width - margin:
            left, top = margin, top + line
        places.append((left, top))
        left += needed + size
    canvas = Image.new("RGB", (width, top + line if entries else 0), _WHITE)
    draw = ImageDraw.Draw(canvas)
    for (left, top), (colour, text) in zip(places, entries, strict=True):
        draw.rectangle((left, top, left + size, top + size), colour, _BLACK)
        draw.text((left + 1.4 * size, top + size / 2), text, _BLACK, font, anchor="lm")
    return np.asarray(canvas)
