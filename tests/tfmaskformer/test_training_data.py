"""What ``tfmaskformer train`` does with ground truth that has no objects, or more than the JSON tells, and with bad files."""

from __future__ import annotations

import json
import os
import sys
import types

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.tfmaskformer import test_data_augmentation as recorded
from tests.tfmaskformer import training_processes
from tests.tfmaskformer.training_processes import QUICK, QUICKEST, arguments
from tfmaskformer.data import augmentation, shapes, tfrecords
from tfmaskformer.data.datasets import open_training_set
from tfmaskformer.data.records import DataError
from tfmaskformer.data.training import panoptic_objects, semantic_objects, training_dataset
from tfmaskformer.model_garden import __main__ as driver
from tfmaskformer.official_config import config_of, named_tree
from tfmaskformer.official_yaml import override
from tfmaskformer.training import cli, loop
from tfmaskformer.training.recipe import recipe_of

IMAGES = 4
OPTIONS = {"SOLVER__MAX_ITER": 2, "DATASETS__TEST": "()", "TEST__EVAL_PERIOD": 0}


@pytest.fixture
def data(tmp_path):
    shapes.write(tmp_path / "data", "train", IMAGES)
    return tmp_path / "data"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def files(data, index):
    """Image, panoptic PNG and semantic map."""
    record = open_training_set("shapes", data).records[index]
    return record.image, record.panoptic, record.semantic


def change_segments(data, index, change):
    file = data / "annotations" / "panoptic_train.json"
    content = json.loads(file.read_text())
    annotation = content["annotations"][index]
    annotation["segments_info"] = change(annotation["segments_info"])
    file.write_text(json.dumps(content))


def change_pixels(file, change):
    with Image.open(file) as image:
        pixels = np.asarray(image)
    Image.fromarray(change(pixels)).save(file)


@pytest.mark.parametrize("name", ["detr", "semantic", "panoptic"])
def test_equals_the_official_mapper(name, data):
    """From the files on: an image whose crowds, which upstream leaves out in any case, are in the PNG alone, and one without objects."""
    record, mapper = recorded.record, augmentation.mapper_of(recorded.tree_of(recorded.record.CONFIGS[name]), recorded.record.IGNORE)
    file = data / "annotations" / "panoptic_train.json"
    content, chosen = json.loads(file.read_text()), {0: 1, 1: record.IMAGES - 1}
    for place, index in chosen.items():
        image, panoptic_seg, segments, sem_seg = record.sample(index)
        rgb = np.stack([panoptic_seg >> shift & 255 for shift in (0, 8, 16)], axis=-1)
        for path, pixels in zip(files(data, place), (image, rgb, sem_seg), strict=True):
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        content["images"][place] |= {"height": image.shape[0], "width": image.shape[1]}
        content["annotations"][place]["segments_info"] = [
            segment | {"category_id": shapes.CATEGORIES[segment["category_id"]].id, "area": int((panoptic_seg == segment["id"]).sum())}
            for segment in segments
            if not segment["iscrowd"]
        ]
        assert any(segment["iscrowd"] for segment in segments) == (index == 1)
    file.write_text(json.dumps(content))
    elements = list(tfrecords.from_disk(open_training_set("shapes", data)).take(len(chosen)))
    for place, index in chosen.items():
        element = elements[place]
        labels, segments = panoptic_objects(element["panoptic_seg"], element["segments"])
        for repetition in range(record.REPETITIONS):
            row = recorded.RECORDED["mappers"][f"{name}; image {index}, {repetition}"]
            draws = recorded.recorded_draws(row["draws"], mapper)
            augmented = mapper(draws, element["image"], segments, element["sem_seg"])
            masks = augmented.segments
            if mapper.name == augmentation.SEMANTIC:
                labels, masks = semantic_objects(augmented.sem_seg, mapper.ignore_label)
            assert recorded.sha256(augmented.image) == row["image"]
            assert labels.numpy().tolist() == row["labels"]
            assert recorded.sha256(recorded.masks_of(masks, len(labels))) == row["masks"]
        assert (len(labels) == 0) == (place == 1)


def without_objects(data, *indices):
    """Annotations without segments, maps that are ignored everywhere."""
    for index in indices:
        _, panoptic, semantic = files(data, index)
        change_pixels(panoptic, np.zeros_like)
        change_pixels(semantic, lambda labels: np.full_like(labels, 255))
        change_segments(data, index, lambda segments: [])


def test_images_without_objects(data, uncompiled):
    """In all mappers, with and without other images in the batch; and with an id in the PNG that the JSON lacks."""
    name, tree = named_tree("tiny_swin")
    options = training_processes.OPTIONS | {"MODEL.MASK_FORMER.DEC_LAYERS": 1, "SOLVER.OPTIMIZER": "SGD"}
    override(tree, [part for option in options.items() for part in option])
    settings = loop.Settings(tree, config_of(tree, name), recipe_of(tree), canvas=(96, 96))
    change_segments(data, 3, lambda segments: segments[1:])
    training = None
    for empty, without in (((1, 2), {1, 2}), ((0, 3), {0, 1, 2, 3})):
        without_objects(data, *empty)
        dataset = open_training_set("shapes", data)
        training = training or loop.Training(settings, dataset, tf.distribute.get_strategy())
        for mapper in augmentation.MAPPERS:
            inputs = tree["INPUT"] | {"DATASET_MAPPER_NAME": mapper, "SIZE_DIVISIBILITY": -1}
            batches = training_dataset(tree | {"INPUT": inputs}, dataset, seed=0, batch=IMAGES, max_objects=10, canvas=(96, 96))
            batch = next(iter(batches))
            objects = dict(zip(batch.pop("image_id").numpy().astype(int).tolist(), batch["num_objects"].numpy().tolist(), strict=True))
            assert {image_id for image_id, count in objects.items() if count == 0} == without
            result, _ = training._train(batch)
            losses = {key: float(loss) for key, loss in result.losses.items()}
            assert np.isfinite([*losses.values(), float(result.gradient_norm)]).all()
            assert result.finite.numpy().all()
            assert losses["loss_ce"] > 0
            assert (losses["loss_mask"] > 0) == (losses["loss_dice"] > 0) == (len(without) < IMAGES)


