"""Traces: what the official code computed, on disk. This module is their only reader and writer, and imports neither framework.

A trace is a directory::

    manifest.json          format, version, provenance, and the cases with their images
    <case>.float64.h5      the reference
    <case>.float32.h5      the official float32 baseline, and by how much official float32 runs miss the reference

A case is one forward and backward pass of one or more images. Tensors are in the official layout (NCHW; sequences LBC), in the
order in which they were computed.

Format
------
Each HDF5 file is complete or absent: it is written as ``<name>.partial``, synced and renamed. Its attributes are ``format``,
``version``, ``case``, ``dtype``, ``runs`` and ``facts`` (JSON). Its datasets:

``index``           JSON as uint8: one row ``[group, name, shape, dtype, samples, offset]`` for each record
``statistics``      float64 [records, 5]: l2, sum, min and max of the finite elements, and the number of non-finite ones
``floor``           float64 [records, runs]: relative L2 error of each run against the float64 reference, NaN where it was not
                    measured
``sketches``        float64 file only: float64, for one sampled record after the other :data:`SKETCH` sums that stand for the whole of it
``values/<dtype>``  all stored elements of that dtype, record after record, with checksums

Records are grouped:

``inputs``     float64 file only: ``images/{i}`` uint8 [H, W, 3] RGB; ``targets/{i}/labels`` int64 [K]; ``targets/{i}/masks`` bool [K, H, W]
               and, of a per-pixel baseline, ``targets/{i}/sem_seg`` int32 [H, W]
``taps``       ``<module>#<call>[<item>]``, and ``images#0``, the normalised, padded batch
``outputs``    ``pred_logits``, ``pred_masks``, ``aux_outputs.{layer}.pred_logits``, ``aux_outputs.{layer}.pred_masks``, or ``sem_seg``,
               ``aux_outputs.{layer}.sem_seg``
``matcher``    not of per-pixel baselines; below ``{layer}/{i}/`` (layer: ``final``, ``0``, ``1``, …; i: image) ``cost_class``,
               ``cost_mask``, ``cost_dice``, ``total`` [Q, K]; ``assignment`` int64 [K], the query of each object, -1 for none; float64
               file: ``gap``, by how much the best *other* assignment costs more (inf: there is none); float32 file: ``cost_noise``, the
               largest error of ``total`` in any run
``losses``     the official keys, as upstream's criterion or head returns them; ``total``, their weighted sum
``gradients``  of ``losses/total``, by parameter
``tap_gradients``  of ``losses/total``, by tap: in the traces that have them, of each tap on which the loss depends. The fact
               ``without_gradient`` of the float64 file tells of the others why they have none
``inference``  ``{i}/sem_seg`` [C, H, W]; with panoptic on ``{i}/panoptic_seg`` int32 [H, W] and ``{i}/segments`` int64 [segments, 3]
               (id, category_id, isthing); the same below ``{i}/resized/`` at another output size
``metrics``    what the official packages, where they are installed, make of the results at the images' own size
               (:mod:`parity.official_metrics`): ``{i}/panoptic/…``, ``{i}/semantic/…``
``losses_float64``, ``inference_float64``  of a float32 recording with TensorFlow: what float64 makes of its outputs
``scalars``, ``steps``  of a training (:mod:`parity.trajectory`), which has a format of its own

A sampled file stores, of each large floating-point tensor in :data:`SAMPLED_GROUPS`, only the
elements of :func:`parity.sampling.sample_indices`, and of all of them the sums of :func:`parity.sampling.sketch`, by which the error of
a whole tensor is known to 1 / √(2 · 128) = 6 %, that of a gradient, which is only judged in float64 and far from its tolerance, to 25 %.
Statistics and floor are those of the whole tensor too. The float64 file has position embeddings whole: a float64 check needs them
(:mod:`parity.tensorflow_run`).

TensorFlow's traces (:mod:`parity.tensorflow_record`; ``framework`` in the provenance) have one file ``<case>.<dtype>.h5`` a case, whole, in
the official names and layouts, bfloat16 stored as float32, without floors; the fact ``reference`` is the ``key`` of the file whose inputs
they are of. A copy of the inputs (``inputs_only`` in the provenance) has the group ``inputs``, position embeddings, assignments, ``gap``
and ``cost_noise``, and the fact ``resized_px``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from parity.sampling import Sketch, blocks, sample_indices, square

FORMAT = "tfmaskformer-trace"
VERSION = 3
GROUPS = (
    *("inputs", "taps", "outputs", "matcher", "losses", "tap_gradients", "gradients", "inference", "metrics"),
    *("losses_float64", "inference_float64", "scalars", "steps"),
)
SAMPLED_GROUPS = ("taps", "outputs", "tap_gradients", "gradients", "inference", "steps")
DTYPES = ("float64", "float32", "int64", "int32", "uint8", "bool")
SKETCH = {"taps": 128, "outputs": 128, "inference": 128, "tap_gradients": 8, "gradients": 8, "steps": 16}
"""Group → sums that stand for a sampled tensor of it."""
POSITION_EMBEDDING = "pe_layer"
"""Last part of the name of the modules whose output is stored whole."""
_CHUNK = 1 << 14  # elements of an HDF5 chunk: the smallest amount that is read at once
_SAMPLED_CHUNK = 1 << 10  # the same of a sampled file, in which a whole chunk would mostly be empty


class TraceError(ValueError):
    """A trace that cannot be read or written; the message names the file, what is wrong and the next step."""


class Statistics(NamedTuple):
    """Exact figures of a whole tensor, in float64. All but ``nonfinite`` are over the finite elements (0 if there are none)."""

    l2: float
    sum: float
    min: float
    max: float
    nonfinite: int


def statistics(array: np.ndarray) -> Statistics:
    """:class:`Statistics` of an array of any shape and dtype.

    >>> statistics(np.array([3.0, -4.0, np.inf]))
    Statistics(l2=5.0, sum=-1.0, min=-4.0, max=3.0, nonfinite=1)
    """
    return _statistics(blocks(array))


def statistics_and_sketch(name: str, tensor: np.ndarray, count: int) -> tuple[Statistics, np.ndarray]:
    """Both of a tensor, which is read once; see :func:`statistics` and :func:`parity.sampling.sketch`."""
    drawn = Sketch(name, tensor.shape, count)

    def seen() -> Iterator[tuple[int, np.ndarray]]:
        for start, values in blocks(tensor, drawn.multiple):
            yield start, values
            drawn.add(start, values)

    return _statistics(seen()), drawn.sums


def _statistics(of_blocks: Iterable[tuple[int, np.ndarray]]) -> Statistics:
    squares, total, smallest, largest, nonfinite = 0.0, 0.0, math.inf, -math.inf, 0
    for _, values in of_blocks:
        with np.errstate(invalid="ignore"):
            of_block = float(values.sum())
        if not math.isfinite(of_block):
            finite = np.isfinite(values)
            nonfinite += values.size - int(np.count_nonzero(finite))
            values = values[finite]
            of_block = float(values.sum())
        squares += square(values)
        total += of_block
        smallest, largest = float(values.min(initial=smallest)), float(values.max(initial=largest))
    if smallest > largest:
        return Statistics(0.0, 0.0, 0.0, 0.0, nonfinite)
    return Statistics(math.sqrt(squares), total, smallest, largest, nonfinite)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """``‖actual − expected‖₂ / ‖expected‖₂`` in float64; 0 if they are equal, inf if only ``expected`` is zero.

    >>> relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0]))
    0.1
    """
    difference, norm = 0.0, 0.0
    for (_, got), (_, wanted) in zip(blocks(actual), blocks(expected), strict=True):
        norm += square(wanted)
        got -= wanted
        difference += square(got)
    if difference == 0:
        return 0.0
    return math.sqrt(difference) / math.sqrt(norm) if norm else math.inf


@dataclasses.dataclass(frozen=True)
class Record:
    """One tensor of a trace.

    Attributes:
        group: one of :data:`GROUPS`.
        name: unique within the group.
        shape: of the whole tensor, official layout.
        dtype: one of :data:`DTYPES`.
        samples: how many elements were asked for; None if the whole tensor is stored.
        statistics: of the whole tensor.
        floor: relative L2 error against the float64 reference of each of the file's runs; NaN: not measured.
    """

    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    samples: int | None
    statistics: Statistics
    floor: tuple[float, ...]
    offset: int = dataclasses.field(repr=False)
    sketch_offset: int | None = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """Elements in the file."""
        return self.size if self.samples is None else min(self.samples, self.size)

    def select(self, tensor: np.ndarray) -> np.ndarray:
        """The elements of ``tensor`` (whole, official layout) that correspond to :meth:`TraceFile.read`'s, in its shape.

        Raises:
            TraceError: ``tensor`` has another shape.
        """
        if tuple(tensor.shape) != self.shape:
            raise TraceError(f"{self.group} '{self.name}': expected shape {self.shape}, got {tuple(tensor.shape)}")
        if self.samples is None:
            return tensor
        return np.ascontiguousarray(tensor).ravel()[sample_indices(self.name, self.shape, self.samples)]

    def statistics_and_sketch(self, tensor: np.ndarray) -> tuple[Statistics, np.ndarray]:
        """What corresponds to ``statistics`` and :meth:`TraceFile.read_sketch` for ``tensor`` (whole, official layout)."""
        return statistics_and_sketch(self.name, tensor, SKETCH[self.group])


class TraceFileWriter:
    """Writes one file of a trace; a context manager. The file appears under its name when the block ends without an exception.

    Args:
        directory: the trace's directory, which exists.
        case: name of the case: letters, digits, ``_``, ``-``, ``+``.
        dtype: "float64" or "float32": that of the run.
        runs: names of the runs of which errors are stored.
        samples: elements to store of a large tensor in :data:`SAMPLED_GROUPS`, 2 or more; None stores everything.
        facts: JSON types; what else is known of the run. More may be added to the attribute while the file is written.
    """

    def __init__(self, directory: str | Path, case: str, dtype: str, *, runs: Sequence[str], samples: int | None, facts: Mapping[str, Any]):
        self.path = file_path(directory, case, dtype)
        self.dtype = dtype
        self.samples = samples
        self.facts = dict(facts)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._runs = tuple(runs)
        self._rows: dict[tuple[str, str], list[Any]] = {}
        self._statistics: list[Statistics] = []
        self._sketches: list[np.ndarray] | None = [] if dtype == "float64" else None
        self._floor: dict[tuple[str, str], np.ndarray] = {}
        try:
            self._file = h5py.File(self._partial, "w")
        except OSError as error:
            raise TraceError(f"cannot write '{self._partial}': {error}") from error
        self._file.attrs.update(format=FORMAT, version=VERSION, case=case, dtype=dtype, runs=json.dumps(self._runs))

    def add(self, group: str, name: str, array: np.ndarray) -> None:
        """Appends a record; ``array`` is whole, in the official layout. Its values are on disk or copied when this returns."""
        array = np.asarray(array)
        if group not in GROUPS or array.dtype.name not in DTYPES or (group, name) in self._rows:
            raise TraceError(f"record {group} '{name}' ({array.dtype}): unknown group or dtype, or there already")
        samples = self._samples_of(group, name, array)
        if samples is not None and self._sketches is not None:
            figures, sums = statistics_and_sketch(name, array, SKETCH[group])
            self._sketches.append(sums)
        else:
            figures = statistics(array)
        flat = array.ravel()
        values = flat if samples is None else flat[sample_indices(name, array.shape, samples)]
        pool = self._pool(array.dtype)
        offset = pool.shape[0]
        self._rows[group, name] = [group, name, list(array.shape), array.dtype.name, samples, offset]
        self._statistics.append(figures)
        pool.resize((offset + values.size,))
        pool[offset:] = values

    def read(self, group: str, name: str) -> np.ndarray:
        """A record that was added and is stored whole."""
        _, _, shape, dtype, samples, offset = self._rows[group, name]
        assert samples is None
        return self._file[f"values/{dtype}"][offset : offset + math.prod(shape)].reshape(shape)

    def keys(self) -> Collection[tuple[str, str]]:
        """(group, name) of every record so far."""
        return self._rows.keys()

    def _samples_of(self, group: str, name: str, array: np.ndarray) -> int | None:
        if self.samples is None or group not in SAMPLED_GROUPS or array.dtype.kind != "f" or array.size <= self.samples:
            return None
        whole = self.dtype == "float64" and name.partition("#")[0].endswith(POSITION_EMBEDDING)
        return None if whole else self.samples

    def set_floor(self, group: str, name: str, errors: Sequence[float]) -> None:
        """Stores the relative L2 error of each run for a record."""
        if (group, name) not in self._rows:
            raise TraceError(f"no record {group} '{name}' to set a floor for")
        self._floor[group, name] = np.asarray(errors, np.float64).reshape(len(self._runs))

    def _pool(self, dtype: np.dtype) -> h5py.Dataset:
        name = f"values/{dtype.name}"
        if name not in self._file:
            # Masks, ids and position embeddings (float32 in the float64 file) shrink, activations do not.
            compression = None if dtype.name == self.dtype else "gzip"
            chunks = (_CHUNK if self.samples is None else _SAMPLED_CHUNK,)
            self._file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=chunks, compression=compression, fletcher32=True)
        return self._file[name]

    def __enter__(self) -> TraceFileWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._file.close()
            self._partial.unlink()
            return
        self._file.attrs["facts"] = json.dumps(self.facts)
        index = np.frombuffer(json.dumps(list(self._rows.values())).encode(), np.uint8)
        missing = np.full(len(self._runs), np.nan)
        floor = np.array([self._floor.get(key, missing) for key in self._rows]).reshape(-1, len(self._runs))
        self._file.create_dataset("index", data=index, compression="gzip", fletcher32=True)
        self._file["statistics"] = np.array(self._statistics, np.float64).reshape(-1, len(Statistics._fields))
        self._file["floor"] = floor
        if self._sketches:
            sums = np.concatenate(self._sketches)
            self._file.create_dataset("sketches", data=sums, chunks=(min(_SAMPLED_CHUNK, sums.size),), fletcher32=True)
        self._file.close()
        _move_into_place(self._partial, self.path)


class TraceFile:
    """Reads one file of a trace, one record at a time; a context manager.

    Attributes:
        case, dtype, runs, facts: as given to :class:`TraceFileWriter`.
        records: (group, name) → :class:`Record`, in the order in which they were written.

    Raises:
        TraceError: the file is absent, truncated, no trace, or of another version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise TraceError(f"no trace file '{self.path}'; record it with 'parity-check record'")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise TraceError(f"'{self.path}' is truncated or no HDF5 file ({error}); record it again") from error
        try:
            self._read_index()
        except BaseException:
            self._file.close()
            raise

    def _read_index(self) -> None:
        attributes = self._file.attrs
        if attributes.get("format") != FORMAT:
            raise TraceError(f"'{self.path}' is no trace: attribute 'format' is {attributes.get('format')!r}, expected '{FORMAT}'")
        if attributes["version"] != VERSION:
            raise TraceError(f"'{self.path}' has trace version {attributes['version']}, expected {VERSION}; record it again")
        try:
            self.case, self.dtype = str(attributes["case"]), str(attributes["dtype"])
            self.runs: tuple[str, ...] = tuple(json.loads(attributes["runs"]))
            self.facts: dict[str, Any] = json.loads(attributes["facts"])
            rows = json.loads(self._file["index"][()].tobytes())
            tables = zip(rows, self._file["statistics"][()].tolist(), self._file["floor"][()].tolist(), strict=True)
            sketched = "sketches" in self._file
            offsets = itertools.accumulate((SKETCH[row[0]] if sketched and row[4] is not None else 0 for row in rows), initial=0)
            self.records: dict[tuple[str, str], Record] = {
                (group, name): Record(
                    group,
                    name,
                    tuple(shape),
                    dtype,
                    samples,
                    Statistics(l2, total, smallest, largest, int(nonfinite)),
                    tuple(floor),
                    offset,
                    sketch_offset if sketched and samples is not None else None,
                )
                for ((group, name, shape, dtype, samples, offset), (l2, total, smallest, largest, nonfinite), floor), sketch_offset in zip(
                    tables, offsets, strict=False
                )
            }
            self._values = {dtype: self._file["values"][dtype] for dtype in {record.dtype for record in self.records.values()}}
            self._sums = self._file["sketches"] if sketched else None
            lengths = {dtype: values.shape[0] for dtype, values in self._values.items()}
            for record in self.records.values():
                if lengths[record.dtype] < record.offset + record.stored:
                    raise ValueError(f"no values for {record.group} '{record.name}'")
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise TraceError(f"'{self.path}' is damaged ({error}); record it again") from error

    def keys(self) -> Collection[tuple[str, str]]:
        """(group, name) of every record."""
        return self.records.keys()

    def group(self, group: str) -> dict[str, Record]:
        """The records of one group by name, in order."""
        return {name: record for (of, name), record in self.records.items() if of == group}

    def __getitem__(self, key: tuple[str, str]) -> Record:
        """The record of (group, name).

        Raises:
            TraceError: there is none.
        """
        if key not in self.records:
            raise TraceError(f"'{self.path}' has no record {key[0]} '{key[1]}'")
        return self.records[key]

    def read(self, group: str, name: str) -> np.ndarray:
        """The stored elements of a record: the whole tensor in its shape, or [record.stored] where it is sampled."""
        record = self[group, name]
        try:
            values = self._values[record.dtype][record.offset : record.offset + record.stored]
        except OSError as error:
            raise TraceError(f"'{self.path}' is damaged at {group} '{name}' ({error}); record it again") from error
        return values.reshape(record.shape) if record.samples is None else values

    def read_sketch(self, group: str, name: str) -> np.ndarray:
        """float64 [SKETCH[group]] of a sampled record of a float64 file: see :func:`parity.sampling.sketch`."""
        record = self[group, name]
        if record.sketch_offset is None or self._sums is None:
            raise TraceError(f"'{self.path}' has no sketch of {group} '{name}'")
        try:
            sums = self._sums[record.sketch_offset : record.sketch_offset + SKETCH[group]]
            if sums.size < SKETCH[group]:
                raise ValueError("too short")
            return sums
        except (OSError, IndexError, ValueError) as error:
            raise TraceError(f"'{self.path}' is damaged at the sketch of {group} '{name}' ({error}); record it again") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Case:
    """One case of a trace, opened; a context manager.

    Attributes:
        reference: the float64 :class:`TraceFile`.
        baseline: the float32 :class:`TraceFile`, with the floors.
    """

    def __init__(self, directory: str | Path, name: str):
        self.name = name
        self.reference = TraceFile(file_path(directory, name, "float64"))
        try:
            self.baseline = TraceFile(file_path(directory, name, "float32"))
            expected, got = self.reference.facts.get("key"), self.baseline.facts.get("key")
            if expected != got:
                self.baseline.close()
                raise TraceError(
                    f"'{self.baseline.path}' is not of the same recording as float64: key {got}, expected {expected}; record both again"
                )
        except TraceError:
            self.reference.close()
            raise

    @functools.cached_property
    def images(self) -> list[np.ndarray]:
        """uint8 [height, width, 3] RGB, one for each image."""
        return [self.reference.read("inputs", f"images/{i}") for i in range(self._count())]

    @functools.cached_property
    def targets(self) -> list[dict[str, np.ndarray]]:
        """``labels`` int64 [K], ``masks`` bool [K, height, width] and, of a per-pixel baseline, ``sem_seg`` int32 [height, width]."""
        targets: list[dict[str, np.ndarray]] = [{} for _ in range(self._count())]
        for record in self.reference.group("inputs"):
            kind, index, *name = record.split("/")
            if kind == "targets":
                targets[int(index)][name[0]] = self.reference.read("inputs", record)
        return targets

    @property
    def resized_px(self) -> list[tuple[int, int]]:
        """(height, width) of each image's second inference."""
        if known := self.reference.facts.get("resized_px"):
            return [(height, width) for height, width in known]
        shapes = (self.reference["inference", f"{index}/resized/sem_seg"].shape for index in range(self._count()))
        return [(height, width) for _, height, width in shapes]

    def _count(self) -> int:
        return sum(name.startswith("images/") for name in self.reference.group("inputs"))

    def close(self) -> None:
        self.reference.close()
        self.baseline.close()

    def __enter__(self) -> Case:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Trace:
    """A recorded trace.

    Attributes:
        manifest: the whole ``manifest.json``.
        cases: names of the cases.

    Raises:
        TraceError: no trace there, or of another version.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.cases = tuple(self.manifest["cases"])

    @property
    def provenance(self) -> dict[str, Any]:
        """Commits, versions, command, hashes."""
        return self.manifest["provenance"]

    def case(self, name: str) -> Case:
        """Opens one case."""
        if name not in self.cases:
            raise TraceError(f"trace '{self.directory}' has no case '{name}'; it has {', '.join(self.cases) or 'none'}")
        return Case(self.directory, name)

    def __iter__(self) -> Iterator[Case]:
        """Opens one case after the other, and closes it when the next is asked for."""
        for name in self.cases:
            with self.case(name) as case:
                yield case


def file_path(directory: str | Path, case: str, dtype: str) -> Path:
    """Where a case's file lies."""
    if not case or not all(character.isalnum() or character in "_-+" for character in case):
        raise TraceError(f"case name {case!r}: expected letters, digits, '_', '-' or '+'")
    return Path(directory) / f"{case}.{dtype}.h5"


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """``manifest.json`` of a trace, checked.

    Raises:
        TraceError: absent, no JSON, of another format or version.
    """
    path = Path(directory) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TraceError(f"'{directory}' is no trace: it has no manifest.json; record one with 'parity-check record'") from error
    except (OSError, ValueError) as error:
        raise TraceError(f"cannot read '{path}': {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TraceError(f"'{path}' is no trace's manifest: 'format' is not '{FORMAT}'")
    if manifest.get("version") != VERSION:
        raise TraceError(f"'{path}' has trace version {manifest.get('version')}, expected {VERSION}; record it again")
    return manifest


def write_manifest(directory: str | Path, provenance: Mapping[str, Any], cases: Mapping[str, Any]) -> None:
    """Writes ``manifest.json`` atomically; ``cases`` maps each name to what is known of its images (JSON types)."""
    path = Path(directory) / "manifest.json"
    partial = path.with_name(path.name + ".partial")
    manifest = {"format": FORMAT, "version": VERSION, "provenance": dict(provenance), "cases": dict(cases)}
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _move_into_place(partial, path)


def _move_into_place(partial: Path, path: Path) -> None:
    """Syncs ``partial`` to the disk, gives it its name and syncs that too."""
    for target, flags in ((partial, os.O_RDONLY), (path.parent, os.O_RDONLY)):
        descriptor = os.open(target, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if target is partial:
            os.replace(partial, path)
