"""One step of training: forward pass, losses, gradients, clipping, update, in one function to compile and to run on replicas.

It is the step of upstream's ``train_net.py`` (Detectron2 ``engine/train_loop.py:SimpleTrainer.run_step``, with ``Trainer.build_optimizer``)
on several processes: each takes its losses over its own images, normalised by the number of masks averaged over all of them, and the
gradients are averaged, clipped as one vector and applied.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.criterion import SetCriterion, _num_masks
from tfmaskformer.layers import Keep, dropout_masks, rematerialised
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_variables, wrap_blocks
from tfmaskformer.per_pixel_criterion import PerPixelCriterion
from tfmaskformer.training.optimizer import TorchOptimizer


class StepResult(NamedTuple):
    """What upstream logs of a step; but for ``finite`` the same on every replica.

    Attributes:
        losses: scalars by official key, weighted and averaged over replicas, and ``total_loss``, their sum.
        finite: bool [parameters], whether this replica's gradient is, in the order of the optimizer's parameters.
        gradient_norm: of the averaged gradient, before clipping.
        lr: the learning rate of the step, float64, before factors of single parameters.
    """

    losses: dict[str, tf.Tensor]
    finite: tf.Tensor
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
        parts: in how many parts a replica takes its batch, one after the other, adding their gradients up. Each part is what a replica of
            its own would be: with 4 parts on 2 replicas a step is the same as on 8.
        rematerialise: whether blocks of the network are computed again in the backward pass, which takes time and saves memory.
    """

    def __init__(
        self,
        model: MaskFormer,
        optimizer: TorchOptimizer,
        *,
        padding: str = "official",
        seed: int = 0,
        parts: int = 1,
        rematerialise: bool = False,
    ):
        variables = named_variables(model)
        self.model = model
        self.optimizer = optimizer
        self.criterion = build_criterion(model.config)
        self.padding = padding
        self.seed = seed
        self.parts = parts
        self.rematerialise = rematerialise
        self.variables = [variables[parameter.name] for parameter in optimizer.parameters]

    def __call__(self, images: tf.Tensor, image_sizes: tf.Tensor | None, targets: Mapping[str, tf.Tensor]) -> StepResult:
        """Trains on a batch.

        Args:
            images, image_sizes: as for ``MaskFormer.call``.
            targets: of the criterion, on the padded canvas: ``labels`` int [batch, max_objects], ``masks`` bool [batch, max_objects,
                height, width], ``num_objects`` int32 [batch]; for the per-pixel baselines ``sem_seg`` int [batch, height, width].
        """
        losses, gradients = self.gradients(images, image_sizes, targets)
        finite = [tf.constant(True) if gradient is None else tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients]
        return StepResult(losses, tf.stack(finite), *self.apply(gradients))

    def gradients(
        self, images: tf.Tensor, image_sizes: tf.Tensor | None, targets: Mapping[str, tf.Tensor]
    ) -> tuple[dict[str, tf.Tensor], list[tf.Tensor | None]]:
        """The losses of :class:`StepResult`, and this replica's share of the gradients, which over all replicas add up to the whole.

        A gradient is None where the losses do not depend on the variable.
        """
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        batch = (images, image_sizes, targets)
        losses, gradients = self._gradients(0, *batch) if self.parts == 1 else self._gradients_of_parts(batch)
        gradients = [None if gradient is None else gradient / (replicas * self.parts) for gradient in gradients]
        if replicas > 1:
            means = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, tf.stack(list(losses.values())))
            losses = dict(zip(losses, tf.unstack(means), strict=True))
        return losses, gradients

    def _gradients_of_parts(self, batch: Any) -> tuple[dict[str, tf.Tensor], list[tf.Tensor | None]]:
        """Means of the parts' losses, and sums of their gradients."""
        targets = batch[2]
        given = {"num_masks": tf.maximum(_num_masks(targets["num_objects"]) / self.parts, 1)} if "num_objects" in targets else {}
        split = tf.nest.map_structure(lambda values: tf.reshape(values, [self.parts, -1, *values.shape[1:]]), batch)
        keys: list[str] = []
        connected: list[bool] = []

        def body(part: tf.Tensor, losses: tf.Tensor, gradients: list[tf.Tensor]) -> Any:
            images, image_sizes, targets = tf.nest.map_structure(lambda values: values[part], split)
            found, own = self._gradients(part, images, image_sizes, targets | given)
            keys[:], connected[:] = found, [gradient is not None for gradient in own]
            added = [total if gradient is None else total + gradient for total, gradient in zip(gradients, own, strict=True)]
            return part + 1, losses + tf.stack(list(found.values())), added

        zeros = [tf.zeros_like(variable.value) for variable in self.variables]
        losses = tf.zeros([len(self.criterion.weights) + 1], _loss_dtype(self.model))
        _, losses, gradients = tf.while_loop(
            lambda part, *_: part < self.parts, body, (0, losses, zeros), maximum_iterations=self.parts, parallel_iterations=1
        )
        means = dict(zip(keys, tf.unstack(losses / self.parts), strict=True))
        return means, [gradient if known else None for gradient, known in zip(gradients, connected, strict=True)]

    def _gradients(
        self, part: int | tf.Tensor, images: tf.Tensor, image_sizes: tf.Tensor | None, targets: Mapping[str, tf.Tensor]
    ) -> tuple[dict[str, tf.Tensor], list[tf.Tensor | None]]:
        """Losses of a part on this replica alone, and their gradients."""
        blocks = wrap_blocks(rematerialised) if self.rematerialise else contextlib.nullcontext()
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([variable.value for variable in self.variables])
            with dropout_masks(self.keep(part)), blocks:
                outputs = self.model(images, image_sizes, training=True, padding=self.padding)
            losses = self.criterion(outputs, targets)
            if isinstance(self.criterion, SetCriterion):
                losses, _ = losses
            losses = {key: self.criterion.weights[key] * loss for key, loss in losses.items()}
            losses["total_loss"] = tf.add_n(list(losses.values()))
        gradients = tape.gradient(losses["total_loss"], [variable.value for variable in self.variables])
        return losses, [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]

    def apply(self, gradients: Sequence[tf.Tensor | None]) -> tuple[tf.Tensor, tf.Tensor]:
        """Adds the gradients up over replicas, clips and applies them; the norm and the learning rate of :class:`StepResult`."""
        lr = tf.cast(self.optimizer.learning_rate, tf.float64)
        self.optimizer.apply(list(gradients), self.variables)
        return tf.identity(self.optimizer.gradient_norm.value), lr

    def keep(self, part: int | tf.Tensor = 0) -> Keep:
        """The masks of dropout in this step, on this replica, in a part of its batch."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group * self.parts + part
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


def _loss_dtype(model: MaskFormer) -> tf.DType:
    return tf.float64 if model.compute_dtype == "float64" else tf.float32


def build_criterion(config: MaskFormerConfig) -> Any:
    """The criterion of a model."""
    return SetCriterion(config) if config.head == "MaskFormerHead" else PerPixelCriterion(config)
