"""Conversion end to end on a tiny checkpoint: what is written, and what is refused."""

from __future__ import annotations

import gc
import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

import tfmaskformer.checkpoint
from checkpoints import registry, synthesize
from converters import cli
from converters.checkpoint import CONFIG_FILE, FILES
from converters.convert import convert
from converters.errors import ConversionError
from converters.transforms import CONV2D, IDENTITY, LINEAR
from tfmaskformer.checkpoint import checkpoint_key
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_variables

TRANSFORMS = {transform.name: transform for transform in (IDENTITY, LINEAR, CONV2D)}
CONFIG = "tiny_panoptic"


def contents(directory):
    return {file.name: file.read_bytes() for file in pathlib.Path(directory).iterdir()}


@pytest.mark.parametrize("key_layout", ["v1", "v2"])
def test_round_trip_is_byte_equal(key_layout, tensors, checkpoint_file, tmp_path):
    conversion = convert(checkpoint_file(tensors, key_layout), tmp_path / "out", CONFIG)
    assert conversion.manifest["source"]["key_layout"] == key_layout
    reader = tf.train.load_checkpoint(str(tmp_path / "out"))
    restored = {}
    for line in conversion.manifest["tensors"]:
        variable = reader.get_tensor(checkpoint_key(line["target"]))
        assert variable.shape == tuple(line["target_shape"])
        restored[line["source"]] = TRANSFORMS[line["transform"]].invert(variable)
    expected = {registry.v1_key(name) if key_layout == "v1" else name: tensor for name, tensor in tensors.items()}
    dropped = expected.pop(conversion.manifest["dropped"][0]["source"])
    assert dropped is tensors["criterion.empty_weight"]
    assert restored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert restored[name].tobytes() == tensor.tobytes(), name


def test_the_model_loads_and_stock_tensorflow_restores_it(tensors, checkpoint_file, tmp_path, tiny):
    convert(checkpoint_file(tensors), tmp_path / "out", CONFIG)
    loaded = tfmaskformer.load(tmp_path / "out")
    model = MaskFormer(MaskFormerConfig.from_dict(tiny.config))
    model.build_parameters()
    status = tf.train.Checkpoint(model=model).restore(tf.train.latest_checkpoint(str(tmp_path / "out")))
    status.assert_existing_objects_matched()
    status.assert_consumed()
    for name, variable in named_variables(model).items():
        source = tensors[name]
        transform = CONV2D if source.ndim == 4 else LINEAR if source.ndim == 2 and "query_embed" not in name else IDENTITY
        assert np.array_equal(variable.numpy(), transform.apply(source)), name
        assert np.array_equal(named_variables(loaded)[name].numpy(), variable.numpy()), name


def test_manifest(tensors, checkpoint_file, tmp_path, tiny):
    source = checkpoint_file(tensors)
    conversion = convert(source, tmp_path / "out", CONFIG)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == conversion.manifest
    assert (manifest["format"], manifest["version"]) == ("tfmaskformer-checkpoint", 1)
    assert manifest["tool"] == {"name": "tfmaskformer", "version": tfmaskformer.__version__, "rule_table": "maskformer/1"}
    data = source.read_bytes()
    assert manifest["source"] == {
        "file": "model_final.pkl",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "author": "a test",
        "key_layout": "v1",
    }
    assert manifest["model"]["zoo_entry"] is None
    assert manifest["model"]["origins"]["predictor.nheads"] == f"config {CONFIG}"
    assert len(manifest["tensors"]) == len(tensors) - 1
    channels = tiny.config["backbone"]["stem_out_channels"]
    assert manifest["tensors"][0] == {
        "source": "backbone.stem.conv1.weight",
        "target": "backbone.stem.conv1.weight",
        "transform": "CONV2D",
        "permutation": [2, 3, 1, 0],
        "source_shape": [channels, 3, 7, 7],
        "target_shape": [7, 7, 3, channels],
        "dtype": "float32",
        "sha256": hashlib.sha256(tensors["backbone.stem.conv1.weight"].tobytes()).hexdigest(),
    }
    assert "sem_seg_head.layer_1.weight" in {line["source"] for line in manifest["tensors"]}
    (dropped,) = manifest["dropped"]
    assert (dropped["source"], dropped["shape"]) == ("criterion.empty_weight", [tiny.config["num_classes"] + 1])
    assert "derived from the config" in dropped["reason"]
    assert manifest["weights_license"].startswith("unknown")
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert MaskFormerConfig.from_dict(config) == MaskFormerConfig.from_dict(tiny.config)


