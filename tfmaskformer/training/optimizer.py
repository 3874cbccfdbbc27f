"""AdamW and SGD in PyTorch's form, with the official parameter groups and full-model gradient clipping.

Sources: MaskFormer ``train_net.py`` (``Trainer.build_optimizer``); PyTorch's ``torch.optim.AdamW``, ``torch.optim.SGD`` and
``torch.nn.utils.clip_grad_norm_``; paper: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.

Keras' own AdamW adds epsilon elsewhere and has other defaults; ``tf.clip_by_global_norm`` clips each replica for itself. Which is why:
docs/decisions/0013-optimizer.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfmaskformer.layers import Embedding, GroupNorm, LayerNorm
from tfmaskformer.module import Module, named_modules, named_variables, parameter_specs
from tfmaskformer.training.recipe import Recipe
from tfmaskformer.training.schedule import build_lr_scheduler

_POSITION = ("relative_position_bias_table", "absolute_pos_embed")
"""Parameters that never decay, by what their name contains."""

_CLIP_EPSILON = 1e-6
"""What torch adds to the norm by which it divides."""


class Parameter(NamedTuple):
    """How one variable is trained.

    ``group``: "backbone" or "sem_seg_head", and what decides on the decay: "weight" (weights and biases alike), "norm", "embed" or
    "position". The learning rate is multiplied by ``lr_factor``.
    """

    name: str
    group: str
    lr_factor: float
    weight_decay: float


def parameters(root: keras.layers.Layer, recipe: Recipe) -> list[Parameter]:
    """Every trained variable below ``root`` by official name, in the order of the tree; buffers (frozen batch norm) are left out.

    Needs no variable to exist.
    """
    decays = {"weight": recipe.weight_decay, "norm": recipe.weight_decay_norm, "embed": recipe.weight_decay_embed, "position": 0.0}
    modules, found = dict(named_modules(root)), []
    for name, spec in parameter_specs(root).items():
        if spec.trainable:
            path, _, last = name.rpartition(".")
            part = "backbone" if "backbone" in path else "sem_seg_head"
            kind = _kind(modules[path], last)
            factor = recipe.backbone_multiplier if part == "backbone" else 1.0
            found.append(Parameter(name, f"{part}.{kind}", factor, decays[kind]))
    return found


def _kind(module: Module, name: str) -> str:
    if isinstance(module, GroupNorm | LayerNorm):
        return "norm"
    if isinstance(module, Embedding):
        return "embed"
    return "position" if any(part in name for part in _POSITION) else "weight"


def build_optimizer(recipe: Recipe, model: keras.layers.Layer) -> TorchOptimizer:
    """The optimizer of a recipe for a model whose parameters are built, named as upstream's; its slots exist when it returns.

    Inside ``strategy.scope()`` for training on several replicas.
    """
    found = parameters(model, recipe)
    optimizer: TorchOptimizer
    if recipe.optimizer == "ADAMW":
        optimizer = AdamW(build_lr_scheduler(recipe), found, clip_norm=recipe.clip_norm)
    else:
        optimizer = SGD(build_lr_scheduler(recipe), found, clip_norm=recipe.clip_norm, momentum=recipe.momentum)
    variables = named_variables(model)
    optimizer.build([variables[parameter.name] for parameter in found])
    return optimizer


def global_norm(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """2-norm of all elements of all tensors, as if they were one vector; in the tensors' dtype."""
    return tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(tensor)) for tensor in tensors]))


def clip_coefficient(norm: tf.Tensor, clip_norm: float) -> tf.Tensor:
    """By what ``torch.nn.utils.clip_grad_norm_`` multiplies gradients of this norm: ``clip_norm / (norm + 1e-6)``, at most 1."""
    return tf.minimum(clip_norm / (norm + _CLIP_EPSILON), 1)


def _own_copies(create: Callable[..., Any], **options: Any) -> Any:
    """A variable to which each replica assigns the same. Keras has the first one tell the others, which XLA cannot on several GPUs."""
    return create(**options | {"aggregation": tf.VariableAggregation.NONE})


