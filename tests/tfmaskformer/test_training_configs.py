"""``tfmaskformer train`` by official configs for ADE20K: a per-pixel baseline from weights of a backbone, YAML files as they are, panoptic.

Each takes two steps on a generated data set in its official layout and is evaluated. test_training_loop.py has ``detr_panoptic``.
"""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import tensorflow as tf

from checkpoints import registry
from parity.record_init import init_layout
from tests.tfmaskformer import training_processes
from tfmaskformer.checkpoint import checkpoint_key, read_config
from tfmaskformer.data import generated
from tfmaskformer.data.datasets import open_dataset
from tfmaskformer.data.training import training_dataset
from tfmaskformer.official_yaml import read_tree
from tfmaskformer.training import cli

QUICK = {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 2, "SOLVER.OPTIMIZER": "SGD"}
SIZES = {
    "INPUT.MIN_SIZE_TRAIN": "(64, 80)",
    "INPUT.CROP.SIZE": "(64, 64)",
    "INPUT.SIZE_DIVISIBILITY": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
}
SWIN = {key: value for key, value in training_processes.OPTIONS.items() if key.startswith("MODEL.") and "NUM_CLASSES" not in key}


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture
def train(tmp_path, capsys):
    """Trains on three images of a data set and evaluates one; the run's folder, its metrics, and the loss of each step."""

    def train(config, dataset, options, *more):
        for split, count in (("train", 3), ("val", 1)):
            generated.write(dataset, tmp_path / "data", split, count)
        out = tmp_path / "run"
        pairs = [str(part) for item in options.items() for part in item]
        command = ["--config", str(config), "--data", str(tmp_path / "data"), "--out", str(out), "--cpu", *more, *pairs]
        assert cli.main(command) == cli.OK
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
        losses = [float(line.split("total_loss ")[1].split(",")[0]) for line in told]
        assert len(losses) == 2
        return out, json.loads((out / "evaluation-2.json").read_text())["metrics"], losses

    return train


def test_a_per_pixel_baseline_from_the_weights_of_a_backbone(train, tmp_path):
    """The file is one as the official recipes begin with. At a rate of 1e-9 what is saved is what was read."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in init_layout(registry.entry("tiny_per_pixel")).items():
        scale = float(np.prod(shape[1:])) ** -0.5
        tensors[name] = rng.standard_normal(shape, np.float32) * scale if len(shape) == 4 else rng.random(shape, np.float32) + 0.5
    file = tmp_path / "R-50.pkl"
    file.write_bytes(pickle.dumps({"model": tensors, "__author__": "torchvision", "matching_heuristics": True}))
    small = {"MODEL.RESNETS.STEM_OUT_CHANNELS": 8, "MODEL.RESNETS.WIDTH_PER_GROUP": 8, "MODEL.RESNETS.RES2_OUT_CHANNELS": 32}
    options = QUICK | SIZES | small | {"MODEL.SEM_SEG_HEAD.CONVS_DIM": 32, "MODEL.SEM_SEG_HEAD.MASK_DIM": 16, "SOLVER.BASE_LR": 1e-9}
    out, metrics, losses = train("per_pixel_baseline_R50_bs16_160k", "ade20k", options, "--init", str(file))
    assert (read_config(out).head, read_config(out).num_classes) == ("PerPixelBaselineHead", 150)
    assert losses == pytest.approx([np.log(150)] * 2, rel=0.2)  # of pixels' classes, before anything was learnt
    assert metrics["semantic"]["miou"] is not None
    assert json.loads((out / "run.json").read_text())["init"] == str(file)
    reader = tf.train.load_checkpoint(str(out))
    for name, tensor in tensors.items():
        if not name.startswith("stem.fc."):
            expected = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor
            np.testing.assert_allclose(reader.get_tensor(checkpoint_key(f"backbone.{name}")), expected, atol=1e-6, err_msg=name)


BASE = """
MODEL:
  BACKBONE:
    FREEZE_AT: 0
    NAME: "D2SwinTransformer"
  WEIGHTS: "swin_tiny_patch4_window7_224.pkl"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  SWIN:
    EMBED_DIM: 12
    DEPTHS: [1, 1, 1, 1]
    NUM_HEADS: [2, 3, 4, 6]
    WINDOW_SIZE: 3
    APE: False
    DROP_PATH_RATE: 0.3
    PATCH_NORM: True
