"""The zoo's data: complete, strict, and the same as the model's own tree."""

from __future__ import annotations

import collections
import importlib.resources
import json
import re

import pytest

from checkpoints import registry

TINY = ("tiny_panoptic", "tiny_semantic")
NAMES = [entry.name for entry in registry.entries()]

# Millions of parameters in the paper (arXiv 2107.06278, tables 1, 2, 3 and appendix), to the digit printed.
PAPER_PARAMETERS_M = {
    "maskformer_R50_bs16_160k": 41,
    "maskformer_R101_bs16_160k": 60,
    "maskformer_R101_bs16_90k": 60,
    "maskformer_panoptic_R50_bs64_554k": 45,
    "maskformer_panoptic_R101_bs64_554k": 64,
}


def test_covers_every_maskformer_with_a_basic_stem_resnet():
    counts = collections.Counter((entry.dataset, entry.backbone) for entry in registry.entries())
    assert counts == {
        ("ade20k", "R50"): 1,
        ("ade20k", "R101"): 1,
        ("ade20k_full", "R50"): 1,
        ("ade20k_full", "R101"): 1,
        ("ade20k_panoptic", "R50"): 1,
        ("ade20k_panoptic", "R101"): 1,
        ("cityscapes", "R101"): 1,
        ("coco_panoptic", "R50"): 1,
        ("coco_panoptic", "R101"): 1,
        ("coco_stuff_10k", "R50"): 1,
        ("coco_stuff_10k", "R101"): 1,
        ("mapillary_vistas", "R50"): 1,
    }


@pytest.mark.parametrize("name", NAMES)
def test_entry_is_complete(name):
    entry = registry.entry(name)
    assert entry.official_config.endswith(f"/{name}.yaml")
    assert re.fullmatch(r"[0-9a-f]{6}", entry.file_hash)
    assert entry.url == f"https://dl.fbaipublicfiles.com/maskformer/{entry.url.split('/')[4]}/{name}/model_final_{entry.file_hash}.pkl"
    assert re.fullmatch(r"\d{8}(_\d+)?", entry.model_id)
    semantic = {"mIoU"} if entry.dataset == "ade20k_full" else {"mIoU", "mIoU (ms+flip)"}
    assert set(entry.metrics) == ({"PQ"} if entry.task == "panoptic" else semantic)
    assert all(0 < value < 100 for value in entry.metrics.values())
    assert entry.weights_license == "CC-BY-NC-4.0"
    assert not entry.official_options


@pytest.mark.parametrize("name", [*NAMES, *TINY])
def test_config_has_the_classes_of_its_data_set(name):
    entry = registry.entry(name)
    info = registry.dataset(entry.dataset)
    assert entry.config["class_names"] == list(info.class_names)
    assert entry.config["thing_classes"] == list(info.thing_classes)
    assert entry.config["num_classes"] == len(info.class_names)
    assert bool(info.thing_classes) == entry.config["test"]["panoptic_on"] == (entry.task == "panoptic")
    assert json.loads(json.dumps(entry.config)) == entry.config


@pytest.mark.parametrize(
    ("name", "classes", "things", "ignore_label"),
    [
        ("ade20k", 150, 0, 255),
        ("ade20k_full", 847, 0, 65535),
        ("ade20k_panoptic", 150, 100, 255),
        ("cityscapes", 19, 0, 255),
        ("coco_panoptic", 133, 80, 255),
        ("coco_stuff_10k", 171, 0, 255),
        ("mapillary_vistas", 65, 0, 65),
    ],
)
def test_dataset(name, classes, things, ignore_label):
    info = registry.dataset(name)
    assert (len(info.class_names), len(info.thing_classes), info.ignore_label) == (classes, things, ignore_label)
    assert info.colors is None or len(info.colors) == classes
    assert info.dataset_ids is None or len(set(info.dataset_ids)) == classes
    assert all(0 <= index < classes for index in info.thing_classes)


def test_coco_ids_have_the_gaps_of_coco():
    info = registry.dataset("coco_panoptic")
    assert info.thing_classes == tuple(range(80))
    assert info.dataset_ids[:80][-1] == 90
    assert info.dataset_ids[-1] == 200
    assert info.class_names[info.dataset_ids.index(200)] == "rug-merged"


