"""Weights of a backbone → a model to train: what the official loader fills is filled, and everything else is at its initial value."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tfmaskformer
from checkpoints import registry
from converters import cli
from converters.convert import parameter_specs_of
from converters.errors import ConversionError
from converters.init import initial_values, initialize
from converters.rules import plan
from converters.tables import init as table
from converters.transforms import CONV2D, IDENTITY, LINEAR
from parity.record_init import TINY, init_layout
from tfmaskformer.checkpoint import checkpoint_key
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.module import named_variables

TRANSFORMS = {transform.name: transform for transform in (IDENTITY, LINEAR, CONV2D)}
OFFICIAL = json.loads((Path(__file__).parent.parent / "golden" / "init_checkpoints.json").read_text())["entries"]
"""What Detectron2's matching by suffix does with such a file, for each entry of the zoo."""

ONE_PER_LAYOUT = {entry.layout: entry.name for entry in map(registry.entry, OFFICIAL)}.values()


def config_of(entry):
    return MaskFormerConfig.from_dict(entry.config)


def file_tensors(entry, seed=0):
    """A file in the published layout: Detectron2's for ResNets, that of Swin's authors."""
    generator = np.random.default_rng(seed)
    tensors = {name: generator.standard_normal(shape, np.float32) for name, shape in init_layout(entry).items()}
    for name in tensors:
        if name.endswith(".relative_position_index"):
            tensors[name] = registry.relative_position_index(entry.config["backbone"]["window_size"])
    return tensors


@pytest.fixture
def init_file(tmp_path):
    def write(tensors, name="init.pkl"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps({"model": tensors, "__author__": "torchvision", "matching_heuristics": True}))
        return path

    return write


def variables_of(directory):
    reader = tf.train.load_checkpoint(str(directory))
    return lambda name: reader.get_tensor(checkpoint_key(name))


@pytest.mark.parametrize("name", ONE_PER_LAYOUT)
def test_the_map_is_what_the_official_loader_does(name):
    """Without a value: broadcast zeros of the published shapes."""
    entry, official = registry.entry(name), OFFICIAL[name]
    config = config_of(entry)
    tensors = {key: np.broadcast_to(np.float32(0), shape) for key, shape in init_layout(entry).items()}
    tensors |= {key: file for key, file in file_tensors(registry.entry("tiny_swin")).items() if key in tensors and "index" in key}
    if config.backbone.name != "ResNet":
        index = registry.relative_position_index(config.backbone.window_size)
        tensors |= {key: index for key in tensors if key.endswith(".relative_position_index")}
    specs = parameter_specs_of(config)
    filled = {key: specs[key].shape for key in table.filled(config, specs)}
    drops = table.drops(config, tensors)
    moves = plan(table.rules(config), drops, tensors, filled)
    assert all(move.target == f"backbone.{move.source}" for move in moves)
    assert {key for key in specs if key.startswith("backbone.")} - filled.keys() == set(official["backbone_not_filled"])
    # Detectron2 loads the position index into a buffer, which is a constant here.
    assert sorted(drop.source for drop in drops if not drop.source.endswith(".relative_position_index")) == official["not_used"]
    assert official["filled_elsewhere"] == official["other_name_than_backbone"] == []


@pytest.mark.parametrize("name", ["tiny_panoptic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel"])
def test_every_variable_is_from_the_file_or_at_its_initial_value(name, init_file, tmp_path):
    entry = registry.entry(name)
    tensors = file_tensors(entry)
    manifest = initialize(init_file(tensors), tmp_path / "out", name, seed=3).manifest
    variable = variables_of(tmp_path / "out")
    specs = parameter_specs_of(config_of(entry))
    moved = {line["target"]: line for line in manifest["tensors"]}
    initial = {line["target"]: tuple(line["target_shape"]) for line in manifest["initial"]}
    assert moved.keys() | initial.keys() == specs.keys()
    assert not moved.keys() & initial.keys()
    for target, line in moved.items():
        expected = TRANSFORMS[line["transform"]].apply(tensors[line["source"]])
        assert np.array_equal(variable(target), expected), target
    for target, value in initial_values({key: specs[key] for key in initial}, seed=3).items():
        assert initial[target] == value.shape
        assert np.array_equal(variable(target), value), target
    assert {line["source"] for line in manifest["dropped"]} == tensors.keys() - {line["source"] for line in moved.values()}
    assert all(line["reason"] for line in manifest["dropped"])
    assert manifest["tool"]["rule_table"] == "init/1"
    assert manifest["seed"] == 3
    assert manifest["model"]["zoo_entry"] is None
    assert manifest["weights_license"].startswith("unknown")
    model = tfmaskformer.load(tmp_path / "out")
    assert named_variables(model).keys() == specs.keys()


