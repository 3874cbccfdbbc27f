"""Hypotheses that hold are told, with the module and the cause; those that do not are not."""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from parity import cli, compare, diagnose, diagnose_results, diagnose_steps, formulas_model, hypotheses, trajectory
from parity import formulas_results as results
from parity.formulas import CHOICES, FORMULAS, Reference
from parity.hypotheses import CAUSES
from parity.replay import replay
from parity.trace import Trace
from tfmaskformer import criterion, inference, layers, matcher, pixel_decoder, swin, transformer
from tfmaskformer.checkpoint import load
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import Module, named_variables, record_taps
from tfmaskformer.training import optimizer

SWIN, PANOPTIC = "tiny_swin", "tiny_panoptic"
GOLDEN = Path(__file__).parents[1] / "golden"
WHOLE, TRAININGS, SAMPLED = GOLDEN / "whole", GOLDEN / "trajectory", GOLDEN / "selftest" / "tiny_panoptic_0"
BLOCK = "backbone.layers.0.blocks.1"
DECODER = "sem_seg_head.predictor.transformer.decoder.layers.1"
PIXEL = "sem_seg_head.pixel_decoder"
CLASSES = "sem_seg_head.predictor.class_embed"


@pytest.fixture(scope="module")
def models(converted):
    """Name → float64 model, made once: what breaks it mends it."""
    return functools.cache(lambda name: load(converted(name), "float64"))


def weight(name, change):
    @contextlib.contextmanager
    def broken(model):
        variable = named_variables(model)[name]
        before = variable.numpy()
        variable.assign(change(before))
        yield
        variable.assign(before)

    return broken


def exchanged(first, second):
    @contextlib.contextmanager
    def broken(model):
        variables = named_variables(model)
        before = {name: variables[name].numpy() for name in (first, second)}
        variables[first].assign(before[second])
        variables[second].assign(before[first])
        yield
        for name, value in before.items():
            variables[name].assign(value)

    return broken


def replaced(owner, name, make):
    return lambda model: mock.patch.object(owner, name, make(getattr(owner, name)))


def attribute(path, name, value):
    return lambda model: hypotheses.attribute(_at(model, path), name, value)


def children(path, **others):
    """Past Keras, which would keep track of them."""
    return lambda model: mock.patch.dict(vars(_at(model, path)), others)


def _at(model, path):
    for name in path.split("."):
        model = getattr(model, name)
    return model


def both(*breaks):
    @contextlib.contextmanager
    def broken(model):
        with contextlib.ExitStack() as stack:
            for one in breaks:
                stack.enter_context(one(model))
            yield

    return broken


def half_pixel(right):
    def resize(maps, size, *sizes):
        return tf.constant(formulas_model.resized(maps.numpy(), tuple(size), "half-pixel nearest"))

    return resize


def without_positions(right):
    return lambda self, tgt, memory, pos, query_pos, valid=None: right(self, tgt, memory, tf.zeros_like(pos), query_pos, valid)


def runs_of_patches(right):
    return lambda grid, window: tf.reshape(grid, right(grid, window).shape)


def same(right):
    def conv2d(inputs, kernel, stride, padding):
        return right(inputs, kernel, stride, "SAME" if stride == 2 and kernel.shape[0] == 3 else padding)

    return conv2d


def of_classes(change):
    return both(*(weight(f"{CLASSES}.{name}", change) for name in ("weight", "bias")))