SOLVER:
  BASE_LR: 0.0001
  WARMUP_FACTOR: 1e-6
  WARMUP_ITERS: 1500
  WEIGHT_DECAY: 0.01
  WEIGHT_DECAY_NORM: 0.0
  WEIGHT_DECAY_EMBED: 0.0
  OPTIMIZER: "ADAMW"
  LR_SCHEDULER_NAME: "WarmupPolyLR"
  BACKBONE_MULTIPLIER: 1.0
  CLIP_GRADIENTS:
    ENABLED: True
    CLIP_TYPE: "full_model"
    CLIP_VALUE: 0.01
    NORM_TYPE: 2.0
VERSION: 2
"""
ADE = """
_BASE_: ../Base-Small.yaml
DATASETS:
  TRAIN: ("ade20k_sem_seg_train",)
  TEST: ("ade20k_sem_seg_val",)
SOLVER:
  IMS_PER_BATCH: 16
  MAX_ITER: 160000
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 64) for x in range(10, 13)]"]
  MIN_SIZE_TRAIN_SAMPLING: "choice"
  MIN_SIZE_TEST: 64
  MAX_SIZE_TRAIN: 256
  MAX_SIZE_TEST: 96
  CROP:
    ENABLED: True
    TYPE: "absolute"
    SIZE: (64, 64)
    SINGLE_CATEGORY_MAX_AREA: 1.0
  COLOR_AUG_SSD: True
  SIZE_DIVISIBILITY: 64  # used in dataset mapper
  FORMAT: "RGB"
  DATASET_MAPPER_NAME: "mask_former_semantic"
TEST:
  EVAL_PERIOD: 2
  AUG:
    ENABLED: False
    MIN_SIZES: [32, 64]
    MAX_SIZE: 96
    FLIP: True
"""
MODEL = """
_BASE_: Base-ADE20K.yaml
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
    IGNORE_VALUE: 255
    NUM_CLASSES: 150
    COMMON_STRIDE: 4  # not used, hard-coded
    CONVS_DIM: 32
    MASK_DIM: 16
    NORM: "GN"
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: "res5"
    DEEP_SUPERVISION: True
    HIDDEN_DIM: 32
    NUM_OBJECT_QUERIES: 10
    NHEADS: 4
    DIM_FEEDFORWARD: 32
    ENC_LAYERS: 0
    DEC_LAYERS: 1
    PRE_NORM: False
"""


def test_official_yaml_files_as_they_are(train, tmp_path):
    """A file, its base, and the base of that, written as upstream writes them; with the mapper ``mask_former_semantic``."""
    (tmp_path / "configs" / "ade").mkdir(parents=True)
    for name, text in (("Base-Small", BASE), ("ade/Base-ADE20K", ADE), ("ade/maskformer_small", MODEL)):
        (tmp_path / "configs" / f"{name}.yaml").write_text(text)
    file = tmp_path / "configs" / "ade" / "maskformer_small.yaml"
    out, metrics, losses = train(file, "ade20k", {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.MAX_ITER": 2})
    saved, config = read_tree(out / "config.yaml"), read_config(out)
    assert saved["INPUT"]["MIN_SIZE_TRAIN"] == (64, 70, 76)
    assert (saved["SOLVER"]["WEIGHT_DECAY"], saved["SOLVER"]["WARMUP_FACTOR"], saved["SOLVER"]["MAX_ITER"]) == (0.01, 1e-6, 2)
    assert (config.name, config.num_classes, config.backbone.embed_dim) == ("maskformer_small", 150, 12)
    assert 3 < losses[0] < 10
    assert metrics["semantic"]["miou"] is not None
    assert metrics.get("panoptic") is None


def test_panoptic_ade20k(train, tmp_path):
    """``mask_former_panoptic``, with more objects in an image than there is room for."""
    options = QUICK | SIZES | SWIN | {"MODEL.MASK_FORMER.DEC_LAYERS": 1, "MODEL.BACKBONE.NAME": "D2SwinTransformer"}
    out, metrics, _ = train("maskformer_panoptic_R50_bs16_720k", "ade20k_panoptic", options, "--max-objects", "2")
    assert read_config(out).num_classes == 150
    assert 0 <= metrics["panoptic"]["all"]["pq"] <= 100
    dropped = [
        value.simple_value
        for file in (out / "events").iterdir()
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
        for value in tf.compat.v1.Event.FromString(record).summary.value
        if value.tag == "dropped_objects"
    ]
    dataset = open_dataset("ade20k_panoptic", tmp_path / "data", "train")
    batches = training_dataset(read_tree(out / "config.yaml"), dataset, seed=0, batch=2, max_objects=2).take(2)
    assert dropped == [int(sum(batch["dropped"])) for batch in batches]
    assert sum(dropped) > 2
