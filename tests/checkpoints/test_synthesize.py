"""Synthetic checkpoints: the same bytes everywhere, in the official file's structure, with nothing trivial inside."""

from __future__ import annotations

import hashlib
import pickle
import pickletools

import numpy as np
import pytest

from checkpoints import registry, synthesize

RECIPES = [entry.name for entry in registry.entries()] + ["tiny_panoptic", "tiny_semantic"]


# Of tiny_panoptic, seed 0.
FIXED = {
    "backbone.stem.conv1.weight": "9386e070c1f5d6b0aafbcabebe13bbc19305c9d30b0982976ba60c24d588d71d",
    "backbone.res4.5.conv3.weight": "cfdc7224b39e1a1c00461fc3186e38bed9035592091b18ec4412ce97c0a36d61",
    "backbone.res5.2.conv3.norm.running_var": "3c305f0930a7b6b03033ceed268e10d93337399b35060450de5ecc88074ecfdf",
    "sem_seg_head.pixel_decoder.layer_2.norm.bias": "7701fb9c40eec947868c195dfacbd7b4a578d517a4e5231e8b413048bd010ad2",
    "sem_seg_head.predictor.transformer.decoder.layers.1.linear1.bias": "e4d49a22fb89bc15a35137b9d4517d3c92b3b9813855cbb075076ac2961d2330",
    "sem_seg_head.predictor.class_embed.bias": "2557a7fa6d2554b7fc0d6b7a825ac9ab4ee119e491ad60174dc3f82dee5a4ee8",
    "criterion.empty_weight": "0b98854f7c1d7535b644623868db52e8cdd596bbf8668c9c293bf4bc84501cc9",
}
FIXED_FILE = "6f9ccfdd1ba5134bc2e801bd67d4c0c428d2c6f5721d0561db9da69e6677ac53"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def tiny() -> dict[str, np.ndarray]:
    return synthesize.synthesize(registry.entry("tiny_panoptic"))


@pytest.fixture(scope="module")
def tiny_bytes(tiny) -> bytes:
    return synthesize.pickle_bytes(tiny)


def test_bits_are_the_published_philox_stream():
    """Independent of NumPy: Philox4x64-10 (Salmon et al. 2011), written out in Python's integers."""
    mask = 2**64 - 1
    key = int.from_bytes(hashlib.sha256(b"3:some.name").digest()[:16], "little")
    words = []
    for block in (1, 2):  # NumPy counts up before the first block
        counter, keys = [block, 0, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
            counter = [high1 ^ counter[1] ^ keys[0], low1, high0 ^ counter[3] ^ keys[1], low0]
            keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
        words += counter
    halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    expected = [((half >> 8) | 1) - 2**23 for half in halves]
    assert synthesize.bits("some.name", 3, 15).tolist() == expected[:15]


def test_values_are_the_exact_ones_rounded_twice():
    spec = registry.TensorSpec((7, 5), "float32", "parameter")
    drawn = synthesize.draw("name", spec, synthesize.Draw(0.3, 0.7), 0)
    uniform = synthesize.bits("name", 0, 35).astype(np.float64) / 2**23
    product = (uniform * np.float64(np.float32(0.3))).astype(np.float32)  # 24 × 24 bits are exact in float64
    expected = (product.astype(np.float64) + np.float64(np.float32(0.7))).astype(np.float32)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn.ravel(), expected)


def test_centred_filters_sum_to_nothing():
    spec = registry.TensorSpec((6, 11, 3, 2), "float32", "parameter")
    sums = synthesize.draw("name", spec, synthesize.Draw(1.0, centred=True), 0).astype(np.float64).sum(axis=1)
    assert abs(sums).max() < 11 * 2**-22
    assert abs(synthesize.draw("name", spec, synthesize.Draw(1.0), 0).astype(np.float64).sum(axis=1)).max() > 0.5


def test_replaced_elements():
    spec = registry.TensorSpec((4,), "float32", "buffer")
    drawn = synthesize.draw("name", spec, synthesize.Draw(0.0, 1.0, replace={-1: 0.1}), 0)
    assert drawn.tolist() == [1, 1, 1, np.float32(0.1)]


def test_name_and_seed_both_count(tiny):
    entry = registry.entry("tiny_panoptic")
    same, other = synthesize.synthesize(entry, 0), synthesize.synthesize(entry, 1)
    for key, value in tiny.items():
        np.testing.assert_array_equal(same[key], value)
        fixed = key in ("criterion.empty_weight", "sem_seg_head.predictor.class_embed.bias")  # the recipe has every element
        assert np.array_equal(other[key], value) == fixed, key
    layers = [tiny[f"sem_seg_head.predictor.transformer.decoder.layers.{index}.linear1.weight"] for index in range(3)]
    assert not np.array_equal(layers[0] / abs(layers[0]).max(), layers[1] / abs(layers[1]).max())