TAPS = {
    # name: (trace and case, break, where, cause)
    "GELU": (SWIN, replaced(swin.Gelu, "call", lambda right: lambda self, x: tf.nn.gelu(x, approximate=True)), "mlp.act", "gelu"),
    "shift": (
        SWIN,
        replaced(swin, "cyclic_shift", lambda right: lambda grid, shift, window, sizes=None: right(grid, -shift, window, sizes)),
        BLOCK,
        "shift",
    ),
    "no mask": (SWIN, replaced(swin, "shift_mask", lambda right: lambda *a: tf.zeros_like(right(*a))), "backbone.layers.0", "mask missing"),
    "the other mask": (
        SWIN,
        replaced(swin, "shift_mask", lambda right: lambda *a: -100 - right(*a)),
        "backbone.layers.0",
        "mask polarity",
    ),
    "attribute": (SWIN, attribute(f"{BLOCK}.attn", "scale", 1.0), f"{BLOCK}.attn", "scale"),
    "factor": (SWIN, weight(f"{BLOCK}.mlp.fc2.weight", lambda x: x * 1.037), f"{BLOCK}.mlp.fc2", "scale"),
    "zero bias": (SWIN, weight(f"{BLOCK}.mlp.fc1.bias", np.zeros_like), f"{BLOCK}.mlp.fc1", "bias"),
    "NaN": (SWIN, weight(f"{BLOCK}.mlp.fc1.bias", lambda x: np.where(np.arange(x.size) == 1, np.nan, x)), f"{BLOCK}.mlp.fc1", "not finite"),
    "half precision": (
        SWIN,
        weight(f"{BLOCK}.mlp.fc2.weight", lambda x: x.astype(np.float16).astype(float)),
        f"{BLOCK}.mlp.fc2",
        "dtype rounding",
    ),
    "single precision": (
        SWIN,
        replaced(swin.Softmax, "call", lambda right: lambda self, x: tf.cast(right(self, tf.cast(x, tf.float32)), tf.float64)),
        "attn.softmax",
        "dtype rounding",
    ),
    "layers exchanged": (
        SWIN,
        exchanged(f"{BLOCK}.mlp.fc1.weight", "backbone.layers.0.blocks.0.mlp.fc1.weight"),
        "backbone.layers.0.blocks.0.mlp.fc1",
        "layer order",
    ),
    "stale": (SWIN, exchanged(f"{BLOCK}.norm1.bias", f"{BLOCK}.norm2.bias"), f"{BLOCK}.norm1", "stale weight"),
    "masked scores": (SWIN, replaced(swin, "MASKED_SCORE", lambda right: -7.0), "backbone.layers.0", "scale"),
    "runs of patches": (SWIN, replaced(swin, "window_partition", runs_of_patches), "backbone.layers.0.blocks.0", "axis order"),
    "no norm": (SWIN, children("backbone.patch_embed", norm=lambda inputs: inputs), "backbone.patch_embed.norm", "missing term"),
    "kernel transposed": (
        PANOPTIC,
        weight("backbone.res3.0.conv2.weight", lambda x: x.swapaxes(2, 3)),
        "backbone.res3.0.conv2",
        "transpose",
    ),
    "rows and columns": (
        PANOPTIC,
        weight("backbone.res3.0.conv2.weight", lambda x: x.swapaxes(0, 1)),
        "backbone.res3.0.conv2",
        "axis order",
    ),
    "heads reversed": (
        PANOPTIC,
        weight(f"{DECODER}.self_attn.out_proj.weight", lambda x: x.reshape(8, -1, x.shape[1])[::-1].reshape(x.shape)),
        f"{DECODER}.self_attn.out_proj",
        "head split order",
    ),
    "input biases left out": (
        PANOPTIC,
        weight(f"{DECODER}.multihead_attn.in_proj_bias", np.zeros_like),
        f"{DECODER}.multihead_attn",
        "bias",
    ),
    "statistics not loaded": (
        PANOPTIC,
        both(
            weight("backbone.res3.1.conv1.norm.running_mean", np.zeros_like), weight("backbone.res3.1.conv1.norm.running_var", np.ones_like)
        ),
        "backbone.res3.1.conv1.norm",
        "stale weight",
    ),
    "deviation for variance": (PANOPTIC, weight("backbone.stem.conv1.norm.running_var", np.sqrt), "backbone.stem.conv1.norm", "scale"),
    "weight not loaded": (
        PANOPTIC,
        weight("backbone.res2.1.conv1.weight", lambda x: np.random.default_rng(0).standard_normal(x.shape)),
        "backbone.res2.1.conv1",
        "stale weight",
    ),
    "class head not loaded": (
        PANOPTIC,
        weight(f"{CLASSES}.weight", lambda x: np.random.default_rng(0).uniform(-1 / 8, 1 / 8, x.shape)),
        CLASSES,
        "stale weight",
    ),
    "rows in any order": (
        PANOPTIC,
        weight("backbone.res2.1.conv1.weight", lambda x: x[:, :, np.random.default_rng(0).permutation(x.shape[2])]),
        "backbone.res2.1.conv1",
        "axis order",
    ),
    "stride": (
        PANOPTIC,
        both(*(attribute(f"backbone.res5.0.{name}", "stride", 1) for name in ("conv2", "shortcut"))),
        "backbone.res5.0.conv2",
        "stride",
    ),
    "stride of the one before": (
        PANOPTIC,
        both(attribute("backbone.res3.0.conv1", "stride", 2), attribute("backbone.res3.0.conv2", "stride", 1)),
        "backbone.res3.0.conv1",
        "layer order",
    ),
    "output projection transposed": (
        PANOPTIC,
        weight(f"{DECODER}.self_attn.out_proj.weight", np.transpose),
        f"{DECODER}.self_attn.out_proj",
        "transpose",
    ),
    "frozen norm's eps": (
        PANOPTIC,
        attribute("backbone.stem.conv1.norm", "eps", 1e-6),
        "backbone.stem.conv1.norm",
        "eps",
    ),
    "same": (PANOPTIC, replaced(tf.nn, "conv2d", same), "backbone.res3.0.conv2", "padding side"),
    "half-pixel": (PANOPTIC, replaced(pixel_decoder, "resize_nearest", half_pixel), PIXEL, "half-pixel"),
    "no positions": (
        PANOPTIC,
        replaced(transformer.TransformerDecoderLayer, "call", without_positions),
        "decoder.layers.0",
        "missing term",
    ),
    "no object first": (PANOPTIC, of_classes(lambda x: np.roll(x, 1, -1)), CLASSES, "class order"),
    "BGR": (
        PANOPTIC,
        replaced(MaskFormer, "preprocess", lambda right: lambda self, images, sizes=None: right(self, images[..., ::-1], sizes)),
        "images",
        "BGR",
    ),
}


