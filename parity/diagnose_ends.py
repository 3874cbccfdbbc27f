"""Why reading, resizing and counting differ: sites for the two ends of the pipeline (:mod:`parity.ends`)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from parity import ends
from parity.diagnose_results import ResultSite
from parity.formulas import Choice

if TYPE_CHECKING:
    from parity.trace import Case
    from tfmaskformer.config import MaskFormerConfig

ORDER = Choice("order", ("RGB", "BGR", "GBR", "BRG"), "BGR", "channels")
UPRIGHT = Choice("orientation", ("followed", "ignored"), "axis flip", "the file's orientation is")
SIZES = (
    Choice("rounded", ("to the nearest", "down", "up", "to the nearest even"), "dtype rounding", "sizes are rounded"),
    Choice("limited", ("yes", "no"), "clip", "the longer side is limited:"),
    Choice("side", ("shorter", "longer", "height", "width"), "axis order", "the size given is that of the"),
)
SHRUNK = (
    ORDER,
    SIZES[0],
    Choice(
        "rule",
        (
            "bilinear, rounded after each axis",
            "bilinear, rounded once",
            "bilinear, not antialiased",
            "nearest",
            "bicubic",
            "box",
            "Lanczos",
        ),
        "interpolation",
        "made smaller by",
        causes={"bilinear, rounded once": "dtype rounding"},
    ),
)
PANOPTIC = (
    Choice("void", ("left out of the union", "in the union"), "mask missing", "void is"),
    Choice("crowds", ("excused", "missed like others"), "mask missing", "crowds are"),
    Choice("half", ("no match", "a match"), "threshold", "an IoU of ½ is"),
)
OVER = Choice("over", ("the classes that were met", "all classes"), "normaliser", "mean over")
KEPT = Choice("kept", ("all images", "the last image"), "normaliser", "counts of")
SEMANTIC = (
    Choice("ignored", ("left out", "the last class", "class 0"), "mask missing", "ignored pixels are"),
    Choice("sides", ("prediction by truth", "truth by prediction"), "transpose", "counted"),
)


def site_of(case: Case, config: MaskFormerConfig, group: str, name: str) -> ResultSite | None:
    """The site of a failing item of the group "preprocessing" or "metrics"; None where nothing is known of such items."""
    if group == "preprocessing":
        return _sizes() if name == "resized/shapes" else _pixels(case.images[int(name.split("/")[0])], name)
    image, what, which = name.split("/")
    return (_panoptic if what == "panoptic" else _semantic)(case, config, image, which)


# --- preprocessing


def _pixels(image: np.ndarray, name: str) -> ResultSite | None:
    from tfmaskformer.data import preprocessing

    what = name.partition("/")[2]
    if what == "read/png":
        actual = preprocessing.decode_image(ends.png(image))
        return ResultSite("preprocessing/read", actual, image, lambda order="RGB": _ordered(image, order), [ORDER])
    if what == "read/upright":
        corner = image[: ends.PROBE_PX, : ends.PROBE_PX]
        lying = {orientation: lie(corner) for orientation, lie in ends.UPRIGHT.items()}
        made = [preprocessing.decode_image(ends.png(pixels, orientation)) for orientation, pixels in lying.items()]

        def read(orientation: str = "followed") -> np.ndarray:
            return _flat([corner] * len(lying) if orientation == "followed" else lying.values())

        return ResultSite("preprocessing/read", _flat(made), read(), read, [UPRIGHT])
    if what == "resized/shortest_edge":
        corner, low, expected = ends.shrunk(image)
        actual = preprocessing.resize_shortest_edge(corner, low, 10**6)
        return ResultSite("preprocessing/resized", actual, expected, functools.partial(_shrunk, corner, low, actual), SHRUNK)
    return None


def _flat(images: Iterable[np.ndarray]) -> np.ndarray:
    """All pixels of images of any sizes."""
    return np.concatenate([image.ravel() for image in images])


def _ordered(image: np.ndarray, order: str) -> np.ndarray:
    return image[..., ["RGB".index(letter) for letter in order]]


def _shrunk(
    image: np.ndarray,
    low: int,
    actual: np.ndarray,
    *,
    order: str = "RGB",
    rounded: str = "to the nearest",
    rule: str = "bilinear, rounded after each axis",
) -> np.ndarray:
    """uint8: an image whose shorter side becomes ``low`` px; ``actual``: what was made of it in another way."""
    from PIL import Image

    [size] = _resized_shapes(np.array([[*image.shape[:2], low, 10**6]]), rounded)
    if rule in ("bilinear, rounded once", "bilinear, not antialiased"):
        rows, columns = (_weights(into, out, rule != "bilinear, not antialiased") for into, out in zip(image.shape[:2], size, strict=True))
        exact = np.einsum("yi,ijc,xj->yxc", rows, image.astype(np.float64), columns)
        pixels = np.rint(exact)
        if actual.shape == pixels.shape:  # what lies halfway between two grey levels may become either: float32 is off by 5e-4 there
            pixels = np.where(np.abs(exact - actual) <= 0.5 + 1e-3, actual, pixels)
        return _ordered(pixels.astype(np.uint8), order)
    kind = {"nearest": "NEAREST", "bicubic": "BICUBIC", "box": "BOX", "Lanczos": "LANCZOS"}.get(rule, "BILINEAR")
    height, width = size.tolist()
    return _ordered(np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling[kind])), order)


def _weights(into: int, out: int, antialiased: bool) -> np.ndarray:
    """``[out, into]`` of a bilinear filter with half pixels, Pillow's where it is antialiased."""
    scale = max(into / out, 1.0) if antialiased else 1.0
    places = np.clip((np.arange(out) + 0.5) * into / out, 0.5, into - 0.5)
    table = np.maximum(1 - np.abs((np.arange(into) + 0.5)[np.newaxis] - places[:, np.newaxis]) / scale, 0)
    return table / table.sum(1, keepdims=True)


