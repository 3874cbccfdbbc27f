"""The two ends of the pipeline: from a photograph's file to the network's input, and from the network's results to a metric's figures.

Preprocessing. A trace has the images as they enter the model, and of the photographs their names and the SHA-256 of what they became.
Where a photograph of that name lies beside the trace or in ``checkpoints/photos`` and Pillow makes of it what was recorded, TensorFlow
must make the same of it, bit for bit. The canvas of masked padding, which upstream has not, is compared with its definition, in NumPy.

Metrics. Our counts of the *official* results against the trace's targets are compared with those of the official packages, where the
trace has them (group "metrics"), else with the definitions, in NumPy (:func:`panoptic_counts`, :func:`confusion`). Made-up targets seldom
match anything, so the official result itself, moved by :data:`SHIFT_PX`, is a second ground truth, and :func:`probe` has every rule of
panoptic quality in one small picture. What our counts make of *our* results must be the same again, but for pixels at a near-tie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity import compare

if TYPE_CHECKING:
    from parity.check import Exemption, Item
    from parity.evidence import Evidence
    from parity.tensorflow_run import CaseResults
    from parity.trace import Case
    from tfmaskformer.config import MaskFormerConfig

PHOTOS = Path(__file__).parents[1] / "checkpoints" / "photos"
"""Where photographs are looked for, besides the trace's own folder."""

SHIFT_PX = (2, 3)
"""(down, right): how far the second ground truth is moved. Large segments still match with an IoU below 1, small ones no more."""

VOID = 0

BY_DEFINITION = "against the definition: the trace has no figures of the official packages"


# --- preprocessing


def judge_preprocessing(
    case: Case, described: Sequence[Mapping[str, Any]], folder: Path, results: CaseResults, config: MaskFormerConfig, dtype: str
) -> Iterator[Item | Exemption | Evidence]:
    """Group "preprocessing" of a case, and evidence of what fails; of each image below ``{i}/``:

    ``read/png``, ``read/png_tf``, ``read/upright``: the recorded image as a lossless file, as it is and in all orientations of EXIF;
    ``read/photograph``, ``resized/photograph``: the photograph's own file, up to the recorded image;
    ``resized/shortest_edge``, ``resized/shortest_edge_tf``: the recorded image made smaller, by the official transform of a test;
    ``canvas``: of masked padding, the whole of what the network sees (with official padding that is the tap ``images#0``).
    ``resized/shapes`` are the sizes that Detectron2 computes.

    Args:
        described: the images in the trace's manifest: ``file``, ``size_px``, ``sha256`` of the resized pixels.
        folder: of the trace.
        results: of the case; its tap ``images#0`` is the canvas.
        dtype: what TensorFlow computed in.
    """
    for index, (image, description) in enumerate(zip(case.images, described, strict=True)):
        yield from _judge_reading(f"{index}", image)
        yield from _judge_photograph(f"{index}", image, description, (folder, PHOTOS))
        yield from _judge_shrinking(f"{index}", image)
        if results.view is not None:
            actual = np.asarray(results.groups["taps"]["images#0"])[results.view.image]
            expected = canvas(image, results.view.canvas_px, config)
            yield from _judge_pixels(f"{index}/canvas", partial(np.asarray, actual), expected, compare.tolerance(dtype, 0.0), dtype)
    yield from _judge_shapes()


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: np.rot90,
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}
"""Orientation of EXIF → how an upright image lies in a file that has it."""


def _judge_reading(name: str, image: np.ndarray) -> Iterator[Item | Evidence]:
    import tensorflow as tf

    from tfmaskformer.data import preprocessing

    def by_tensorflow() -> np.ndarray:
        return preprocessing.decode_image_tf(tf.constant(png(image)), tf.constant("png")).numpy()

    def upright() -> np.ndarray:
        return np.concatenate([preprocessing.decode_image(png(lie(corner), orientation)) for orientation, lie in UPRIGHT.items()])

    corner = image[:PROBE_PX, :PROBE_PX]
    yield from _judge_pixels(f"{name}/read/png", lambda: preprocessing.decode_image(png(image)), image)
    yield from _judge_pixels(f"{name}/read/png_tf", by_tensorflow, image)
    yield from _judge_pixels(f"{name}/read/upright", upright, np.concatenate([corner] * len(UPRIGHT)))


def png(image: np.ndarray, orientation: int = 1) -> bytes:
    """A lossless file."""
    from PIL import Image

    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG", exif=exif.tobytes(), compress_level=1)
    return file.getvalue()


