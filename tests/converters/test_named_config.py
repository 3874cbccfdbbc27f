"""What ``--config`` accepts, and that a hostile file ends in exit code 2."""

from __future__ import annotations

import json

import pytest

from checkpoints import registry
from converters import cli
from converters.errors import ConversionError
from converters.named_config import named_config
from tfmaskformer.config import MaskFormerConfig

BASE = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: MaskFormer
  BACKBONE: {NAME: build_resnet_backbone, FREEZE_AT: 0}
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  RESNETS: {STRIDE_IN_1X1: false, OUT_FEATURES: [res2, res3, res4, res5], STEM_OUT_CHANNELS: 8, WIDTH_PER_GROUP: 8, RES2_OUT_CHANNELS: 32}
  SEM_SEG_HEAD: {NAME: MaskFormerHead, IN_FEATURES: [res2, res3, res4, res5], NUM_CLASSES: 133, CONVS_DIM: 64, MASK_DIM: 48}
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: transformer_encoder
    HIDDEN_DIM: 64
    NUM_OBJECT_QUERIES: 20
    DIM_FEEDFORWARD: 80
    DEC_LAYERS: 3
    SIZE_DIVISIBILITY: 0
    TEST: {PANOPTIC_ON: true, OBJECT_MASK_THRESHOLD: 0.8, OVERLAP_THRESHOLD: 0.8}
DATASETS:
  TRAIN: ("coco_2017_train_panoptic",)
INPUT:
  FORMAT: RGB
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 21)]"]
"""
ENCODER = "_BASE_: base.yaml\nMODEL: {SEM_SEG_HEAD: {PIXEL_DECODER_NAME: TransformerEncoderPixelDecoder, TRANSFORMER_ENC_LAYERS: 2}}"


@pytest.fixture
def yaml_file(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "tiny_panoptic.yaml").write_text(ENCODER)
    return tmp_path / "tiny_panoptic.yaml"


def test_zoo_entry_json_and_yaml_give_the_same(tiny, yaml_file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.config))
    expected = MaskFormerConfig.from_dict(tiny.config)
    assert named_config("tiny_panoptic") == named_config(str(tmp_path / "config.json")) == named_config(str(yaml_file)) == expected


def test_convert_takes_settings_from_an_official_yaml_file(tensors, checkpoint_file, yaml_file, tmp_path, tiny):
    assert cli.main(["--src", str(checkpoint_file(tensors)), "--dst", str(tmp_path / "out"), "--config", str(yaml_file)]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert MaskFormerConfig.from_dict(config) == MaskFormerConfig.from_dict(tiny.config)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["model"]["origins"]["predictor.nheads"] == "config tiny_panoptic"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evil.yaml", b"x: !!python/object/apply:os.system ['touch was-run']", "'!!python/object/apply:os.system' is not read"),
        ("evil.yaml", b'x: !!python/object/apply:eval [\'__import__("os").system("touch was-run")\']', "which is not read"),
        ("evil.yml", b"\xff\xfe", "no UTF-8 text"),
        ("other.yaml", BASE.replace("build_resnet_backbone", "build_mobilenet").encode(), "'MODEL.BACKBONE.NAME' is 'build_mobilenet'"),
        ("evil.json", b"[" * 100_000, "is no config"),
        ("list.json", b"[1]", "must be a mapping, got list"),
    ],
)
def test_what_is_no_config_ends_in_exit_code_2(name, content, message, tensors, checkpoint_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    source = checkpoint_file(tensors)
    assert cli.main(["--src", str(source), "--dst", "out", "--config", name]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.startswith("error: ")
    assert not told.out
    assert {path.name for path in tmp_path.iterdir()} == {name, source.name}


@pytest.mark.parametrize("name", ["none.yaml", "none.json", "maskformer_R50_bs16_160"])
def test_missing_configs_are_told(name):
    with pytest.raises(ConversionError, match=r"does not exist|cannot read the config|no zoo entry"):
        named_config(name)


def test_every_entry_is_a_config():
    for entry in registry.entries():
        assert named_config(entry.name).name == entry.name
