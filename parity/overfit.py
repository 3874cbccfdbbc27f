"""Trains a narrow MaskFormer in TensorFlow on a few photographs of COCO, from scratch, until it knows them by heart.

    OMP_NUM_THREADS=1 python -m parity.overfit --sample coco_sample --out runs/photos

The folder ``--sample`` has ``images/*.jpg``, ``panoptic/*.png`` and ``panoptic.json`` in COCO's format. Training is that of ``tfmaskformer
train``; the recipe is in :data:`OPTIONS`. Evaluations are those of ``tfmaskformer eval``, at the photographs' own size. A file ``OUT.json``
tells them, and what the ground truth itself would reach with masks as coarse as the model's.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.data.datasets import DataSet
    from tfmaskformer.evaluation.panoptic import Quality

CONFIG = "maskformer_panoptic_R50_bs64_554k"

OPTIONS: dict[str, Any] = {
    "INPUT.CROP.ENABLED": False,
    "INPUT.MIN_SIZE_TRAIN": (0,),
    "INPUT.MIN_SIZE_TEST": 0,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 64,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 64,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 64,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 128,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 50,
    "MODEL.MASK_FORMER.DROPOUT": 0.0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
    "SOLVER.BASE_LR": 1e-3,
    "SOLVER.BACKBONE_MULTIPLIER": 1.0,
    "SOLVER.WARMUP_ITERS": 100,
    "SOLVER.WARMUP_FACTOR": 0.01,
    "SOLVER.CHECKPOINT_PERIOD": 250,
    "TEST.EVAL_PERIOD": 500,
}
"""Learning rate, schedule and nearly the widths of the small model of docs/shapes.md, with more queries. Photographs at their own size, and
no augmentation but the mirroring that official mappers cannot do without."""

STEPS = 3000


def lay_out(sample: pathlib.Path, destination: pathlib.Path) -> None:
    """Links the files of ``sample`` into ``destination``, where the official code expects those of COCO, as both splits."""
    for split in ("train", "val"):
        for place, file in (
            (f"{split}2017", "images"),
            (f"panoptic_{split}2017", "panoptic"),
            (f"annotations/panoptic_{split}2017.json", "panoptic.json"),
        ):
            link = destination / "coco" / place
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to((sample / file).resolve())


def limit(dataset: DataSet, config: MaskFormerConfig) -> dict[str, Quality]:
    """Panoptic quality of the ground truth itself, with masks as coarse as the model's.

    Each mask is averaged over the 4×4 px that an element of the model's masks stands for, and then goes through the model's own
    post-processing.
    """
    from PIL import Image

    from tfmaskformer.evaluation.panoptic import PanopticQuality
    from tfmaskformer.inference import MASK_STRIDE, panoptic_inference

    quality = PanopticQuality(config.num_classes, config.thing_classes)
    for sample in dataset.samples():
        truth = sample.panoptic_seg
        assert truth is not None
        segments = sample.segments_info  # crowds too: what is found in them does not count, but other masks stay off them
        rows, columns = (-(-length // MASK_STRIDE) for length in truth.shape)
        masks = [Image.fromarray((truth == segment["id"]).astype(np.float32)) for segment in segments]
        coarse = np.stack([np.asarray(mask.resize((columns, rows), Image.Resampling.BOX)) for mask in masks])
        logits = np.zeros((len(segments), config.num_classes + 1), np.float32)
        logits[np.arange(len(segments)), [segment["category_id"] for segment in segments]] = 20  # sure of all classes
        outputs = {"pred_logits": logits[np.newaxis], "pred_masks": 8 * coarse[np.newaxis] - 4}  # in float32 no two become 1
        [found] = panoptic_inference(outputs, config, [truth.shape])
        quality.update(truth, sample.segments_info, *found)
    return quality.result()


def main(argv: list[str] | None = None) -> int:
    """Trains, and writes what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=pathlib.Path, required=True, metavar="DIR", help="photographs and their panoptic ground truth")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="of the training")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"default: {STEPS}; 0: the limit alone")
    arguments = parser.parse_args(argv)
    from parity.train_shapes_tensorflow import write_initial
    from tfmaskformer.data.datasets import open_dataset
    from tfmaskformer.official_config import config_of, named_tree
    from tfmaskformer.official_yaml import override
    from tfmaskformer.training import cli

    data, initial = (arguments.out.with_name(f"{arguments.out.name}.{name}") for name in ("data", "initial"))
    lay_out(arguments.sample, data)
    dataset = open_dataset("coco_panoptic", data, "train")
    options = OPTIONS | {"SOLVER.MAX_ITER": arguments.steps}
    _, tree = named_tree(CONFIG)
    override(tree, [part for option in options.items() for part in option])
    config = config_of(tree, CONFIG)
    if arguments.steps:
        samples = list(dataset.samples())
        write_initial(config, [sample.image for sample in samples], 0, initial)
        canvas = np.max([sample.image.shape[:2] for sample in samples], axis=0)
        objects = max(sum(not segment["iscrowd"] for segment in sample.segments_info) for sample in samples)
        command = ["--config", CONFIG, "--data", str(data), "--init", str(initial), "--out", str(arguments.out), "--cpu"]
        command += ["--canvas", *map(str, canvas), "--max-objects", str(objects)]
        if code := cli.main([*command, *(str(part) for option in options.items() for part in option)]):
            return code

    def percent(values: dict[str, Any]) -> dict[str, dict[str, float]]:
        return {group: {key: round(value[key], 2) for key in ("pq", "sq", "rq")} for group, value in values.items()}

    evaluations = {}
    for file in arguments.out.glob("evaluation-*.json"):
        panoptic = json.loads(file.read_text(encoding="utf-8"))["metrics"]["panoptic"]
        evaluations[int(file.stem.partition("-")[2])] = percent({group: panoptic[group] for group in ("all", "things", "stuff")})
    most = {group: {key: 100 * value for key, value in quality._asdict().items()} for group, quality in limit(dataset, config).items()}
    result: dict[str, Any] = {
        "steps": arguments.steps,
        "options": options,
        "evaluations": dict(sorted(evaluations.items())),
        "limit": percent(most),
    }
    arguments.out.with_name(f"{arguments.out.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, quality in [*result["evaluations"].items(), ("ground truth", result["limit"])]:
        print(f"{name}: PQ {quality['all']['pq']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
