"""Records what panopticapi makes of random panoptic maps, with void, crowds and IoUs about one half.

    PYTHONPATH=panopticapi python tests/tfmaskformer/golden/record_panoptic_quality.py

with cocodataset/panopticapi at 7bb4655548f98f3fedc07bf37e9040a992b054b0 in the folder panopticapi.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import numpy as np
from PIL import Image

COMMIT = "cocodataset/panopticapi 7bb4655548f98f3fedc07bf37e9040a992b054b0"
IMAGES, HEIGHT, WIDTH, CLASSES, THINGS = 32, 21, 28, 6, 3  # the last class is never met


def _info(ids, categories, crowds=()):
    return [
        {"id": int(index), "category_id": int(category), "iscrowd": int(index in crowds), "area": int((ids == index).sum())}
        for index, category in categories.items()
        if (ids == index).any()
    ]


def _case(random):
    """Truth in blocks; the prediction is the truth, shifted, with some classes changed, and with blocks of its own."""
    blocks = random.integers(0, 8, (3, 4))  # 0 is void
    truth = np.kron(blocks, np.ones((7, 7), int))
    categories = {int(index): int(random.integers(0, CLASSES - 1)) for index in range(1, 8)}
    crowds = [index for index in range(1, 8) if random.random() < 0.2]
    predicted = np.roll(truth, random.integers(-1, 2, 2), (0, 1))
    predicted[predicted > 0] += 20
    predicted_categories = {
        index + 20: category if random.random() < 0.8 else int(random.integers(0, CLASSES - 1)) for index, category in categories.items()
    }
    for extra in (100, 70000):
        top, left = random.integers(0, HEIGHT - 6), random.integers(0, WIDTH - 6)
        predicted[top : top + 6, left : left + 6] = extra
        predicted_categories[extra] = int(random.integers(0, CLASSES - 1))
    predicted[random.integers(0, HEIGHT)] = 0
    return (truth, _info(truth, categories, crowds)), (predicted, _info(predicted, predicted_categories))


def main() -> None:
    """Writes panoptic_quality.npz beside this file."""
    from panopticapi.evaluation import pq_compute_single_core
    from panopticapi.utils import id2rgb

    random = np.random.default_rng(0)
    cases = [_case(random) for _ in range(IMAGES)]
    categories = {index: {"id": index, "isthing": int(index < THINGS)} for index in range(CLASSES)}
    with tempfile.TemporaryDirectory() as folder:
        annotations = []
        for index, sides in enumerate(cases):
            pair = []
            for side, (ids, segments_info) in zip(("true", "predicted"), sides, strict=True):
                path = pathlib.Path(folder, side)
                path.mkdir(exist_ok=True)
                Image.fromarray(id2rgb(ids)).save(path / f"{index}.png")
                copies = [dict(segment) for segment in segments_info]  # panopticapi writes into them
                pair.append({"image_id": index, "file_name": f"{index}.png", "segments_info": copies})
            annotations.append(pair)
        stat = pq_compute_single_core(0, annotations, f"{folder}/true", f"{folder}/predicted", categories)
    maps = {side: np.array([case[position][0] for case in cases], np.int32) for position, side in enumerate(("true", "predicted"))}
    recorded = {
        "how_made": f"tests/tfmaskformer/golden/record_panoptic_quality.py, {COMMIT}",
        "num_classes": CLASSES,
        "thing_classes": list(range(THINGS)),
        "true_segments_info": [case[0][1] for case in cases],
        "predicted_segments_info": [case[1][1] for case in cases],
        "per_class": [{name: getattr(stat[index], name) for name in ("iou", "tp", "fp", "fn")} for index in range(CLASSES)],
        "averages": {
            name: stat.pq_average(categories, isthing)[0] for name, isthing in (("all", None), ("things", True), ("stuff", False))
        },
    }
    np.savez_compressed(pathlib.Path(__file__).with_name("panoptic_quality.npz"), json=json.dumps(recorded, default=float), **maps)


if __name__ == "__main__":
    main()
