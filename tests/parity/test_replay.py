"""Forced replay: of a right port every module is right by itself, and of a broken one the broken module alone is wrong."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from parity import replay as replays
from parity import tap_rules
from parity.replay import ReplayError, replay
from parity.tap_rules import Layout, TapRuleError, View, official_layout, tensorflow_layout
from parity.trace import POSITION_EMBEDDING, Trace
from tfmaskformer import pixel_decoder, resnet, swin, transformer
from tfmaskformer.checkpoint import load
from tfmaskformer.layers import Linear, MultiheadAttention
from tfmaskformer.module import Taps, named_modules, record_taps, tap

from .breaks import replace, weight

GOLDEN = Path(__file__).parents[1] / "golden"
PANOPTIC, SWIN, DEEPLAB, PER_PIXEL = NAMES = ("tiny_panoptic", "tiny_swin", "tiny_deeplab", "tiny_per_pixel")
PIXEL = "sem_seg_head.pixel_decoder"
ENCODER = f"{PIXEL}.transformer.encoder"
DECODER = "sem_seg_head.predictor.transformer.decoder"
EXACT = 1e-12


@pytest.fixture(scope="module")
def model_of(converted):
    """Name → float64 model, which no test leaves changed."""
    return functools.cache(lambda name: load(str(converted(name)), "float64"))


@pytest.fixture
def case_of():
    opened = []

    def case(name):
        opened.append(Trace(GOLDEN / "whole" / name).case("odd"))
        return opened[-1]

    yield case
    for case in opened:
        case.close()


def wrong(found):
    """Taps that are wrong by themselves."""
    return {name for name, error in found.errors.items() if error > EXACT and POSITION_EMBEDDING not in name.partition("#")[0]}


@pytest.mark.parametrize(
    ("name", "padding", "pad_to"),
    [*((name, "official", None) for name in NAMES), (PANOPTIC, "masked", (96, 128)), (SWIN, "masked", (64, 96))],
)
def test_of_a_right_port_every_module_is_right_by_itself(model_of, case_of, name, padding, pad_to):
    model, case = model_of(name), case_of(name)
    found = replay(model, case, padding=padding, pad_to=pad_to, gradients=True)
    partners = tap_rules.partners(model.config)
    assert set(found.errors) == set(case.reference.group("taps")) - set(partners)
    assert wrong(found) == set()
    assert max([error for name, error in found.errors.items() if POSITION_EMBEDDING in name], default=0) < 1e-6
    official = {partner: name for name, (partner, _) in partners.items()}
    taps = {name for name in found.gradients if "#" in name}
    recorded = case.reference.group("tap_gradients") if name != SWIN else {}  # of that one there are samples
    assert {official.get(name, name) for name in taps} == set(recorded)
    assert max([found.gradients[name] for name in taps], default=0) < EXACT
    for name, record in case.reference.group("losses").items():
        assert found.results.groups["losses"][name] == pytest.approx(record.statistics.sum, rel=EXACT)


# --- breaks


def at(path, name, value):
    """The attribute ``name`` of one module is ``value``, past Keras, which would track it."""
    return lambda model, monkeypatch: monkeypatch.setitem(vars(dict(named_modules(model))[path]), name, value)


def in_one(path, kind, make):
    """``call`` of the module at ``path`` is ``make(what it was)``; the others of its kind are as they were."""

    def apply(model, monkeypatch):
        right = kind.call
        other = make(right)

        def call(self, *arguments, **keywords):
            return (other if self.official_name == path else right)(self, *arguments, **keywords)

        monkeypatch.setattr(kind, "call", call)

    return apply


def no_shortcut(right):
    def call(self, inputs, sizes=None):
        return tf.nn.relu(self.conv3(tf.nn.relu(self.conv2(tf.nn.relu(self.conv1(inputs)), sizes))))

    return call


def no_relu(right):
    """Behind the first convolution."""

    def call(self, inputs, sizes=None):
        outputs = tf.nn.relu(self.conv2(self.conv1(inputs, sizes)))
        return resnet._max_pool(tf.nn.relu(self.conv3(outputs)), sizes)

    return call


def half_pixel(right):
    def resize(images, size, *sizes):
        rows, columns = (((tf.range(out) * 2 + 1) * into // (2 * out)) for out, into in zip(size, images.shape[1:3], strict=True))
        return tf.gather(tf.gather(images, rows, axis=1), columns, axis=2)

    return resize


def queries_and_keys(values):
    query, key, value = np.split(values, 3, axis=-1)
    return np.concatenate([key, query, value], axis=-1)


def position_forgotten(right):
    return lambda self, tgt, memory, pos, query_pos, valid_keys=None: right(self, tgt, memory, 0 * pos, query_pos, valid_keys)


BREAKS = {
    # name: (model, break, taps that are wrong by themselves)
    "transposed kernel": (
        PANOPTIC,
        weight("sem_seg_head.predictor.mask_embed.layers.1.weight", np.transpose),
        {"sem_seg_head.predictor.mask_embed.layers.1#0"},
    ),
    "stale weight": (PANOPTIC, weight("backbone.res4.2.conv2.weight", lambda values: 1.001 * values), {"backbone.res4.2.conv2.norm#0"}),
    "eps of one norm": (PANOPTIC, at(f"{PIXEL}.adapter_2.norm", "eps", 1e-6), {f"{PIXEL}.adapter_2.norm#0"}),
    "missing bias": (PANOPTIC, at(f"{PIXEL}.mask_features", "use_bias", False), {f"{PIXEL}.mask_features#0"}),
    "q and k exchanged": (
        PANOPTIC,
        weight(f"{DECODER}.layers.1.multihead_attn.in_proj_weight", queries_and_keys),
        {f"{DECODER}.layers.1.multihead_attn#0[{item}]" for item in (0, 1)},
    ),
    "residual connection forgotten": (PANOPTIC, in_one("backbone.res3.1", resnet.BottleneckBlock, no_shortcut), {"backbone.res3.1#0"}),
    "half-pixel nearest": (
        PER_PIXEL,
        replace(pixel_decoder, "resize_nearest", half_pixel),
        {f"{PIXEL}.layer_{index}.norm#0" for index in (1, 2, 3)},
    ),
    "a position that is not added": (
        PANOPTIC,
        in_one(f"{DECODER}.layers.2", transformer.TransformerDecoderLayer, position_forgotten),
        {f"{DECODER}.layers.2.multihead_attn#0[{item}]" for item in (0, 1)},
    ),
    "approximate GELU": (
        SWIN,
        in_one("backbone.layers.1.blocks.0.mlp.act", swin.Gelu, lambda right: lambda self, inputs: tf.nn.gelu(inputs, approximate=True)),
        {"backbone.layers.1.blocks.0.mlp.act#0"},
    ),
    "one bias table": (
        SWIN,
        weight("backbone.layers.2.blocks.1.attn.relative_position_bias_table", lambda values: values[::-1]),
        {"backbone.layers.2.blocks.1.attn.softmax#0"},
    ),
    "ReLU forgotten": (DEEPLAB, in_one("backbone.stem", resnet.DeepLabStem, no_relu), {"backbone.stem.conv2.norm#0"}),
}


@pytest.mark.parametrize("name", BREAKS)
def test_of_a_broken_port_the_broken_module_alone_is_wrong(name, model_of, case_of, monkeypatch):
    of, broken, taps = BREAKS[name]
    model = model_of(of)
    with Restored(model):
        broken(model, monkeypatch)
        found = replay(model, case_of(of))
        assert wrong(found) <= taps
        assert wrong(found)
        if len(taps) < 3:
            assert wrong(found) == taps


class Restored:
    """Gives a model its variables back."""

    def __init__(self, model):
        self.before = [(variable, variable.numpy()) for variable in model.variables]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for variable, value in self.before:
            variable.assign(value)


def test_a_call_can_be_done_again_when_the_fault_is_undone(model_of, case_of):
    model, case = model_of(PANOPTIC), case_of(PANOPTIC)
    tap_name, norm = f"{PIXEL}.layer_2.norm#0", f"{DECODER}.norm#1"
    with Restored(model):
        kernel = dict(named_modules(model))[f"{PIXEL}.layer_2"].weight
        right = kernel.numpy()
        kernel.assign(np.transpose(right, [1, 0, 2, 3]))
        calls = replay(model, case, capture=[tap_name, norm, "images#0", "nothing#0"]).calls
        call = calls[tap_name]
        assert call.residual() > 1e-3
        kernel.assign(right)
        assert call.residual() < EXACT
    assert set(calls) == {tap_name, norm}  # what no module computed is not called
    assert call.module.official_name == f"{PIXEL}.layer_2"  # with its norm
    assert set(call.expected) == {tap_name, f"{PIXEL}.layer_2#0"}
    again = call.rerun()
    for name, expected in call.expected.items():
        np.testing.assert_allclose(again[name], expected, rtol=1e-9, atol=1e-9)
    assert call.caller.module.official_name == "sem_seg_head"
    assert call.caller.caller is None
    # A module that is called several times: the second call with its own recorded inputs, also inside its caller.
    assert calls[norm].expected.keys() == {norm}
    assert calls[norm].residual() < EXACT
    assert calls[norm].caller.module.official_name == DECODER
    assert {norm, f"{DECODER}.norm#2", f"{DECODER}#0"} < calls[norm].caller.expected.keys()
    assert calls[norm].caller.residual() < EXACT


def test_a_gradient_shows_what_its_own_module_does(model_of, case_of, monkeypatch):
    """Twice the gradient, the same value."""
    layer = f"{ENCODER}.layers.1"

    def doubled(right):
        def call(self, inputs):
            outputs = right(self, inputs)
            return 2 * outputs - tf.stop_gradient(outputs)

        return call

    model, case = model_of(PANOPTIC), case_of(PANOPTIC)
    in_one(f"{layer}.linear2", Linear, doubled)(model, monkeypatch)
    found = replay(model, case, gradients=True)
    assert wrong(found) == set()
    noise = {name for name, record in case.reference.group("gradients").items() if max(record.floor) > 1e-10}
    assert {name for name, error in found.gradients.items() if error > 1e-9} - noise == {
        f"{layer}.linear2.weight",
        f"{layer}.linear2.bias",
        f"{layer}.dropout#0",  # what goes into it
    }
    assert found.gradients[f"{layer}.linear2.weight"] == pytest.approx(1)


def test_another_shape_is_an_error_and_nothing_is_made_to_fit(model_of, case_of, monkeypatch):
    name = f"{DECODER}.layers.0.self_attn"

    def one_key_less(right):
        def call(self, *arguments):
            outputs, weights = right(self, *arguments)
            return outputs, weights[..., 1:]

        return call

    model = model_of(PANOPTIC)
    in_one(name, MultiheadAttention, one_key_less)(model, monkeypatch)
    found = replay(model, case_of(PANOPTIC))
    assert found.errors[f"{name}#0[1]"] == np.inf
    assert wrong(found) == {f"{name}#0[1]"}


def test_samples_are_not_enough():
    with Trace(GOLDEN / "tiny_swin").case("odd") as case:
        assert "samples" in replays.why_not(case)
        with pytest.raises(ReplayError, match=r"case odd cannot be replayed: .* --samples"):
            replay(None, case)


# --- the parts


def test_a_substitute_goes_on_in_place_of_a_tap():
    seen = []

    def substitute(name, tensor):
        seen.append((name, tensor))
        return -tensor

    with record_taps(substitute) as taps:
        assert tap("a", 1) == -1
        assert tap("a", {"x": 2, "y": [3, None, (4,)]}) == {"x": -2, "y": [-3, None, (-4,)]}
    assert tap("a", 1) == 1
    assert seen == list(taps.items()) == [("a#0", 1), ("a#1[x]", 2), ("a#1[y][0]", 3), ("a#1[y][2][0]", 4)]
    assert taps.calls == {"a": 2}
    assert Taps().add("b", (5,)) == (5,)


@pytest.mark.parametrize(
    ("layout", "shape", "view"),
    [
        (Layout("BHWC", "BCHW"), (2, 32, 40, 3), View(1, (128, 160), (101, 75))),
        (Layout("BSC", "SBC", 32), (2, 20, 3), View(1, (128, 160), (101, 75))),
        (Layout("BYXPC", "(BYX)PC", 8), (2, 4, 4, 25, 3), View(0, (128, 160), (101, 75))),
        (Layout("BHWC", "B(HW)C"), (2, 5, 4, 3), None),
    ],
)
def test_the_layouts_of_both_sides_are_each_others_inverse(layout, shape, view):
    actual = np.random.default_rng(0).standard_normal(shape)
    official = official_layout(actual, layout, view)
    other = tensorflow_layout(official + 1, layout, actual, view)
    np.testing.assert_array_equal(official_layout(other, layout, view), official + 1)
    assert np.count_nonzero(other != actual) == official.size  # and nothing else
    with pytest.raises(TapRuleError, match="no place"):
        tensorflow_layout(official[..., :-1], layout, actual, view)


def test_a_memory_budget_changes_nothing(model_of, case_of):
    model, case = model_of("tiny_per_pixel"), case_of("tiny_per_pixel")
    kept, spooled = replay(model, case), replay(model, case, memory_budget=8)
    assert spooled.errors == kept.errors
    for name, scores in kept.results.groups["inference"].items():
        np.testing.assert_array_equal(spooled.results.groups["inference"][name], scores)
