"""The check's own proof: the port is broken in one place at a time, and the check fails and names that place.

Each break is of the size it has in real ports (NUMERICS' list of what other ports got wrong), applied to the loaded model or to one
function. What must be named is the broken module, or what comes directly out of it.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

from parity import cli
from tfmaskformer import criterion, inference, layers, matcher, pixel_decoder, resnet, transformer
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_modules, record_taps

from .breaks import replace, run_broken, weight
from .conftest import TRACE

PIXEL = "sem_seg_head.pixel_decoder"
DECODER = "sem_seg_head.predictor.transformer.decoder"


def eps(kind):
    def apply(model, monkeypatch):
        for _, module in named_modules(model):
            if isinstance(module, kind):
                module.eps = 1e-6

    return apply


def both(*breaks):
    def apply(model, monkeypatch):
        for one in breaks:
            one(model, monkeypatch)

    return apply


def same_padding(right):
    def conv2d(inputs, kernel, stride, padding):
        return right(inputs, kernel, stride, "SAME" if stride == 2 and kernel.shape[0] == 3 else padding)

    return conv2d


def half_pixel_nearest(right):
    def resize(images, size, *sizes):
        rows, columns = (
            tf.cast((tf.range(out) * 2 + 1) * into // (2 * out), tf.int32) for out, into in zip(size, images.shape[1:3], strict=True)
        )
        return tf.gather(tf.gather(images, rows, axis=1), columns, axis=2)

    return resize


def align_corners(right):
    def along(values, length, axis):
        into = values.shape[axis]
        positions = np.linspace(0, into - 1, int(length))
        low = np.minimum(positions.astype(int), into - 2)
        share = tf.reshape(tf.constant(positions - low, values.dtype), [-1, 1] if axis == 2 else [-1])
        return tf.gather(values, low, axis=axis) * (1 - share) + tf.gather(values, low + 1, axis=axis) * share

    return lambda images, size, *sizes: along(along(images, size[0], 2), size[1], 3)


def qkv(order):
    def change(values):
        parts = np.split(values, 3, axis=-1)
        return np.concatenate([parts[index] for index in order], axis=-1)

    return change


def bgr(right):
    return lambda self, images, *rest: right(self, images[..., ::-1], *rest)


def memory_after_output_conv(right):
    def forward_features(self, features, sizes):
        mask_features, top = right(self, features, sizes)
        with record_taps():  # into nowhere
            return mask_features, self.layer_4(top)

    return forward_features


def x_before_y(right):
    def call(self, features, sizes=None):
        return tf.concat(tf.split(right(self, features, sizes), 2, axis=-1)[::-1], axis=-1)

    return call


def heads_last(right):
    def split(self, inputs):
        batch, length, channels = inputs.shape
        return tf.transpose(tf.reshape(inputs, [batch, length, channels // self.num_heads, self.num_heads]), [0, 3, 1, 2])

    return split


def pool_same(right):
    return lambda self, inputs, sizes=None: tf.nn.max_pool2d(tf.nn.relu(self.conv1(inputs, sizes)), 3, 2, "SAME")


def smaller_dice(right):
    def costs(*arguments):
        cost_mask, cost_dice = right(*arguments)
        return cost_mask, cost_dice * 0.999

    return costs


def no_mask_gradient(right):
    def cut(layer):
        return {**layer, "pred_masks": tf.stop_gradient(layer["pred_masks"])}

    def losses(outputs, *rest):
        return right({**cut(outputs), "aux_outputs": [cut(layer) for layer in outputs["aux_outputs"]]}, *rest)

    return losses


BREAKS = {
    # name: (case, break, group, name that must be told)
    "GroupNorm eps 1e-6": ("even", eps(layers.GroupNorm), "taps", f"{PIXEL}.layer_4.norm#0"),
    "FrozenBatchNorm eps 1e-6": ("even", eps(layers.FrozenBatchNorm2d), "taps", "backbone.stem.conv1.norm#0"),
    "LayerNorm eps 1e-6": ("even", eps(layers.LayerNorm), "taps", f"{PIXEL}.transformer.encoder.layers.0.norm1#0"),
    "same padding on stride 2": ("even", replace(tf.nn, "conv2d", same_padding), "taps", "backbone.res3.0.conv2.norm#0"),
    "same padding of the max pool": ("even", replace(resnet.BasicStem, "call", pool_same), "taps", "backbone.stem#0"),
    "half-pixel nearest": ("odd", replace(pixel_decoder, "resize_nearest", half_pixel_nearest), "taps", f"{PIXEL}.layer_3.norm#0"),
    "align_corners in the losses": ("even", replace(criterion, "resize_bilinear", align_corners), "losses", "loss_mask"),
    "transposed 256×256 kernel": (
        "even",
        weight("sem_seg_head.predictor.mask_embed.layers.1.weight", np.transpose),
        "taps",
        "sem_seg_head.predictor.mask_embed.layers.1#0",
    ),
    "transposed attention output": (
        "even",
        weight(f"{DECODER}.layers.2.self_attn.out_proj.weight", np.transpose),
        "taps",
        f"{DECODER}.layers.2.self_attn#0[0]",
    ),
    "q and k exchanged": (
        "even",
        both(*(weight(f"{DECODER}.layers.1.multihead_attn.in_proj_{what}", qkv((1, 0, 2))) for what in ("weight", "bias"))),
        "taps",
        f"{DECODER}.layers.1.multihead_attn#0[0]",
    ),
    "k and v exchanged": (
        "even",
        both(*(weight(f"{PIXEL}.transformer.encoder.layers.0.self_attn.in_proj_{what}", qkv((0, 2, 1))) for what in ("weight", "bias"))),
        "taps",
        f"{PIXEL}.transformer.encoder.layers.0.self_attn#0[0]",
    ),
    "heads split the other way": (
        "even",
        replace(layers.MultiheadAttention, "_split_heads", heads_last),
        "taps",
        f"{PIXEL}.transformer.encoder.layers.0.self_attn#0[0]",
    ),
    "missing bias": (
        "even",
        lambda model, _: setattr(model.sem_seg_head.pixel_decoder.mask_features, "use_bias", False),
        "taps",
        f"{PIXEL}.mask_features#0",
    ),
    "memory taken after the output conv": (
        "even",
        replace(pixel_decoder.BasePixelDecoder, "forward_features", memory_after_output_conv),
        "taps",
        "sem_seg_head.predictor.input_proj#0",
    ),
    "BGR": ("even", replace(MaskFormer, "preprocess", bgr), "taps", "images#0"),
    "no-object first": (
        "even",
        both(*(weight(f"sem_seg_head.predictor.class_embed.{what}", lambda values: np.roll(values, 1, -1)) for what in ("weight", "bias"))),
        "taps",
        "sem_seg_head.predictor.class_embed#0",
    ),
    "position embedding x before y": (
        "even",
        replace(transformer.PositionEmbeddingSine, "call", x_before_y),
        "taps",
        f"{PIXEL}.pe_layer#0",
    ),
    "dice cost off by a thousandth": ("even", replace(matcher, "_costs_masks", smaller_dice), "matcher", "final/0/cost_dice"),
    "losses divided by one object too many": (
        "even",
        replace(criterion, "_num_masks", lambda right: lambda n: right(n) + 1),
        "losses",
        "loss_mask",
    ),
    "masks cut off from the gradient": (
        "even",
        replace(criterion, "_losses_masks", no_mask_gradient),
        "gradients",
        "sem_seg_head.predictor.mask_embed.layers.2.bias",
    ),
    "panoptic ids start at 0": (
        "even",
        replace(inference, "_segments", lambda right: lambda *a: (np.maximum(right(*a)[0] - 1, 0), right(*a)[1])),
        "inference",
        "0/panoptic_seg",
    ),
}
MASKED_BREAKS = {
    "GroupNorm over the padding": (
        replace(layers.GroupNorm, "call", lambda right: lambda self, inputs, sizes=None: right(self, inputs)),
        f"{PIXEL}.layer_4.norm#0",
    ),
    "attention to the padding": (
        replace(pixel_decoder, "sequence_mask", lambda right: lambda features, sizes: None),
        f"{PIXEL}.transformer.encoder.layers.0.self_attn#0[0]",
    ),
    "position embedding of the canvas": (
        replace(transformer.PositionEmbeddingSine, "call", lambda right: lambda self, features, sizes=None: right(self, features)),
        f"{PIXEL}.pe_layer#0",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_caught_and_named(name, checkpoint, monkeypatch, capsys):
    size, broken, group, culprit = BREAKS[name]
    code, report = run_broken(broken, checkpoint, TRACE, monkeypatch, capsys, "--dtype", "float64", "--case", size)
    assert code == cli.MISMATCH
    assert not report["passed"]
    assert (report["first_failure"]["group"], report["first_failure"]["name"]) == (group, culprit)
    assert re.fullmatch(f"mismatch: first in {group} '{re.escape(culprit)}' .*", report["verdict"][0])


@pytest.mark.parametrize("name", MASKED_BREAKS)
def test_a_break_of_masked_padding_is_caught_and_named(name, checkpoint, monkeypatch, capsys):
    broken, culprit = MASKED_BREAKS[name]
    options = ("--dtype", "float64", "--case", "odd", "--padding", "masked")
    code, report = run_broken(broken, checkpoint, TRACE, monkeypatch, capsys, *options)
    assert code == cli.MISMATCH
    assert (report["first_failure"]["group"], report["first_failure"]["name"]) == ("taps", culprit)


@pytest.mark.parametrize("name", ["transposed 256×256 kernel", "q and k exchanged", "BGR"])
def test_float32_alone_names_the_same(name, checkpoint, monkeypatch, capsys):
    size, broken, _, culprit = BREAKS[name]
    code, report = run_broken(broken, checkpoint, TRACE, monkeypatch, capsys, "--dtype", "float32", "--case", size)
    assert (code, report["first_failure"]["name"]) == (cli.MISMATCH, culprit)