@pytest.mark.parametrize(("name", "millions"), PAPER_PARAMETERS_M.items())
def test_parameters_are_as_many_as_in_the_paper(name, millions):
    assert round(registry.entry(name).num_parameters / 1e6) == millions


@pytest.mark.parametrize("name", [*NAMES, *TINY])
def test_layout_is_what_the_architecture_adds_up_to(name):
    """Counts by hand: convolutions × 5 tensors in the backbone, pixel decoder, encoder and decoder layers, heads."""
    entry = registry.entry(name)
    layout = registry.layout(entry)
    config = entry.config
    blocks = {50: 16, 101: 33}[config["backbone"]["depth"]]
    backbone_convolutions = 1 + 3 * blocks + 4
    encoder = config["pixel_decoder"]["transformer_enc_layers"]
    decoder = config["predictor"]["dec_layers"]
    # 3 adapters and 4 layers with a norm, mask_features; with an encoder also input_proj, without one the predictor's.
    pixel_decoder = 3 * 7 + 2 + 2
    heads = 1 + 2 + 6
    expected = 5 * backbone_convolutions + pixel_decoder + 12 * encoder + 18 * decoder + 2 + heads + 1
    assert len(layout) == expected
    assert {spec.dtype for spec in layout.values()} == {"float32"}
    buffers = {key for key, spec in layout.items() if spec.kind == "buffer"}
    assert buffers == {key for key in layout if key.startswith("backbone.") and ".norm." in key} | {"criterion.empty_weight"}
    hidden = config["predictor"]["hidden_dim"]
    assert layout["sem_seg_head.predictor.query_embed.weight"].shape == (config["predictor"]["num_queries"], hidden)
    assert layout["sem_seg_head.predictor.class_embed.weight"].shape == (config["num_classes"] + 1, hidden)


@pytest.mark.parametrize("name", [*NAMES, *TINY])
def test_layout_is_the_models_own_tree(name):
    """The same names as the TensorFlow model declares, but for the criterion's buffer; the same number of elements and kind."""
    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import parameter_specs

    entry = registry.entry(name)
    specs = parameter_specs(MaskFormer(MaskFormerConfig.from_dict(entry.config)))
    layout = registry.layout(entry)
    empty_weight = layout.pop("criterion.empty_weight")
    assert empty_weight.shape == (entry.config["num_classes"] + 1,)
    assert specs.keys() == layout.keys()
    for key, spec in layout.items():
        assert sorted(specs[key].shape) == sorted(spec.shape), key
        assert specs[key].trainable == (spec.kind == "parameter"), key


def test_v1_keys_differ_only_in_the_pixel_decoder():
    layout = registry.layout(registry.entry("tiny_panoptic"))
    v1 = {registry.v1_key(key): key for key in layout}
    assert len(v1) == len(layout)
    moved = {key for new, key in v1.items() if new != key}
    assert moved == {key for key in layout if key.startswith("sem_seg_head.pixel_decoder.")}
    assert not any("pixel_decoder" in key for key in v1)


def test_unknown_entry_names_the_nearest():
    with pytest.raises(
        registry.ZooError, match=r"no zoo entry 'maskformer_panoptic_r50_bs64_554'\n  nearest: maskformer_panoptic_R50_bs64_554k"
    ):
        registry.entry("maskformer_panoptic_r50_bs64_554")


def test_unknown_dataset():
    with pytest.raises(registry.ZooError, match="no data set 'coco'; known: ade20k"):
        registry.dataset("coco")


def test_data_is_what_the_official_code_says(official_sources, tmp_path):
    from parity import record_zoo

    assert record_zoo.main([str(tmp_path)]) == 0
    package = importlib.resources.files("checkpoints")
    for folder in ("entries", "datasets", "layouts"):
        recorded = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / folder).iterdir()}
        committed = {file.name: file.read_text(encoding="utf-8") for file in (package / folder).iterdir()}
        assert recorded == committed
