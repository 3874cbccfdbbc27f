"""Checkpoint directories: what load accepts, refuses and says; that stock TensorFlow reads them too."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from checkpoints import registry
from tests.tfmaskformer.conftest import SMALL, random_values
from tfmaskformer.checkpoint import CheckpointError, checkpoint_key, load, other_classes, stored_variables
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_variables


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    config = SMALL["encoder"]
    model = MaskFormer(config)
    model.build_parameters(random_values(config).__getitem__)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    tf.train.CheckpointManager(tf.train.Checkpoint(model=model), str(path), max_to_keep=1).save()
    return path


def test_keys_carry_the_official_names(directory):
    keys = {key for key, _ in tf.train.list_variables(tf.train.latest_checkpoint(str(directory)))}
    assert "model/backbone/res2/0/conv1/norm/running_var/.ATTRIBUTES/VARIABLE_VALUE" in keys
    stored = stored_variables(tf.train.load_checkpoint(str(directory)))
    assert stored == {name: checkpoint_key(name) for name in named_variables(load(directory))}


def test_what_an_optimizer_trained_is_found_under_the_optimizers_keys(tmp_path):
    """TensorFlow names a variable by the first way it comes to it, and "optimizer" comes before … or after "model"."""
    config = SMALL["encoder"]
    initial = random_values(config)
    model = MaskFormer(config)
    model.build_parameters(initial.__getitem__)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    trained = [variable for variable in named_variables(model).values() if variable.trainable]
    optimizer = keras.optimizers.AdamW(0.5)
    optimizer.apply([tf.ones(variable.shape) for variable in trained], trained)
    state = tf.train.Checkpoint(model=model, optimizer=optimizer, step=tf.Variable(3))
    tf.train.CheckpointManager(state, str(tmp_path), max_to_keep=1).save()
    stored = stored_variables(tf.train.load_checkpoint(str(tmp_path)))
    assert stored.keys() == named_variables(model).keys()
    assert any(key.startswith("optimizer/") for key in stored.values())
    restored = named_variables(load(tmp_path))
    for name, variable in named_variables(model).items():
        np.testing.assert_array_equal(restored[name].numpy(), variable.numpy())
        assert variable.trainable != np.array_equal(variable.numpy(), initial[name])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_load_restores_every_value(directory, dtype):
    expected = random_values(SMALL["encoder"])
    actual = named_variables(load(directory, dtype))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == dtype
        np.testing.assert_array_equal(actual[name].numpy(), value)


@pytest.mark.parametrize(
    ("entry", "drawn"),
    [
        ("tiny_panoptic", ["sem_seg_head.predictor.class_embed.bias", "sem_seg_head.predictor.class_embed.weight"]),
        ("tiny_per_pixel", ["sem_seg_head.predictor.bias", "sem_seg_head.predictor.weight"]),
        ("tiny_per_pixel_plus", ["sem_seg_head.predictor.query_embed.weight"]),
    ],
)
def test_other_classes_are_drawn(entry, drawn, tmp_path):
    """On request, and nothing else."""
    config = MaskFormerConfig.from_dict(registry.entry(entry).config)
    values = random_values(config)
    model = MaskFormer(config)
    model.build_parameters(values.__getitem__)
    tf.train.CheckpointManager(tf.train.Checkpoint(model=model), str(tmp_path), 1).save()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    changes = {"num_classes": config.num_classes - 1, "class_names": (), "thing_classes": ()}
    if entry == "tiny_per_pixel_plus":
        changes["predictor"] = dataclasses.replace(config.predictor, num_queries=config.num_classes - 1)
    fewer = dataclasses.replace(config, **changes)
    assert sorted(other_classes(tmp_path, fewer)) == drawn
    assert other_classes(tmp_path, config) == ()
    with pytest.raises(CheckpointError, match="has shape"):
        load(tmp_path, config=fewer)
    loaded = named_variables(load(tmp_path, config=fewer, new_classes=True))
    for name, variable in loaded.items():
        if name not in drawn:
            np.testing.assert_array_equal(variable.numpy(), values[name], err_msg=name)
        elif name.endswith("weight"):
            assert 0 < np.abs(variable.numpy()).max() < 5
    wider = dataclasses.replace(fewer, pixel_decoder=dataclasses.replace(fewer.pixel_decoder, mask_dim=fewer.pixel_decoder.mask_dim + 1))
    with pytest.raises(CheckpointError, match="has shape"):
        load(tmp_path, config=wider, new_classes=True)


def test_stock_checkpoint_restores_into_the_model(directory):
    model = MaskFormer(SMALL["encoder"])
    model.build_parameters()
    status = tf.train.Checkpoint(model=model).restore(tf.train.latest_checkpoint(str(directory)))
    status.assert_existing_objects_matched()
    for name, value in random_values(SMALL["encoder"]).items():
        np.testing.assert_array_equal(named_variables(model)[name].numpy(), value)


def test_load_reads_any_file_system_of_tensorflow(directory):
    """TensorFlow's file system in memory stands for a bucket."""
    tf.io.gfile.makedirs("ram://checkpoint")
    for file in directory.iterdir():
        text = file.read_bytes().replace(str(directory).encode() + b"/", b"") if file.name == "checkpoint" else file.read_bytes()
        with tf.io.gfile.GFile(f"ram://checkpoint/{file.name}", "wb") as copy:
            copy.write(text)
    actual = named_variables(load("ram://checkpoint"))
    for name, value in random_values(SMALL["encoder"]).items():
        np.testing.assert_array_equal(actual[name].numpy(), value)
    with pytest.raises(CheckpointError, match=r"ram://none: cannot read config\.json \(NotFoundError\)"):
        load("ram://none")


def _copy(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_checkpoint_that_does_not_fit_its_config_lists_everything(directory, tmp_path):
    path = _copy(directory, tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["num_classes"] = 9
    config["predictor"]["dec_layers"] = 4
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load(path)
    message = str(error.value)
    assert "variable 'sem_seg_head.predictor.class_embed.weight' has shape (64, 8), expected (64, 10)" in message
    assert "missing variable 'sem_seg_head.predictor.transformer.decoder.layers.3.norm1.bias' (64,)" in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "cannot read config.json"),
        (lambda path: (path / "config.json").write_text("{"), "config.json"),
        (lambda path: (path / "config.json").write_text('{"name": "x"}'), "missing field 'num_classes'"),
        (lambda path: (path / "checkpoint").unlink(), "no TensorFlow checkpoint"),
        (lambda path: (path / "checkpoint").write_bytes(b"\x80\xff junk"), "checkpoint: expected TensorFlow's list of checkpoints"),
        (lambda path: next(path.glob("ckpt*.index")).write_bytes(b"nonsense"), "not a readable TensorFlow checkpoint"),
    ],
)
def test_damaged_directories_are_named(directory, tmp_path, damage, message):
    path = _copy(directory, tmp_path)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_truncated_data_is_found(directory, tmp_path):
    path = _copy(directory, tmp_path)
    data = next(path.glob("ckpt*.data*"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="not a readable TensorFlow checkpoint"):
        load(path)
