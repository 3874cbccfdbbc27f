"""The command ``tfmaskformer compile``: the steps of every architecture compile for a TPU; what does not is told.

Needs JAX and the TPU compiler (extra ``aot``) but for what fails before; see test_aot.py for the compiler itself.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from checkpoints import registry
from converters.convert import convert
from tfmaskformer import aot, compile  # noqa: A004
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.model import MaskFormer
from tfmaskformer.official_config import named_tree
from tfmaskformer.training import step as training_step

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs the extra 'aot'")
ARCHITECTURES = ("tiny_semantic", "tiny_panoptic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel", "tiny_per_pixel_plus")
SHAPES = Path(registry.__file__).parent / "small" / "shapes_panoptic.pkl"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(convert(SHAPES, tmp_path_factory.mktemp("compile") / "tf_ckpt", "shapes_panoptic").destination)


@needs_compiler
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_eval_step_of_every_architecture_compiles(name):
    """Network and post-processing, panoptic where the model is for it, at odd sizes, with results of another size."""
    model = MaskFormer(MaskFormerConfig.from_dict(registry.entry(name).config))
    model.build_parameters()
    step, specs = compile.program(model, "eval", 2, (101, 139), output_size=(120, 133))
    stats = aot.compile_for_tpu(step, *specs)
    parameters = sum(variable.numpy().nbytes for variable in model.trainable_variables)
    assert parameters <= stats.argument_bytes < stats.peak_hbm_bytes < 2**30
    assert stats.flops > 1e8
    assert stats.rematerialized == 0
    labels = 4 * 2 * 120 * 133
    assert stats.output_bytes >= labels * (2 if model.config.test.panoptic_on else 1)


@needs_compiler
def test_the_training_step_compiles_and_has_an_optimizer(checkpoint, capsys):
    told = {}
    for step in compile.STEPS:
        arguments = ["--ckpt", checkpoint, "--step", step, "--size", "75", "91", "--batch", "2", "--json"]
        objects = ["--objects", "5"] if step == "train" else []
        assert compile.main(arguments + objects) == 0
        told[step] = json.loads(capsys.readouterr().out)
    assert (told["eval"]["dtype"], told["train"]["dtype"]) == ("float32", "bfloat16")
    assert told["train"]["flops"] > 2.5 * told["eval"]["flops"]
    assert told["train"]["argument_bytes"] > 2.5 * told["eval"]["argument_bytes"], "two moments for each weight"
    assert told["train"]["target"] == "v5e:2x2"


@pytest.mark.parametrize("options", [[], ["--rematerialise"]])
def test_rematerialisation_is_that_of_the_training_step(checkpoint, monkeypatch, options):
    seen = []
    monkeypatch.setattr(aot, "check_target", lambda target: None)
    monkeypatch.setattr(training_step, "TrainStep", lambda *arguments, **settings: seen.append(settings["rematerialise"]))
    monkeypatch.setattr(aot, "compile_for_tpu", lambda *arguments, **settings: (_ for _ in ()).throw(aot.AotError("not compiled")))
    assert compile.main(["--ckpt", checkpoint, "--step", "train", *options]) == 1
    assert seen == [bool(options)]


@needs_compiler
def test_what_is_computed_again_is_told():
    """The sines and tangents of 40 layers, which the gradient needs, take more than the 15.75 GiB of a v5e."""
    weights = [tf.Variable(tf.zeros([128, 128])) for _ in range(40)]

    def step(inputs):
        with tf.GradientTape() as tape:
            hidden = inputs
            for weight in weights:
                hidden = tf.tanh(tf.sin(hidden) @ weight)
            loss = tf.reduce_sum(hidden)
        return tape.gradient(loss, weights)

    stats = aot.compile_for_tpu(step, tf.TensorSpec([600_000, 128]))
    assert stats.rematerialized > 10
    assert stats.peak_hbm_bytes < 15.75 * 2**30 < 2 * 40 * 4 * 128 * 600_000
    told = {"model": "m", "step": "train", "target": "v5e:2x2", "dtype": "float32", "batch": 1, "size": (1, 1)}
    assert f"{stats.rematerialized} instructions are computed again" in compile._lines(told, stats)[-1]


@needs_compiler
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--target", "v99:2x2"], 2, "no topology 'v99:2x2'"),
        (["--size", "2048", "2048", "--batch", "300"], 1, "refuses the program: RESOURCE_EXHAUSTED: Ran out of memory on HBM"),
    ],
)
def test_refused(options, code, message, checkpoint, capsys):
    assert compile.main(["--ckpt", checkpoint, *options]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_without_the_compiler(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax", None)
    assert compile.main(["--ckpt", checkpoint]) == 3
    assert "install the extra: pip install 'tfmaskformer[aot]'" in capsys.readouterr().err


def test_out_of_memory_is_told(checkpoint, monkeypatch, capsys):
    def load(*arguments):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(aot, "check_target", lambda target: None)
    monkeypatch.setattr("tfmaskformer.checkpoint.load", load)
    assert compile.main(["--ckpt", checkpoint]) == 3
    assert "out of memory" in capsys.readouterr().err


def test_bad_usage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aot, "check_target", lambda target: None)
    assert compile.main(["--ckpt", str(tmp_path)]) == 2
    assert "cannot read config.json" in capsys.readouterr().err
    misplaced = ["--rematerialise"], ["--objects", "5"], ["--step", "train", "--output-size", "5", "5"]
    for options in (["--batch", "0"], ["--size", "0", "5"], ["--step", "train", "--objects", "0"], *misplaced, ["--dtype", "float16"]):
        with pytest.raises(SystemExit) as raised:
            compile.main(["--ckpt", str(tmp_path), *options])
        assert raised.value.code == 2


def test_default_sizes_are_the_official_ones():
    def sizes(name):
        config = MaskFormerConfig.from_dict(registry.entry(name).config)
        return [compile.default_size(config, step) for step in compile.STEPS]

    assert sizes("maskformer_panoptic_R50_bs64_554k") == [(800, 1333), (1333, 1333)]
    assert sizes("maskformer_R101_bs16_90k") == [(1024, 2048), (512, 1024)]
    assert sizes("maskformer_R50_bs16_160k") == [(512, 1024), (512, 512)]
    assert sizes("maskformer_swin_base_IN21k_384_bs16_160k_res640") == [(640, 1280), (640, 640)]
    assert sizes("maskformer_R50_bs16_300k") == [(2048, 2048), (1280, 1280)]
    assert sizes("maskformer_panoptic_swin_large_IN21k_384_bs64_554k") == [(800, 1333), (1000, 1000)]


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_the_training_canvas_is_that_of_the_official_input(entry):
    """Crops and limits of ``INPUT``, as PyTorch's mappers read them; 'tfmaskformer train' makes the same of them."""
    tree = named_tree(entry.name)[1]["INPUT"]
    crop, largest = tree["CROP"], tree["MAX_SIZE_TRAIN"]
    cropped = crop["ENABLED"] and tree["DATASET_MAPPER_NAME"] != "detr_panoptic"
    size = tuple(crop["SIZE"]) if cropped else (largest, largest)
    if tree["SIZE_DIVISIBILITY"] > 0:
        size = (tree["SIZE_DIVISIBILITY"],) * 2
    assert compile.default_size(MaskFormerConfig.from_dict(entry.config), "train") == size


def test_another_name_has_no_default_size(checkpoint, tmp_path, monkeypatch, capsys):
    shutil.copytree(checkpoint, tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config | {"name": "mine"}))
    monkeypatch.setattr(aot, "check_target", lambda target: None)
    assert compile.main(["--ckpt", str(tmp_path / "mine"), "--step", "train"]) == 2
    assert "give --size HEIGHT WIDTH" in capsys.readouterr().err


def test_every_architecture_of_the_zoo_is_among_them():
    def architecture(entry):
        config = entry.config
        backbone = config["backbone"]
        return backbone["name"], backbone.get("stem_type"), config["pixel_decoder"]["name"], config["head"]

    assert {architecture(entry) for entry in registry.entries()} == {architecture(registry.entry(name)) for name in ARCHITECTURES}
