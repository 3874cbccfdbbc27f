"""Converting a checkpoint between kinds, beside the least that any converter must do.

The floor of a pair is one read of the source, one write of the same tensors that waits for the disk (making them TensorFlow's or
PyTorch's is not counted), one SHA-256 pass over the source and one re-read of what was written, each with the kind's usual library and
one after the other. The converter does more: it works out the model, checks every value, transposes, hashes each tensor and compares
every byte.

Every run is a process of its own, with imports done and TensorFlow started before the clock; floor and converter take turns. Memory is
measured on the largest model.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
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
from typing import Any

import numpy as np

from bench.common import gigabytes, peak_memory_bytes, progress, section
from checkpoints import registry, synthesize

ENTRY = "maskformer_panoptic_R50_bs64_554k"
LARGEST = "maskformer_panoptic_swin_large_IN21k_384_bs64_554k"
TURNS = 7
LIBRARIES = {".pth": "torch", ".h5": "h5py", ".safetensors": "safetensors.numpy"}
"""The usual one of a kind."""
FLOOR, CONVERT = "floor", "convert"
SOURCES = ("model.pkl", "model.pth", "model.safetensors", "model.h5")
PAIRS = [(name, "tf_ckpt") for name in SOURCES] + [("tf_ckpt", name) for name in SOURCES]


def main() -> int:
    """Measures and prints the section."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        _make(ENTRY, place)
        rows = [_compared(place, source, target) for source, target in PAIRS]
        size_bytes = (place / SOURCES[0]).stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        _make(LARGEST, place)
        peaks = []
        for source, target in PAIRS:
            run = _run_apart(CONVERT, LARGEST, place / source, target)
            peaks.append(f"{source.partition('.')[2] or 'TensorFlow'} → {target.partition('.')[2] or 'TensorFlow'} {run['peak']:.2f} ×")
            progress(f"  memory of {peaks[-1]}")
        largest_bytes = (place / SOURCES[0]).stat().st_size
    text = (
        f"`python -m bench.convert`: the synthetic {ENTRY}, {gigabytes(size_bytes)}; {TURNS} runs each, taken in turns, without imports. "
        "The floor: read the source, write the tensors to the disk, SHA-256 of the source, read the result, each with the kind's usual "
        "library. "
        "Memory: the process's peak above what it has after its imports, as a multiple of the source's size; of "
        f"{LARGEST}, {gigabytes(largest_bytes)}: {', '.join(peaks)}."
    )
    header = ["", "floor", "convert", "ratio of medians", "ratio of fastest", "peak memory"]
    print(section("Conversion", text, header, rows))
    return 0


def _make(entry: str, place: pathlib.Path) -> None:
    from converters.convert import convert

    progress(f"  writing {entry} in every kind")
    source = place / SOURCES[0]
    synthesize.write_pickle(synthesize.synthesize(registry.entry(entry)), source)
    for name in (*SOURCES[1:], "tf_ckpt"):
        convert(source, place / name, entry)


def _compared(place: pathlib.Path, source: str, target: str) -> list[str]:
    runs: dict[str, list[dict[str, float]]] = {FLOOR: [], CONVERT: []}
    for _ in range(TURNS):
        for name, results in runs.items():
            results.append(_run_apart(name, ENTRY, place / source, target))
    seconds = {name: [run["seconds"] for run in results] for name, results in runs.items()}
    floor_s, convert_s = (statistics.median(seconds[name]) for name in (FLOOR, CONVERT))
    what = f"{source.partition('.')[2] or 'TensorFlow'} → {target.partition('.')[2] or 'TensorFlow'}"
    progress(f"  {what}: {convert_s / floor_s:.2f}")
    return [
        what,
        f"{floor_s:.2f} s",
        f"{convert_s:.2f} s",
        f"{convert_s / floor_s:.2f}",
        f"{min(seconds[CONVERT]) / min(seconds[FLOOR]):.2f}",
        f"{max(run['peak'] for run in runs[CONVERT]):.2f} ×",
    ]


