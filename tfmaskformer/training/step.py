"""One step of training: forward pass, losses, gradients, clipping, update, in one function to compile and to run on replicas.

It is the step of upstream's ``train_net.py`` (Detectron2 ``engine/train_loop.py:SimpleTrainer.run_step``, with ``Trainer.build_optimizer``)
on several processes: each takes its losses over its own images, normalised by the number of masks averaged over all of them, and the
gradients are averaged, clipped as one vector and applied.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.criterion import SetCriterion
from tfmaskformer.layers import Keep, dropout_masks
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_variables
from tfmaskformer.per_pixel_criterion import PerPixelCriterion
from tfmaskformer.training.optimizer import TorchOptimizer


class StepResult(NamedTuple):
    """What upstream logs of a step; the same on every replica.

    Attributes:
        losses: scalars by official key, weighted and averaged over replicas, and ``total_loss``, their sum.
        gradient_norm: of the averaged gradient, before clipping.
        lr: the learning rate of the step, float64, before factors of single parameters.
    """

    losses: dict[str, tf.Tensor]
    gradient_norm: tf.Tensor
    lr: tf.Tensor


class TrainStep:
    """A step as a callable, eagerly, in a ``tf.function`` with or without XLA, or in ``strategy.run``.

    :meth:`gradients` and :meth:`apply` are its two halves, for loops that do something in between.

    Args:
        model: whose parameters are built.
        optimizer: of :func:`~tfmaskformer.training.optimizer.build_optimizer` for this model.
        padding: see ``MaskFormer.call``.
        seed: of dropout and stochastic depth. Their masks depend on it, the iteration, the replica and the place in the model, on nothing
            else: a training that was interrupted goes on with the masks that it would have had.
    """

    def __init__(self, model: MaskFormer, optimizer: TorchOptimizer, *, padding: str = "official", seed: int = 0):
        variables = named_variables(model)
        self.model = model
        self.optimizer = optimizer
        self.criterion = build_criterion(model.config)
        self.padding = padding
        self.seed = seed
        self.variables = [variables[parameter.name] for parameter in optimizer.parameters]

    def __call__(self, images: tf.Tensor, image_sizes: tf.Tensor | None, targets: Mapping[str, tf.Tensor]) -> StepResult:
        """Trains on a batch.

        Args:
            images, image_sizes: as for ``MaskFormer.call``.
            targets: of the criterion, on the padded canvas: ``labels`` int [batch, max_objects], ``masks`` bool [batch, max_objects,
                height, width], ``num_objects`` int32 [batch]; for the per-pixel baselines ``sem_seg`` int [batch, height, width].
        """
        losses, gradients = self.gradients(images, image_sizes, targets)
        return StepResult(losses, *self.apply(gradients))

    def gradients(
        self, images: tf.Tensor, image_sizes: tf.Tensor | None, targets: Mapping[str, tf.Tensor]
    ) -> tuple[dict[str, tf.Tensor], list[tf.Tensor | None]]:
        """The losses of :class:`StepResult`, and this replica's share of the gradients, which over all replicas add up to the whole.

        A gradient is None where the losses do not depend on the variable.
        """
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([variable.value for variable in self.variables])
            with dropout_masks(self.keep()):
                outputs = self.model(images, image_sizes, training=True, padding=self.padding)
            losses = self.criterion(outputs, targets)
            if isinstance(self.criterion, SetCriterion):
                losses, _ = losses
            losses = {key: self.criterion.weights[key] * loss for key, loss in losses.items()}
            losses["total_loss"] = tf.add_n(list(losses.values()))
            share = losses["total_loss"] / replicas
        gradients = tape.gradient(share, [variable.value for variable in self.variables])
        if replicas > 1:
            means = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, tf.stack(list(losses.values())))
            losses = dict(zip(losses, tf.unstack(means), strict=True))
        return losses, gradients

    def apply(self, gradients: Sequence[tf.Tensor | None]) -> tuple[tf.Tensor, tf.Tensor]:
        """Adds the gradients up over replicas, clips and applies them; the norm and the learning rate of :class:`StepResult`."""
        lr = tf.cast(self.optimizer.learning_rate, tf.float64)
        self.optimizer.apply(list(gradients), self.variables)
        return tf.identity(self.optimizer.gradient_norm.value), lr

    def keep(self) -> Keep:
        """The masks of dropout in this step, on this replica."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        numbers = [tf.cast(number, tf.uint32) for number in (self.seed, self.optimizer.iterations.value, replica)]

        def keep(place: str, shape: Sequence[int | tf.Tensor], rate: float) -> tf.Tensor:
            keys = []
            for key in (tf.constant(0, tf.uint32), tf.constant(_GOLDEN, tf.uint32)):
                for number in (*numbers, tf.constant(zlib.crc32(place.encode()), tf.uint32)):
                    key = _mix(key + number)
                keys.append(key)
            index = tf.cast(tf.range(tf.reduce_prod(shape)), tf.uint32)
            bits = _mix(_mix(index + keys[0]) + keys[1])
            return tf.reshape(bits >= tf.constant(int(rate * 2**32), tf.uint32), shape)

        return keep


_GOLDEN = 0x9E3779B9


def _mix(bits: tf.Tensor) -> tf.Tensor:
    """Murmur3's last step (Appleby 2008), uint32: whatever compiles it, the same masks. TensorFlow's generators give others under XLA."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(shift, tf.uint32))) * tf.constant(factor, tf.uint32)
    return tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(16, tf.uint32)))


def build_criterion(config: MaskFormerConfig) -> Any:
    """The criterion of a model."""
    return SetCriterion(config) if config.head == "MaskFormerHead" else PerPixelCriterion(config)
