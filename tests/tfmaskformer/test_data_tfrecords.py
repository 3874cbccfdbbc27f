"""TFRecord builds: the same samples as from disk, other projects' features, damage, resuming and kills."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from checkpoints import registry
from tfmaskformer.data import examples, generated, tfrecords
from tfmaskformer.data.datasets import open_dataset
from tfmaskformer.data.layouts import LAYOUTS
from tfmaskformer.data.records import DataError


def make(name, folder, count=5):
    generated.write(name, folder, list(LAYOUTS[name].splits)[-1], count)
    return open_dataset(name, folder)


def contents(folder):
    return {file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()}


def first_example(folder, index=0):
    files = sorted(str(file) for file in pathlib.Path(folder).glob("*.tfrecord"))
    record = list(tf.data.TFRecordDataset(files).as_numpy_iterator())[index]
    return tf.train.Example.FromString(record).features.feature


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_as_from_disk(name, tmp_path):
    dataset = make(name, tmp_path)
    out = tmp_path / "out"
    manifest = tfrecords.build(dataset, out, shards=2, deeplab2=True)
    assert [shard["records"] for shard in manifest["shards"].values()] == [2, 3]
    from_disk, from_records = tfrecords.from_disk(dataset), tfrecords.read(out)
    assert from_disk.element_spec == from_records.element_spec == examples.element_spec(dataset.layout)
    assert from_records.cardinality() == len(dataset.records)
    for sample, expected, actual in zip(dataset.samples(), from_disk, from_records, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, expected, actual)
        np.testing.assert_array_equal(actual["image"], sample.image)
        if sample.panoptic_seg is not None:
            np.testing.assert_array_equal(actual["panoptic_seg"], sample.panoptic_seg)
            for field, values in actual["segments"].items():
                assert values.numpy().tolist() == [segment[field] for segment in sample.segments_info]
        if sample.sem_seg is not None:
            np.testing.assert_array_equal(actual["sem_seg"], sample.sem_seg)
        assert actual["image_id"].numpy().decode() == str(sample.record.image_id)


def test_image_bytes_are_kept_where_tensorflow_sees_the_same(tmp_path):
    dataset = make("coco_panoptic", tmp_path)
    tfrecords.build(dataset, tmp_path / "out")
    for index, record in enumerate(dataset.records):
        features = first_example(tmp_path / "out", index)
        encoded = features["image/encoded"].bytes_list.value[0]
        turned = index % 5 == 4
        assert (encoded == pathlib.Path(record.image).read_bytes()) == (not turned)
        assert features["image/format"].bytes_list.value[0] == (b"png" if turned else b"jpeg")
        assert features["image/key/sha256"].bytes_list.value[0].decode() == hashlib.sha256(encoded).hexdigest()


def test_features_of_deeplab2(tmp_path):
    """As its SegmentationDecoder reads them."""
    dataset = make("coco_panoptic", tmp_path, 3)
    tfrecords.build(dataset, tmp_path / "out", deeplab2=True)
    for index, sample in enumerate(dataset.samples()):
        features = first_example(tmp_path / "out", index)
        height, width = (features[f"image/{side}"].int64_list.value[0] for side in ("height", "width"))
        assert (height, width, features["image/channels"].int64_list.value[0]) == sample.image.shape
        assert features["image/filename"].bytes_list.value[0].decode() == os.path.basename(sample.record.image)
        assert features["image/segmentation/class/format"].bytes_list.value[0] == b"raw"
        label = np.frombuffer(features["image/segmentation/class/encoded"].bytes_list.value[0], "<i4").reshape(height, width)
        numbers: dict[int, int] = {}
        expected = np.zeros_like(label)
        for segment in sample.segments_info:
            number = 0
            if segment["isthing"] and not segment["iscrowd"]:
                number = numbers[segment["category_id"]] = numbers.get(segment["category_id"], 0) + 1
            expected[sample.panoptic_seg == segment["id"]] = 256 * (segment["category_id"] + 1) + number
        np.testing.assert_array_equal(label, expected)
    assert index == 2


def test_deeplab2_labels_of_cityscapes(tmp_path):
    """Numbers of its data/dataset.py: ignore label 255, divisor 1000, classes from 0."""
    dataset = make("cityscapes_panoptic", tmp_path, 1)
    tfrecords.build(dataset, tmp_path / "out", deeplab2=True)
    (sample,) = dataset.samples()
    raw = first_example(tmp_path / "out")["image/segmentation/class/encoded"].bytes_list.value[0]
    label = np.frombuffer(raw, "<i4").reshape(sample.panoptic_seg.shape)
    assert set(np.unique(label[sample.panoptic_seg == 0])) == {255000}
    assert {value // 1000 for value in np.unique(label)} == {255, *(segment["category_id"] for segment in sample.segments_info)}


@pytest.mark.parametrize(("name", "shift"), [("coco_panoptic", 0), ("ade20k_panoptic", 1)])
def test_features_of_the_model_garden(name, shift, tmp_path):
    """As its panoptic TfExampleDecoder reads them."""
    dataset = make(name, tmp_path, 2)
    tfrecords.build(dataset, tmp_path / "out")
    ids = registry.dataset(LAYOUTS[name].dataset).dataset_ids
    for index, sample in enumerate(dataset.samples()):
        features = first_example(tmp_path / "out", index)
        category, instance = (
            tf.io.decode_image(features[f"image/panoptic/{mask}_mask"].bytes_list.value[0], channels=1).numpy()[..., 0]
            for mask in ("category", "instance")
        )
        assert (category[sample.panoptic_seg == 0] == 0).all()
        assert (instance[sample.panoptic_seg == 0] == 0).all()
        for number, segment in enumerate(sample.segments_info, 1):
            mask = sample.panoptic_seg == segment["id"]
            assert (category[mask] == ids[segment["category_id"]] + shift).all()
            assert (instance[mask] == (number if segment["isthing"] else 0)).all()
        assert features["image/source_id"].bytes_list.value[0].decode() == str(sample.record.image_id)


def test_semantic_features(tmp_path):
    """The label map is a PNG of 8 bits, of 16 where there are more classes."""
    for name, mode in (("ade20k", "L"), ("ade20k_full", "I;16"), ("mapillary_vistas", "L")):
        tfrecords.build(make(name, tmp_path, 1), tmp_path / name)
        features = first_example(tmp_path / name)
        assert features["image/segmentation/class/format"].bytes_list.value[0] == b"png"
        with Image.open(io.BytesIO(features["image/segmentation/class/encoded"].bytes_list.value[0])) as label:
            assert label.mode == mode


def test_in_a_bucket(tmp_path):
    dataset = make("ade20k", tmp_path)
    manifest = tfrecords.build(dataset, "ram://records/ade20k", shards=2)
    local = tfrecords.build(dataset, tmp_path / "out", shards=2)
    assert manifest == local
    assert len(list(tfrecords.read("ram://records/ade20k"))) == 5


def test_processes_write_the_same(tmp_path):
    dataset = make("ade20k_panoptic", tmp_path, 7)
    tfrecords.build(dataset, tmp_path / "one", shards=3)
    done = []
    tfrecords.build(dataset, tmp_path / "two", shards=3, processes=2, progress=lambda *numbers: done.append(numbers))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert done[0] == (0, 7)
    assert done[-1] == (7, 7)


def test_finished_shards_are_kept(tmp_path):
    dataset = make("ade20k", tmp_path, 6)
    out = tmp_path / "out"

    class StopError(Exception):
        pass

    def stop(done, images):
        if done >= 4:
            raise StopError

    with pytest.raises(StopError):
        tfrecords.build(dataset, out, shards=3, progress=stop)
    with pytest.raises(DataError, match="2 of 3 shards"):
        tfrecords.read(out)
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tfrecord")}
    assert len(before) == 2
    (out / ".building-left").mkdir()
    tfrecords.build(dataset, out, shards=3)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    tfrecords.build(dataset, tmp_path / "whole", shards=3)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_lost_shard_is_built_again(tmp_path):
    dataset = make("ade20k", tmp_path, 4)
    tfrecords.build(dataset, tmp_path / "out", shards=2)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "val-00001-of-00002.tfrecord").unlink()
    tfrecords.build(dataset, tmp_path / "out", shards=2)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_seen(verify, tmp_path):
    tfrecords.build(make("ade20k", tmp_path, 2), tmp_path / "out")
    shard = tmp_path / "out" / "val-00000-of-00001.tfrecord"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(tf.errors.OpError, match="damaged shard" if verify else "corrupted record"):
        list(tfrecords.read(tmp_path / "out", verify=verify))


def test_another_build_is_refused(tmp_path):
    dataset = make("ade20k", tmp_path, 4)
    tfrecords.build(dataset, tmp_path / "out", shards=2)
    before = contents(tmp_path / "out")
    for other, options in ((dataset, {"shards": 4}), (make("coco_stuff_10k", tmp_path, 4), {"shards": 2})):
        with pytest.raises(tfrecords.DestinationError, match="another build"):
            tfrecords.build(other, tmp_path / "out", **options)
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(tfrecords.DestinationError, match="malformed JSON"):
        tfrecords.build(dataset, tmp_path / "out", shards=2)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(tfrecords.DestinationError, match="without a manifest"):
        tfrecords.build(dataset, tmp_path / "out", shards=2)
    assert {name: content for name, content in before.items() if name != "manifest.json"} == contents(tmp_path / "out")


def test_bad_data(tmp_path):
    """Stop keeps what is finished; skip leaves the image out and tells it; neither forgets the other's rule."""
    dataset = make("ade20k", tmp_path, 6)
    bad = pathlib.Path(dataset.records[3].image)
    content = bad.read_bytes()
    bad.write_bytes(content[:-300])
    for _ in range(2):
        with pytest.raises(DataError, match="corrupt image"):
            tfrecords.build(dataset, tmp_path / "out", shards=3)
    assert (tmp_path / "out" / "val-00000-of-00003.tfrecord").exists()
    manifest = tfrecords.build(dataset, tmp_path / "out", shards=3, on_error="skip")
    assert [shard["records"] for shard in manifest["shards"].values()] == [2, 1, 2]
    (problem,) = manifest["shards"]["val-00001-of-00003.tfrecord"]["problems"]
    assert problem["file"] == str(bad)
    left = [element["image_id"].numpy().decode() for element in tfrecords.read(tmp_path / "out")]
    assert left == [record.image_id for index, record in enumerate(dataset.records) if index != 3]
    with pytest.raises(DataError, match="corrupt image"):
        tfrecords.build(dataset, tmp_path / "out", shards=3)
    bad.write_bytes(content)
    manifest = tfrecords.build(dataset, tmp_path / "out", shards=3)
    assert sum(shard["records"] for shard in manifest["shards"].values()) == 6


def test_too_many_instances_for_deeplab2(tmp_path, monkeypatch):
    dataset = make("coco_panoptic", tmp_path, 3)
    monkeypatch.setitem(LAYOUTS, "coco_panoptic", dataclasses.replace(dataset.layout, deeplab2=(1, 0, 1)))
    with pytest.raises(DataError, match="too many instances"):
        tfrecords.build(dataset, tmp_path / "out", deeplab2=True)


def run_killer(*arguments):
    script = pathlib.Path(__file__).with_name("tfrecord_killer.py")
    result = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_killed_builds(tmp_path):
    kills = int(os.environ.get("TFMASKFORMER_KILLS", "4"))
    make("coco_panoptic", tmp_path, 16)
    results = run_killer(tmp_path, kills)
    assert len(results["kills"]) == kills
    assert sum(0 < kill["finished"] < results["shards"] for kill in results["kills"]) >= kills // 2
    assert all(kill["kept"] and kill["whole"] for kill in results["kills"])
    assert results["same_bytes"]