def found(models, name, broken, gradients=False, padding="official", pad_to=None):
    """The diagnosis of a broken model, of which afterwards every variable is as it was."""
    model, trace = models(name), Trace(WHOLE / name)
    with trace.case(trace.cases[0]) as case, broken(model):
        before = {name: variable.numpy() for name, variable in named_variables(model).items()}
        replayed = replay(model, case, gradients=gradients, padding=padding, pad_to=pad_to)
        failing = [("taps", tap) for tap, error in replayed.errors.items() if not error <= diagnose.floor_of(tap)]
        for group in ("matcher", "losses", "gradients", "inference") if padding == "official" else ():
            records = case.reference.group(group)
            names = [each for each in records if each in replayed.results.groups.get(group, ())]
            for each in reversed(names) if group == "gradients" else names:
                actual = records[each].select(np.asarray(replayed.results.official(group, each), order="C"))
                tolerance = compare.tolerance("float64", max(records[each].floor))
                failing += [(group, each)] if not diagnose.relative(actual, case.reference.read(group, each)) <= tolerance else []
        finding = diagnose_results.examine(model, case, failing, replayed.results, padding=padding, pad_to=pad_to)
        for name, variable in named_variables(model).items():
            assert np.array_equal(variable.numpy(), before[name], equal_nan=True), name
    return finding


@pytest.mark.parametrize("name", TAPS)
def test_a_module_and_its_cause_are_named(name, models):
    place, broken, where, cause = TAPS[name]
    finding = found(models, place, broken)
    assert finding is not None
    assert finding.cause == cause, finding.statement
    assert finding.where.endswith(where), finding.statement
    seen = cause in ("not finite", "dtype rounding") or name == "class head not loaded"  # and not tried
    assert seen or finding.after <= min(1e-7, finding.before / diagnose.LEAST_FALL)
    assert finding.where in finding.statement


def smaller(right):
    return lambda *arguments: (right(*arguments)[0], right(*arguments)[1] * 0.999)


def without_smoothing(right):
    def losses(logits, masks, sizes):
        focal, _ = right(logits, masks, sizes)
        logits = tf.reshape(criterion.resize_bilinear(logits, tf.shape(masks)[2:]), [*masks.shape[:2], -1])
        inside, wanted = tf.sigmoid(logits), tf.reshape(tf.cast(masks, logits.dtype), logits.shape)
        dice = 1 - 2 * tf.reduce_sum(inside * wanted, 2) / (tf.reduce_sum(inside, 2) + tf.reduce_sum(wanted, 2))
        return focal, dice

    return losses


def no_mask_gradient(right):
    def cut(layer):
        return {**layer, "pred_masks": tf.stop_gradient(layer["pred_masks"])}

    return lambda outputs, *rest: right({**cut(outputs), "aux_outputs": [cut(layer) for layer in outputs["aux_outputs"]]}, *rest)


