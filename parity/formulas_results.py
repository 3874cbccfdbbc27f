"""Formulas of what is computed of the network's outputs and before its inputs: costs, losses, results, canvas, clipping, optimizer step.

As in :mod:`parity.formulas`: NumPy, float64, the official definition with what ports get wrong as choices.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from parity.formulas import Choice, softmax
from parity.formulas_model import resized


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * values))


def softplus(values: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(0, values)


# Canvas

CANVAS_CHOICES = (
    Choice("order", ("RGB", "BGR", "GBR", "BRG", "RBG", "GRB"), "BGR", "channels"),
    Choice("scale", (1.0, 1 / 255, 255.0), "scale", "pixels times"),
    Choice("side", ("right and bottom", "left and top", "both sides", "right and top", "left and bottom"), "padding side", "padded at"),
    Choice("fill", ("zeros behind normalising", "zeros before normalising", "the border repeated", "ones"), "padding", "padded with"),
    Choice(
        "normalised",
        (
            "minus mean, by deviation",
            "by deviation, minus mean",
            "minus mean",
            "by deviation",
            "not at all",
            "to 0 … 1, then minus mean, by deviation",
            "minus mean and deviation exchanged",
            "by the variance",
            "to −1 … 1",
        ),
        "normaliser",
        "normalised",
    ),
    Choice("constants", ("as they are", "reversed", "mean reversed", "deviation reversed"), "BGR", "mean and deviation"),
    Choice("middle", ("of the config", "of ImageNet, (123.675, 116.28, 103.53)", "(127.5, 127.5, 127.5)"), "normaliser", "mean"),
    Choice("deviation", ("of the config", "of ImageNet, (58.395, 57.12, 57.375)", "1"), "scale", "deviation"),
    Choice("rounded", ("float32", "float64", "whole numbers"), "dtype rounding", "mean and deviation as"),
    Choice("moved", ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1), (1, 1)), "shift", "image moved by (rows, columns)"),
    Choice("flipped", ("no", "left and right", "up and down", "transposed"), "axis flip", "image flipped"),
)


def canvas(
    images: Sequence[np.ndarray],
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    order: str = "RGB",
    side: str = "right and bottom",
    fill: str = "zeros behind normalising",
    normalised: str = "minus mean, by deviation",
    constants: str = "as they are",
    rounded: str = "float32",
    scale: float = 1.0,
    moved: tuple[int, int] = (0, 0),
    flipped: str = "no",
    **others: str,
) -> np.ndarray:
    """The network's input ``[images, height, width, 3]`` of uint8 RGB images."""
    if others.get("middle", "").startswith("of ImageNet"):
        mean = (123.675, 116.28, 103.53)
    elif others.get("middle", "").startswith("(127"):
        mean = (127.5, 127.5, 127.5)
    if others.get("deviation", "").startswith("of ImageNet"):
        std = (58.395, 57.12, 57.375)
    elif others.get("deviation") == "1":
        std = (1.0, 1.0, 1.0)
    dtype = np.float64 if rounded == "float64" else np.float32
    middle, spread = (
        np.rint(values) if rounded == "whole numbers" else np.asarray(values, dtype).astype(np.float64) for values in (mean, std)
    )
    if constants in ("reversed", "mean reversed"):
        middle = middle[::-1]
    if constants in ("reversed", "deviation reversed"):
        spread = spread[::-1]

    def normal(pixels: np.ndarray) -> np.ndarray:
        return {
            "by deviation, minus mean": pixels / spread - middle,
            "minus mean": pixels - middle,
            "by deviation": pixels / spread,
            "not at all": pixels,
            "to 0 … 1, then minus mean, by deviation": (pixels / 255 - middle) / spread,
            "minus mean and deviation exchanged": (pixels - spread) / middle,
            "by the variance": (pixels - middle) / spread**2,
            "to −1 … 1": pixels / 127.5 - 1,
        }.get(normalised, (pixels - middle) / spread)

    batch = np.zeros((len(images), *size, 3))
    for index, image in enumerate(images):
        pixels = image[..., ["RGB".index(letter) for letter in order]].astype(np.float64) * scale
        pixels = {"left and right": pixels[:, ::-1], "up and down": pixels[::-1], "transposed": pixels.swapaxes(0, 1)}.get(flipped, pixels)
        margins = []
        for axis, near in enumerate(("top", "left")):
            total = size[axis] - pixels.shape[axis]
            before = total // 2 if side == "both sides" else total if near in side else 0
            margins.append((before, total - before))
        margin = [*margins, (0, 0)]
        if fill == "zeros before normalising":
            batch[index] = normal(np.pad(pixels, margin))
        else:
            batch[index] = np.pad(
                normal(pixels),
                margin,
                **({"mode": "edge"} if fill == "the border repeated" else {"constant_values": float(fill == "ones")}),
            )
        batch[index] = np.roll(batch[index], moved, (0, 1))
    return batch


