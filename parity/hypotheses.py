"""What may be wrong with a port, as things that can be tried.

A hypothesis is applied, never guessed: variables or attributes of the TensorFlow module are changed and the module runs again, or what it
gave is changed back; everything is as before afterwards. :mod:`parity.diagnose` asks it how far it is off then. Those that need no
run of TensorFlow, formulas with a wrong choice in them, are in :mod:`parity.formulas`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.trace import relative_error

if TYPE_CHECKING:
    from tfmaskformer.module import Module

CAUSES = (
    "transpose",
    "axis flip",
    "axis order",
    "head split order",
    "q/k/v permutation",
    "shift",
    "eps",
    "half-pixel",
    "align_corners",
    "gelu",
    "bias",
    "scale",
    "BGR",
    "padding side",
    "padding",
    "stride",
    "dilation",
    "mask polarity",
    "mask missing",
    "normaliser",
    "momentum",
    "class order",
    "layer order",
    "dtype rounding",
    "clip",
    "weight decay",
    "learning rate",
    "threshold",
    "id",
    "stale weight",
    "missing term",
    "extra term",
    "interpolation",
    "exponent",
    "derivative",
    "assignment",
    "not finite",
)
"""What a cause may be called. "missing term": something is left out, added twice or cut off (a residual connection, a position embedding, a
gradient's path); "extra term": something is applied that does not belong there; "layer order": something is taken or done before or behind
the place where it belongs (two layers of a stack with one another's weights too); "axis order": also rows for columns, where "transpose" is
of the two sides of a matrix; "stale weight": never loaded, or another's; "padding side": as many zeros, on other sides; "clip": a limit, of
a norm, a value or a size, is left out or another; "interpolation": resized by another kind of rule (nearest, bilinear, antialiased);
"derivative": on the way back an operation is not the derivative of what it was on the way forth; "assignment": pairs are chosen by another
rule than the least cost."""


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """Something that may be wrong, and can be tried.

    Attributes:
        cause: of :data:`CAUSES`.
        where: the official name of what is at fault.
        words: what is wrong: "weight transposed"; a function where that is known only after it was tried (a fitted factor).
        undone: how it is taken back, for the sentence "with … the residual falls"; "" where it cannot be, and was seen, not tried.
        after: applies it, measures, restores everything; returns the relative error that is left.
    """

    cause: str
    where: str
    words: str | Callable[[], str]
    undone: str
    after: Callable[[], float]


Values = Sequence[tuple[Any, np.ndarray]]
"""Variables, each with a value."""


@contextlib.contextmanager
def assigned(values: Values) -> Iterator[None]:
    """Inside, variables have these values."""
    before = [(variable, variable.numpy()) for variable, _ in values]
    try:
        for variable, value in values:
            variable.assign(value)
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a module gives, as often as it is asked.

    Attributes:
        outputs: runs it, or its formula where TensorFlow is known to compute what that says: all that differs, flat.
        expected: the same, as recorded.
        confirm: runs it in TensorFlow; relative error.
        floor: down to which an error is worth confirming.
    """

    outputs: Callable[[], np.ndarray]
    expected: np.ndarray
    confirm: Callable[[], float]
    floor: float

    def error(self) -> float:
        """Relative error now; one that is near the floor is TensorFlow's."""
        error = relative_error(self.outputs(), self.expected)
        return error if error > self.floor else self.confirm()


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# Rearrangements: of variables, and of what a module gave.


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """A permutation of elements that ports apply by mistake. ``undo`` takes it back; ``axis``: along which, where it is along one."""

    cause: str
    words: str
    undone: str
    undo: Callable[[np.ndarray], np.ndarray]
    axis: int | None = None


def rearrangements(shape: Sequence[int], heads: int | None = None) -> Iterator[Rearrangement]:
    """Those that keep ``shape``; ``heads``: number of attention heads, where there are any."""
    rank = len(shape)
    for first, second in itertools.combinations(range(rank), 2):
        if shape[first] == shape[second] > 1:
            words = "transposed" if rank == 2 else f"axes {first} and {second} exchanged"
            cause = "axis order" if rank == 4 and second == 1 else "transpose"  # of a kernel: rows and columns
            yield Rearrangement(cause, words, "the transpose undone", functools.partial(np.swapaxes, axis1=first, axis2=second))
    if rank == 4 and shape[0] == shape[1] > 1:
        yield Rearrangement("axis flip", "turned by 180°", "the turn undone", lambda x: x[::-1, ::-1])
        yield Rearrangement("transpose", "turned by 90°", "the turn undone", lambda x: np.rot90(x, 1))
        yield Rearrangement("transpose", "turned by −90°", "the turn undone", lambda x: np.rot90(x, -1))
    for axis in range(rank):
        if shape[axis] < 2:
            continue
        # Three channels going in are colours; a step of two elements is a flip.
        cause = "BGR" if rank == 4 and axis == 2 and shape[axis] == 3 else "axis flip"
        yield Rearrangement(cause, f"axis {axis} reversed", "the order restored", functools.partial(np.flip, axis=axis), axis)
        if shape[axis] > 2:
            for step in (1, -1):
                words = f"shifted by {step:+d} along axis {axis}"
                yield Rearrangement("shift", words, "the shift undone", functools.partial(np.roll, shift=-step, axis=axis), axis)
    for axis in range(rank):
        if shape[axis] % 3 == 0 and shape[axis] > 3:
            for order in itertools.islice(itertools.permutations(range(3)), 1, None):
                words = f"thirds of axis {axis} in the order {''.join('qkv'[index] for index in order)}"
                yield Rearrangement("q/k/v permutation", words, "q, k, v restored", functools.partial(_parts, axis=axis, order=order))
        for count in dict.fromkeys((heads, 2, 4)):
            if count and count > 1:
                yield from _of_heads(shape[axis], axis, count)
        if heads and heads > 1 and shape[axis] % heads == 0 and shape[axis] > heads:
            yield from _order_of_heads(shape[axis], axis, heads)


def _of_heads(length: int, axis: int, heads: int) -> Iterator[Rearrangement]:
    """Channels of an axis packed in another order of heads, channels of a head, and q, k, v."""
    for split, order in (
        ((heads, length // heads), (1, 0)),
        ((length // heads, heads), (1, 0)),
        ((heads, 3, length // (3 * heads)), (1, 0, 2)),
        ((heads, length // (3 * heads), 3), (2, 0, 1)),
        ((3, length // (3 * heads), heads), (0, 2, 1)),
        ((length // (3 * heads), heads, 3), (2, 1, 0)),
    ):
        if math.prod(split) != length or 1 in split or (len(split) == 2 and split[0] == split[1] and split[0] != heads):
            continue
        names = [
            "q/k/v" if part == 3 and len(split) == 3 and place == order[0] else "heads" if part == heads else "channels"
            for place, part in enumerate(split)
        ]
        yield Rearrangement(
            "head split order",
            f"axis {axis} packed as ({', '.join(names)}), of {heads} heads",
            "the packing undone",
            functools.partial(_regrouped, axis=axis, split=split, order=order),
        )


def _order_of_heads(length: int, axis: int, heads: int) -> Iterator[Rearrangement]:
    """Heads, each kept as it is, in another order."""
    channels = np.arange(length).reshape(heads, -1)
    orders = {"reversed": channels[::-1], "shifted by +1": np.roll(channels, -1, 0), "shifted by -1": np.roll(channels, 1, 0)}
    for name, order in list(orders.items())[: None if heads > 2 else 1]:
        words = f"heads along axis {axis}, of {heads}, {name}"
        undo = functools.partial(np.take, indices=order.ravel(), axis=axis)
        yield Rearrangement("head split order", words, "the order restored", undo)


def _parts(values: np.ndarray, axis: int, order: Sequence[int]) -> np.ndarray:
    """Undoes ``concatenate([thirds[i] for i in order])``."""
    parts = np.split(values, 3, axis)
    return np.concatenate([parts[order.index(index)] for index in range(3)], axis)


def _regrouped(values: np.ndarray, axis: int, split: Sequence[int], order: Sequence[int]) -> np.ndarray:
    """Reads one axis as several, exchanges them, and makes one of them again."""
    shape = (*values.shape[:axis], *split, *values.shape[axis + 1 :])
    axes = (*range(axis), *(axis + index for index in order), *range(axis + len(split), len(shape)))
    return values.reshape(shape).transpose(axes).reshape(values.shape)


FACTORS = {
    2.0: "2",
    0.5: "½",
    -1.0: "−1",
    10.0: "10",
    0.1: "1/10",
    255.0: "255",
    1 / 255: "1/255",
    math.sqrt(2): "√2",
    math.sqrt(0.5): "1/√2",
    0.9: "0.9",
    0.99: "0.99",
    0.999: "0.999",
    100.0: "100",
    0.01: "1/100",
    1000.0: "1000",
    0.001: "1/1000",
}
"""Factors that have a name."""


def factor_name(factor: float) -> str:
    """A factor in words; √n and 1/√n, n and 1/n of whole numbers too.

    >>> factor_name(0.125), factor_name(1 / math.sqrt(8)), factor_name(1.0371)
    ('1/8', '1/√8', '1.0371')
    """
    for known, name in FACTORS.items():
        if math.isclose(factor, known, rel_tol=1e-7):
            return name
    for power, sign in ((1.0, ""), (2.0, "√")):
        for value, form in ((abs(factor) ** power, "{sign}{n}"), (abs(factor) ** -power if factor else 0.0, "1/{sign}{n}")):
            if 1 < value < 4096 and math.isclose(value, round(value), rel_tol=1e-7):
                return "−" * (factor < 0) + form.format(sign=sign, n=round(value))
    return f"{factor:.6g}"


# Of a module's variables.


def own_variables(module: Module, called: Collection[str]) -> dict[str, Any]:
    """Official name → variable, of the module and of those inside it that only hold variables (a frozen norm, an output projection).

    ``called``: names of the modules that are called, and so have outputs of their own.
    """
    return {f"{owner.official_name}.{name}": getattr(owner, name) for owner in _holders(module, called) for name in owner._declared}


def _holders(module: Module, called: Collection[str]) -> Iterator[Module]:
    """The module and those inside it that are never called, but not what belongs to others that are."""
    from tfmaskformer.module import Module

    yield module
    for child in vars(module).values():
        if isinstance(child, Module) and (type(child).call is Module.call or child.official_name not in called):
            yield from _holders(child, called)


def of_variables(
    module: Module, trial: Trial, siblings: Mapping[str, Any], called: Collection[str], heads: int | None
) -> Iterator[Hypothesis]:
    """What may be wrong with the variables of a module.

    Args:
        module: of which it is known that its outputs differ.
        trial: what it gives.
        siblings: official name → other variables, of which one may have been taken by mistake.
        called: see :func:`own_variables`.
        heads: number of attention heads there, if it is part of an attention.
    """
    variables = own_variables(module, called)

    def tried(values: Values) -> float:
        with assigned(values):
            return trial.error()

    for name, variable in variables.items():
        where, _, last = name.rpartition(".")
        value = variable.numpy()
        for change in rearrangements(value.shape, heads):
            yield Hypothesis(
                _cause(change.cause, where, change.axis == value.ndim - 1),
                where,
                f"{last} {change.words}",
                change.undone,
                functools.partial(tried, [(variable, change.undo(value))]),
            )
    yield from _together(variables, heads, tried)
    yield from _scaled(variables, trial)
    yield from _function_of(variables, tried)
    yield from _stale(variables, siblings, tried)
    yield from _constant(variables, trial, tried)
    yield from _unrelated(variables, trial, tried)
    error = trial.error()
    for name, variable in variables.items():
        where, _, last = name.rpartition(".")
        yield from _made_of(where, last, variable.numpy(), None, error)


CLASSIFIERS = ("sem_seg_head.predictor.class_embed", "sem_seg_head.predictor")
"""Modules whose outputs are classes. The second has variables of its own, and outputs with them on the last axis, in a baseline only."""


def _cause(cause: str, where: str, outputs: bool) -> str:
    """Classes in another order have a name of their own; ``outputs``: whether it is the order of what comes out."""
    return "class order" if outputs and where in CLASSIFIERS and cause in ("shift", "axis flip", "axis order") else cause


def _together(variables: Mapping[str, Any], heads: int | None, tried: Callable[[Values], float]) -> Iterator[Hypothesis]:
    """A weight's outputs and its bias rearranged alike."""
    for name, weight in variables.items():
        where, _, last = name.rpartition(".")
        bias = variables.get(f"{where}.{last.replace('weight', 'bias')}")
        if not last.endswith("weight") or bias is None or len(weight.shape) < 2:
            continue
        length, axis = bias.shape[0], len(weight.shape) - 1
        ours = {change.words: change for change in rearrangements(weight.shape, heads)}
        for change in rearrangements((length,), heads):
            partner = ours.get(change.words.replace("axis 0", f"axis {axis}"))
            if partner is None:
                continue
            yield Hypothesis(
                _cause(change.cause, where, True),
                where,
                f"{last} and its bias: {change.words.replace('axis 0', 'outputs')}",
                change.undone,
                functools.partial(tried, [(weight, partner.undo(weight.numpy())), (bias, change.undo(bias.numpy()))]),
            )


def _scaled(variables: Mapping[str, Any], trial: Trial) -> Iterator[Hypothesis]:
    """Variables, or thirds of a packed one, off by a factor, which is fitted."""
    for name, variable in variables.items():
        where, _, last = name.rpartition(".")
        value = variable.numpy()
        if not value.any():
            continue
        masks = {"": np.ones(value.shape)}
        if last.startswith("in_proj") or where.endswith("qkv"):
            thirds = np.arange(value.shape[-1]) * 3 // value.shape[-1]
            masks |= {f"'s {part}": np.broadcast_to(thirds == index, value.shape).astype(float) for index, part in enumerate("qkv")}
        for part, mask in masks.items():
            factors: list[float] = []

            def after(variable: Any = variable, value: Any = value, mask: Any = mask, factors: list[float] = factors) -> float:
                def run(times: float) -> np.ndarray:
                    with assigned([(variable, value * (1 + (times - 1) * mask))]):
                        return trial.outputs()

                factor, error = fitted(run, trial.expected)
                factors.append(1 / factor if factor else math.inf)
                if error > trial.floor:
                    return error
                with assigned([(variable, value * (1 + (factor - 1) * mask))]):
                    return trial.error()

            yield Hypothesis(
                "scale",
                where,
                functools.partial(_factor_told, last + part, factors),
                "the factor undone",
                after,
            )


def _factor_told(what: str, factors: Sequence[float]) -> str:
    return f"{what} is {factor_name(factors[-1])} times the official"


def fitted(run: Callable[[float], np.ndarray], expected: np.ndarray, steps: int = 6) -> tuple[float, float]:
    """The factor for which ``run(factor)`` comes closest to ``expected``, from 1 on, and the relative error there.

    Gauss and Newton's way: one step where the outputs depend on the factor linearly.
    """
    factor, found, error = 1.0, run(1.0), math.inf
    for _ in range(steps):
        move = 1e-3 * max(abs(factor), 1e-3)
        slope = (run(factor + move) - found) / move
        power = float(np.vdot(slope, slope))
        if not power or not math.isfinite(power):
            break
        factor += float(np.vdot(slope, expected - found)) / power
        found = run(factor)
        error, before = relative_error(found, expected), error
        if error < 1e-13 or not error < before:
            break
    return factor, error


def _stale(variables: Mapping[str, Any], siblings: Mapping[str, Any], tried: Callable[[Values], float]) -> Iterator[Hypothesis]:
    """The weights of another layer, all of them or one variable."""
    modules: dict[str, dict[str, Any]] = {}
    for name, variable in siblings.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = variable
    owners: dict[str, dict[str, Any]] = {}
    for name, variable in variables.items():
        where, _, last = name.rpartition(".")
        owners.setdefault(where, {})[last] = variable
    for (where, ours), (module, theirs) in itertools.product(owners.items(), modules.items()):
        fitting = [last for last in ours if module != where and last in theirs and tuple(theirs[last].shape) == tuple(ours[last].shape)]
        for names in ([fitting] if len(fitting) > 1 else []) + [[last] for last in fitting]:
            layers = re.sub(r"\.\d+\b", "", where) == re.sub(r"\.\d+\b", "", module)
            yield Hypothesis(
                "layer order" if layers else "stale weight",
                where,
                f"its {' and '.join(names)} stands in {module}",
                "that in its place",
                functools.partial(tried, [(ours[last], theirs[last].numpy()) for last in names]),
            )


_FUNCTIONS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "the square root": ("it squared", np.square),
    "the square": ("its square root", np.sqrt),
    "the reciprocal": ("its reciprocal", np.reciprocal),
    "the reciprocal square root": ("the reciprocal of its square", lambda values: values**-2),
    "the logarithm": ("its exponential", np.exp),
    "the exponential": ("its logarithm", np.log),
}
"""Deviation for variance and the like: of the official value → its inverse, in words and as a function."""


def _function_of(variables: Mapping[str, Any], tried: Callable[[Values], float]) -> Iterator[Hypothesis]:
    """Variables of a norm that hold a function of the official value."""
    for name, variable in variables.items():
        where, _, last = name.rpartition(".")
        value = variable.numpy()
        if value.ndim != 1 or not (value > 0).all():
            continue
        for words, (undone, inverse) in _FUNCTIONS.items():
            after = functools.partial(tried, [(variable, inverse(value))])
            yield Hypothesis("scale", where, f"{last} is {words} of the official", f"{undone} in its place", after)


# Variables for which values are sought with which everything fits. Of as many as there are equations they always exist, and prove nothing.

SPARE = 2
"""Equations that must be left."""

MOST_ELEMENTS = 2e7
"""Of a Jacobian."""


def solved(
    run: Callable[[Values], np.ndarray], start: Values, expected: np.ndarray, channels: int, spare: int = SPARE
) -> tuple[list[np.ndarray], float] | None:
    """Values with which outputs come closest to what is expected, by Gauss and Newton from those that are there.

    Args:
        run: variables with values → outputs, flat.
        start: variables, with what they are.
        expected: outputs as they should be, flat.
        channels: how many there are, if each channel of the variables acts on the same channel of the outputs alone, as in a linear layer
            or a norm; 1 where that is not so.
        spare: how many equations there must be more than unknowns.

    Returns:
        Values, and the relative error with them; None: too many unknowns, or too few equations.
    """
    if expected.size % channels:
        return None
    values = np.concatenate([value.reshape(-1, channels) for _, value in start])
    wanted = expected.reshape(-1, channels)
    if len(wanted) < len(values) + spare or values.size * len(wanted) > MOST_ELEMENTS:
        return None

    def unpacked(values: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum([value.size // channels for _, value in start])[:-1]
        return [part.reshape(value.shape) for part, (_, value) in zip(np.split(values, ends), start, strict=True)]

    def outputs(values: np.ndarray) -> np.ndarray:
        return run([(variable, value) for (variable, _), value in zip(start, unpacked(values), strict=True)]).reshape(wanted.shape)

    def errors(found: np.ndarray) -> np.ndarray:
        return np.linalg.norm(found - wanted, axis=0)

    found, move = outputs(values), 1e-4
    for _ in range(20):
        slopes = np.stack([(outputs(values + move * row[:, np.newaxis]) - found) / move for row in np.eye(len(values))], axis=-1)
        steps = np.stack([np.linalg.lstsq(slopes[:, part], (wanted - found)[:, part], rcond=1e-9)[0] for part in range(channels)], axis=1)
        share, before = np.ones(channels), errors(found)
        for _ in range(6):
            better = errors(outputs(values + share * steps)) < before
            if better.all():
                break
            share = np.where(better, share, share / 2)
        share = np.where(errors(outputs(values + share * steps)) < before, share, 0.0)
        values, last = values + share * steps, relative_error(found, wanted)
        found = outputs(values)
        if not relative_error(found, wanted) < 0.95 * last:
            break
    return unpacked(values), relative_error(found, wanted)


def _fit(variables: Values, trial: Trial, channels: int, spare: int = SPARE) -> list[np.ndarray] | None:
    """Values of variables with which everything that is off is right; None: there are none, or it cannot be known."""

    def run(values: Values) -> np.ndarray:
        with assigned(values):
            return trial.outputs()

    found = solved(run, variables, trial.expected, channels, spare)
    return found[0] if found is not None and found[1] <= trial.floor else None


def _constant(variables: Mapping[str, Any], trial: Trial, tried: Callable[[Values], float]) -> Iterator[Hypothesis]:
    """Variables of which all elements are 0, or 1, as where nothing was loaded: another value must fit."""
    owners: dict[str, dict[str, Any]] = {}
    for name, variable in variables.items():
        value = variable.numpy()
        if value.size > 1 and value.flat[0] in (0, 1) and (value == value.flat[0]).all():
            where, _, last = name.rpartition(".")
            owners.setdefault(where, {})[last] = variable
    for where, ours in owners.items():
        start = [(variable, variable.numpy()) for variable in ours.values()]
        channels = 1 if any(last.startswith("in_proj") for last in ours) else start[0][1].shape[-1]

        def after(start: Values = start, channels: int = channels) -> float:
            fit = _fit(start, trial, channels)
            return math.inf if fit is None else tried([(variable, value) for (variable, _), value in zip(start, fit, strict=True)])

        words = " and ".join(f"{last} is {value.flat[0]:g} everywhere" for last, (_, value) in zip(ours, start, strict=True))
        cause = "bias" if all("bias" in last for last in ours) else "stale weight"
        yield Hypothesis(cause, where, f"{words}, as where nothing was loaded", "what fits in its place", after)


UNRELATED = 0.3
"""Correlation below which two weights have nothing to do with one another: of 64 independent numbers it is above in 1 of 60 cases."""


def _unrelated(variables: Mapping[str, Any], trial: Trial, tried: Callable[[Values], float]) -> Iterator[Hypothesis]:
    """A weight that has nothing to do with the one that fits: never loaded, of another model, or with its slices in any order."""
    for name, variable in variables.items():
        where, _, last = name.rpartition(".")
        value = variable.numpy()
        if value.ndim < 2 or value.size < 64 or last.startswith("in_proj"):
            continue
        known = (fit := _fit([(variable, value)], trial, value.shape[-1])) is not None
        if fit is None and _is_initial(value):
            fit = _fit([(variable, value)], trial, value.shape[-1], -value.size)
        if fit is None:
            continue
        [official] = fit
        for axis in range(value.ndim) if known else ():
            for order in _permuted(where, value, official, axis):
                yield dataclasses.replace(order, words=f"{last}'s {order.words}")
        correlation = float(np.corrcoef(value.ravel(), official.ravel())[0, 1])
        if abs(correlation) > UNRELATED:
            continue
        words = f"{last} has nothing to do with what fits (correlation {correlation:.2f})"
        if known:
            after = functools.partial(tried, [(variable, official)])
            yield Hypothesis("stale weight", where, f"{words}: never loaded, or of another model", "what fits in its place", after)
        else:
            words += ", and is spread evenly within ±1 / √(fan in), as PyTorch's initial values are: it was never loaded"
            yield Hypothesis("stale weight", where, words, "", lambda: 0.0)


def _is_initial(value: np.ndarray) -> bool:
    """Whether a weight is as PyTorch makes those of linear layers and convolutions: uniform in ±1 / √(fan in)."""
    bound = (value.size / value.shape[-1]) ** -0.5
    return 0.98 < np.abs(value).max() / bound <= 1 and abs(value.std() * math.sqrt(3) / bound - 1) < 0.05


# Of a module's attributes.

EPS = (1e-5, 1e-3, 1e-6, 1e-12, 1e-8)

_CAUSE_OF_ATTRIBUTE = {
    "eps": "eps",
    "shift": "shift",
    "head": "head split order",
    "group": "normaliser",
    "bias": "bias",
    "pad": "padding",
    "stride": "stride",
    "dilation": "dilation",
    "momentum": "momentum",
    "mask": "mask missing",
    "threshold": "threshold",
}


def of_attributes(module: Module, trial: Trial, called: Collection[str]) -> Iterator[Hypothesis]:
    """Numbers and switches a module, or one inside it that is never called, has as attributes: changed to what is usual elsewhere."""
    for owner in _holders(module, called):
        where = owner.official_name
        for name, value in settings(owner):
            cause = next((cause for part, cause in _CAUSE_OF_ATTRIBUTE.items() if part in name), "scale")
            for other in _others(name, value):

                def after(owner: Any = owner, name: str = name, other: Any = other) -> float:
                    with attribute(owner, name, other):
                        try:
                            return trial.confirm()
                        except Exception:  # code that never met such a number may raise anything
                            return math.inf

                yield Hypothesis(cause, where, f"{name} is {value!r}", f"{other!r} instead", after)


def settings(module: Module) -> list[tuple[str, Any]]:
    """Numbers and switches that a module has as attributes."""
    from tfmaskformer.module import Module

    common = vars(Module())
    return [
        (name, value)
        for name, value in vars(module).items()
        if name not in common and not name.startswith("_") and isinstance(value, bool | int | float)
    ]


def _others(name: str, value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if "eps" in name:
        return [eps for eps in EPS if eps != value]
    if isinstance(value, int):
        return [
            other
            for other in dict.fromkeys((1, 2, value // 2, 2 * value, value + 1, value - 1, 0, 4, 8, 32))
            if other != value and other >= 0
        ]
    return [value * factor for factor in (2.0, 0.5, -1.0)] + [1.0, 0.0, value**2, math.sqrt(abs(value))]


# Of what came out, whatever made it.


def of_outputs(where: str, actual: np.ndarray, expected: np.ndarray, what: str = "what comes out") -> Iterator[Hypothesis]:
    """What may have been done to a tensor, which is undone: a rearrangement, a factor, a constant for each channel, a rounding.

    Args:
        where: what the tensor is of.
        actual, expected: of one shape.
        what: what it is, for the sentence.
    """
    if actual.shape != expected.shape or actual.dtype.kind not in "fiu" or not np.isfinite(actual).all():
        return
    ours, theirs = actual.astype(np.float64), expected.astype(np.float64)
    for change in rearrangements(ours.shape):
        if change.cause not in ("head split order", "q/k/v permutation") and not change.words.startswith("turned"):
            yield Hypothesis(
                _cause(change.cause, where, change.axis == ours.ndim - 1),
                where,
                f"{what} is {change.words}",
                change.undone,
                functools.partial(_off, change.undo, ours, theirs),
            )
    for axis, length in enumerate(ours.shape):
        if 1 < length <= 4096:
            yield from _permuted(where, ours, theirs, axis)
    power = float(np.vdot(theirs, theirs))
    factor = float(np.vdot(ours, theirs)) / power if power else 0.0
    if factor and ours.size > 1:
        yield Hypothesis(
            "scale",
            where,
            f"{what} is {factor_name(factor)} times the official",
            "the factor undone",
            lambda: relative_error(ours / factor, theirs),
        )
    if ours.ndim > 1:
        offset = (ours - theirs).reshape(-1, ours.shape[-1]).mean(0)
        yield Hypothesis(
            "bias", where, "a constant is added to each channel", "it taken away", lambda: relative_error(ours - offset, theirs)
        )
    if ours.size > 1:
        whole = float((ours - theirs).mean())
        yield Hypothesis(
            "bias", where, f"{whole:.6g} is added to every element", "it taken away", lambda: relative_error(ours - whole, theirs)
        )
    for name, rounded in ROUNDINGS.items():
        yield Hypothesis(
            "dtype rounding",
            where,
            f"{what} is rounded to {name}",
            "the official one rounded alike",
            functools.partial(_off, rounded, theirs, ours),
        )
    yield from _made_of(where, what, ours, theirs, relative_error(ours, theirs))


RESOLUTIONS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Number format → its largest relative rounding error."""

LEAST_ELEMENTS = 16
"""Different ones; fewer could all be short numbers by chance."""


def _made_of(where: str, what: str, actual: np.ndarray, expected: np.ndarray | None, error: float) -> Iterator[Hypothesis]:
    """Numbers that are all of a shorter format, with an error of its size. What was rounded away cannot be brought back."""
    if np.unique(actual).size < LEAST_ELEMENTS:
        return
    for name, resolution in RESOLUTIONS.items():
        shorter = ROUNDINGS[name]
        if name == "float32" and expected is None:
            continue  # what checkpoints hold
        by_itself = expected is not None and np.mean(shorter(expected) == expected) > 0.5
        if np.array_equal(shorter(actual), actual) and not by_itself and resolution / 64 <= error <= 8 * resolution:
            words = f"all {actual.size} elements of {what} are {name} numbers, and the error, {error:.1e}, is of the size of their rounding"
            yield Hypothesis("dtype rounding", where, words, "", lambda: 0.0)
            return


def _off(change: Callable[[np.ndarray], np.ndarray], values: np.ndarray, expected: np.ndarray) -> float:
    return relative_error(change(values), expected)


def _permuted(where: str, actual: np.ndarray, expected: np.ndarray, axis: int) -> Iterator[Hypothesis]:
    """The slices along one axis in any other order; each is found again by a random sum of it."""
    ours, theirs = (np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1) for values in (actual, expected))
    weights = np.random.default_rng(0).standard_normal(ours.shape[1])
    orders = [np.argsort(values @ weights, kind="stable") for values in (ours, theirs)]
    order = np.empty(len(ours), int)
    order[orders[1]] = orders[0]  # slice i of the official one is slice order[i] of ours
    moved = np.flatnonzero(order != np.arange(len(order)))
    if not len(moved):
        return
    words = (
        f"{moved[0]} and {moved[1]} exchanged"
        if len(moved) == 2
        else f"in another order: {', '.join(map(str, order[:8]))}{' …' * (len(order) > 8)}"
    )
    yield Hypothesis(
        _cause("axis order", where, axis == actual.ndim - 1),
        where,
        f"slices along axis {axis}: {words}",
        "the order restored",
        lambda: relative_error(ours[order], theirs),
    )


def of_missing_norm(where: str, actual: np.ndarray, expected: np.ndarray) -> Iterator[Hypothesis]:
    """A norm that is never called, as far as that can be known without its weights: a scale and a shift of each channel are fitted.

    Args:
        where: the norm.
        actual, expected: what comes out where it should have, ``[..., channels]``.
    """
    if actual.shape != expected.shape or actual.size < 8 * actual.shape[-1]:
        return
    norms: dict[str, Callable[[np.ndarray], np.ndarray]] = {"a batch norm": lambda values: values}
    for kind, axes in (("a layer norm", (-1,)), ("an instance norm", tuple(range(1, actual.ndim - 1)))):
        norms |= {f"{kind} with eps {eps:g}": functools.partial(_normed, axes=axes, eps=eps) for eps in EPS}
    for name, inner in norms.items():
        yield Hypothesis(
            "missing term", where, "is left out", f"{name} in its place", functools.partial(_off_affine, inner, actual, expected)
        )


def _normed(values: np.ndarray, axes: tuple[int, ...], eps: float) -> np.ndarray:
    return (values - values.mean(axes, keepdims=True)) / np.sqrt(values.var(axes, keepdims=True) + eps)


def _off_affine(inner: Callable[[np.ndarray], np.ndarray], actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative error that the best scale and shift of each channel leave."""
    ours, theirs = (values.reshape(-1, values.shape[-1]) for values in (inner(actual), expected))
    centred = ours - ours.mean(0)
    slope = (centred * theirs).sum(0) / np.maximum((centred**2).sum(0), np.finfo(float).tiny)
    return relative_error(centred * slope + theirs.mean(0), theirs)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float32": lambda values: values.astype(np.float32).astype(np.float64),
    "bfloat16": _bfloat16,
    "float16": lambda values: values.astype(np.float16).astype(np.float64),
    "uint8": lambda values: np.clip(np.rint(values), 0, 255),
    "whole numbers": lambda values: np.floor(values),
}