RESULTS = {
    "class cost": (
        replaced(matcher, "_cost_class", lambda right: lambda logits, labels: -tf.gather(tf.sigmoid(logits), labels, axis=2, batch_dims=1)),
        "matcher/cost_class",
        "normaliser",
    ),
    "dice cost": (replaced(matcher, "_costs_masks", smaller), "matcher/cost_dice", "scale"),
    "cost weights": (
        replaced(matcher.HungarianMatcher, "__call__", lambda right: lambda self, *a: _doubled(right(self, *a))),
        "matcher/total",
        "scale",
    ),
    "normaliser": (replaced(criterion, "_num_masks", lambda right: lambda n: right(n) + 1), "loss_mask", "normaliser"),
    "smoothing": (replaced(criterion, "_mask_losses", without_smoothing), "loss_dice", "eps"),
    "no object": (
        lambda model: mock.patch.object(
            criterion.SetCriterion,
            "__init__",
            lambda self, config, *rest, right=criterion.SetCriterion.__init__: (
                right(self, config, *rest),
                setattr(self, "no_object_weight", 1.0),
            )[0],
        ),
        "loss_ce",
        "scale",
    ),
    "ids": (
        replaced(inference, "_segments", lambda right: lambda *a: (np.maximum(right(*a)[0] - 1, 0), right(*a)[1])),
        "inference/panoptic_seg",
        "id",
    ),
}


def _doubled(matching):
    return matching._replace(total=matching.total + 2 * matching.cost_class)


@pytest.mark.parametrize("name", RESULTS)
def test_costs_losses_and_results(name, models):
    broken, where, cause = RESULTS[name]
    finding = found(models, PANOPTIC, broken)
    assert finding is not None
    assert (finding.where, finding.cause) == (where, cause), finding.statement


def test_a_cut_gradient_is_told_with_its_line(models):
    finding = found(models, PANOPTIC, replaced(criterion, "_losses_masks", no_mask_gradient), gradients=True)
    assert finding is not None
    assert finding.cause == "missing term"
    assert "test_diagnose.py:" in finding.hypothesis