def _run_apart(name: str, entry: str, source: pathlib.Path, target: str) -> dict[str, float]:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, "-m", "bench.convert", name, entry, str(source), str(pathlib.Path(folder) / target)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(result.stdout)


def _run(name: str, entry: str, source: str, target: str) -> int:
    """One measured run; prints its seconds and its peak memory as JSON."""
    import tensorflow as tf

    import tfmaskformer.model  # noqa: F401 - an import, which is not measured
    from converters.convert import convert

    for suffix in {pathlib.Path(path).suffix for path in (source, target)} & LIBRARIES.keys():
        importlib.import_module(LIBRARIES[suffix])
    tf.constant(0.0)  # starts TensorFlow's runtime
    elapsed_s = 0.0

    @contextlib.contextmanager
    def measured() -> Iterator[None]:
        nonlocal elapsed_s
        start_s = time.perf_counter()
        yield
        elapsed_s += time.perf_counter() - start_s

    before_bytes = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    if name == CONVERT:
        with measured():
            convert(source, target, entry)
    else:
        with measured():
            arrays = _read(pathlib.Path(source))
        prepared = _prepared(arrays, os.path.splitext(target)[1])
        with measured():
            _write(pathlib.Path(target), prepared)
        with measured():
            for file in _files(pathlib.Path(source)):
                digest = hashlib.sha256()
                with file.open("rb") as opened:
                    while block := opened.read(1 << 20):
                        digest.update(block)
                digest.hexdigest()
        with measured():
            _read(pathlib.Path(target))
    peak_bytes = peak_memory_bytes() - before_bytes
    source_bytes = sum(file.stat().st_size for file in _files(pathlib.Path(source)))
    print(json.dumps({"seconds": elapsed_s, "peak": peak_bytes / source_bytes}))
    return 0


def _prepared(arrays: dict[str, np.ndarray], suffix: str) -> dict[str, Any]:
    """The tensors as the library of the target takes them, which is not measured."""
    if suffix == "":
        import tensorflow as tf

        return {key: tf.constant(value) for key, value in arrays.items()}
    if suffix == ".pth":
        import torch

        return {key: torch.from_numpy(value) for key, value in arrays.items()}
    return arrays


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors, with the kind's usual library."""
    if path.is_dir():
        import tensorflow as tf

        reader = tf.train.load_checkpoint(str(path / "ckpt"))
        dtypes = reader.get_variable_to_dtype_map()
        return {key: reader.get_tensor(key) for key in dtypes if dtypes[key].is_floating}
    if path.suffix == ".pkl":
        with path.open("rb") as file:
            return pickle.load(file)["model"]
    if path.suffix == ".pth":
        import torch

        return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True)["model"].items()}
    if path.suffix == ".h5":
        import h5py

        with h5py.File(path) as file:
            return {name: file[name][()] for name in file}
    from safetensors.numpy import load_file

    return load_file(path)


def _write(path: pathlib.Path, tensors: dict[str, Any]) -> None:
    """All tensors, with the kind's usual library, down to the disk."""
    if not path.suffix:
        import tensorflow as tf

        path.mkdir()
        names = list(tensors)
        slices = [""] * len(names)
        tf.raw_ops.SaveV2(prefix=str(path / "ckpt"), tensor_names=names, shape_and_slices=slices, tensors=list(tensors.values()))
    elif path.suffix == ".pkl":
        with path.open("wb") as file:
            pickle.dump({"model": tensors}, file, 4)
    elif path.suffix == ".pth":
        import torch

        torch.save({"model": tensors}, path)
    elif path.suffix == ".h5":
        import h5py

        with h5py.File(path, "w") as file:
            for name, tensor in tensors.items():
                file.create_dataset(name.replace("/", "."), data=tensor)
    else:
        from safetensors.numpy import save_file

        save_file(tensors, path)
    for written in _files(path):
        with written.open("rb") as opened:
            os.fsync(opened.fileno())


if __name__ == "__main__":
    sys.exit(_run(*sys.argv[1:]) if len(sys.argv) > 1 else main())
