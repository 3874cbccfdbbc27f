"""What people do by mistake, and what files do on purpose: nothing of theirs is lost, and nothing is claimed that is not so."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfmaskformer
from checkpoints import registry, synthesize
from converters import cli, source
from converters.convert import convert
from converters.difference import diff
from converters.errors import ConversionError
from converters.inspection import inspect
from converters.safetensors_file import write_safetensors
from tests.converters.huggingface_renaming import renamed
from tfmaskformer.module import named_variables

MODEL = "tiny_semantic"
KINDS = ("a.pkl", "a.pth", "a.safetensors", "a.h5", "a.weights.h5")
QUERIES = "sem_seg_head.predictor.query_embed.weight"


@pytest.fixture(scope="module")
def tensors_of():
    return synthesize.synthesize(registry.entry(MODEL))


@pytest.fixture
def official(tensors_of, tmp_path):
    synthesize.write_pickle(tensors_of, tmp_path / "official.pkl")
    return tmp_path / "official.pkl"


def refused(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


# --- training


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_what_a_real_optimizer_left_is_converted(official, tmp_path):
    convert(official, tmp_path / "tf_ckpt", MODEL)
    model = tfmaskformer.load(tmp_path / "tf_ckpt")
    trained = [variable for variable in named_variables(model).values() if variable.trainable]
    optimizer = keras.optimizers.AdamW(0.25)
    optimizer.apply([tf.ones(variable.shape) for variable in trained], trained)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text((tmp_path / "tf_ckpt" / "config.json").read_text())
    state = tf.train.Checkpoint(model=model, optimizer=optimizer, step=tf.Variable(3))
    tf.train.CheckpointManager(state, str(tmp_path / "run"), 1).save()
    conversion = convert(tmp_path / "run", tmp_path / "trained.pkl")
    assert conversion.left_out == ("optimizer", "step")
    difference = diff(official, tmp_path / "trained.pkl")
    assert len(difference.differences) == len(trained)
    model.compile(optimizer=optimizer)
    model.save_weights(tmp_path / "keras.weights.h5")
    conversion = convert(tmp_path / "keras.weights.h5", tmp_path / "keras.pkl", MODEL)
    assert conversion.left_out == ("optimizer",)
    assert diff(tmp_path / "trained.pkl", tmp_path / "keras.pkl").same


# --- files of theirs


def test_force_replaces_nothing_but_what_convert_wrote(official, tmp_path, capsys):
    theirs = {
        "a.pkl": pickle.dumps({"model": {"w": np.ones(3)}}, 3),
        "b.pkl": pickle.dumps(synthesize.synthesize(registry.entry(MODEL)), 3),
        "c.pth": b"PK\x03\x04 an archive",
        "d.h5": b"\x89HDF\r\n\x1a\n" + bytes(3000),
        "e.safetensors": (2).to_bytes(8, "little") + b"{}",
    }
    for name, content in theirs.items():
        (tmp_path / name).write_bytes(content)
        message = refused(capsys, "--src", official, "--config", MODEL, "--dst", tmp_path / name, "--force")
        assert "was not written by 'convert'" in message
        assert (tmp_path / name).read_bytes() == content
    for name in KINDS:
        convert(official, tmp_path / f"own_{name}", MODEL)
        convert(official, tmp_path / f"own_{name}", MODEL, force=True)


@pytest.mark.parametrize("name", ["a.pkl", "tf_ckpt"])
def test_a_source_is_not_replaced_by_its_conversion(name, official, tmp_path, capsys):
    convert(official, tmp_path / name, MODEL)
    again = ["--src", tmp_path / name, "--dst", tmp_path / name, "--config", MODEL, "--force", "--dtype", "float16"]
    assert "is the source itself" in refused(capsys, *again)


def test_json_never_replaces_a_checkpoint(official, tmp_path, capsys):
    arguments = ["--src", official, "--config", MODEL]
    before = official.read_bytes()
    assert "is the source or the destination" in refused(capsys, *arguments, "--dst", tmp_path / "a", "--json", official)
    for name in ("b", "b.pkl"):
        message = refused(capsys, *arguments, "--dst", tmp_path / name, "--json", tmp_path / name)
        assert "is the source or the destination" in message
    (tmp_path / "mine.txt").write_text("my thesis")
    assert "exists and is no JSON" in refused(capsys, *arguments, "--dst", tmp_path / "c", "--json", tmp_path / "mine.txt")
    assert official.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["mine.txt", "official.pkl"]
    assert "the conversion itself is complete" in refused(capsys, *arguments, "--dst", tmp_path / "d", "--json", "/dev/full")


def test_remote_files_of_theirs_are_kept(official):
    with tf.io.gfile.GFile("ram://theirs.pkl", "wb") as file:
        file.write(b"precious")
    with pytest.raises(ConversionError, match="was not written by 'convert'"):
        convert(official, "ram://theirs.pkl", MODEL, force=True)
    convert(official, "ram://ours.pkl", MODEL)
    convert(official, "ram://ours.pkl", MODEL, force=True)
    assert diff("ram://ours.pkl", official).same


# --- claims


def test_a_directory_that_changes_while_it_is_read_is_refused(official, tmp_path, monkeypatch):
    convert(official, tmp_path / "tf_ckpt", MODEL)
    digest = source.Source.sha256

    def touched(self):
        os.utime(next(file for file in self.files if ".data" in file.name), ns=(1, 1))
        return digest(self)

    monkeypatch.setattr(source.Source, "sha256", touched)
    with pytest.raises(ConversionError, match="changed while it was being read"):
        convert(tmp_path / "tf_ckpt", tmp_path / "a.pkl")
    assert not (tmp_path / "a.pkl").exists()


def test_the_digest_is_that_of_the_file_that_was_read(official, tmp_path):
    import hashlib

    expected = hashlib.sha256(official.read_bytes()).hexdigest()
    other = tmp_path / "other.pkl"
    other.write_bytes(b"something else")

    def replace(step, share):
        if step == "reading" and other.exists():
            other.replace(official)

    assert convert(official, tmp_path / "a", MODEL, progress=replace).manifest["source"]["sha256"] == expected


def test_a_directory_is_hashed_by_its_checkpoint_alone(official, tmp_path):
    convert(official, tmp_path / "tf_ckpt", MODEL)
    first = convert(tmp_path / "tf_ckpt", tmp_path / "a.pkl").manifest["source"]
    (tmp_path / "tf_ckpt" / "events.out").write_text("a log")
    assert convert(tmp_path / "tf_ckpt", tmp_path / "b.pkl").manifest["source"] == first


def test_where_weights_come_from_is_told_for_rounded_and_widened_ones_too(official, tmp_path):
    for dtype in ("float16", "bfloat16"):
        convert(official, tmp_path / dtype, MODEL, dtype=dtype)
        assert (
            convert(tmp_path / dtype, tmp_path / f"{dtype}.pkl").origin
            == "every tensor has the bytes that were converted from official.pkl"
        )
    convert(tmp_path / "float16", tmp_path / "half.safetensors", dtype="float16")
    convert(tmp_path / "half.safetensors", tmp_path / "wide")
    assert convert(tmp_path / "wide", tmp_path / "wide.pkl").origin.startswith("every tensor")
    manifest = json.loads((tmp_path / "wide" / "manifest.json").read_text())
    for line in manifest["tensors"]:
        line["target"] += "x"
    (tmp_path / "wide" / "manifest.json").write_text(json.dumps(manifest))
    assert convert(tmp_path / "wide", tmp_path / "other.pkl").origin == ""


def test_remote_sources_keep_their_name(official, tmp_path):
    convert(official, "ram://bucket/run7", MODEL)
    first, second = (convert("ram://bucket/run7", tmp_path / f"{n}").manifest for n in range(2))
    assert first == second
    assert first["source"]["file"] == "run7"


def test_variables_are_not_compared_in_another_layout(official, tmp_path, capsys):
    convert(official, tmp_path / "tf_ckpt", MODEL)
    (tmp_path / "tf_ckpt" / "config.json").unlink()
    assert "name it: --config" in refused(capsys, "diff", tmp_path / "tf_ckpt", official)
    assert cli.main(["diff", str(tmp_path / "tf_ckpt"), str(official), "--config", MODEL]) == 0


def test_json_of_a_difference_is_json(tensors_of, official, tmp_path, capsys):
    other = dict(tensors_of)
    other[QUERIES] = np.full_like(other[QUERIES], np.nan)
    synthesize.write_pickle(other, tmp_path / "nan.pkl")
    assert cli.main(["diff", str(official), str(tmp_path / "nan.pkl"), "--json"]) == 1
    text = capsys.readouterr().out
    (difference,) = json.loads(text, parse_constant=lambda name: pytest.fail(name))["differences"]
    assert (difference["relative_l2"], difference["max_abs"]) == ("nan", "nan")


# --- files that choose how much memory is taken, or what a terminal does


def test_windows_are_bounded(tmp_path):
    tensors = renamed(synthesize.synthesize(registry.entry("tiny_swin")))
    name = next(name for name in tensors if name.endswith("relative_position_bias_table"))
    tensors = {key: value for key, value in tensors.items() if not key.endswith("relative_position_index")}
    with (tmp_path / "bomb.safetensors").open("wb") as file:
        write_safetensors(file, tensors | {name: np.zeros((439**2, 1), np.float32)}, {})
    with pytest.raises(ConversionError, match="windows of 220 patches"):
        convert(tmp_path / "bomb.safetensors", tmp_path / "a", "tiny_swin")
    assert "windows of 220 patches" in inspect(tmp_path / "bomb.safetensors").problem
    convert_source = tmp_path / "good.pkl"
    synthesize.write_pickle(synthesize.synthesize(registry.entry("tiny_swin")), convert_source)
    config = json.loads(json.dumps(registry.entry("tiny_swin").config))
    config["backbone"]["window_size"] = 200
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"window_size.*at most 48"):
        convert(convert_source, tmp_path / "a", str(tmp_path / "config.json"))


@pytest.mark.parametrize("value", [2**63 - 1, 2**62 + 1])
def test_a_weight_of_no_object_that_is_no_float(value, tensors_of, tmp_path, capsys):
    weight = np.ones(tensors_of["criterion.empty_weight"].shape, np.int64)
    weight[-1] = value
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": tensors_of | {"criterion.empty_weight": weight}}))
    assert "'criterion.empty_weight' ends with" in refused(capsys, "--src", tmp_path / "a.pkl", "--dst", tmp_path / "b")


def test_no_control_characters_reach_the_terminal(tensors_of, tmp_path, capsys):
    evil = "\x1b[2J\x07evil" + "x" * 100_000
    model = {registry.v1_key(name): tensor for name, tensor in tensors_of.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": model, "__author__": evil, evil: 1}))
    assert cli.main(["inspect", str(tmp_path / "a.pkl"), "--config", MODEL]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["--src", str(tmp_path / "a.pkl"), "--config", MODEL, "--dst", str(tmp_path / "b")]) == 0
    shown += capsys.readouterr().out
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["weights_license"] = manifest["source"]["file"] = evil
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["--src", str(tmp_path / "b"), "--dst", str(tmp_path / "c.pkl")]) == 0
    shown += capsys.readouterr().out
    assert "evil" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert len(shown) < 20_000


# --- the shell


def test_unknown_names_are_told_with_the_nearest(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, "--src", "maskformer_R50_bs16_160", "--dst", "a")
    assert "'maskformer_R50_bs16_160' does not exist, and no zoo entry" in message
    assert "maskformer_R50_bs16_160k" in message
    assert "tfmaskformer zoo synthesize tiny_panoptic" in refused(capsys, "--src", "tiny_panoptic", "--dst", "a")


def test_parts_of_a_tensorflow_checkpoint(official, tmp_path, capsys):
    convert(official, tmp_path / "run", MODEL)
    for name in ("ckpt", "ckpt.index", "ckpt.data-00000-of-00001"):
        message = refused(capsys, "--src", tmp_path / "run" / name, "--dst", tmp_path / "a")
        assert f"is part of a TensorFlow checkpoint\n  name its directory: {tmp_path / 'run'}" in message


def test_paths_that_cannot_be(official, capsys, tmp_path):
    for destination in ("x" * 300, tmp_path / ("y" * 300) / "z"):
        assert "cannot write" in refused(capsys, "--src", official, "--config", MODEL, "--dst", destination)


@pytest.mark.parametrize("stdout", ["closed", "full", "ascii"])
def test_a_terminal_that_cannot_show_the_result(stdout, official, tmp_path):
    command = [sys.executable, "-m", "converters.cli", "--src", str(official), "--dst", str(tmp_path / "a"), "--config", MODEL]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if stdout == "ascii":
        environment["PYTHONIOENCODING"] = "ascii"
        result = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
        assert result.returncode == 0
    else:
        with open("/dev/full", "wb") as full:
            reader, writer = os.pipe()
            os.close(reader)
            place = full.fileno() if stdout == "full" else writer
            result = subprocess.run(command, stdout=place, stderr=subprocess.PIPE, env=environment, timeout=120, check=False)
            os.close(writer)
        assert result.returncode == 3
        assert b"error: cannot print: " in result.stderr
    assert b"Traceback" not in result.stderr
    assert (tmp_path / "a" / "manifest.json").exists()
