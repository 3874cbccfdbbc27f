"""Ports of other models: a description, by which ``convert``, ``parity-check record`` and ``parity-check`` do what they do for MaskFormer.

A description is a Python file with ``PORT = Port(…)``. What it needs of PyTorch or TensorFlow it imports inside its functions, so that
recording needs no TensorFlow, and converting and checking no PyTorch. The TensorFlow model is any tree of Keras layers. The call of a
layer is compared with the call of the official module that its weights come from; :attr:`Port.modules` names those without weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from converters import ports
from converters.rules import Drop, Rule
from parity.compiled import compiled
from parity.tap_rules import Layout, Names, TapRuleError
from parity.tensorflow_run import CaseResults

if TYPE_CHECKING:
    from parity.trace import Case
    from tfmaskformer.module import Substitute

Tensors = Mapping[str, Any]
"""Name → array, or tensor of either framework."""


@dataclasses.dataclass(frozen=True)
class Port:
    """One model in both frameworks.

    Attributes:
        name: of the model.
        build_official: makes the PyTorch model; its weights are loaded afterwards.
        build_tensorflow: makes the Keras model, in Keras's default dtype policy, which is set to float32 or float64 before.
        call: (model, inputs) → outputs by name. It is given either framework's model, with tensors in that framework's layout.
        inputs: name of a case → makes its inputs, arrays by name in PyTorch's layout. Floats are cast to the dtype of the run.
        rules: name in the official ``state_dict`` → name of the variable, and the transform; one line a pattern.
        layouts: (pattern, :class:`parity.tap_rules.Layout`): exactly one line for each input, tap (``<module>#<call>[<item>]``) and output.
        drops: what the official file has and TensorFlow does not need, by its exact name.
        modules: official module → path of the layer that computes the same, where the weights do not tell.
        partners: official tap → (tap of TensorFlow that is compared with it, reason).
        exempt: (group, exact name) → reason, for what one side alone has.
        official_losses, tensorflow_losses: (outputs, inputs) → terms of the loss by name, whose sum is differentiated; None: no losses.
        stages: name → beginnings of the modules' names, in the order of computation.
    """

    name: str
    build_official: Callable[[], Any]
    build_tensorflow: Callable[[], Any]
    call: Callable[[Any, Tensors], Tensors]
    inputs: Mapping[str, Callable[[], Mapping[str, np.ndarray]]]
    rules: Sequence[Rule]
    layouts: Sequence[tuple[str, Layout]]
    drops: Sequence[Drop] = ()
    modules: Sequence[Rule] = ()
    partners: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    exempt: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    official_losses: Callable[[Tensors, Tensors], Tensors] | None = None
    tensorflow_losses: Callable[[Tensors, Tensors], Tensors] | None = None
    stages: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def new(self, dtype: str) -> Any:
        """The TensorFlow model in "float32" or "float64", with all its variables, at any values."""
        from tfmaskformer.module import Module

        with _precision(dtype):
            model = self.build_tensorflow()
            for layer in ports.named_layers(model).values():
                if isinstance(layer, Module):
                    layer.build()
            self.call(model, self.tensors(next(iter(self.inputs.values()))(), dtype))  # builds what Keras builds when it is called
        names = self.module_names(model)
        for path, layer in ports.named_layers(model).items():
            if isinstance(layer, Module):
                layer.official_name = names[path]
        return model

    def load(self, directory: str | Path, dtype: str) -> Any:
        """The TensorFlow model with the weights of a directory that ``convert --port`` wrote; see :func:`converters.ports.load`."""
        return ports.load(self, directory, dtype)

    @property
    def names(self) -> Names:
        """What the check asks."""
        return Names(lambda group, name: self.layout_of(name), self.partners, self.exempt)

    def layout_of(self, name: str) -> Layout:
        """The layout of an input, a tap or an output.

        Raises:
            TapRuleError: no line fits, or several do.
        """
        found = [layout for pattern, layout in self.layouts if Rule(pattern, pattern).target_of(name) is not None]
        if len(found) != 1:
            raise TapRuleError(f"{len(found) or 'no'} lines for '{name}' in the layouts of port '{self.name}'; exactly one is needed")
        return found[0]

    def tensors(self, inputs: Mapping[str, np.ndarray], dtype: str) -> dict[str, Any]:
        """Inputs in PyTorch's layout → tensors in TensorFlow's, floats in ``dtype``."""
        import tensorflow as tf

        tensors = {}
        for name, array in inputs.items():
            layout = self.layout_of(name)
            if sorted(layout.actual) != sorted(layout.expected) or array.ndim != len(layout.expected):
                raise TapRuleError(f"input '{name}' {array.shape}: the layout {layout.expected} → {layout.actual} does not fit it")
            array = array.transpose([layout.expected.index(axis) for axis in layout.actual])
            tensors[name] = tf.constant(array.astype(dtype) if array.dtype.kind == "f" else array)
        return tensors

    def module_names(self, model: Any) -> dict[str, str]:
        """Path of each layer → official module: by :attr:`modules`, else where its weights come from, else its path.

        Raises:
            TapRuleError: two layers would have one name.
        """
        sources: dict[str, set[str]] = {}
        for target, move in ports.moves(self, list(ports.named_variables(model))).items():
            sources.setdefault(target.rpartition(".")[0], set()).add(move.source.rpartition(".")[0])
        names: dict[str, str] = {}
        for path in ports.named_layers(model):
            lines = [name for rule in self.modules if (name := rule.source_of(path)) is not None]
            by_weights = sources.get(path, set())
            if len(lines) > 1:
                raise TapRuleError(f"{len(lines)} lines for layer '{path}' in the modules of port '{self.name}'")
            names[path] = lines[0] if lines else next(iter(by_weights)) if len(by_weights) == 1 and path else path
        twice = {name: [path for path in names if names[path] == name] for name in names.values()}
        for name, paths in twice.items():
            if len(paths) > 1:
                told = " and ".join(f"'{path}'" for path in paths)
                raise TapRuleError(f"layers {told} are both called '{name}'; say in the modules of port '{self.name}' which one it is")
        return names

    def run(
        self,
        model: Any,
        inputs: Mapping[str, np.ndarray],
        mode: str = "graph",
        *,
        gradients: str = "all",
        substitute: Substitute | None = None,
        tapped: bool = True,
    ) -> CaseResults:
        """Taps, outputs, losses and gradients of the TensorFlow model.

        Args:
            model: from :meth:`load`.
            inputs: of a case, in PyTorch's layout.
            mode: "graph", "eager" or "xla".
            gradients: one of :data:`parity.tensorflow_run.GRADIENTS`; of a port without losses there are none.
            substitute: see :func:`tfmaskformer.module.record_taps`, for mode "eager"; the results then have no taps.
            tapped: False leaves the model alone: what comes out is what it computes when nobody looks, without taps.
        """
        import tensorflow as tf

        named = ports.named_variables(model)
        moves = ports.moves(self, list(named))
        variables = {moves[name].source: variable.value for name, variable in named.items() if variable.trainable}

        def step(tensors: dict[str, Any]) -> Any:
            with tf.GradientTape() if gradients != "none" else contextlib.nullcontext() as tape:
                recording: Any = self.tapped(model, substitute) if tapped else contextlib.nullcontext({})
                with recording as taps:
                    outputs = dict(self.call(model, tensors))
                losses = dict(self.tensorflow_losses(outputs, tensors)) if self.tensorflow_losses else {}
                if losses:
                    losses["total"] = tf.add_n(list(losses.values()))
            shown = {name: tensor for name, tensor in taps.items() if not name.startswith("#")}  # the model's own are the outputs
            shown = {} if substitute else shown
            sought = (variables, shown if gradients == "all" else {})
            found = tape.gradient(losses["total"], sought) if losses and tape else ({}, {})
            dense = [{name: tf.convert_to_tensor(of) for name, of in group.items() if of is not None} for group in found]
            return shown, outputs, losses, *dense

        with compiled(step, mode) as run_step, _precision(model.compute_dtype):
            found = run_step(self.tensors(inputs, model.compute_dtype))
        kinds = ("taps", "outputs", "losses", "gradients", "tap_gradients")
        groups: dict[str, Mapping[str, np.ndarray]] = {
            kind: {name: tensor.numpy() for name, tensor in tensors.items()} for kind, tensors in zip(kinds, found, strict=True)
        }
        transforms = {move.source: move.transform for move in moves.values()}
        groups["gradients"] = {name: transforms[name].invert(gradient) for name, gradient in groups["gradients"].items()}
        return CaseResults(groups, self.names)

    @contextlib.contextmanager
    def tapped(self, model: Any, substitute: Substitute | None = None) -> Iterator[dict[str, Any]]:
        """:func:`tfmaskformer.module.record_taps` of the calls of all Keras layers, under their official names.

        Layers that no attribute leads to show too, under a name that nothing else has: they cannot be forgotten.
        """
        import keras

        from tfmaskformer.module import Module, record_taps, tap

        official = self.module_names(model)
        names = {id(layer): official[path] for path, layer in ports.named_layers(model).items()}
        original = keras.layers.Layer.__call__

        def call(layer: Any, *arguments: Any, **keywords: Any) -> Any:
            outputs = original(layer, *arguments, **keywords)
            if isinstance(layer, Module) or layer is model:
                return outputs
            return tap(names.get(id(layer), f"{layer.name} (no attribute of the model)"), outputs)

        with mock.patch.object(keras.layers.Layer, "__call__", call), record_taps(substitute) as taps:
            yield taps

    def trained(self, model: Any) -> dict[str, bool]:
        """Official name of every variable → whether a loss trains it."""
        named = ports.named_variables(model)
        has_losses = self.tensorflow_losses is not None
        return {move.source: has_losses and bool(named[name].trainable) for name, move in ports.moves(self, list(named)).items()}


def inputs_of(case: Case) -> dict[str, np.ndarray]:
    """The inputs of a port's case as they were recorded, in PyTorch's layout."""
    return {name: case.reference.read("inputs", name) for name in case.reference.group("inputs")}


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    """Inside, Keras makes layers and inputs of this dtype: inputs of functional models follow ``floatx``, not the policy."""
    import keras

    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_dtype_policy(dtype)
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)
        keras.config.set_floatx(floatx)
