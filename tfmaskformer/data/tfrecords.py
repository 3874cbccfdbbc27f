"""TFRecord shards of a data set: built in parallel, resumed after a kill, checked when they are read.

A build writes ``manifest.json`` first and again after each shard. A shard is finished once the manifest has it with its SHA-256: then it is
whole under its final name (written under another one and renamed; in a bucket, where an object appears whole or not at all, put there in
one piece), and no later build of the same plan touches it. docs/data.md has the features of a record.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import PIL
import tensorflow as tf

from tfmaskformer.data import examples
from tfmaskformer.data.datasets import DataSet
from tfmaskformer.data.layouts import LAYOUTS
from tfmaskformer.data.listing import read_file, write_file
from tfmaskformer.data.records import DataError, Problem

MANIFEST = "manifest.json"
FORMAT = 1
IMAGES_PER_SHARD = 128
"""Of a build that is not told how many shards to make."""


class DestinationError(DataError):
    """The folder of a build holds something else; nothing was written."""


class Shard(NamedTuple):
    """A finished shard, and the problems of the images that were left out of it."""

    records: int
    bytes: int
    sha256: str
    problems: tuple[Problem, ...]


def build(
    dataset: DataSet,
    destination: str | os.PathLike[str],
    *,
    shards: int | None = None,
    processes: int = 1,
    on_error: str = "stop",
    deeplab2: bool = False,
    progress: Callable[[int, int], None] = lambda done, images: None,
) -> dict[str, Any]:
    """Writes all samples in order, or what an earlier build of the same plan has not written.

    Args:
        dataset: what to write.
        destination: folder, a path or ``gs://…``; made if it is not there.
        shards: how many; default one for :data:`IMAGES_PER_SHARD` images.
        processes: how many write shards at the same time; 1 writes in this one.
        on_error: "stop" at bad data (finished shards stay), or "skip" its image.
        deeplab2: also write DeepLab2's panoptic labels, 4 bytes a pixel.
        progress: is called with the number of images in finished shards and of all.

    Returns:
        the manifest: the plan, each shard's records, bytes, SHA-256 and the problems of images that were left out, and the listing's.

    Raises:
        DataError: bad data.
        DestinationError: another build's files in ``destination``.
        OSError, tf.errors.OpError: a file cannot be written.
    """
    listed: list[dict[str, str]] = []
    dataset.check_listing(on_error, lambda problem: listed.append(dataclasses.asdict(problem)))
    folder, images = os.fspath(destination), len(dataset.records)
    count = shards or max(1, -(-images // IMAGES_PER_SHARD))
    plan = _plan(dataset, count, deeplab2)
    names = [f"{dataset.split}-{index:05}-of-{count:05}.tfrecord" for index in range(count)]
    bounds = [images * index // count for index in range(count + 1)]
    manifest = _resumed(folder, plan)
    finished = manifest["shards"]
    for name, shard in list(finished.items()):
        skipped = on_error == "stop" and shard["problems"]
        if skipped or not _is_there(os.path.join(folder, name), shard["bytes"]):
            del finished[name]
    sizes = {name: bounds[index + 1] - bounds[index] for index, name in enumerate(names)}

    tasks = {
        name: _Task(
            dataclasses.replace(dataset, records=dataset.records[bounds[index] : bounds[index + 1]], problems=()),
            os.path.join(folder, name),
            on_error,
            deeplab2,
        )
        for index, name in enumerate(names)
        if name not in finished
    }
    manifest["complete"] = not tasks
    progress(sum(sizes[name] for name in finished), images)
    for name, shard in _run(tasks, processes):
        finished[name] = shard._asdict() | {"problems": [dataclasses.asdict(problem) for problem in shard.problems]}
        _write_manifest(folder, manifest)
        progress(sum(sizes[name] for name in finished), images)
    manifest |= {"shards": {name: finished[name] for name in names}, "complete": True, "problems": listed}
    _write_manifest(folder, manifest)
    return manifest


def read(directory: str | os.PathLike[str], *, verify: bool = True) -> tf.data.Dataset:
    """The samples of a complete build, in the official order, as :func:`from_disk` makes them of the files, bit for bit.

    Args:
        directory: what :func:`build` wrote.
        verify: compare each shard's SHA-256 before it is read, which reads it twice. Each record's own checksum is always compared.

    Raises:
        DataError: no manifest there, or of a build that is not complete. Reading a damaged shard raises ``tf.errors.OpError``.
    """
    manifest = read_manifest(directory)
    layout = LAYOUTS[manifest["plan"]["dataset"]]
    paths = [os.path.join(os.fspath(directory), name) for name in manifest["shards"]]
    digests = [shard["sha256"] for shard in manifest["shards"].values()]

    def checked(path, digest):
        actual = _sha256(path.decode())
        if actual != digest.decode():
            raise DataError(Problem("damaged shard", path.decode(), f"SHA-256 {digest.decode()}", actual), "remove it and build again")
        return path

    files = tf.data.Dataset.from_tensor_slices((paths, digests))
    if verify:
        files = files.map(lambda path, digest: (tf.ensure_shape(tf.numpy_function(checked, (path, digest), tf.string), []), digest))
    records = files.flat_map(lambda path, digest: tf.data.TFRecordDataset(path))
    elements = records.map(lambda record: examples.parse(record, layout), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    count = sum(shard["records"] for shard in manifest["shards"].values())
    return elements.apply(tf.data.experimental.assert_cardinality(count))


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a complete build.

    Raises:
        DataError: none there, or of a build that is not complete.
    """
    file = os.path.join(os.fspath(directory), MANIFEST)
    manifest = _manifest(file)
    if manifest is None:
        raise DataError(Problem("missing file", file, "the manifest of a TFRecord build", "none"), "build it: tfmaskformer data tfrecords")
    if not manifest["complete"]:
        got = f"{len(manifest['shards'])} of {manifest['plan']['shards']} shards"
        raise DataError(Problem("unfinished build", file, "all shards", got), "go on with it: repeat 'tfmaskformer data tfrecords …'")
    return manifest