def test_a_pth_file_gives_the_same_as_a_pickle(init_file, tmp_path, torch_zip):
    tensors = file_tensors(registry.entry("tiny_swin"))
    torch_zip(tensors, tmp_path / "swin.pth")
    initialize(init_file(tensors), tmp_path / "a", "tiny_swin")
    initialize(tmp_path / "swin.pth", tmp_path / "b", "tiny_swin")
    for file in ("ckpt.index", "ckpt.data-00000-of-00001", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_seeds(init_file, tmp_path):
    source = init_file(file_tensors(registry.entry("tiny_panoptic")))
    for directory, seed in (("a", 0), ("b", 0), ("c", 1)):
        initialize(source, tmp_path / directory, "tiny_panoptic", seed)
    first, same, other = (variables_of(tmp_path / directory) for directory in "abc")
    assert (tmp_path / "a" / "ckpt.data-00000-of-00001").read_bytes() == (tmp_path / "b" / "ckpt.data-00000-of-00001").read_bytes()
    query = "sem_seg_head.predictor.query_embed.weight"
    assert np.array_equal(first(query), same(query))
    assert not np.array_equal(first(query), other(query))
    assert np.array_equal(first("backbone.res2.0.conv1.weight"), other("backbone.res2.0.conv1.weight"))


def test_variables_of_the_same_shape_have_other_values():
    specs = parameter_specs_of(config_of(registry.entry("tiny_panoptic")))
    layers = [f"sem_seg_head.predictor.transformer.decoder.layers.{n}.linear1.weight" for n in (0, 1)]
    both = initial_values({name: specs[name] for name in layers}, seed=0)
    alone = initial_values({layers[1]: specs[layers[1]]}, seed=0)
    assert not np.array_equal(both[layers[0]], both[layers[1]])
    assert np.array_equal(both[layers[1]], alone[layers[1]])


def test_counters_of_batch_norm_are_dropped(init_file, tmp_path):
    tensors = file_tensors(registry.entry("tiny_deeplab"))
    counters = [f"{name.removesuffix('running_var')}num_batches_tracked" for name in tensors if name.endswith(".running_var")]
    manifest = initialize(init_file(tensors | dict.fromkeys(counters, np.array(7))), tmp_path / "out", "tiny_deeplab").manifest
    assert {line["source"] for line in manifest["dropped"]} == {*counters, "stem.fc.weight", "stem.fc.bias"}


FAULTS = {
    "missing": (lambda t: t.pop("layers.0.downsample.norm.bias"), "missing: 'layers.0.downsample.norm.bias', for the variable"),
    "extra": (lambda t: t.update(x=np.zeros(3, np.float32)), r"no rule for 'x' \(3,\)"),
    "extra block": (lambda t: t.update({"layers.0.blocks.2.norm1.bias": np.zeros(24, np.float32)}), "which the model does not have"),
    "misshapen": (
        lambda t: t.update({"norm.weight": t["norm.weight"], "patch_embed.norm.weight": np.zeros(7, np.float32)}),
        r"\(7,\) becomes",
    ),
    "double": (
        lambda t: t.update({"patch_embed.norm.weight": t["patch_embed.norm.weight"].astype(np.float64)}),
        "'patch_embed.norm.weight' is float64",
    ),
    "NaN": (lambda t: t["layers.1.blocks.0.attn.qkv.bias"].fill(np.nan), "the first is nan"),
    "other window": (
        lambda t: t.update({"layers.0.blocks.0.attn.relative_position_index": registry.relative_position_index(5)[::-1]}),
        "which it must be to be dropped",
    ),
    "names of a whole model": (
        lambda t: t.update({f"backbone.{name}": t.pop(name) for name in list(t)}),
        "no rule for 'backbone.patch_embed",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_refused(fault, init_file, tmp_path, capsys):
    change, message = FAULTS[fault]
    tensors = file_tensors(registry.entry("tiny_swin"))
    change(tensors)
    with pytest.raises(ConversionError, match=message):
        initialize(init_file(tensors), tmp_path / "out", "tiny_swin")
    assert not (tmp_path / "out").exists()


def test_all_faults_are_told_together(init_file, tmp_path):
    tensors = file_tensors(registry.entry("tiny_swin"))
    for fault in ("missing", "extra", "misshapen"):
        FAULTS[fault][0](tensors)
    with pytest.raises(ConversionError, match="3 problems"):
        initialize(init_file(tensors), tmp_path / "out", "tiny_swin")


def test_the_stem_must_be_that_of_the_model(init_file, tmp_path):
    with pytest.raises(ConversionError, match=r"would become 'backbone\.stem\.conv2\.weight', which the model does not have"):
        initialize(init_file(file_tensors(registry.entry("tiny_deeplab"))), tmp_path / "out", "tiny_panoptic")
    with pytest.raises(ConversionError, match=r"missing: 'stem\.conv3\.weight'"):
        initialize(init_file(file_tensors(registry.entry("tiny_panoptic"))), tmp_path / "out", "tiny_deeplab")


def test_command_line(init_file, tmp_path, capsys):
    source = str(init_file(file_tensors(registry.entry("tiny_swin"))))
    assert cli.main(["--init", source, "--config", "tiny_swin", "--dst", str(tmp_path / "out"), "--seed", "5"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "98 more variables at their initial values, seed 5: backbone.norm0, backbone.norm1" in told
    assert "head.weight, head.bias (the ImageNet classifier)" in told
    assert "and 6 more (follows from the window; checked to be equal)" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "x.pkl", "--dst", "out"], "--init needs --config"),
        (["--src", "x.pkl", "--dst", "out", "--seed", "1"], "--seed belongs to --init"),
        (["--src", "x.pkl", "--init", "x.pkl", "--dst", "out"], "not allowed with argument"),
        (["--dst", "out"], "one of the arguments --src --init is required"),
    ],
)
def test_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
def test_hostile_files_end_in_exit_code_2(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = b"\x80\x02}X\x05\x00\x00\x00modelcos\nsystem\n(X\x0d\x00\x00\x00touch was-runtRs."
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(evil)
    else:
        with zipfile.ZipFile(name, "w") as file:
            file.writestr("archive/data.pkl", evil)
    assert cli.main(["--init", name, "--config", "tiny_swin", "--dst", "out"]) == 2
    assert "the global 'os.system'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["tiny_panoptic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel_plus"])
def test_official_loader_and_initial_values(name, official_sources, init_file, tmp_path):
    """The official loader fills the same variables with the same values; the official initial values have our distribution."""
    from scipy.stats import ks_2samp

    from parity import official

    entry = registry.entry(name)
    code = official.load(*official_sources)
    cfg = code.config(code.maskformer / entry.official_config)
    cfg.merge_from_list(list(entry.official_options))
    model = code.model(cfg, seed=1)
    initial = {key: value.detach().numpy().copy() for key, value in model.state_dict().items()}
    ours = initial_values(parameter_specs_of(config_of(entry)), seed=0)
    tables = {key for key in ours if key.endswith(".relative_position_bias_table")}
    for key in ours:
        if np.ptp(initial[key]) == 0:
            assert np.allclose(ours[key], initial[key].ravel()[0], rtol=0, atol=1e-6), key
        elif key not in tables:
            assert ks_2samp(ours[key].ravel(), initial[key].ravel()).pvalue > 1e-5, key
    if tables:  # small, but of one distribution
        pooled = [np.concatenate([values[key].ravel() for key in tables]) for values in (ours, initial)]
        assert ks_2samp(*pooled).pvalue > 1e-3
        assert abs(np.std(pooled[0]) / np.std(pooled[1]) - 1) < 0.06

    source = init_file(file_tensors(entry))
    manifest = initialize(source, tmp_path / "out", name).manifest
    variable = variables_of(tmp_path / "out")
    from detectron2.checkpoint import DetectionCheckpointer

    with official._quiet():
        DetectionCheckpointer(model, save_to_disk=False).load(str(source))
    loaded = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    for line in manifest["tensors"]:
        inverse = TRANSFORMS[line["transform"]].invert(variable(line["target"]))
        assert np.array_equal(loaded[line["target"]], inverse), line["target"]
    for line in manifest["initial"]:
        assert np.array_equal(loaded[line["target"]], initial[line["target"]]), f"the official loader filled {line['target']}"


def test_recorded_entries_are_those_of_the_zoo():
    assert OFFICIAL.keys() == {*(entry.name for entry in registry.entries()), *TINY}
