"""A checkpoint of a MaskFormer of any kind → one of any other kind, whole and verified, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from checkpoints import registry
from converters import checkpoint, target
from converters.destination import Destination
from converters.errors import ConversionError, printable, quoted
from converters.infer import Inference, infer
from converters.manifest import Loss, manifest
from converters.named_config import named_config
from converters.official import HUGGING_FACE, official
from converters.remote import local_copy, upload
from converters.rules import Drop, Move, plan
from converters.source import TENSORFLOW, Source, kind_of, open_source
from converters.tables import huggingface
from converters.tables import maskformer as table
from converters.tensor import LazyTensor, Tensor, cast, inverted, is_exact, rounded, sha256_of
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.destination import sync

if TYPE_CHECKING:
    from tfmaskformer.module import ParameterSpec

THREADS = 2

DTYPES = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""What a converted checkpoint can have."""

Progress = Callable[[str, float], None]
"""Told the step and the share of it that is done, 0 … 1."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        destination: None of a dry run.
        manifest: where everything comes from.
        inference: the config, with its origins.
        left_out: what the source has beside the model: "optimizer", …
        origin: whether the weights are still those of the file that the source was converted from; "" where that is not known.
    """

    destination: pathlib.Path | str | None
    manifest: dict[str, Any]
    inference: Inference
    left_out: tuple[str, ...] = ()
    origin: str = ""


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None,
    config: str | None = None,
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = lambda step, share: None,
) -> Conversion:
    """Converts the checkpoint ``source`` into the new file or directory ``destination``.

    Args:
        source: a pickle with arrays of NumPy or tensors of PyTorch, a file of ``torch.save``, safetensors, HDF5, Keras weights or a
            directory with a TensorFlow checkpoint; of the official code, of ``convert``, or of Hugging Face. Also the name of a zoo entry
            or a URL, which are downloaded, or a path that TensorFlow can read (``gs://…``).
        destination: a name that ends in .pkl, .pth, .pt, .safetensors, .weights.h5 or .h5 makes such a file, any other a directory with a
            TensorFlow checkpoint. It appears whole, after it was re-read and found equal, or not at all. None: a dry run.
        config: name of the zoo entry, official YAML file or JSON file to take the settings from that tensors cannot tell. None: what lies
            beside the tensors, else the entry that fits.
        dtype: "float32", "float16" or "bfloat16", to which the weights are rounded. None: float32, which must hold every value exactly.
        force: whether to replace what an earlier conversion wrote there.
        progress: told what is being done.

    Raises:
        ConversionError: the source, the config or the destination cannot be used. Nothing was written.
    """
    base = named_config(config) if config else None
    return run(source, destination, lambda file: _plan(file, base), dtype=dtype, force=force, progress=progress)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done with a file.

    Attributes:
        table: name and version of the rule table, or of those that follow each other.
        key_layout: of the file.
        inference: the config of the model, with its origins.
        tensors: name → tensor in PyTorch's layout.
        moves: what becomes a variable.
        drops: what does not.
        initial: name → value of the variables that the file does not fill, in TensorFlow's layout.
        more: further lines of the manifest.
    """

    table: str
    key_layout: str
    inference: Inference
    tensors: Mapping[str, Tensor]
    moves: list[Move]
    drops: list[Drop]
    initial: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Of all variables."""
        return sum(self.tensors[move.source].size for move in self.moves) + sum(value.size for value in self.initial.values())


def run(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None,
    planner: Callable[[Source], Plan],
    *,
    dtype: str | None = None,
    force: bool,
    progress: Progress,
) -> Conversion:
    """Does with ``source`` what ``planner`` says; see :func:`convert`."""
    with local_copy(source, progress) as path, _no_garbage_collection():
        kind_of(path)
        if destination is None:
            with ThreadPoolExecutor(THREADS) as pool, open_source(path, pool=pool) as file:
                return _Run(file, planner(file), target.DIRECTORY, dtype, pool, progress).examined()
        with upload(destination, force) as place:
            form = target.format_of(str(destination))
            staged = Destination(place, force, form.files, target.is_own)
            if place.exists() and place.samefile(path):
                raise ConversionError(f"{quoted(destination)} is the source itself", "choose another --dst")
            with staged.staging() as directory:
                with ThreadPoolExecutor(THREADS) as pool, open_source(path, pool=pool) as file:
                    todo = planner(file)
                    _check_space(staged.path, directory, todo.elements * DTYPES[dtype or "float32"].itemsize)
                    conversion = _Run(file, todo, form, dtype, pool, progress).written(directory, staged.path.name)
                staged.commit(directory)
    return dataclasses.replace(conversion, destination=staged.path if place == pathlib.Path(destination) else os.fspath(destination))


def parameter_specs_of(config: MaskFormerConfig) -> dict[str, ParameterSpec]:
    """Official name → what is declared of every variable of the model; none is made."""
    from tfmaskformer.model import MaskFormer
    from tfmaskformer.module import parameter_specs

    return parameter_specs(MaskFormer(config))


