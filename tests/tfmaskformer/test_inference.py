"""Inference against what the official code made of the same outputs (golden/record_inference.py), and its own rules."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tfmaskformer
from tfmaskformer.config import MaskFormerConfig, TestConfig
from tfmaskformer.resize import resize_bilinear

GOLDEN = Path(__file__).with_name("golden")
CASES = ("batch", "odd", "only_stuff", "nothing_kept", "edges", "edges_above")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "inference.npz") as file:
        return {name: {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")} for name in CASES}


def config_of(case, **test):
    thresholds = {key: float(case[key]) for key in ("object_mask_threshold", "overlap_threshold")}
    return MaskFormerConfig(
        name="golden",
        num_classes=case["pred_logits"].shape[-1] - 1,
        size_divisibility=int(case["size_divisibility"]),
        thing_classes=tuple(case["thing_classes"].tolist()),
        test=TestConfig(**thresholds, **test),
    )


def outputs_of(case, dtype="float64", **extra):
    return {key: tf.cast(case[key], dtype) for key in ("pred_logits", "pred_masks")} | extra


def infos(rows):
    return [{"id": row[0], "isthing": bool(row[1]), "category_id": row[2]} for row in rows.tolist()]


def segmentation(result):
    panoptic_seg, segments_info = result
    assert panoptic_seg.dtype == np.int32
    return panoptic_seg.tolist(), segments_info


@pytest.mark.parametrize("name", CASES)
def test_panoptic_inference_is_the_official_one_segment_for_segment(golden, name):
    case = golden[name]
    results = tfmaskformer.panoptic_inference(outputs_of(case), config_of(case), case["image_sizes"], case["output_sizes"])
    assert len(results) == len(case["image_sizes"])
    for index, result in enumerate(results):
        assert segmentation(result) == (case[f"{index}/panoptic_seg"].tolist(), infos(case[f"{index}/segments_info"]))


def test_the_golden_cases_hold_what_they_are_for(golden):
    for index in (0, 1):
        assert len({row[1] for row in golden["batch"][f"{index}/segments_info"].tolist()}) == 2  # things and stuff
    assert not golden["nothing_kept"]["0/panoptic_seg"].any()
    assert not golden["only_stuff"]["0/segments_info"][:, 1].any()
    assert len(golden["edges_above"]["0/segments_info"]) == len(golden["edges"]["0/segments_info"]) - 1
    for name in ("batch", "odd", "only_stuff", "edges"):
        case = golden[name]
        things = config_of(case).replace(thing_classes=tuple(range(config_of(case).num_classes)))
        apart = tfmaskformer.panoptic_inference(outputs_of(case), things, case["image_sizes"], case["output_sizes"])
        assert len(apart[0][1]) > len(case["0/segments_info"])  # stuff queries were merged
        assert (case["0/panoptic_seg"] == 0).any()  # queries were dropped


@pytest.mark.parametrize("name", ["batch", "odd"])
@pytest.mark.parametrize("mode", ["before", "after"])
def test_semantic_inference_is_the_official_one(golden, name, mode):
    case = golden[name]
    config = config_of(case, sem_seg_postprocessing_before_inference=mode == "before")
    results = tfmaskformer.semantic_inference(outputs_of(case), config, case["image_sizes"], case["output_sizes"])
    assert len(results) == len(case["image_sizes"])
    for index, scores in enumerate(results):
        assert scores.dtype == tf.float64
        np.testing.assert_allclose(scores, case[f"{index}/scores_{mode}"], rtol=0, atol=1e-12)


def test_panoptic_models_resize_logits(golden):
    case = golden["batch"]
    sizes = case["image_sizes"], case["output_sizes"]
    panoptic = config_of(case, panoptic_on=True)
    np.testing.assert_allclose(
        tfmaskformer.semantic_inference(outputs_of(case), panoptic, *sizes)[0], case["0/scores_before"], rtol=0, atol=1e-12
    )
    given = tfmaskformer.semantic_inference(outputs_of(case), panoptic, *sizes, postprocess_before_inference=False)
    np.testing.assert_allclose(given[0], case["0/scores_after"], rtol=0, atol=1e-12)
    assert np.abs(case["0/scores_before"] - case["0/scores_after"]).max() > 0.01  # the two are really different


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-6), ("bfloat16", 0.1)])
def test_lower_precision_gives_float32(golden, dtype, tolerance):
    """Rounding the inputs to bfloat16 moves scores by some 1e-2; float32 arithmetic on scores of up to 3 by 1e-6."""
    case = golden["odd"]
    (scores,) = tfmaskformer.semantic_inference(
        outputs_of(case, dtype), config_of(case), case["image_sizes"], postprocess_before_inference=True
    )
    assert scores.dtype == tf.float32
    np.testing.assert_allclose(scores, case["0/scores_before"], rtol=0, atol=tolerance)
    if dtype == "float32":
        (result,) = tfmaskformer.panoptic_inference(outputs_of(case, dtype), config_of(case), case["image_sizes"])
        assert segmentation(result) == (case["0/panoptic_seg"].tolist(), infos(case["0/segments_info"]))


def test_masked_padding_gives_what_the_image_gives_alone(golden):
    """Behind the valid part of pred_masks there is something that must not be seen."""
    cases = [golden["odd"], golden["only_stuff"]]
    classes, queries = 4, cases[0]["pred_logits"].shape[1]
    logits, masks = np.full((2, queries, classes + 1), -30.0), np.full((2, queries, 12, 13), 77.0)
    for index, case in enumerate(cases):
        alone_masks, alone_logits = case["pred_masks"][0], case["pred_logits"][0]
        masks[index, :, : alone_masks.shape[1], : alone_masks.shape[2]] = alone_masks
        logits[index, :, : alone_logits.shape[-1] - 1] = alone_logits[:, :-1]
        logits[index, :, -1] = alone_logits[:, -1]
    sizes = np.concatenate([case["image_sizes"] for case in cases])
    outputs_sizes = np.concatenate([case["output_sizes"] for case in cases])
    outputs = {"pred_logits": logits, "pred_masks": masks, "valid_sizes": tf.constant(sizes, tf.int32)}
    config = config_of(cases[0])
    for index, case in enumerate(cases):
        alone = {"pred_logits": logits[index : index + 1], "pred_masks": case["pred_masks"]}
        arguments = config, case["image_sizes"], case["output_sizes"]
        for before in (True, False):
            together = tfmaskformer.semantic_inference(outputs, config, sizes, outputs_sizes, postprocess_before_inference=before)
            (expected,) = tfmaskformer.semantic_inference(alone, *arguments, postprocess_before_inference=before)
            np.testing.assert_array_equal(together[index], expected)
        together = tfmaskformer.panoptic_inference(outputs, config, sizes, outputs_sizes)
        (expected,) = tfmaskformer.panoptic_inference(alone, *arguments)
        assert segmentation(together[index]) == segmentation(expected)
    assert expected[1]


def test_valid_size_beyond_the_image_is_its_canvas(golden):
    """An image of a model with a divisor: its valid size is a multiple of it, and what lies behind the image is cut off."""
    case = golden["batch"]
    first = {key: case[key][:1] for key in ("pred_logits", "pred_masks")} | {"valid_sizes": [[64, 64]]}
    (result,) = tfmaskformer.panoptic_inference(first, config_of(case), case["image_sizes"][:1], case["output_sizes"][:1])
    assert segmentation(result) == (case["0/panoptic_seg"].tolist(), infos(case["0/segments_info"]))


def test_padded_size_is_the_size_of_padded_images(golden):
    case = golden["batch"]
    config = config_of(case)
    first = {key: case[key][:1] for key in ("pred_logits", "pred_masks")}
    arguments = first, config, [[40, 58]], case["output_sizes"][:1]
    (result,) = tfmaskformer.panoptic_inference(*arguments, padded_size=(61, 58))  # rounded up to 64×64
    assert segmentation(result) == (case["0/panoptic_seg"].tolist(), infos(case["0/segments_info"]))
    (scores,) = tfmaskformer.semantic_inference(*arguments, padded_size=(61, 58))
    np.testing.assert_allclose(scores, case["0/scores_after"], rtol=0, atol=1e-12)


def test_output_size_defaults_to_the_image_and_thresholds_to_the_config(golden):
    case = golden["odd"]
    (result,) = tfmaskformer.panoptic_inference(outputs_of(case), config_of(case), [[35, 27]])
    assert segmentation(result) == (case["0/panoptic_seg"].tolist(), infos(case["0/segments_info"]))
    wrong = MaskFormerConfig(name="wrong", num_classes=4, size_divisibility=0, thing_classes=(1,), test=TestConfig(False, 0.9, 0.9))
    thresholds = {key: float(case[key]) for key in ("object_mask_threshold", "overlap_threshold")}
    assert len(tfmaskformer.panoptic_inference(outputs_of(case), wrong, [[35, 27]])[0][1]) < len(result[1])
    (given,) = tfmaskformer.panoptic_inference(outputs_of(case), wrong, [[35, 27]], **thresholds)
    assert segmentation(given) == segmentation(result)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equal_queries_tie_for_the_first_everywhere(dtype):
    """PyTorch's vectorised kernels may round equal queries differently, here they are equal to the last bit: the first wins."""
    rng = np.random.default_rng(0)
    for queries, height, width in ((2, 7, 9), (5, 13, 11), (13, 10, 17)):
        outputs = {
            "pred_logits": np.repeat(rng.normal(size=(1, 1, 4)) * 3 * [1, 1, 1, 0], queries, 1).astype(dtype),
            "pred_masks": np.repeat(rng.normal(size=(1, 1, height, width)) * 5, queries, 1).astype(dtype),
        }
        config = MaskFormerConfig(name="ties", num_classes=3, size_divisibility=0, thing_classes=(0, 1, 2))
        ((panoptic_seg, segments_info),) = tfmaskformer.panoptic_inference(outputs, config, [[4 * height, 4 * width]], [[41, 37]])
        assert len(segments_info) == 1
        assert (panoptic_seg == 1).all()


