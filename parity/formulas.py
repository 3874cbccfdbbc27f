"""What the official modules compute, once more: in NumPy and float64, with what ports get wrong as choices.

A formula is written from the official definition, not from the port, and knows nothing of how the port is written. With the official
choices it must give what PyTorch recorded, with the wrong one what TensorFlow computed: that shows a cause from both sides
(:mod:`parity.diagnose`). Arrays have TensorFlow's layouts (NHWC, ``[batch, length, channels]``; kernels HWIO, linear
weights ``[in, out]``).

Formulas are found by the name of the module's class. They know no masked padding: with it, they are given the image alone, cut out of its
canvas, or for a wrong choice (:data:`ON_CANVAS`) the whole canvas.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

Formula = Callable[..., Any]
FORMULAS: dict[str, Formula] = {}
"""Class of a module → its formula ``(reference, module, *inputs, **choices)``."""

CHOICES: dict[str, tuple[Choice, ...]] = {}
"""Class of a module → what ports get wrong in it."""

EPS = (1e-5, 1e-3, 1e-6, 1e-12, 1e-7, 1e-8, 1e-4, 0.0)


class UnsupportedError(Exception):
    """There is no formula for this module, or none for these inputs."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A keyword of a formula, and what it may be.

    Attributes:
        keyword: of the formula.
        values: all that is tried, the usual ones first.
        cause: of :data:`parity.hypotheses.CAUSES`.
        words: what is chosen, for the report: "eps", followed by the value.
        within: the child to which this belongs, where the child is never called itself.
        causes: value → its cause, where that is another one.
    """

    keyword: str
    values: tuple[Any, ...]
    cause: str
    words: str
    within: str = ""
    causes: Mapping[Any, str] = dataclasses.field(default_factory=dict)

    def cause_of(self, value: Any) -> str:
        """The cause that a value stands for."""
        return self.causes.get(value, self.cause)


ON_CANVAS = Choice("canvas", ("the image", "its canvas"), "mask missing", "computed over")
"""Of every formula with masked padding: what stands outside of the image is taken for a part of it."""

ZEROS_AROUND = "its canvas, zeros around it"
"""The same of a formula that begins with setting to zero what is outside, by :attr:`Reference.inside`."""


class Reference:
    """Runs formulas of a module and what lies below it, every module on recorded inputs.

    Args:
        recorded: tap → array in TensorFlow's layout; what a module gave is replaced by it before anybody goes on with it.
        wanted: taps to compute; others are taken as recorded.
        where: official name of the module that ``choices`` are for.
        choices: keywords of its formula.
        inside: sets what is outside of the image to zero, in a map or grid of the canvas, where :data:`ZEROS_AROUND` is chosen.

    Attributes:
        computed: tap → array, what the formulas made of recorded inputs.
        given: call (``<official name>#<call>``) → what its caller's formula gave to it, of calls on the way to what is wanted.
    """

    def __init__(
        self,
        recorded: Mapping[str, np.ndarray],
        wanted: Collection[str],
        where: str,
        choices: Mapping[str, Any],
        inside: Callable[[np.ndarray], np.ndarray] = lambda grid: grid,
    ):
        self.recorded, self.wanted, self.where, self.choices, self.inside = recorded, set(wanted), where, choices, inside
        self.computed: dict[str, np.ndarray] = {}
        self.given: dict[str, tuple[Any, ...]] = {}
        # The record begins where the module is called: a shared norm's first tap there may be its fourth.
        self._count: dict[str, int] = {}
        for tap in recorded:
            name, _, call = tap.partition("#")
            index = int(call.partition("[")[0])
            self._count[name] = min(index, self._count.get(name, index))

    def __call__(self, module: Any, *inputs: Any, **keywords: Any) -> Any:
        """What ``module`` gave, by the record; what its formula gives is computed if anybody wants it."""
        name = getattr(module, "official_name", None)
        if name is None:
            raise UnsupportedError(f"{module!r} stands in the place of a module")
        index = self._count.get(name, 0)
        prefix = f"{name}#{index}"
        if any(tap.startswith((prefix, f"{name}.")) for tap in self.wanted) or not self._is_recorded(prefix):
            self.given[prefix] = inputs
            return self.tap(name, self.run(module, *inputs, **keywords))
        self._count[name] = index + 1
        return _structured({tap[len(prefix) :]: value for tap, value in self.recorded.items() if _of(tap, prefix)})

    def run(self, module: Any, *inputs: Any, **keywords: Any) -> Any:
        """What the formula gives for ``module``.

        Raises:
            UnsupportedError: there is none.
        """
        kind = type(module).__name__
        if kind not in FORMULAS:
            raise UnsupportedError(f"no formula for {kind}")
        choices = self.choices if module.official_name == self.where else {}
        return FORMULAS[kind](self, module, *inputs, **keywords, **choices)

    def tap(self, name: str, outputs: Any) -> Any:
        """Notes what was computed, and returns what was recorded instead."""
        index = self._count[name] = self._count.get(name, 0) + 1
        prefix = f"{name}#{index - 1}"

        def visit(suffix: str, value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: visit(f"{suffix}[{key}]", item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [visit(f"{suffix}[{key}]", item) for key, item in enumerate(value)]
            tap = prefix + suffix
            if value is not None and tap in self.wanted:
                self.computed[tap] = value
            return self.recorded.get(tap, value)

        return visit("", outputs)

    def _is_recorded(self, prefix: str) -> bool:
        return any(_of(tap, prefix) for tap in self.recorded)


def _of(tap: str, prefix: str) -> bool:
    return tap == prefix or tap.startswith(prefix + "[")


def _structured(items: Mapping[str, np.ndarray]) -> Any:
    """``{"": x}`` → x, ``{"[res2]": x, "[0]": y}`` → {"res2": x, 0: y}."""
    if "" in items:
        return items[""]
    found: dict[Any, Any] = {}
    for suffix, value in items.items():
        keys = [int(key) if key.isdigit() else key for key in re.findall(r"\[(\w+)\]", suffix)]
        node = found
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return found


def formula(kind: str, *choices: Choice) -> Callable[[Formula], Formula]:
    """Registers what it decorates for modules of this class."""

    def register(formula: Formula) -> Formula:
        FORMULAS[kind], CHOICES[kind] = formula, choices
        return formula

    return register


def parameter(module: Any, name: str) -> Any:
    """A variable in float64, or None where the module declares none of this name."""
    variable = getattr(module, name, None)
    return None if variable is None else np.asarray(variable, np.float64)


BIASES = {"added": 1, "left out": 0, "added twice": 2, "subtracted": -1}
"""What is done with a bias: how often it is added."""

_BIAS = Choice("bias", tuple(BIASES), "bias", "bias")


def softmax(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """float64, same shape."""
    exponentials = np.exp(scores - scores.max(axis, keepdims=True))
    return exponentials / exponentials.sum(axis, keepdims=True)


def erf(values: np.ndarray) -> np.ndarray:
    """The error function, element by element, to the last bits of float64."""
    return np.frompyfunc(math.erf, 1, 1)(values).astype(np.float64)


def gelu(values: np.ndarray, kind: str = "exact") -> np.ndarray:
    """``kind``: "exact" (erf), "tanh", "sigmoid" (of 1.702 x) or "ReLU"."""
    if kind == "tanh":
        return 0.5 * values * (1 + np.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))
    if kind == "sigmoid":
        return values / (1 + np.exp(-1.702 * values))
    return relu(values) if kind == "ReLU" else 0.5 * values * (1 + erf(values * math.sqrt(0.5)))


def relu(values: np.ndarray) -> np.ndarray:
    """max(x, 0)."""
    return np.maximum(values, 0)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ReLU": relu,
    "none": lambda values: values,
    "GELU": gelu,
    "tanh GELU": lambda values: gelu(values, "tanh"),
    "leaky ReLU": lambda values: np.where(values > 0, values, 0.01 * values),
    "SiLU": lambda values: values / (1 + np.exp(-values)),
}


def convolution(inputs: np.ndarray, kernel: np.ndarray, stride: int = 1, dilation: int = 1, padding: str = "symmetric") -> np.ndarray:
    """NHWC with an HWIO kernel; ``padding``: "symmetric", "same" (TensorFlow's), "none", or "top left" and "bottom right" (all of it)."""
    margins = []
    for length, size in zip(inputs.shape[1:3], kernel.shape[:2], strict=True):
        reach = dilation * (size - 1)
        total = {"none": 0, "same": max((-(-length // stride) - 1) * stride + reach + 1 - length, 0)}.get(padding, reach)
        before = {"top left": total, "bottom right": 0}.get(padding, total // 2)
        margins.append((before, total - before))
    padded = np.pad(inputs, [(0, 0), *margins, (0, 0)])
    height, width = (
        (length - dilation * (size - 1) - 1) // stride + 1 for length, size in zip(padded.shape[1:3], kernel.shape[:2], strict=True)
    )
    if min(height, width) < 1:
        raise UnsupportedError("nothing would come out")
    outputs = np.zeros((len(inputs), height, width, kernel.shape[3]))
    for row in range(kernel.shape[0]):
        for column in range(kernel.shape[1]):
            top, left = row * dilation, column * dilation
            window = padded[:, top : top + (height - 1) * stride + 1 : stride, left : left + (width - 1) * stride + 1 : stride]
            outputs += window @ kernel[row, column]
    return outputs


@formula(
    "Conv2d",
    Choice("padding", ("symmetric", "same", "none", "top left", "bottom right"), "padding side", "padding", causes={"none": "padding"}),
    Choice("eps", EPS, "eps", "the frozen norm's eps", "norm"),
    Choice("dilation", (1, 2, 4, 8), "dilation", "dilation"),
    Choice("stride", (1, 2, 4), "stride", "stride"),
    _BIAS,
    Choice("flipped", ("", "kernel turned by 180°"), "axis flip", "kernel"),
    Choice(
        "norm",
        ("scale and shift", "without shift", "without scale", "variance for deviation", "mean not scaled"),
        "normaliser",
        "norm",
        "norm",
    ),
    Choice("activation", tuple(ACTIVATIONS), "missing term", "activation"),
    dataclasses.replace(ON_CANVAS, values=(*ON_CANVAS.values, ZEROS_AROUND)),
)
def _conv2d(
    reference: Reference,
    module: Any,
    inputs: np.ndarray,
    sizes: Any = None,
    *,
    padding: str = "symmetric",
    eps: float = 1e-5,
    dilation: int = 0,
    stride: int = 0,
    bias: str = "added",
    flipped: str = "",
    norm: str = "scale and shift",
    activation: str = "",
) -> np.ndarray:
    kernel, added = parameter(module, "weight"), parameter(module, "bias")
    if flipped:
        kernel = kernel[::-1, ::-1]
    outputs = convolution(reference.inside(inputs), kernel, stride or module.stride, dilation or module.dilation, padding)
    if added is not None:
        outputs = outputs + BIASES[bias] * added
    if type(module.norm).__name__ == "FrozenBatchNorm2d":
        weight, shift, mean, variance = (parameter(module.norm, name) for name in ("weight", "bias", "running_mean", "running_var"))
        scale = weight / (variance + eps if norm == "variance for deviation" else np.sqrt(variance + eps))
        if norm == "without scale":
            scale = np.ones_like(scale)
        shift = shift - mean * (1 if norm == "mean not scaled" else scale)
        outputs = outputs * scale + (0 if norm == "without shift" else shift)
        outputs = reference.tap(module.norm.official_name, outputs)
    elif module.norm is not None:
        outputs = reference(module.norm, outputs)
    return ACTIVATIONS[activation or ("none" if module.activation is None else "ReLU")](outputs)


_NORM = (
    Choice("eps", EPS, "eps", "eps"),
    Choice("variance", ("biased", "unbiased", "second moment"), "normaliser", "variance"),
    Choice("affine", ("", "weight left out", "bias left out", "weight of 1 + w"), "bias", "affine part"),
    Choice("placed", ("under the root", "behind the root"), "eps", "eps"),
)


def normalised(
    values: np.ndarray, axes: tuple[int, ...], eps: float = EPS[0], variance: str = "biased", placed: str = "under the root"
) -> np.ndarray:
    """Mean 0 and variance 1 over ``axes``."""
    centred = values - values.mean(axes, keepdims=True)
    count = math.prod(values.shape[axis] for axis in axes)
    moment = {
        "biased": (centred**2).mean(axes, keepdims=True),
        "unbiased": (centred**2).sum(axes, keepdims=True) / max(count - 1, 1),
        "second moment": (values**2).mean(axes, keepdims=True),
    }[variance]
    return centred / (np.sqrt(moment + eps) if placed == "under the root" else np.sqrt(moment) + eps)


def _affine(module: Any, values: np.ndarray, affine: str) -> np.ndarray:
    weight, bias = parameter(module, "weight"), parameter(module, "bias")
    weight = {"weight left out": np.ones_like(weight), "weight of 1 + w": 1 + weight}.get(affine, weight)
    return values * weight + (0 if affine == "bias left out" else bias)


@formula("LayerNorm", *_NORM)
def _layer_norm(reference: Reference, module: Any, inputs: np.ndarray, *, affine: str = "", **choices: Any) -> np.ndarray:
    return _affine(module, normalised(inputs, (inputs.ndim - 1,), **choices), affine)


@formula(
    "GroupNorm",
    *_NORM,
    Choice("groups", (32, 1, 2, 4, 8, 16, 64), "normaliser", "groups"),
    Choice("interleaved", (False, True), "axis order", "channels of a group interleaved"),
    Choice("over", ("each image", "the batch"), "normaliser", "statistics over"),
)
def _group_norm(
    reference: Reference,
    module: Any,
    inputs: np.ndarray,
    sizes: Any = None,
    *,
    groups: int = 32,
    interleaved: bool = False,
    over: str = "each image",
    affine: str = "",
    **choices: Any,
) -> np.ndarray:
    *leading, channels = inputs.shape
    if channels % groups:
        raise UnsupportedError(f"{channels} channels in {groups} groups")
    split = (channels // groups, groups) if interleaved else (groups, channels // groups)
    axes = (1, 2, 3 if interleaved else 4)
    grouped = normalised(inputs.reshape(*leading, *split), axes if over == "each image" else (0, *axes), **choices)
    return _affine(module, grouped.reshape(inputs.shape), affine)


@formula("Linear", _BIAS)
def _linear(reference: Reference, module: Any, inputs: np.ndarray, *, bias: str = "added") -> np.ndarray:
    outputs, added = inputs @ parameter(module, "weight"), parameter(module, "bias")
    return outputs if added is None else outputs + BIASES[bias] * added


@formula("Identity")
@formula("Dropout", Choice("factor", (1.0, 0.9, 1 / 0.9, 0.0), "scale", "outputs times"))
@formula("DropPath", Choice("factor", (1.0, 0.9, 0.8, 0.7, 0.0), "scale", "outputs times"))
def _identity(reference: Reference, module: Any, inputs: np.ndarray, *, factor: float = 1.0) -> np.ndarray:
    return inputs * factor


HEAD_ORDERS = ("heads, then channels", "channels, then heads")


def split_heads(values: np.ndarray, heads: int, order: str = HEAD_ORDERS[0]) -> np.ndarray:
    """``[..., length, channels]`` → ``[..., heads, length, channels / heads]``."""
    *leading, channels = values.shape
    if order == HEAD_ORDERS[0]:
        return np.moveaxis(values.reshape(*leading, heads, channels // heads), -2, -3)
    return np.moveaxis(values.reshape(*leading, channels // heads, heads), -1, -3)


def merge_heads(values: np.ndarray, order: str = HEAD_ORDERS[0]) -> np.ndarray:
    """Inverse of :func:`split_heads`, and a wrong one: "not moved back" reads heads and positions in the order in memory."""
    *leading, heads, length, channels = values.shape
    if order == "not moved back":
        return values.reshape(*leading, length, heads * channels)
    moved = np.moveaxis(values, -3, -2) if order == HEAD_ORDERS[0] else np.moveaxis(values, -3, -1)
    return moved.reshape(*leading, length, heads * channels)


SCALES = ("1/√d", "none", "1/d", "1/√channels", "√d", "twice")


def scale_of(name: str, channels: int, heads: int) -> float:
    """A scale of the scores, of :data:`SCALES`, as a number."""
    size = channels // heads
    return {
        "1/√d": size**-0.5,
        "none": 1.0,
        "1/d": 1 / size,
        "1/√channels": channels**-0.5,
        "√d": size**0.5,
        "twice": 1 / size,
    }[name]


@formula(
    "MultiheadAttention",
    Choice("scale", SCALES[:5], "scale", "scores times"),
    Choice("split", HEAD_ORDERS, "head split order", "heads split as"),
    Choice("merge", (*HEAD_ORDERS, "not moved back"), "head split order", "heads merged as"),
    Choice("both", HEAD_ORDERS, "head split order", "heads split and merged as"),
    Choice("order", ("qkv", "qvk", "kqv", "kvq", "vqk", "vkq"), "q/k/v permutation", "projections taken as"),
    Choice(
        "swapped",
        ("", "query and key exchanged", "key and value exchanged", "key for value", "value for key", "query for key"),
        "q/k/v permutation",
        "inputs",
    ),
    Choice("biases", ("all", "none", "no input bias", "no output bias", "no q bias", "no k bias", "no v bias"), "bias", "biases"),
    Choice(
        "mask", ("True: a key that exists", "True: a key that does not", "none"), "mask polarity", "mask", causes={"none": "mask missing"}
    ),
    Choice("axis", ("keys", "queries"), "axis order", "softmax over"),
    Choice("heads", (0, 1, 2, 4, 8, 16), "head split order", "heads"),
    Choice("projected", (True, False), "missing term", "output projection"),
)
def _multihead_attention(
    reference: Reference,
    module: Any,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    valid_keys: Any = None,
    *,
    scale: str = "1/√d",
    split: str = HEAD_ORDERS[0],
    merge: str = HEAD_ORDERS[0],
    both: str = "",
    order: str = "qkv",
    swapped: str = "",
    biases: str = "all",
    mask: str = "True: a key that exists",
    axis: str = "keys",
    heads: int = 0,
    projected: bool = True,
) -> dict[int, np.ndarray]:
    heads = heads or module.num_heads
    if both:
        split = merge = both
    inputs = {
        "query and key exchanged": (key, query, value),
        "key and value exchanged": (query, value, key),
        "key for value": (query, key, key),
        "value for key": (query, value, value),
        "query for key": (query, query, value),
    }.get(swapped, (query, key, value))
    channels = query.shape[-1]
    if channels % heads:
        raise UnsupportedError(f"{channels} channels in {heads} heads")
    weights = np.split(parameter(module, "in_proj_weight"), 3, axis=1)
    added = np.split(parameter(module, "in_proj_bias"), 3)
    left_out = {"none": "qkv", "no input bias": "qkv", "no q bias": "q", "no k bias": "k", "no v bias": "v"}.get(biases, "")
    heads_of = []
    for name, part, values in zip("qkv", order, inputs, strict=True):
        index = "qkv".index(part)
        projection = values @ weights[index] + (0 if name in left_out else added[index])
        heads_of.append(split_heads(projection, heads, split))
    scores = scale_of(scale, channels, heads) * heads_of[0] @ np.swapaxes(heads_of[1], -1, -2)
    if valid_keys is not None and mask != "none":
        shown = np.asarray(valid_keys, bool)[:, None, None, :]
        scores = np.where(shown if mask == "True: a key that exists" else ~shown, scores, -1e30)
    attention = softmax(scores, -1 if axis == "keys" else -2)
    outputs = merge_heads(attention @ heads_of[2], merge)
    if projected:
        bias = 0 if biases in ("none", "no output bias") else parameter(module.out_proj, "bias")
        outputs = outputs @ parameter(module.out_proj, "weight") + bias
    return {0: outputs, 1: attention.mean(1)}


def positions(
    size: tuple[int, int],
    channels: int,
    *,
    axes: str = "y, x",
    waves: str = "sine, cosine alternating",
    normalised: str = "to 2π",
    start: str = "1",
    temperature: float = 10000.0,
    eps: float = 1e-6,
    exponent: str = "2⌊i/2⌋",
) -> np.ndarray:
    """Sine position embedding ``[height, width, 2 · channels]``."""
    index = np.arange(channels)
    power = {"2⌊i/2⌋": 2 * (index // 2), "i": index, "⌊i/2⌋": index // 2}[exponent] / channels
    parts = []
    for length in size:
        first = int(start[0])
        last = length if start.endswith("of the length") else length - 1 + first
        along = np.arange(first, length + first, dtype=np.float64)
        scale = {"to 2π": 2 * math.pi, "to 1": 1.0, "to π": math.pi}.get(normalised)
        if normalised == "by the length − 1":
            along, scale = (along - 1) / max(length - 1, 1) * 2 * math.pi, None
        if normalised == "half a step off":
            along, scale = (along - 0.5) / (length + eps) * 2 * math.pi, None
        if scale is not None:
            along = along / (last + eps) * scale
        angles = along[:, None] / temperature**power
        sines, cosines = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
        if waves == "cosine, sine alternating":
            sines, cosines = np.cos(angles[:, 0::2]), np.sin(angles[:, 1::2])
        if waves == "sines, then cosines":
            parts.append(np.concatenate([sines, cosines], 1))
        else:
            parts.append(np.stack([sines, cosines], 2).reshape(length, channels))
    rows, columns = (np.broadcast_to(parts[axis][:, None] if axis == 0 else parts[axis][None], (*size, channels)) for axis in (0, 1))
    return np.concatenate([rows, columns] if axes == "y, x" else [columns, rows], -1)


@formula(
    "PositionEmbeddingSine",
    Choice("axes", ("y, x", "x, y"), "axis order", "order of the axes"),
    Choice("waves", ("sine, cosine alternating", "cosine, sine alternating", "sines, then cosines"), "axis order", "waves"),
    Choice("normalised", ("to 2π", "to 1", "to π", "not at all", "by the length − 1", "half a step off"), "normaliser", "normalised"),
    Choice("start", ("1", "0", "0, in parts of the length", "2"), "shift", "counted from"),
    Choice("temperature", (10000.0, 20.0, 1000.0, 100000.0), "scale", "temperature"),
    Choice("eps", (1e-6, 1e-3, 1.0), "eps", "eps"),
    Choice("exponent", ("2⌊i/2⌋", "i", "⌊i/2⌋"), "scale", "exponent"),
    Choice("flipped", ("", "up and down", "left and right"), "axis flip", "grid flipped"),
)
def _position_embedding_sine(
    reference: Reference, module: Any, features: np.ndarray, sizes: Any = None, *, flipped: str = "", **choices: Any
) -> np.ndarray:
    grid = positions((features.shape[1], features.shape[2]), len(module.dim_t), **choices)
    if flipped:
        grid = grid[::-1] if flipped == "up and down" else grid[:, ::-1]
    return np.broadcast_to(grid, (len(features), *grid.shape))
