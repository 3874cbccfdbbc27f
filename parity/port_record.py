"""Recording a port: runs its PyTorch model on its inputs and writes a trace, in the same runs and files as :mod:`parity.record`.

PyTorch is imported when a recording starts, not before.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionError
from converters.source import open_source
from parity import record, trace
from parity.inputs import InputError
from parity.meta_architectures import Emit, numpy
from parity.ports import Port, Tensors
from parity.trace import Trace


def record_port(
    port: Port,
    checkpoint: str | Path,
    cases: Sequence[str],
    directory: str | Path,
    *,
    samples: int | None = None,
    samples_float32: int | None = None,
    gradients: bool = True,
    memory_budget: int | None = None,
    command: Sequence[str] = (),
) -> Trace:
    """Records a trace, or completes one; see :func:`parity.record.record`.

    Args:
        port: the model.
        checkpoint: what ``convert --port`` takes.
        cases: names in ``port.inputs``; empty: all.
        directory: made if it is not there.
        samples, samples_float32, gradients, memory_budget, command: as of :func:`parity.record.record`.

    Raises:
        ConversionError, InputError, TraceError: bad input, nothing of it recorded.
        RecordError: the model did not do what a trace relies on.
    """
    if unknown := [name for name in cases if name not in port.inputs]:
        raise InputError(f"port '{port.name}' has no case {', '.join(unknown)}; it has {', '.join(port.inputs)}")
    inputs = {name: _checked(name, port.inputs[name]()) for name in cases or port.inputs}
    model, digest = _model(port, Path(checkpoint))
    provenance = {
        "port": port.name,
        "checkpoint": {"file": Path(checkpoint).name, "sha256": digest},
        "samples": samples,
        "samples_float32": samples_float32,
        "gradients": gradients,
        **record.surroundings(("torch", "numpy")),
    }
    description = {name: {key: [array.dtype.name, *array.shape] for key, array in arrays.items()} for name, arrays in inputs.items()}
    hashes = {name: _sha256(arrays) for name, arrays in inputs.items()}
    described = {name: {"inputs": description[name], "sha256": hashes[name]} for name in inputs}

    def run_of(name: str) -> Callable[[record.Run, Emit], dict[str, str]]:
        kept = functools.partial(record.saved, gradients, memory_budget, Path(directory))
        return lambda run, emit: _run(port, model, name, inputs[name], run, emit, kept)

    of_dtypes = {"float64": samples, "float32": samples if samples_float32 is None else samples_float32}
    return record.write(directory, provenance, described, inputs, run_of, of_dtypes, command)


def _checked(name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {key: np.ascontiguousarray(array) for key, array in inputs.items()}
    for key, array in arrays.items():
        if array.dtype.name not in trace.DTYPES:
            raise InputError(f"case {name}: input '{key}' is {array.dtype}, expected one of {', '.join(trace.DTYPES)}")
    return arrays


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(name.encode())
        digest.update(array.data)
    return digest.hexdigest()


def _model(port: Port, checkpoint: Path) -> tuple[Any, str]:
    """The PyTorch model in evaluation mode with the weights of a file, and the file's SHA-256."""
    import torch

    model = port.build_official()
    with open_source(checkpoint) as file:
        tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in file.tensors.items()}
        digest = file.sha256()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConversionError(f"'{checkpoint.name}' does not fit the official model of port '{port.name}': {error}") from error
    return model.eval(), digest


def _run(
    port: Port,
    model: Any,
    case: str,
    inputs: Mapping[str, np.ndarray],
    run: record.Run,
    emit: Emit,
    kept: Callable[[], contextlib.AbstractContextManager[bool]],
) -> dict[str, str]:
    """One forward and backward pass with hooks, and one without, which must give the same bits; see :data:`parity.record.RunOnce`.

    Args:
        kept: see :func:`parity.record.saved`.
    """
    import torch

    start = time.perf_counter()
    dtype = getattr(torch, run.dtype)
    model.to(dtype, memory_format=torch.channels_last if run.channels_last else torch.contiguous_format)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    with torch.backends.mkldnn.flags(enabled=run.onednn), torch.enable_grad():
        bits = record.Bits(emit, f"{case}, {run.dtype} {run.name}")
        with kept() as backward:
            names = [name for name, _ in model.named_modules() if name]
            with record.hooks(model, names, emit, backward and port.official_losses is not None) as without_gradient:
                outputs = port.call(model, tensors)
            _train(port, model, outputs, tensors, backward, bits.remember)
        with kept():
            _train(port, model, port.call(model, tensors), tensors, backward, bits.compare)
    record.say(f"{case}: {run.dtype} {run.name} {time.perf_counter() - start:.1f} s")
    return dict(without_gradient)


def _train(port: Port, model: Any, outputs: Tensors, inputs: Tensors, backward: bool, emit: Emit) -> None:
    """Outputs, losses and the gradient of every parameter on which the loss depends."""
    import torch

    for name, tensor in outputs.items():
        emit("outputs", name, numpy(tensor))
    if port.official_losses is None:
        return
    losses = dict(port.official_losses(outputs, inputs))
    total = sum(losses.values())
    for name, loss in (losses | {"total": total}).items():
        emit("losses", name, numpy(loss))
    if not backward:
        return
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            emit("gradients", name, numpy(gradient))