def _judge_photograph(
    name: str, image: np.ndarray, description: Mapping[str, Any], folders: Sequence[Path]
) -> Iterator[Item | Exemption | Evidence]:
    from parity.check import Exemption
    from tfmaskformer.data import preprocessing

    file = str(description["file"])
    found = [path for folder in folders if (path := folder / Path(file).name).is_file()]
    reason = f"the photograph '{file}' is not here; its name and hash alone are recorded"
    if found:
        data = found[0].read_bytes()
        decoded, resized = _by_pillow(data, image.shape[:2])
        kind = next((kind for start, kind in _KINDS.items() if data.startswith(start)), None)
        if kind is None:
            reason = f"'{file}' is neither PNG nor JPEG, which TensorFlow reads"
        elif hashlib.sha256(resized.tobytes()).hexdigest() != description["sha256"]:
            reason = f"of '{file}' Pillow makes other pixels here than were recorded: another photograph, or another Pillow"
        else:
            import tensorflow as tf

            def read() -> Any:
                return preprocessing.decode_image_tf(tf.constant(data), tf.constant(kind))

            yield from _judge_pixels(f"{name}/read/photograph", lambda: read().numpy(), decoded)
            size = tf.constant(image.shape[:2])
            yield from _judge_pixels(f"{name}/resized/photograph", lambda: preprocessing.resize_bilinear(read(), size).numpy(), image)
            return
    yield from (Exemption("preprocessing", f"{name}/{step}/photograph", reason) for step in ("read", "resized"))


_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}
"""First bytes of a file → its format."""


