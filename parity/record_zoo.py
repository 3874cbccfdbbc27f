"""Records the zoo's data (``checkpoints/entries``, ``datasets``, ``layouts``) from the official code, its YAML files and MODEL_ZOO.md.

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python -m parity.record_zoo checkpoints

The published values and links are read from the tables of MODEL_ZOO.md, configs through the official ``get_cfg`` and
``add_mask_former_config``, data sets from ``MetadataCatalog``, tensors from ``state_dict`` of the model that the official code builds.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import pathlib
import re
import sys
from typing import Any

from parity import official
from tfmaskformer.data import shapes

DATASETS = {
    "ade20k_sem_seg_train": "ade20k",
    "ade20k_panoptic_train": "ade20k_panoptic",
    "ade20k_full_sem_seg_train": "ade20k_full",
    "cityscapes_fine_sem_seg_train": "cityscapes",
    "cityscapes_fine_panoptic_train": "cityscapes_panoptic",
    "coco_2017_train_panoptic": "coco_panoptic",
    "coco_2017_train_stuff_10k_sem_seg": "coco_stuff_10k",
    "mapillary_vistas_sem_seg_train": "mapillary_vistas",
    "shapes_train": "shapes",
}
"""Official name of the training data set → the name in the registry."""

_RESNET = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32]
_SWIN = ["MODEL.SWIN.EMBED_DIM", 24, "MODEL.SWIN.DEPTHS", [2, 2, 2, 2], "MODEL.SWIN.NUM_HEADS", [2, 3, 4, 6], "MODEL.SWIN.WINDOW_SIZE", 5]
_HEAD = [
    *("MODEL.SEM_SEG_HEAD.MASK_DIM", 48, "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 80),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", 64, "MODEL.MASK_FORMER.DEC_LAYERS", 3),
]
_QUERIES = ["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 20]
TINY = {
    "tiny_panoptic": (
        "configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml",
        [*_RESNET, *_HEAD, *_QUERIES, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 64, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 2],
    ),
    "tiny_semantic": (
        "configs/cityscapes-19/maskformer_R101_bs16_90k.yaml",
        [*_RESNET, *_HEAD, *_QUERIES, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 96, "MODEL.RESNETS.DEPTH", 50],
    ),
    "tiny_deeplab": (
        "configs/cityscapes-19/maskformer_R101c_bs16_90k.yaml",
        [*_RESNET, *_HEAD, *_QUERIES, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 96, "MODEL.RESNETS.DEPTH", 50],
    ),
    "tiny_swin": (
        "configs/coco-panoptic/swin/maskformer_panoptic_swin_tiny_bs64_554k.yaml",
        [*_SWIN, *_HEAD, *_QUERIES, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 64],
    ),
    "tiny_per_pixel": (
        "configs/ade20k-150/per_pixel_baseline_R50_bs16_160k.yaml",
        [*_RESNET, "MODEL.SEM_SEG_HEAD.MASK_DIM", 48, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 64],
    ),
    "tiny_per_pixel_plus": (
        "configs/ade20k-150/per_pixel_baseline_plus_R50_bs16_160k.yaml",
        [*_RESNET, *_HEAD, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 64],
    ),
    "shapes_panoptic": (
        "configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml",
        [
            *("DATASETS.TRAIN", ["shapes_train"], "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7, "INPUT.MIN_SIZE_TEST", 0),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
            *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 64, "MODEL.SEM_SEG_HEAD.MASK_DIM", 32, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1),
            *("MODEL.MASK_FORMER.HIDDEN_DIM", 64, "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 128, "MODEL.MASK_FORMER.DEC_LAYERS", 3),
            *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 20, "MODEL.MASK_FORMER.DROPOUT", 0.0),
        ],
    ),
}
"""Test models: official architectures at small widths, dimensions distinct wherever the architecture allows. All but the last, which
``parity.train_shapes`` trains, have synthetic weights."""


def zoo_rows(model_zoo: str) -> list[dict[str, Any]]:
    """Rows of MODEL_ZOO.md's tables in their order: official config, published metrics, model id and link."""
    rows = []
    for table in re.findall(r"<table>.*?</table>", model_zoo, re.S):
        headers = [_text(header) for header in re.findall(r"<th .*?</th>", table, re.S)]
        for row in re.findall(r"<tr>.*?</tr>", table, re.S):
            cells = dict(zip(headers, re.findall(r"<td .*?</td>", row, re.S), strict=True))
            rows.append(
                {
                    "official_config": re.findall(r'href="([^"]*\.yaml)"', cells["Name"])[0],
                    "metrics": {name: float(_text(cells[name])) for name in ("mIoU", "mIoU (ms+flip)", "PQ") if name in cells},
                    "model_id": _text(cells["model id"]),
                    "url": re.findall(r'href="([^"]*\.pkl)"', cells["download"])[0],
                }
            )
    return rows


