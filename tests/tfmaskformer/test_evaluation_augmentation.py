"""Test-time augmentation against recordings of the official one (tests/golden/evaluation/record.py)."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints import registry
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.evaluation.augmentation import OFFICIAL, Augmentation, augmented_images, augmented_scores, official_augmentation

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation" / "augmented.npz"


@pytest.fixture(scope="module")
def recorded():
    """By case: its settings, the image, the official scores and, of a stand-in, what it saw."""
    with np.load(GOLDEN) as file:
        cases = {case["name"]: case for case in json.loads(str(file["json"]))["cases"]}
        for name, case in cases.items():
            height, width = case["input"]
            case |= {"image": file["image_maps"][:height, :width], "scores": file[f"{name}_scores"]}
            if f"{name}_maps" in file:
                sizes = file[f"{name}_sizes"]
                parts = np.split(file[f"{name}_maps"], np.cumsum(sizes.prod(1))[:-1])
                case["seen"] = [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]
    return cases


def augmentation_of(case):
    return Augmentation(tuple(case["min_sizes"]), case["max_size"], case["flip"])


@pytest.mark.parametrize(("name", "number"), [("stand_in", 6), ("no_flip", 2)])
def test_images_and_means_are_the_official_ones(recorded, name, number):
    """To the last bit: sizes, Pillow's pixels, mirroring, and the order of float32 sums. A size of the first case meets the limit."""
    case = recorded[name]
    seen = []

    def infer(image):
        seen.append(image)
        return np.random.default_rng(int(image.sum())).random((3, *case["output"]), np.float32)

    scores = augmented_scores(infer, case["image"], augmentation_of(case))
    assert len(seen) == len(case["seen"]) == number
    for actual, expected in zip(seen, case["seen"], strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, case["scores"])
    again = [mirrored for _, mirrored in augmented_images(case["image"], augmentation_of(case))]
    assert again == ([False, True] if case["flip"] else [False]) * len(case["min_sizes"])
    if name == "stand_in":
        assert [image.shape[:2] for image in seen[::2]] == [(24, 32), (46, 60), (40, 53)]


def test_scores_of_the_small_trained_model_are_the_official_ones(recorded, tmp_path):
    """The two float64 models agree to 1e-11 on one image; scores are sums of up to 20 queries."""
    import tfmaskformer
    from converters import cli

    case = recorded["small"]
    source = importlib.resources.files("checkpoints") / "small" / "shapes_panoptic.pkl"
    assert cli.main(["--src", str(source), "--dst", str(tmp_path / "tf_ckpt"), "--config", "shapes_panoptic"]) == 0
    model = tfmaskformer.load(str(tmp_path / "tf_ckpt"), "float64")

    def infer(image):
        sizes = {"image_sizes": [image.shape[:2]], "output_sizes": [case["output"]]}
        return tfmaskformer.semantic_inference(model(image[np.newaxis]), model.config, **sizes)[0]

    scores = augmented_scores(infer, case["image"], augmentation_of(case))
    np.testing.assert_allclose(scores, case["scores"], rtol=0, atol=1e-8)
    plain = infer(case["image"])
    assert np.abs(plain - case["scores"]).max() > 0.05  # augmentation is really in it


def test_settings_are_those_of_the_official_configs(official_sources):
    """Of every entry of the model zoo."""
    from parity import official

    code = official.load()
    for entry in registry.entries():
        settings = code.config(entry.official_config.removeprefix("configs/")).TEST.AUG
        expected = Augmentation(tuple(settings.MIN_SIZES), settings.MAX_SIZE, settings.FLIP)
        assert official_augmentation(MaskFormerConfig.from_dict(entry.config)) == expected, entry.name


def test_settings_are_those_of_models():
    known = {(entry.dataset, entry.config["test"]["min_size"]) for entry in registry.entries()}
    assert OFFICIAL.keys() <= known
    names = ("maskformer_R50_bs16_160k", "maskformer_swin_base_IN21k_384_bs16_160k_res640", "maskformer_R50_bs16_300k")
    largest = [official_augmentation(MaskFormerConfig.from_dict(registry.entry(name).config)).max_size for name in names]
    assert largest == [3584, 4480, 4000]


def test_sizes():
    settings = Augmentation((40, 64, 90), 100)
    image = np.zeros((50, 75, 3), np.uint8)
    assert settings.sizes(50, 75) == [view.shape[:2] for view, _ in augmented_images(image, settings)]
    assert settings._replace(flip=False).sizes(50, 75) == [(40, 60), (64, 96), (67, 100)]
