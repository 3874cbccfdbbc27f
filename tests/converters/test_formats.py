"""Every kind of checkpoint is written, read again, and led back to the bytes that it came from."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import h5py
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import tfmaskformer
from checkpoints import registry, synthesize
from converters import cli, keras_weights
from converters.convert import convert
from converters.difference import diff
from converters.errors import ConversionError
from converters.inspection import inspect
from converters.source import open_source
from converters.tables import maskformer as table
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_variables

KINDS = {
    "tf_ckpt": "TensorFlow checkpoint",
    "a.pkl": "pickle",
    "a.pth": "PyTorch archive",
    "a.safetensors": "safetensors",
    "a.h5": "HDF5",
    "a.weights.h5": "Keras weights",
}
MODELS = ("tiny_panoptic", "tiny_semantic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel", "tiny_per_pixel_plus")
KERAS_WARNS = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
"""Of its own variables, while it saves them."""

QUERIES = "sem_seg_head.predictor.query_embed.weight"


@pytest.fixture(scope="module")
def official_file(tmp_path_factory):
    """Test model → its synthetic checkpoint, as the official code would publish it."""
    folder, made = tmp_path_factory.mktemp("official"), {}

    def make(model):
        if model not in made:
            made[model] = folder / f"{model}.pkl"
            synthesize.write_pickle(synthesize.synthesize(registry.entry(model)), made[model])
        return made[model]

    return make


@pytest.mark.parametrize("model", MODELS)
def test_back_from_tensorflow_the_file_has_the_same_bytes(model, official_file, tmp_path):
    source = official_file(model)
    convert(source, tmp_path / "tf_ckpt", model)
    back = convert(tmp_path / "tf_ckpt", tmp_path / "model_final.pkl")
    assert (tmp_path / "model_final.pkl").read_bytes() == source.read_bytes()
    assert back.origin == f"every tensor has the bytes that were converted from {source.name}"
    assert back.inference.config.name == model


@pytest.mark.parametrize("first", KINDS)
def test_any_kind_becomes_any_other_without_a_bit_lost(first, official_file, tmp_path):
    source = official_file("tiny_swin")
    convert(source, tmp_path / first, "tiny_swin")
    assert inspect(tmp_path / first).kind == KINDS[first]
    config = "tiny_swin" if first in ("a.pkl", "a.pth") else None  # the others have their config beside the tensors
    for second in KINDS:
        convert(tmp_path / first, tmp_path / f"second.{second}", config)
        difference = diff(source, tmp_path / f"second.{second}")
        assert difference.same, difference.text()
        assert difference.equal == len(registry.layout(registry.entry("tiny_swin")))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "tf_ckpt"])
def test_equal_input_gives_equal_files(name, official_file, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        convert(official_file("tiny_deeplab"), tmp_path / folder / name, "tiny_deeplab")
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_names_and_layouts_in_each_kind(official_file, tmp_path):
    tensors = synthesize.synthesize(registry.entry("tiny_panoptic"))
    for name in KINDS:
        convert(official_file("tiny_panoptic"), tmp_path / name, "tiny_panoptic")
    loaded = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert list(loaded["model"]) == [registry.v1_key(key) for key in tensors]
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file) == set(tensors)
        assert np.array_equal(file["sem_seg_head.pixel_decoder.layer_1.weight"], tensors["sem_seg_head.pixel_decoder.layer_1.weight"])
        assert MaskFormerConfig.from_dict(json.loads(file.attrs["tfmaskformer.config"])).name == "tiny_panoptic"
    with open_source(tmp_path / "a.safetensors") as source:
        assert list(source.tensors) == list(tensors)
        assert source.config.name == "tiny_panoptic"


def test_versions_tell_the_official_code_which_names_a_pth_file_has():
    names = registry.layout(registry.entry("tiny_panoptic"))
    versions = table.versions(names)
    assert versions["sem_seg_head"] == 2
    assert versions["backbone.res2.0.conv1.norm"] == 3
    assert len(versions) == 54


@KERAS_WARNS
@pytest.mark.parametrize("model", MODELS)
def test_keras_loads_what_we_write_and_we_read_what_keras_saves(model, official_file, tmp_path):
    convert(official_file(model), tmp_path / "ours.weights.h5", model)
    network = MaskFormer(MaskFormerConfig.from_dict(registry.entry(model).config))
    network.build_parameters()
    network.load_weights(tmp_path / "ours.weights.h5")
    expected = synthesize.synthesize(registry.entry(model))
    transforms = table.transforms(network.config, named_variables(network))
    for name, variable in named_variables(network).items():
        assert np.array_equal(variable.numpy(), transforms[name].apply(expected[name])), name
    network.save_weights(tmp_path / "keras.weights.h5")
    with pytest.raises(ConversionError, match="variables without the model's config"):
        convert(tmp_path / "keras.weights.h5", tmp_path / "no.pkl")
    convert(tmp_path / "keras.weights.h5", tmp_path / "back.pkl", model)
    assert diff(tmp_path / "back.pkl", official_file(model)).same


def test_weights_of_another_model_are_refused(official_file, tmp_path):
    convert(official_file("tiny_swin"), tmp_path / "a.weights.h5", "tiny_swin")
    with pytest.raises(ConversionError, match="the file has variables that tiny_panoptic has not"):
        convert(tmp_path / "a.weights.h5", tmp_path / "b", "tiny_panoptic")


@KERAS_WARNS
def test_keras_paths_are_those_that_keras_uses(tmp_path):
    network = MaskFormer(MaskFormerConfig.from_dict(registry.entry("tiny_swin").config))
    network.build_parameters()
    network.save_weights(tmp_path / "a.weights.h5")
    found = []
    with h5py.File(tmp_path / "a.weights.h5") as file:
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    assert sorted(found) == sorted(keras_weights.paths(network.config).values())


# --- what training leaves


def test_the_prefix_of_distributed_training_is_left_out(tensors, checkpoint_file, tmp_path):
    plain = checkpoint_file(tensors, "v2", name="plain.pkl")
    convert(checkpoint_file({f"module.{name}": tensor for name, tensor in tensors.items()}, "v2"), tmp_path / "a", "tiny_panoptic")
    assert diff(tmp_path / "a", plain).same
    mixed = {f"module.{name}" if index else name: tensor for index, (name, tensor) in enumerate(tensors.items())}
    with pytest.raises(ConversionError, match=r"no MaskFormer|no rule|cannot tell"):
        convert(checkpoint_file(mixed, "v2"), tmp_path / "b", "tiny_panoptic")


def test_a_checkpoint_of_training_goes_back_without_its_optimizer(official_file, tmp_path):
    convert(official_file("tiny_semantic"), tmp_path / "tf_ckpt", "tiny_semantic")
    model = tfmaskformer.load(tmp_path / "tf_ckpt")
    variable = named_variables(model)[QUERIES]
    variable.assign_add(tf.ones_like(variable))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text((tmp_path / "tf_ckpt" / "config.json").read_text())
    state = tf.train.Checkpoint(model=model, step=tf.Variable(7), optimizer=tf.train.Checkpoint(m=tf.Variable([1.0])))
    tf.train.CheckpointManager(state, str(run), 1).save()
    conversion = convert(run, tmp_path / "trained.pkl")
    assert conversion.left_out == ("optimizer", "step")
    difference = diff(official_file("tiny_semantic"), tmp_path / "trained.pkl")
    (changed,) = difference.differences
    assert (changed.name, changed.elements, difference.only_first) == (QUERIES, variable.shape.num_elements(), ())
    (run / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"variables without the model's config\n  name it: --config"):
        convert(run, tmp_path / "again.pkl")
    convert(run, tmp_path / "again.pkl", "tiny_semantic")
    assert (tmp_path / "again.pkl").read_bytes() == (tmp_path / "trained.pkl").read_bytes()


def test_damaged_tensorflow_checkpoints_are_told(official_file, tmp_path, capsys):
    convert(official_file("tiny_semantic"), tmp_path / "good", "tiny_semantic")
    whole = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    data, index = "ckpt.data-00000-of-00001", "ckpt.index"
    flipped = bytearray(whole[data])
    flipped[len(flipped) // 2] ^= 4
    damages = {
        "half of the data": {data: whole[data][: len(whole[data]) // 2]},
        "a flipped bit": {data: bytes(flipped)},
        "no data": {data: None},
        "no index": {index: None},
        "half of the index": {index: whole[index][: len(whole[index]) // 2]},
        "another index": {index: b"not an index"},
        "no state": {"checkpoint": b"model_checkpoint_path: 'elsewhere'"},
        "a config that is none": {"config.json": b"[1, 2]"},
        "half of a config": {"config.json": whole["config.json"][:100]},
    }
    for what, changes in damages.items():
        place = tmp_path / what
        place.mkdir()
        for name, content in (whole | changes).items():
            if content is not None:
                (place / name).write_bytes(content)
        assert cli.main(["--src", str(place), "--dst", str(tmp_path / "a.pkl")]) == 2, what
        message = capsys.readouterr().err
        assert "error: " in message, what
        assert place.name in message, (what, message)
        assert not (tmp_path / "a.pkl").exists()


def test_changed_weights_are_told(official_file, tmp_path):
    convert(official_file("tiny_semantic"), tmp_path / "a", "tiny_semantic")
    convert(official_file("tiny_semantic"), tmp_path / "b", "tiny_semantic")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["tensors"][0]["sha256"] = "0" * 64
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    count = len(manifest["tensors"])
    assert convert(tmp_path / "a", tmp_path / "a.pkl").origin.startswith(f"{count - 1} of {count} tensors have the bytes")
    (tmp_path / "a" / "manifest.json").write_text('{"tensors": 3, "source": []}')
    assert convert(tmp_path / "a", tmp_path / "a2.pkl").origin == ""


# --- types


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_tells_the_loss_of_every_tensor(dtype, official_file, tmp_path, capsys):
    source = official_file("tiny_panoptic")
    arguments = ["--src", str(source), "--dst", str(tmp_path / "small"), "--config", "tiny_panoptic", "--dtype", dtype]
    assert cli.main([*arguments, "--json", str(tmp_path / "m.json")]) == 0
    assert "the largest relative L2 error is" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "m.json").read_text())
    assert manifest["dtype"] == dtype
    reader = tf.train.load_checkpoint(str(tmp_path / "small"))
    expected = synthesize.synthesize(registry.entry("tiny_panoptic"))
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    for line in manifest["tensors"]:
        exact = expected[line["target"]]
        stored = reader.get_tensor(tfmaskformer.checkpoint.checkpoint_key(line["target"]))
        assert stored.dtype == kind
        assert line["loss"]["relative_l2"] == pytest.approx(
            np.linalg.norm((exact.astype(kind).astype(np.float64) - exact).ravel()) / np.linalg.norm(exact.astype(np.float64).ravel())
        )
    model = tfmaskformer.load(tmp_path / "small")
    assert np.array_equal(named_variables(model)[QUERIES].numpy(), expected[QUERIES].astype(kind).astype(np.float32))


def test_smaller_types_are_widened_without_loss(official_file, tmp_path):
    convert(official_file("tiny_panoptic"), tmp_path / "half.safetensors", "tiny_panoptic", dtype="bfloat16")
    conversion = convert(tmp_path / "half.safetensors", tmp_path / "wide.pkl")
    assert conversion.manifest["dtype"] == "float32"
    assert not any("loss" in line for line in conversion.manifest["tensors"])
    difference = diff(tmp_path / "half.safetensors", tmp_path / "wide.pkl")
    assert all(item.elements == 0 and item.what == "bfloat16 and float32" for item in difference.differences)
    assert difference.differences


def test_values_beyond_the_type_are_refused(tensors, checkpoint_file, tmp_path, capsys):
    tensors[QUERIES][1, 2] = 1e6
    arguments = ["--src", str(checkpoint_file(tensors)), "--config", "tiny_panoptic", "--dst", str(tmp_path / "a")]
    assert cli.main([*arguments, "--dtype", "float16"]) == 2
    message = capsys.readouterr().err
    assert (
        f"{QUERIES}' {tensors[QUERIES].shape}: 1 of {tensors[QUERIES].size} values are beyond float16\n  choose another --dtype" in message
    )
    assert os.listdir(tmp_path) == ["model_final.pkl"]
    assert cli.main([*arguments, "--dtype", "bfloat16"]) == 0


def test_doubles_are_rounded_when_asked_to(tensors, checkpoint_file, tmp_path):
    exact = tensors[QUERIES].astype(np.float64) * (1 + 1e-9)
    source = checkpoint_file(tensors | {QUERIES: exact})
    conversion = convert(source, tmp_path / "a.pkl", "tiny_panoptic", dtype="float32")
    (line,) = (line for line in conversion.manifest["tensors"] if "loss" in line)
    assert line["source"] == QUERIES
    assert 0 < line["loss"]["relative_l2"] < 1e-7
    assert np.array_equal(pickle.loads((tmp_path / "a.pkl").read_bytes())["model"][QUERIES], exact.astype(np.float32))


@pytest.mark.parametrize("name", ["a.pkl", "a.h5", "a.weights.h5"])
def test_formats_without_bfloat16_say_so(name, official_file, tmp_path):
    with pytest.raises(ConversionError, match=r"no bfloat16(.|\n)*--dtype float16"):
        convert(official_file("tiny_panoptic"), tmp_path / name, "tiny_panoptic", dtype="bfloat16")
    assert os.listdir(tmp_path) == []


# --- files that appear whole


def test_existing_files(official_file, tmp_path, capsys):
    arguments = ["--src", str(official_file("tiny_deeplab")), "--config", "tiny_deeplab", "--dst"]
    mine, other, folder, link = (tmp_path / name for name in ("mine.pkl", "other.pkl", "folder.pkl", "link.pkl"))
    mine.write_text("my thesis")
    folder.mkdir()
    link.symlink_to(mine)
    for path, message in {
        mine: "exists and was not written by 'convert'",
        folder: "is a directory, and the name asks for a file",
        link: "is a symbolic link",
        tmp_path / "none" / "a.pkl": "does not exist",
    }.items():
        assert cli.main([*arguments, str(path), "--force"]) == 2
        assert message in capsys.readouterr().err
    assert mine.read_text() == "my thesis"
    assert cli.main([*arguments, str(other)]) == 0
    before = other.read_bytes()
    assert cli.main([*arguments, str(other)]) == 2
    assert "add --force to replace it" in capsys.readouterr().err
    assert cli.main([*arguments, str(other), "--force"]) == 0
    assert other.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["folder.pkl", "link.pkl", "mine.pkl", "other.pkl"]


def test_a_file_that_appears_meanwhile_is_kept(official_file, tmp_path, monkeypatch):
    from converters import target

    write = target.synthesize.write_pickle_to

    def write_slowly(file, *arguments):
        write(file, *arguments)
        (tmp_path / "a.pkl").write_text("theirs")

    monkeypatch.setattr(target.synthesize, "write_pickle_to", write_slowly)
    with pytest.raises(ConversionError, match="exists"):
        convert(official_file("tiny_deeplab"), tmp_path / "a.pkl", "tiny_deeplab")
    assert (tmp_path / "a.pkl").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["a.pkl"]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "tf_ckpt"])
def test_a_file_that_reads_back_differently_is_refused(name, official_file, tmp_path, monkeypatch):
    from converters import convert as module

    verify = module._Run._verify

    def spoil(self, path, tensors):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        verify(self, path, tensors)

    monkeypatch.setattr(module._Run, "_verify", spoil)
    with pytest.raises(ConversionError, match="the file just written holds other values"):
        convert(official_file("tiny_deeplab"), tmp_path / name, "tiny_deeplab")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [name for name in KINDS if name != "tf_ckpt"])
def test_a_full_disk(name, official_file, tmp_path):
    """A limit on the size of files stands for a disk that is full when half of the file is written; in a process of its own."""
    code = "import resource, sys\nfrom converters.cli import main\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\nsys.exit(main(sys.argv[1:]))"
    arguments = ["--src", str(official_file("tiny_swin")), "--dst", name, "--config", "tiny_swin"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2, result.stderr
    assert f"error: cannot write '{tmp_path / name}': " in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["tf_ckpt", "a.pth"])
def test_two_at_once(name, official_file, tmp_path):
    """One wins whole, the other says so."""
    command = [sys.executable, "-m", "converters.cli", "--src", str(official_file("tiny_swin")), "--dst", str(tmp_path / name)]
    running = [subprocess.Popen([*command, "--config", "tiny_swin"], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=120)[1] for process in running]
    codes = [process.returncode for process in running]
    assert sorted(codes) == [0, 2, 2], told
    for code, message in zip(codes, told, strict=True):
        assert (
            (code == 0) or "another conversion into" in message or "exists\n" in message or "another conversion finished first" in message
        )
    assert diff(tmp_path / name, official_file("tiny_swin")).same
    assert os.listdir(tmp_path) == [name]


def test_a_dry_run_checks_everything_and_writes_nothing(tensors, checkpoint_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = checkpoint_file(tensors)
    assert cli.main(["--src", str(source), "--config", "tiny_panoptic", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("model_final.pkl → nothing\n")
    assert "a dry run, nothing was written" in output
    tensors[QUERIES][0, 0] = np.nan
    assert cli.main(["--src", str(checkpoint_file(tensors)), "--config", "tiny_panoptic", "--dry-run"]) == 2
    assert "the first is nan at (0, 0)" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model_final.pkl"]
    with pytest.raises(SystemExit):
        cli.main(["--src", str(source), "--dst", "a", "--dry-run"])


# --- elsewhere


def test_file_systems_of_tensorflow(official_file, tmp_path):
    """TensorFlow's file system in memory stands for a bucket: it too knows no rename of directories."""
    gfile, place = tf.io.gfile, "ram://bucket"
    gfile.makedirs(place)
    gfile.copy(str(official_file("tiny_swin")), f"{place}/model.pkl")
    conversion = convert(f"{place}/model.pkl", f"{place}/tf_ckpt", "tiny_swin")
    assert conversion.destination == f"{place}/tf_ckpt"
    assert sorted(gfile.listdir(f"{place}/tf_ckpt")) == [
        "checkpoint",
        "ckpt.data-00000-of-00001",
        "ckpt.index",
        "config.json",
        "manifest.json",
    ]
    assert diff(f"{place}/tf_ckpt", official_file("tiny_swin")).same
    with pytest.raises(ConversionError, match="add --force to replace it"):
        convert(f"{place}/model.pkl", f"{place}/tf_ckpt", "tiny_swin")
    convert(f"{place}/model.pkl", f"{place}/tf_ckpt", "tiny_swin", force=True)
    gfile.copy(f"{place}/model.pkl", f"{place}/tf_ckpt/mine.pkl")
    with pytest.raises(ConversionError, match=r"holds other files than a converted checkpoint: 'mine\.pkl'"):
        convert(f"{place}/model.pkl", f"{place}/tf_ckpt", "tiny_swin", force=True)
    convert(f"{place}/model.pkl", f"{place}/b.safetensors", "tiny_swin")
    convert(f"{place}/b.safetensors", tmp_path / "b.pkl")
    assert (tmp_path / "b.pkl").read_bytes() == official_file("tiny_swin").read_bytes()
    with pytest.raises(ConversionError, match=r"cannot read 'ram://bucket/none\.pkl'"):
        convert(f"{place}/none.pkl", tmp_path / "c")
    with pytest.raises(ConversionError, match=r"cannot read 'nowhere://bucket/a\.pkl'"):
        convert("nowhere://bucket/a.pkl", tmp_path / "c")