def test_bytes_are_fixed(tiny, tiny_bytes):
    """Whoever changes these changes every trace recorded from a synthetic checkpoint."""
    assert {key: sha256(tiny[key].tobytes()) for key in FIXED} == FIXED
    assert sha256(tiny_bytes) == FIXED_FILE


def test_file_is_a_plain_zoo_pickle(tiny, tiny_bytes):
    """NumPy 1's names, protocol 3, nothing but arrays; v1 keys."""
    operations = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(tiny_bytes)]
    assert operations[0] == ("PROTO", 3)
    assert [argument for name, argument in operations if name == "GLOBAL"] == [
        "numpy.core.multiarray _reconstruct",
        "numpy ndarray",
        "numpy dtype",
    ]
    assert not {name for name, _ in operations} & {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "EXT1", "PERSID", "BINPERSID"}
    loaded = pickle.loads(tiny_bytes, encoding="latin1")
    assert list(loaded) == ["model", "__author__"]
    assert list(loaded["model"]) == [registry.v1_key(key) for key in tiny]
    for key, value in tiny.items():
        array = loaded["model"][registry.v1_key(key)]
        assert array.dtype == np.float32
        assert array.flags.writeable
        np.testing.assert_array_equal(array, value)


def test_scalars_and_empty_arrays_can_be_written():
    arrays = {"a": np.float32(2).reshape(()), "b": np.zeros((0, 3), np.float32)}
    loaded = pickle.loads(synthesize.pickle_bytes(arrays), encoding="latin1")["model"]
    assert loaded["a"].shape == ()
    assert loaded["a"] == 2
    assert loaded["b"].shape == (0, 3)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_its_layout_and_is_not_trivial(name):
    entry = registry.entry(name)
    recipe, layout = synthesize.recipe(name), registry.layout(entry)
    assert list(recipe) == list(layout)
    for key, draw in recipe.items():
        if key == "criterion.empty_weight":
            assert draw == synthesize.Draw(0.0, 1.0, replace={-1: entry.config["criterion"]["no_object_weight"]})
            continue
        if key.endswith("relative_position_index"):
            assert synthesize.draw(key, layout[key], draw, 0).dtype == np.int64
            continue
        assert draw.gain > 0, key
        if key.endswith("running_var"):
            assert 0.02 <= draw.offset - draw.gain < draw.offset + draw.gain <= 0.3, "an eps of 1e-5 must show"
        if key.startswith("backbone") and key.endswith("norm.weight"):
            assert draw.offset > 2 * draw.gain, "no channel is switched off"
    # Every channel has its own number, in norms and biases too (2048 numbers of 23 bits may well meet once).
    small = {key: spec for key, spec in layout.items() if len(spec.shape) == 1 and key != "criterion.empty_weight"}
    for key, spec in list(small.items())[:: len(small) // 20]:
        values = synthesize.draw(key, spec, recipe[key], 0)
        assert len(np.unique(values)) > 0.99 * spec.size, key
        assert np.all(values != 0), key


def test_recipe_that_does_not_fit_is_refused():
    entry = registry.entry("tiny_panoptic")
    recipe = dict(synthesize.recipe("tiny_panoptic"))
    del recipe["sem_seg_head.predictor.query_embed.weight"]
    with pytest.raises(registry.ZooError, match=r"does not fit its layout: sem_seg_head.predictor.query_embed.weight \(1 tensors\)"):
        synthesize.synthesize(entry, 0, recipe)


def test_bad_seed_and_missing_recipe():
    with pytest.raises(registry.ZooError, match="seed is -1, expected 0 or above"):
        synthesize.synthesize(registry.entry("tiny_panoptic"), -1)
    with pytest.raises(registry.ZooError, match="no recipe for 'nothing'"):
        synthesize.recipe("nothing")


def test_write_is_atomic(tmp_path, tiny, monkeypatch):
    destination = tmp_path / "model_final.pkl"
    destination.write_bytes(b"old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(synthesize, "write_pickle_to", broken)
    with pytest.raises(OSError, match="disk full"):
        synthesize.write_pickle(tiny, destination)
    assert destination.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [destination]


def test_official_loader_accepts_the_file(official_sources, tmp_path, tiny):
    from parity import official

    entry = registry.entry("tiny_panoptic")
    code = official.load(*official_sources)
    config = code.config(code.maskformer / entry.official_config)
    config.merge_from_list(list(entry.official_options))
    synthesize.write_pickle(tiny, tmp_path / "model_final.pkl")
    state = code.model(config, tmp_path / "model_final.pkl").state_dict()  # raises for a missing or unexpected key
    for key, value in tiny.items():
        np.testing.assert_array_equal(state[key].numpy(), value)