def _text(cell: str) -> str:
    return re.sub(r"<[^>]*>", "", cell.replace("<br/>", " ")).strip()


def config_fields(cfg: Any) -> dict[str, Any]:
    """The fields of ``MaskFormerConfig`` that an official config node determines; names and classes come from the registry."""
    model, mask_former, head = cfg.MODEL, cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD
    per_pixel = model.META_ARCHITECTURE == "SemanticSegmentor"
    return {
        "num_classes": head.NUM_CLASSES,
        "backbone": _backbone_fields(model),
        "head": head.NAME,
        "pixel_decoder": {
            "name": head.PIXEL_DECODER_NAME,
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "transformer_enc_layers": encoder_layers(cfg),
        },
        "predictor": {
            "transformer_in_feature": mask_former.TRANSFORMER_IN_FEATURE,
            "hidden_dim": mask_former.HIDDEN_DIM,
            "num_queries": mask_former.NUM_OBJECT_QUERIES,
            "nheads": mask_former.NHEADS,
            "dropout": mask_former.DROPOUT,
            "dim_feedforward": mask_former.DIM_FEEDFORWARD,
            "enc_layers": mask_former.ENC_LAYERS,
            "dec_layers": mask_former.DEC_LAYERS,
            "deep_supervision": mask_former.DEEP_SUPERVISION,
            "enforce_input_proj": mask_former.ENFORCE_INPUT_PROJ,
        },
        "criterion": {
            "no_object_weight": mask_former.NO_OBJECT_WEIGHT,
            "class_weight": 1.0,
            "dice_weight": mask_former.DICE_WEIGHT,
            "mask_weight": mask_former.MASK_WEIGHT,
            "loss_weight": head.LOSS_WEIGHT,
            "ignore_value": head.IGNORE_VALUE,
        },
        "test": {
            "panoptic_on": mask_former.TEST.PANOPTIC_ON,
            "object_mask_threshold": mask_former.TEST.OBJECT_MASK_THRESHOLD,
            "overlap_threshold": mask_former.TEST.OVERLAP_THRESHOLD,
            "sem_seg_postprocessing_before_inference": mask_former.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE,
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
        },
        # Detectron2's SemanticSegmentor asks the backbone; its ResNet has none.
        "size_divisibility": mask_former.SIZE_DIVISIBILITY if not per_pixel else 32 if "Swin" in model.BACKBONE.NAME else 0,
        "pixel_mean": list(model.PIXEL_MEAN),
        "pixel_std": list(model.PIXEL_STD),
    }


def encoder_layers(cfg: Any) -> int:
    """Encoder layers of the pixel decoder; the panoptic Swin configs inherit a number that their BasePixelDecoder does not read."""
    head = cfg.MODEL.SEM_SEG_HEAD
    return head.TRANSFORMER_ENC_LAYERS if head.PIXEL_DECODER_NAME == "TransformerEncoderPixelDecoder" else 0