def test_equal_input_gives_equal_files(tensors, checkpoint_file, tmp_path):
    source = checkpoint_file(tensors)
    for name in ("a", "b"):
        convert(source, tmp_path / name, CONFIG)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").keys() == {"manifest.json", "config.json", *FILES}


def test_synthetic_weights_are_told_as_such(tensors, tmp_path):
    synthesize.write_pickle({registry.v1_key(name): tensor for name, tensor in tensors.items()}, tmp_path / "model.pkl")
    assert "synthetic" in convert(tmp_path / "model.pkl", tmp_path / "out", CONFIG).manifest["weights_license"]


def test_fortran_order_and_text_protocol(tensors, checkpoint_file, tmp_path):
    first = convert(checkpoint_file(tensors, name="c.pkl"), tmp_path / "c", CONFIG)
    tensors = {name: np.asfortranarray(tensor) for name, tensor in tensors.items()}
    second = convert(checkpoint_file(tensors, name="f.pkl", protocol=0), tmp_path / "f", CONFIG)
    assert first.manifest["tensors"] == second.manifest["tensors"]
    assert contents(tmp_path / "c")[FILES[2]] == contents(tmp_path / "f")[FILES[2]]


def test_garbage_collection_is_on_afterwards(tensors, checkpoint_file, tmp_path):
    convert(checkpoint_file(tensors), tmp_path / "out", CONFIG)
    assert gc.isenabled()


def test_config_file_has_the_name_that_load_reads():
    assert CONFIG_FILE == tfmaskformer.checkpoint.CONFIG_FILE


def lfs_pointer():
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 180517862\n"


def zip_archive():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", b"x")
    return buffer.getvalue()


FOREIGN = {
    "is empty": b"",
    "a zip archive that torch.save did not write": zip_archive(),
    "compressed with gzip": gzip.compress(b"x"),
    "HTML or XML": b"\n<!DOCTYPE html><html>404</html>",
    "the header's 'a' has not exactly dtype": (50).to_bytes(8, "little") + b'{"a": {"dtype": "F32"}}'.ljust(60),
    "JSON": b'{"model": {}}',
    "a Git LFS pointer": lfs_pointer(),
    "the HDF5 file is damaged": b"\x89HDF\r\n\x1a\n" + bytes(50),
    "an unknown format that begins with": b"GIF89a....",
    "os.system": b"cos\nsystem\n(S'mkdir was-run'\ntR.",
}


def refused(capsys, *argv):
    """Runs the command, which must refuse; returns what it says."""
    code = cli.main(argv)
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("error: ") == 1
    return output.err


