"""The zoo's data: complete, strict, and the same as the model's own tree."""

from __future__ import annotations

import collections
import importlib.resources
import json
import re

import pytest

from checkpoints import registry

TINY = ("tiny_panoptic", "tiny_semantic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel", "tiny_per_pixel_plus", "shapes_panoptic")
NAMES = [entry.name for entry in registry.entries()]

# Millions of parameters in the paper (arXiv 2107.06278, tables 1, 2, 3 and appendix), to the digit printed.
PAPER_PARAMETERS_M = {
    "maskformer_R50_bs16_160k": 41,
    "maskformer_R101_bs16_160k": 60,
    "maskformer_R101_bs16_90k": 60,
    "maskformer_panoptic_R50_bs64_554k": 45,
    "maskformer_panoptic_R101_bs64_554k": 64,
    "maskformer_R101c_bs16_160k": 60,
    "maskformer_swin_tiny_bs16_160k": 42,
    "maskformer_swin_small_bs16_160k": 63,
    "maskformer_swin_base_IN21k_384_bs16_160k_res640": 102,
    "maskformer_swin_large_IN21k_384_bs16_160k_res640": 212,
    "maskformer_panoptic_swin_tiny_bs64_554k": 42,
    "maskformer_panoptic_swin_small_bs64_554k": 63,
    "maskformer_panoptic_swin_base_IN21k_384_bs64_554k": 102,
    "maskformer_panoptic_swin_large_IN21k_384_bs64_554k": 212,
}


def test_covers_all_thirty():
    per_pixel = {"R50": 1, "R50 per pixel": 1, "R50 per pixel plus": 1}
    swin = {"Swin-T": 1, "Swin-S": 1, "Swin-B": 1, "Swin-L": 1}
    heads = {"MaskFormerHead": "", "PerPixelBaselineHead": " per pixel", "PerPixelBaselinePlusHead": " per pixel plus"}
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for entry in registry.entries():
        counts[entry.dataset][entry.backbone + heads[entry.config["head"]]] += 1
    assert counts == {
        "ade20k": {**per_pixel, "R101": 1, "R101c": 1, **swin},
        "ade20k_full": {**per_pixel, "R101": 1, "R101c": 1},
        "ade20k_panoptic": {"R50": 1, "R101": 1},
        "cityscapes": {"R101": 1, "R101c": 1},
        "coco_panoptic": {"R50": 1, "R101": 1, **swin},
        "coco_stuff_10k": {**per_pixel, "R101": 1, "R101c": 1},
        "mapillary_vistas": {"R50": 1},
    }
    assert sum(counter.total() for counter in counts.values()) == 30


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
        ("shapes", 7, 4, 255),
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
    backbone, buffers = count_resnet(config["backbone"]) if config["backbone"]["name"] == "ResNet" else count_swin(config["backbone"])
    encoder = config["pixel_decoder"]["transformer_enc_layers"]
    # 3 adapters and 4 layers with a norm, mask_features; with an encoder also input_proj, without one the predictor's.
    expected = backbone + 3 * 7 + 2 + 12 * encoder
    if config["head"] == "PerPixelBaselineHead":
        expected += 2
    else:
        expected += 2 + 18 * config["predictor"]["dec_layers"] + 2 + 1 + 6
    if config["head"] == "MaskFormerHead":
        expected += 2 + 1  # class_embed, empty_weight
        buffers |= {"criterion.empty_weight"}
    assert len(layout) == expected
    assert {key for key, spec in layout.items() if spec.kind == "buffer"} == buffers
    assert {spec.dtype for key, spec in layout.items() if not key.endswith("relative_position_index")} == {"float32"}
    if config["head"] == "PerPixelBaselineHead":
        assert layout["sem_seg_head.predictor.weight"].shape == (config["num_classes"], config["pixel_decoder"]["mask_dim"], 1, 1)
        return
    hidden = config["predictor"]["hidden_dim"]
    assert layout["sem_seg_head.predictor.query_embed.weight"].shape == (config["predictor"]["num_queries"], hidden)
    if config["head"] == "MaskFormerHead":
        assert layout["sem_seg_head.predictor.class_embed.weight"].shape == (config["num_classes"] + 1, hidden)


def count_resnet(backbone):
    """Number of tensors, and the names of the buffers: the norm behind each convolution has four, all of them frozen."""
    blocks = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[backbone["depth"]]
    stem = {"basic": ["stem.conv1"], "deeplab": ["stem.conv1", "stem.conv2", "stem.conv3"]}[backbone["stem_type"]]
    stages = [f"res{stage}.{block}" for stage, number in enumerate(blocks, start=2) for block in range(number)]
    convolutions = stem + [f"{block}.{conv}" for block in stages for conv in ("conv1", "conv2", "conv3")]
    convolutions += [f"res{stage}.0.shortcut" for stage in (2, 3, 4, 5)]
    statistics = ("weight", "bias", "running_mean", "running_var")
    return 5 * len(convolutions), {f"backbone.{conv}.norm.{name}" for conv in convolutions for name in statistics}


def count_swin(backbone):
    """Patch embedding 2 + 2; a block 13 and an index, which is no parameter; three mergings of 3; four norms of 2."""
    blocks = [f"backbone.layers.{stage}.blocks.{block}" for stage, depth in enumerate(backbone["depths"]) for block in range(depth)]
    return 4 + 14 * len(blocks) + 3 * 3 + 4 * 2, {f"{block}.attn.relative_position_index" for block in blocks}


@pytest.mark.parametrize("name", [*NAMES, *TINY])
def test_layout_is_the_models_own_tree(name):
    """The same names as the TensorFlow model declares, but for what follows from the config; the same number of elements and kind."""
    from tfmaskformer.config import MaskFormerConfig
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import parameter_specs

    entry = registry.entry(name)
    specs = parameter_specs(MaskFormer(MaskFormerConfig.from_dict(entry.config)))
    layout = registry.layout(entry)
    if entry.config["head"] == "MaskFormerHead":
        assert layout.pop("criterion.empty_weight").shape == (entry.config["num_classes"] + 1,)
    layout = {key: spec for key, spec in layout.items() if not key.endswith("relative_position_index")}
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
