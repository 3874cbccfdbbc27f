"""Weights that were converted wrongly, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from parity.faults.fault import (
    DECODER,
    ENCODER,
    PANOPTIC,
    PER_PIXEL,
    PER_PIXEL_PLUS,
    PIXEL,
    PREDICTOR,
    SEMANTIC,
    SWIN,
    Break,
    Fault,
    attribute,
    together,
    weight,
)
from tfmaskformer.module import named_variables


def qkv(order: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
    """The three projections in another order."""

    def change(values: np.ndarray) -> np.ndarray:
        parts = np.split(values, 3, axis=-1)
        return np.concatenate([parts[index] for index in order], axis=-1)

    return change


def qkv_by_head(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Read as [heads, 3, channels of a head] instead of [3, heads, channels of a head]."""

    def change(values: np.ndarray) -> np.ndarray:
        return values.reshape(*values.shape[:-1], 3, heads, -1).swapaxes(-3, -2).reshape(values.shape)

    return change


def last_head_first(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: values.reshape(heads, -1, values.shape[-1])[::-1].reshape(values.shape)


def rolled(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.roll(values, 1, axis)


def initial_linear(values: np.ndarray) -> np.ndarray:
    """As PyTorch would have made it: the checkpoint's value never arrived."""
    bound = 1 / np.sqrt(values.shape[0])
    return np.random.default_rng(0).uniform(-bound, bound, values.shape)


def initial_embedding(values: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(values.shape)


def exchanged(one: str, other: str) -> Break:
    """Two variables have one another's values."""

    def apply(model):
        variables = named_variables(model)
        first, second = variables[one].numpy(), variables[other].numpy()
        return together(weight(one, lambda _: second), weight(other, lambda _: first))(model)

    return apply


def constant(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.full_like(values, value)


def unloaded_statistics(norm: str) -> Break:
    return together(weight(f"{norm}.running_mean", constant(0.0)), weight(f"{norm}.running_var", constant(1.0)))


def of_both(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Break:
    """Weight and bias alike."""
    return together(weight(f"{name}weight", change), weight(f"{name}bias", change))


QUERIES = f"{PREDICTOR}.query_embed.weight"
QUERIES_SEEN = f"{DECODER}.layers.0.self_attn"
BLOCK = "backbone.layers.0.blocks.0"
FRONT = "backbone.layers.1.blocks.1.attn"

# fmt: off
FAULTS = (
    Fault("transposed 256×256 kernel", "weights", PANOPTIC, "even", "taps", f"{PREDICTOR}.mask_embed.layers.1", "transpose",
          weight(f"{PREDICTOR}.mask_embed.layers.1.weight", np.transpose), first=True),
    Fault("transposed attention output", "weights", PANOPTIC, "even", "taps", f"{DECODER}.layers.2.self_attn", "transpose",
          weight(f"{DECODER}.layers.2.self_attn.out_proj.weight", np.transpose), first=True),
    Fault("q and k exchanged", "weights", PANOPTIC, "even", "taps", f"{DECODER}.layers.1.multihead_attn", "q/k/v permutation",
          of_both(f"{DECODER}.layers.1.multihead_attn.in_proj_", qkv((1, 0, 2))), first=True),
    Fault("k and v exchanged", "weights", PANOPTIC, "even", "taps", f"{ENCODER}.layers.0.self_attn", "q/k/v permutation",
          of_both(f"{ENCODER}.layers.0.self_attn.in_proj_", qkv((0, 2, 1))), first=True),
    Fault("missing bias", "weights", PANOPTIC, "even", "taps", f"{PIXEL}.mask_features", "bias",
          attribute(f"{PIXEL}.mask_features", "use_bias", False), first=True),
    Fault("no-object first", "weights", PANOPTIC, "even", "taps", f"{PREDICTOR}.class_embed", "class order",
          of_both(f"{PREDICTOR}.class_embed.", rolled(-1)), first=True),
    Fault("classes in another order", "weights", PER_PIXEL, "odd", "taps", PREDICTOR, "class order",
          weight(f"{PREDICTOR}.weight", rolled(-1)), first=True),
    Fault("missing bias of the classifier", "weights", PER_PIXEL, "odd", "taps", PREDICTOR, "bias",
          attribute(PREDICTOR, "use_bias", False), first=True),
    Fault("queries in another order", "weights", PER_PIXEL_PLUS, "odd", "taps", QUERIES_SEEN, "shift",
          weight(QUERIES, rolled(0)), first=True),
    Fault("input and output channels of a 3×3 kernel exchanged", "weights", PANOPTIC, "odd", "taps", "backbone.res3.1.conv2", "transpose",
          weight("backbone.res3.1.conv2.weight", lambda values: values.swapaxes(2, 3))),
    Fault("kernel turned, as for a true convolution", "weights", SEMANTIC, "odd", "taps", f"{PIXEL}.layer_2", "axis flip",
          weight(f"{PIXEL}.layer_2.weight", lambda values: values[::-1, ::-1])),
    Fault("rows and columns of a kernel exchanged", "weights", SEMANTIC, "odd", "taps", f"{PIXEL}.mask_features", "axis order",
          weight(f"{PIXEL}.mask_features.weight", lambda values: values.swapaxes(0, 1))),
    Fault("Swin's q, k and v read head by head", "weights", SWIN, "odd", "taps", f"{FRONT}.qkv", "head split order",
          of_both(f"{FRONT}.qkv.", qkv_by_head(3))),
    Fault("heads of the output projection in another order", "weights", PANOPTIC, "odd", "taps", f"{ENCODER}.layers.1.self_attn",
          "head split order", weight(f"{ENCODER}.layers.1.self_attn.out_proj.weight", last_head_first(8))),
    Fault("class head not loaded", "weights", SWIN, "odd", "taps", f"{PREDICTOR}.class_embed", "stale weight",
          weight(f"{PREDICTOR}.class_embed.weight", initial_linear)),
    Fault("queries not loaded", "weights", PANOPTIC, "odd", "taps", QUERIES_SEEN, "stale weight",
          weight(QUERIES, initial_embedding)),
    Fault("statistics of a batch norm not loaded", "weights", PANOPTIC, "odd", "taps", "backbone.res4.0.conv1", "stale weight",
          unloaded_statistics("backbone.res4.0.conv1.norm")),
    Fault("standard deviation taken for the variance", "weights", PANOPTIC, "odd", "taps", "backbone.res5.0.shortcut", "scale",
          weight("backbone.res5.0.shortcut.norm.running_var", np.sqrt)),
    Fault("attention without input biases", "weights", PANOPTIC, "odd", "taps", f"{DECODER}.layers.0.multihead_attn", "bias",
          weight(f"{DECODER}.layers.0.multihead_attn.in_proj_bias", constant(0.0))),
    Fault("channels shifted by one", "weights", PANOPTIC, "odd", "taps", f"{PIXEL}.adapter_2", "shift",
          weight(f"{PIXEL}.adapter_2.weight", rolled(-1))),
    Fault("table of relative positions backwards", "weights", SWIN, "odd", "taps", f"{BLOCK}.attn.softmax", "axis flip",
          weight(f"{BLOCK}.attn.relative_position_bias_table", lambda values: values[::-1])),
    Fault("two decoder layers have one another's weights", "weights", SEMANTIC, "odd", "taps", f"{DECODER}.layers.1.linear1", "layer order",
          exchanged(f"{DECODER}.layers.1.linear1.weight", f"{DECODER}.layers.2.linear1.weight")),
    Fault("kernel kept in half precision", "weights", PANOPTIC, "odd", "taps", "backbone.res4.2.conv2", "dtype rounding",
          weight("backbone.res4.2.conv2.weight", lambda values: values.astype(np.float16))),
    Fault("patches' kernel for BGR", "weights", SWIN, "odd", "taps", "backbone.patch_embed.proj", "BGR",
          weight("backbone.patch_embed.proj.weight", lambda values: values[:, :, ::-1])),
)
# fmt: on
