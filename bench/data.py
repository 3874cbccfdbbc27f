"""What feeds a training: images read, augmented and batched in a second, by each official mapper, beside what a step needs.

Photographs of COCO's usual size with panoptic and semantic maps, in the layouts of the data sets that the official configs name; batches
as a training gets them. The official mappers run in PyTorch's ``DataLoader``, in the process itself on one core, in two on two. Either
side gets no other core. One is measured after the other, not in turns: what a pipeline prepares between its passes would count for nothing.
The official ones are measured where ``MASKFORMER_SOURCE`` and ``DETECTRON2_SOURCE`` name the official code, and panopticapi
and, for those that change colours, OpenCV are installed.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import bench.train
import checkpoints.registry
from bench.common import gigabytes, in_turns, official_given, progress, section, serve

ENTRIES = {
    "detr_panoptic": "maskformer_panoptic_R50_bs64_554k",
    "mask_former_semantic": "maskformer_R50_bs16_160k",
    "mask_former_panoptic": "maskformer_panoptic_R50_bs16_720k",
}
"""Mapper → an entry whose official config has it."""
NEEDED = {
    "detr_panoptic": ("panopticapi",),
    "mask_former_semantic": ("cv2",),
    "mask_former_panoptic": ("cv2", "panopticapi"),
}
"""Mapper → the packages that upstream's imports beside its own."""
HEIGHT_PX, WIDTH_PX, SEGMENTS = 480, 640, 12
IMAGES, BATCH, WARM_UPS, PASSES = 48, 8, 1, 5
OURS, OFFICIAL = "TensorFlow", "PyTorch, official"
CORES = (1, 2)