# Costs

_LAYERS = (
    Choice("layer", (0, 1, -1, 2, -2), "layer order", "decoder layer off by"),
    Choice("layers", ("as they are", "auxiliary ones backwards", "all backwards"), "layer order", "decoder layers"),
)
_FOCAL = (
    Choice("alpha", (0.25, 0.5, 0.75, 1.0, None), "scale", "focal α"),
    Choice("gamma", (2.0, 1.0, 0.0, 1.5, 3.0), "exponent", "focal γ"),
)
_RESIZED = (
    Choice(
        "rule",
        ("nearest", "half-pixel nearest", "doubled", "bilinear"),
        "half-pixel",
        "target masks resized",
        causes={"bilinear": "interpolation"},
    ),
    Choice("aligned", ("no", "bilinear, aligned corners", "nearest, aligned corners"), "align_corners", "target masks resized"),
)

CLASS_COST_CHOICES = (
    Choice(
        "probability",
        ("softmax", "sigmoid", "log softmax", "logits", "softmax without no object"),
        "normaliser",
        "probability",
        causes={"log softmax": "extra term", "logits": "missing term"},
    ),
    Choice("first", ("first class", "no object first", "last class first"), "class order", "classes counted from"),
    Choice("sign", (-1.0, 1.0), "scale", "sign"),
    Choice("offset", (0.0, 1.0), "bias", "added"),
    *_LAYERS,
)
MASK_COST_CHOICES = (
    *_FOCAL,
    Choice(
        "normaliser", ("pixels", "none", "pixels of the target", "both classes' pixels apart", "pixels + 1"), "normaliser", "divided by"
    ),
    *_RESIZED,
    Choice("background", ("counted", "left out"), "missing term", "pixels outside of the mask"),
    Choice("turned", ("no", "inside and outside exchanged"), "mask polarity", "target masks"),
    *_LAYERS,
)
DICE_COST_CHOICES = (
    Choice("smoothing", (1.0, 0.0, 1e-5, 1e-6, 1e-3, 1e-7, 1e-8, 1e-4, 2.0), "eps", "smoothing"),
    Choice("upper", (None, 1.0, 0.0), "eps", "smoothing of the numerator alone"),
    Choice("denominator", ("sums", "sums of squares", "union"), "normaliser", "denominator"),
    Choice("factor", (2.0, 1.0), "scale", "factor of the intersection"),
    *_RESIZED,
    Choice("probability", ("sigmoid", "logits", "hard"), "missing term", "probability"),
    Choice("turned", ("no", "inside and outside exchanged"), "mask polarity", "target masks"),
    *_LAYERS,
)


def class_cost(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    probability: str = "softmax",
    first: str = "first class",
    sign: float = -1.0,
    offset: float = 0.0,
) -> np.ndarray:
    """``[queries, objects]`` of logits ``[queries, classes + 1]``."""
    values = {
        "sigmoid": sigmoid(logits),
        "logits": logits,
        "log softmax": np.log(softmax(logits)),
        "softmax without no object": np.pad(softmax(logits[:, :-1]), ((0, 0), (0, 1))),
    }.get(probability, softmax(logits))
    index = labels + {"no object first": 1, "last class first": -1}.get(first, 0)
    return sign * values[:, index] + offset


def _targets(masks: np.ndarray, size: tuple[int, int], rule: str, aligned: str, turned: str) -> np.ndarray:
    small = resized(masks.astype(np.float64)[..., None], size, rule if aligned == "no" else aligned)[..., 0]
    return 1 - small if turned != "no" else small


