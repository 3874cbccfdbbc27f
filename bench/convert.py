"""Converting a checkpoint, beside the least that any converter must do.

The floor is one unpickle (``pickle.load``, which the converter itself never calls), one TensorFlow checkpoint write of the same
tensors (making them TensorFlow's is not counted), one SHA-256 pass over the file and one re-read through TensorFlow's reader, one after
the other. The converter does more: it works out the model, checks every value, transposes, hashes each tensor, and compares.

Every run is a process of its own, with imports done and TensorFlow started before the clock; the two take turns.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from bench.common import gigabytes, progress, section
from checkpoints import registry, synthesize

ENTRY = "maskformer_panoptic_R50_bs64_554k"
TURNS = 7
FLOOR, CONVERT = "floor", "convert"
STEPS = ("unpickle", "write", "SHA-256", "re-read")


def main() -> int:
    """Measures and prints the section."""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "model_final.pkl"
        progress("  writing the synthetic checkpoint")
        tensors = synthesize.synthesize(registry.entry(ENTRY))
        synthesize.write_pickle({registry.v1_key(name): tensor for name, tensor in tensors.items()}, source)
        size_bytes = source.stat().st_size
        runs: dict[str, list[dict[str, float]]] = {FLOOR: [], CONVERT: []}
        for turn in range(TURNS):
            for name, results in runs.items():
                command = [sys.executable, "-m", "bench.convert", name, str(source), str(pathlib.Path(folder) / f"{name}{turn}")]
                environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
                results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout))
            progress(f"  turn {turn + 1} of {TURNS}")

    seconds = {name: [sum(run[step] for step in run if step != "peak_bytes") for run in results] for name, results in runs.items()}
    floor_s = statistics.median(seconds[FLOOR])
    rows = [
        [
            name,
            f"{statistics.median(seconds[name]):.2f} s",
            f"{min(seconds[name]):.2f} s",
            f"{statistics.median(seconds[name]) / floor_s:.2f}",
            f"{min(seconds[name]) / min(seconds[FLOOR]):.2f}",
            f"{max(run['peak_bytes'] for run in results) / size_bytes:.2f} × file",
        ]
        for name, results in runs.items()
    ]
    steps = ", ".join(f"{step} {statistics.median(run[step] for run in runs[FLOOR]):.2f} s" for step in STEPS)
    text = (
        f"`python -m bench.convert`: the synthetic {ENTRY}, {gigabytes(size_bytes)}; {TURNS} runs each, taken in turns, without imports. "
        f"The floor is the sum of {steps} (medians). Memory: the process's peak above what it has after its imports."
    )
    print(section("Conversion", text, ["", "median", "fastest", "ratio of medians", "ratio of fastest", "peak memory"], rows))
    return 0


def _resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _run(name: str, source: str, destination: str) -> int:
    """One measured run; prints seconds of each step and the peak memory as JSON."""
    import tensorflow as tf

    import tfmaskformer.model  # noqa: F401 - an import, which is not measured
    from converters.convert import convert

    tf.constant(0.0)  # starts TensorFlow's runtime
    results: dict[str, float] = {}

    @contextlib.contextmanager
    def measured(step: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        results[step] = time.perf_counter() - start_s

    before_bytes = _resident_bytes()
    if name == CONVERT:
        with measured(CONVERT):
            convert(source, destination)
    else:
        with measured("unpickle"), open(source, "rb") as file:
            arrays = pickle.load(file)["model"]
        tensors = [tf.constant(array) for array in arrays.values()]
        names = list(arrays)
        del arrays
        os.mkdir(destination)
        prefix = os.path.join(destination, "ckpt")
        with measured("write"):
            tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
        with measured("SHA-256"), open(source, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            digest.hexdigest()
        with measured("re-read"):
            reader = tf.train.load_checkpoint(prefix)
            for key in names:
                reader.get_tensor(key)
    results["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(_run(*sys.argv[1:]) if len(sys.argv) > 1 else main())
