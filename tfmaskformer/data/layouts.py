"""Where the files of each data set lie, as Detectron2 and MaskFormer register them.

Sources: Detectron2's ``data/datasets/builtin.py``, ``cityscapes_panoptic.py``; MaskFormer's ``mask_former/data/datasets`` and
``datasets/README.md``; for ``coco_panoptic_semseg`` Mask2Former's ``datasets/README.md``, whose folders ``panoptic_semseg_{split}2017``
hold the semantic maps of the panoptic annotations. A new layout is a row of :data:`LAYOUTS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

_TRAIN_VAL = {"train": "train", "val": "val"}
_TRAINING_VALIDATION = {"train": "training", "val": "validation"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folders and file names of a data set.

    Paths are relative to the data set's own folder; in them ``{split}`` is the split and ``{part}`` its word in :attr:`splits`.

    Attributes:
        dataset: the registry's name of its categories (``checkpoints.registry.dataset``).
        folder: the data set's folder in the one that holds all data sets, which upstream calls ``DETECTRON2_DATASETS``.
        splits: split → the word for it in paths. The last is the one that official evaluation takes.
        images, image_suffix: folder of the images, and how their names end.
        semantic, semantic_suffix: the same of semantic maps, paired by the rest of the name; empty where there are none.
        panoptic, panoptic_json: folder of the panoptic PNG files, and the JSON file that lists them; empty where there are none.
        cities: images and semantic maps lie in a folder for each city, which is what their names begin with.
        integer_ids: image ids are integers, as COCO's.
        exact_areas: the JSON's areas are those of the PNG. Not so in ADE20K: ``prepare_ade20k_pan_seg.py`` counts a segment before others
            cover it, even wholly.
        deeplab2: (label_divisor, ignore_label, number of the first class) of DeepLab2's ``data/dataset.py``.
    """

    dataset: str
    folder: str
    images: str
    splits: Mapping[str, str] = dataclasses.field(default_factory=lambda: _TRAIN_VAL)
    image_suffix: str = ".jpg"
    semantic: str = ""
    semantic_suffix: str = ".png"
    panoptic: str = ""
    panoptic_json: str = ""
    cities: bool = False
    integer_ids: bool = False
    exact_areas: bool = True
    deeplab2: tuple[int, int, int] = (256, 0, 1)


_CITYSCAPES_FILES = {
    "folder": "cityscapes",
    "images": "leftImg8bit/{part}",
    "image_suffix": "_leftImg8bit.png",
    "semantic": "gtFine/{part}",
    "semantic_suffix": "_gtFine_labelTrainIds.png",
    "cities": True,
    "deeplab2": (1000, 255, 0),
}

LAYOUTS: dict[str, Layout] = {
    "coco_panoptic": Layout(
        dataset="coco_panoptic",
        folder="coco",
        images="{part}2017",
        panoptic="panoptic_{part}2017",
        panoptic_json="annotations/panoptic_{part}2017.json",
        integer_ids=True,
    ),
    "coco_panoptic_semseg": Layout(
        dataset="coco_panoptic", folder="coco", images="{part}2017", semantic="panoptic_semseg_{part}2017", integer_ids=True
    ),
    "ade20k": Layout(
        dataset="ade20k",
        folder="ADEChallengeData2016",
        splits=_TRAINING_VALIDATION,
        images="images/{part}",
        semantic="annotations_detectron2/{part}",
    ),
    "ade20k_panoptic": Layout(
        dataset="ade20k_panoptic",
        folder="ADEChallengeData2016",
        splits=_TRAINING_VALIDATION,
        images="images/{part}",
        semantic="annotations_detectron2/{part}",
        panoptic="ade20k_panoptic_{split}",
        panoptic_json="ade20k_panoptic_{split}.json",
        exact_areas=False,
        deeplab2=(1000, 0, 1),
    ),
    "ade20k_full": Layout(
        dataset="ade20k_full",
        folder="ADE20K_2021_17_01",
        splits=_TRAINING_VALIDATION,
        images="images_detectron2/{part}",
        semantic="annotations_detectron2/{part}",
        semantic_suffix=".tif",
    ),
    "cityscapes": Layout(dataset="cityscapes", **_CITYSCAPES_FILES),  # type: ignore[arg-type]
    "cityscapes_panoptic": Layout(
        dataset="cityscapes_panoptic",
        panoptic="gtFine/cityscapes_panoptic_{part}",
        panoptic_json="gtFine/cityscapes_panoptic_{part}.json",
        **_CITYSCAPES_FILES,  # type: ignore[arg-type]
    ),
    "coco_stuff_10k": Layout(
        dataset="coco_stuff_10k",
        folder="coco/coco_stuff_10k",
        splits={"train": "train", "test": "test"},
        images="images_detectron2/{part}",
        semantic="annotations_detectron2/{part}",
    ),
    "mapillary_vistas": Layout(
        dataset="mapillary_vistas",
        folder="mapillary_vistas",
        splits=_TRAINING_VALIDATION,
        images="{part}/images",
        semantic="{part}/labels",
    ),
    "shapes": Layout(
        dataset="shapes",
        folder="shapes",
        images="{part}",
        image_suffix=".png",
        semantic="annotations/semantic_{part}",
        panoptic="annotations/panoptic_{part}",
        panoptic_json="annotations/panoptic_{part}.json",
        integer_ids=True,
    ),
}
"""Name → layout. ``shapes`` is what :func:`tfmaskformer.data.shapes.write` writes."""
