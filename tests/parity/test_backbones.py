"""Swin and R101c against the official code, whole, and the check's own proof for them: broken, they are caught and named."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from checkpoints import registry
from parity import check, cli
from parity.check import Settings
from tfmaskformer import swin
from tfmaskformer.module import named_modules
from tfmaskformer.resnet import DeepLabStem

from .breaks import replace, run_broken

GOLDEN = Path(__file__).parents[1] / "golden"
SWIN, R101C = NAMES = ("tiny_swin", "tiny_deeplab")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("padding", "mode"), [("official", "graph"), ("masked", "eager")])
def test_matches_the_official_code(converted, name, padding, mode):
    result = check.check(Settings(str(converted(name)), str(GOLDEN / name), padding=padding, mode=mode))
    assert [item for case in result.cases for item in case.failures] == []
    assert result.passed
    assert [(case.case, case.dtype) for case in result.cases] == [
        (case, dtype) for dtype in ("float32", "float64") for case in ("even", "odd")
    ]
    entry = registry.entry(name)
    backbone = "backbone.layers.3.blocks.1.attn.attn_drop#0" if name == SWIN else "backbone.res5.2.conv2.norm#0"
    for case in result.cases:
        ledger = case.ledger()
        index = [key for key in registry.layout(entry) if key.endswith(("relative_position_index", "empty_weight"))]
        assert ledger["variables"]["compared"] == len(registry.layout(entry)) - len(index)
        assert backbone in {item.name for item in case.items}
        if case.dtype == "float64":
            # What the tolerance asks, and what is usual; noise around zero (gradients of key biases) has its own tolerance.
            errors = [item.error for item in case.items if item.tolerance == pytest.approx(1e-9, rel=0.1)]
            assert len(errors) > 300
            assert max(errors) < 1e-9


# --- breaks


def each(kind, change):
    """Changes every module of a kind."""

    def apply(model, monkeypatch):
        for _, module in named_modules(model):
            if isinstance(module, kind):
                change(module)

    return apply


def at(path, name, value):
    """The attribute ``name`` of one module becomes ``value``."""
    return lambda model, monkeypatch: monkeypatch.setattr(dict(named_modules(model))[path], name, value)


def all_of(*breaks):
    def apply(model, monkeypatch):
        for one in breaks:
            one(model, monkeypatch)

    return apply


def transposed_index(module):
    module.relative_position_index = module.relative_position_index.T


def row_by_row(right):
    def call(self, inputs, sizes=None):
        grid = swin.pad_to_multiple(inputs, 2)
        quarters = [grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return self.reduction(self.norm(tf.concat(quarters, axis=-1)))

    return call


def zeros_first(right):
    def call(self, inputs, sizes=None):
        _, height, width, _ = inputs.shape
        return right(self, tf.pad(inputs, [[0, 0], [height % 2, 0], [width % 2, 0], [0, 0]]))

    return call


def block_with(**functions):
    """A block that calls other functions: name → what makes it from the block and the right one."""

    def make(right):
        def call(self, *arguments):
            changed = {name: change(self, getattr(swin, name)) for name, change in functions.items()}
            with mock.patch.multiple(swin, **changed):
                return right(self, *arguments)

        return call

    return replace(swin.SwinTransformerBlock, "call", make)


def padded_before_the_norm(block, right):
    """The norm makes its bias of zeros."""
    bias = block.norm1.bias
    return lambda grid, multiple: right(grid - bias, multiple) + bias


def shifted_first(block, right):
    return lambda grid, multiple: right(tf.roll(grid, [-block.shift_size] * 2, [1, 2]), multiple)


def only_back(block, right):
    return lambda grid, shift, *rest: grid if shift > 0 else right(grid, shift, *rest)


def without_relus(right):
    def call(self, inputs, sizes=None):
        with mock.patch.object(tf.nn, "relu", lambda values: values):
            return right(self, inputs, sizes)

    return call


def layer(stage, block, module):
    return f"backbone.layers.{stage}.blocks.{block}.{module}#0"


QKV, SOFTMAX, SHIFTED_QKV, SHIFTED_SOFTMAX = (layer(0, block, f"attn.{what}") for block in (0, 1) for what in ("qkv", "softmax"))
BREAKS = {
    # name: (model, padding, break, tap that must be named)
    "windows shifted the other way": (
        SWIN,
        "official",
        replace(swin, "cyclic_shift", lambda right: lambda grid, shift, *rest: right(grid, -shift, *rest)),
        SHIFTED_QKV,
    ),
    "windows shifted by one patch too many": (
        SWIN,
        "official",
        replace(swin, "cyclic_shift", lambda right: lambda grid, shift, *rest: right(grid, shift + np.sign(shift), *rest)),
        SHIFTED_QKV,
    ),
    "no window shifted": (SWIN, "official", each(swin.SwinTransformerBlock, lambda block: setattr(block, "shift_size", 0)), SHIFTED_QKV),
    "shifted before the padding": (SWIN, "official", block_with(pad_to_multiple=shifted_first, cyclic_shift=only_back), SHIFTED_QKV),
    "padded before the norm": (SWIN, "official", block_with(pad_to_multiple=padded_before_the_norm), QKV),
    "mask of the grid without its padding": (
        SWIN,
        "official",
        replace(swin, "_round_up", lambda right: lambda size, multiple: size if tf.is_tensor(size) else right(size, multiple)),
        SHIFTED_SOFTMAX,
    ),
    "no mask": (SWIN, "official", replace(swin, "MASKED_SCORE", lambda right: 0.0), SHIFTED_SOFTMAX),
    "relative positions transposed": (SWIN, "official", each(swin.WindowAttention, transposed_index), SOFTMAX),
    "queries not scaled": (SWIN, "official", each(swin.WindowAttention, lambda module: setattr(module, "scale", 1.0)), SOFTMAX),
    "queries scaled by all channels": (
        SWIN,
        "official",
        each(swin.WindowAttention, lambda module: setattr(module, "scale", module.scale / module.num_heads**0.5)),
        SOFTMAX,
    ),
    "GELU by tanh": (
        SWIN,
        "official",
        replace(swin.Gelu, "call", lambda right: lambda self, inputs: tf.nn.gelu(inputs, approximate=True)),
        layer(0, 0, "mlp.act"),
    ),
    "patches merged row by row": (
        SWIN,
        "official",
        replace(swin.PatchMerging, "call", row_by_row),
        "backbone.layers.0.downsample.norm#0",
    ),
    "odd grids padded at the top and left": (
        SWIN,
        "official",
        replace(swin.PatchMerging, "call", zeros_first),
        "backbone.layers.0.downsample.norm#0",
    ),
    "patches not normed": (SWIN, "official", at("backbone.patch_embed", "norm", lambda inputs: inputs), "backbone.patch_embed.norm#0"),
    "a level not normed": (SWIN, "official", at("backbone", "norm2", lambda inputs: inputs), "backbone.norm2#0"),
    "every image turned in the canvas": (
        SWIN,
        "masked",
        replace(swin, "cyclic_shift", lambda right: lambda grid, shift, window, sizes=None: right(grid, shift, window)),
        SHIFTED_QKV,
    ),
    "mask of the canvas": (
        SWIN,
        "masked",
        replace(swin, "shift_mask", lambda right: lambda size, window, shift, dtype, sizes=None: right(size, window, shift, dtype)),
        SHIFTED_SOFTMAX,
    ),
    "windows filled with what lies behind the image": (
        SWIN,
        "masked",
        replace(swin, "zero_outside", lambda right: lambda inputs, sizes: inputs),
        QKV,
    ),
    "stem without a norm": (R101C, "official", at("backbone.stem.conv2", "norm", None), "backbone.stem.conv2.norm#0"),
    "stem without ReLUs": (R101C, "official", replace(DeepLabStem, "call", without_relus), "backbone.stem.conv2.norm#0"),
    "dilation dropped": (R101C, "official", at("backbone.res5.1.conv2", "dilation", 1), "backbone.res5.1.conv2.norm#0"),
    "dilation in the first block too": (R101C, "official", at("backbone.res5.0.conv2", "dilation", 2), "backbone.res5.0.conv2.norm#0"),
    "stride dropped where there is dilation": (
        R101C,
        "official",
        all_of(at("backbone.res5.0.conv2", "stride", 1), at("backbone.res5.0.shortcut", "stride", 1)),
        "backbone.res5.0.conv2.norm#0",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_caught_and_named(name, converted, monkeypatch, capsys):
    model, padding, broken, culprit = BREAKS[name]
    options = ("--dtype", "float64", "--case", "odd", "--padding", padding)
    code, report = run_broken(broken, converted(model), GOLDEN / model, monkeypatch, capsys, *options)
    assert code == cli.MISMATCH
    assert (report["first_failure"]["group"], report["first_failure"]["name"]) == ("taps", culprit)
