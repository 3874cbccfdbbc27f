"""The environment's self-test: whether TensorFlow computes right on this machine, before anything is concluded from it.

TensorFlow 2.20 and 2.21 with oneDNN on AVX-512 silently return garbage for ``tf.matmul`` of a 4-D by a 2-D tensor at batch 1. The model
never makes that call; it is probed for all the same and said, because whoever writes the next layer should know. It also corrupts
memory, so that the process dies sooner or later: it is probed in a process of its own. The operations that the model does use are
compared with NumPy in float64, in this process.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from parity.trace import relative_error

PROBE_TOLERANCE = 1e-5
"""Relative L2. Correct float32 kernels are within 1e-6 of float64 at these sizes, the broken one is off by 1e0."""

REMEDY = "set TF_ENABLE_ONEDNN_OPTS=0 (or ONEDNN_MAX_CPU_ISA=AVX2) and run again, or use another build of TensorFlow"

INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")
"""CPU flags that decide which kernels run."""


AVOIDED = "tf.matmul [6,1,100,256]×[256,256]"
_AVOIDED_PROBE = """
import numpy, tensorflow
random = numpy.random.default_rng(0)
a, b = (random.standard_normal(shape).astype("float32") for shape in ((6, 1, 100, 256), (256, 256)))
expected = a.astype("float64") @ b.astype("float64")
print(numpy.linalg.norm(tensorflow.matmul(a, b).numpy() - expected) / numpy.linalg.norm(expected), flush=True)
"""
_AVOIDED_LIMIT_S = 120


@dataclasses.dataclass(frozen=True)
class Probe:
    """One operation against NumPy in float64.

    Attributes:
        name: the operation and its sizes.
        used: whether the model uses it.
        error: relative L2 error; inf if there was no result.
    """

    name: str
    used: bool
    error: float

    @property
    def passed(self) -> bool:
        """The error is no more than float32 explains."""
        return self.error <= PROBE_TOLERANCE


@dataclasses.dataclass(frozen=True)
class Environment:
    """What computes, and whether it does so right.

    Attributes:
        versions: of Python and the packages that decide numbers.
        cpu: machine and those of :data:`INSTRUCTION_SETS` that it has.
        onednn: the setting of ``TF_ENABLE_ONEDNN_OPTS``, or "default".
        threads: "intra-op" and "inter-op" threads of TensorFlow; 0 lets it choose.
    """

    versions: dict[str, str]
    cpu: str
    onednn: str
    threads: dict[str, int]
    probes: tuple[Probe, ...]

    @property
    def broken(self) -> tuple[Probe, ...]:
        """Operations that the model uses and that are wrong here."""
        return tuple(probe for probe in self.probes if probe.used and not probe.passed)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is wrong here and does not matter to the model."""
        avoided = [probe for probe in self.probes if not probe.used and not probe.passed]
        return tuple(f"{probe.name} is broken here (error {probe.error:.1e}); the model never calls it" for probe in avoided)


@functools.cache
def examine() -> Environment:
    """Runs all probes, once in a process: some seconds, the time that TensorFlow takes to be imported elsewhere."""
    avoided = subprocess.Popen(
        [sys.executable, "-c", _AVOIDED_PROBE],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
    )
    import tensorflow as tf

    probes = [Probe(name, True, relative_error(*pair())) for name, pair in _probes()]
    return Environment(
        versions={"python": platform.python_version()} | {name: _version(name) for name in ("tensorflow", "keras", "numpy")},
        cpu=f"{platform.machine()} ({', '.join(_cpu_flags()) or 'flags unknown'})",
        onednn=os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
        threads={
            "intra-op": tf.config.threading.get_intra_op_parallelism_threads(),
            "inter-op": tf.config.threading.get_inter_op_parallelism_threads(),
        },
        probes=(*probes, Probe(AVOIDED, False, _printed(avoided))),
    )


def _printed(process: subprocess.Popen[str]) -> float:
    """The error that the probe printed before it ended, or crashed."""
    try:
        text, _ = process.communicate(timeout=_AVOIDED_LIMIT_S)
        return float(text)
    except (subprocess.TimeoutExpired, ValueError):
        process.kill()
        process.wait()
        return math.inf


def _probes() -> list[tuple[str, Callable[[], tuple[np.ndarray, np.ndarray]]]]:
    """Operations that the model uses: name, and a function that returns TensorFlow's float32 and NumPy's float64 result."""
    import tensorflow as tf

    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    def against(function: Callable[..., Any], oracle: Callable[..., np.ndarray], *arrays: np.ndarray) -> Any:
        def pair() -> tuple[np.ndarray, np.ndarray]:
            return function(*map(tf.constant, arrays)).numpy(), oracle(*(array.astype(np.float64) for array in arrays))

        return pair

    queries, weight, logits = draw(600, 256), draw(256, 256), draw(1, 100, 134)
    heads, images, kernel = draw(1, 8, 100, 32), draw(1, 21, 30, 64), draw(3, 3, 64, 64)
    margin = [[0, 0], [1, 1], [1, 1], [0, 0]]
    rows = np.array([[4, 0, 4, 2]], np.int32)
    return [
        ("tf.matmul [600,256]×[256,256]", against(tf.matmul, np.matmul, queries, weight)),
        (
            "tf.matmul [1,8,100,32]×[1,8,100,32]ᵀ",
            against(lambda a: tf.matmul(a, a, transpose_b=True), lambda a: a @ a.swapaxes(2, 3), heads),
        ),
        ("tf.einsum qc,qhw->chw", against(_einsum(tf), _einsum(np), queries[:20, :8], draw(20, 13, 17))),
        ("tf.nn.conv2d 1×1", against(lambda x, k: tf.nn.conv2d(x, k, 1, "VALID"), _convolve(1, 0), images, kernel[:1, :1])),
        ("tf.nn.conv2d 3×3", against(lambda x, k: tf.nn.conv2d(x, k, 1, "SAME"), _convolve(1, 1), images, kernel)),
        ("tf.nn.conv2d 3×3 stride 2", against(lambda x, k: tf.nn.conv2d(x, k, 2, margin), _convolve(2, 1), images, kernel)),
        ("tf.nn.softmax", against(tf.nn.softmax, _softmax, logits)),
        (
            "tf.gather batch_dims=1",
            against(lambda x: tf.gather(x, rows, axis=1, batch_dims=1), lambda x: x[:, rows[0]], images),
        ),
    ]


def _einsum(module: Any) -> Callable[..., Any]:
    return lambda a, b: module.einsum("qc,qhw->chw", a, b)


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _convolve(stride: int, margin: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def convolve(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        padded = np.pad(images, [(0, 0), (margin, margin), (margin, margin), (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], (1, 2))[:, ::stride, ::stride]
        return np.einsum("bhwiyx,yxio->bhwo", windows, kernel, optimize=True)

    return convolve


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu", f"{package}-tpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = next((line.split() for line in text.splitlines() if line.startswith(("flags", "Features"))), [])
    return [name for name in INSTRUCTION_SETS if name in flags]
