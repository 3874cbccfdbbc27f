"""Compiles a TensorFlow function for a TPU that is not there, and tells what it would need.

TensorFlow lowers the function to HLO, JAX's compile-only topology hands it to the TPU compiler in ``libtpu``; no TPU and no network
are involved. Needs the extra ``aot``, on Linux x86-64.

All that is unstable is in this file. Pieces without a promise, which is why the extra pins JAX: ``experimental_get_compiler_ir``
(TensorFlow); ``jax.extend.mlir.hlo_to_stablehlo``, ``jax.extend.backend.get_compile_options``, the topology device's
``client.compile`` and ``Sharding._internal_device_list`` (JAX).

What it cannot see: operations that TensorFlow registers for XLA on CPUs but not on TPUs (complex128), more than one replica, and
that a TPU updates variables in place: here their new values are outputs, which take memory of their own.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud's metadata server what machine this is
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling in several processes at once is safe: none holds a device
}
"""What JAX and libtpu read when they start. Set in this process, unless already set, before they are imported."""

EXAMPLES = "one like 'v5e:2x2', 'v4:2x2x1' or 'v6e:2x2'"

EFFORT = -1.0
"""Of optimising for execution time: −1 compiles several times faster than the TPU runtime's 0, with the same checks.

The peak is about the same; temporaries and code are not. Measured with libtpu 0.0.42, the evaluation step of ``tiny_panoptic`` for four
images of 256×256 px: peak 51.8 MB at −1 and 52.0 MB at 0, temporaries 57.9 and 24.8 MB, code 23.6 and 50.7 MB, in 28 and 154 s of CPU.
"""


class AotError(RuntimeError):
    """The function does not compile for a TPU, or nothing here can compile it; the message says why and what to do."""


class UnavailableError(AotError):
    """The compiler is not installed."""


class TargetError(AotError):
    """There is no such TPU."""


class TooLargeError(AotError):
    """The program does not fit into the memory of the device."""


@dataclasses.dataclass(frozen=True)
class CompiledStats:
    """What the TPU compiler says of one program on one core."""

    topology: str
    peak_hbm_bytes: int  # arguments, outputs and temporaries at their worst moment
    argument_bytes: int  # the inputs and the variables that the function reads
    output_bytes: int
    temp_bytes: int  # these and code change with EFFORT; all together, temporaries may be more than the peak
    code_bytes: int
    flops: float
    rematerialized: int  # instructions that are computed again, because keeping their results would take more memory than there is


def compile_for_tpu(fn: Callable[..., Any], *specs: tf.TensorSpec, topology: str = "v5e:2x2") -> CompiledStats:
    """Compiles ``fn(*specs)`` for one core of ``topology``.

    Args:
        fn: a Python function of tensors, as one would give to ``tf.function``; variables that it reads count as arguments.
        specs: dtype and static shape of each argument.
        topology: TPU generation and chips, e.g. "v5e:2x2", "v4:2x2x1", "v6e:2x2".

    Raises:
        AotError: a shape is not static, an operation has no XLA kernel, an output's shape depends on data, the program does not
            fit into the memory of the device, the topology is unknown, or the extra ``aot`` is not installed.
    """
    for spec in specs:
        if not spec.shape.is_fully_defined():
            raise AotError(f"{spec} has no static shape\n  a TPU program is compiled for one shape; give every dimension a number")
    device = _device(topology)
    import jax
    from jax.extend import backend, mlir
    from jax.extend.mlir import ir

    hlo = _hlo(fn, specs)
    options = backend.get_compile_options(num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]]))
    options.executable_build_options.exec_time_optimization_effort = EFFORT
    with jax.jit(lambda: 0).lower().compiler_ir("stablehlo").context:
        module = ir.Module.parse(mlir.hlo_to_stablehlo(hlo))
        _drop_mhlo_copies(module.body)
        try:
            executable = device.client.compile(module, jax.sharding.SingleDeviceSharding(device)._internal_device_list, options)
        except jax.errors.JaxRuntimeError as error:
            refused = f"the compiler for {topology} refuses the program: {str(error).splitlines()[0]}"
            if re.search(r"Ran out of memory (on|in memory space) hbm", str(error), re.IGNORECASE):
                raise TooLargeError(f"{refused}\n  take a smaller --batch or --size; in training --rematerialise") from error
            raise AotError(refused) from error
    program = executable.hlo_modules()[0].to_string()
    entry = program.split("\n", 1)[0]
    if "[<=" in entry:
        layout = re.search(r"entry_computation_layout=\{(.*?)\}, \w", entry)
        raise AotError(
            f"the shape of an output depends on data: {layout[1] if layout else entry}\n"
            "  replace what selects or counts (tf.where, tf.boolean_mask, tf.unique) by masks at a fixed shape"
        )
    memory, cost = executable.get_compiled_memory_stats(), executable.cost_analysis()
    return CompiledStats(
        topology=topology,
        peak_hbm_bytes=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=cost.get("flops", 0.0),
        rematerialized=len(re.findall(r"^\s*(?:ROOT )?%\S*\.remat\S* =", program, flags=re.MULTILINE)),
    )


def check_target(topology: str) -> None:
    """Raises UnavailableError or TargetError where nothing can be compiled for ``topology``."""
    _device(topology)


def _device(topology: str) -> Any:
    """A device of a topology that is not there."""
    if not re.fullmatch(r"\w+:\d+(x\d+)+", topology):  # JAX would take others for a default
        raise TargetError(f"no topology {topology!r}\n  expected {EXAMPLES}")
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    try:
        import jax
        from jax.experimental import topologies

        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    except ImportError as error:
        raise UnavailableError(f"cannot import JAX: {error}\n  install the extra: pip install 'tfmaskformer[aot]'") from error
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        raise TargetError(f"no topology {topology!r}: {message}\n  expected {EXAMPLES}") from error


def _hlo(fn: Callable[..., Any], specs: tuple[tf.TensorSpec, ...]) -> bytes:
    """The serialised HLO module of ``fn`` as TensorFlow lowers it for XLA."""
    compiled = tf.function(fn, jit_compile=True, autograph=False)
    try:
        return compiled.experimental_get_compiler_ir(*specs)(stage="hlo_serialized", platform_name="CPU")
    except ValueError as error:
        unsupported = re.search(r"Detected unsupported operations.*?: (\w+) \(.*?\{\{node ([^}]+)\}\}", str(error), flags=re.DOTALL)
        if unsupported is None:
            raise AotError(f"TensorFlow cannot lower the function to XLA: {error}") from error
        lines = [line for line in re.findall(r'File "(.*?)", line (\d+)', str(error)) if "/tensorflow/" not in line[0]]
        where = f", made at {lines[-1][0].rsplit('/', 1)[-1]}:{lines[-1][1]}" if lines else ""
        raise AotError(
            f"operation {unsupported[1]} ('{unsupported[2]}'{where}) has no XLA kernel\n  write it with operations that run on the device"
        ) from error


def _drop_mhlo_copies(block: Any) -> None:
    """Removes ``mhlo.copy`` (an identity, with which TensorFlow marks new values of variables): JAX knows only StableHLO."""
    for view in list(block.operations):
        operation = view.operation
        for region in operation.regions:
            for inner in region.blocks:
                _drop_mhlo_copies(inner)
        if operation.name == "mhlo.copy":
            operation.results[0].replace_all_uses_with(operation.operands[0])
            operation.erase()
