"""Pieces of a page that show evidence (:mod:`parity.evidence`): heat maps, profiles, scatter plots, histograms, overlays.

Maps are PNG files inside the page, which the browser enlarges; lines and points are SVG that takes its colours from the page. All text is
the page's own, so everything can be read on a light and on a dark ground.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from parity.evidence import Evidence, Overlay

WIDTH, HEIGHT = 230, 150
"""Of a plot, px."""

SHOWN_PX = 300
"""Longer side of a map on the page."""

DECADES = 4
"""What is smaller than the largest error by more than this is black."""

BARS = 128

MARK, HALO, HALO_PX = (230, 30, 110), (255, 190, 60), 4
"""Colours of pixels where two results differ and of what surrounds them, so that a single one is seen; how far that goes."""


def figure_of(evidence: Evidence) -> Iterator[str]:
    """Everything there is to see of one tensor."""
    yield "<div class=figures>"
    if evidence.error.size:
        yield from _maps(evidence)
    yield _plot("actual against expected", _scatter(evidence), "the line: equal")
    yield _plot("values", _values(evidence), "grey: expected; line: actual; height: log of the count")
    if evidence.difference_counts.any():
        yield _plot(
            "|actual − expected|", _differences(evidence), f"height: log of the count; {evidence.equal:.1%} are equal to the last bit"
        )
    if evidence.profile.size:
        yield _plot(f"difference by {evidence.profile_axis}", _bars(evidence.profile), "root mean square; 0 at the bottom")
    yield "</div>"


def _maps(evidence: Evidence) -> Iterator[str]:
    low, high = (float(function([function(evidence.expected), function(evidence.actual)])) for function in (np.min, np.max))
    where = f" at {evidence.place}" if evidence.place else ""
    axes = " × ".join(axis for axis in evidence.axes if axis)
    for name, values in (("expected (PyTorch)", evidence.expected), ("actual (TensorFlow)", evidence.actual)):
        scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
        pixels = np.round(255 * scaled).astype(np.uint8) if values.ndim == 3 else _coloured(scaled, "viridis")
        scale = "" if values.ndim == 3 else _scale("viridis", f"{low:.3g}", f"{high:.3g}")
        yield _map(f"{name}{where}", pixels, scale or f"<small>{escape(axes)}</small>")
    largest = float(evidence.error.max())
    with np.errstate(divide="ignore"):
        scaled = 1 + np.log10(evidence.error / largest) / DECADES if largest else np.zeros_like(evidence.error)
    scale = _scale("inferno", f"≤ {largest / 10**DECADES:.0e}", f"{largest:.3g}")
    yield _map(f"largest |actual − expected|, {axes}", _coloured(np.clip(scaled, 0, 1), "inferno"), scale)


def _map(caption: str, pixels: np.ndarray, scale: str) -> str:
    height, width = pixels.shape[:2]
    factor = min(max(SHOWN_PX // max(height, width), 1), 40)
    wide, tall = max(width * factor, 24), max(height * factor, 12)
    image = f'<img class=map alt="{escape(caption)}" src="{data_url(pixels)}" width={wide} height={tall}>'
    return f"<figure>{image}{scale}<figcaption>{escape(caption)}</figcaption></figure>"


def _coloured(values: np.ndarray, colours: str) -> np.ndarray:
    """uint8 [rows, columns, 3] of values 0 … 1."""
    import matplotlib

    return (matplotlib.colormaps[colours](values)[..., :3] * 255).round().astype(np.uint8)


def _scale(colours: str, low: str, high: str) -> str:
    """A bar of the colours, and what its ends stand for."""
    import matplotlib

    stops = ",".join(matplotlib.colors.to_hex(matplotlib.colormaps[colours](step / 8)) for step in range(9))
    return f"<div class=scale><span>{low}</span><i style='background:linear-gradient(90deg,{stops})'></i><span>{high}</span></div>"


def data_url(pixels: np.ndarray, kind: str = "png") -> str:
    """An image inside the page: "png", or "jpeg" for photographs."""
    from PIL import Image

    file = io.BytesIO()
    options = {"optimize": True} if kind == "png" else {"quality": 88, "subsampling": 0}
    Image.fromarray(pixels).save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _plot(heading: str, inner: str, caption: str) -> str:
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width={WIDTH} height={HEIGHT} role=img aria-label="{escape(heading)}">{inner}</svg>'
    return f"<figure><b>{escape(heading)}</b>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


_BOTTOM = HEIGHT - 16


def _ends(low: str, high: str) -> str:
    """What the ends of the horizontal axis stand for."""
    texts = f"<text x=2 y={HEIGHT - 3}>{escape(low)}</text><text x={WIDTH - 2} y={HEIGHT - 3} text-anchor=end>{escape(high)}</text>"
    return f"<line class=axis x1=0 y1={_BOTTOM} x2={WIDTH} y2={_BOTTOM} />{texts}"


def _scatter(evidence: Evidence) -> str:
    low, high = float(evidence.edges[0]), float(evidence.edges[-1])
    scaled = (evidence.points - low) / (high - low) * (_BOTTOM - 8)
    left = (WIDTH - _BOTTOM) / 2
    dots = "".join(f"<circle cx={left + 4 + x:.1f} cy={_BOTTOM - 4 - y:.1f} r=1.6 />" for x, y in scaled.tolist())
    return f"<line class=axis x1={left:.0f} y1={_BOTTOM} x2={left + _BOTTOM:.0f} y2=0 />{dots}{_ends(f'{low:.3g}', f'{high:.3g}')}"


def _values(evidence: Evidence) -> str:
    expected, actual = np.log1p(evidence.counts) / max(float(np.log1p(evidence.counts.max(initial=0))), 1e-9) * (_BOTTOM - 4)
    step = WIDTH / len(expected)
    bars = _rectangles(expected, "old")
    line = " ".join(f"{place * step:.1f},{_BOTTOM - height:.1f}" for edge, height in enumerate(actual) for place in (edge, edge + 1))
    return f"{bars}<polyline points='{line}' />{_ends(f'{evidence.edges[0]:.3g}', f'{evidence.edges[-1]:.3g}')}"


def _differences(evidence: Evidence) -> str:
    heights = np.log1p(evidence.difference_counts) / np.log1p(evidence.difference_counts.max()) * (_BOTTOM - 4)
    low, high = (10.0 ** float(evidence.difference_edges[end]) for end in (0, -1))
    return _rectangles(heights, "new") + _ends(f"{low:.1e}", f"{high:.1e}")


def _bars(values: np.ndarray) -> str:
    starts = np.linspace(0, len(values), min(len(values), BARS) + 1).astype(int)[:-1]
    pooled = np.maximum.reduceat(values, starts)
    heights = pooled / max(float(pooled.max()), 1e-300) * (_BOTTOM - 4)
    return _rectangles(heights, "new") + _ends("0", f"{len(values) - 1}")


def _rectangles(heights: np.ndarray, kind: str) -> str:
    step = WIDTH / len(heights)
    return "".join(
        f"<rect class={kind} x={place * step:.1f} y={_BOTTOM - height:.1f} width={step * 0.92:.1f} height={height:.1f} />"
        for place, height in enumerate(heights.tolist())
        if height > 0 and math.isfinite(height)
    )


def results_of(overlays: Sequence[Overlay]) -> Iterator[str]:
    """Both models' results beside each other, and where they differ."""
    from tfmaskformer.visualize import panoptic_overlay

    for overlay in overlays:
        factor = max(1, 340 // overlay.image.shape[1])
        image, expected, actual, differing = (
            values.repeat(factor, 0).repeat(factor, 1) for values in (overlay.image, overlay.expected, overlay.actual, overlay.differing)
        )
        ids = (expected, overlay.expected_classes), (actual, overlay.actual_classes)
        if overlay.name.endswith("sem_seg"):  # class 0 is a class, id 0 is none
            ids = (
                (expected + 1, {index + 1: label for index, label in overlay.expected_classes.items()}),
                (
                    actual + 1,
                    {index + 1: label for index, label in overlay.actual_classes.items()},
                ),
            )
        marked = np.repeat((image.mean(-1, keepdims=True) * 0.45 + 70).astype(np.uint8), 3, -1)
        marked[_widened(differing)] = HALO
        marked[differing] = MARK
        words = f"{overlay.share:.3%} of the pixels differ" if overlay.share else "no pixel differs"
        yield "<div class='figures results'>"
        for caption, (side, classes) in zip(("PyTorch", "TensorFlow"), ids, strict=True):
            segments = [{"id": index, "category_id": label} for index, label in classes.items() if (side == index).any()]
            yield _photograph(f"{overlay.name}: {caption}", panoptic_overlay(image, side, segments, overlay.config))
        yield _photograph(f"{overlay.name}: {words}", marked, "jpeg" if not overlay.share else "png")
        yield "</div>"


def _widened(mask: np.ndarray) -> np.ndarray:
    """Bool [height, width]: what is within :data:`HALO_PX` of ``mask`` along both axes."""
    for axis in (0, 1):
        length = mask.shape[axis]
        padded = np.pad(mask, [(HALO_PX, HALO_PX) if each == axis else (0, 0) for each in (0, 1)])
        shifts = range(2 * HALO_PX + 1)
        mask = np.any([padded.take(range(shift, shift + length), axis) for shift in shifts], axis=0)
    return mask


def _photograph(caption: str, pixels: np.ndarray, kind: str = "jpeg") -> str:
    return f'<figure><img alt="{escape(caption)}" src="{data_url(pixels, kind)}"><figcaption>{escape(caption)}</figcaption></figure>'