def _backbone_fields(model: Any) -> dict[str, Any]:
    resnet, swin = model.RESNETS, model.SWIN
    if model.BACKBONE.NAME == "D2SwinTransformer":
        return {
            "name": "D2SwinTransformer",
            "embed_dim": swin.EMBED_DIM,
            "depths": list(swin.DEPTHS),
            "num_heads": list(swin.NUM_HEADS),
            "window_size": swin.WINDOW_SIZE,
            "mlp_ratio": swin.MLP_RATIO,
            "drop_rate": swin.DROP_RATE,
            "attn_drop_rate": swin.ATTN_DROP_RATE,
            "drop_path_rate": swin.DROP_PATH_RATE,
        }
    deeplab = model.BACKBONE.NAME == "build_resnet_deeplab_backbone"  # the plain builder reads neither stem type nor grid
    return {
        "name": "ResNet",
        "depth": resnet.DEPTH,
        "stem_type": resnet.STEM_TYPE if deeplab else "basic",
        "stem_out_channels": resnet.STEM_OUT_CHANNELS,
        "width_per_group": resnet.WIDTH_PER_GROUP,
        "res2_out_channels": resnet.RES2_OUT_CHANNELS,
        "res5_multi_grid": list(resnet.RES5_MULTI_GRID) if deeplab else [1, 1, 1],
    }


def dataset_fields(official_name: str) -> dict[str, Any]:
    """A data set's classes as the official metadata catalog has them (see ``checkpoints.registry.DatasetInfo``)."""
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets import builtin_meta

    metadata = MetadataCatalog.get(official_name)
    things = metadata.get("thing_dataset_id_to_contiguous_id", {})
    ids = {index: int(key) for table in (metadata.get("stuff_dataset_id_to_contiguous_id", {}), things) for key, index in table.items()}
    colors = metadata.get("stuff_colors")
    if official_name.startswith("cityscapes"):  # whose colors are in a table, not in the catalog
        colors = [category["color"] for category in builtin_meta.CITYSCAPES_CATEGORIES]
    return {
        "official_name": official_name,
        "class_names": list(metadata.stuff_classes),
        "thing_classes": sorted(things.values()),
        "colors": colors and [list(color) for color in colors],
        "dataset_ids": [ids[index] for index in sorted(ids)] or None,
        "ignore_label": metadata.get("ignore_label"),
    }


CLASSES = {
    "sem_seg_head.predictor.class_embed.": "classes+1",
    "criterion.empty_weight": "classes+1",
    "sem_seg_head.predictor.weight": "classes",
    "sem_seg_head.predictor.bias": "classes",
}
"""Beginning of a key whose first dimension counts classes → the symbol that stands for it in a layout."""


def layout_rows(model: Any, config: dict[str, Any]) -> list[list[Any]]:
    """(key, shape, dtype, kind) of every tensor in ``state_dict``; a dimension that counts classes is a symbol (:data:`CLASSES`)."""
    counts = {"classes": config["num_classes"], "classes+1": config["num_classes"] + 1}
    symbols = dict(CLASSES)
    if config["head"] == "PerPixelBaselinePlusHead":
        symbols["sem_seg_head.predictor.query_embed."] = "classes"
    parameters = {name for name, _ in model.named_parameters()}
    rows = []
    for key, tensor in model.state_dict().items():
        shape: list[Any] = list(tensor.shape)
        symbol = next((symbol for beginning, symbol in symbols.items() if key.startswith(beginning)), None)
        if symbol is not None:
            assert shape[0] == counts[symbol]
            shape[0] = symbol
        rows.append([key, shape, str(tensor.dtype).removeprefix("torch."), "parameter" if key in parameters else "buffer"])
    return rows


SWINS = {(96, 6): "T", (96, 18): "S", (128, 18): "B", (192, 18): "L"}
"""(embed_dim, blocks of the third stage) → the letter of its name."""

SUFFIXES = {"MaskFormerHead": "", "PerPixelBaselineHead": "_per_pixel", "PerPixelBaselinePlusHead": "_per_pixel_plus"}


def backbone_name(cfg: Any) -> str:
    """The model zoo's name of the backbone: R50, R101, R101c, Swin-T …"""
    if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer":
        return f"Swin-{SWINS.get((cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.DEPTHS[2]), 'tiny')}"
    return f"R{cfg.MODEL.RESNETS.DEPTH}" + "c" * (cfg.MODEL.BACKBONE.NAME == "build_resnet_deeplab_backbone")


