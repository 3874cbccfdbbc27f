"""The tree that everything hangs on: modules with official names, declared parameters and taps.

Every layer of the model is a :class:`Module`. Its attributes carry the names of the official PyTorch modules, so the path of a
module or of a variable in this tree *is* its official name (``backbone.res2.0.conv1.weight``). That one naming serves the
weight tables, the TensorFlow checkpoint's keys, taps, gradients, reports and error messages.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """What a variable is before it exists: shape in TensorFlow's layout, and whether it is trained (False: a buffer)."""

    shape: tuple[int, ...]
    trainable: bool
    initializer: str | keras.initializers.Initializer | Callable[..., tf.Tensor]


_PLAIN = frozenset({bool, float, int, str, type(None)})


class Module(keras.layers.Layer):
    """A Keras layer that declares its parameters before it creates them, and whose output can be tapped.

    A subclass calls :meth:`declare` in ``__init__`` and reads ``self.<name>`` in ``call``. Nothing is allocated until
    :func:`build_parameters` runs on the root, so the whole tree of names and shapes is there at no cost.
    """

    built: bool
    is_block = False
    """Whether it is one of the many blocks of which a network consists; see :func:`wrap_blocks`."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._declared: dict[str, ParameterSpec] = {}
        self.official_name = ""  # the path from the root, once assign_official_names() has run

    def __setattr__(self, name: str, value: Any) -> None:
        """Of a plain value there is nothing to track; to find that out takes Keras and TensorFlow half the time of making a model."""
        if type(value) in _PLAIN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def declare(
        self,
        name: str,
        shape: Sequence[int],
        *,
        trainable: bool = True,
        initializer: str | keras.initializers.Initializer = "zeros",
    ) -> None:
        """Announces a variable ``self.<name>`` of ``shape`` (TensorFlow's layout) in the policy's variable dtype."""
        self._declared[name] = ParameterSpec(tuple(shape), trainable, initializer)

    def build(self, input_shape: Any = None) -> None:
        """Creates the declared variables, at their initial values. Whoever computes casts them: Keras does not."""
        if self.built:
            return
        for name, spec in self._declared.items():
            variable = self.add_weight(spec.shape, spec.initializer, trainable=spec.trainable, autocast=False, name=name)
            setattr(self, name, variable)
        self.built = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__
        if self.is_block and _wrappers:
            call = _wrappers[-1](call)
        return tap(self.official_name, call(*args, **kwargs))


class ModuleSequence(Module):
    """Official ``nn.ModuleList`` and ``nn.Sequential``: children are attributes named ``"0"``, ``"1"``, …

    Attributes instead of a Python list, because ``tf.train.Checkpoint`` leaves layers in lists out silently.
    """

    def __init__(self, modules: Sequence[Module], **kwargs: Any):
        super().__init__(**kwargs)
        for index, module in enumerate(modules):
            setattr(self, str(index), module)
        self._length = len(modules)

    def __iter__(self) -> Iterator[Module]:
        return (getattr(self, str(index)) for index in range(self._length))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Module:
        return getattr(self, str(range(self._length)[index]))


class Identity(Module):
    """An official module that passes its input on (``nn.Sequential()`` with no children)."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return inputs


def _children(module: keras.layers.Layer) -> Iterator[tuple[str, Module]]:
    return ((name, value) for name, value in vars(module).items() if isinstance(value, Module))


def named_modules(root: keras.layers.Layer, prefix: str = "") -> Iterator[tuple[str, Module]]:
    """All modules below ``root`` with their official names, depth first, in order of definition; the root itself is not named."""
    for name, child in _children(root):
        path = f"{prefix}.{name}" if prefix else name
        yield path, child
        yield from named_modules(child, path)


def parameter_specs(root: keras.layers.Layer) -> dict[str, ParameterSpec]:
    """Official name → :class:`ParameterSpec` of every variable below ``root``; needs no variable to exist."""
    return {f"{path}.{name}": spec for path, module in named_modules(root) for name, spec in module._declared.items()}


def named_variables(root: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Official name → variable, for a tree whose parameters are built."""
    return {f"{path}.{name}": getattr(module, name) for path, module in named_modules(root) for name in module._declared}


def assign_official_names(root: keras.layers.Layer) -> None:
    """Tells every module its path from ``root``, under which its output is tapped."""
    for path, module in named_modules(root):
        module.official_name = path


def build_parameters(root: keras.layers.Layer, value_of: Callable[[str], Any] | None = None) -> None:
    """Creates every declared variable below ``root``: at ``value_of(official name)``, or, where that is None, at its initial value."""
    for path, module in named_modules(root):
        for name, spec in module._declared.items():
            if value_of is not None and (value := value_of(f"{path}.{name}")) is not None:
                module._declared[name] = dataclasses.replace(spec, initializer=_constant(value))
        module.build()


def share_parameters(root: keras.layers.Layer, other: keras.layers.Layer) -> None:
    """Makes every declared variable below ``root`` the one of the same name below ``other``."""
    variables = named_variables(other)
    for path, module in named_modules(root):
        for name in module._declared:
            setattr(module, name, variables[f"{path}.{name}"])
        module.built = True


def _constant(value: Any) -> Callable[..., tf.Tensor]:
    return lambda shape, dtype=None: tf.cast(tf.ensure_shape(value, shape), dtype)


_wrappers: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = []


@contextlib.contextmanager
def wrap_blocks(wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, eagerly or while a ``tf.function`` is traced, each block's call is what ``wrapper`` makes of it."""
    _wrappers.append(wrapper)
    try:
        yield
    finally:
        _wrappers.pop()


Substitute: TypeAlias = Callable[[str, tf.Tensor], tf.Tensor]
"""Tap and what was computed → what the model goes on with, of the same shape."""


class Taps(dict[str, tf.Tensor]):
    """Recorded outputs in the order of the calls.

    Keys are ``<official name>#<call index>``, with ``[<item>]`` behind it where a module returns several tensors:
    ``sem_seg_head.predictor.transformer.decoder.norm#3``, ``backbone#0[res2]``.

    Attributes:
        calls: module → how often it has been called.
    """

    def __init__(self, substitute: Substitute | None = None) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self._substitute = substitute

    def add(self, name: str, outputs: Any) -> Any:
        """Records one call of module ``name`` and returns what its caller goes on with; dicts, lists and tuples are taken apart."""
        index = self.calls[name]
        self.calls[name] += 1
        return self._add(f"{name}#{index}", outputs)

    def _add(self, key: str, outputs: Any) -> Any:
        if isinstance(outputs, Mapping):
            return {item: self._add(f"{key}[{item}]", value) for item, value in outputs.items()}
        if isinstance(outputs, list | tuple):
            return type(outputs)(self._add(f"{key}[{item}]", value) for item, value in enumerate(outputs))
        if outputs is None:
            return None
        self[key] = outputs
        return outputs if self._substitute is None else self._substitute(key, outputs)


_recordings: list[Taps] = []


def recording() -> bool:
    """Whether taps are being recorded; modules then also compute what only a tap shows (attention weights)."""
    return bool(_recordings)


def tap(name: str, outputs: Any) -> Any:
    """Shows ``outputs`` to whoever records, and returns what to go on with; costs nothing otherwise. Modules do it by themselves."""
    return _recordings[-1].add(name, outputs) if _recordings else outputs


@contextlib.contextmanager
def record_taps(substitute: Substitute | None = None) -> Iterator[Taps]:
    """Records the output of every module called inside the block, eagerly or while a ``tf.function`` is traced.

    In a ``tf.function`` the tensors are symbolic: return ``dict(taps)`` from the function.

    Args:
        substitute: is given every tap once it is recorded, and returns what the model goes on with in its place.
    """
    taps = Taps(substitute)
    _recordings.append(taps)
    try:
        yield taps
    finally:
        _recordings.pop()
