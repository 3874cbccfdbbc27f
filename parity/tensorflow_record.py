"""Recording with TensorFlow: what the port computes on the inputs of a reference trace, as a trace of its own.

It runs where the device is, and needs of the reference its inputs alone (:func:`copy_inputs`); :mod:`parity.recorded` compares both
elsewhere, without TensorFlow. Names and layouts are the official ones. TensorFlow is imported when a recording starts, not before.

In eager mode the results must have the bits that the model has when nobody looks. A compiled function with taps fuses otherwise than one
without: there, all but the taps and their gradients is recorded of the function without.

A low precision has no official floor. Its floor is what it costs on a CPU: ``bfloat16`` there is what it is everywhere, and what a GPU
(TensorFloat-32) or a TPU (bfloat16) makes of the operands of float32 products is done to them on the CPU by :func:`rounded_products`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import tfmaskformer
from parity import judge, probes, record, trace
from parity.converted import CheckError, read_manifest, require_same_weights
from parity.inputs import InputError
from parity.meta_architectures import RecordError
from parity.spool import over_budget, prepare
from parity.tensorflow_run import MODES, CaseResults, run
from parity.trace import POSITION_EMBEDDING, Case, Trace, TraceError, TraceFile, TraceFileWriter

POLICIES = {"float32": "float32", "float64": "float64", "bfloat16": "mixed_bfloat16"}
"""What is computed in → Keras's policy. bfloat16 is stored as float32, which has all its values."""

PRODUCTS = {"float32": 0, "tf32": 13, "bfloat16": 16}
"""What the operands of float32 products are rounded to → bits of float32's mantissa that go."""

DEVICES = ("cpu", "gpu", "tpu")

UNTAPPED = {"outputs", "matcher", "losses", "gradients", "inference"}
"""Groups that a run without taps has too."""


class DeviceUnavailableError(RuntimeError):
    """There is no such device here, or it computes garbage; the message says which."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a recording was computed.

    Attributes:
        dtype: one of :data:`POLICIES`.
        products: one of :data:`PRODUCTS`.
    """

    dtype: str = "float32"
    products: str = "float32"

    @property
    def is_low(self) -> bool:
        """Whether no official run computes in it."""
        return self.dtype == "bfloat16" or self.products != "float32"

    def __str__(self) -> str:
        return self.dtype if self.products == "float32" else f"{self.dtype} with products in {self.products}"


def copy_inputs(source: str | Path, directory: str | Path) -> Trace:
    """Writes what a recording with TensorFlow needs of a trace: photographs, targets, assignments, position embeddings.

    Raises:
        TraceError: no trace there, or the directory cannot be written or is there already.
    """
    reference, directory = Trace(source), Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise TraceError(f"'{directory}' is not empty; give another folder")
    directory.mkdir(parents=True, exist_ok=True)
    for case in reference:
        for file in (case.reference, case.baseline):
            facts = {"key": file.facts["key"], "resized_px": case.resized_px}
            with TraceFileWriter(directory, case.name, file.dtype, runs=file.runs, samples=None, facts=facts) as writer:
                for group, name in file.records:
                    if _is_input(file, group, name):
                        writer.add(group, name, file.read(group, name))
    trace.write_manifest(directory, {**reference.provenance, "inputs_only": True}, reference.manifest["cases"])
    return Trace(directory)


def _is_input(file: TraceFile, group: str, name: str) -> bool:
    if group == "taps":
        return file.dtype == "float64" and name.endswith(f"{POSITION_EMBEDDING}#0")
    return group == "inputs" or (group == "matcher" and name.endswith(("/assignment", "/gap", "/cost_noise")))


