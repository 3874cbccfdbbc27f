"""The model's contract: outputs, dtypes, names, both kinds of padding, graph and XLA. That it equals PyTorch is parity's to prove."""

import numpy as np
import pytest
import tensorflow as tf

from tests.tfmaskformer.conftest import SMALL, random_values
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_modules, named_variables, parameter_specs, record_taps, recording

IMAGE_SIZES = ((75, 91), (60, 50), (97, 33))


def _photo(height, width, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _canvas(images, height, width, fill):
    canvas = np.full((len(images), height, width, 3), fill, np.uint8)
    for index, image in enumerate(images):
        canvas[index, : image.shape[0], : image.shape[1]] = image
    return canvas


def _relative(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def _padded(size, divisor):
    return -(-size // divisor) * divisor if divisor else size


@pytest.mark.parametrize(("height_px", "width_px"), [(75, 91), (64, 128), (33, 34)])
def test_shapes_of_outputs_at_any_size(small, height_px, width_px):
    config, model = small
    outputs = model(_photo(height_px, width_px)[None])
    grid = tuple(-(-_padded(size, config.size_divisibility) // 4) for size in (height_px, width_px))
    assert "valid_sizes" not in outputs
    assert len(outputs["aux_outputs"]) == config.predictor.dec_layers - 1
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_logits"].shape == (1, config.predictor.num_queries, config.num_classes + 1)
        assert layer["pred_masks"].shape == (1, config.predictor.num_queries, *grid)
        assert layer["pred_masks"].dtype == tf.float64
    assert outputs["padded_size"].numpy().tolist() == [_padded(size, config.size_divisibility) for size in (height_px, width_px)]


@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_masked_padding_gives_what_each_image_gives_alone(small, fill, mode):
    """On a canvas that fits none of them, whatever stands outside the images, at every query, layer and valid pixel."""
    config, model = small
    images = [_photo(*size, seed) for seed, size in enumerate(IMAGE_SIZES)]
    canvas = _canvas(images, 131, 140, fill)
    run = tf.function(model, jit_compile=True) if mode == "xla" else model
    together = run(canvas, image_sizes=tf.constant(IMAGE_SIZES), padding="masked")
    for index, image in enumerate(images):
        alone = model(image[None])
        height, width = alone["pred_masks"].shape[2:]
        for actual, expected in zip((together, *together["aux_outputs"]), (alone, *alone["aux_outputs"]), strict=True):
            # The float32 position embedding is the only thing above 1e-12 (NumPy, eager and XLA sines differ in the last bit).
            assert _relative(actual["pred_logits"][index], expected["pred_logits"][0]) < 1e-6
            assert _relative(actual["pred_masks"][index, :, :height, :width], expected["pred_masks"][0]) < 1e-6
            outside = actual["pred_masks"][index].numpy()
            outside[:, :height, :width] = 0
            assert not outside.any()
        assert together["valid_sizes"][index].numpy().tolist() == [_padded(size, config.size_divisibility) for size in image.shape[:2]]


def test_masked_padding_without_sizes_is_the_canvas(small):
    _, model = small
    image = _photo(75, 91)[None]
    assert _relative(model(image, padding="masked")["pred_logits"], model(image)["pred_logits"]) < 1e-12


def test_official_padding_shows_zeros_behind_the_normalisation(small):
    """Batch of two: the smaller image is padded with zeros *after* normalisation, up to the canvas and the divisor."""
    config, model = small
    images = [_photo(*size, seed) for seed, size in enumerate(IMAGE_SIZES[:2])]
    with record_taps() as taps:
        outputs = model(_canvas(images, 75, 91, 255), image_sizes=tf.constant(IMAGE_SIZES[:2]))
    seen = taps["images#0"].numpy()
    assert seen.shape == (2, _padded(75, config.size_divisibility), _padded(91, config.size_divisibility), 3)
    mean, std = np.float32(config.pixel_mean), np.float32(config.pixel_std)
    for index, image in enumerate(images):
        height, width = image.shape[:2]
        np.testing.assert_allclose(seen[index, :height, :width], (image - mean.astype(np.float64)) / std, rtol=1e-15)
        rest = seen[index].copy()
        rest[:height, :width] = 0
        assert not rest.any()
    # The network sees that padding: the small image does not give what it gives alone.
    assert _relative(outputs["pred_logits"][1], model(images[1][None])["pred_logits"][0]) > 1e-3


def test_masks_block_gradients_from_the_padding(small):
    _, model = small
    canvas = tf.Variable(tf.cast(_canvas([_photo(60, 50)], 99, 88, 77), tf.float64))
    with tf.GradientTape() as tape:
        outputs = model(canvas, image_sizes=tf.constant([[60, 50]]), padding="masked")
        loss = tf.reduce_sum(outputs["pred_logits"] ** 2) + tf.reduce_sum(outputs["pred_masks"] ** 2)
    gradient = tape.gradient(loss, canvas).numpy()
    assert np.abs(gradient[:, :60, :50]).min() > 0
    gradient[:, :60, :50] = 0
    assert not gradient.any()


def test_graph_with_unknown_sizes_equals_eager(small):
    _, model = small
    run = tf.function(lambda images: model(images)["pred_masks"], input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8)])
    for size in IMAGE_SIZES:
        image = _photo(*size)[None]
        assert _relative(run(image), model(image)["pred_masks"]) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("mixed_bfloat16", 0.1)])
def test_lower_precisions_follow_float64(small, dtype, tolerance):
    config, model = small
    variables = named_variables(model)
    lower = MaskFormer(config, dtype)
    lower.build_parameters(lambda name: variables[name].numpy())
    assert all(variable.dtype == "float32" for variable in lower.variables)
    image = _photo(75, 91)[None]
    actual = lower(image)["pred_logits"]
    assert actual.dtype == (tf.bfloat16 if dtype == "mixed_bfloat16" else tf.float32)
    assert 0 < _relative(tf.cast(actual, tf.float64), model(image)["pred_logits"]) < tolerance


def test_dropout_only_in_training(small):
    _, model = small
    image = _photo(33, 34)[None]
    quiet = model(image)["pred_logits"].numpy()
    assert np.array_equal(model(image)["pred_logits"], quiet)
    tf.random.set_seed(3)
    assert _relative(model(image, training=True)["pred_logits"], quiet) > 1e-3


def test_names_are_there_before_the_variables_and_match_them(small):
    config, model = small
    planned = parameter_specs(MaskFormer(config))
    assert not MaskFormer(config).variables
    built = named_variables(model)
    assert {name: tuple(variable.shape) for name, variable in built.items()} == {name: spec.shape for name, spec in planned.items()}
    assert {name for name, spec in planned.items() if spec.trainable} == {name for name, v in built.items() if v.trainable}
    assert sum(map(np.size, model.variables)) == sum(int(np.prod(spec.shape)) for spec in planned.values())
    assert {
        "backbone.stem.conv1.norm.running_var",
        "backbone.res2.0.shortcut.weight",
        "backbone.res5.2.conv3.norm.bias",
        "sem_seg_head.pixel_decoder.adapter_1.norm.weight",
        "sem_seg_head.pixel_decoder.mask_features.bias",
        "sem_seg_head.predictor.transformer.decoder.layers.1.multihead_attn.in_proj_weight",
        "sem_seg_head.predictor.query_embed.weight",
        "sem_seg_head.predictor.mask_embed.layers.2.bias",
    } <= planned.keys()


def test_every_module_that_computes_is_tapped_once_or_more(small):
    config, model = small
    with record_taps() as taps:
        assert recording()
        model(_photo(33, 34)[None])
    assert not recording()
    tapped = {key.partition("#")[0] for key in taps} - {"images"}
    silent = {name for name, _ in named_modules(model)} - tapped
    # As upstream: containers, embeddings and out_proj are never called, and the pixel decoder runs through forward_features.
    assert all(name.endswith((".layers", "query_embed", "out_proj", "sem_seg_head.pixel_decoder")) for name in silent), silent
    norm = "sem_seg_head.predictor.transformer.decoder.norm"
    assert [key for key in taps if key.startswith(norm)] == [f"{norm}#{call}" for call in range(config.predictor.dec_layers)]
    weights = taps["sem_seg_head.predictor.transformer.decoder.layers.0.self_attn#0[1]"]
    np.testing.assert_allclose(tf.reduce_sum(weights, axis=-1), 1, rtol=1e-12)


def test_initial_distributions_are_the_official_ones():
    model = MaskFormer(SMALL["base"])
    model.build_parameters()
    values = {name: variable.numpy() for name, variable in named_variables(model).items()}
    kernel = values["backbone.res4.1.conv2.weight"]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * kernel.shape[-1])), rel=0.05)
    kernel = values["sem_seg_head.pixel_decoder.layer_1.weight"]
    assert np.abs(kernel).max() == pytest.approx(np.sqrt(3 / (9 * 64)), rel=0.01)
    weight = values["sem_seg_head.predictor.transformer.decoder.layers.0.self_attn.in_proj_weight"]
    assert np.abs(weight).max() == pytest.approx(np.sqrt(6 / (96 + 3 * 96)), rel=0.01)
    assert np.abs(values["sem_seg_head.predictor.class_embed.weight"]).max() == pytest.approx(1 / np.sqrt(96), rel=0.05)
    assert np.std(values["sem_seg_head.predictor.query_embed.weight"]) == pytest.approx(1, rel=0.1)
    assert (values["backbone.stem.conv1.norm.running_var"] == np.float32(1 - 1e-5)).all()