def _plan(file: Source, base: MaskFormerConfig | None) -> Plan:
    found = official(file, base)
    origin = "" if base else f"the config in {file.path.name}"
    inference = infer(found.v2(), file.path.name, base or file.config, origin)
    shapes = {name: spec.shape for name, spec in parameter_specs_of(inference.config).items()}
    drops = table.drops(inference.config)
    moves = plan(table.rules(inference.config, found.key_layout), drops, found.tensors, shapes)
    more = {"left_out": dict(found.dropped)} if found.dropped else {}
    tables = (huggingface.TABLE, table.TABLE) if found.key_layout == HUGGING_FACE else (table.TABLE,)
    return Plan(", ".join(tables), found.key_layout, inference, found.tensors, moves, drops, more=more)


class _Run:
    """One conversion: every tensor is read once, checked, hashed and written. What needs no interpreter lock goes on side by side."""

    def __init__(
        self,
        file: Source,
        todo: Plan,
        form: target.Format,
        dtype: str | None,
        pool: ThreadPoolExecutor,
        progress: Progress,
    ):
        self.file = file
        self.todo = todo
        self.form = form
        self.dtype = DTYPES[dtype or "float32"]
        self.pool = pool
        self.progress = progress
        self.hashing: list[Future[None]] = []
        self.losses: dict[str, Loss] = {}
        self.digests: dict[str, str] = {}
        self.expected: dict[str, str] = {}
        self.variables: dict[str, np.ndarray] = {}
        self.problems: dict[str, str] = {}
        inexact = [move.source for move in todo.moves if not is_exact(todo.tensors[move.source].dtype, self.dtype)]
        if inexact and dtype is None:
            lines = [f"{quoted(name)} is {todo.tensors[name].dtype.name}" for name in inexact[:10]]
            more = [f"… and {len(inexact) - 10} more"] * (len(inexact) > 10)
            raise ConversionError(
                "float32 does not hold these tensors exactly", *lines, *more, "--dtype float32 rounds them, and tells the loss"
            )

    def examined(self) -> Conversion:
        """Everything but the writing."""
        self.progress("reading", 0)
        list(self.pool.map(lambda item: self._hash(item, self._checked(item)), self._items))
        return self._conclusion()

    def written(self, directory: pathlib.Path, name: str) -> Conversion:
        """Fills the staging directory, and reads it again. Variables are all made first; other tensors are read as they are written."""
        config = self.todo.inference.config
        path = directory if self.form.files else directory / name
        if self.form.holds_variables:
            self.progress("reading", 0)
            list(self.pool.map(self._make_variable, self._items))
            conversion = self._conclusion()
            order = [move.target for move in self.todo.moves]
            variables = {name: self.variables[name] for name in order} | {
                name: value.astype(self.dtype) for name, value in self.todo.initial.items()
            }
            self.progress("writing", 0)
            self.form.write(path, target.Contents(config, self.file.author, {}, variables, conversion.manifest))
            self._start_syncing(directory)
            if self.form.kind == TENSORFLOW:
                checkpoint.verify(path, variables, lambda share: self.progress("verifying", share))
                return conversion
        tensors = self._official_tensors(config)
        if not self.form.holds_variables:
            self.progress("writing", 0)
            self.form.write(path, target.Contents(config, self.file.author, tensors, {}, {}))
            self._start_syncing(directory)
            for drop in self.todo.drops:
                self._hash(drop, self._checked(drop))
            conversion = self._conclusion()
        self._verify(path, tensors)
        return conversion

    def _start_syncing(self, directory: pathlib.Path) -> None:
        """The disk works while what was written is verified; an error shows when the destination is synced before its name is given."""
        for path in directory.iterdir():
            self.pool.submit(sync, path)

    @property
    def _items(self) -> list[Move | Drop]:
        return [*self.todo.moves, *self.todo.drops]

    def _conclusion(self) -> Conversion:
        """What was found; raises where values are not finite."""
        todo = self.todo
        for done in self.hashing:
            done.result()
        if self.problems:
            names = [name for name in todo.tensors if name in self.problems]
            lines = [self.problems[name] for name in names[:20]]
            more = [f"… and {len(names) - 20} more"] * (len(names) > 20)
            what = f"{len(names)} of {len(todo.tensors)} tensors have values that are not finite"
            overflow = any(name in self.losses for name in names)
            raise ConversionError(what, *lines, *more, "choose another --dtype" if overflow else "use an earlier file")
        license_told = self.file.manifest.get("weights_license")
        contents = manifest(
            source={
                "file": self.file.path.name,
                "bytes": self.file.size_bytes,
                "sha256": self.file.sha256(),
                "author": self.file.author,
                "key_layout": todo.key_layout,
            },
            table=todo.table,
            inference=todo.inference,
            tensors=todo.tensors,
            digests=self.digests,
            written={move.source: self.expected[move.target] for move in todo.moves if move.target in self.expected},
            moves=todo.moves,
            drops=todo.drops,
            losses=self.losses,
            dtype=self.dtype.name,
            license=license_told if isinstance(license_told, str) else None,
        )
        left_out = (*self.file.others, *todo.more.get("left_out", ()))
        return Conversion(None, contents | dict(todo.more), todo.inference, left_out, self._origin())

    def _official_tensors(self, config: MaskFormerConfig) -> dict[str, Tensor]:
        """v2 name → tensor as it is to be written, in the official order; each is checked, and handed on to be hashed, when it is read."""

        def watched(move: Move) -> Tensor:
            def read() -> np.ndarray:
                array = self._checked(move)
                self.hashing.append(self.pool.submit(self._hash, move, array))
                return rounded(array, self.dtype)

            return LazyTensor(self.todo.tensors[move.source].shape, self.dtype, read)

        transforms = table.transforms(config, self.todo.initial)
        derived = {drop.source: drop.expected for drop in table.drops(config) if drop.expected is not None}
        derived |= {name: np.asarray(cast(inverted(value, transforms[name]), self.dtype)) for name, value in self.todo.initial.items()}
        self.expected |= {name: sha256_of(value) for name, value in derived.items()}
        tensors = {move.target: watched(move) for move in self.todo.moves} | derived
        return {name: tensors[name] for name in _official_order(config, tensors)}

    def _make_variable(self, item: Move | Drop) -> None:
        """Checks a tensor and makes it a variable."""
        array = self._checked(item)
        if isinstance(item, Move) and item.source not in self.problems:
            variable = checkpoint.aligned_empty(item.transform.shape(array.shape), self.dtype)
            item.transform.copy(rounded(array, self.dtype), variable)
            self.variables[item.target] = variable
        self._hash(item, array)

    def _checked(self, item: Move | Drop) -> np.ndarray:
        """Reads a tensor; notes what is wrong with its values, and what rounding them loses."""
        array = np.asarray(self.todo.tensors[item.source])
        if isinstance(item, Move):
            if not np.isfinite(array).all():
                self.problems[item.source] = _not_finite(item.source, array)
            elif not is_exact(array.dtype, self.dtype):
                self.losses[item.source] = loss = Loss.of(array, rounded(array, self.dtype))
                if loss.overflows:
                    told = f"{loss.overflows} of {array.size} values are beyond {self.dtype.name}"
                    self.problems[item.source] = f"{quoted(item.source)} {array.shape}: {told}"
        return array

    def _hash(self, item: Move | Drop, array: np.ndarray) -> None:
        """Hashes a tensor, as it is in the file and as it is written; afterwards its part of the file leaves the memory."""
        self.digests[item.source] = digest = sha256_of(array)
        if isinstance(item, Move):
            self.expected[item.target] = digest if array.dtype == self.dtype else sha256_of(rounded(array, self.dtype))
        self.file.release(self.todo.tensors[item.source])
        self.progress("reading", len(self.digests) / len(self.todo.tensors))

    def _verify(self, path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
        """Reads the file just written as any source, and compares the digest of every tensor with what it should be."""
        with open_source(path, own=True) as file:
            found = official(file).v2()
            wrong = sorted(found.keys() ^ tensors.keys())

            def differs(name: str) -> bool:
                tensor = found[name]
                same = (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype)
                differs = not same or sha256_of(np.asarray(tensor)) != self.expected[name]
                file.release(tensor)
                return differs

            common = [name for name in tensors if name in found]
            for count, (name, is_wrong) in enumerate(zip(common, self.pool.map(differs, common), strict=True), 1):
                wrong += [name] * is_wrong
                self.progress("verifying", count / len(common))
        if wrong:
            raise ConversionError("the file just written holds other values than intended", *wrong[:10], "the disk may be failing")

    def _origin(self) -> str:
        """Compares the tensors' digests with those that the source's own manifest has, whatever that may be."""
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            earlier = self.file.manifest
            known = {line["target"]: line.get("written", line["sha256"]) for line in earlier["tensors"]}
            found = {move.target: self.digests[move.source] for move in self.todo.moves}
            if known.keys() != found.keys():
                return ""
            changed = sum(known[name] != found[name] for name in found)
            told = f"{len(found) - changed} of {len(found)} tensors have" if changed else "every tensor has"
            return f"{told} the bytes that were converted from {printable(earlier['source']['file'])}"
        return ""


def _official_order(config: MaskFormerConfig, names: Mapping[str, Any]) -> list[str]:
    """As the official ``state_dict`` has them; for a model that the zoo does not know, as they come."""
    with contextlib.suppress(registry.ZooError):
        order = list(registry.layout(registry.entry(config.name)))
        if set(order) == set(names):
            return order
    return list(names)


def _check_space(path: pathlib.Path, directory: pathlib.Path, size_bytes: int) -> None:
    if (free_bytes := shutil.disk_usage(directory).free) < size_bytes:
        what = f"cannot write {quoted(path)}: {free_bytes} bytes are free, the checkpoint has about {size_bytes}"
        raise ConversionError(what, "free space on the disk, or choose another --dst")


def _not_finite(name: str, tensor: np.ndarray) -> str:
    indices = np.argwhere(~np.isfinite(tensor))
    first = tuple(int(index) for index in indices[0])
    return f"{quoted(name)} {tensor.shape}: {len(indices)} of {tensor.size} values, the first is {tensor[first]} at {first}"


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Naming the model's modules makes many small objects, at which Python would search all of TensorFlow's for cycles, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
