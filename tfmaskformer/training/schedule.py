"""The official learning rates at every iteration, in float64, compiled with the step.

The operations and their order are those of the official code (Detectron2 ``solver/lr_scheduler.py``, ``projects/DeepLab``, and fvcore's
``param_scheduler.py``): eagerly the numbers are the same to the last bit. Compilers turn divisions by a constant into products, which is
an error of 2e-16 of the base learning rate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from tfmaskformer.training.recipe import Recipe

WHERE_EPSILON = 1e-6
"""Added by fvcore to the share of the training that is over: beyond a million iterations, milestones come an iteration early."""


def build_lr_scheduler(recipe: Recipe) -> keras.optimizers.schedules.LearningRateSchedule:
    """The schedule of a recipe, named as upstream's."""
    if recipe.lr_scheduler_name == "WarmupPolyLR":
        return WarmupPolyLR.of(recipe)
    return WarmupMultiStepLR.of(recipe)


class _Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Iteration (0 for the first step; a scalar of any number type) → learning rate, float64. Beyond ``max_iter``: as there."""

    max_iter: int

    @classmethod
    def of(cls, recipe: Recipe) -> _Schedule:
        """With the values of a recipe."""
        return cls(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(cls)})

    def get_config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __call__(self, step: Any) -> tf.Tensor:
        return self._learning_rate(tf.minimum(tf.cast(step, tf.float64), self.max_iter))

    def _learning_rate(self, iteration: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError


@keras.saving.register_keras_serializable("tfmaskformer")
@dataclasses.dataclass(frozen=True)
class WarmupMultiStepLR(_Schedule):
    """``base_lr · gamma^k`` from the k-th milestone on; before, a warm-up that leads from ``warmup_factor`` to the value at its end."""

    base_lr: float
    max_iter: int
    milestones: tuple[int, ...]
    gamma: float
    warmup_factor: float
    warmup_iters: int
    warmup_method: str

    def _learning_rate(self, iteration: tf.Tensor) -> tf.Tensor:
        where = iteration / self.max_iter
        value = self._multiplier(where)
        if self.warmup_iters > 0:
            length = min(self.warmup_iters / self.max_iter, 1.0)
            warming = tf.constant(self.warmup_factor, tf.float64)
            if self.warmup_method == "linear":
                share = where / length
                warming = self._multiplier(length) * share + self.warmup_factor * (1 - share)
            value = tf.where(where + WHERE_EPSILON > length, value, warming)
        return self.base_lr * value

    def _multiplier(self, where: Any) -> tf.Tensor:
        passed = (where + WHERE_EPSILON) * self.max_iter >= tf.constant(self.milestones, tf.float64)
        values = tf.constant([self.gamma**k for k in range(len(self.milestones) + 1)], tf.float64)
        return tf.gather(values, tf.reduce_sum(tf.cast(passed, tf.int32)))


@keras.saving.register_keras_serializable("tfmaskformer")
@dataclasses.dataclass(frozen=True)
class WarmupPolyLR(_Schedule):
    """``base_lr · (1 − iteration / max_iter)^power``, times the warm-up; never below a share of ``poly_lr_constant_ending``."""

    base_lr: float
    max_iter: int
    poly_lr_power: float
    poly_lr_constant_ending: float
    warmup_factor: float
    warmup_iters: int
    warmup_method: str

    def _learning_rate(self, iteration: tf.Tensor) -> tf.Tensor:
        warmup = tf.ones([], tf.float64)
        if self.warmup_iters > 0:
            warming = tf.constant(self.warmup_factor, tf.float64)
            if self.warmup_method == "linear":
                alpha = iteration / self.warmup_iters
                warming = self.warmup_factor * (1 - alpha) + alpha
            warmup = tf.where(iteration >= self.warmup_iters, warmup, warming)
        share = tf.pow(1 - iteration / self.max_iter, self.poly_lr_power)
        value = self.base_lr * warmup * share
        if self.poly_lr_constant_ending > 0:
            ending = tf.constant(self.base_lr * self.poly_lr_constant_ending, tf.float64)
            value = tf.where((warmup == 1) & (share < self.poly_lr_constant_ending), ending, value)
        return value