def test_wrong_arguments_are_named(small):
    config, model = small
    with pytest.raises(ValueError, match="dtype is 'float16'"):
        MaskFormer(config, "float16")
    with pytest.raises(ValueError, match="padding is 'zero'"):
        model(_photo(33, 34)[None], padding="zero")
    for sizes in ([[33, 35]], [[0, 34]]):
        with pytest.raises(ValueError, match=r"image_sizes are .* to the canvas"):
            model(_photo(33, 34)[None], image_sizes=np.array(sizes))


def test_models_do_not_disturb_the_global_policy():
    import keras

    before = keras.config.dtype_policy().name
    MaskFormer(SMALL["base"], "float64")
    assert keras.config.dtype_policy().name == before


def test_values_of_the_wrong_shape_do_not_slip_in():
    config = SMALL["base"]
    values = random_values(config)
    values["sem_seg_head.predictor.class_embed.weight"] = values["sem_seg_head.predictor.class_embed.weight"].T
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        MaskFormer(config).build_parameters(values.__getitem__)


def test_criterion_wants_targets_on_the_padded_canvas(small):
    """75×91 px and 96×96 px give masks of other sizes, 797…800 px the same: only the padded size tells a forgotten padding."""
    from tfmaskformer.criterion import SetCriterion

    config, model = small
    outputs = model(_photo(33, 34)[None])
    height, width = outputs["padded_size"].numpy().tolist()
    criterion = SetCriterion(config)

    def targets(height, width):
        return {"labels": np.array([[1, 2]]), "masks": np.ones((1, 2, height, width), bool), "num_objects": np.array([2])}

    losses, _ = criterion(outputs, targets(height, width))
    assert all(np.isfinite(loss.numpy()) for loss in losses.values())
    with pytest.raises(ValueError, match=r"expected .* the padded canvas"):
        criterion(outputs, targets(height - 1, width))