def record_tensorflow(
    checkpoint: str | Path,
    reference: str | Path,
    directory: str | Path,
    *,
    precision: Precision = Precision(),
    mode: str = "graph",
    device: str = "cpu",
    cases: Sequence[str] = (),
    gradients: bool = True,
    memory_budget: int | None = None,
    command: Sequence[str] = (),
) -> Trace:
    """Records a trace with TensorFlow, or completes one: a case that is there and was recorded in the same way is kept.

    Args:
        checkpoint: directory written by ``convert``.
        reference: a trace of the same weights, or its inputs (:func:`copy_inputs`).
        directory: made if it is not there.
        precision: what is computed in.
        mode: see :func:`parity.tensorflow_run.run`.
        device: one of :data:`DEVICES`; a TPU is the local one.
        cases: names; empty: all.
        gradients: False leaves them out, and the memory that they need.
        memory_budget: see :func:`parity.tensorflow_run.run`.
        command: how this was asked for, for the manifest.

    Raises:
        InputError, TraceError, CheckError, tfmaskformer.CheckpointError: bad input, nothing of it recorded.
        DeviceUnavailableError: the device is not there, or computes garbage.
        RecordError: without taps, the results have other bits.
    """
    inputs = Trace(reference)
    manifest = read_manifest(checkpoint)
    require_same_weights(checkpoint, manifest["source"], f"'{reference}' was recorded from", inputs.provenance.get("checkpoint", {}))
    if unknown := [name for name in cases if name not in inputs.cases]:
        raise InputError(f"trace '{reference}' has no case {', '.join(unknown)}; it has {', '.join(inputs.cases)}")
    if precision.products != "float32" and precision.dtype != "float32":
        raise InputError(f"products in {precision.products} are for float32, not for {precision.dtype}")
    if memory_budget is not None and mode != "eager":
        raise InputError(f"a memory budget needs mode 'eager': in mode '{mode}' TensorFlow hands over all taps at once")

    with _on_device(device, precision) as name_of_device:
        environment = probes.examine()
        if environment.broken:
            raise DeviceUnavailableError(f"TensorFlow computes garbage on this machine: {environment.broken[0].name}\n  {probes.REMEDY}")
        from tfmaskformer.checkpoint import load
        from tfmaskformer.module import parameter_specs

        model = load(checkpoint, POLICIES[precision.dtype])
        provenance = {
            "framework": "tensorflow",
            "tool": f"tfmaskformer {tfmaskformer.__version__}",
            "checkpoint": manifest["source"],
            "sources": {
                "tensors": [{key: tensor[key] for key in ("source", "target")} for tensor in manifest.get("tensors", ())],
                "dropped": manifest.get("dropped", []),
            },
            "config": model.config.to_dict(),
            "variables": {name: spec.trainable for name, spec in parameter_specs(model).items()},
            **dataclasses.asdict(precision),
            "mode": mode,
            "device": {"kind": device, "name": name_of_device},
            "gradients": gradients,
            "environment": dataclasses.asdict(environment),
        }
        names = cases or inputs.cases
        described = {name: inputs.manifest["cases"][name] for name in names}
        keys = record.begin(Path(directory), provenance, described, command)
        for name in names:
            if record.is_recorded(Path(directory), name, precision.dtype, keys[name]):
                record.say(f"{name}: there already")
                continue
            with inputs.case(name) as case:
                facts = {"key": keys[name], "reference": case.reference.facts["key"]}
                results = _results(model, case, precision, mode, gradients, memory_budget)
                _write(Path(directory), name, precision.dtype, results, facts)
            record.say(f"{name}: {precision}, {mode}, on {name_of_device}")
    if warning := over_budget(memory_budget):
        record.say(f"warning: {warning}")
    return Trace(directory)


def _results(model: Any, case: Case, precision: Precision, mode: str, gradients: bool, memory_budget: int | None) -> CaseResults:
    inputs = judge.case_inputs(case, "float64" if precision.dtype == "float64" else "float32", every_assignment=precision.is_low)
    of_taps, is_eager = "all" if gradients else "none", mode == "eager"
    [results] = run(model, [inputs], mode=mode, gradients=of_taps, memory_budget=memory_budget, results=is_eager)
    bits = record.Bits(lambda *_: None, f"{case.name}, {precision}, {mode}")
    if is_eager:
        for group in UNTAPPED:
            for name, tensor in results.groups.get(group, {}).items():
                bits.remember(group, name, tensor)
    of_parameters = "parameters" if gradients else "none"
    [alone] = run(model, [inputs], mode=mode, gradients=of_parameters, memory_budget=memory_budget, tapped=False)
    if not is_eager:
        return dataclasses.replace(
            alone, groups={**results.groups, **{group: alone.groups[group] for group in UNTAPPED & alone.groups.keys()}}
        )
    for group in UNTAPPED & alone.groups.keys():
        for name, tensor in alone.groups[group].items():
            bits.compare(group, name, tensor)
    return results


def _write(directory: Path, case: str, dtype: str, results: CaseResults, facts: Mapping[str, Any]) -> None:
    with TraceFileWriter(directory, case, dtype, runs=("tensorflow",), samples=None, facts=facts) as writer:
        for group, tensors in results.groups.items():
            for name in tensors:
                writer.add(group, name, _storable(results.official(group, name)))
        for group, tensors in results.exact.items():
            for name, tensor in tensors.items():
                writer.add(f"{group}_float64", name, tensor)


def _storable(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float32) if tensor.dtype.name == "bfloat16" else tensor


