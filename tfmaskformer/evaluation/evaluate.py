"""Evaluates a checkpoint on a data set: reads, resizes and batches images, runs the model on any device of TensorFlow, and counts.

The flow is that of the official ``train_net.py --eval-only``: the test transform, ``MaskFormer.forward``, results at the size of the
original image, and the evaluators that it builds for the data set (docs/evaluation.md). Different is how it runs. Images lie on a few
canvases of fixed shape with masked padding, so that XLA compiles few programs; counts add up exactly, so that they do not depend on who
counts what; and they are saved with the ids of the images that are in them, so that an evaluation that was killed goes on.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow as tf

import tfmaskformer
from checkpoints import registry
from tfmaskformer import checkpoint
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.data.datasets import Sample
from tfmaskformer.data.listing import read_file, write_file
from tfmaskformer.data.preprocessing import resize_shortest_edge, resized_shape
from tfmaskformer.data.records import DataError, Problem
from tfmaskformer.evaluation.augmentation import Augmentation, augmented_images
from tfmaskformer.evaluation.canvases import Canvas, choose_canvases
from tfmaskformer.evaluation.counts import Counts, ids_of
from tfmaskformer.evaluation.devices import gathered, worker
from tfmaskformer.evaluation.instances import instance_truth
from tfmaskformer.evaluation.results import JSON_NAME, PNG_FOLDER, _mask_api, encode_png, semantic_annotations
from tfmaskformer.evaluation.sources import EvaluationError, Source
from tfmaskformer.model import MaskFormer
from tfmaskformer.static_inference import static_panoptic_inference, static_semantic_inference

FORMAT = 1
SAVE_EVERY = 100
"""Images."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Room(NamedTuple):
    """A canvas, and (height, width) of the model's input for each view of an image on it: the image itself, or its augmentations."""

    canvas: Canvas
    views: tuple[tuple[int, int], ...]


class _Ready(NamedTuple):
    """A sample, its views as the model takes them, each with whether it is mirrored, and the room for it."""

    sample: Sample
    views: list[tuple[np.ndarray, bool]]
    room: _Room


class _Steps(NamedTuple):
    """Functions that run on all replicas.

    Attributes:
        infer: images, their sizes and the original ones, and the output's canvas → (panoptic result, class of each pixel), each or None.
        scores: the same → semantic scores.
        add: a sum of scores, the scores of another view, original sizes and whether the view is mirrored → the sum of both.
        labels: a sum of scores, and of how many views → as ``infer``.
    """

    infer: Callable[..., Any]
    scores: Callable[..., Any]
    add: Callable[..., Any]
    labels: Callable[..., Any]


