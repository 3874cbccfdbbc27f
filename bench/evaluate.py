"""A whole evaluation, image by image: `tfmaskformer eval` beside the official loop of `train_net.py --eval-only`.

R50 panoptic with the synthetic checkpoint, which finds segments in photographs; JPEG files of 640×640 px in COCO's layout, which the test
transform leaves at that size. Ours reads, runs the network and the post-processing, and counts PQ. The official code reads and runs
``MaskFormer.forward``, which also makes semantic scores; its evaluator, which writes files and reads them again, is left out. Every
framework runs in a process of its own, and they take turns, one pass over all images each.
"""

from __future__ import annotations

import importlib.resources
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints.registry
from bench.common import THREADS, gigabytes, in_turns, official_given, progress, section, serve, timings

ENTRY = "maskformer_panoptic_R50_bs64_554k"
SIZE_PX = 640
IMAGES, WARM_UPS, PASSES = 6, 1, 3
OURS, OFFICIAL = "tfmaskformer eval --cpu", "PyTorch, official"


def main() -> int:
    """Measures and prints the section."""
    names = [OFFICIAL, OURS] if official_given() else [OURS]
    with tempfile.TemporaryDirectory() as scratch:
        progress("  making the data set and the checkpoints")
        _write(Path(scratch))
        seconds, peaks = in_turns("bench.evaluate", names, scratch, warm_ups=WARM_UPS, passes=PASSES)
    rows = [
        [name, f"{IMAGES / statistics.median(seconds[name]):.2f}", *timing, gigabytes(peaks[name])]
        for name, timing in timings(seconds, OFFICIAL, IMAGES).items()
    ]
    text = (
        f"`python -m bench.evaluate`: {ENTRY}, photographs of {SIZE_PX}×{SIZE_PX} px, float32, {THREADS} threads, one image at a time, "
        f"from file to count (the official code: to what its evaluator would take, semantic scores included, which its forward pass always "
        f"makes and COCO's PQ does not need); {PASSES} passes over {IMAGES} images each, taken in turns, after one that compiles. "
        "Ratio: of the medians. Memory: the process's peak."
    )
    print(section("Evaluation", text, ["", "images/s", "an image", "fastest pass", "ratio", "peak memory"], rows))
    return 0


def _write(folder: Path) -> None:
    """``coco/`` with images and panoptic annotations, ``model_final.pkl`` and ``tf_ckpt``."""
    from PIL import Image

    from checkpoints import synthesize
    from converters.convert import convert

    files = sorted((importlib.resources.files("checkpoints") / "photos").iterdir(), key=lambda file: file.name)
    photos = [Image.open(str(file)).convert("RGB") for file in files if file.name.endswith(".png")]
    info = checkpoints.registry.dataset("coco_panoptic")
    images, pngs, jsons = (folder / "coco" / name for name in ("val2017", "panoptic_val2017", "annotations"))
    for made in (images, pngs, jsons):
        made.mkdir(parents=True)
    listed: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for index in range(IMAGES):
        photo = photos[index % len(photos)]
        shift = 20 * (index // len(photos))
        photo.crop((shift, shift, photo.width, photo.height)).resize((SIZE_PX, SIZE_PX)).save(images / f"{index}.jpg", "JPEG", quality=95)
        truth = np.zeros((SIZE_PX, SIZE_PX, 3), np.uint8)
        segments = []
        for number in range(16):  # a grid of segments
            rows, columns = (slice(SIZE_PX * part // 4, SIZE_PX * (part + 1) // 4) for part in divmod(number, 4))
            truth[rows, columns, 0] = number + 1
            category = (info.dataset_ids or ())[8 * number]
            segments.append({"id": number + 1, "category_id": category, "area": SIZE_PX**2 // 16, "iscrowd": 0})
        Image.fromarray(truth).save(pngs / f"{index}.png")
        listed["images"].append({"id": index, "file_name": f"{index}.jpg", "height": SIZE_PX, "width": SIZE_PX})
        listed["annotations"].append({"image_id": index, "file_name": f"{index}.png", "segments_info": segments})
    (jsons / "panoptic_val2017.json").write_text(json.dumps(listed), encoding="utf-8")
    source = folder / "model_final.pkl"
    synthesize.write_pickle(synthesize.synthesize(checkpoints.registry.entry(ENTRY)), source, synthesize.AUTHOR)
    convert(source, folder / "tf_ckpt", ENTRY)
    config = json.loads((folder / "tf_ckpt" / "config.json").read_text(encoding="utf-8"))
    config["test"] |= {"min_size": SIZE_PX, "max_size": SIZE_PX}
    (folder / "tf_ckpt" / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _ours(folder: Path) -> Callable[[], Any]:
    import tensorflow as tf

    from tfmaskformer.checkpoint import read_config
    from tfmaskformer.evaluation.counts import Counts
    from tfmaskformer.evaluation.devices import strategy_for
    from tfmaskformer.evaluation.evaluate import Evaluation
    from tfmaskformer.evaluation.sources import metrics_of, open_source

    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    source = open_source(folder, "coco_panoptic")
    metrics = metrics_of(read_config(folder / "tf_ckpt"), source)
    evaluation = Evaluation(folder / "tf_ckpt", source, strategy_for("cpu"), metrics)

    def one_pass() -> None:
        evaluation.counts = Counts.none(metrics, source.info)
        evaluation.run()
        found = evaluation.counts.panoptic
        assert len(evaluation.counts.done) == IMAGES
        assert found is not None
        assert (found.true_positives + found.false_positives).sum() > IMAGES  # so that there is something to paint

    return one_pass


def _official(folder: Path) -> Callable[[], Any]:
    import torch

    from parity import official

    torch.set_num_threads(THREADS)
    code = official.load()
    from detectron2.data import DatasetMapper, build_detection_test_loader

    config = code.config(checkpoints.registry.entry(ENTRY).official_config.removeprefix("configs/"))
    config.merge_from_list(["INPUT.MIN_SIZE_TEST", SIZE_PX, "INPUT.MAX_SIZE_TEST", SIZE_PX])
    model = code.model(config, folder / "model_final.pkl")
    images = folder / "coco" / "val2017"
    sides = {"height": SIZE_PX, "width": SIZE_PX}
    records = [{"file_name": str(images / f"{index}.jpg"), "image_id": index} | sides for index in range(IMAGES)]
    loader = build_detection_test_loader(records, mapper=DatasetMapper(config, False), num_workers=0)

    def one_pass() -> None:
        with torch.no_grad():
            for inputs in loader:
                model(inputs)[0]["panoptic_seg"][0].numpy()

    return one_pass


def _worker(name: str, folder: str) -> int:
    return serve({OURS: _ours, OFFICIAL: _official}[name](Path(folder)))


if __name__ == "__main__":
    sys.exit(_worker(*sys.argv[1:]) if len(sys.argv) > 1 else main())