def test_semantic_scores_by_hand():
    """One pixel, one query: softmax of two classes and no object (all equal), times a mask of ½."""
    config = MaskFormerConfig(name="hand", num_classes=2, size_divisibility=0)
    outputs = {"pred_logits": np.zeros((1, 1, 3)), "pred_masks": np.zeros((1, 1, 1, 1))}
    (scores,) = tfmaskformer.semantic_inference(outputs, config, [(1, 1)])
    np.testing.assert_allclose(scores, np.full((2, 1, 1), 1 / 6), rtol=1e-15)


@pytest.mark.parametrize("infer", [tfmaskformer.semantic_inference, tfmaskformer.panoptic_inference])
@pytest.mark.parametrize(
    ("sizes", "keywords", "extra", "message"),
    [
        ([(35, 27), (35, 27)], {}, {}, r"image_sizes must be integers \(1, 2\).*got int64 \(2, 2\)"),
        ([(35.0, 27.0)], {}, {}, "image_sizes must be integers.*float64"),
        ([(0, 27)], {}, {}, "at least 1"),
        ([(35, 27)], {"output_sizes": [(0, 5)]}, {}, "output_sizes must be"),
        ([(30, 20)], {}, {}, r"pred_masks are 9×7, but a canvas of 30×20 gives 8×5; .*padded_size=\(height, width\)"),
        ([(35, 27)], {"padded_size": (34, 27)}, {}, "image 0 of 35×27 is larger than its canvas of 34×27"),
        ([(35, 27)], {"padded_size": (35, 27)}, {"valid_sizes": [(35, 27)]}, "padded_size is given, but outputs of masked padding"),
        ([(35, 27)], {}, {"valid_sizes": [(40, 27)]}, "pred_masks are 9×7, but a canvas of 40×27 gives 10×7"),
        ([(35, 27)], {}, {"pred_logits": np.zeros((1, 16, 6))}, "6 classes, expected 5"),
    ],
)
def test_sizes_that_do_not_fit_are_told(golden, infer, sizes, keywords, extra, message):
    case = golden["odd"]
    with pytest.raises(ValueError, match=message):
        infer(outputs_of(case) | extra, config_of(case), sizes, **keywords)