class Evaluation:
    """A model on its devices, and what it has seen of a data set.

    Args:
        directory: checkpoint directory.
        source: of this worker.
        strategy: whose replicas share the images.
        metrics: of :func:`metrics_of`.
        batch: images for each replica at a time.
        canvases: (height, width) of the model's input, px; default: :func:`choose_canvases`. With an augmentation, of the images that it
            begins with.
        augmentation: of each image at test time; for semantic results.
        on_error: "stop" at bad data, or "skip" its image.
        results: folder for the predictions in COCO's and Detectron2's formats; a path or ``gs://…``.
        resume: folder for what has been counted; an evaluation that is there already goes on.
        model: with the weights of the directory's last checkpoint; default: it is loaded from there.

    Raises:
        CheckpointError: no checkpoint there.
        EvaluationError: a canvas is too small, a folder cannot be made, or ``resume`` holds another evaluation.
        ImportError: pycocotools is missing, and needed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        source: Source,
        strategy: tf.distribute.Strategy,
        metrics: Sequence[str],
        *,
        batch: int = 1,
        canvases: Sequence[tuple[int, int]] | None = None,
        augmentation: Augmentation | None = None,
        on_error: str = "stop",
        results: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | None = None,
        model: MaskFormer | None = None,
    ):
        self.source, self.strategy, self.metrics = source, strategy, tuple(metrics)
        self._on_error, self._batch, self._augmentation = on_error, batch, augmentation
        self._results = None if results is None else os.fspath(results)
        self._state_file = None
        for folder in (results, resume):
            if folder is not None:
                _make(os.fspath(folder))
        if "instances" in metrics or (results is not None and "panoptic" not in metrics):
            _mask_api()  # for its error
        self._directory = directory
        self._plan = {} if model and resume is None else self._planned(directory)
        self.counts = Counts.none(metrics, source.info)
        if resume is not None:
            workers, index = worker(strategy)
            self._state_file = os.path.join(os.fspath(resume), f"state-{index}-of-{workers}.json")
            self._resume()
        with strategy.scope():
            self.model = model or checkpoint.load(directory)
        self._rooms = self._chosen(canvases)
        self._seconds = 0.0
        self._seen = 0
        self._saved = len(self.counts.done)

    @property
    def config(self) -> MaskFormerConfig:
        """Of the model."""
        return self.model.config

    @property
    def canvases(self) -> list[Canvas]:
        """On which the images lie."""
        return [room.canvas for room in self._rooms]

    def run(self, progress: Callable[[int, int], None] = lambda done, images: None) -> None:
        """Evaluates every image that is not in ``counts``, each once.

        Args:
            progress: is called with the number of this worker's images done and of all.

        Raises:
            DataError: bad data, with "stop". What was counted before is saved.
        """
        start_s, before = time.monotonic(), len(self.counts.done)
        most = self._batch * len(self.strategy.experimental_local_results(self._values(lambda replica: replica)))
        waiting: dict[_Room, list[_Ready]] = collections.defaultdict(list)

        def step(room):
            for ready, found in zip(waiting[room], self._infer(room, waiting[room], most), strict=False):
                self._count(ready.sample, *found)
            waiting[room].clear()
            progress(len(self.counts.done), self.source.share)
            if len(self.counts.done) - self._saved >= SAVE_EVERY:
                self.save()

        progress(len(self.counts.done), self.source.share)
        try:
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                for image_id, ready, problems in _ahead(pool, self._prepare, self.source.items(frozenset(self.counts.done))):
                    if ready is None:
                        self._skip(image_id, problems)
                        continue
                    waiting[ready.room].append(ready)
                    if len(waiting[ready.room]) == most:
                        step(ready.room)
                for room in list(waiting):
                    if waiting[room]:
                        step(room)
        except DataError:
            self.save()  # not after others, which may come in the middle of counting
            raise
        self.save()
        self._seconds += time.monotonic() - start_s
        self._seen += len(self.counts.done) - before

    def forget(self) -> None:
        """Begins anew, for a model that got other weights; what was compiled stays."""
        self.counts = Counts.none(self.metrics, self.source.info)
        self._seconds, self._seen, self._saved = 0.0, 0, 0

    def save(self) -> None:
        """Writes what has been counted, where there is a folder for it: whole, or not at all."""
        if self._state_file is not None:
            document = {"format": FORMAT, "plan": self._plan, "counts": self.counts.to_dict()}
            write_file(self._state_file, json.dumps(document).encode())
            self._saved = len(self.counts.done)

    def total(self) -> Counts:
        """The counts of all workers, each of which must call this."""
        if worker(self.strategy)[0] == 1:
            return self.counts
        parts = gathered(self.strategy, json.dumps(self.counts.to_dict()))
        return functools.reduce(
            lambda total, part: total + Counts.from_dict(json.loads(part)), parts, Counts.none(self.metrics, self.source.info)
        )

    def report(self, counts: Counts) -> dict[str, Any]:
        """All metrics of :meth:`total`'s counts in percent, and what they are of, for JSON."""
        skipped, plan = self.source.skipped + counts.skipped, self._plan or self._planned(self._directory)
        report: dict[str, Any] = {
            "format": "tfmaskformer-evaluation",
            "version": FORMAT,
            "metrics": counts.metrics(self.source.info),
            "checkpoint": plan["checkpoint"] | {"model": self.config.name, "published": _published(self.config.name)},
            "dataset": {"name": self.source.name, "split": self.source.split, "root": self.source.root},
            "images": {"evaluated": len(counts.done) - counts.skipped, "skipped": skipped, "of": self.source.images + self.source.skipped},
            "problems": [dataclasses.asdict(problem) for problem in (*self.source.problems, *counts.problems)],
            "run": {
                "canvases": [canvas._asdict() for canvas in self.canvases],
                "augmentation": plan["augmentation"],
                "batch": self._batch,
                "replicas": self.strategy.num_replicas_in_sync,
                "strategy": type(self.strategy).__name__,
                "devices": sorted({device.device_type for device in tf.config.list_logical_devices()}),
                "seconds": round(self._seconds, 3),
                "images_per_second": round(self._seen / self._seconds, 3) if self._seconds else None,
                "resumed_with": len(self.counts.done) - self._seen,
            },
            "versions": {
                "python": platform.python_version(),
                **{package: metadata.version(package) for package in ("keras", "numpy", "pillow")},
                "tensorflow": tf.__version__,
                "tfmaskformer": tfmaskformer.__version__,
            },
            "counts": {name: value.to_dict() for name in ("panoptic", "semantic") if (value := getattr(counts, name)) is not None},
        }
        return report

    def write_results(self, counts: Counts) -> None:
        """Writes ``predictions.json`` beside the PNG files, or ``sem_seg_predictions.json``, of :meth:`total`'s counts."""
        if self._results is None:
            return
        entries, info = counts.results, self.source.info
        if "panoptic" in self.metrics:
            categories = [
                {"id": dataset_id, "name": name, "isthing": int(index in info.thing_classes)}
                for index, (dataset_id, name) in enumerate(zip(ids_of(info), info.class_names, strict=True))
            ]
            images = [{"id": entry["image_id"], "file_name": entry["file_name"]} for entry in entries]
            write_file(
                os.path.join(self._results, JSON_NAME),
                json.dumps({"images": images, "annotations": entries, "categories": categories}).encode(),
            )
        else:
            write_file(os.path.join(self._results, "sem_seg_predictions.json"), json.dumps(entries).encode())

    def _planned(self, directory: str | os.PathLike[str]) -> dict[str, Any]:
        """All that the counts depend on."""
        prefix, manifest, source = checkpoint.latest_prefix(directory), checkpoint.read_manifest(directory), self.source
        return {
            "checkpoint": {
                # Holds the checksum of every tensor.
                "index_sha256": _sha256(read_file(f"{prefix}.index")),
                **{key: manifest.get(key) for key in ("source", "weights_license", "dtype", "tool")},
            },
            "config": checkpoint.read_config(directory).to_dict(),
            "dataset": {"name": source.name, "split": source.split, "images": source.images, "identity": source.identity},
            "metrics": list(self.metrics),
            "augmentation": json.loads(json.dumps(self._augmentation and self._augmentation._asdict())),
            "results": self._results,
        }

    def _resume(self) -> None:
        try:
            document = json.loads(read_file(str(self._state_file)))
        except tf.errors.NotFoundError:
            self.save()  # so that a folder that cannot be written is told now
            return
        except ValueError as error:
            raise EvaluationError(
                f"'{self._state_file}' is not what an evaluation saved: {error}\n  remove it, or choose another folder"
            ) from error
        plan = document.get("plan") if isinstance(document, dict) and document.get("format") == FORMAT else None
        if plan != self._plan:
            differing = ", ".join(key for key in self._plan if plan.get(key) != self._plan[key]) if plan else "format"
            raise EvaluationError(
                f"'{self._state_file}' is of another evaluation (different: {differing})\n  choose another --resume folder, or remove it"
            )
        self.counts = Counts.from_dict(document["counts"])
        if self._on_error == "stop" and self.counts.problems:
            raise DataError(self.counts.problems[0], "it was skipped before: --on-error skip goes on")

    def _chosen(self, given: Sequence[tuple[int, int]] | None) -> list[_Room]:
        """Room for all images whose size is told."""
        test = self.config.test
        sizes = [(*resized_shape(*size, test.min_size, test.max_size), *size) for size in self.source.sizes()]
        canvases = choose_canvases(sizes) if given is None else _with_outputs(given, sizes)
        if self._augmentation is None:
            return [_Room(canvas, (canvas[:2],)) for canvas in canvases]
        views: dict[Canvas, list[Any]] = {canvas: [] for canvas in canvases}
        for size in sizes:
            views[next(canvas for canvas in canvases if canvas.holds(size))].append(self._augmentation.sizes(*size[:2]))
        return [_Room(canvas, tuple(map(tuple, np.max(each, 0).tolist()))) for canvas, each in views.items() if each]

    def _prepare(self, item: Any) -> tuple[str, _Ready | None, list[Problem]]:
        image_id, sample, problems = self.source.load(item)
        if sample is None:
            return image_id, None, problems
        image = resize_shortest_edge(sample.image, self.config.test.min_size, self.config.test.max_size)
        views = [(image, False)] if self._augmentation is None else list(augmented_images(image, self._augmentation))
        own = _Room(Canvas(*image.shape[:2], *sample.image.shape[:2]), tuple(view.shape[:2] for view, _ in views))
        # An image that no size told of has a room of its own.
        return image_id, _Ready(sample, views, next((room for room in self._rooms if _holds(room, own)), own)), []

    def _values(self, of: Callable[[int], np.ndarray | int]) -> Any:
        """A value for each replica."""
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(of(context.replica_id_in_sync_group), tf.as_dtype(np.asarray(of(0)).dtype))
        )

    def _infer(self, room: _Room, batch: Sequence[_Ready], most: int) -> list[tuple[Any, Any]]:
        """(panoptic result, class of each pixel) of each image; behind the last come those of nothing, which filled the batch."""
        replicas, output_canvas = most // self._batch, room.canvas[2:]
        output_sizes = np.array([output_canvas] * most, np.int32)
        for index, ready in enumerate(batch):
            output_sizes[index] = ready.sample.image.shape[:2]

        def share(values):
            return self._values(lambda replica: np.split(values, replicas)[replica % replicas])

        def inputs(view):
            height, width = room.views[view]
            images = np.zeros([most, height, width, 3], np.uint8)
            sizes = np.array([room.views[view]] * most, np.int32)
            for index, ready in enumerate(batch):
                image, _ = ready.views[view]
                sizes[index] = image.shape[:2]
                images[index, : sizes[index, 0], : sizes[index, 1]] = image
            return share(images), share(sizes)

        steps, outputs = self._steps, share(output_sizes)
        if self._augmentation is None:
            results = steps.infer(*inputs(0), outputs, output_canvas)
        else:
            total = steps.scores(*inputs(0), outputs, output_canvas)
            for view, (_, mirrored) in list(enumerate(batch[0].views))[1:]:
                total = steps.add(total, steps.scores(*inputs(view), outputs, output_canvas), outputs, mirrored)
            results = steps.labels(total, len(room.views))
        found: list[tuple[Any, Any]] = []
        for (panoptic, labels), shares in zip(
            self.strategy.experimental_local_results(results), np.split(output_sizes, replicas), strict=True
        ):
            segments = [None] * self._batch if panoptic is None else panoptic.images(shares)
            maps = (
                [None] * self._batch
                if labels is None
                else [part[:height, :width] for part, (height, width) in zip(labels.numpy(), shares, strict=True)]
            )
            found += zip(segments, maps, strict=True)
        return found

    @functools.cached_property
    def _steps(self) -> _Steps:
        config, metrics, model = self.config, self.metrics, self.model

        def on_replicas(function, *, compiled):
            """``function`` of what each replica has; its last argument is the same for all, and static."""
            # A TPU compiles whatever runs on it, as a whole.
            compiled = compiled and not isinstance(self.strategy, tf.distribute.TPUStrategy)
            inner = tf.function(function, jit_compile=True, autograph=False) if compiled else function

            @tf.function(autograph=False)
            def step(*arguments):
                *values, static = arguments
                # Not inner itself: MirroredStrategy would make one program of all replicas, which XLA cannot where there are several CPUs.
                return self.strategy.run(lambda *of_replica: inner(*of_replica, static), args=values)

            return step

        def scores(images, sizes, output_sizes, output_canvas):
            return static_semantic_inference(model(images, sizes, padding="masked"), config, sizes, output_sizes, output_canvas)

        def add(total, scores, output_sizes, mirrored):
            return total + (tf.reverse_sequence(scores, output_sizes[:, 1], seq_axis=3, batch_axis=0) if mirrored else scores)

        def labels(total, views):
            return None, tf.argmax(total / views, 1, tf.int32)  # upstream, too, divides first; that can make a tie

        return _Steps(
            on_replicas(infer_step(model, metrics), compiled=True),
            on_replicas(scores, compiled=True),
            on_replicas(add, compiled=False),
            on_replicas(labels, compiled=False),
        )

    def _count(self, sample: Sample, panoptic: Any, labels: Any) -> None:
        counts, info = self.counts, self.source.info
        true_panoptic_seg: Any = sample.panoptic_seg
        true_sem_seg: Any = sample.sem_seg
        image_id, stem = sample.record.image_id, os.path.splitext(os.path.basename(sample.record.image))[0]
        if counts.panoptic is not None:
            counts.panoptic.update(true_panoptic_seg, sample.segments_info, *panoptic)
            if self._results is not None:
                png = f"{stem}.png"
                write_file(os.path.join(self._results, PNG_FOLDER, png), encode_png(panoptic[0]))
                segments = [{"id": segment["id"], "category_id": ids_of(info)[segment["category_id"]]} for segment in panoptic[1]]
                counts.results.append({"image_id": image_id, "file_name": png, "segments_info": segments})
        if counts.semantic is not None:
            counts.semantic.update(true_sem_seg, labels)
            if self._results is not None and counts.panoptic is None:
                counts.results += semantic_annotations(os.path.basename(sample.record.image), labels, ids_of(info))
        if counts.instances is not None:
            counts.instances.update(image_id, *panoptic)
            counts.truth.append(
                instance_truth([(image_id, true_panoptic_seg, sample.segments_info)], ids_of(info), info.class_names, info.thing_classes)
            )
        counts.done.append(str(image_id))

    def _skip(self, image_id: str, problems: list[Problem]) -> None:
        if self._on_error == "stop":
            raise DataError(problems[0], "--on-error skip leaves the image out; 'tfmaskformer data check' lists all problems")
        self.counts.done.append(image_id)
        self.counts.skipped += 1
        self.counts.problems += problems