@contextlib.contextmanager
def _on_device(device: str, precision: Precision) -> Iterator[str]:
    """Inside, TensorFlow computes on the device, in the precision; gives the device's name."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    try:
        if device == "tpu":
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
            tf.config.experimental_connect_to_cluster(resolver)
            tf.tpu.experimental.initialize_tpu_system(resolver)
        found = tf.config.list_logical_devices(device.upper())
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise DeviceUnavailableError(f"cannot use a {device.upper()}: {error}") from error
    if not found:
        raise DeviceUnavailableError(
            f"TensorFlow sees no {device.upper()} here\n  pip install 'tfmaskformer[{device}]', or take --device cpu"
        )
    physical = next(iter(tf.config.list_physical_devices(device.upper())), None)
    details = tf.config.experimental.get_device_details(physical) if device == "gpu" and physical else {}
    by_hardware = (device, precision.products) in (("gpu", "tf32"), ("tpu", "bfloat16"))
    allowed = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(by_hardware)
    try:
        with tf.device(found[0].name), contextlib.nullcontext() if by_hardware else rounded_products(PRODUCTS[precision.products]):
            yield details.get("device_name", found[0].name.rpartition("device:")[2])
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(allowed)


@contextlib.contextmanager
def rounded_products(dropped_bits: int) -> Iterator[None]:
    """Inside, the operands of float32 matrix products and convolutions lose so many bits of their mantissa, as some devices do to them.

    Sums are in float32. Gradients pass the rounding as they are; their own products are not rounded.
    """
    import tensorflow as tf

    if dropped_bits == 0:
        yield
        return

    @tf.custom_gradient
    def rounded(tensor: Any) -> Any:
        bits = tf.bitcast(tensor, tf.uint32)
        odd = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, tf.constant(dropped_bits, tf.uint32)), tf.constant(1, tf.uint32))
        bits += tf.constant((1 << (dropped_bits - 1)) - 1, tf.uint32) + odd  # to the nearest, ties to even
        kept = tf.bitwise.bitwise_and(bits, tf.constant(0xFFFFFFFF >> dropped_bits << dropped_bits, tf.uint32))
        return tf.bitcast(kept, tf.float32), lambda gradient: gradient

    def of_rounded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(left: Any, right: Any, *arguments: Any, **named: Any) -> Any:
            operands = [
                rounded(operand) if operand.dtype == tf.float32 else operand for operand in map(tf.convert_to_tensor, (left, right))
            ]
            return function(*operands, *arguments, **named)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in ((tf, "matmul"), (tf.nn, "conv2d"), (tf.Tensor, "__matmul__")):
            stack.enter_context(mock.patch.object(owner, name, of_rounded(getattr(owner, name))))
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``parity-check record --framework tensorflow``."""
    parser.add_argument("--framework", choices=("tensorflow",), required=True, help="without it, the official PyTorch code is recorded")
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="the checkpoint, written by convert")
    parser.add_argument(
        "--reference", required=True, metavar="DIR", help="a trace of the official code, or its inputs ('parity-check inputs')"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the trace; cases that are there already are kept")
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="record this case only; may be given again")
    parser.add_argument("--dtype", choices=tuple(POLICIES), default="float32", help="what TensorFlow computes in (default: %(default)s)")
    parser.add_argument(
        "--products",
        choices=tuple(PRODUCTS),
        default="float32",
        help="what the operands of float32 products are rounded to: tf32 by GPUs that are allowed to, bfloat16 by TPUs; a CPU does it in "
        "software (default: %(default)s)",
    )
    parser.add_argument("--mode", choices=MODES, default="graph", help="how TensorFlow runs (default: %(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where it runs (default: %(default)s)")
    parser.add_argument("--no-gradients", action="store_true", help="leave out all gradients, and the memory that they need")
    parser.add_argument(
        "--memory-budget", metavar="BYTES", help="with --mode eager: what taps take beyond an eighth of it goes to a temporary file"
    )


def run_command(arguments: argparse.Namespace) -> int:
    """``parity-check record --framework tensorflow``: 0 recorded, 2 bad input, 3 could not run. Prints the path of the trace."""
    try:
        budget = record.memory_budget(arguments)
    except InputError as error:
        record.say(f"error: {error}")
        return 2
    prepare(budget)
    from tfmaskformer.checkpoint import CheckpointError

    try:
        record_tensorflow(
            arguments.ckpt,
            arguments.reference,
            arguments.out,
            precision=Precision(arguments.dtype, arguments.products),
            mode=arguments.mode,
            device=arguments.device,
            cases=arguments.case,
            gradients=not arguments.no_gradients,
            memory_budget=budget,
            command=_command(arguments),
        )
    except (InputError, TraceError, CheckError, CheckpointError) as error:
        record.say(f"error: {error}")
        return 2
    except (DeviceUnavailableError, RecordError) as error:
        record.say(f"error: {error}")
        return 3
    print(arguments.out)
    return 0


def _command(arguments: argparse.Namespace) -> list[str]:
    """The command that was given, without the folders of this machine."""
    names = {option: Path(getattr(arguments, option)).name for option in ("ckpt", "reference", "out")}
    options = [part for option, name in names.items() for part in (f"--{option}", name)]
    for option in ("dtype", "products", "mode", "device"):
        options += [f"--{option}", getattr(arguments, option)]
    for name in arguments.case:
        options += ["--case", name]
    return ["parity-check", "record", "--framework", "tensorflow", *options, *(["--no-gradients"] if arguments.no_gradients else [])]
