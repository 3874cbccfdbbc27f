"""Clipping, parameter groups, AdamW and learning rates. Each is invisible in one forward and backward pass."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from parity.faults.fault import PANOPTIC, SWIN, Fault, replaced
from tfmaskformer.training import optimizer, schedule
from tfmaskformer.training.optimizer import AdamW, TorchOptimizer


def clipped_by(clip):
    """``clip(gradient, clip_norm)`` for each variable apart."""

    def make(right):
        def all_reduce(self, grads_and_vars):
            pairs = keras.optimizers.Optimizer._all_reduce_sum_gradients(self, grads_and_vars)
            self.gradient_norm.assign(optimizer.global_norm([gradient for gradient, _ in pairs]))
            return [(clip(gradient, self.clip_norm), variable) for gradient, variable in pairs]

        return all_reduce

    return replaced(TorchOptimizer, "_all_reduce_sum_gradients", make)


def by_its_own_norm(gradient, clip_norm):
    return gradient * optimizer.clip_coefficient(optimizer.global_norm([gradient]), clip_norm)


def by_value(gradient, clip_norm):
    return tf.clip_by_value(gradient, -clip_norm, clip_norm)


def decays_like_a_weight(kind):
    return replaced(optimizer, "_kind", lambda right: lambda module, name: "weight" if (found := right(module, name)) == kind else found)


def recipe(**changes):
    """The parameters of another recipe."""
    return replaced(optimizer, "parameters", lambda right: lambda root, recipe: right(root, dataclasses.replace(recipe, **changes)))


def started_with(**values):
    """Other arguments for AdamW."""

    def make(right):
        def init(self, *arguments, **options):
            right(self, *arguments, **(options | values))

        return init

    return replaced(AdamW, "__init__", make)


def epsilon_hat(right):
    """As Keras: eps 1e-7, added to a root that is not corrected yet."""

    def update(self, parameter, variable, gradient, lr, correction1, correction2_root):
        first, second = (self.slot(slot, parameter.name).value for slot in self.slots)
        beta1, beta2 = self.betas
        first.assign(first + (1 - beta1) * (gradient - first))
        second.assign(second * beta2 + (1 - beta2) * tf.square(gradient))
        rate = tf.cast(lr * correction2_root / correction1, variable.dtype)
        decayed = variable * tf.cast(1 - lr * parameter.weight_decay, variable.dtype)
        variable.assign(decayed - rate * first / (tf.sqrt(second) + 1e-7))

    return update


def uncorrected(right):
    def scalars(self, learning_rate):
        one = tf.ones([], tf.float64)
        return right(self, learning_rate) | {"correction1": one, "correction2_root": one}

    return scalars


def decay_in_the_gradient(right):
    """Adam with L2 regularisation: not AdamW."""

    def update(self, parameter, variable, gradient, **scalars):
        right(self, parameter._replace(weight_decay=0.0), variable, gradient + parameter.weight_decay * variable, **scalars)

    return update


def an_iteration_early(right):
    return lambda self, step: right(self, step + 1)


# fmt: off
FAULTS = (
    Fault("each gradient clipped by its own norm", "optimizer", PANOPTIC, "plain", "steps", "clipped", "clip",
          clipped_by(by_its_own_norm)),
    Fault("each gradient clipped by value", "optimizer", PANOPTIC, "plain", "steps", "clipped", "clip", clipped_by(by_value)),
    Fault("clipped without the 1e-6", "optimizer", PANOPTIC, "plain", "steps", "clipped", "clip",
          replaced(optimizer, "_CLIP_EPSILON", lambda right: 0.0)),
    Fault("norms decay", "optimizer", PANOPTIC, "plain", "steps", "decay", "weight decay", decays_like_a_weight("norm")),
    Fault("position tables decay", "optimizer", SWIN, "plain", "steps", "decay", "weight decay", decays_like_a_weight("position")),
    Fault("decay in the gradient", "optimizer", PANOPTIC, "plain", "steps", "exp_avg", "weight decay",
          replaced(AdamW, "_update", decay_in_the_gradient)),
    Fault("backbone learns as fast as the head", "optimizer", PANOPTIC, "plain", "steps", "lr", "learning rate",
          recipe(backbone_multiplier=1.0)),
    Fault("learning rate an iteration early", "optimizer", PANOPTIC, "plain", "steps", "lr", "learning rate",
          replaced(schedule._Schedule, "__call__", an_iteration_early)),
    Fault("Adam's epsilon as in Keras", "optimizer", PANOPTIC, "plain", "steps", "weights", "eps", replaced(AdamW, "_update", epsilon_hat)),
    Fault("moments not corrected", "optimizer", PANOPTIC, "plain", "steps", "weights",
          "missing term", replaced(AdamW, "_scalars", uncorrected)),
    Fault("momentum inverted", "optimizer", PANOPTIC, "plain", "steps", "exp_avg", "momentum", started_with(betas=(0.1, 0.999))),
)
# fmt: on