def test_the_manifest_comes_last_and_goes_first(official_file, monkeypatch):
    from converters import remote

    steps = []
    copy, gfile = remote._copy, tf.io.gfile
    monkeypatch.setattr(remote, "_copy", lambda source, there, *more: (steps.append(there.rpartition("/")[2]), copy(source, there, *more)))
    convert(official_file("tiny_swin"), "ram://order/tf_ckpt", "tiny_swin")
    assert steps[-2:] == ["config.json", "manifest.json"]

    def broken(source, there, *more):
        raise tf.errors.UnavailableError(None, None, "the network is gone")

    monkeypatch.setattr(remote, "_copy", broken)
    with pytest.raises(ConversionError, match="cannot write 'ram://order/tf_ckpt': the network is gone"):
        convert(official_file("tiny_swin"), "ram://order/tf_ckpt", "tiny_swin", force=True)
    assert not gfile.exists("ram://order/tf_ckpt/manifest.json")
    assert not gfile.exists("ram://order/tf_ckpt/config.json")


# --- inspect, diff


def test_inspect_needs_no_tensorflow_for_files(official_file, tmp_path):
    names = ["a.pkl", "a.pth", "a.safetensors", "a.h5", "a.weights.h5"]
    for name in names:
        convert(official_file("tiny_panoptic"), tmp_path / name, "tiny_panoptic")
    code = "import sys\nsys.modules.update(tensorflow=None, keras=None, torch=None)\nfrom converters.cli import main\n"
    code += "for name in sys.argv[1:]:\n    assert main(['inspect', name]) == 0"
    result = subprocess.run([sys.executable, "-c", code, *names], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    for kind in ("pickle", "PyTorch archive", "safetensors", "HDF5", "Keras weights"):
        assert f"  kind     {kind}, " in result.stdout


def test_inspect_tells_the_model_and_what_looks_wrong(tensors, checkpoint_file, capsys):
    tensors[QUERIES][2, 1] = np.nan
    tensors["backbone.res2.0.conv1.weight"][:] = 0
    tensors["backbone.res2.0.conv1.norm.bias"][:] = 0.5
    source = checkpoint_file(tensors)
    assert cli.main(["inspect", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["key_layout"], found["author"], found["tensors"]) == ("pickle", "v1", "a test", len(tensors))
    assert "no official model has this architecture" in found["problem"]
    assert found["dtypes"] == {"float32": len(tensors)}
    assert found["suspicious"] == {
        "backbone.res2.0.conv1.weight": "all zero",
        "backbone.res2.0.conv1.norm.bias": "all 0.5",
        QUERIES: f"1 values are NaN and 0 infinite, of {tensors[QUERIES].size}",
    }
    assert cli.main(["inspect", str(source), "--config", "tiny_panoptic"]) == 0
    output = capsys.readouterr().out
    assert "  model    tiny_panoptic\n" in output
    assert "  values   3 suspicious:\n" in output


def test_inspect_names_the_zoo_entry(tmp_path, capsys):
    entry = registry.entry("maskformer_panoptic_swin_tiny_bs64_554k")
    synthesize.write_pickle(synthesize.synthesize(entry), tmp_path / "model.pkl")
    assert cli.main(["inspect", str(tmp_path / "model.pkl")]) == 0
    assert f"  model    {entry.name} (the tensors fit exactly)" in capsys.readouterr().out


def test_inspect_files_that_are_no_maskformers(tmp_path, capsys):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fc.weight": np.arange(6.0, dtype=np.float32).reshape(2, 3)}))
    assert cli.main(["inspect", str(tmp_path / "a.pkl")]) == 0
    output = capsys.readouterr().out
    assert "  model    unknown: no MaskFormer" in output
    (tmp_path / "b.pkl").write_text("<html>")
    assert cli.main(["inspect", str(tmp_path / "b.pkl")]) == 2
    assert "HTML or XML" in capsys.readouterr().err


def test_diff_tells_every_difference(tensors, checkpoint_file, capsys):
    first = checkpoint_file(tensors, name="a.pkl")
    other = dict(tensors)
    other[QUERIES] = tensors[QUERIES].copy()
    other[QUERIES][3, 4] += 2
    other["backbone.stem.conv1.weight"] = other["backbone.stem.conv1.weight"][:-1]
    other["new"] = other.pop("backbone.res2.0.conv1.weight")
    norm = "backbone.stem.conv1.norm.bias"
    other[norm] = tensors[norm].astype(np.float64)
    second = checkpoint_file(other, "v2", name="b.pkl")
    assert cli.main(["diff", str(first), str(second), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["only_first"] == ["backbone.res2.0.conv1.weight"]
    assert found["only_second"] == ["new"]
    shape, value, dtype = found["differences"]
    assert (shape["name"], shape["relative_l2"]) == ("backbone.stem.conv1.weight", None)
    assert (value["name"], value["elements"]) == (QUERIES, 1)
    assert value["max_abs"] == pytest.approx(2)
    assert value["relative_l2"] == pytest.approx(2 / np.linalg.norm(tensors[QUERIES].ravel()), rel=1e-5)
    assert (dtype["name"], dtype["what"], dtype["elements"]) == (norm, "float32 and float64", 0)
    assert found["equal"] == len(tensors) - 4
    assert cli.main(["diff", str(first), str(second)]) == 1
    assert "3 differ:" in capsys.readouterr().out
    assert cli.main(["diff", str(first), str(first)]) == 0
    assert "and there are no others" in capsys.readouterr().out


def test_diff_sees_a_sign_of_zero_and_nan(tensors, checkpoint_file):
    tensors[QUERIES][0] = [0.0, np.nan, *tensors[QUERIES][0, 2:]]
    other = {name: tensor.copy() for name, tensor in tensors.items()}
    first = checkpoint_file(tensors, name="a.pkl")
    assert diff(first, checkpoint_file(other, name="b.pkl")).same
    other[QUERIES][0, 0] = -0.0
    (difference,) = diff(first, checkpoint_file(other, name="b.pkl")).differences
    assert (difference.elements, difference.what) == (0, "the same values in other bits (a sign of 0, or a NaN)")


# --- the official code


@pytest.mark.parametrize("ending", [".pkl", ".pth"])
@pytest.mark.parametrize(
    "name",
    [
        "maskformer_panoptic_R50_bs64_554k",
        "maskformer_R101c_bs16_90k",
        "maskformer_panoptic_swin_tiny_bs64_554k",
        "per_pixel_baseline_R50_bs16_160k",
        "per_pixel_baseline_plus_R50_bs16_160k",
    ],
)
def test_the_official_loader_accepts_what_goes_back(name, ending, official_sources, tmp_path):
    """No key is missing or unexpected, and every tensor is the same."""
    from parity import official as oracle

    entry = registry.entry(name)
    tensors = synthesize.synthesize(entry)
    synthesize.write_pickle(tensors, tmp_path / "model_final.pkl")
    convert(tmp_path / "model_final.pkl", tmp_path / "tf_ckpt", name)
    convert(tmp_path / "tf_ckpt", tmp_path / f"back{ending}")
    code = oracle.load(*official_sources)
    state = code.model(code.config(entry.official_config.removeprefix("configs/")), tmp_path / f"back{ending}").state_dict()
    assert state.keys() == tensors.keys()
    for key, tensor in state.items():
        assert np.array_equal(tensor.numpy(), tensors[key]), key


def test_metadata_are_those_of_the_official_state_dict(official_sources, tmp_path):
    import torch

    from parity import official as oracle

    code = oracle.load(*official_sources)
    for name in MODELS:
        entry = registry.entry(name)
        config = code.config(entry.official_config.removeprefix("configs/"))
        config.merge_from_list([str(option) for option in entry.official_options])
        expected = code.model(config).state_dict()
        synthesize.write_pickle(synthesize.synthesize(entry), tmp_path / f"{name}.pkl")
        convert(tmp_path / f"{name}.pkl", tmp_path / f"{name}.pth", name)
        written = torch.load(tmp_path / f"{name}.pth", weights_only=True)["model"]
        assert list(written) == list(expected)
        for module, values in written._metadata.items():
            assert values["version"] == expected._metadata[module]["version"], module
        assert "sem_seg_head" in written._metadata
