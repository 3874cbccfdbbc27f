"""The small trained checkpoint: what it is said to be, and as good in TensorFlow as in PyTorch."""

from __future__ import annotations

import hashlib
import importlib.resources
import json

import numpy as np
import pytest

import tfmaskformer
from checkpoints import registry
from converters import cli
from converters.unpickle import read_model
from tfmaskformer.data import shapes
from tfmaskformer.evaluation.panoptic import PanopticQuality

NAME = "shapes_panoptic"
IMAGES = 50
FILE = importlib.resources.files("checkpoints") / "small" / f"{NAME}.pkl"
MADE = json.loads((importlib.resources.files("checkpoints") / "small" / f"{NAME}.json").read_text(encoding="utf-8"))
OFFICIAL = MADE["validation"][f"first_{IMAGES}_images"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    destination = tmp_path_factory.mktemp("shapes") / "tf_ckpt"
    assert cli.main(["--src", str(FILE), "--dst", str(destination), "--config", NAME]) == 0
    return destination


def test_file_is_the_one_that_is_described():
    content = FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() == MADE["sha256"]
    assert len(content) < 4_000_000


def test_file_has_the_layout_of_its_entry():
    tensors = read_model(FILE.read_bytes()).tensors
    layout = registry.layout(registry.entry(NAME))
    assert {key: (tensor.shape, tensor.dtype.name) for key, tensor in tensors.items()} == {
        registry.v1_key(key): (spec.shape, spec.dtype) for key, spec in layout.items()
    }


def test_published_quality():
    assert registry.entry(NAME).metrics == {"PQ": MADE["validation"][f"first_{shapes.VALIDATION_IMAGES}_images"]["all"]["pq"]}
    assert registry.entry(NAME).metrics["PQ"] >= 60


def test_manifest_tells_the_licence(converted):
    assert "Apache-2.0 (trained on generated images, made by tfmaskformer)" in (converted / "manifest.json").read_text(encoding="utf-8")


def test_same_quality_as_the_official_model(converted):
    """Every class has the official number of matched, surplus and missed segments. IoUs were equal where they were recorded; a thousandth
    of their sum is some ten pixels that rounding may move at the borders of 20 and more segments of 200 px and more."""
    model = tfmaskformer.load(str(converted))
    quality = PanopticQuality(model.config.num_classes, model.config.thing_classes)
    for index in range(IMAGES):
        image, panoptic_seg, segments_info = shapes.sample("val", index)
        [found] = tfmaskformer.panoptic_inference(model(image[None]), model.config, [image.shape[:2]])
        quality.update(panoptic_seg, segments_info, *found)
    for counts in ("true_positives", "false_positives", "false_negatives"):
        assert getattr(quality, counts).tolist() == OFFICIAL[counts], counts
    np.testing.assert_allclose(quality.iou, OFFICIAL["iou"], rtol=1e-3)
    assert 100 * quality.result()["all"].pq >= 60
