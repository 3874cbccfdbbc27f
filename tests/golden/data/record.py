"""Records what the official code makes of the generated data sets and of a few images; run by hand, with the official code at hand.

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/data/record.py

Writes ``images/`` (crops of checkpoints/photos, encoded with Pillow in the ways that data sets have) and ``recorded.json``:

- ``lists``: for each layout what the official loader lists of ``tfmaskformer.data.generated``, and the SHA-256 of the ground truth as the
  official evaluators read it, int64;
- ``transformed``: for each image and INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST the shape and SHA-256, [height, width, 3], of what
  ``build_detection_test_loader`` with the official ``DatasetMapper`` yields.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
PHOTOS = HERE.parents[2] / "checkpoints" / "photos"
IMAGES = 6
"""Images in each generated data set."""

OFFICIAL = {
    "coco_panoptic": "coco_2017_val_panoptic",
    "ade20k": "ade20k_sem_seg_val",
    "ade20k_panoptic": "ade20k_panoptic_val",
    "ade20k_full": "ade20k_full_sem_seg_val",
    "cityscapes": "cityscapes_fine_sem_seg_val",
    "cityscapes_panoptic": "cityscapes_fine_panoptic_val",
    "coco_stuff_10k": "coco_2017_test_stuff_10k_sem_seg",
    "mapillary_vistas": "mapillary_vistas_sem_seg_val",
}
SIZES = ((800, 1333), (64, 100), (37, 1333))
"""COCO's, one where the longer side decides, and one that shrinks much."""
MORE_SIZES = ((512, 2048), (1024, 2048), (640, 2560))
"""Of the other official configs; for the photographs."""


def write_images() -> None:
    """Small files of every kind."""
    photo = Image.open(PHOTOS / "coffee.png").convert("RGB").crop((31, 17, 31 + 131, 17 + 89))
    exif = Image.Exif()
    kinds = {
        "yuv420.jpg": lambda path: photo.save(path, quality=85, subsampling=2),
        "yuv422.jpg": lambda path: photo.save(path, quality=85, subsampling=1),
        "yuv444.jpg": lambda path: photo.save(path, quality=85, subsampling=0),
        "progressive.jpg": lambda path: photo.save(path, quality=85, progressive=True),
        "grey.jpg": lambda path: photo.convert("L").save(path, quality=85),
        "cmyk.jpg": lambda path: photo.convert("CMYK").save(path, quality=85),
        "palette.png": lambda path: photo.quantize(64).save(path),
        "rgba.png": lambda path: Image.merge("RGBA", [*photo.split(), photo.convert("L")]).crop((0, 0, 57, 43)).save(path),
    }
    for orientation in range(2, 9):
        exif[0x0112] = orientation
        data = exif.tobytes()
        kinds[f"orientation{orientation}.jpg"] = functools.partial(photo.crop((0, 0, 61, 40)).save, quality=75, exif=data)
    (HERE / "images").mkdir(exist_ok=True)
    for name, save in kinds.items():
        save(HERE / "images" / name)


def transformed(code) -> dict[str, list]:
    """The official test loader on every image."""
    from detectron2.data import DatasetMapper, build_detection_test_loader

    result = {}
    cfg = code.config("coco-panoptic/maskformer_panoptic_R50_bs64_554k")
    for file in [*sorted((HERE / "images").iterdir()), *sorted(PHOTOS.glob("*.png"))]:
        for min_size, max_size in SIZES + MORE_SIZES * (file.parent == PHOTOS):
            cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = min_size, max_size
            loader = build_detection_test_loader(
                dataset=[{"file_name": str(file), "image_id": 0}], mapper=DatasetMapper(cfg, is_train=False), num_workers=0
            )
            ((sample,),) = loader
            image = np.ascontiguousarray(sample["image"].numpy().transpose(1, 2, 0))
            row = [sample["height"], sample["width"], *image.shape[:2], hashlib.sha256(image.tobytes()).hexdigest()]
            result[f"{file.name} {min_size} {max_size}"] = row
    return result


def lists(data: Path) -> dict[str, list]:
    """The official lists of the data sets below ``data``, paths relative to it."""
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import load_sem_seg
    from detectron2.evaluation.sem_seg_evaluation import load_image_into_numpy_array

    def listed(name):
        if name == "coco_panoptic_semseg":
            return load_sem_seg(str(data / "coco/panoptic_semseg_val2017"), str(data / "coco/val2017"))
        found = DatasetCatalog.get(OFFICIAL[name])
        # The official order is the file system's.
        return sorted(found, key=lambda item: item["file_name"]) if name == "cityscapes" else found

    def relative(path):
        return str(Path(path).relative_to(data))

    result: dict[str, list] = {}
    for name in (*OFFICIAL, "coco_panoptic_semseg"):
        rows = []
        for item in listed(name):
            row = {"image_id": item.get("image_id"), "image": relative(item["file_name"])}
            if "pan_seg_file_name" in item:
                rgb = load_image_into_numpy_array(item["pan_seg_file_name"], dtype=int)
                row["panoptic"] = relative(item["pan_seg_file_name"])
                row["panoptic_sha256"] = _sha256(rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2])
                row["segments"] = [[item["id"], item["category_id"], item["iscrowd"], item["area"]] for item in item["segments_info"]]
            if "sem_seg_file_name" in item:
                row["semantic"] = relative(item["sem_seg_file_name"])
                row["semantic_sha256"] = _sha256(load_image_into_numpy_array(item["sem_seg_file_name"], dtype=int))
            rows.append(row)
        result[name] = rows
    return result


def _sha256(labels: np.ndarray) -> str:
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DETECTRON2_DATASETS"] = folder  # read when the official code is imported
        from parity import official

        code = official.load()
        from tfmaskformer.data import generated
        from tfmaskformer.data.layouts import LAYOUTS

        for name in (*OFFICIAL, "coco_panoptic_semseg"):
            generated.write(name, folder, list(LAYOUTS[name].splits)[-1], IMAGES)
        for label in Path(folder).glob("cityscapes/gtFine/val/*/*_gtFine_labelTrainIds.png"):  # what the official loader wants besides
            with Image.open(label) as image:
                size = {"imgHeight": image.height, "imgWidth": image.width}
            for other, content in (("instanceIds.png", ""), ("labelIds.png", ""), ("polygons.json", json.dumps(size))):
                label.with_name(label.name.replace("labelTrainIds.png", other)).write_text(content)
        write_images()
        recorded = {
            "how_made": "python tests/golden/data/record.py",
            "commits": code.commits,
            "pillow": Image.__version__,
            "images": IMAGES,
            "lists": lists(Path(folder)),
            "transformed": transformed(code),
        }
    lines = ",\n".join(f" {json.dumps(key)}: {_lines(value)}" for key, value in recorded.items())
    (HERE / "recorded.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def _lines(value: object) -> str:
    """One line for each item."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()) + "\n }"


if __name__ == "__main__":
    main()