def _resized_shapes(given: np.ndarray, rounded: str = "to the nearest", limited: str = "yes", side: str = "shorter") -> np.ndarray:
    """int64 ``[images, 2]`` of ``[images, 4]``: height, width, size of the shorter side, limit of the longer one."""
    sides, low, high = given[:, :2], given[:, 2], given[:, 3]
    of = {"longer": sides.max(1), "height": sides[:, 0], "width": sides[:, 1]}.get(side, sides.min(1))
    scale = low / of
    if limited == "yes":
        scale = np.minimum(scale, high / sides.max(1))
    exact = sides * scale[:, np.newaxis]
    whole = {"down": np.floor, "up": np.ceil, "to the nearest even": np.rint}.get(rounded, lambda exact: np.floor(exact + 0.5))(exact)
    return whole.astype(np.int64)


def _sizes() -> ResultSite:
    from tfmaskformer.data import preprocessing

    shapes = np.array(ends.SHAPES)
    actual = np.array([preprocessing.resized_shape(*sizes) for sizes in shapes[:, :4].tolist()])

    return ResultSite("preprocessing/resized", actual, shapes[:, 4:], functools.partial(_resized_shapes, shapes[:, :4]), SIZES)


# --- metrics


def _panoptic(case: Case, config: MaskFormerConfig, image: str, which: str) -> ResultSite | None:
    from tfmaskformer.evaluation.panoptic import PanopticQuality

    ids, classes = ends.panoptic_result(case.reference.read, image)
    pairs = ends.panoptic_pairs(case.targets[int(image)], ids, classes, config.num_classes)
    chosen = list(pairs.values()) if which == "quality" else [pairs[which]] if which in pairs else []
    if not chosen:
        return None
    ours = PanopticQuality(config.num_classes, config.thing_classes)
    for truth, found, labels in chosen:
        ours.update(truth.ids, truth.segments_info, found, [{"id": index, "category_id": label} for index, label in labels.items()])
    is_thing = np.isin(np.arange(config.num_classes), list(config.thing_classes))

    def counts(**choices: str) -> list[np.ndarray]:
        return [_counts(pair, config.num_classes, **choices) for pair in chosen]

    def quality(over: str = OVER.values[0], kept: str = KEPT.values[0], **choices: str) -> np.ndarray:
        found = counts(**choices)
        total = sum(found, np.zeros(1)) if kept == KEPT.values[0] else found[-1]
        if over == OVER.values[0]:
            return np.nan_to_num(ends.panoptic_quality(total, is_thing))  # a group of which no class was met
        return np.array([_mean_of_all(total[members]) for members in (np.ones_like(is_thing), is_thing, ~is_thing)])

    if which == "quality":
        made = np.nan_to_num([group[:3] for group in ours.result().values()])
        return ResultSite("metrics/panoptic", made, quality(), quality, (KEPT, OVER, *PANOPTIC))
    made = ends.table(ours)
    return ResultSite("metrics/panoptic", made, counts()[0], lambda **choices: counts(**choices)[0], PANOPTIC)