def infer_step(model: MaskFormer, metrics: Sequence[str]) -> Callable[..., tuple[Any, Any]]:
    """What one device computes of a batch, whole: the function that evaluation compiles.

    Args:
        model: with its weights.
        metrics: of :func:`metrics_of`.

    Returns:
        images uint8 [batch, height, width, 3], their sizes and those of their results, both int32 [batch, 2], and (height, width) of the
        results' canvas, which is static → ``PanopticSegments`` or None, and the class of each pixel, int32 [batch, height,
        width], or None.
    """

    def infer(images, sizes, output_sizes, output_canvas):
        outputs = model(images, sizes, padding="masked")
        panoptic = labels = None
        if "panoptic" in metrics:
            panoptic = static_panoptic_inference(outputs, model.config, sizes, output_sizes, output_canvas)
        if "semantic" in metrics:
            scores = static_semantic_inference(outputs, model.config, sizes, output_sizes, output_canvas)
            labels = tf.argmax(scores, 1, tf.int32)
        return panoptic, labels

    return infer


def _ahead(pool: concurrent.futures.Executor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in order; as many as the pool has threads, and as many again, are computed before they are asked for."""
    futures: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > 2 * (os.cpu_count() or 1):
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _with_outputs(given: Sequence[tuple[int, int]], sizes: Iterable[Sequence[int]]) -> list[Canvas]:
    """Canvases of the given (height, width), px, with room for the results of the images on them: each on the smallest that holds it."""
    rooms = sorted(given, key=lambda room: (room[0] * room[1], room))
    outputs = dict.fromkeys(rooms, (0, 0))
    for height, width, *output in sizes:
        room = next((room for room in rooms if height <= room[0] and width <= room[1]), None)
        if room is None:
            told = ", ".join(f"{room[0]}×{room[1]}" for room in rooms)
            raise EvaluationError(
                f"an image of {height}×{width} px after resizing fits none of the canvases {told}\n  give a larger --canvas"
            )
        outputs[room] = (max(outputs[room][0], output[0]), max(outputs[room][1], output[1]))
    return [Canvas(*room, *output) for room, output in outputs.items() if output != (0, 0)]


def _holds(room: _Room, other: _Room) -> bool:
    views = zip(room.views, other.views, strict=True)
    return room.canvas.holds(other.canvas) and all(size <= most for view, own in views for most, size in zip(view, own, strict=True))


def _published(name: str) -> dict[str, float]:
    return next((dict(entry.metrics) for entry in registry.entries() if entry.name == name), {})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _make(folder: str) -> None:
    try:
        tf.io.gfile.makedirs(folder)
    except tf.errors.OpError as error:
        raise EvaluationError(f"cannot make the folder '{folder}': {error.message}\n  choose another one") from error
