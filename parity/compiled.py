"""Functions compiled for one run, which leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def compiled(function: Callable[..., Any], mode: str) -> Iterator[Callable[..., Any]]:
    """A function as a mode runs it, and inside alone.

    TensorFlow registers each ``tf.custom_gradient`` that it traces under a name of its own and never forgets it, and with it the graph
    of the whole function: 50 MB for a step of a small model. What the calls registered is forgotten at the end.

    Args:
        function: takes and returns tensors.
        mode: "graph" or "xla"; "eager" gives the function itself.
    """
    import tensorflow as tf

    if mode == "eager":
        yield function
        return
    traced = tf.function(function, jit_compile=mode == "xla", autograph=False)
    registered: set[str] = set()

    def call(*arguments: Any) -> Any:
        before = traced_gradients()
        try:
            return traced(*arguments)
        finally:
            registered.update(traced_gradients() - before)

    try:
        yield call
    finally:
        forget_gradients(registered)


def traced_gradients() -> set[str]:
    """Names under which TensorFlow has registered what it traced of ``tf.custom_gradient``."""
    return {name for name in _registry() if name.startswith("CustomGradient-")}


def forget_gradients(names: Iterable[str]) -> None:
    """Lets the graphs go that are registered under these names; TensorFlow can no longer make gradients of them."""
    for name in names:
        _registry().pop(name, None)


def _registry() -> dict[str, Any]:
    """TensorFlow has no public way to remove a gradient. Empty where a TensorFlow keeps them elsewhere."""
    from tensorflow.python.framework import ops

    return getattr(getattr(ops, "gradient_registry", None), "_registry", {})