def trained_metrics(name: str) -> dict[str, float]:
    """What was measured of a test model when it was trained; nothing where its weights are synthetic."""
    file = importlib.resources.files("checkpoints") / "small" / f"{name}.json"
    if not file.is_file():
        return {}
    results = json.loads(file.read_text(encoding="utf-8"))["validation"]
    return {"PQ": results[f"first_{shapes.VALIDATION_IMAGES}_images"]["all"]["pq"]}


def layout_name(cfg: Any) -> str:
    """Name of the architecture, which entries that differ only in their number of classes share."""
    encoder, backbone = encoder_layers(cfg), backbone_name(cfg)
    name = f"resnet{backbone[1:]}" if backbone.startswith("R") else backbone.lower().replace("-", "_")
    return name + (f"_encoder{encoder}" if encoder else "") + SUFFIXES[cfg.MODEL.SEM_SEG_HEAD.NAME]


def main(argv: list[str] | None = None) -> int:
    """Writes the three folders below the one given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=pathlib.Path, help="the package folder checkpoints/")
    destination = parser.parse_args(argv).destination
    code = official.load()
    how_made = f"python -m parity.record_zoo checkpoints, at facebookresearch/MaskFormer {code.commits['maskformer']}"

    rows: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
        (row, ()) for row in zoo_rows((code.maskformer / "MODEL_ZOO.md").read_text(encoding="utf-8"))
    ]
    rows += [
        ({"official_config": path, "name": name, "metrics": trained_metrics(name), "model_id": "", "url": ""}, tuple(options))
        for name, (path, options) in TINY.items()
    ]
    entries: dict[str, list[dict[str, Any]]] = {}
    layouts: dict[str, list[list[Any]]] = {}
    for order, (row, options) in enumerate(rows):
        cfg = code.config(code.maskformer / row["official_config"])
        cfg.merge_from_list(list(options))
        dataset = DATASETS[cfg.DATASETS.TRAIN[0]]
        name = row.get("name", pathlib.PurePosixPath(row["official_config"]).stem)
        item = {
            "order": order,
            "name": name,
            "task": "panoptic" if cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON else "semantic",
            "dataset": dataset,
            "backbone": backbone_name(cfg),
            "official_config": row["official_config"],
            "official_options": list(options),
            "model_id": row["model_id"],
            "metrics": row["metrics"],
            "url": row["url"],
            "file_hash": "".join(re.findall(r"model_final_([0-9a-f]{6})\.pkl$", row["url"])),
            "weights_license": "CC-BY-NC-4.0" if row["url"] else "Apache-2.0",
            "layout": layout_name(cfg) if row["url"] else name,
            "config": config_fields(cfg),
        }
        entries.setdefault(dataset if row["url"] else "tiny", []).append(item)
        if item["layout"] not in layouts:
            layouts[item["layout"]] = layout_rows(code.model(cfg), item["config"])

    for name, items in entries.items():
        _write(destination / "entries" / f"{name}.json", {"how_made": how_made, "entries": items}, 2)
    for official_name, name in DATASETS.items():
        _write(destination / "datasets" / f"{name}.json", {"how_made": how_made, **dataset_fields(official_name)}, 0)
    for name, tensors in layouts.items():
        _write(destination / "layouts" / f"{name}.json", {"how_made": how_made, "tensors": tensors}, 1)
    return 0


def _write(path: pathlib.Path, value: dict[str, Any], depth: int) -> None:
    """JSON with one line for each item of the lists at ``depth`` levels, so that differences read well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(value, depth, "") + "\n", encoding="utf-8")


def _lines(value: Any, depth: int, indent: str) -> str:
    if not isinstance(value, dict | list) or not value or depth < 0:
        return json.dumps(value, ensure_ascii=False)
    pairs = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    inner = indent + "  "
    items = [inner + (f"{json.dumps(key)}: " if key is not None else "") + _lines(item, depth - 1, inner) for key, item in pairs]
    left, right = "{}" if isinstance(value, dict) else "[]"
    return left + "\n" + ",\n".join(items) + "\n" + indent + right


if __name__ == "__main__":
    sys.exit(main())