UNRELATED = {
    "noise on a weight": weight(f"{BLOCK}.mlp.fc1.weight", lambda x: x + 1e-3 * np.random.default_rng(0).standard_normal(x.shape)),
    "a rounded kernel": weight("backbone.patch_embed.proj.weight", lambda x: np.round(x * 64) / 64),
    "one element": weight(f"{BLOCK}.attn.qkv.weight", lambda x: x + 0.1 * (np.arange(x.size).reshape(x.shape) == 5)),
    "clipped": replaced(swin.Gelu, "call", lambda right: lambda self, x: tf.minimum(right(self, x), 0.5)),
    "noise on what comes out": replaced(
        layers.Linear,
        "call",
        lambda right: lambda self, x: right(self, x) + 1e-4 * tf.random.stateless_normal(x.shape[:-1], (1, 2), dtype=x.dtype)[..., None],
    ),
    "noise on scores": replaced(swin.Softmax, "call", lambda right: lambda self, x: right(self, 0.83 * x + 0.1 * tf.sin(7 * x))),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_what_no_hypothesis_explains_gets_no_cause(name, models):
    finding = found(models, SWIN, UNRELATED[name])
    assert finding is not None
    assert (finding.hypothesis, finding.cause) == ("", ""), finding.statement
    assert math.isnan(finding.after)


def test_the_clean_model_has_nothing_to_diagnose(models):
    for place in (SWIN, PANOPTIC):
        assert found(models, place, lambda model: contextlib.nullcontext()) is None


@pytest.mark.parametrize(("name", "size"), [(SWIN, (43, 50)), ("tiny_deeplab", (45, 70)), (PANOPTIC, (40, 33))])
def test_formulas_give_what_the_port_gives(name, size, models):
    """Every module and all that is below it, from what the port's own modules gave: two implementations that know nothing of each other."""
    model, calls, called = models(name), [], Module.__call__

    def call(module, *args, **kwargs):
        calls.append((module, taps.calls[module.official_name], args, kwargs))
        return called(module, *args, **kwargs)

    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    with record_taps() as taps, mock.patch.object(Module, "__call__", call):
        model(tf.constant(images))
    recorded = {name: tensor.numpy() for name, tensor in taps.items()}
    kinds = set()
    for module, index, args, kwargs in calls:
        prefix = f"{module.official_name}#{index}"
        wanted = [name for name in recorded if name == prefix or name.startswith((f"{prefix}[", f"{module.official_name}."))]
        later = {name: value for name, value in recorded.items() if name in wanted}
        reference = Reference(later, wanted, "", {})
        reference.tap(module.official_name, reference.run(module, *diagnose._numpy(args), **diagnose._numpy(kwargs)))
        assert set(reference.computed) == set(wanted)
        kinds.add(type(module).__name__)
        for name, value in reference.computed.items():
            assert diagnose.relative(value, recorded[name]) <= (1e-6 if "pe_layer" in name else 1e-13), (prefix, name)
    assert kinds <= FORMULAS.keys()


def test_every_choice_has_a_cause_and_is_an_argument():
    tables = [choices for choices in vars(results).values() if isinstance(choices, tuple) and choices and hasattr(choices[0], "keyword")]
    for choice in [choice for choices in (*CHOICES.values(), *tables) for choice in choices]:
        assert {choice.cause, *choice.causes.values()} <= set(CAUSES), choice
        assert set(choice.causes) <= set(choice.values), choice


@pytest.mark.parametrize(("shape", "heads"), [((4, 4), None), ((3, 3, 3, 8), None), ((12, 24), 2), ((18,), 3)])
def test_rearrangements_can_be_undone(shape, heads):
    """Each is a permutation of the elements that changes something; so what it undoes can be told from everything else."""
    values = np.arange(math.prod(shape)).reshape(shape)
    changes = list(hypotheses.rearrangements(shape, heads))
    assert {"transpose", "shift", "axis flip"} & {change.cause for change in changes}
    for change in changes:
        undone = change.undo(values)
        assert undone.shape == values.shape
        assert sorted(undone.ravel()) == sorted(values.ravel())
        assert not np.array_equal(undone, values), change.words


def test_thirds_are_named_as_they_stand():
    q, k, v = np.split(np.arange(6), 3)
    change = next(change for change in hypotheses.rearrangements((6,)) if "order vqk" in change.words)
    assert change.undo(np.concatenate([v, q, k])).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda x: x[:, ::-1], "axis flip"),
        (lambda x: np.roll(x, 1, 2), "shift"),
        (lambda x: 3 * x, "scale"),
        (lambda x: x + np.arange(5), "bias"),
        (lambda x: x[..., [0, 3, 2, 1, 4]], "axis order"),
        (lambda x: x.swapaxes(1, 2), "transpose"),
        (lambda x: x.astype(np.float32).astype(float), "dtype rounding"),
        (lambda x: x + 0.01 * np.sin(1e3 * x), None),
    ],
)
def test_outputs_tell_what_was_done_to_them(change, cause):
    expected = np.random.default_rng(0).standard_normal((2, 4, 4, 5))
    finding = diagnose.diagnose(diagnose_results.ResultSite("x", change(expected), expected))
    assert (finding and finding.cause) == cause


def test_a_formula_that_is_not_the_official_one_explains_nothing():
    """Both sides must fit: a wrong choice that gives TensorFlow's result proves nothing if the right one does not give PyTorch's."""
    expected, actual = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 9.0])
    choice = results.Choice("power", (1, 2), "scale", "power")
    site = diagnose_results.ResultSite("x", actual, expected, lambda power=1: np.array([1.0, 3.0, 9.0]) ** (power / 2), (choice,))
    assert diagnose.diagnose(site) is None
    site = diagnose_results.ResultSite("x", actual, expected, lambda power=1: expected if power == 1 else actual, (choice,))
    finding = diagnose.diagnose(site)
    assert finding is not None
    assert finding.hypothesis == "power 2 instead of 1"


@contextlib.contextmanager
def adamw_with(**changes):
    right = optimizer.AdamW.__init__
    with mock.patch.object(optimizer.AdamW, "__init__", lambda self, *a, **k: right(self, *a, **k | changes)):
        yield


