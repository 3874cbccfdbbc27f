"""What an official YAML config says of optimisation: the section ``SOLVER``, as plain data.

Every key of it is a field of :class:`Recipe`, has one value that is supported (:data:`SUPPORTED`; any other is refused by name), or is
not read by the official ``Trainer`` whatever its value (:data:`UNREAD`).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import Any

from tfmaskformer.config import ConfigError
from tfmaskformer.official_yaml import Tree, read_tree

OPTIMIZERS = ("ADAMW", "SGD")
SCHEDULES = ("WarmupMultiStepLR", "WarmupPolyLR")
WARMUP_METHODS = ("linear", "constant")

SUPPORTED: dict[str, Any] = {
    "AMP.ENABLED": False,  # float16 with loss scaling
    "REFERENCE_WORLD_SIZE": 0,  # scaling batch, learning rate and length with the number of workers
    "RESCALE_INTERVAL": False,  # milestones that count from the end of the warm-up
}
"""Key of SOLVER → the value that all official recipes have, and the only one supported."""

UNREAD = (
    "BASE_LR_END",  # of the cosine schedule
    "BIAS_LR_FACTOR",  # of Detectron2's own build_optimizer, in whose place the Trainer has another
    "CLIP_GRADIENTS.NORM_TYPE",  # full-model clipping takes the 2-norm
    "NESTEROV",  # the Trainer does not hand it on
    "NUM_DECAYS",  # of the schedule with a fixed gamma
    "WEIGHT_DECAY_BIAS",  # see BIAS_LR_FACTOR: biases decay like weights
)
"""Keys of SOLVER that the official ``Trainer`` does not read with the optimizers and schedules supported here."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is optimised; names and defaults are those of ``SOLVER`` in the official code."""

    optimizer: str = "ADAMW"  # OPTIMIZER
    momentum: float = 0.9  # MOMENTUM, of SGD
    base_lr: float = 0.001  # BASE_LR
    backbone_multiplier: float = 0.1  # BACKBONE_MULTIPLIER: of the learning rate
    weight_decay: float = 0.0001  # WEIGHT_DECAY
    weight_decay_norm: float = 0.0  # WEIGHT_DECAY_NORM
    weight_decay_embed: float = 0.0  # WEIGHT_DECAY_EMBED
    clip_norm: float = 0.0  # CLIP_GRADIENTS.CLIP_VALUE of CLIP_TYPE "full_model"; 0: the gradient is not clipped
    lr_scheduler_name: str = "WarmupMultiStepLR"  # LR_SCHEDULER_NAME
    steps: tuple[int, ...] = (30000,)  # STEPS: where the learning rate is multiplied by gamma; those beyond max_iter do not count
    gamma: float = 0.1  # GAMMA
    poly_lr_power: float = 0.9  # POLY_LR_POWER
    poly_lr_constant_ending: float = 0.0  # POLY_LR_CONSTANT_ENDING: share of base_lr below which the learning rate stays
    warmup_factor: float = 0.001  # WARMUP_FACTOR
    warmup_iters: int = 1000  # WARMUP_ITERS
    warmup_method: str = "linear"  # WARMUP_METHOD
    max_iter: int = 40000  # MAX_ITER
    ims_per_batch: int = 16  # IMS_PER_BATCH: images of one step on all replicas
    checkpoint_period: int = 5000  # CHECKPOINT_PERIOD, iterations

    def __post_init__(self) -> None:
        for field, allowed in (("optimizer", OPTIMIZERS), ("lr_scheduler_name", SCHEDULES), ("warmup_method", WARMUP_METHODS)):
            self._require(field, getattr(self, field) in allowed, f"one of {allowed}")
        for field in ("base_lr", "gamma", "max_iter", "ims_per_batch", "checkpoint_period"):
            self._require(field, getattr(self, field) > 0, "a positive number")
        for field in ("momentum", "backbone_multiplier", "weight_decay", "weight_decay_norm", "weight_decay_embed", "clip_norm"):
            self._require(field, getattr(self, field) >= 0, "0 or more")
        for field in ("poly_lr_power", "poly_lr_constant_ending", "warmup_factor", "warmup_iters"):
            self._require(field, getattr(self, field) >= 0, "0 or more")
        marks = (0, *self.milestones, self.max_iter)
        ascending = self.lr_scheduler_name != "WarmupMultiStepLR" or all(one < other for one, other in itertools.pairwise(marks))
        self._require("steps", ascending, f"ascending numbers above 0, none of them max_iter ({self.max_iter})")

    def _require(self, field: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ConfigError(f"recipe: 'SOLVER.{field.upper()}' is {getattr(self, field)!r}, expected {expected}")

    @property
    def milestones(self) -> tuple[int, ...]:
        """The ``steps`` that count."""
        return tuple(step for step in self.steps if step <= self.max_iter)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe of an official YAML file.

    Raises:
        ConfigError: the file cannot be read (:func:`~tfmaskformer.official_yaml.read_tree`), or has a value that is not supported.
    """
    tree = read_tree(path)
    try:
        return recipe_of(tree)
    except ConfigError as error:
        raise ConfigError(f"config '{path}': {str(error).removeprefix('recipe: ')}") from None


def recipe_of(tree: Tree) -> Recipe:
    """The recipe of a whole config (:func:`~tfmaskformer.official_yaml.read_tree`).

    Raises:
        ConfigError: a key of ``SOLVER`` has a value that is not supported, or that no recipe can have.
    """
    solver = tree["SOLVER"]
    clip = solver["CLIP_GRADIENTS"]
    values = dict(solver) | {f"AMP.{key}": value for key, value in solver["AMP"].items()}
    problems = [
        f"'SOLVER.{key}' is {values[key]!r}, supported: {supported!r}" for key, supported in SUPPORTED.items() if values[key] != supported
    ]
    if clip["ENABLED"] and clip["CLIP_TYPE"] != "full_model":
        problems.append(f"'SOLVER.CLIP_GRADIENTS.CLIP_TYPE' is {clip['CLIP_TYPE']!r}, supported: 'full_model', or ENABLED False")
    if problems:
        raise ConfigError("recipe: " + "\n  ".join(problems))
    fields = [field.name for field in dataclasses.fields(Recipe) if field.name != "clip_norm"]
    clip_norm = max(clip["CLIP_VALUE"], 0.0) if clip["ENABLED"] else 0.0
    return Recipe(clip_norm=clip_norm, **{field: solver[field.upper()] for field in fields})
