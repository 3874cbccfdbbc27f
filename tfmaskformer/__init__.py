"""MaskFormer in TensorFlow, with the official weights.

The names below are the public interface; they are imported when they are first used, so that ``import tfmaskformer`` is cheap and
command lines answer ``--help`` without TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfmaskformer.checkpoint import CheckpointError, load
    from tfmaskformer.config import ConfigError, MaskFormerConfig
    from tfmaskformer.criterion import SetCriterion
    from tfmaskformer.inference import panoptic_inference, semantic_inference
    from tfmaskformer.matcher import HungarianMatcher
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import record_taps
    from tfmaskformer.per_pixel_criterion import PerPixelCriterion

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": "checkpoint",
    "ConfigError": "config",
    "HungarianMatcher": "matcher",
    "MaskFormer": "model",
    "MaskFormerConfig": "config",
    "PerPixelCriterion": "per_pixel_criterion",
    "SetCriterion": "criterion",
    "load": "checkpoint",
    "panoptic_inference": "inference",
    "record_taps": "module",
    "semantic_inference": "inference",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "HungarianMatcher",
    "MaskFormer",
    "MaskFormerConfig",
    "PerPixelCriterion",
    "SetCriterion",
    "__version__",
    "load",
    "panoptic_inference",
    "record_taps",
    "semantic_inference",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"tfmaskformer.{_HOMES[name]}"), name)
