"""The ``tf.distribute`` strategy for the devices that a user names."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator

import numpy as np
import tensorflow as tf


class DeviceError(RuntimeError):
    """There is no such device, or it cannot be used."""


def multiply_in_float32() -> None:
    """For all of the process; programs that were traced for XLA before stay what they are.

    TensorFlow would let a GPU multiply float32 with 10 bits of mantissa, and tell XLA that a TPU may take bfloat16, with 7.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)


def strategy_for(device: str | None = None, *, tpu: str = "", replicas: int = 1) -> tf.distribute.Strategy:
    """One device, all devices of a machine, or those of several machines.

    Where the environment's ``TF_CONFIG`` lists several workers, as for ``tf.distribute.MultiWorkerMirroredStrategy``, it is that one.

    Args:
        device: "tpu", "gpu" or "cpu"; None: the GPUs, if there are any, or the CPU.
        tpu: name, zone's resource or address of a TPU, "local" on a TPU VM; for ``TPUClusterResolver``.
        replicas: on how many logical devices the CPU is split; for tests.

    Raises:
        DeviceError: not there.
    """
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {})
        machines = sum(map(len, cluster.values()))
    except (ValueError, AttributeError, TypeError) as error:
        raise DeviceError(
            f"the environment's TF_CONFIG is not what TensorFlow reads: {error}\n  unset it, or see docs/evaluate.md"
        ) from error
    if machines > 1 and list(cluster) != ["worker"]:  # each would work by itself, in the same folders
        raise DeviceError(f"the environment's TF_CONFIG lists jobs {', '.join(sorted(cluster))}, expected all machines under 'worker'")
    try:
        multiply_in_float32()
        if device == "tpu":
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
            tf.config.experimental_connect_to_cluster(resolver)
            tf.tpu.experimental.initialize_tpu_system(resolver)
            return tf.distribute.TPUStrategy(resolver)
        if device == "cpu":
            tf.config.set_visible_devices([], "GPU")
        gpus = tf.config.get_visible_devices("GPU")
        if device == "gpu" and not gpus:
            raise DeviceError("TensorFlow sees no GPU\n  pip install 'tfmaskformer[gpu]', or choose --cpu")
        if replicas > 1:
            [cpu] = tf.config.get_visible_devices("CPU")
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
        if machines > 1:
            print(f"note: waits for all {machines} workers of TF_CONFIG", file=sys.stderr, flush=True)
            with _own_sigterm():
                return tf.distribute.MultiWorkerMirroredStrategy()
        if len(gpus) > 1:
            return tf.distribute.MirroredStrategy()
        if replicas > 1:
            return tf.distribute.MirroredStrategy([f"/cpu:{index}" for index in range(replicas)])
        return tf.distribute.OneDeviceStrategy("/gpu:0" if gpus else "/cpu:0")
    except (tf.errors.OpError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, DeviceError):
            raise
        told = f"{getattr(error, 'message', error)}".partition("\n")[0]
        if device == "tpu":
            raise DeviceError(f"cannot use the TPU {tpu!r}: {told}\n  docs/tpu.md tells what to install, and what may be wrong") from error
        raise DeviceError(f"cannot use {device or 'the devices'}: {told}") from error


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """TensorFlow's own handler, which workers get, tells its preemption service and goes on: ``kill`` would do nothing."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def worker(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """(n, i): how many processes run this program together, and which of them this one is."""
    cluster = strategy.cluster_resolver
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) or cluster is None:
        return 1, 0
    return len(cluster.cluster_spec().as_dict()["worker"]), cluster.task_id


def gathered(strategy: tf.distribute.Strategy, line: str) -> list[str]:
    """A line of text, not an empty one, of each worker, in their order; all of them must call this, and wait for each other."""
    if worker(strategy)[0] == 1:
        return [line]
    codes = np.frombuffer(f"{line}\n".encode(), np.uint8).astype(np.int32)
    local = len(strategy.extended.worker_devices)
    # The first replica of each worker tells; the others say nothing but an end of line.
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(codes if context.replica_id_in_sync_group % local == 0 else codes[-1:])
    )
    text = strategy.gather(values, axis=0).numpy().astype(np.uint8).tobytes().decode()
    return [line for line in text.split("\n") if line]
