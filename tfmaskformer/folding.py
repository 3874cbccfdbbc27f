"""Frozen batch norms folded into the convolutions in front of them: one kernel and one bias in place of five tensors.

``y = conv(x, w) · s + b`` with ``s = weight / sqrt(running_var + eps)`` and ``b = bias − running_mean · s`` is ``conv(x, w · s) + b``. The
network computes it in this order anyway (:class:`~tfmaskformer.layers.Conv2d`); folded, the products are taken once, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.layers import EPSILON, Conv2d, FrozenBatchNorm2d
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_modules, named_variables, record_taps


class FoldingError(ValueError):
    """The model has no frozen batch norm."""


@keras.saving.register_keras_serializable("tfmaskformer")
class FoldedMaskFormer(MaskFormer):
    """A MaskFormer whose backbone has convolutions with a bias and without a norm. The names of all others are the official ones.

    Raises:
        FoldingError: the architecture has no frozen batch norm.
    """

    def __init__(self, config: MaskFormerConfig, dtype: str = "float32"):
        super().__init__(config, dtype)
        convolutions = list(_with_frozen_norm(self))
        if not convolutions:
            raise FoldingError(f"{config.name} has no frozen batch norm to fold: its backbone is a Swin Transformer, with layer norms")
        for _, convolution in convolutions:
            convolution.declare("bias", convolution._declared["weight"].shape[-1:])
            convolution.use_bias, convolution.norm = True, None


def fold(model: MaskFormer) -> FoldedMaskFormer:
    """The same model with its frozen batch norms folded; products in float64, rounded to the dtype of the variables.

    Raises:
        FoldingError: it has none.
    """
    folded = FoldedMaskFormer(model.config, model.dtype_policy.name)
    values: dict[str, Any] = {name: variable.numpy() for name, variable in named_variables(model).items()}
    for path, _ in _with_frozen_norm(model):
        weight, bias, mean, variance = (
            values[f"{path}.norm.{name}"].astype(np.float64) for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + EPSILON)
        values[f"{path}.weight"] = values[f"{path}.weight"] * scale
        values[f"{path}.bias"] = bias - mean * scale
    folded.build_parameters(values.__getitem__)
    return folded


def folding_errors(original: MaskFormer, exact: MaskFormer, image: np.ndarray) -> dict[str, Any]:
    """How far the folded model is from the original one on an image.

    Args:
        original: in the dtype in which it is asked for.
        exact: the same in float64.
        image: uint8 [height, width, 3] RGB.

    Returns:
        ``"outputs"``: name → relative L2 error, and ``"worst_tap"``: the name and error of the tap that is farthest off, of the folded
        model; ``"unfolded"``: the same of the original one. All against ``exact``.
    """
    _, expected = _run(exact, image)
    return {**_errors(fold(original), expected, image), "unfolded": _errors(original, expected, image)}


def _errors(model: MaskFormer, expected: dict[str, np.ndarray], image: np.ndarray) -> dict[str, Any]:
    outputs, found = _run(model, image)
    errors = {name: relative_error(tensor, expected[name]) for name, tensor in found.items()}
    worst = max((name for name in errors if "#" in name and not name.startswith("images#")), key=errors.__getitem__)
    return {"outputs": {name: errors[name] for name in outputs}, "worst_tap": {"name": worst, "error": errors[worst]}}


def _run(model: MaskFormer, image: np.ndarray) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of the outputs; taps and outputs by name."""
    with record_taps() as taps:
        outputs = model(image[np.newaxis])
    names = [name for name in ("pred_logits", "pred_masks", "sem_seg") if name in outputs]
    floats = {name: tensor for name, tensor in taps.items() if tensor.dtype.is_floating}
    return names, {name: tensor.numpy() for name, tensor in (floats | {name: outputs[name] for name in names}).items()}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64; 0 where both are 0."""
    difference = float(np.linalg.norm(actual.astype(np.float64).ravel() - expected.astype(np.float64).ravel()))
    return difference and difference / float(np.linalg.norm(expected.astype(np.float64).ravel()))


def _with_frozen_norm(model: MaskFormer) -> Iterator[tuple[str, Conv2d]]:
    for path, module in named_modules(model):
        if isinstance(module, Conv2d) and isinstance(module.norm, FrozenBatchNorm2d):
            yield path, module