STEPS = {
    "eps": (adamw_with(eps=1e-7), "steps/weights", "eps"),
    "second moment": (adamw_with(betas=(0.9, 0.99)), "steps/exp_avg_sq", "momentum"),
    "decay of norms": (mock.patch.object(optimizer, "_kind", return_value="weight"), "steps/decay", "weight decay"),
    "clipping": (adamw_with(clip_norm=0.1), "steps/clipped", "clip"),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_optimizer_step(name, converted):
    """Against a recorded official step."""
    broken, where, cause = STEPS[name]
    with trajectory.open_training(TRAININGS / PANOPTIC, "plain") as case, broken:
        finding = diagnose_steps.examine_training(converted(PANOPTIC), case)
    assert finding is not None
    assert (finding.where, finding.cause) == (where, cause), finding.statement


def test_a_sampled_trace_is_examined_too(models):
    """At the first tap that differs, up to which TensorFlow's own tensors stand for the recorded ones."""
    tap = f"{DECODER}.self_attn#0[0]"
    name = f"{DECODER}.self_attn.out_proj.weight"
    with Trace(SAMPLED).case("odd") as case, weight(name, np.transpose)(models(PANOPTIC)):
        results = mock.Mock(groups={})
        finding = diagnose_results.examine(models(PANOPTIC), case, [("taps", tap)], results)
    assert finding is not None
    assert (finding.where, finding.cause) == (name.removesuffix(".weight"), "transpose"), finding.statement


def test_the_diagnosis_is_told(models, converted, capsys):
    """By the command, and a hypothesis that raises breaks no check."""
    with weight("backbone.stem.conv1.weight", lambda x: x[::-1, ::-1])(models(PANOPTIC)):
        for broken in (False, True):
            diagnosed = (
                mock.patch.object(diagnose_results, "diagnose", side_effect=RuntimeError("no")) if broken else contextlib.nullcontext()
            )
            with mock.patch("tfmaskformer.checkpoint.load", return_value=models(PANOPTIC)), diagnosed:
                arguments = [
                    "--ckpt",
                    str(converted(PANOPTIC)),
                    "--reference",
                    str(WHOLE / PANOPTIC),
                    "--dtype",
                    "float64",
                    "--mode",
                    "eager",
                ]
                assert cli.main([*arguments, "--no-gradients"]) == cli.MISMATCH
            line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("diagnosis: "))
            assert ("the diagnosis itself failed (RuntimeError: no)" if broken else "backbone.stem.conv1: ") in line


def without_sizes(right):
    return lambda *arguments: right(*arguments[:-1], None)


MASKED = {
    # name: (trace, break, where, cause)
    "kernel": (PANOPTIC, weight("backbone.res2.0.conv3.weight", lambda x: x[..., ::-1]), "backbone.res2.0.conv3", "axis flip"),
    "norm": (
        PANOPTIC,
        replaced(layers.GroupNorm, "call", lambda right: lambda self, inputs, sizes=None: right(self, inputs)),
        f"{PIXEL}.layer_4",
        "mask missing",
    ),
    "attention": (PANOPTIC, replaced(pixel_decoder, "sequence_mask", lambda right: lambda *a: None), "layers.0.self_attn", "mask missing"),
    "negated": (
        PANOPTIC,
        replaced(pixel_decoder, "sequence_mask", lambda right: lambda *a: ~right(*a)),
        "layers.0.self_attn",
        "mask polarity",
    ),
    "turned": (SWIN, replaced(swin, "cyclic_shift", without_sizes), BLOCK, "shift"),
    "mask": (SWIN, replaced(swin, "shift_mask", without_sizes), "backbone.layers.0", "padding"),
    "filled": (
        SWIN,
        replaced(swin, "zero_outside", lambda right: lambda inputs, sizes: inputs),
        "backbone.layers.0.blocks.0",
        "mask missing",
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_padding(name, models):
    """The image alone is as it should be; only with what is around it does the formula give what TensorFlow computes."""
    place, broken, where, cause = MASKED[name]
    finding = found(models, place, broken, padding="masked", pad_to=(128, 128))
    assert finding is not None
    assert finding.cause == cause, finding.statement
    assert finding.where.endswith(where), finding.statement


def test_values_are_sought_only_where_there_are_equations_to_spare():
    """Of as many unknowns as equations any value fits, and proves nothing."""
    inputs, weight = (np.random.default_rng(0).standard_normal(shape) for shape in ((7, 5), (5, 3)))

    def run(rows):
        return lambda values: (np.exp(inputs[:rows] @ values[0][1] / 9)).ravel()

    start = [(None, np.zeros((5, 3)))]
    [found], error = hypotheses.solved(run(7), start, run(7)([(None, weight)]), 3)
    assert error < 1e-13
    np.testing.assert_allclose(found, weight, rtol=1e-9)
    assert hypotheses.solved(run(6), start, run(6)([(None, weight)]), 3) is None
    assert hypotheses.solved(run(7), start, np.ones(20), 3) is None
    _, error = hypotheses.solved(run(7), start, np.arange(1.0, 22), 3)  # which no weight gives
    assert error > 0.01