def test_the_command_takes_them(data, out, uncompiled, monkeypatch):
    """A record without segments, a map that is ignored everywhere, ids that the JSON lacks."""
    without_objects(data, 1)
    change_segments(data, 3, lambda segments: segments[1:])
    batches = []
    monkeypatch.setattr(loop.Training, "run", lambda self, run, progress: batches.append(next(iter(self._batches(0)))))
    assert cli.main(arguments(data, out, **OPTIONS | QUICK)) == cli.OK
    counts = dict(zip(batches[0]["image_id"].numpy().astype(int), batches[0]["num_objects"].numpy(), strict=True))
    assert counts == {record.image_id: len(record.segments) for record in open_training_set("shapes", data).records}
    assert counts[1] == 0


def truncate(data):
    file = files(data, 2)[0]
    with open(file, "r+b") as stream:
        stream.truncate(200)
    return file


def remove(which):
    def change(data):
        file = files(data, 2)[which]
        os.remove(file)
        return file

    return change


def repaint(which, change):
    def change_file(data):
        file = files(data, 2)[which]
        change_pixels(file, change)
        return file

    return change_file


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (truncate, "corrupt image"),
        (remove(0), "missing file"),
        (remove(2), "missing file"),
        (repaint(2, lambda labels: labels[1:]), "annotation size ≠ image size"),
        (repaint(2, lambda labels: np.where(labels == labels[0, 0], 7, labels).astype(np.uint8)), "unknown category"),
        (repaint(1, lambda rgb: rgb[..., 0]), "wrong format"),
    ],
    ids=["corrupt image", "missing image", "missing map", "map of another size", "unknown class", "panoptic map that is grey"],
)
def test_a_bad_file(change, kind, data, out, uncompiled, capfd):
    """What is wrong with it and nothing else; it would be there again, and the training would not go on."""
    file = change(data)
    assert cli.main(arguments(data, out, **OPTIONS | QUICKEST)) == cli.BAD_INPUT
    told = capfd.readouterr()
    assert told.out == ""
    first, expected, next_step = told.err[told.err.index("error: ") :].splitlines()
    assert first == f"error: {file}: {kind}"
    assert expected.startswith("  expected ")
    assert next_step == "  'tfmaskformer data check' lists all problems"
    assert "Traceback" not in told.err
    assert out.exists() == (kind != "missing file")  # these are looked for before anything is written


def test_a_file_that_could_not_be_read(data, out, uncompiled, monkeypatch, capfd):
    """It may be there again: buckets fail at times."""
    bad, read = files(data, 2)[1], tf.io.gfile.GFile

    def fails(path, mode="r"):
        if path == bad:
            raise tf.errors.UnavailableError(None, None, "try again")
        return read(path, mode)

    monkeypatch.setattr(tf.io.gfile, "GFile", fails)
    assert cli.main(arguments(data, out, **OPTIONS | QUICKEST)) == cli.COULD_NOT_RUN
    err = capfd.readouterr().err
    assert err[err.index("error: ") :].splitlines() == [
        f"error: {bad}: unreadable file",
        "  expected a file that can be read, got try again",
        "  'tfmaskformer data check' lists all problems",
        "  the same command goes on from the last checkpoint",
    ]


def error_of(data):
    """What ``tf.data`` makes of a bad file."""
    with pytest.raises(tf.errors.OpError) as raised:
        list(tfrecords.from_disk(open_training_set("shapes", data)))
    return raised.value


def test_the_model_garden_tells_it_as_well(data, monkeypatch, capsys):
    """Its driver; what it drives is not needed for that."""
    file = truncate(data)
    error = error_of(data)

    def fails(runner, mode):
        raise error

    monkeypatch.setitem(sys.modules, "tfmaskformer.model_garden.task", types.ModuleType("task"))
    monkeypatch.setattr(driver, "_runner", lambda arguments: None)
    monkeypatch.setattr(driver, "_run", fails)
    assert driver.main(["--experiment", "any", "--mode", "train", "--model_dir", "any"]) == driver.BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith(f"error: {file}: corrupt image\n  expected a whole image, got ")
    assert err.endswith("\n  'tfmaskformer data check' lists all problems\n")
    assert len(err.splitlines()) == 3


def test_another_error_is_not_taken_for_bad_data(data):
    """Which may have been read ahead."""
    file = truncate(data)
    found = tfrecords.bad_data(error_of(data))
    assert isinstance(found, DataError)
    assert (found.problem.kind, found.problem.file) == ("corrupt image", file)
    assert tfrecords.bad_data(tf.errors.ResourceExhaustedError(None, None, f"cannot write beside {file}")) is None
    assert tfrecords.bad_data(OSError(28, "No space left on device")) is None