def _counts(
    pair: ends.Pair,
    num_classes: int,
    *,
    void: str = PANOPTIC[0].values[0],
    crowds: str = PANOPTIC[1].values[0],
    half: str = PANOPTIC[2].values[0],
) -> np.ndarray:
    """:func:`parity.ends.panoptic_counts`, with choices."""
    truth, ids, classes = pair
    counts = np.zeros((num_classes, 4))
    empty = (truth.ids == ends.VOID) & (void == PANOPTIC[0].values[0])
    excused = truth.crowds if crowds == PANOPTIC[1].values[0] else ()
    for category in {*truth.classes.values(), *classes.values()}:
        wanted = [truth.ids == index for index, label in truth.classes.items() if label == category and index not in excused]
        own = [index for index in excused if truth.classes[index] == category]
        excuse = empty | (truth.ids == own[-1]) if own else empty
        missed = len(wanted)
        for mask in (ids == index for index, label in classes.items() if label == category):
            shares = [np.count_nonzero(mask & true) / np.count_nonzero((mask & ~empty) | true) for true in wanted]
            best = max(shares, default=0.0)
            if best > 0.5 or (best == 0.5 and half == "a match"):
                counts[category] += (best, 1, 0, 0)
                missed -= 1
            elif np.count_nonzero(mask & excuse) <= np.count_nonzero(mask) / 2:
                counts[category, 2] += 1
        counts[category, 3] = missed
    return counts


def _mean_of_all(counts: np.ndarray) -> list[float]:
    """(pq, sq, rq), 0 for a class that was not met."""
    iou, true, surplus, missed = counts.T
    size = true + (surplus + missed) / 2
    with np.errstate(invalid="ignore"):
        return [float(np.nan_to_num(values).mean()) for values in (iou / size, iou / true, true / size)]


def _semantic(case: Case, config: MaskFormerConfig, image: str, which: str) -> ResultSite | None:
    from tfmaskformer.evaluation.semantic import SemanticQuality

    classes, ignore = ends.official_classes(case, image), config.criterion.ignore_value
    if classes is None or which == "own":
        return None
    truths = {"targets": ends.target_sem_seg(case.targets[int(image)], ignore), "shifted": ends.moved(classes, ignore)}
    chosen = list(truths.values()) if which == "quality" else [truths[which]]
    ours = SemanticQuality(config.num_classes, ignore)
    for truth in chosen:
        ours.update(truth, classes)

    def counts(ignored: str = "left out", sides: str = SEMANTIC[1].values[0]) -> np.ndarray:
        total = np.zeros((config.num_classes, config.num_classes + 1), np.int64)
        for truth in chosen:
            nothing = truth == ignore
            filled = np.where(nothing, {"left out": ignore, "class 0": 0}.get(ignored, config.num_classes - 1), truth)
            rows, columns = (
                (classes, filled)
                if sides == SEMANTIC[1].values[0]
                else (np.where(nothing, classes, truth), np.where(nothing, truth, classes))
            )
            total += ends.confusion(columns, rows, config.num_classes, ignore)
        return total

    def quality(over: str = OVER.values[0], **choices: str) -> np.ndarray:
        found = ends.semantic_quality(counts(**choices))
        if over != OVER.values[0]:
            counted = counts(**choices)[:, :-1]
            met = counted.sum(0) > 0
            found[[0, 2]] *= np.count_nonzero(met) / len(met)
        return found

    if which == "quality":
        return ResultSite("metrics/semantic", np.array(ours.result()[:4]), quality(), quality, (OVER, *SEMANTIC))
    return ResultSite("metrics/semantic", ours.confusion, counts(), counts, SEMANTIC)