def from_disk(dataset: DataSet) -> tf.data.Dataset:
    """The samples of a data set read from its own files, as :func:`~tfmaskformer.data.examples.element_spec` says.

    Bad data raises ``tf.errors.OpError``, of which :func:`bad_data` tells the problem.
    """
    return tf.data.Dataset.range(len(dataset.records)).map(reader(dataset), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def reader(dataset: DataSet) -> Callable[[tf.Tensor], dict[str, Any]]:
    """What reads one sample, by its number in ``dataset.records`` (int64 scalar), inside a ``tf.data`` pipeline; see :func:`from_disk`."""
    spec = examples.element_spec(dataset.layout)

    def load(index):
        try:
            return tf.nest.flatten(examples.element(dataset.load(dataset.records[index])))
        except DataError as error:
            _found.append(error)
            raise

    def element(index):
        values = tf.numpy_function(load, [index], [leaf.dtype for leaf in tf.nest.flatten(spec)])
        return tf.nest.map_structure(lambda value, leaf: tf.ensure_shape(value, leaf.shape), tf.nest.pack_sequence_as(spec, values), spec)

    return element


_found: list[DataError] = []
"""What :func:`reader` raised: TensorFlow hands on the text alone, between a traceback and the names of nodes."""


def bad_data(error: BaseException) -> DataError | None:
    """The bad data because of which a pipeline with a :func:`reader` raised ``error``; None if it was something else."""
    return next((found for found in _found if str(found) in str(error)), None)


@dataclasses.dataclass(frozen=True)
class _Task:
    """What a process needs to write one shard; ``dataset`` has its records only."""

    dataset: DataSet
    path: str
    on_error: str
    deeplab2: bool


def _run(tasks: dict[str, _Task], processes: int) -> Iterator[tuple[str, Shard]]:
    if processes == 1 or len(tasks) < 2:
        yield from ((name, _write_shard(task)) for name, task in tasks.items())
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # TensorFlow is imported once
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(tasks)), context, _initialize) as executor:
        futures = {executor.submit(_write_shard, task): name for name, task in tasks.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def _initialize() -> None:
    """Has this process leave Ctrl-C to the one that builds, and end when that is killed: it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end():
            parent.join()
            os._exit(1)

        threading.Thread(target=end, daemon=True).start()


def _write_shard(task: _Task) -> Shard:
    local = "://" not in task.path
    problems: list[Problem] = []
    records = 0
    # Beside its final place, so that a rename is enough, or on this machine's disk.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=os.path.dirname(task.path) if local else None) as scratch:
        file = os.path.join(scratch, "shard")
        with tf.io.TFRecordWriter(file) as writer:
            for sample in task.dataset.samples(task.on_error, problems.append):
                writer.write(examples.example(sample, task.dataset, task.deeplab2).SerializeToString(deterministic=True))
                records += 1
        size, digest = os.path.getsize(file), _sha256(file)
        if local:
            os.replace(file, task.path)
        else:
            tf.io.gfile.copy(file, task.path, overwrite=True)
    return Shard(records, size, digest, tuple(problems))


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plan(dataset: DataSet, shards: int, deeplab2: bool) -> dict[str, Any]:
    """All that the bytes of the shards depend on, but for the files themselves."""
    listed = [
        [str(record.image_id), *(path and os.path.relpath(path, dataset.root) for path in (record.image, record.panoptic, record.semantic))]
        + [list(segment) for segment in record.segments]
        for record in dataset.records
    ]
    return {
        "format": FORMAT,
        "dataset": dataset.name,
        "split": dataset.split,
        "images": len(dataset.records),
        "records_sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "shards": shards,
        "deeplab2": deeplab2,
        "pillow": PIL.__version__,
    }


def _resumed(folder: str, plan: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the same plan, or a new one, written."""
    file = os.path.join(folder, MANIFEST)
    manifest = _manifest(file)
    if manifest is None:
        if tf.io.gfile.isdir(folder) and any(name.endswith(".tfrecord") for name in tf.io.gfile.listdir(folder)):
            raise DestinationError(
                Problem("shards without a manifest", folder, "an empty folder, or a build of this command", "others"), _ELSEWHERE
            )
        tf.io.gfile.makedirs(folder)
        manifest = {"plan": plan, "complete": False, "shards": {}}
        _write_manifest(folder, manifest)
    if manifest["plan"] != plan:
        differing = [key for key in plan if manifest["plan"].get(key) != plan[key]]
        expected = ", ".join(f"{key} {manifest['plan'].get(key)}" for key in differing)
        raise DestinationError(Problem("another build", file, expected, ", ".join(str(plan[key]) for key in differing)), _ELSEWHERE)
    if "://" not in folder:  # what a killed build left
        for name in os.listdir(folder):
            if name.startswith(".building-"):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    return manifest


_ELSEWHERE = "choose another folder, or repeat the build that the manifest's 'plan' describes"


def _manifest(file: str) -> dict[str, Any] | None:
    try:
        manifest = json.loads(read_file(file))
    except tf.errors.NotFoundError:
        return None
    except ValueError as error:
        raise DestinationError(
            Problem("malformed JSON", file, "the manifest of a TFRecord build", str(error)), "remove the folder"
        ) from error
    if not isinstance(manifest, dict) or not {"plan", "complete", "shards"} <= manifest.keys():
        raise DestinationError(
            Problem("malformed manifest", file, "plan, complete and shards", type(manifest).__name__), "remove the folder"
        )
    return manifest


def _write_manifest(folder: str, manifest: dict[str, Any]) -> None:
    write_file(os.path.join(folder, MANIFEST), (json.dumps(manifest, indent=1) + "\n").encode())


def _is_there(path: str, size: int) -> bool:
    return tf.io.gfile.exists(path) and tf.io.gfile.stat(path).length == size