def focal_terms(logits: np.ndarray, alpha: float | None, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Focal loss of each element if it is inside, and if it is outside."""
    inside = sigmoid(-logits) ** gamma * softplus(-logits)
    outside = sigmoid(logits) ** gamma * softplus(logits)
    return (inside, outside) if alpha is None else (alpha * inside, (1 - alpha) * outside)


def mask_cost(
    logits: np.ndarray,
    masks: np.ndarray,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    normaliser: str = "pixels",
    rule: str = "nearest",
    aligned: str = "no",
    background: str = "counted",
    turned: str = "no",
) -> np.ndarray:
    """``[queries, objects]`` of mask logits ``[queries, height, width]`` and masks ``[objects, canvas height, canvas width]``."""
    targets = _targets(masks, logits.shape[1:], rule, aligned, turned).reshape(len(masks), -1)
    inside, outside = focal_terms(logits.reshape(len(logits), -1), alpha, gamma)
    if background == "left out":
        outside = outside * 0
    count = targets.sum(1)
    if normaliser == "both classes' pixels apart":
        return inside @ targets.T / np.maximum(count, 1) + outside @ (1 - targets).T / np.maximum(targets.shape[1] - count, 1)
    over = {"none": 1.0, "pixels of the target": np.maximum(count, 1), "pixels + 1": targets.shape[1] + 1}.get(normaliser, targets.shape[1])
    return (inside @ targets.T + outside @ (1 - targets).T) / over


def dice_cost(
    logits: np.ndarray,
    masks: np.ndarray,
    *,
    smoothing: float = 1.0,
    upper: float | None = None,
    denominator: str = "sums",
    factor: float = 2.0,
    rule: str = "nearest",
    aligned: str = "no",
    probability: str = "sigmoid",
    turned: str = "no",
) -> np.ndarray:
    """As of :func:`mask_cost`."""
    targets = _targets(masks, logits.shape[1:], rule, aligned, turned).reshape(len(masks), -1)
    flat = logits.reshape(len(logits), -1)
    values = {"logits": flat, "hard": (flat > 0).astype(np.float64)}.get(probability, sigmoid(flat))
    both = values @ targets.T
    power = 2 if denominator == "sums of squares" else 1
    size = (values**power).sum(1)[:, None] + (targets**power).sum(1)[None]
    if denominator == "union":
        size = size - both
    return 1 - (factor * both + (smoothing if upper is None else upper)) / (size + smoothing)


# Losses

_NORMALISER = Choice(
    "normaliser",
    (
        "objects, at least 1",
        "objects + 1",
        "objects + 1e-6",
        "images",
        "1",
        "queries",
        "objects of each image",
        "twice the objects",
        "half the objects",
    ),
    "normaliser",
    "divided by",
)
_BACK_UP = (
    Choice(
        "rule",
        ("bilinear", "bilinear, no half pixels", "nearest", "half-pixel nearest", "target down to the logits"),
        "interpolation",
        "logits resized",
        causes={"bilinear, no half pixels": "half-pixel", "target down to the logits": "layer order"},
    ),
    Choice("aligned", ("no", "bilinear, aligned corners"), "align_corners", "corners aligned"),
)
_PAIRS = (
    Choice("padded", ("left out", "on the first query", "on the last query"), "mask missing", "objects without a query, and padding,"),
    Choice("turned", ("no", "inside and outside exchanged"), "mask polarity", "target masks"),
)
CLASS_LOSS_CHOICES = (
    Choice("no_object", (None, 1.0, 0.0, 0.01, 0.05, 0.4, 0.5), "scale", "weight of no object"),
    Choice(
        "reduction",
        ("weighted mean", "mean", "sum over objects", "sum", "mean of matched", "weighted mean of each image", "unweighted over weighted"),
        "normaliser",
        "reduction",
    ),
    Choice("first", ("first class", "no object first"), "class order", "classes counted from"),
    Choice("nothing", ("the last class", "class 0"), "class order", "no object is"),
    Choice("smoothed", (0.0, 0.1, 0.05, 0.2), "scale", "label smoothing"),
    Choice("rounded", ("float32", "float64"), "dtype rounding", "weight of no object as"),
    Choice("activation", ("softmax", "sigmoid"), "missing term", "activation"),
    *_LAYERS,
)
MASK_LOSS_CHOICES = (
    *_FOCAL,
    _NORMALISER,
    Choice("pixels", ("mean", "sum"), "normaliser", "over the pixels"),
    *_BACK_UP,
    *_PAIRS,
    *_LAYERS,
)
DICE_LOSS_CHOICES = (
    Choice("smoothing", (1.0, 0.0, 1e-5, 1e-6, 1e-3, 1e-7, 1e-8, 1e-4, 2.0), "eps", "smoothing"),
    Choice("upper", (None, 1.0, 0.0), "eps", "smoothing of the numerator alone"),
    Choice("denominator", ("sums", "sums of squares", "union"), "normaliser", "denominator"),
    Choice("factor", (2.0, 1.0), "scale", "factor of the intersection"),
    _NORMALISER,
    *_BACK_UP,
    *_PAIRS,
    *_LAYERS,
)


def class_loss(
    logits: np.ndarray,
    labels: Sequence[np.ndarray],
    assignments: Sequence[np.ndarray],
    *,
    no_object: float | None = None,
    official_weight: float = 0.1,
    reduction: str = "weighted mean",
    first: str = "first class",
    nothing: str = "the last class",
    smoothed: float = 0.0,
    rounded: str = "float32",
    activation: str = "softmax",
) -> float:
    """Of logits ``[batch, queries, classes + 1]``, and for each image its labels and the query of each object (−1: none)."""
    classes = logits.shape[-1]
    empty = 0 if first == "no object first" or nothing == "class 0" else classes - 1
    answers = np.full(logits.shape[:2], empty)
    for index, (own, queries) in enumerate(zip(labels, assignments, strict=True)):
        matched = queries >= 0
        answers[index, queries[matched]] = own[matched] + (first == "no object first")
    weight = official_weight if no_object is None else no_object
    weights = np.where(answers == empty, float(np.float32(weight)) if rounded == "float32" else weight, 1.0)
    if activation == "sigmoid":
        onehot = np.eye(classes)[answers]
        terms = np.where(onehot > 0, softplus(-logits), softplus(logits)).sum(-1)
    else:
        highest = logits.max(-1, keepdims=True)
        logs = logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
        picked = np.take_along_axis(logs, answers[..., None], -1)[..., 0]
        terms = -(1 - smoothed) * picked - smoothed * logs.mean(-1)
    weighted = weights * terms
    objects = max(sum(int((queries >= 0).sum()) for queries in assignments), 1)
    matched = answers != empty
    return float(
        {
            "mean": weighted.mean(),
            "sum over objects": weighted.sum() / objects,
            "sum": weighted.sum(),
            "mean of matched": terms[matched].mean() if matched.any() else 0.0,
            "weighted mean of each image": (weighted.sum(1) / weights.sum(1)).mean(),
            "unweighted over weighted": terms.sum() / weights.sum(),
        }.get(reduction, weighted.sum() / weights.sum())
    )


def _pairs(
    masks: np.ndarray,
    targets: Sequence[np.ndarray],
    assignments: Sequence[np.ndarray],
    *,
    rule: str = "bilinear",
    aligned: str = "no",
    padded: str = "left out",
    turned: str = "no",
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Flat logits and target of each matched pair, image by image; ``padded``: what becomes of those that have no query."""
    found, most = [], max(map(len, targets), default=0)
    for logits, own, queries in zip(masks, targets, assignments, strict=True):
        if padded != "left out":
            missing = most - len(own)
            own, queries = np.pad(own, [(0, missing), (0, 0), (0, 0)]), np.pad(queries, (0, missing), constant_values=-1)
            queries = np.where(queries < 0, 0 if padded == "on the first query" else len(logits) - 1, queries)
        matched = queries >= 0
        picked, wanted = logits[queries[matched]], own[matched].astype(np.float64)
        if rule == "target down to the logits":
            wanted = resized(wanted[..., None], picked.shape[1:], "nearest")[..., 0]
        else:
            picked = resized(picked[..., None], wanted.shape[1:], rule if aligned == "no" else aligned)[..., 0]
        wanted = 1 - wanted if turned != "no" else wanted
        found.append((picked.reshape(len(picked), math.prod(picked.shape[1:])), wanted.reshape(len(wanted), math.prod(wanted.shape[1:]))))
    return found


def _over(values: list[np.ndarray], normaliser: str, queries: int, objects: int) -> float:
    """The sum over all pairs, normalised; ``values``: of each image."""
    total = float(sum(each.sum() for each in values))
    if normaliser == "objects of each image":
        return float(np.mean([each.sum() / max(len(each), 1) for each in values]))
    over = {
        "objects + 1": objects + 1,
        "objects + 1e-6": objects + 1e-6,
        "images": len(values),
        "1": 1,
        "queries": queries * len(values),
        "twice the objects": 2 * max(objects, 1),
        "half the objects": max(objects, 1) / 2,
    }
    return total / over.get(normaliser, max(objects, 1))


def mask_loss(
    masks: np.ndarray,
    targets: Sequence[np.ndarray],
    assignments: Sequence[np.ndarray],
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    normaliser: str = "objects, at least 1",
    pixels: str = "mean",
    **pairs: Any,
) -> float:
    """Of mask logits ``[batch, queries, height, width]``, each image's target masks on the canvas, and the query of each object."""
    values = []
    for logits, wanted in _pairs(masks, targets, assignments, **pairs):
        inside, outside = focal_terms(logits, alpha, gamma)
        terms = wanted * inside + (1 - wanted) * outside
        values.append(terms.mean(1) if pixels == "mean" else terms.sum(1))
    return _over(values, normaliser, masks.shape[1], sum(map(len, targets)))


def dice_loss(
    masks: np.ndarray,
    targets: Sequence[np.ndarray],
    assignments: Sequence[np.ndarray],
    *,
    smoothing: float = 1.0,
    upper: float | None = None,
    denominator: str = "sums",
    factor: float = 2.0,
    normaliser: str = "objects, at least 1",
    **pairs: Any,
) -> float:
    """As of :func:`mask_loss`."""
    values = []
    for logits, wanted in _pairs(masks, targets, assignments, **pairs):
        probability = sigmoid(logits)
        power = 2 if denominator == "sums of squares" else 1
        both = (probability * wanted).sum(1)
        size = (probability**power).sum(1) + (wanted**power).sum(1) - (both if denominator == "union" else 0)
        values.append(1 - (factor * both + (smoothing if upper is None else upper)) / (size + smoothing))
    return _over(values, normaliser, masks.shape[1], sum(map(len, targets)))


PIXEL_LOSS_CHOICES = (
    Choice("reduction", ("mean of labelled pixels", "mean of all pixels", "sum", "mean of the means of images"), "normaliser", "reduction"),
    Choice("ignored", ("left out", "class 0", "the last class"), "mask missing", "pixels without a label"),
    Choice("first", (0, 1, -1), "class order", "added to labels"),
    *_BACK_UP,
    Choice("flipped", ("no", "last class first"), "class order", "classes"),
    *_LAYERS,
)


def pixel_loss(
    logits: np.ndarray,
    labels: Sequence[np.ndarray],
    ignore: int,
    canvas: tuple[int, int],
    *,
    reduction: str = "mean of labelled pixels",
    ignored: str = "left out",
    first: int = 0,
    rule: str = "bilinear",
    aligned: str = "no",
    flipped: str = "no",
) -> float:
    """Cross-entropy of the per-pixel baselines: logits ``[batch, classes, height, width]`` at stride 4, labels ``[height, width]``.

    Behind the canvas, which upsampled logits may exceed, there is no label whatever becomes of ``ignore``.
    """
    if flipped != "no":
        logits = logits[:, ::-1]
    size = (4 * logits.shape[2], 4 * logits.shape[3])
    sums, counts = [], []
    for maps, own in zip(logits, labels, strict=True):
        wanted = np.full(size, -1)
        wanted[: canvas[0], : canvas[1]] = {"class 0": 0, "the last class": len(maps) - 1}.get(ignored, -1)
        wanted[: own.shape[0], : own.shape[1]] = np.where(own == ignore, wanted[: own.shape[0], : own.shape[1]], own + first)
        if rule == "target down to the logits":
            wanted = wanted[::4, ::4]
        else:
            maps = _sized(maps, size, rule if aligned == "no" else aligned)
        logs = np.log(softmax(maps, 0))
        shown = (wanted >= 0) & (wanted < len(maps))
        sums.append(-float(np.take_along_axis(logs, np.where(shown, wanted, 0)[None], 0)[0][shown].sum()))
        counts.append(int(shown.sum()))
    pixels = len(logits) * size[0] * size[1]
    return {
        "mean of all pixels": sum(sums) / pixels,
        "sum": sum(sums),
        "mean of the means of images": float(np.mean([part / max(count, 1) for part, count in zip(sums, counts, strict=True)])),
    }.get(reduction, sum(sums) / max(sum(counts), 1))


# Semantic and panoptic results

_CROPPED = (
    Choice("cropped", ("yes", "no", "squeezed into the image"), "padding", "padding cut off before the last resize:"),
    Choice(
        "rule",
        ("bilinear", "bilinear, no half pixels", "nearest", "half-pixel nearest"),
        "interpolation",
        "resized by",
        causes={"bilinear, no half pixels": "half-pixel"},
    ),
    Choice("aligned", ("no", "bilinear, aligned corners"), "align_corners", "corners aligned"),
)
SEMANTIC_CHOICES = (
    Choice(
        "classes",
        ("softmax, last left out", "softmax, first left out", "last left out, softmax", "sigmoid, last left out"),
        "normaliser",
        "class scores",
        causes={"softmax, first left out": "class order"},
    ),
    Choice(
        "scores",
        ("sigmoid", "logits", "hard", "softmax over queries"),
        "missing term",
        "mask scores",
        causes={"hard": "threshold", "softmax over queries": "normaliser"},
    ),
    Choice("before", ("as the config says", "logits to the output", "probabilities to the output"), "layer order", "resized"),
    Choice("canvas", ("the padded image", "the image"), "padding", "resized first to"),
    *_CROPPED,
)
LOGITS_CHOICES = (
    Choice("applied", ("nothing", "softmax before resizing", "softmax behind resizing"), "extra term", "applied to the logits:"),
    Choice("canvas", ("4 times the logits", "the image"), "padding", "resized first to"),
    *_CROPPED,
)
"""Of the per-pixel baselines."""


def _sized(maps: np.ndarray, size: tuple[int, int], rule: str) -> np.ndarray:
    return resized(maps[..., None], size, rule)[..., 0]


def _rule(rule: str = "bilinear", aligned: str = "no", **_: Any) -> str:
    return rule if aligned == "no" else aligned


def upsampled(
    maps: np.ndarray,
    sizes: Mapping[str, tuple[int, int]],
    *,
    to_output: bool = True,
    canvas: str = "",
    cropped: str = "yes",
    **rules: Any,
) -> np.ndarray:
    """``[channels, height, width]`` resized to the canvas, cut to the image and resized to the output; sizes as of :func:`semantic`."""
    rule = _rule(**rules)
    maps = _sized(maps, sizes["image" if canvas == "the image" else "canvas"], rule)
    if cropped == "yes":
        maps = maps[:, : sizes["image"][0], : sizes["image"][1]]
    elif cropped != "no" and not to_output:
        maps = _sized(maps, sizes["image"], rule)
    return _sized(maps, sizes["output"], rule) if to_output else maps


def pixel_logits(maps: np.ndarray, sizes: Mapping[str, tuple[int, int]], *, applied: str = "nothing", **resizing: Any) -> np.ndarray:
    """``[classes, height, width]`` of one image, of a per-pixel baseline; sizes as of :func:`semantic`."""
    maps = softmax(maps, 0) if applied == "softmax before resizing" else maps
    maps = upsampled(maps, sizes, **resizing)
    return softmax(maps, 0) if applied == "softmax behind resizing" else maps


def semantic(
    logits: np.ndarray,
    masks: np.ndarray,
    sizes: Mapping[str, tuple[int, int]],
    after: bool,
    *,
    classes: str = "softmax, last left out",
    scores: str = "sigmoid",
    before: str = "as the config says",
    **resizing: Any,
) -> np.ndarray:
    """``[classes, height, width]`` of one image.

    Args:
        logits: ``[queries, classes + 1]``.
        masks: ``[queries, height, width]``, logits.
        sizes: "canvas", "image" and "output".
        after: whether the config resizes probabilities, not logits, to the output.
    """
    if before != "as the config says":
        after = before.startswith("probabilities")
    maps = upsampled(masks, sizes, to_output=not after, **resizing)
    of_masks = {
        "logits": maps,
        "hard": (maps > 0).astype(np.float64),
        "softmax over queries": softmax(maps, 0),
    }.get(scores, sigmoid(maps))
    of_classes = {
        "softmax, first left out": softmax(logits)[:, 1:],
        "last left out, softmax": softmax(logits[:, :-1]),
        "sigmoid, last left out": sigmoid(logits)[:, :-1],
    }.get(classes, softmax(logits)[:, :-1])
    found = np.einsum("qc,qhw->chw", of_classes, of_masks)
    return _sized(found, sizes["output"], _rule(**resizing)) if after else found


PANOPTIC_CHOICES = (
    Choice("score", (None, 0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95), "threshold", "score threshold"),
    Choice("overlap", (None, 0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95), "threshold", "overlap threshold"),
    Choice("binary", (0.5, 0.4, 0.6, 0.3, 0.7, 0.0), "threshold", "a pixel is in a mask from"),
    Choice("start", (1, 0, 2), "id", "first segment id"),
    Choice("stuff", ("merged", "not merged", "things merged too", "things and stuff exchanged"), "id", "stuff"),
    Choice("counted", ("segments", "queries"), "id", "ids count"),
    Choice("category", (0, 1, -1), "id", "added to category ids"),
    Choice("nothing", ("dropped", "kept"), "threshold", "queries of no object"),
    Choice("compared", ("score times mask", "mask", "mask logits"), "missing term", "a pixel goes to the largest"),
    Choice("share", ("of its own mask", "of the image", "of the largest"), "normaliser", "overlap is the share"),
    Choice("first", ("first class", "no object first"), "class order", "classes counted from"),
    Choice("resized_what", ("logits", "probabilities"), "layer order", "resized"),
    *_CROPPED,
)


def panoptic(
    logits: np.ndarray,
    masks: np.ndarray,
    sizes: Mapping[str, tuple[int, int]],
    thresholds: tuple[float, float],
    things: Collection[int],
    *,
    score: float | None = None,
    overlap: float | None = None,
    binary: float = 0.5,
    start: int = 1,
    stuff: str = "merged",
    counted: str = "segments",
    category: int = 0,
    nothing: str = "dropped",
    compared: str = "score times mask",
    share: str = "of its own mask",
    first: str = "first class",
    resized_what: str = "logits",
    **resizing: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """``[height, width]`` ids and ``[segments, 3]`` (id, category, thing) of one image; arguments as of :func:`semantic`."""
    least, covered = (given if own is None else own for given, own in zip(thresholds, (score, overlap), strict=True))
    probabilities = softmax(logits)
    labels, best = probabilities.argmax(-1), probabilities.max(-1)
    empty = 0 if first == "no object first" else logits.shape[-1] - 1
    kept = np.flatnonzero(((labels != empty) | (nothing == "kept")) & (best > least))
    ids, rows = np.zeros(sizes["output"], np.int64), list[tuple[int, int, int]]()
    if not len(kept):
        return ids, np.zeros((0, 3), np.int64)
    maps = upsampled(masks[kept], sizes, to_output=resized_what == "logits", **resizing)
    inside = sigmoid(maps)
    if resized_what != "logits":
        maps = inside = _sized(inside, sizes["output"], _rule(**resizing))
    competing = {"mask": inside, "mask logits": maps}.get(compared, best[kept][:, None, None] * inside)
    winner = competing.argmax(0)
    merged: dict[int, int] = {}
    for index, query in enumerate(kept):
        label = int(labels[query]) - (first == "no object first")
        own, full = int((winner == index).sum()), int((inside[index] >= binary).sum())
        over = {"of the image": winner.size, "of the largest": max(int((each >= binary).sum()) for each in inside)}.get(share, full)
        if not own or not full or own / over < covered:
            continue
        thing = (label in things) != (stuff == "things and stuff exchanged")
        merges = stuff == "things merged too" or (stuff != "not merged" and not thing)
        if merges and label in merged:
            ids[winner == index] = merged[label]
            continue
        number = (index if counted == "queries" else len(rows)) + start
        rows.append((number, label + category, int(thing)))
        ids[winner == index] = number
        if merges:
            merged[label] = number
    return ids, np.array(rows, np.int64).reshape(-1, 3)


# Clipping and steps

CLIP_CHOICES = (
    Choice("clip", (None, 0.0, 0.1, 1.0, 0.01, 0.001, 0.05, 0.5, 5.0, 10.0), "clip", "largest norm"),
    Choice("eps", (1e-6, 0.0, 1e-8, 1e-12, 1e-3), "clip", "added to the norm"),
    Choice("kind", ("by the norm of all", "by value"), "clip", "clipped"),
)


def clipped(
    gradient: np.ndarray, norm: float, largest: float, *, clip: float | None = None, eps: float = 1e-6, kind: str = "by the norm of all"
) -> np.ndarray:
    """Some of the gradients behind ``torch.nn.utils.clip_grad_norm_``, whose ``norm`` is that of all; ``largest`` 0: as they are."""
    limit = largest if clip is None else clip
    if not limit:
        return gradient
    if kind == "by value":
        return np.clip(gradient, -limit, limit)
    return gradient * min(1.0, limit / (norm + eps))


STEP_CHOICES = (
    Choice("eps", (1e-8, 1e-7, 1e-6, 1e-5, 1e-3, 1e-12, 0.0), "eps", "eps"),
    Choice("placed", ("on the corrected root", "on the root", "under the root", "1e-7 on the root, as Keras"), "eps", "eps"),
    Choice(
        "decayed",
        ("the weight", "the gradient", "not at all", "behind the step", "not times the learning rate", "twice"),
        "weight decay",
        "decay of",
    ),
    Choice("decay", (None, 0.0, 1e-4, 5e-4, 1e-3, 1e-2, 0.05, 0.1), "weight decay", "weight decay"),
    Choice("beta1", (0.9, 0.99, 0.999, 0.95, 0.1, 0.0), "momentum", "β₁"),
    Choice("beta2", (0.999, 0.99, 0.9999, 0.95, 0.98, 0.001), "momentum", "β₂"),
    Choice("corrected", ("both moments", "neither", "the first", "the second"), "missing term", "bias corrected of"),
    Choice("counted", (0, -1, 1), "shift", "step counted off by"),
    Choice("rate", (1.0, 0.1, 10.0, 2.0, 0.5, 0.0, 0.01, 0.001, 100.0), "learning rate", "learning rate times"),
    Choice("sign", (1.0, -1.0), "scale", "step times"),
)


def adamw(
    weight: np.ndarray,
    gradient: np.ndarray,
    moments: tuple[np.ndarray, np.ndarray],
    step: int,
    lr: float,
    weight_decay: float,
    *,
    eps: float = 1e-8,
    placed: str = "on the corrected root",
    decayed: str = "the weight",
    decay: float | None = None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    corrected: str = "both moments",
    counted: int = 0,
    rate: float = 1.0,
    sign: float = 1.0,
) -> dict[str, np.ndarray]:
    """One step of ``torch.optim.AdamW``: "exp_avg", "exp_avg_sq" and "moved", by how much the weight moves; ``step`` counts from 1."""
    weight_decay = weight_decay if decay is None else decay
    lr, count = lr * rate, step + counted
    gradient = gradient + weight_decay * weight if decayed == "the gradient" else gradient
    first = moments[0] * beta1 + (1 - beta1) * gradient
    second = moments[1] * beta2 + (1 - beta2) * gradient**2
    one = 1 - beta1**count if corrected in ("both moments", "the first") else 1.0
    two = 1 - beta2**count if corrected in ("both moments", "the second") else 1.0
    divisor = {
        "on the root": (np.sqrt(second) + eps) / math.sqrt(two),
        "1e-7 on the root, as Keras": (np.sqrt(second) + 1e-7) / math.sqrt(two),
        "under the root": np.sqrt(second / two + eps),
    }.get(placed, np.sqrt(second / two) + eps)
    update = sign * lr / one * first / divisor
    shrink = {"the weight": lr, "twice": 2 * lr, "not times the learning rate": 1.0, "behind the step": lr}.get(decayed, 0.0) * weight_decay
    if decayed == "behind the step":
        moved = (weight - update) * (1 - shrink) - weight
    else:
        moved = -shrink * weight - update
    return {"exp_avg": first, "exp_avg_sq": second, "moved": moved}
