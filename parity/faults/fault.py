"""What a fault is, and the few ways in which faults are made: an attribute, a variable or a function is another one while it lasts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeAlias
from unittest import mock

import numpy as np

from parity.hypotheses import CAUSES
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_modules, named_variables

KINDS = (
    "weights",
    "layers",
    "preprocessing",
    "matcher",
    "losses",
    "gradients",
    "optimizer",
    "post-processing",
    "metrics",
)

OTHER = ""
"""The cause of a fault for which the diagnosis has no word: a layer too many, another function. No finding can be right about it."""

Break: TypeAlias = Callable[[MaskFormer], AbstractContextManager[Any]]
"""Of a loaded model: a context in which TensorFlow's side is broken. Behind it everything is as before."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: unique; reads as what is wrong.
        kind: one of :data:`KINDS`.
        model: the test model (a key of ``parity.selftest.TRACES``) on which it shows, and ``case`` the case of its trace.
        group, where: what must be named: of "taps" the faulty module (or the first module whose inputs are made in the wrong way), of
            "gradients" the module whose output or parameters are the first on the way back to get a wrong gradient, of "preprocessing"
            and "metrics" what is read, resized or counted, of "steps" the first quantity of a training step that is wrong, else a name
            of the group.
        cause: one of :data:`parity.hypotheses.CAUSES`, or :data:`OTHER`.
        apply: makes it.
        padding: "official" or "masked".
        first: written long before there was a diagnosis.
    """

    name: str
    kind: str
    model: str
    case: str
    group: str
    where: str
    cause: str
    apply: Break
    padding: str = "official"
    first: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.cause not in (*CAUSES, OTHER):
            raise ValueError(f"fault '{self.name}': kind '{self.kind}' or cause '{self.cause}' is unknown")


def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Break:
    """``owner.name`` is ``make(what it was)``."""
    return lambda model: mock.patch.object(owner, name, make(getattr(owner, name)))


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Break:
    """The variable is ``change(its value)``."""

    @contextlib.contextmanager
    def broken(model: MaskFormer) -> Iterator[None]:
        variable = named_variables(model)[name]
        before = variable.numpy()
        variable.assign(change(before))
        try:
            yield
        finally:
            variable.assign(before)

    return broken


def attribute(path: str, name: str, value: Any) -> Break:
    """The attribute ``name`` of the module at ``path`` is ``value``."""
    return lambda model: _attribute(dict(named_modules(model))[path], name, value)


def each(kind: type, name: str, value: Callable[[Any], Any]) -> Break:
    """The attribute ``name`` of every module of a kind is ``value(module)``."""

    @contextlib.contextmanager
    def broken(model: MaskFormer) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for _, module in list(named_modules(model)):
                if isinstance(module, kind):
                    stack.enter_context(_attribute(module, name, value(module)))
            yield

    return broken


def configured(**changes: Any) -> Break:
    """The model's config has other values; a dict changes the fields of one of its parts."""

    def broken(model: MaskFormer) -> AbstractContextManager[None]:
        config = model.config
        new = {
            name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        return _attribute(model, "config", dataclasses.replace(config, **new))

    return broken


def together(*breaks: Break) -> Break:
    """All of them."""

    @contextlib.contextmanager
    def broken(model: MaskFormer) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in breaks:
                stack.enter_context(one(model))
            yield

    return broken


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Past Keras, which tracks what is set and would keep what was."""
    attributes = vars(owner)
    before = attributes[name]
    attributes[name] = value
    try:
        yield
    finally:
        attributes[name] = before


PANOPTIC, SEMANTIC, DEEPLAB, SWIN = "tiny_panoptic", "tiny_semantic", "tiny_deeplab", "tiny_swin"
PER_PIXEL, PER_PIXEL_PLUS, SILENT = "tiny_per_pixel", "tiny_per_pixel_plus", "tiny_panoptic_9"

PIXEL = "sem_seg_head.pixel_decoder"
PREDICTOR = "sem_seg_head.predictor"
ENCODER = f"{PIXEL}.transformer.encoder"
DECODER = f"{PREDICTOR}.transformer.decoder"