class TorchOptimizer(keras.optimizers.Optimizer):
    """What both optimizers share: parameters with their own learning rate and decay, clipping, and slots by official name.

    ``apply`` takes the gradients of one replica: they are summed over replicas, the sum is clipped by its norm, and then applied.

    Scalars (learning rate, decay, bias corrections) are float64, as Python's are, and rounded to the variable's dtype, float32 or
    float64, where they meet it.

    In a checkpoint, a slot's key is its name and the official one (``exp_avg/backbone/stem/conv1/weight``), and the model's variables are
    not repeated. ``gradient_norm`` is the norm of the last step's gradient, summed over replicas, before clipping; no checkpoint has it.

    Args:
        learning_rate: a schedule (``tfmaskformer.training.schedule``), or a float, which Keras keeps as a float32 variable.
        parameters: of the variables that :meth:`build` gets, in their order.
        clip_norm: the largest norm of the whole gradient; 0: it is not clipped.
    """

    slots: tuple[str, ...] = ()

    def __init__(
        self,
        learning_rate: Any,
        parameters: Sequence[Parameter | Sequence[Any]],
        *,
        clip_norm: float = 0.0,
        name: str | None = None,
    ):
        with tf.variable_creator_scope(_own_copies):
            super().__init__(learning_rate=learning_rate, name=name)
        self.parameters = tuple(Parameter(*parameter) for parameter in parameters)
        self.clip_norm = clip_norm

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the slots.

        Raises:
            ValueError: not as many variables as parameters, or one that is neither float32 nor float64.
        """
        if self.built:
            return
        if len(variables) != len(self.parameters):
            raise ValueError(f"{self.name}: got {len(variables)} variables, expected {len(self.parameters)}, one for each parameter")
        for parameter, variable in zip(self.parameters, variables, strict=True):
            if tf.as_dtype(variable.dtype) not in (tf.float32, tf.float64):
                raise ValueError(f"{self.name}: '{parameter.name}' is {variable.dtype}, expected float32 or float64")
        super().build(list(variables))
        for slot in self.slots:
            root = tf.Module()
            for parameter, variable in zip(self.parameters, variables, strict=True):
                *path, name = parameter.name.split(".")
                node = root
                for part in path:
                    if part not in vars(node):
                        setattr(node, part, tf.Module())
                    node = getattr(node, part)
                setattr(node, name, self.add_variable_from_reference(variable, name=slot))
            setattr(self, slot, root)
        self.gradient_norm = self.add_variable([], dtype=variables[0].dtype, name="gradient_norm")

    def slot(self, slot: str, name: str) -> keras.Variable:
        """A slot ("exp_avg") of the variable with an official name."""
        return functools.reduce(getattr, name.split("."), getattr(self, slot))

    def _all_reduce_sum_gradients(self, grads_and_vars: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """Keras' sum over replicas, then the clipping."""
        gradients, variables = zip(*super()._all_reduce_sum_gradients(grads_and_vars), strict=True)
        norm = global_norm(gradients)
        self.gradient_norm.assign(norm)
        if self.clip_norm > 0:
            coefficient = clip_coefficient(norm, self.clip_norm)
            gradients = tuple(gradient * coefficient for gradient in gradients)
        return list(zip(gradients, variables, strict=True))

    def _backend_update_step(self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any) -> None:
        """Keras', with all numbers that every variable needs in the place of the learning rate alone: they are computed once."""
        super()._backend_update_step(grads, trainable_variables, self._scalars(tf.cast(learning_rate, tf.float64)))

    def _scalars(self, learning_rate: tf.Tensor) -> dict[str, tf.Tensor]:
        raise NotImplementedError

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: dict[str, tf.Tensor]) -> None:
        parameter = self.parameters[self._get_variable_index(variable)]
        scalars = learning_rate | {"lr": learning_rate["lr"] * parameter.lr_factor}
        self._update(parameter, variable, tf.cast(gradient, variable.dtype), **scalars)

    def _update(self, parameter: Parameter, variable: tf.Variable, gradient: tf.Tensor, **scalars: tf.Tensor) -> None:
        raise NotImplementedError

    def _trackable_children(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without Keras' numbered lists, whose short keys would take the place of the official names, also of the model's variables."""
        children = super()._trackable_children(*args, **kwargs)
        return {name: children[name] for name in ("_iterations", "_learning_rate", *self.slots) if name in children}

    def get_config(self) -> dict[str, Any]:
        base = super().get_config()
        own = {"parameters": [list(parameter) for parameter in self.parameters], "clip_norm": self.clip_norm}
        return {"name": base["name"], "learning_rate": base["learning_rate"], **own}


@keras.saving.register_keras_serializable("tfmaskformer")
class AdamW(TorchOptimizer):
    """``torch.optim.AdamW``: the weight is multiplied by ``1 − lr·decay``, then moved; epsilon is added to the corrected root.

    In float32 that factor is 1 where lr·decay is below 3e-8: official recipes with decay 1e-4 do not decay at all, upstream as here.
    """

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        learning_rate: Any,
        parameters: Sequence[Parameter | Sequence[Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_norm: float = 0.0,
        name: str | None = None,
    ):
        super().__init__(learning_rate, parameters, clip_norm=clip_norm, name=name)
        self.betas = tuple(betas)
        self.eps = eps

    def _scalars(self, learning_rate: tf.Tensor) -> dict[str, tf.Tensor]:
        step = tf.cast(self.iterations, tf.float64) + 1
        correction1, correction2 = (1 - beta**step for beta in self.betas)
        return {"lr": learning_rate, "correction1": correction1, "correction2_root": tf.sqrt(correction2)}

    def _update(self, parameter: Parameter, variable: tf.Variable, gradient: tf.Tensor, **scalars: tf.Tensor) -> None:
        lr, correction1, correction2_root = scalars["lr"], scalars["correction1"], scalars["correction2_root"]
        exp_avg, exp_avg_sq = (self.slot(slot, parameter.name).value for slot in self.slots)
        beta1, beta2 = self.betas
        # Grouped and ordered as torch does it, so that float32 results differ by fused multiply-adds alone.
        first = exp_avg + (1 - beta1) * (gradient - exp_avg)
        second = exp_avg_sq * beta2 + (1 - beta2) * gradient * gradient
        denominator = tf.sqrt(second) / tf.cast(correction2_root, variable.dtype) + self.eps
        decayed = variable * tf.cast(1 - lr * parameter.weight_decay, variable.dtype)
        exp_avg.assign(first)
        exp_avg_sq.assign(second)
        variable.assign(decayed - tf.cast(lr / correction1, variable.dtype) * first / denominator)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"betas": list(self.betas), "eps": self.eps}


@keras.saving.register_keras_serializable("tfmaskformer")
class SGD(TorchOptimizer):
    """``torch.optim.SGD``: the decay is part of the gradient, as upstream without dampening and Nesterov's momentum."""

    slots = ("momentum_buffer",)

    def __init__(
        self,
        learning_rate: Any,
        parameters: Sequence[Parameter | Sequence[Any]],
        *,
        momentum: float = 0.0,
        clip_norm: float = 0.0,
        name: str | None = None,
    ):
        super().__init__(learning_rate, parameters, clip_norm=clip_norm, name=name)
        self.momentum = momentum

    def _scalars(self, learning_rate: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"lr": learning_rate}

    def _update(self, parameter: Parameter, variable: tf.Variable, gradient: tf.Tensor, **scalars: tf.Tensor) -> None:
        if parameter.weight_decay > 0:
            gradient += parameter.weight_decay * variable
        if self.momentum > 0:
            buffer = self.slot("momentum_buffer", parameter.name).value
            gradient = buffer * self.momentum + gradient
            buffer.assign(gradient)
        variable.assign(variable - tf.cast(scalars["lr"], variable.dtype) * gradient)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"momentum": self.momentum}
