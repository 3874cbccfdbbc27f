"""Functions compiled for one run, which leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
        before = set(_gradients())
        try:
            return traced(*arguments)
        finally:
            registered.update(_gradients().keys() - before)

    try:
        yield call
    finally:
        for name in registered:
            _gradients().pop(name, None)


def _gradients() -> dict[str, Any]:
    """TensorFlow's registry of gradients; it has no public way to remove one. Empty where a TensorFlow keeps it elsewhere."""
    from tensorflow.python.framework import ops

    return getattr(getattr(ops, "gradient_registry", None), "_registry", {})