@pytest.mark.parametrize("message", FOREIGN)
def test_foreign_files(message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pkl").write_bytes(FOREIGN[message])
    assert message in refused(capsys, "--src", "model.pkl", "--dst", "out")
    assert os.listdir(tmp_path) == ["model.pkl"]


def test_sources_that_cannot_be_read(tmp_path, capsys):
    assert "does not exist" in refused(capsys, "--src", str(tmp_path / "none.pkl"), "--dst", str(tmp_path / "out"))
    assert "is a directory" in refused(capsys, "--src", str(tmp_path), "--dst", str(tmp_path / "out"))
    assert "no regular file" in refused(capsys, "--src", "/dev/null", "--dst", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def change(tensors, name, value):
    tensors[name] = value


QUERIES = "sem_seg_head.predictor.query_embed.weight"
BAD_TENSORS = {
    "missing": (lambda t: t.pop("backbone.res3.1.conv2.weight"), "missing: 'backbone.res3.1.conv2.weight', for the variable"),
    "extra": (lambda t: change(t, "backbone.fc.weight", np.zeros(3, np.float32)), "no rule for 'backbone.fc.weight' (3,)"),
    "misshapen": (lambda t: change(t, "backbone.res3.1.conv2.weight", np.zeros((4, 4, 3, 3), np.float32)), "(4, 4, 3, 3) becomes"),
    "NaN": (lambda t: t[QUERIES].__setitem__((3, 4), np.nan), "values, the first is nan at (3, 4)"),
    "infinite": (lambda t: t[QUERIES].fill(-np.inf), "values, the first is -inf at (0, 0)"),
    "integers": (lambda t: change(t, QUERIES, t[QUERIES].astype(np.int32)), "is int32, expected floating numbers"),
    "double": (
        lambda t: change(t, QUERIES, t[QUERIES].astype(np.float64)),
        "query_embed.weight' is float64\n  --dtype float32 rounds them",
    ),
    "empty weight": (lambda t: t["criterion.empty_weight"].__setitem__(5, 2), "which it must be to be dropped"),
    "mixed layouts": (lambda t: change(t, "sem_seg_head.layer_4.weight", t.pop("sem_seg_head.pixel_decoder.layer_4.weight")), "are mixed"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors(kind, tensors, checkpoint_file, tmp_path, capsys):
    spoil, message = BAD_TENSORS[kind]
    spoil(tensors)
    source = checkpoint_file(tensors, "v2")
    assert message in refused(capsys, "--src", str(source), "--dst", str(tmp_path / "out"), "--config", CONFIG)
    assert os.listdir(tmp_path) == ["model_final.pkl"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_source(share, tensors, checkpoint_file, tmp_path, capsys):
    source = checkpoint_file(tensors)
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * share)])
    message = refused(capsys, "--src", str(source), "--dst", str(tmp_path / "out"), "--config", CONFIG)
    assert "'model_final.pkl': the pickle is truncated: it ends inside the operation at byte " in message
    assert "download or copy the file again" in message
    assert os.listdir(tmp_path) == ["model_final.pkl"]


def test_wrong_config(tensors, checkpoint_file, tmp_path, capsys):
    source = checkpoint_file(tensors)
    arguments = ("--src", str(source), "--dst", str(tmp_path / "out"))
    assert "nearest: tiny_panoptic" in refused(capsys, *arguments, "--config", "tiny_panoptik")
    assert "predictor.transformer_in_feature: the tensors say" in refused(capsys, *arguments, "--config", "tiny_semantic")
    assert "no official model has this architecture" in refused(capsys, *arguments)
    assert os.listdir(tmp_path) == ["model_final.pkl"]


def test_existing_destinations(tensors, checkpoint_file, tmp_path, capsys):
    arguments = ("--src", str(checkpoint_file(tensors)), "--config", CONFIG, "--dst")
    file, foreign, empty, link = (tmp_path / name for name in ("file", "foreign", "empty", "link"))
    file.write_text("mine")
    for directory in (foreign, empty):
        directory.mkdir()
    (foreign / "manifest.json").write_text("mine")
    (foreign / "thesis.tex").write_text("mine")
    link.symlink_to(empty)
    assert "exists and is no directory" in refused(capsys, *arguments, str(file), "--force")
    assert "holds other files than a converted checkpoint: 'thesis.tex'" in refused(capsys, *arguments, str(foreign), "--force")
    assert "is a symbolic link" in refused(capsys, *arguments, str(link), "--force")
    assert f"'{tmp_path / 'none'}' does not exist" in refused(capsys, *arguments, str(tmp_path / "none" / "out"))
    assert file.read_text() == (foreign / "thesis.tex").read_text() == "mine"
    assert cli.main([*arguments, str(empty)]) == 0
    capsys.readouterr()
    before = contents(empty)
    assert "add --force to replace it" in refused(capsys, *arguments, str(empty))
    assert contents(empty) == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces(exchange, tensors, checkpoint_file, tmp_path, monkeypatch):
    from tfmaskformer import destination

    if not exchange:
        monkeypatch.setattr(destination, "exchange", lambda first, second: False)
    out = tmp_path / "out"
    convert(checkpoint_file(tensors), out, CONFIG)
    before = contents(out)
    tensors[QUERIES] += 1
    convert(checkpoint_file(tensors), out, CONFIG, force=True)
    assert contents(out).keys() == before.keys()
    assert contents(out)[FILES[2]] != before[FILES[2]]
    assert sorted(os.listdir(tmp_path)) == ["model_final.pkl", "out"]


def test_a_failed_replacement_leaves_the_old_one(tensors, checkpoint_file, tmp_path, capsys):
    out = tmp_path / "out"
    convert(checkpoint_file(tensors), out, CONFIG)
    before = contents(out)
    tensors[QUERIES][0] = np.nan
    refused(capsys, "--src", str(checkpoint_file(tensors)), "--dst", str(out), "--config", CONFIG, "--force")
    assert contents(out) == before
    assert sorted(os.listdir(tmp_path)) == ["model_final.pkl", "out"]


def test_unwritable_destination(tensors, checkpoint_file, capsys):
    """/proc takes no directories, from nobody."""
    message = refused(capsys, "--src", str(checkpoint_file(tensors)), "--dst", "/proc/out", "--config", CONFIG)
    assert message.startswith("error: cannot write '/proc/out': ")
    assert "choose another --dst, or make its parent writable" in message


def test_full_disk(tensors, checkpoint_file, tmp_path, capsys):
    """A limit on the size of files stands for a disk that is full when half of the checkpoint is written."""
    source = checkpoint_file(tensors)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (source.stat().st_size // 2, limit[1]))
    try:
        message = refused(capsys, "--src", str(source), "--dst", str(tmp_path / "out"), "--config", CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert message.startswith(f"error: cannot write '{tmp_path / 'out'}': File too large\n  raise the limit on file sizes")
    assert os.listdir(tmp_path) == ["model_final.pkl"]


def test_too_little_free_space_is_told_before_reading(tensors, checkpoint_file, tmp_path, monkeypatch):
    monkeypatch.setattr("converters.convert.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConversionError, match="1000 bytes are free, the checkpoint has about"):
        convert(checkpoint_file(tensors), tmp_path / "out", CONFIG)


def test_a_checkpoint_that_reads_back_differently_is_refused(tensors, checkpoint_file, tmp_path, monkeypatch):
    from converters import checkpoint

    write = checkpoint.write

    def write_and_spoil(directory, variables):
        write(directory, variables)
        data = directory / FILES[2]
        spoiled = bytearray(data.read_bytes())
        spoiled[1000] ^= 1
        data.write_bytes(spoiled)

    monkeypatch.setattr(checkpoint, "write", write_and_spoil)
    with pytest.raises(ConversionError, match="the checkpoint just written"):
        convert(checkpoint_file(tensors), tmp_path / "out", CONFIG)
    assert os.listdir(tmp_path) == ["model_final.pkl"]


def test_summary_and_json(tensors, checkpoint_file, tmp_path, capsys):
    source = checkpoint_file(tensors)
    assert cli.main(["--src", str(source), "--dst", str(tmp_path / "a"), "--config", CONFIG, "--json", str(tmp_path / "m.json")]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"model_final.pkl → {tmp_path / 'a'}\n")
    assert f"{len(tensors) - 1} tensors, " in output
    assert " M elements, float32; re-read, every tensor equal" in output
    assert cli.main(["--src", str(source), "--dst", str(tmp_path / "b"), "--config", CONFIG, "--json", "-"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == json.loads((tmp_path / "m.json").read_text()) == json.loads((tmp_path / "b" / "manifest.json").read_text())
    message = refused(capsys, "--src", str(source), "--dst", str(tmp_path / "c"), "--config", CONFIG, "--json", str(tmp_path / "no" / "m"))
    assert "cannot write" in message
    assert not (tmp_path / "c").exists()


def test_usage_errors_exit_with_2(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(["--src", "x"])
    assert exited.value.code == 2


def test_without_tensorflow_it_says_what_to_install(tensors, checkpoint_file, tmp_path):
    code = "import sys\nsys.modules.update(tensorflow=None, keras=None)\nfrom converters.cli import main\nsys.exit(main(sys.argv[1:]))"
    arguments = ["--src", str(checkpoint_file(tensors)), "--dst", str(tmp_path / "out"), "--config", CONFIG]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 3
    assert "pip install 'tfmaskformer[cpu]'" in result.stderr
    assert os.listdir(tmp_path) == ["model_final.pkl"]


def test_conversion_needs_no_torch(tensors, checkpoint_file, tmp_path):
    code = "import sys\nsys.modules.update(torch=None, detectron2=None)\nfrom converters.cli import main\nsys.exit(main(sys.argv[1:]))"
    arguments = ["--src", str(checkpoint_file(tensors)), "--dst", str(tmp_path / "out"), "--config", CONFIG]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_source_that_changes_meanwhile_is_refused(tensors, checkpoint_file, tmp_path, monkeypatch):
    from converters import checkpoint

    source = checkpoint_file(tensors)
    write = checkpoint.write

    def write_and_touch(directory, variables):
        write(directory, variables)
        os.utime(source, ns=(1, 1))

    monkeypatch.setattr(checkpoint, "write", write_and_touch)
    with pytest.raises(ConversionError, match="changed while it was being read"):
        convert(source, tmp_path / "out", CONFIG)
    assert os.listdir(tmp_path) == ["model_final.pkl"]


def test_pickle_is_never_loaded(tensors, checkpoint_file, tmp_path, monkeypatch):
    source = checkpoint_file(tensors)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    convert(source, tmp_path / "out", CONFIG)