def main() -> int:
    """Measures and prints the section."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for mapper, entry in ENTRIES.items():
            progress(f"  {mapper}")
            _write(Path(scratch), _layout(entry))
            official = official_given() and all(importlib.util.find_spec(package) for package in NEEDED[mapper])
            sides = [OURS, OFFICIAL] if official else [OURS]
            names = [f"{side}, {cores}" for side in sides for cores in CORES]
            seconds: dict[str, list[float]] = {}
            peaks: dict[str, int] = {}
            for name in names:
                taken, memory = in_turns("bench.data", [name], entry, scratch, warm_ups=WARM_UPS, passes=PASSES)
                seconds |= taken
                peaks |= memory
            rates = {name: IMAGES / statistics.median(values) for name, values in seconds.items()}
            for name in names:
                side, cores = name.rsplit(", ", 1)
                official_rate = rates.get(f"{OFFICIAL}, {cores}")
                ratio = f"{rates[name] / official_rate:.2f}" if official_rate else "–"
                fastest = IMAGES / min(seconds[name])
                peak = gigabytes(peaks[name]) if side == OURS or cores == "1" else "–"  # the DataLoader's processes are others
                rows.append([f"{mapper}: {side}", cores, f"{rates[name]:.1f}", f"{fastest:.1f}", ratio, peak])
    step = bench.train.GRAPH
    [seconds_of_step] = in_turns("bench.train", [step], "1", warm_ups=2, passes=3)[0].values()
    rows.append([f"needed: {step}, forward and back", "2", f"{1 / statistics.median(seconds_of_step):.2f}", "", "", ""])
    text = (
        f"`python -m bench.data`: images a second that the training batches of each mapper hold, by the official R50 configs, from JPEG "
        f"files of {WIDTH_PX}×{HEIGHT_PX} px with {SEGMENTS} segments, {IMAGES} images a pass in batches of {BATCH}; {PASSES} passes each "
        "after one that starts it. The official mappers give masks, ours the object of each pixel, on the whole canvas. Ratio: to the "
        "official one on as many cores. Memory: the process's peak. Needed: what one training step takes on this machine, at "
        f"{bench.train.SIZE_PX}×{bench.train.SIZE_PX} px."
    )
    print(section("Input pipeline", text, ["", "cores", "images/s", "fastest pass", "ratio", "peak memory"], rows))
    return 0


def _layout(entry: str) -> str:
    from tfmaskformer.official_config import config_of, named_tree

    name, tree = named_tree(entry)
    return config_of(tree, name).dataset


def _write(folder: Path, name: str) -> None:
    """The data set ``name`` of :data:`IMAGES` photographs, below ``folder``, and ``official.json``, its list as upstream has it."""
    from PIL import Image

    from tfmaskformer.data.layouts import LAYOUTS

    layout, info = LAYOUTS[name], checkpoints.registry.dataset(LAYOUTS[name].dataset)
    root, words = folder / layout.folder, {"split": "train", "part": layout.splits["train"]}
    folders = {kind: root / getattr(layout, kind).format(**words) for kind in ("images", "semantic", "panoptic") if getattr(layout, kind)}
    for made in folders.values():
        made.mkdir(parents=True, exist_ok=True)
    files = sorted((importlib.resources.files("checkpoints") / "photos").iterdir(), key=lambda file: file.name)
    photos = [Image.open(str(file)).convert("RGB") for file in files if file.name.endswith(".png")]
    number = (np.arange(HEIGHT_PX)[:, None] * 3 // HEIGHT_PX) * 4 + np.arange(WIDTH_PX) * 4 // WIDTH_PX  # of the segment, from 0
    ids = np.array([70_000 * segment + 300 for segment in range(SEGMENTS)])[number]
    listed: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    official = []
    for index in range(IMAGES):
        photo, shift = photos[index % len(photos)], 4 * (index // len(photos))
        stem = f"{index:012}"
        image = photo.crop((shift, shift, photo.width, photo.height)).resize((WIDTH_PX, HEIGHT_PX))
        image.save(folders["images"] / f"{stem}{layout.image_suffix}", quality=90)
        item: dict[str, Any] = {"file_name": str(folders["images"] / f"{stem}{layout.image_suffix}"), "image_id": index}
        if "semantic" in folders:
            item["sem_seg_file_name"] = str(folders["semantic"] / f"{stem}{layout.semantic_suffix}")
            Image.fromarray(number.astype(np.uint8)).save(item["sem_seg_file_name"])
        if "panoptic" in folders:
            item["pan_seg_file_name"] = str(folders["panoptic"] / f"{stem}.png")
            Image.fromarray(np.stack([ids >> bits & 255 for bits in (0, 8, 16)], -1).astype(np.uint8)).save(item["pan_seg_file_name"])
            sizes = np.bincount(number.ravel())
            segments = [{"id": 70_000 * segment + 300, "area": int(sizes[segment]), "iscrowd": 0} for segment in range(SEGMENTS)]
            listed["images"].append({"id": index, "file_name": f"{stem}.jpg", "height": HEIGHT_PX, "width": WIDTH_PX})
            annotated = [segment | {"category_id": (info.dataset_ids or ())[place]} for place, segment in enumerate(segments)]
            image_id = index if layout.integer_ids else stem
            listed["annotations"].append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": annotated})
            item["segments_info"] = [segment | {"category_id": place} for place, segment in enumerate(segments)]
        official.append(item)
    if layout.panoptic_json:
        file = root / layout.panoptic_json.format(**words)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(listed), encoding="utf-8")
    (folder / "official.json").write_text(json.dumps(official), encoding="utf-8")


def _tensorflow(entry: str, folder: Path) -> Callable[[], Any]:
    from tfmaskformer.data.datasets import open_dataset
    from tfmaskformer.data.training import training_dataset
    from tfmaskformer.official_config import named_tree

    tree, dataset = named_tree(entry)[1], open_dataset(_layout(entry), folder, "train")
    batches = iter(training_dataset(tree, dataset, seed=0, batch=BATCH, max_objects=100))

    def one_pass() -> None:
        assert sum(len(next(batches)["image"]) for _ in range(IMAGES // BATCH)) == IMAGES

    return one_pass


def _official(entry: str, folder: Path, processes: int) -> Callable[[], Any]:
    import torch

    from parity import official

    torch.set_num_threads(1)
    code = official.load()
    import mask_former
    from detectron2.data import MapDataset, MetadataCatalog
    from detectron2.data.samplers import TrainingSampler

    config = code.config(checkpoints.registry.entry(entry).official_config.removeprefix("configs/"))
    config.DATASETS.TRAIN = ("bench",)
    MetadataCatalog.get("bench").ignore_label = 255
    mappers = {
        "detr_panoptic": mask_former.DETRPanopticDatasetMapper,
        "mask_former_semantic": mask_former.MaskFormerSemanticDatasetMapper,
        "mask_former_panoptic": mask_former.MaskFormerPanopticDatasetMapper,
    }
    listed = json.loads((folder / "official.json").read_text(encoding="utf-8"))
    samples = MapDataset(listed, mappers[config.INPUT.DATASET_MAPPER_NAME](config, True))
    sampler = TrainingSampler(len(samples), seed=0)
    batches = iter(torch.utils.data.DataLoader(samples, BATCH, sampler=sampler, collate_fn=list, num_workers=processes))

    def one_pass() -> None:
        assert sum(len(next(batches)) for _ in range(IMAGES // BATCH)) == IMAGES

    return one_pass


def _worker(name: str, entry: str, folder: str) -> int:
    side, cores = name.rsplit(", ", 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    if side == OURS:
        return serve(_tensorflow(entry, Path(folder)))
    return serve(_official(entry, Path(folder), 0 if cores == "1" else int(cores)))


if __name__ == "__main__":
    sys.exit(_worker(*sys.argv[1:]) if len(sys.argv) > 1 else main())