def test_the_official_code_still_says_so(golden, official_sources):
    recorded = runpy.run_path(str(GOLDEN / "record_inference.py"))["record"]()
    expected = {f"{name}/{key}": value for name, case in golden.items() for key, value in case.items()}
    assert set(recorded) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(recorded[key], value, rtol=0, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("seed", range(20))
def test_random_outputs_against_the_official_code(seed, official_sources):
    module = runpy.run_path(str(GOLDEN / "record_inference.py"))
    rng = np.random.default_rng(seed)
    images, sizes = ([tuple(rng.integers(1, 90, 2).tolist()) for _ in range(3)] for _ in range(2))
    case = module["random_case"](
        *(seed, images, sizes),
        size_divisibility=(0, 32)[seed % 2],
        queries=int(rng.integers(1, 20)),
        classes=5,
        thing_classes=(1, 4),
        thresholds=(0.4, 0.5),
    )
    expected = module["official_inference"](case, panoptic_on=True)
    arguments = outputs_of(case), config_of(case), images, sizes
    panoptic = tfmaskformer.panoptic_inference(*arguments)
    scores = tfmaskformer.semantic_inference(*arguments, postprocess_before_inference=True)
    for result, ours, our_scores in zip(expected, panoptic, scores, strict=True):
        assert segmentation(ours) == (result["panoptic_seg"][0].tolist(), result["panoptic_seg"][1])
        np.testing.assert_allclose(our_scores, result["sem_seg"].numpy(), rtol=0, atol=1e-12)
    for result, our_scores in zip(
        module["official_inference"](case, panoptic_on=False), tfmaskformer.semantic_inference(*arguments), strict=True
    ):
        np.testing.assert_allclose(our_scores, result["sem_seg"].numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["official", "masked"])
def test_a_per_pixel_baseline_gives_logits_upsampled_by_4_cropped_and_resized(padding):
    """Step by step with the plain resize, which has its own test against PyTorch; here the steps are one matrix an axis."""
    config = MaskFormerConfig(name="plain", num_classes=3, head="PerPixelBaselineHead", size_divisibility=0)
    logits = tf.constant(np.random.default_rng(0).standard_normal((2, 3, 13, 18)))
    sizes, output_sizes = [(45, 70), (51, 41)], [(30, 93), (60, 82)]
    extra = {"padded_size": (51, 70)} if padding == "official" else {"valid_sizes": np.array(sizes)}
    results = tfmaskformer.semantic_inference({"sem_seg": logits, **extra}, config, sizes, output_sizes)
    for index, (result, (height, width), output) in enumerate(zip(results, sizes, output_sizes, strict=True)):
        own = logits[index]
        if padding == "masked":
            own = own[:, : -(-height // 4), : -(-width // 4)]
        upsampled = resize_bilinear(own, [4 * length for length in own.shape[1:]])
        np.testing.assert_allclose(result, resize_bilinear(upsampled[:, :height, :width], output), rtol=0, atol=1e-13)


def test_a_per_pixel_baseline_has_no_segments_and_its_classes_are_checked():
    config = MaskFormerConfig(name="plain", num_classes=3, head="PerPixelBaselineHead", size_divisibility=0)
    outputs = {"sem_seg": np.zeros((1, 3, 9, 7))}
    with pytest.raises(ValueError, match=r"per-pixel baseline \(PerPixelBaselineHead\), which tells no objects apart"):
        tfmaskformer.panoptic_inference(outputs, config, [(35, 27)])
    with pytest.raises(ValueError, match=r"sem_seg have 3 classes, expected 4 \(num_classes of config 'plain'\); give"):
        tfmaskformer.semantic_inference(outputs, config.replace(num_classes=4), [(35, 27)])
    with pytest.raises(ValueError, match="sem_seg are 9×7, but a canvas of 50×27 gives 13×7"):
        tfmaskformer.semantic_inference(outputs, config, [(50, 27)])
