"""The compiled post-processing against recordings of the official one, and against the NumPy form on many random batches."""

from __future__ import annotations

import importlib.util
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import tfmaskformer
from checkpoints import registry, synthesize
from converters import cli
from tfmaskformer.aot import compile_for_tpu
from tfmaskformer.config import MaskFormerConfig, TestConfig
from tfmaskformer.data import preprocessing, shapes
from tfmaskformer.evaluation.panoptic import PanopticQuality
from tfmaskformer.evaluation.results import read_panoptic
from tfmaskformer.static_inference import _below, static_panoptic_inference, static_semantic_inference

ROOT = Path(__file__).parents[2]
CASES = ("batch", "odd", "only_stuff", "nothing_kept", "edges", "edges_above")
COMPILED = ("batch", "edges")
"""Of the recorded cases; the others run as plain graphs, since compiling takes seconds. Random batches are all compiled."""

CLASSES = 5
RANDOM = MaskFormerConfig(name="random", num_classes=CLASSES, size_divisibility=0, thing_classes=(1, 4), test=TestConfig(True, 0.4, 0.75))


@pytest.fixture(scope="module")
def golden():
    """tests/tfmaskformer/golden/inference.npz: outputs, and what the official code makes of them."""
    with np.load(Path(__file__).with_name("golden") / "inference.npz") as file:
        return {name: {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")} for name in CASES}


def prepared(case, dtype="float64"):
    """Outputs, config, sizes and a canvas larger than them."""
    config = MaskFormerConfig(
        name="golden",
        num_classes=case["pred_logits"].shape[-1] - 1,
        size_divisibility=int(case["size_divisibility"]),
        thing_classes=tuple(case["thing_classes"].tolist()),
        test=TestConfig(**{key: float(case[key]) for key in ("object_mask_threshold", "overlap_threshold")}),
    )
    divisor = max(config.size_divisibility, 1)
    outputs = {key: tf.cast(case[key], dtype) for key in ("pred_logits", "pred_masks")}
    outputs["padded_size"] = tf.constant(-(-case["image_sizes"].max(0) // divisor) * divisor, tf.int32)
    sizes = [tf.constant(case[key], tf.int32) for key in ("image_sizes", "output_sizes")]
    return outputs, config, sizes, (case["output_sizes"].max(0) + [3, 1]).tolist()


def plain(results):
    """Comparable with ==; scores are left out."""
    return [
        (panoptic_seg.tolist(), [{key: value for key, value in segment.items() if key != "score"} for segment in infos])
        for panoptic_seg, infos in results
    ]


@pytest.mark.parametrize("name", CASES)
def test_panoptic_is_the_official_one_segment_for_segment(golden, name):
    case = golden[name]
    outputs, config, sizes, canvas = prepared(case)
    compiled = tf.function(
        lambda *arguments: static_panoptic_inference(arguments[0], config, *arguments[1:], canvas), jit_compile=name in COMPILED
    )
    segments = compiled(outputs, *sizes)
    batch, queries = case["pred_logits"].shape[:2]
    assert segments.panoptic_seg.shape == [batch, *canvas]
    assert segments.category_id.shape == segments.isthing.shape == segments.score.shape == [batch, queries]
    results = segments.images(sizes[1])
    for index, result in enumerate(plain(results)):
        rows = case[f"{index}/segments_info"].tolist()
        expected = [{"id": row[0], "isthing": bool(row[1]), "category_id": row[2]} for row in rows]
        assert result == (case[f"{index}/panoptic_seg"].tolist(), expected)
    for panoptic_seg, category_id, count in zip(segments.panoptic_seg, segments.category_id, segments.count, strict=True):
        assert set(np.unique(panoptic_seg)) <= set(range(int(count) + 1))
        assert (category_id.numpy() >= 0).tolist() == [True] * int(count) + [False] * (queries - int(count))
    assert not segments.panoptic_seg[:, canvas[0] - 3 :].numpy().any()


@pytest.mark.parametrize("name", ["batch", "odd"])
def test_semantic_is_the_official_one(golden, name):
    case = golden[name]
    outputs, config, sizes, canvas = prepared(case)
    for before in (True, False):
        compiled = tf.function(
            lambda *arguments, before=before: static_semantic_inference(
                arguments[0], config, *arguments[1:], canvas, postprocess_before_inference=before
            ),
            jit_compile=name in COMPILED,
        )
        scores = compiled(outputs, *sizes).numpy()
        assert scores.shape == (len(case["image_sizes"]), config.num_classes, *canvas)
        for index, (height, width) in enumerate(case["output_sizes"]):
            expected = case[f"{index}/scores_{'before' if before else 'after'}"]
            np.testing.assert_allclose(scores[index, :, :height, :width], expected, rtol=0, atol=1e-12)
            # What is evaluated: the argmax of what was resized, at the size of the result.
            np.testing.assert_array_equal(scores[index, :, :height, :width].argmax(0), expected.argmax(0))
            assert not scores[index, :, height:].any()
            assert not scores[index, :, :, width:].any()


BATCH, QUERIES, MAP, OUT = 3, 9, 16, 48


def random_batch(rng, dtype):
    """Images of random sizes with something behind their valid part. Of the queries some are equal, saturated, exactly ½ or no object."""
    sizes = rng.integers(1, 4 * MAP + 1, (BATCH, 2))
    valid = np.minimum(sizes + rng.integers(0, 2, (BATCH, 1)) * rng.integers(0, 30, (BATCH, 2)), 4 * MAP)
    logits = rng.normal(size=(BATCH, QUERIES, CLASSES + 1)) * 3
    y, x = np.mgrid[:MAP, :MAP] + 0.5
    place = rng.uniform(0, MAP, (2, BATCH, QUERIES, 1, 1))
    masks = 9 - np.hypot(y - place[0], x - place[1]) * rng.uniform(0.5, 6, (BATCH, QUERIES, 1, 1)) + rng.normal(size=(MAP, MAP))
    for image in range(BATCH):
        for query in rng.permutation(QUERIES)[:4]:
            kind, other = rng.integers(5), rng.integers(QUERIES)
            if kind == 0:  # an exact tie
                masks[image, query], logits[image, query] = masks[image, other], logits[image, other]
            elif kind == 4:  # one of two classes, both of probability 1
                masks[image, query] = masks[image, other]
                for index in (query, other):
                    logits[image, index] = 50.0 * (np.arange(CLASSES + 1) == rng.integers(CLASSES)) - 50
            elif kind == 1:
                masks[image, query] = np.where(masks[image, query] > 0, 80, -80)
            elif kind == 2:
                masks[image, query] = np.where(masks[image, query] > 4, 5, 0)
            else:
                logits[image, query, -1] = 20
    mode = rng.integers(4)
    if mode == 0:
        logits[0, :, -1] = 30  # nothing is kept
    if mode == 1:
        logits[1, :, [1, 4]] = -30  # only stuff
    for image in range(BATCH):
        height, width = -(-valid[image] // 4)
        masks[image, :, height:] = masks[image, :, :, width:] = rng.choice([77.0, -77.0])
    output_sizes = rng.integers(1, OUT + 1, (BATCH, 2))
    outputs = {
        "pred_logits": tf.constant(logits, dtype),
        "pred_masks": tf.constant(masks, dtype),
        "valid_sizes": tf.constant(valid, tf.int32),
    }
    return outputs, tf.constant(sizes, tf.int32), tf.constant(output_sizes, tf.int32)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_panoptic_is_the_numpy_form_on_random_batches(dtype):
    compiled = tf.function(lambda *arguments: static_panoptic_inference(arguments[0], RANDOM, *arguments[1:], (OUT, OUT)), jit_compile=True)
    rng = np.random.default_rng(0)
    met = {"nothing kept": 0, "only stuff": 0, "merged stuff": 0, "dropped": 0}
    for _ in range(40):
        outputs, sizes, output_sizes = random_batch(rng, dtype)
        segments = compiled(outputs, sizes, output_sizes)
        results = segments.images(output_sizes)
        expected = tfmaskformer.panoptic_inference(outputs, RANDOM, sizes, output_sizes)
        assert plain(results) == plain(expected)
        probabilities = tf.nn.softmax(outputs["pred_logits"]).numpy()
        kept = (probabilities.argmax(-1) < CLASSES) & (probabilities.max(-1) > 0.4)
        for image, (panoptic_seg, infos) in enumerate(results):
            labels = probabilities[image].argmax(-1)[kept[image]].tolist()
            met["nothing kept"] += not labels
            met["only stuff"] += bool(infos) and not any(segment["isthing"] for segment in infos)
            met["merged stuff"] += any(labels.count(label) > 1 for label in (0, 2, 3))
            met["dropped"] += bool(labels) and (panoptic_seg == 0).any()
            for segment in infos:
                of_class = kept[image] & (probabilities[image].argmax(-1) == segment["category_id"])
                assert np.isclose(probabilities[image].max(-1)[of_class], segment["score"], rtol=1e-6).any()
    assert min(met.values()) > 5, met


def test_semantic_is_the_numpy_form_on_random_batches():
    rng = np.random.default_rng(1)
    compiled = {
        before: tf.function(
            lambda *arguments, before=before: static_semantic_inference(
                arguments[0], RANDOM, *arguments[1:], (OUT, OUT), postprocess_before_inference=before
            ),
            jit_compile=True,
        )
        for before in (True, False)
    }
    for _ in range(5):
        arguments = outputs, sizes, output_sizes = random_batch(rng, "float64")
        for before, infer in compiled.items():
            scores = infer(*arguments).numpy()
            expected = tfmaskformer.semantic_inference(outputs, RANDOM, sizes, output_sizes, postprocess_before_inference=before)
            for actual, image in zip(scores, expected, strict=True):
                height, width = image.shape[1:]
                np.testing.assert_allclose(actual[:, :height, :width], image, rtol=0, atol=1e-12)


def test_a_per_pixel_baseline_gives_the_logits_of_the_numpy_form():
    config = MaskFormerConfig(name="plain", num_classes=3, head="PerPixelBaselineHead", size_divisibility=0)
    logits = tf.constant(np.random.default_rng(0).standard_normal((2, 3, 13, 18)))
    sizes, output_sizes = tf.constant([(45, 70), (51, 41)]), tf.constant([(30, 93), (60, 82)])
    for extra in ({"padded_size": tf.constant([51, 70])}, {"valid_sizes": tf.constant([(45, 70), (51, 41)])}):
        outputs = {"sem_seg": logits, **extra}
        compiled = tf.function(
            lambda *arguments: static_semantic_inference(arguments[0], config, *arguments[1:], (60, 93)), jit_compile=True
        )
        scores = compiled(outputs, sizes, output_sizes).numpy()
        for actual, image in zip(scores, tfmaskformer.semantic_inference(outputs, config, sizes, output_sizes), strict=True):
            height, width = image.shape[1:]
            np.testing.assert_allclose(actual[:, :height, :width], image, rtol=0, atol=1e-12)


def test_the_guide_runs_and_gives_what_each_image_gives_alone(monkeypatch, tmp_path):
    """docs/evaluation.md: network and post-processing compiled as one, two images of different sizes on one canvas."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--src", str(ROOT / "checkpoints/small/shapes_panoptic.pkl"), "--dst", "tf_ckpt", "--config", "shapes_panoptic"]) == 0
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(code, "docs/evaluation.md", "exec"), names)
    expected = PanopticQuality(len(shapes.CATEGORIES), names["model"].config.thing_classes)
    for number, _, panoptic_seg, infos in names["results"]:
        image, *truth = shapes.sample("val", number)
        assert panoptic_seg.shape == image.shape[:2]
        (alone,) = tfmaskformer.panoptic_inference(names["model"](image[np.newaxis]), names["model"].config, [image.shape[:2]])
        assert [(segment["isthing"], segment["category_id"]) for segment in infos] == [
            (segment["isthing"], segment["category_id"]) for segment in alone[1]
        ]
        assert (panoptic_seg != alone[0]).mean() < 1e-3  # float32 sums of another order move borders by a pixel here and there
        expected.update(*truth, *alone)
    assert names["total"].true_positives.tolist() == expected.true_positives.tolist()
    assert names["total"].true_positives.sum() > 8
    np.testing.assert_allclose(names["total"].iou, expected.iou, atol=0.02)
    ids = [category.id for category in shapes.CATEGORIES]
    for written, result in zip(read_panoptic("results", ids), names["results"], strict=True):
        np.testing.assert_array_equal(written[2], result[2])


def test_thresholds_default_to_the_config_and_can_be_given(golden):
    outputs, config, sizes, canvas = prepared(golden["edges"])
    given = {"object_mask_threshold": 0.25, "overlap_threshold": float(golden["edges_above"]["overlap_threshold"])}
    results = static_panoptic_inference(outputs, config, *sizes, canvas, **given).images(sizes[1])
    assert plain(results)[0][0] == golden["edges_above"]["0/panoptic_seg"].tolist()
    assert static_panoptic_inference(outputs, config, *sizes, canvas, object_mask_threshold=1.0).count.numpy().tolist() == [0]
    # At 0 no quotient is too small, but a query that won no pixel is no segment.
    results = static_panoptic_inference(outputs, config, *sizes, canvas, overlap_threshold=0.0).images(sizes[1])
    assert plain(results) == plain(tfmaskformer.panoptic_inference(outputs, config, *sizes, overlap_threshold=0.0))


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs the extra 'aot'")
def test_compiles_for_a_tpu():
    def infer(logits, masks, image_sizes, output_sizes):
        outputs = {"pred_logits": logits, "pred_masks": masks, "valid_sizes": image_sizes}
        return static_panoptic_inference(outputs, RANDOM, image_sizes, output_sizes, (160, 192))

    sizes = tf.TensorSpec([2, 2], tf.int32)
    stats = compile_for_tpu(infer, tf.TensorSpec([2, 100, CLASSES + 1]), tf.TensorSpec([2, 100, 32, 40]), sizes, sizes)
    assert stats.peak_hbm_bytes < 100 * 2 * 160 * 192 * 4 / 3  # never all masks at the output's size


@pytest.mark.parametrize(
    "threshold", [0.0, 0.5, 0.7, 0.8, 1 / 3, 0.1 + 0.2, 1.0, 194 / 368, np.nextafter(0.8, 0), np.nextafter(0.8, 1), 1e-9, 1.5]
)
def test_overlaps_are_compared_as_float64_quotients(threshold):
    """Quotients equal and next to the threshold, and random ones, up to the largest canvas."""
    largest = 50_000
    rng = np.random.default_rng(0)
    denominators = np.concatenate([np.arange(1, 400), rng.integers(1, largest + 1, 20_000), [largest]])
    nearest = np.floor(threshold * denominators).astype(np.int64)
    for numerators in (nearest - 1, nearest, nearest + 1, rng.integers(0, largest, len(denominators))):
        numerators = np.maximum(numerators, 0)
        below = _below(tf.constant(numerators, tf.int32), tf.constant(denominators, tf.int32), float(threshold), largest)
        np.testing.assert_array_equal(below, numerators / denominators < threshold)
    assert Fraction(4, 5) < Fraction(0.8)  # so that exact arithmetic with the float would drop a segment of just 80 %


ARCHITECTURES = ("tiny_panoptic", "tiny_semantic", "tiny_deeplab", "tiny_swin", "tiny_per_pixel", "tiny_per_pixel_plus")
SIZES = ((75, 101), (96, 64), (50, 83))
"""Of three photographs, px; odd, and multiples of 32."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_on_a_canvas_as_alone_for_every_architecture(name, tmp_path):
    """Masked padding through network and post-processing: the segments and classes that each image gives without the others, pixel for
    pixel. In float64, so that no sum of another order decides; the position embedding is float32 even then, and its last bit is all that
    differs: 2e-6 of scores up to 1 was the most."""
    entry = registry.entry(name)
    config = MaskFormerConfig.from_dict(entry.config)
    synthesize.write_pickle(synthesize.synthesize(entry), tmp_path / "model.pkl")
    assert cli.main(["--src", str(tmp_path / "model.pkl"), "--dst", str(tmp_path / "tf_ckpt"), "--config", name]) == 0
    model = tfmaskformer.load(str(tmp_path / "tf_ckpt"), "float64")
    canvas, output_sizes = (112, 120), [(60, 90), (131, 70), (50, 83)]
    images = np.zeros([3, *canvas, 3], np.uint8)
    photos = [
        preprocessing.decode_image((ROOT / "checkpoints/photos" / f"{photo}.png").read_bytes())
        for photo in ("chelsea", "coffee", "astronaut")
    ]
    alone = []
    for index, (photo, size) in enumerate(zip(photos, SIZES, strict=True)):
        image = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BILINEAR))
        images[index, : size[0], : size[1]] = image
        alone.append((model(image[np.newaxis]), [size], [output_sizes[index]]))
    sizes, outputs = tf.constant(SIZES), tf.constant(output_sizes)
    together = tf.function(lambda *arguments: model(*arguments, padding="masked"))(images, sizes)
    scores = static_semantic_inference(together, config, sizes, outputs, (131, 90)).numpy()
    met = set()
    for score, arguments in zip(scores, alone, strict=True):
        [expected] = tfmaskformer.semantic_inference(arguments[0], config, *arguments[1:])
        height, width = expected.shape[1:]
        np.testing.assert_allclose(score[:, :height, :width], expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(score[:, :height, :width].argmax(0), np.argmax(expected, 0))
        met |= set(np.unique(np.argmax(expected, 0)).tolist())
    assert len(met) > 1
    if "pred_logits" in together:
        thresholds = {"object_mask_threshold": 0.1, "overlap_threshold": 0.3}
        results = static_panoptic_inference(together, config, sizes, outputs, (131, 90), **thresholds).images(output_sizes)
        expected = [tfmaskformer.panoptic_inference(outputs, config, *sizes, **thresholds)[0] for outputs, *sizes in alone]
        assert plain(results) == plain(expected)
        assert sum(len(infos) for _, infos in expected) > 3
