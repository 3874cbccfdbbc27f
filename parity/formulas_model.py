"""Formulas of the modules that hold other modules: what each hands to its children and makes of what they give.

See :mod:`parity.formulas`. A child is called through the reference, which goes on with what PyTorch recorded of it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from checkpoints.registry import relative_position_index
from parity.formulas import (
    BIASES,
    HEAD_ORDERS,
    ON_CANVAS,
    SCALES,
    ZEROS_AROUND,
    Choice,
    Reference,
    convolution,
    formula,
    gelu,
    merge_heads,
    normalised,
    parameter,
    relu,
    scale_of,
    softmax,
)

# ResNet


def max_pool(inputs: np.ndarray, padding: str = "symmetric", kind: str = "largest") -> np.ndarray:
    """3×3 with stride 2 of NHWC; ``padding`` as of :func:`parity.formulas.convolution`."""
    channels = inputs.shape[-1]
    if kind == "mean":
        kernel = np.zeros((3, 3, channels, channels))
        kernel[:, :, range(channels), range(channels)] = 1 / 9
        return convolution(inputs, kernel, 2, 1, padding)
    windows = []
    for index in range(9):
        kernel = np.zeros((3, 3, 1, 1))
        kernel[index // 3, index % 3] = 1
        moved = np.moveaxis(inputs, -1, 0)[..., None].reshape(-1, *inputs.shape[1:3], 1)
        picked = convolution(moved, kernel, 2, 1, padding)
        windows.append(picked.reshape(channels, len(inputs), *picked.shape[1:3]))
    return np.moveaxis(np.max(windows, 0), 0, -1)


_POOL = (
    Choice("padding", ("symmetric", "same", "none"), "padding side", "padding of the max pool", causes={"none": "padding"}),
    Choice("kind", ("largest", "mean"), "normaliser", "pooled value"),
    Choice("activated", (True, False), "missing term", "ReLU behind the convolutions"),
)


@formula("BasicStem", *_POOL)
@formula("DeepLabStem", *_POOL)
def _stem(
    reference: Reference,
    module: Any,
    inputs: np.ndarray,
    sizes: Any = None,
    *,
    padding: str = "symmetric",
    kind: str = "largest",
    activated: bool = True,
) -> np.ndarray:
    outputs = inputs
    for name in ("conv1", "conv2", "conv3"):
        if hasattr(module, name):
            outputs = reference(getattr(module, name), outputs)
            outputs = relu(outputs) if activated else outputs
    return max_pool(outputs, padding, kind)


@formula(
    "BottleneckBlock",
    Choice("shortcut", ("added", "left out", "subtracted", "added behind the ReLU"), "missing term", "shortcut"),
    Choice("last", ("ReLU", "none", "before the sum"), "missing term", "last activation"),
    Choice("inner", ("ReLU", "none"), "missing term", "inner activations"),
)
def _bottleneck(
    reference: Reference,
    module: Any,
    inputs: np.ndarray,
    sizes: Any = None,
    *,
    shortcut: str = "added",
    last: str = "ReLU",
    inner: str = "ReLU",
) -> np.ndarray:
    activate = relu if inner == "ReLU" else lambda values: values
    outputs = activate(reference(module.conv1, inputs))
    outputs = reference(module.conv3, activate(reference(module.conv2, outputs)))
    beside = inputs if module.shortcut is None else reference(module.shortcut, inputs)
    if last == "before the sum" or shortcut == "added behind the ReLU":
        return relu(outputs) + beside
    total = outputs + {"added": 1, "left out": 0, "subtracted": -1}[shortcut] * beside
    return total if last == "none" else relu(total)


@formula("Stage")
def _stage(reference: Reference, module: Any, inputs: np.ndarray, sizes: Any = None) -> np.ndarray:
    for block in module:
        inputs = reference(block, inputs)
    return inputs


@formula("ResNet", Choice("channels", ("as given", "reversed"), "BGR", "channels of the image"))
def _resnet(reference: Reference, module: Any, images: np.ndarray, sizes: Any = None, *, channels: str = "as given") -> dict[str, Any]:
    outputs = reference(module.stem, images if channels == "as given" else images[..., ::-1])
    features = {}
    for name in ("res2", "res3", "res4", "res5"):
        outputs = features[name] = reference(getattr(module, name), outputs)
    return features


# Swin


@formula("Gelu", Choice("kind", ("exact", "tanh", "sigmoid", "ReLU"), "gelu", "GELU"))
def _gelu(reference: Reference, module: Any, inputs: np.ndarray, *, kind: str = "exact") -> np.ndarray:
    return gelu(inputs, kind)


@formula("Softmax", Choice("axis", ("keys", "queries", "heads"), "axis order", "softmax over"))
def _softmax(reference: Reference, module: Any, inputs: np.ndarray, *, axis: str = "keys") -> np.ndarray:
    return softmax(inputs, {"keys": -1, "queries": -2, "heads": -3}[axis])


@formula(
    "PatchProjection",
    Choice("bias", tuple(BIASES), "bias", "bias"),
    Choice("flipped", ("", "kernel turned by 180°"), "axis flip", "kernel"),
)
def _patch_projection(reference: Reference, module: Any, inputs: np.ndarray, *, bias: str = "added", flipped: str = "") -> np.ndarray:
    kernel = parameter(module, "weight")
    outputs = convolution(inputs, kernel[::-1, ::-1] if flipped else kernel, kernel.shape[0], 1, "none")
    return outputs + BIASES[bias] * parameter(module, "bias")


SIDES = ("right and bottom", "left and top", "both sides")


def pad_to_multiple(grid: np.ndarray, multiple: int, side: str = SIDES[0]) -> np.ndarray:
    """Zeros around NHWC, up to a multiple."""
    margins = []
    for length in grid.shape[1:3]:
        total = -length % multiple
        before = {SIDES[0]: 0, SIDES[1]: total}.get(side, total // 2)
        margins.append((before, total - before))
    return np.pad(grid, [(0, 0), *margins, (0, 0)])


_SIDE = Choice("side", SIDES, "padding side", "padded at")


@formula("PatchEmbed", _SIDE, Choice("channels", ("as given", "reversed"), "BGR", "channels of the image"))
def _patch_embed(
    reference: Reference, module: Any, images: np.ndarray, sizes: Any = None, *, side: str = SIDES[0], channels: str = "as given"
) -> np.ndarray:
    images = images if channels == "as given" else images[..., ::-1]
    return reference(module.norm, reference(module.proj, pad_to_multiple(images, len(parameter(module.proj, "weight")), side)))


@formula("Mlp")
def _mlp(reference: Reference, module: Any, inputs: np.ndarray) -> np.ndarray:
    hidden = reference(module.drop, reference(module.act, reference(module.fc1, inputs)))
    return reference(module.drop, reference(module.fc2, hidden))


@formula(
    "WindowAttention",
    Choice("scale", SCALES[:5], "scale", "scores times"),
    Choice(
        "mask",
        ("added", "left out", "of the other patches", "−1", "−1e9"),
        "mask missing",
        "shift mask",
        causes={"of the other patches": "mask polarity", "−1": "scale", "−1e9": "scale"},
    ),
    Choice("order", ("qkv", "qvk", "kqv", "kvq", "vqk", "vkq"), "q/k/v permutation", "projections taken as"),
    Choice(
        "packed", ("(3, heads, d)", "(heads, 3, d)", "(heads, d, 3)", "(3, d, heads)", "(d, heads, 3)"), "head split order", "qkv read as"
    ),
    Choice(
        "bias",
        ("added", "left out", "added twice", "subtracted", "key before query", "columns before rows", "scaled"),
        "bias",
        "relative position bias",
        causes={"key before query": "transpose", "columns before rows": "axis order", "scaled": "scale"},
    ),
    Choice("merge", (*HEAD_ORDERS, "not moved back"), "head split order", "heads merged as"),
)
def _window_attention(
    reference: Reference,
    module: Any,
    windows: np.ndarray,
    attn_mask: Any = None,
    *,
    scale: str = "1/√d",
    mask: str = "added",
    order: str = "qkv",
    packed: str = "(3, heads, d)",
    bias: str = "added",
    merge: str = HEAD_ORDERS[0],
) -> np.ndarray:
    *grid, length, channels = windows.shape
    heads = module.num_heads
    size = channels // heads
    names = {"3": 3, "heads": heads, "d": size}
    axes = packed.strip("()").split(", ")
    qkv = reference(module.qkv, windows).reshape(*grid, length, *(names[axis] for axis in axes))
    places = [len(grid) + 1 + axes.index(axis) for axis in ("3", "heads", "d")]
    parts = qkv.transpose(places[0], *range(len(grid)), places[1], len(grid), places[2])
    query, key, value = (parts["qkv".index(name)] for name in order)
    factor = scale_of(scale, channels, heads)
    scores = factor * query @ np.swapaxes(key, -1, -2)
    table, index = parameter(module, "relative_position_bias_table"), relative_position_index(math.isqrt(length))
    if bias == "columns before rows":
        span = 2 * math.isqrt(length) - 1
        index = index % span * span + index // span
    added = np.moveaxis(table[index.ravel()].reshape(length, length, heads), -1, 0)
    if bias == "key before query":
        added = np.swapaxes(added, -1, -2)
    scores = scores + {"left out": 0, "added twice": 2, "subtracted": -1, "scaled": factor}.get(bias, 1) * added
    if attn_mask is not None:
        shown = np.asarray(attn_mask, np.float64)
        if mask == "of the other patches":
            shown = shown.min() - shown
        scores = scores + shown * {"left out": 0.0, "−1": 1e-2, "−1e9": 1e7}.get(mask, 1.0)
    attention = reference(module.attn_drop, reference(module.softmax, scores))
    mixed = merge_heads(attention @ value, merge)
    return reference(module.proj_drop, reference(module.proj, mixed))


def shift_mask(size: tuple[int, int], window: int, shift: int, padded: bool = True) -> np.ndarray:
    """``[1, window rows, window columns, 1, positions, positions]``: −100 where two patches of a shifted window are no neighbours, else 0.

    ``size``: rows and columns; ``padded``: whether the last windows are those of the padded grid, as they should be, or of the grid without
    its padding.
    """
    regions = []
    for length in size:
        whole = -(-length // window) * window
        index, end = np.arange(whole), whole if padded else length
        regions.append((index >= end - window).astype(int) + (index >= end - shift))
    region = partition((3 * regions[0][:, None] + regions[1][None])[None, ..., None], window)[..., 0]
    return np.where(region[..., None, :, None] != region[..., None, None, :], -100.0, 0.0)


def partition(grid: np.ndarray, window: int, order: str = "rows first") -> np.ndarray:
    """NHWC → ``[batch, window rows, window columns, positions, channels]``; ``order`` of the positions in a window."""
    batch, height, width, channels = grid.shape
    shape = (batch, height // window, width // window, window**2, channels)
    if order == "runs of patches":
        return grid.reshape(shape)
    split = grid.reshape(batch, height // window, window, width // window, window, channels)
    axes = (0, 1, 3, 2, 4, 5) if order == "rows first" else (0, 1, 3, 4, 2, 5)
    return split.transpose(axes).reshape(shape)


def unite(windows: np.ndarray, window: int, order: str = "rows first") -> np.ndarray:
    """Inverse of :func:`partition`."""
    batch, rows, columns, _, channels = windows.shape
    shape = (batch, rows * window, columns * window, channels)
    if order == "runs of patches":
        return windows.reshape(shape)
    split = windows.reshape(batch, rows, columns, window, window, channels)
    axes = (0, 1, 3, 2, 4, 5) if order == "rows first" else (0, 1, 4, 2, 3, 5)
    return split.transpose(axes).reshape(shape)


SHIFTS = (
    "up and left",
    "none",
    "down and right",
    "one more",
    "one less",
    "rows only",
    "columns only",
    "not back",
    "back twice",
    "without the padding",
)


@formula(
    "SwinTransformerBlock",
    Choice("shift", SHIFTS, "shift", "cyclic shift", causes={"without the padding": "padding"}),
    Choice("mask", ("in every second block", "in none", "in every"), "mask missing", "shift mask"),
    Choice("norm", ("before padding", "behind padding", "left out", "behind the attention"), "padding", "norm1"),
    _SIDE,
    Choice("residual", ("both", "none", "no first", "no second"), "missing term", "residual connections"),
    Choice("order", ("rows first", "columns first", "runs of patches"), "axis order", "positions of a window"),
    Choice("mlp", ("behind norm2", "without norm2"), "missing term", "MLP"),
    dataclasses.replace(ON_CANVAS, values=(*ON_CANVAS.values, ZEROS_AROUND), causes={ZEROS_AROUND: "shift"}),
)
def _swin_block(
    reference: Reference,
    module: Any,
    inputs: np.ndarray,
    attn_mask: Any = None,
    sizes: Any = None,
    *,
    shift: str = "up and left",
    mask: str = "in every second block",
    norm: str = "before padding",
    side: str = SIDES[0],
    residual: str = "both",
    order: str = "rows first",
    mlp: str = "behind norm2",
) -> np.ndarray:
    window, by = module.window_size, module.shift_size
    height, width = inputs.shape[1:3]
    steps = {"none": 0, "down and right": -by, "one more": by + 1, "one less": by - 1}.get(shift, by) if by else 0
    rows, columns = (0 if shift == "columns only" else steps, 0 if shift == "rows only" else steps)
    back = {"not back": 0, "back twice": 2}.get(shift, 1)

    def padded(grid: np.ndarray) -> np.ndarray:
        return pad_to_multiple(grid, window, side)

    if norm == "behind padding":
        grid = reference.run(module.norm1, padded(inputs))  # what is recorded of it has another size
    else:
        grid = reference.inside(inputs if norm in ("left out", "behind the attention") else reference(module.norm1, inputs))
    if shift == "without the padding":
        grid = padded(np.roll(grid, (-rows, -columns), (1, 2)))
    else:
        grid = np.roll(padded(grid), (-rows, -columns), (1, 2))
    shown = attn_mask if by and mask != "in none" else None
    if mask == "in every":
        shown = shift_mask((height, width), window, by or window // 2)
    attended = unite(reference(module.attn, partition(grid, window, order), shown), window, order)
    top, left = ({SIDES[0]: 0, SIDES[1]: -length % window}.get(side, (-length % window) // 2) for length in (height, width))
    if shift != "without the padding":
        attended = np.roll(attended, (back * rows, back * columns), (1, 2))
    attended = attended[:, top : top + height, left : left + width]
    if shift == "without the padding":
        attended = np.roll(attended, (rows, columns), (1, 2))
    attended = reference(module.drop_path, reference(module.norm1, attended) if norm == "behind the attention" else attended)
    outputs = attended + (0 if residual in ("none", "no first") else inputs)
    hidden = outputs if mlp == "without norm2" else reference(module.norm2, outputs)
    return (0 if residual in ("none", "no second") else outputs) + reference(module.drop_path, reference(module.mlp, hidden))


QUARTERS = {
    "(0,0), (1,0), (0,1), (1,1)": ((0, 0), (1, 0), (0, 1), (1, 1)),
    "(0,0), (0,1), (1,0), (1,1)": ((0, 0), (0, 1), (1, 0), (1, 1)),
    "(0,0), (1,0), (1,1), (0,1)": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "(0,0), (0,1), (1,1), (1,0)": ((0, 0), (0, 1), (1, 1), (1, 0)),
    "(1,1), (0,1), (1,0), (0,0)": ((1, 1), (0, 1), (1, 0), (0, 0)),
}


@formula(
    "PatchMerging",
    Choice("quarters", tuple(QUARTERS), "axis order", "(row, column) of the quarters"),
    _SIDE,
    Choice("packed", ("quarters, then channels", "channels, then quarters"), "axis order", "packed as"),
)
def _patch_merging(
    reference: Reference,
    module: Any,
    inputs: np.ndarray,
    sizes: Any = None,
    *,
    quarters: str = next(iter(QUARTERS)),
    side: str = SIDES[0],
    packed: str = "quarters, then channels",
) -> np.ndarray:
    grid = pad_to_multiple(inputs, 2, side)
    parts = [grid[:, row::2, column::2] for row, column in QUARTERS[quarters]]
    if packed == "quarters, then channels":
        merged = np.concatenate(parts, -1)
    else:
        merged = np.stack(parts, -1).reshape(*parts[0].shape[:-1], -1)
    return reference(module.reduction, reference(module.norm, merged))


@formula(
    "BasicLayer",
    Choice(
        "mask",
        (
            "of the padded grid",
            "none",
            "of the grid without its padding",
            "of a shift of one less",
            "of a shift of one more",
            "of the other patches",
        ),
        "mask missing",
        "shift mask",
        causes={
            "of the grid without its padding": "padding",
            "of the other patches": "mask polarity",
            "of a shift of one less": "shift",
            "of a shift of one more": "shift",
        },
    ),
    dataclasses.replace(ON_CANVAS, cause="padding"),
    Choice("output", ("before merging", "behind merging"), "layer order", "output"),
)
def _basic_layer(
    reference: Reference,
    module: Any,
    inputs: np.ndarray,
    sizes: Any = None,
    *,
    mask: str = "of the padded grid",
    output: str = "before merging",
) -> dict[int, np.ndarray]:
    window, shift = module.window_size, module.window_size // 2
    shift += {"of a shift of one less": -1, "of a shift of one more": 1}.get(mask, 0)
    attn_mask = shift_mask(inputs.shape[1:3], window, shift, padded=mask != "of the grid without its padding")
    if mask == "of the other patches":
        attn_mask = attn_mask.min() - attn_mask
    outputs = inputs
    for block in module.blocks:
        outputs = reference(block, outputs, None if mask == "none" else attn_mask)
    merged = outputs if module.downsample is None else reference(module.downsample, outputs)
    return {0: outputs if output == "before merging" else merged, 3: merged}


@formula("D2SwinTransformer", Choice("norms", ("on each output", "passed on", "left out"), "missing term", "output norms"))
def _swin(reference: Reference, module: Any, images: np.ndarray, sizes: Any = None, *, norms: str = "on each output") -> dict[str, Any]:
    outputs = reference(module.pos_drop, reference(module.patch_embed, images))
    features = {}
    for stage, layer in enumerate(module.layers):
        of_stage = reference(layer, outputs)
        normed = reference(getattr(module, f"norm{stage}"), of_stage[0])
        features[f"res{stage + 2}"] = of_stage[0] if norms == "left out" else normed
        outputs = of_stage[3]
    return features


# Transformer

_ACTIVATION = Choice("activation", ("ReLU", "none", "GELU", "tanh GELU"), "gelu", "activation")
_NORMS = Choice("norms", ("behind", "before", "left out"), "layer order", "norms")


def _act(values: np.ndarray, activation: str) -> np.ndarray:
    return {"ReLU": relu, "none": lambda x: x, "GELU": gelu}.get(activation, lambda x: gelu(x, "tanh"))(values)


@formula(
    "TransformerEncoderLayer",
    Choice(
        "positions",
        ("on queries and keys", "nowhere", "on queries", "on keys", "on queries, keys and values", "on all, and kept"),
        "missing term",
        "position embedding",
    ),
    Choice("residual", ("both", "none", "no first", "no second", "first from positioned"), "missing term", "residual connections"),
    _NORMS,
    _ACTIVATION,
)
def _encoder_layer(
    reference: Reference,
    module: Any,
    src: np.ndarray,
    pos: np.ndarray,
    valid_keys: Any = None,
    *,
    positions: str = "on queries and keys",
    residual: str = "both",
    norms: str = "behind",
    activation: str = "ReLU",
) -> np.ndarray:
    before = norms == "before"
    inputs = reference(module.norm1, src) if before else src
    moved = inputs + pos
    query = inputs if positions in ("nowhere", "on keys") else moved
    key = inputs if positions in ("nowhere", "on queries") else moved
    value = moved if positions in ("on queries, keys and values", "on all, and kept") else inputs
    attended = reference(module.dropout1, reference(module.self_attn, query, key, value, valid_keys)[0])
    beside = {"none": 0, "no first": 0, "first from positioned": moved}.get(residual, moved if positions == "on all, and kept" else src)
    src = beside + attended
    src = reference(module.norm1, src) if norms == "behind" else src
    hidden = _act(reference(module.linear1, reference(module.norm2, src) if before else src), activation)
    fed = reference(module.dropout2, reference(module.linear2, reference(module.dropout, hidden)))
    outputs = fed + (0 if residual in ("none", "no second") else src)
    return reference(module.norm2, outputs) if norms == "behind" else outputs


@formula(
    "TransformerDecoderLayer",
    Choice(
        "query_positions",
        ("everywhere", "nowhere", "not on self-attention", "not on cross-attention", "on values too", "not on self-attention's keys"),
        "missing term",
        "query_pos",
    ),
    Choice("positions", ("on keys", "nowhere", "on keys and values", "on values"), "missing term", "pos of the memory"),
    Choice("residual", ("all", "none", "no first", "no second", "no third"), "missing term", "residual connections"),
    Choice("mask", ("passed on", "left out"), "mask missing", "mask of the keys"),
    _NORMS,
    _ACTIVATION,
)
def _decoder_layer(
    reference: Reference,
    module: Any,
    tgt: np.ndarray,
    memory: np.ndarray,
    pos: np.ndarray,
    query_pos: np.ndarray,
    valid_keys: Any = None,
    *,
    query_positions: str = "everywhere",
    positions: str = "on keys",
    residual: str = "all",
    mask: str = "passed on",
    norms: str = "behind",
    activation: str = "ReLU",
) -> np.ndarray:
    def normed(index: int, values: np.ndarray, where: str) -> np.ndarray:
        return reference(getattr(module, f"norm{index}"), values) if norms == where else values

    def beside(name: str, values: np.ndarray) -> Any:
        return 0 if residual in ("none", name) else values

    inputs = normed(1, tgt, "before")
    moved = inputs + query_pos
    query = inputs if query_positions in ("nowhere", "not on self-attention") else moved
    key = inputs if query_positions == "not on self-attention's keys" else query
    attended = reference(module.self_attn, query, key, moved if query_positions == "on values too" else inputs)[0]
    tgt = normed(1, beside("no first", tgt) + reference(module.dropout1, attended), "behind")
    inputs = normed(2, tgt, "before")
    query = inputs if query_positions in ("nowhere", "not on cross-attention") else inputs + query_pos
    key = memory + pos if positions in ("on keys", "on keys and values") else memory
    value = memory + pos if positions in ("on values", "on keys and values") else memory
    attended = reference(module.multihead_attn, query, key, value, None if mask == "left out" else valid_keys)[0]
    tgt = normed(2, beside("no second", tgt) + reference(module.dropout2, attended), "behind")
    hidden = reference(module.dropout, _act(reference(module.linear1, normed(3, tgt, "before")), activation))
    return normed(3, beside("no third", tgt) + reference(module.dropout3, reference(module.linear2, hidden)), "behind")


@formula(
    "TransformerEncoder",
    Choice("positions", ("of every layer", "of the first layer alone", "added once"), "missing term", "position embedding"),
    Choice("norm", ("none", "behind the last layer"), "extra term", "norm"),
)
def _encoder(
    reference: Reference,
    module: Any,
    src: np.ndarray,
    pos: np.ndarray,
    valid_keys: Any = None,
    *,
    positions: str = "of every layer",
    norm: str = "none",
) -> np.ndarray:
    if positions == "added once":
        src = src + pos
    for index, layer in enumerate(module.layers):
        src = reference(
            layer, src, pos if positions == "of every layer" or (index == 0 and positions != "added once") else 0 * pos, valid_keys
        )
    return src if norm == "none" else normalised(src, (src.ndim - 1,))


@formula(
    "TransformerDecoder",
    Choice("norm", ("on every output", "left out", "on the last output", "passed on"), "missing term", "final norm"),
    Choice("order", ("first layer first", "last layer first"), "layer order", "states"),
)
def _decoder(
    reference: Reference,
    module: Any,
    tgt: np.ndarray,
    memory: np.ndarray,
    pos: np.ndarray,
    query_pos: np.ndarray,
    valid_keys: Any = None,
    *,
    norm: str = "on every output",
    order: str = "first layer first",
) -> np.ndarray:
    states = []
    for layer in module.layers:
        tgt = reference(layer, tgt, memory, pos, query_pos, valid_keys)
        is_last = layer is module.layers[-1]
        is_normed = is_last or (module.return_intermediate and norm != "on the last output")
        normed = reference(module.norm, tgt) if is_normed and norm != "left out" else tgt
        tgt = normed if norm == "passed on" else tgt
        states.append(normed)
    if not module.return_intermediate:
        states = states[-1:]
    return np.stack(states if order == "first layer first" else states[::-1])


@formula(
    "Transformer",
    Choice("target", ("zeros", "query embedding", "ones"), "missing term", "decoder starts from"),
    Choice("positions", ("given", "left out of the encoder", "left out of the decoder", "left out"), "missing term", "position embedding"),
    Choice("memory", ("of the encoder", "input of the encoder"), "layer order", "memory"),
    Choice("flattened", ("rows first", "columns first"), "axis order", "grid flattened"),
)
def _transformer(
    reference: Reference,
    module: Any,
    src: np.ndarray,
    query_embed: np.ndarray,
    pos: np.ndarray,
    valid_keys: Any = None,
    *,
    target: str = "zeros",
    positions: str = "given",
    memory: str = "of the encoder",
    flattened: str = "rows first",
) -> tuple[np.ndarray, np.ndarray]:
    batch, height, width, channels = src.shape

    def flat(grid: np.ndarray) -> np.ndarray:
        return (grid if flattened == "rows first" else grid.swapaxes(1, 2)).reshape(batch, height * width, channels)

    pos = flat(np.asarray(pos))
    encoded = reference(module.encoder, flat(src), pos * (positions not in ("left out of the encoder", "left out")), valid_keys)
    query_pos = np.broadcast_to(query_embed, (batch, *query_embed.shape))
    start = {"zeros": np.zeros_like(query_pos), "query embedding": query_pos, "ones": np.ones_like(query_pos)}[target]
    attended = encoded if memory == "of the encoder" else flat(src)
    states = reference(
        module.decoder, start, attended, pos * (positions not in ("left out of the decoder", "left out")), query_pos, valid_keys
    )
    return states, encoded.reshape(batch, height, width, channels)


@formula("TransformerEncoderOnly", Choice("positions", ("given", "left out"), "missing term", "position embedding"))
def _encoder_only(
    reference: Reference, module: Any, src: np.ndarray, pos: np.ndarray, valid_keys: Any = None, *, positions: str = "given"
) -> np.ndarray:
    batch, height, width, channels = src.shape
    sequence = (batch, height * width, channels)
    pos = np.asarray(pos).reshape(sequence) * (positions == "given")
    return reference(module.encoder, src.reshape(sequence), pos, valid_keys).reshape(src.shape)


# Heads


@formula("MLP", Choice("activation", ("ReLU", "none", "GELU", "tanh GELU", "behind the last too"), "gelu", "activation"))
def _mlp_of_masks(reference: Reference, module: Any, inputs: np.ndarray, *, activation: str = "ReLU") -> np.ndarray:
    *hidden, last = module.layers
    for layer in hidden:
        inputs = _act(reference(layer, inputs), "ReLU" if activation == "behind the last too" else activation)
    outputs = reference(last, inputs)
    return relu(outputs) if activation == "behind the last too" else outputs


@formula(
    "TransformerPredictor",
    Choice("layers", ("last layer last", "reversed", "first layer for the last", "one layer earlier"), "layer order", "decoder layers"),
    Choice("scale", ("none", "1/√channels", "1/channels"), "scale", "masks times"),
    Choice("positions", ("given", "left out"), "missing term", "position embedding"),
    Choice("flipped", ("", "x and y exchanged"), "axis order", "mask features"),
    Choice("activated", ("no", "sigmoid"), "missing term", "activation of the masks"),
)
def _predictor(
    reference: Reference,
    module: Any,
    features: np.ndarray,
    mask_features: np.ndarray,
    sizes: Any = None,
    mask_sizes: Any = None,
    *,
    layers: str = "last layer last",
    scale: str = "none",
    positions: str = "given",
    flipped: str = "",
    activated: str = "no",
) -> dict[str, Any]:
    src = reference(module.input_proj, features)
    pos = np.asarray(reference(module.pe_layer, features), np.float64) * (positions == "given")
    states = reference(module.transformer, src, parameter(module.query_embed, "weight"), pos)[0]
    masks = reference(module.mask_embed, states) @ mask_features.reshape(len(features), 1, -1, mask_features.shape[-1])[:, 0].swapaxes(1, 2)
    masks = masks * {"none": 1.0, "1/√channels": mask_features.shape[-1] ** -0.5, "1/channels": 1 / mask_features.shape[-1]}[scale]
    shape = mask_features.shape[1:3]
    if flipped:
        masks = masks.reshape(*masks.shape[:3], *shape).swapaxes(3, 4).reshape(masks.shape)
    masks = masks.reshape(*masks.shape[:3], *shape)
    outputs: list[dict[str, Any]] = [{"pred_masks": 1 / (1 + np.exp(-layer)) if activated == "sigmoid" else layer} for layer in masks]
    if module.class_embed is not None:
        for layer, logits in zip(outputs, reference(module.class_embed, states), strict=True):
            layer["pred_logits"] = logits
    count = len(outputs)
    order = {
        "reversed": range(count - 1, -1, -1),
        "first layer for the last": [*range(1, count), 0],
        "one layer earlier": [max(index - 1, 0) for index in range(count)],
    }.get(layers, range(count))
    outputs = [outputs[index] for index in order]
    last = dict(outputs[-1])
    if module.deep_supervision:
        last["aux_outputs"] = outputs[:-1]
    return last


def resized(maps: np.ndarray, size: tuple[int, int], rule: str = "nearest") -> np.ndarray:
    """NHWC at another size.

    ``rule``: "nearest" (torch: ⌊i·in/out⌋), "half-pixel nearest" (⌊(i+½)·in/out⌋), "nearest, aligned corners", "doubled" (each pixel twice,
    cropped or filled up with the last), "doubled, cut at the top and left", "bilinear", "bilinear, no half pixels" (at i·in/out),
    "bilinear, aligned corners".
    """
    for axis, out in enumerate(size, start=1):
        length = maps.shape[axis]
        index = np.arange(out)
        if rule.startswith("bilinear"):
            if rule.endswith("corners"):
                place = index * (length - 1) / max(out - 1, 1)
            else:
                place = index * length / out if rule.endswith("no half pixels") else np.clip((index + 0.5) * length / out - 0.5, 0, None)
            low = np.minimum(place.astype(int), length - 1)
            share = (place - low).reshape([-1 if each == axis else 1 for each in range(maps.ndim)])
            maps = maps.take(low, axis) * (1 - share) + maps.take(np.minimum(low + 1, length - 1), axis) * share
            continue
        picked = {
            "nearest": index * length // out,
            "half-pixel nearest": (2 * index + 1) * length // (2 * out),
            "doubled": index // 2,
            "doubled, cut at the top and left": np.maximum(2 * length - out + index, 0) // 2,
        }.get(rule)
        if picked is None:
            picked = np.floor(index * (length - 1) / max(out - 1, 1) + 0.5).astype(int)
        maps = maps.take(np.minimum(picked, length - 1), axis)
    return maps


_HEAD = (
    Choice(
        "upsampled",
        (
            "nearest",
            "half-pixel nearest",
            "doubled",
            "doubled, cut at the top and left",
            "nearest, aligned corners",
            "bilinear",
            "bilinear, aligned corners",
        ),
        "interpolation",
        "upsampling",
        "pixel_decoder",
        causes={
            "half-pixel nearest": "half-pixel",
            "doubled": "shift",
            "doubled, cut at the top and left": "shift",
            "nearest, aligned corners": "align_corners",
        },
    ),
    Choice("lateral", ("added", "left out", "alone", "mean"), "missing term", "lateral connection", "pixel_decoder"),
    Choice("memory", ("before the output convolution", "behind the output convolution", "res5"), "layer order", "memory", "pixel_decoder"),
    Choice("top", ("res5", "projected, not encoded"), "layer order", "top of the pixel decoder", "pixel_decoder"),
    Choice("positions", ("given", "left out"), "missing term", "position embedding", "pixel_decoder"),
)
_AUXILIARY = Choice(
    "auxiliary", ("layer by layer", "backwards", "the final ones each time", "one layer early"), "layer order", "auxiliary outputs"
)


def _pixel_decoder(
    reference: Reference,
    module: Any,
    features: dict[str, Any],
    *,
    upsampled: str = "nearest",
    lateral: str = "added",
    memory: str = "before the output convolution",
    top: str = "res5",
    positions: str = "given",
) -> tuple[np.ndarray, np.ndarray]:
    upper = features["res5"]
    if hasattr(module, "transformer"):
        projected = reference(module.input_proj, upper)
        pos = np.asarray(reference(module.pe_layer, upper), np.float64) * (positions == "given")
        encoded = reference(module.transformer, projected, pos)
        upper = projected if top != "res5" else encoded
    outputs = reference(module.layer_4, upper)
    remembered = {"behind the output convolution": outputs, "res5": features["res5"]}.get(memory, upper)
    for index in (3, 2, 1):
        beside = reference(getattr(module, f"adapter_{index}"), features[f"res{index + 1}"])
        above = resized(outputs, beside.shape[1:3], upsampled)
        total = {"added": beside + above, "left out": above, "alone": beside, "mean": (beside + above) / 2}[lateral]
        outputs = reference(getattr(module, f"layer_{index}"), total)
    return reference(module.mask_features, outputs), remembered


@formula("MaskFormerHead", *_HEAD, _AUXILIARY)
@formula("PerPixelBaselinePlusHead", *_HEAD, _AUXILIARY)
def _head(
    reference: Reference, module: Any, features: dict[str, Any], sizes: Any, *, auxiliary: str = "layer by layer", **choices: str
) -> dict[str, Any]:
    mask_features, top = _pixel_decoder(reference, module.pixel_decoder, features, **choices)
    memory = top if module.transformer_in_feature == "transformer_encoder" else features["res5"]
    if choices.get("memory", "") in ("behind the output convolution", "res5"):
        memory = top
    outputs = reference(module.predictor, memory, mask_features)
    layers = outputs.pop("aux_outputs", ())
    layers = [layers[index] for index in range(len(layers))]
    if not module.mask_classification:
        outputs, *layers = ({"sem_seg": layer["pred_masks"]} for layer in (outputs, *layers))
    layers = {
        "backwards": layers[::-1],
        "the final ones each time": [outputs] * len(layers),
        "one layer early": [*layers[:1], *layers[:-1]],
    }.get(auxiliary, layers)
    return {**outputs, **({"aux_outputs": layers} if layers else {})}


@formula("PerPixelBaselineHead", *_HEAD)
def _per_pixel_head(reference: Reference, module: Any, features: dict[str, Any], sizes: Any, **choices: str) -> dict[str, Any]:
    mask_features, _ = _pixel_decoder(reference, module.pixel_decoder, features, **choices)
    return {"sem_seg": np.moveaxis(reference(module.predictor, mask_features), -1, 1)}