def _by_pillow(data: bytes, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 RGB, decoded and resized to (height, width), as :meth:`parity.inputs.ImageSpec.read` does it."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    return np.asarray(image), np.asarray(image.resize((int(size[1]), int(size[0])), Image.Resampling.BILINEAR))


def _judge_shrinking(name: str, image: np.ndarray) -> Iterator[Item | Evidence]:
    import tensorflow as tf

    from tfmaskformer.data import preprocessing

    corner, low, expected = shrunk(image)
    step, high = f"{name}/resized/shortest_edge", 10**6
    yield from _judge_pixels(step, lambda: preprocessing.resize_shortest_edge(corner, low, high), expected)
    yield from _judge_pixels(f"{step}_tf", lambda: preprocessing.resize_shortest_edge_tf(tf.constant(corner), low, high).numpy(), expected)


def shrunk(image: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
    """A part of an image, the size in px that its shorter side shall have, and what Pillow makes of it."""
    from PIL import Image

    corner = image[:PROBE_PX, :PROBE_PX]
    corner = corner[: max(corner.shape[0] * 2 // 3, 1)]  # wider than high
    short, long = sorted(corner.shape[:2])
    sides = range(max(short // 2, 1), short + 1)
    # A size whose longer side has to be rounded up; where there is none, any.
    low = next((side for side in sides if (2 * side * long) % (2 * short) > short), sides[0])
    scaled = (2 * low * long + short) // (2 * short)
    width_first = (scaled, low) if corner.shape[0] <= corner.shape[1] else (low, scaled)
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(corner)).resize(width_first, Image.Resampling.BILINEAR))
    return corner, low, expected


PROBE_PX = 160
"""Height and width of the part of an image that probes take, at most."""

# fmt: off
SHAPES: tuple[tuple[int, int, int, int, int, int], ...] = (
    (427, 640, 800, 1333, 800, 1199), (640, 427, 800, 1333, 1199, 800), (333, 500, 800, 1333, 800, 1201),
    (500, 375, 800, 1333, 1067, 800), (300, 900, 800, 1333, 444, 1333), (900, 301, 800, 1333, 1333, 446),
    (1024, 2048, 800, 1333, 667, 1333), (512, 512, 800, 1333, 800, 800), (17, 400, 800, 1333, 57, 1333),
    (427, 640, 512, 2048, 512, 767), (500, 375, 512, 2048, 683, 512), (17, 400, 512, 2048, 87, 2048),
    (683, 1024, 640, 2560, 640, 960), (101, 75, 640, 2560, 862, 640),
)
# fmt: on
"""(height, width, MIN_SIZE_TEST, MAX_SIZE_TEST, height, width) of Detectron2's ``ResizeShortestEdge.get_output_shape``, recorded at commit
02b5c4e295e990042a714712c21dc79b731e8833."""


def _judge_shapes() -> Iterator[Item]:
    from tfmaskformer.data import preprocessing

    given = [shape[:4] for shape in SHAPES]
    actual = np.array([preprocessing.resized_shape(*sizes) for sizes in given])
    yield _item("preprocessing", "resized/shapes", actual, np.array([shape[4:] for shape in SHAPES]), 0.0)
    sizes = np.array(given, np.int32)
    actual = np.stack([preprocessing.resized_shape_tf(row[:2], row[2], row[3]).numpy() for row in sizes])
    yield _item("preprocessing", "resized/shapes_tf", actual, np.array([shape[4:] for shape in SHAPES]), 0.0)


def _judge_pixels(
    name: str, compute: Callable[[], np.ndarray], expected: np.ndarray, tolerance: float = 0.0, dtype: str = "uint8"
) -> Iterator[Item | Evidence]:
    """What ``compute`` gives, [height, width, 3]; an error of it is a failure too."""
    from parity.check import Item
    from parity.evidence import evidence

    try:
        actual = np.asarray(compute())
    except Exception as error:  # whatever a broken reader raises
        yield Item("preprocessing", name, False, note=f"{type(error).__name__}: {error}")
        return
    item = _item("preprocessing", name, actual, expected, tolerance, dtype)
    yield item
    if not item.passed and actual.shape == expected.shape:
        yield evidence("preprocessing", name, actual, expected)


def canvas(image: np.ndarray, canvas_px: Sequence[int], config: MaskFormerConfig) -> np.ndarray:
    """float64 [height, width, 3]: the image, normalised, in the top left corner, zeros elsewhere (Detectron2 ``ImageList.from_tensors``).

    As upstream, mean and standard deviation are float32 numbers.
    """
    mean, std = (np.asarray(values, np.float32).astype(np.float64) for values in (config.pixel_mean, config.pixel_std))
    padded = np.zeros((*canvas_px, 3))
    padded[: image.shape[0], : image.shape[1]] = (image - mean) / std
    return padded


# --- metrics


@dataclasses.dataclass(frozen=True)
class Truth:
    """A panoptic ground truth of one image.

    Attributes:
        ids: int32 [height, width], :data:`VOID` for none.
        classes: id → class, of the ids that the map has.
        crowds: ids of regions of several objects; as in panopticapi, only the last of a class excuses predictions.
    """

    ids: np.ndarray
    classes: dict[int, int]
    crowds: tuple[int, ...] = ()

    @property
    def segments_info(self) -> list[dict[str, int]]:
        """As panopticapi has it."""
        return [{"id": index, "category_id": label, "iscrowd": int(index in self.crowds)} for index, label in self.classes.items()]


Pair = tuple[Truth, np.ndarray, dict[int, int]]
"""A ground truth, and a result: a map of ids [height, width], and id → class."""


def target_truth(target: Mapping[str, np.ndarray]) -> Truth:
    """Of a trace's target: later objects lie over earlier ones; what is nobody's is void."""
    ids = np.zeros(target["masks"].shape[1:], np.int32)
    for index, mask in enumerate(target["masks"], 1):
        ids[mask] = index
    return Truth(ids, {index: int(label) for index, label in enumerate(target["labels"], 1) if (ids == index).any()})


def target_sem_seg(target: Mapping[str, np.ndarray], ignore_label: int) -> np.ndarray:
    """int32 [height, width]: the class of each pixel of a trace's target, ``ignore_label`` where there is none."""
    if "sem_seg" in target:
        return target["sem_seg"]
    truth = target_truth(target)
    sem_seg = np.full(truth.ids.shape, ignore_label, np.int32)
    for index, label in truth.classes.items():
        sem_seg[truth.ids == index] = label
    return sem_seg


def shifted_truth(ids: np.ndarray, classes: Mapping[int, int]) -> Truth:
    """A panoptic result, :func:`moved`; of two segments or more the last is a crowd."""
    ids = moved(ids, VOID)
    present = {index: label for index, label in classes.items() if (ids == index).any()}
    return Truth(ids, present, (max(present),) if len(present) > 1 else ())


def probe() -> Pair:
    """A small pair in which every rule counts: an IoU of exactly ½ is no match, void is not in the union, other classes do not match,
    crowds are not missed and excuse what lies on them, and half on void is no excuse.
    """
    true, found = np.zeros((2, 12, 16), np.int32)
    true[0:2, 0:6], found[0:2, 0:3] = 1, 1  # class 0: exactly ½
    true[2:4, 0:6], found[2:4, 0:12] = 2, 2  # class 1: ½ with the void, 1 without it
    true[4:6, 0:8], found[4:6, 0:8] = 3, 3  # class 2 as 3
    true[6:8, 0:12], found[6:8, 0:6] = 4, 4  # class 4: a crowd, and what lies on it
    true[8:10, 0:10], found[8:10, 0:8] = 5, 5  # class 1: 4/5
    found[10:12, 0:10], true[10:12, 0:5] = 6, 6  # class 5 lies half on void, half on class 0
    found[10:12, 10:16] = 7  # class 5 on void alone
    return (
        Truth(true, {1: 0, 2: 1, 3: 2, 4: 4, 5: 1, 6: 0}, (4,)),
        found,
        {1: 0, 2: 1, 3: 3, 4: 4, 5: 1, 6: 5, 7: 5},
    )


def moved(values: np.ndarray, fill: int) -> np.ndarray:
    """``values`` [height, width] moved by :data:`SHIFT_PX`; where nothing comes from, ``fill``."""
    down, right = SHIFT_PX
    result = np.full_like(values, fill)
    result[down:, right:] = values[: values.shape[0] - down, : values.shape[1] - right]
    return result


def panoptic_pairs(target: Mapping[str, np.ndarray], ids: np.ndarray, classes: dict[int, int], num_classes: int) -> dict[str, Pair]:
    """What is counted of an image with an official result: name → ground truth and result. The probe has six classes."""
    pairs: dict[str, Pair] = {"targets": (target_truth(target), ids, classes), "shifted": (shifted_truth(ids, classes), ids, classes)}
    return pairs | ({"probe": probe()} if num_classes >= 6 else {})


def panoptic_counts(truth: Truth, ids: np.ndarray, classes: Mapping[int, int], num_classes: int) -> np.ndarray:
    """float64 [classes, 4]: sum of the IoU of matched segments, true positives, false positives, false negatives, by the definition
    (Kirillov et al., Panoptic Segmentation, section 4): segment by segment, with no table of overlaps.
    """
    counts = np.zeros((num_classes, 4))
    void = truth.ids == VOID
    for category in {*truth.classes.values(), *classes.values()}:
        wanted = [truth.ids == index for index, label in truth.classes.items() if label == category and index not in truth.crowds]
        crowds = [index for index in truth.crowds if truth.classes[index] == category]
        excuse = void | (truth.ids == crowds[-1]) if crowds else void
        missed = len(wanted)
        for mask in (ids == index for index, label in classes.items() if label == category):
            shares = [np.count_nonzero(mask & true) / np.count_nonzero((mask & ~void) | true) for true in wanted]
            if max(shares, default=0.0) > 0.5:
                counts[category] += (max(shares), 1, 0, 0)
                missed -= 1
            elif np.count_nonzero(mask & excuse) <= np.count_nonzero(mask) / 2:
                counts[category, 2] += 1
        counts[category, 3] = missed
    return counts


def panoptic_quality(counts: np.ndarray, is_thing: np.ndarray) -> np.ndarray:
    """float64 [3, 3]: (pq, sq, rq) of all classes, of things and of stuff; nan where no class was met."""
    rows = []
    for members in (np.ones_like(is_thing), is_thing, ~is_thing):
        iou, true, surplus, missed = counts[members & (counts[:, 1:].sum(1) > 0)].T
        size = true + (surplus + missed) / 2
        sq = np.divide(iou, true, out=np.zeros_like(iou), where=true > 0)
        rows.append([float(np.mean(values)) if size.size else math.nan for values in (iou / size, sq, true / size)])
    return np.array(rows)


def confusion(truth: np.ndarray, classes: np.ndarray, num_classes: int, ignore_label: int) -> np.ndarray:
    """int64 [classes, classes + 1]: pixels by predicted and true class, the last true class "ignored"."""
    counts = np.zeros((num_classes, num_classes + 1), np.int64)
    np.add.at(counts, (classes.ravel(), np.where(truth == ignore_label, num_classes, truth).ravel()), 1)
    return counts


def semantic_quality(counts: np.ndarray) -> np.ndarray:
    """float64 [4]: mean IoU, frequency-weighted IoU, mean accuracy, pixel accuracy; over the classes that the ground truth has."""
    counted = counts[:, :-1]
    met = np.flatnonzero(counted.sum(0))
    if not met.size:
        return np.full(4, math.nan)
    right, true = counted[met, met], counted[:, met].sum(0)
    iou = right / (true + counted[met].sum(1) - right)
    return np.array([iou.mean(), (iou * true).sum() / true.sum(), (right / true).mean(), right.sum() / true.sum()])


def judge_metrics(case: Case, results: CaseResults, config: MaskFormerConfig, items: Sequence[Item]) -> Iterator[Item | Exemption]:
    """Group "metrics" of a case: below ``{i}/panoptic/`` and ``{i}/semantic/`` our counts of the official result against the ``targets``
    and against itself ``shifted``, those of the ``probe``, the ``quality`` of all together, and the counts of TensorFlow's ``own`` result.

    Args:
        results: of the case.
        items: of the group "inference": the results themselves, judged.
    """
    inference = {item.name: item for item in items if item.group == "inference"}
    for index, target in enumerate(case.targets):
        for what, name, judge in (("panoptic", "panoptic_seg", _judge_panoptic), ("semantic", "sem_seg", _judge_semantic)):
            if what == "panoptic" and not config.test.panoptic_on:
                continue
            if (result := inference.get(f"{index}/{name}")) is None or result.name not in results.groups["inference"]:
                yield _failed(f"{index}/{what}/own", f"there is no result '{index}/{name}' to count")
            else:
                yield from judge(case, results, config, f"{index}", target, result)


def _judge_panoptic(
    case: Case,
    results: CaseResults,
    config: MaskFormerConfig,
    image: str,
    target: Mapping[str, np.ndarray],
    result: Item,
) -> Iterator[Item]:
    from tfmaskformer.evaluation.panoptic import PanopticQuality

    ids, classes = panoptic_result(case.reference.read, image)
    pairs = panoptic_pairs(target, ids, classes, config.num_classes)

    def count(*pairs: Pair) -> PanopticQuality:
        quality = PanopticQuality(config.num_classes, config.thing_classes)
        for truth, ids, classes in pairs:
            told = [{"id": index, "category_id": label} for index, label in classes.items()]
            quality.update(truth.ids, truth.segments_info, ids, told)
        return quality

    defined = {name: panoptic_counts(*pair, config.num_classes) for name, pair in pairs.items()}
    for name, pair in pairs.items():
        yield _against(case, f"{image}/panoptic/{name}", table(count(pair)), defined[name])
    is_thing = np.isin(np.arange(config.num_classes), list(config.thing_classes))
    quality = np.array([group[:3] for group in count(*pairs.values()).result().values()])
    yield _against(case, f"{image}/panoptic/quality", quality, panoptic_quality(sum(defined.values(), np.zeros(1)), is_thing))

    name = f"{image}/panoptic/own"
    own_ids, own_classes = panoptic_result(lambda group, name: results.groups[group][name], image)
    try:
        actual, expected = (
            table(count(*((pairs[against][0], *found) for against in ("targets", "shifted"))))
            for found in ((own_ids, own_classes), (ids, classes))
        )
    except ValueError as error:  # another size, or segments that do not fit the map
        yield _failed(name, str(error))
        return
    differing = int(np.count_nonzero(own_ids != ids))
    # With each ground truth, a pixel that goes to another segment moves the IoU of two segments by no more than 1 / area.
    areas = [int(np.count_nonzero(truth.ids == index)) for truth, _, _ in pairs.values() for index in truth.classes]
    allowed = 4 * differing / min(areas, default=1) / max(float(np.linalg.norm(expected)), 1.0)
    item = _item("metrics", name, actual, expected, max(allowed, compare.FLOAT64_TOLERANCE))
    if differing:
        same_counts = result.passed and np.array_equal(actual[:, 1:], expected[:, 1:])
        near_tie = result.passed and result.note.startswith("near-tie")
        note = f"{differing} pixels belong to other segments{': a near-tie' * near_tie}"
        item = dataclasses.replace(item, passed=near_tie or (same_counts and item.passed), note=note)
    yield item


def _judge_semantic(
    case: Case,
    results: CaseResults,
    config: MaskFormerConfig,
    image: str,
    target: Mapping[str, np.ndarray],
    result: Item,
) -> Iterator[Item | Exemption]:
    from parity.check import Exemption
    from tfmaskformer.evaluation.semantic import SemanticQuality

    scores = np.asarray(results.groups["inference"][f"{image}/sem_seg"])
    own, official = classes_of(scores), official_classes(case, image)
    classes = own if official is None else official
    ignore = config.criterion.ignore_value
    truths = {"targets": target_sem_seg(target, ignore), "shifted": moved(classes, ignore)}

    def count(classes: np.ndarray) -> dict[str, Any]:
        counted = {name: SemanticQuality(config.num_classes, ignore) for name in truths}
        for name, quality in counted.items():
            quality.update(truths[name], classes)
        return counted | {"both": counted["targets"] + counted["shifted"]}

    name = f"{image}/semantic/own"
    try:
        ours, of_own = count(classes), count(own)["both"]
    except ValueError as error:  # another size
        yield _failed(name, str(error))
        return
    defined = {name: confusion(truth, classes, config.num_classes, ignore) for name, truth in truths.items()}
    for which in truths:
        yield _against(case, f"{image}/semantic/{which}", ours[which].confusion, defined[which])
    quality = np.array(ours["both"].result()[:4])
    yield _against(case, f"{image}/semantic/quality", quality, semantic_quality(defined["targets"] + defined["shifted"]))

    if official is None:
        reason = (
            "the trace has samples of the official scores, not the class of each pixel; the counts are those of TensorFlow's own result"
        )
        yield Exemption("metrics", name, reason)
        return
    # A pixel may have another class where its two best scores are equal but for the error that scores may have.
    differing = own != official
    changed = int(np.count_nonzero(differing))
    best = np.sort(scores[:, differing], axis=0)[-2:]
    noise = 2 * result.tolerance * max(abs(float(scores.max())), abs(float(scores.min())))
    near = int(np.count_nonzero(best[1] - best[0] <= noise)) if changed else 0
    expected = ours["both"].confusion
    item = _item("metrics", name, of_own.confusion, expected, 4 * near / max(float(np.linalg.norm(expected)), 1.0))
    if changed:
        note = f"{changed} pixels have another class, {near} of them at a near-tie"
        item = dataclasses.replace(item, note=note, passed=item.passed and near == changed)
    yield item


def panoptic_result(read: Callable[[str, str], np.ndarray], image: str) -> tuple[np.ndarray, dict[int, int]]:
    """The map of ids [height, width] and id → class, of what ``read(group, name)`` gives."""
    rows = read("inference", f"{image}/segments")
    return np.asarray(read("inference", f"{image}/panoptic_seg")), {int(row[0]): int(row[1]) for row in rows}


def official_classes(case: Case, image: str) -> np.ndarray | None:
    """int [height, width]: the class of each pixel by the official scores in float64; None where only samples of them were stored."""
    if ("metrics", f"{image}/semantic/classes") in case.reference.records:
        return case.reference.read("metrics", f"{image}/semantic/classes")
    if case.reference["inference", f"{image}/sem_seg"].samples is not None:
        return None
    return classes_of(case.reference.read("inference", f"{image}/sem_seg"))


def classes_of(scores: np.ndarray) -> np.ndarray:
    """``scores.argmax(0)`` of [classes, height, width], one class after the other, which is three times as fast."""
    best, classes = scores[0].copy(), np.zeros(scores.shape[1:], np.int64)
    for index, of_class in enumerate(scores):
        np.copyto(classes, index, where=of_class > best)
        np.maximum(best, of_class, out=best)
    return classes


def table(quality: Any) -> np.ndarray:
    """What :func:`panoptic_counts` gives, of a :class:`tfmaskformer.evaluation.panoptic.PanopticQuality`."""
    columns = (quality.iou, quality.true_positives, quality.false_positives, quality.false_negatives)
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def _against(case: Case, name: str, actual: np.ndarray, defined: np.ndarray) -> Item:
    """Our figures against the official packages', or, in a trace without them, against the definition's."""
    if ("metrics", name) not in case.reference.records:
        item = _item("metrics", name, actual, defined, compare.FLOAT64_TOLERANCE)
        return dataclasses.replace(item, note=f"{item.note}; {BY_DEFINITION}".removeprefix("; "))
    expected = case.reference.read("metrics", name)
    if expected.shape != defined.shape:  # a confusion matrix, as rows (predicted class, true class, pixels)
        rows, expected = expected, np.zeros_like(defined)
        expected[rows[:, 0], rows[:, 1]] = rows[:, 2]
    return _item("metrics", name, actual, expected, compare.FLOAT64_TOLERANCE)


def _item(group: str, name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float, dtype: str | None = None) -> Item:
    from parity.check import Item

    comparison = compare.compare(actual, expected, tolerance, dtype=dtype)
    return Item(group, name, comparison.passed, comparison.error, math.nan, tolerance, comparison, comparison.fault or "")


def _failed(name: str, why: str) -> Item:
    from parity.check import Item

    return Item("metrics", name, False, comparison=compare.incomparable(why), note=why)
