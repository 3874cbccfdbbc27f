"""Recording: runs the official code on a checkpoint and photographs, and writes a trace (:mod:`parity.trace`).

Each case is run in float64, the reference, and in float32 in four ways that PyTorch offers and the official code allows. How far
these miss the reference is the floor of every tensor: what float32 costs the official code itself.

One forward pass serves everything: evaluation mode (no dropout), gradients on. Inference, costs, losses and gradients all come from its
outputs, through the official functions. A second pass without hooks must give the same bits.

Every tensor goes to disk as it is computed; what the backward pass needs goes there too where the memory budget does not hold it. A
recording that was broken off goes on with the first file that is not complete. PyTorch is imported when a recording starts, not before.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import tfmaskformer
from converters import ports
from converters.errors import ConversionError
from parity import official, official_metrics, trace
from parity.inputs import CaseSpec, InputError, make_targets, parse_case
from parity.meta_architectures import META_ARCHITECTURES, Emit, RecordError, Targets, Task, numpy
from parity.spool import KEPT_SHARE, Spool, over_budget, parse_bytes, raw
from parity.trace import Trace, TraceError, TraceFile, TraceFileWriter


@dataclasses.dataclass(frozen=True)
class Run:
    """One way to run the official code: dtype, memory format, and whether oneDNN computes convolutions and matrix products."""

    dtype: str
    channels_last: bool
    onednn: bool

    @property
    def name(self) -> str:
        """As it is written in traces."""
        return ("channels_last" if self.channels_last else "contiguous") + ("+onednn" if self.onednn else "")


REFERENCE = Run("float64", channels_last=False, onednn=True)
RUNS = {
    "float64": (Run("float64", channels_last=True, onednn=True),),  # against the reference: rounding in float64 itself
    "float32": tuple(Run("float32", channels_last, onednn) for channels_last in (False, True) for onednn in (True, False)),
}
"""The runs of each file of which errors are stored; the first float32 run is the baseline, whose values are stored too."""


RunOnce = Callable[[Run, Emit], dict[str, str]]
"""Runs a model on a case in one way. Everything goes to ``emit``; what is returned tells of the taps without a gradient why (by name)."""


@dataclasses.dataclass(frozen=True)
class LoadedCase:
    """A case in memory: ``images`` uint8 [H, W, 3], and the targets of each."""

    name: str
    images: list[np.ndarray]
    targets: list[Targets]
    description: list[dict[str, Any]]

    def inputs(self) -> dict[str, np.ndarray]:
        """The group "inputs" of the trace."""
        arrays = {f"images/{index}": pixels for index, pixels in enumerate(self.images)}
        for index, targets in enumerate(self.targets):
            arrays |= {f"targets/{index}/{name}": target for name, target in targets.items()}
        return arrays


def load_case(case: CaseSpec, config: Any, seed: int) -> LoadedCase:
    """Reads and resizes a case's images and makes their targets."""
    images = [image.read() for image in case.images]
    kind, targets = META_ARCHITECTURES[config.MODEL.META_ARCHITECTURE], []
    for index, image in enumerate(case.images):
        key = f"seed {seed} image {index}"
        labels, masks = make_targets(image.height, image.width, image.objects, config.MODEL.SEM_SEG_HEAD.NUM_CLASSES, key)
        targets.append(kind.targets(labels, masks, config, key))
    description = [
        {
            "file": image.path.name,
            "size_px": [image.height, image.width],
            "objects": image.objects,
            "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        }
        for image, pixels in zip(case.images, images, strict=True)
    ]
    return LoadedCase(case.name, images, targets, description)


def record(
    code: official.Official,
    config_name: str,
    checkpoint: str | Path,
    cases: Sequence[CaseSpec],
    directory: str | Path,
    *,
    options: Sequence[Any] = (),
    samples: int | None = None,
    samples_float32: int | None = None,
    gradients: bool = True,
    memory_budget: int | None = None,
    seed: int = 0,
    command: Sequence[str] = (),
) -> Trace:
    """Records a trace, or completes one: files that are there and were recorded in the same way are kept.

    Args:
        code: from :func:`parity.official.load`.
        config_name: official YAML file (see :meth:`parity.official.Official.config`).
        checkpoint: official ``.pkl`` or ``.pth`` file.
        cases: from :func:`parity.inputs.parse_case`; their names differ.
        directory: made if it is not there.
        options: keys and values that change the config (Detectron2's ``merge_from_list``).
        samples: elements to store of each large tensor; None: all.
        samples_float32: the same of the float32 file alone; None: as ``samples``. A check needs little of that file but the floors.
        gradients: False leaves out the groups "tap_gradients" and "gradients", and the memory that a backward pass needs.
        memory_budget: bytes; of what the backward pass needs a share of it stays in memory, the rest goes to a temporary file.
        seed: of the targets.
        command: how this was asked for, for the manifest.

    Raises:
        official.OfficialError, InputError, TraceError: bad input, nothing of it recorded.
        RecordError: the official code did not do what a trace relies on.
    """
    config = code.config(config_name)
    config.merge_from_list(list(options))
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise InputError(f"two cases have one name among {', '.join(names)}; name them: NAME=FILE@HEIGHTxWIDTH")
    for name in names:
        trace.file_path(directory, name, "float64")
    loaded = [load_case(case, config, seed) for case in cases]
    provenance = _provenance(code, config_name, config, Path(checkpoint), samples, seed)
    if options:
        provenance["options"] = list(options)
    if samples_float32 is not None:
        provenance["samples_float32"] = samples_float32
    if not gradients:
        provenance["gradients"] = False
    of_dtypes = {"float64": samples, "float32": samples if samples_float32 is None else samples_float32}

    @functools.cache
    def task() -> Task:
        return META_ARCHITECTURES[config.MODEL.META_ARCHITECTURE](code.model(config, checkpoint))

    def run_of(name: str) -> RunOnce:
        case = next(case for case in loaded if case.name == name)
        return lambda run, emit: _run(task(), run, case, emit, functools.partial(saved, gradients, memory_budget, Path(directory)))

    described = {case.name: {"images": case.description} for case in loaded}
    inputs = {case.name: case.inputs() for case in loaded}
    recorded = write(directory, provenance, described, inputs, run_of, of_dtypes, command)
    if warning := over_budget(memory_budget):
        say(f"warning: {warning}")
    return recorded


def write(
    directory: str | Path,
    provenance: Mapping[str, Any],
    described: Mapping[str, Mapping[str, Any]],
    inputs: Mapping[str, Mapping[str, np.ndarray]],
    run_of: Callable[[str], RunOnce],
    samples: Mapping[str, int | None],
    command: Sequence[str],
) -> Trace:
    """Writes a trace of what a model computes in all of :data:`RUNS`, or completes one; files that are there already are kept.

    Args:
        directory: made if it is not there.
        provenance: everything that the values depend on; a trace with another one is not touched.
        described: case → what the manifest says of it, in which its inputs are told by their hashes.
        inputs: case → the group "inputs".
        run_of: case → what runs it.
        samples: dtype of a file → elements to store of each large tensor; None: all.
        command: how this was asked for.

    Raises:
        TraceError: the directory cannot be written, or holds another trace.
    """
    directory = Path(directory)
    keys = begin(directory, provenance, described, command)
    for name, key in keys.items():
        done = [dtype for dtype in RUNS if is_recorded(directory, name, dtype, key)]
        if done:
            say(f"{name}: {' and '.join(done)} there already")
        if len(done) < len(RUNS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the official code's deprecations
                _record_case(name, inputs[name], run_of(name), directory, samples, {"key": key}, done)
    return Trace(directory)


INCIDENTAL = ("date", "command", "environment")
"""What recordings of one trace may have other values of in their provenance."""


def begin(
    directory: Path, provenance: Mapping[str, Any], described: Mapping[str, Mapping[str, Any]], command: Sequence[str]
) -> dict[str, str]:
    """Writes the manifest of a trace, or adds cases to it; arguments as of :func:`write`.

    Returns:
        Case → key, by which its files are known to be of this recording.
    """
    decisive = {name: value for name, value in provenance.items() if name not in INCIDENTAL}
    keys = {name: _digest([decisive, description]) for name, description in described.items()}
    cases = _earlier_cases(directory, decisive) | {name: {**description, "key": keys[name]} for name, description in described.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        when = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": list(command)}
        trace.write_manifest(directory, {**provenance, **when}, cases)
    except OSError as error:
        raise TraceError(f"cannot write trace '{directory}': {error}") from error
    return keys


def _record_case(
    case: str,
    inputs: Mapping[str, np.ndarray],
    run: RunOnce,
    directory: Path,
    samples: Mapping[str, int | None],
    facts: Mapping[str, Any],
    done: Sequence[str],
) -> None:
    """Writes those files of a case that are not done. The whole reference is in its own file, or else in a temporary one."""

    def writer_of(dtype: str) -> TraceFileWriter:
        runs = [run.name for run in RUNS[dtype]]
        return TraceFileWriter(directory, case, dtype, runs=runs, samples=samples[dtype], facts=facts)

    is_whole = samples["float64"] is None
    with contextlib.ExitStack() as stack:
        spool = stack.enter_context(Spool(0, directory))
        if "float64" not in done:
            with writer_of("float64") as writer:
                for name, array in inputs.items():
                    writer.add("inputs", name, array)

                def add_reference(group: str, name: str, array: np.ndarray) -> None:
                    writer.add(group, name, array)
                    if not is_whole:
                        spool.write(group, name, array)
                    if group == "matcher" and name.endswith("/total"):
                        writer.add(group, name.replace("total", "gap"), np.array(assignment_gap(array)))

                writer.facts["without_gradient"] = run(REFERENCE, add_reference)
                _measure(run, RUNS["float64"], case, writer, writer if is_whole else spool)
        if "float32" in done:
            return
        file = stack.enter_context(TraceFile(trace.file_path(directory, case, "float64")))
        if not is_whole and not spool.keys():

            def respool(group: str, name: str, array: np.ndarray) -> None:
                if file[group, name].statistics != trace.statistics(array):
                    raise RecordError(f"{case}: {group} '{name}' is not what '{file.path}' was recorded of; delete that file")
                spool.write(group, name, array)

            run(REFERENCE, respool)
        with writer_of("float32") as writer:
            _measure(run, RUNS["float32"], case, writer, file if is_whole else spool, baseline=True)


class _Reference(Protocol):
    """Whole tensors of a case, by group and name."""

    def read(self, group: str, name: str) -> np.ndarray: ...

    def keys(self) -> Collection[tuple[str, str]]: ...


def _measure(
    run_once: RunOnce, runs: Sequence[Run], case: str, writer: TraceFileWriter, reference: _Reference, *, baseline: bool = False
) -> None:
    """Runs each of ``runs`` and stores its errors against the reference; with ``baseline``, the values of the first run too."""
    errors: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    noise: dict[str, float] = collections.defaultdict(float)
    computed = {
        (group, name) for group, name in list(reference.keys()) if group != "inputs" and not (group == "matcher" and name.endswith("/gap"))
    }
    for run in runs:
        where = f"{run.dtype} {run.name}"
        seen: set[tuple[str, str]] = set()

        def compare(
            group: str, name: str, array: np.ndarray, run: Run = run, where: str = where, seen: set[tuple[str, str]] = seen
        ) -> None:
            if (group, name) not in computed:
                raise RecordError(f"{case}: {group} '{name}' of {where} is not in the reference")
            if baseline and run is runs[0]:
                writer.add(group, name, array)
            seen.add((group, name))
            if array.dtype.kind != "f":  # ids and assignments have no error
                return
            expected = reference.read(group, name)
            if expected.shape != array.shape:
                raise RecordError(f"{case}: {group} '{name}' is {array.shape} in {where}, {expected.shape} in the reference")
            errors[group, name].append(trace.relative_error(array, expected))
            if group == "matcher" and name.endswith("/total"):
                noise[name] = max(noise[name], float(np.abs(array - expected).max(initial=0)))

        run_once(run, compare)
        if missing := computed - seen:
            raise RecordError(f"{case}: {where} lacks what the reference has: {sorted(missing)[:3]}")
    for (group, name), of_runs in errors.items():
        writer.set_floor(group, name, of_runs)
    if baseline:
        for name, value in noise.items():
            writer.add("matcher", name.replace("total", "cost_noise"), np.array(value))


def _run(task: Task, run: Run, case: LoadedCase, emit: Emit, kept: Callable[[], contextlib.AbstractContextManager[bool]]) -> dict[str, str]:
    """One forward and backward pass of the official model; see :data:`RunOnce`.

    Args:
        kept: context of a forward pass, which decides what it keeps for a backward pass, and tells whether there is to be one.
    """
    import torch

    start = time.perf_counter()
    model = task.model
    model.to(getattr(torch, run.dtype), memory_format=torch.channels_last if run.channels_last else torch.contiguous_format)
    where = f"{case.name}, {run.dtype} {run.name}"
    sizes = [pixels.shape[:2] for pixels in case.images]
    inputs = [{"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy())} for pixels in case.images]
    bits = Bits(emit, where)
    with torch.backends.mkldnn.flags(enabled=run.onednn), torch.enable_grad():
        with kept() as backward:
            with _network_taps(task, emit, backward) as seen, contextlib.suppress(_HeadReturned):
                model(inputs)
            _train(task, seen.returned, seen.images, case.targets, where, backward, bits.remember)
        with kept():
            again = getattr(model.sem_seg_head, task.method)(model.backbone(seen.images))
            _train(task, again, seen.images, case.targets, where, backward, bits.compare)
        del again
        with task.given(seen.returned), torch.no_grad():
            for suffix, output_sizes in (("", sizes), ("resized/", [_other_size(size) for size in sizes])):
                results = model([{**image, "height": size[0], "width": size[1]} for image, size in zip(inputs, output_sizes, strict=True)])
                for index, result in enumerate(results):
                    _emit_inference(result, f"{index}/{suffix}", emit)
                    for name, figures in official_metrics.figures(result, case.targets[index], model) if not suffix else ():
                        emit("metrics", f"{index}/{name}", figures)
                del results, result
    say(f"{case.name}: {run.dtype} {run.name} {time.perf_counter() - start:.1f} s")
    return dict(seen.without_gradient)


def _train(task: Task, returned: Any, images: Any, targets: Sequence[Targets], where: str, backward: bool, emit: Emit) -> None:
    """Outputs, costs, losses and the gradients of every parameter, of what the head's method returned; its graph is used up."""
    import torch

    for path, tensor in _flatten(task.outputs(returned)):
        emit("outputs", ".".join(map(str, path)), numpy(tensor))
    try:
        losses, total = task.losses(returned, images, targets, emit)
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from error
    for name, loss in losses.items():
        emit("losses", name, numpy(loss))
    emit("losses", "total", numpy(total))
    if not backward:
        return
    parameters = dict(task.model.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise RecordError(f"{where}: the loss does not depend on parameter '{name}'")
        emit("gradients", name, numpy(gradient))


@contextlib.contextmanager
def saved(gradients: bool, memory_budget: int | None, directory: Path) -> Iterator[bool]:
    """Decides what autograd keeps of a forward pass: nothing where no gradients are wanted, and what the budget does not hold on disk.

    The graph is the same in any case, so what is computed is too.
    """
    import torch

    if gradients and memory_budget is None:
        yield True
        return
    with Spool(memory_budget and memory_budget // KEPT_SHARE, directory) as spool:

        def pack(tensor: Any) -> Any:
            if not gradients:
                return None
            order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
            if isinstance(tensor, torch.nn.Parameter) or not tensor.permute(order).is_contiguous():
                return tensor.detach()  # there anyway, or with strides that a file would not keep
            key = str(len(spool.keys()))
            spool.write("saved", key, numpy(tensor.permute(order)))
            return key, np.argsort(order).tolist()

        def unpack(packed: Any) -> Any:
            if not isinstance(packed, tuple):
                return packed
            key, order = packed
            return torch.from_numpy(spool.read("saved", key)).permute(order)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield gradients


class Bits:
    """Holds a pass without hooks to the bits of the recorded one.

    Args:
        emit: takes what is recorded.
        where: case and run, for the message.
    """

    def __init__(self, emit: Emit, where: str):
        self._emit, self._where = emit, where
        self._digests: dict[tuple[str, str], bytes] = {}

    def remember(self, group: str, name: str, array: np.ndarray) -> None:
        """Takes a tensor of the recorded pass, and emits it."""
        self._digests[group, name] = self._digest(array)
        self._emit(group, name, array)

    def compare(self, group: str, name: str, array: np.ndarray) -> None:
        """Takes the same tensor of the other pass.

        Raises:
            RecordError: any bit of it is another.
        """
        if self._digests[group, name] != self._digest(array):
            what = f"without taps, {group} '{name}' has other bits"
            raise RecordError(f"{self._where}: {what}; the recording would not show what the model computes")

    @staticmethod
    def _digest(array: np.ndarray) -> bytes:
        return hashlib.blake2b(raw(array)).digest()


class Taps(dict[str, str]):
    """Emits tensors and their gradients by the names of the modules that returned them.

    As a dict: tap → why it has no gradient, for those that have none (so far).

    Args:
        emit: is given a tensor at once, for what follows may work on it in place, and its gradient when that is computed: that of what
            the module returned, whatever works on it in place later.
        backward: whether there will be gradients.
    """

    def __init__(self, emit: Emit, backward: bool = True):
        super().__init__()
        self._emit, self._backward = emit, backward
        self._calls: collections.Counter[str] = collections.Counter()

    def add(self, name: str, outputs: Any) -> None:
        """Emits one call of module ``name``; dicts, lists and tuples are taken apart."""
        index = self._calls[name]
        self._calls[name] += 1
        for path, tensor in _flatten(outputs):
            self._add(f"{name}#{index}" + "".join(f"[{item}]" for item in path), tensor)

    def _add(self, tap: str, tensor: Any) -> None:
        def emit_gradient(gradient: Any) -> None:
            self.pop(tap, None)
            self._emit("tap_gradients", tap, numpy(gradient))

        self._emit("taps", tap, numpy(tensor))
        if not self._backward:
            self[tap] = "no gradients were recorded"
        elif not tensor.requires_grad:
            self[tap] = "it depends on no parameter"
        else:
            self[tap] = "the loss does not depend on it"
            tensor.register_hook(emit_gradient)


@contextlib.contextmanager
def hooks(model: Any, names: Collection[str], emit: Emit, backward: bool = True) -> Iterator[Taps]:
    """Emits what every call of the named modules of ``model`` returns, and its gradient; see :class:`Taps`."""
    taps = Taps(emit, backward)

    def hook_for(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: taps.add(name, output)

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name in names]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


class _HeadReturned(Exception):  # noqa: N818 it is no error
    """Ends the official forward pass before its inference, which would need memory while the graph is there."""


@dataclasses.dataclass
class _Seen:
    """The batch that enters the backbone, what the head's method returned, with its graph, and the taps without a gradient."""

    without_gradient: Taps
    images: Any = None
    returned: Any = None


@contextlib.contextmanager
def _network_taps(task: Task, emit: Emit, backward: bool) -> Iterator[_Seen]:
    """Emits the batch that enters the backbone, every module call, and of the head the network's outputs.

    Some heads do more at inference: there the pass ends with :class:`_HeadReturned`.
    """
    untapped = ("", "sem_seg_head", "criterion")
    named = [name for name, _ in task.model.named_modules() if name not in untapped and not name.startswith("criterion.")]
    with hooks(task.model, named, emit, backward) as taps:
        seen = _Seen(taps)

        def see_images(_module: Any, inputs: Any) -> None:
            seen.images = inputs[0]
            taps.add("images", inputs[0])

        def see_returned(returned: Any) -> None:
            seen.returned = returned
            taps.add("sem_seg_head", task.outputs(returned))
            raise _HeadReturned

        handle = task.model.backbone.register_forward_pre_hook(see_images)
        try:
            with task.watched(see_returned):
                yield seen
        finally:
            handle.remove()


def _other_size(size: tuple[int, int]) -> tuple[int, int]:
    """An output size (px) that is larger than the image in one axis and smaller in the other."""
    return size[0] * 4 // 3, size[1] * 3 // 4


def _emit_inference(result: Mapping[str, Any], prefix: str, emit: Emit) -> None:
    emit("inference", f"{prefix}sem_seg", numpy(result["sem_seg"]))
    if "panoptic_seg" in result:
        segmentation, segments = result["panoptic_seg"]
        rows = [[segment["id"], segment["category_id"], segment["isthing"]] for segment in segments]
        emit("inference", f"{prefix}panoptic_seg", numpy(segmentation))
        emit("inference", f"{prefix}segments", np.array(rows, np.int64).reshape(-1, 3))


def assignment_gap(total: np.ndarray) -> float:
    """By how much the cheapest assignment that is not the optimum costs more than the optimum; inf if there is none.

    Any other assignment lacks at least one of the optimum's pairs: forbid each in turn.

    Args:
        total: costs, float64 [queries, objects].
    """
    from scipy.optimize import linear_sum_assignment

    if total.shape[1] == 0:
        return math.inf
    pairs = list(zip(*linear_sum_assignment(total), strict=True))
    optimum = sum(total[pair] for pair in pairs)
    best = math.inf
    for pair in pairs:
        forbidden = total.copy()
        forbidden[pair] = math.inf
        try:
            best = min(best, forbidden[linear_sum_assignment(forbidden)].sum())
        except ValueError:  # no assignment without this pair
            continue
    return float(best - optimum)


def _flatten(outputs: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path of keys and indices, tensor) of nested dicts, lists and tuples."""
    if isinstance(outputs, Mapping):
        items: Any = outputs.items()
    elif isinstance(outputs, list | tuple):
        items = enumerate(outputs)
    else:
        if outputs is not None and not isinstance(outputs, int):  # Swin's stages return sizes too
            yield path, outputs
        return
    for key, value in items:
        yield from _flatten(value, (*path, key))


def _provenance(code: official.Official, config_name: str, config: Any, checkpoint: Path, samples: int | None, seed: int) -> dict[str, Any]:
    """Everything that the values of a recording depend on."""
    if not checkpoint.is_file():
        raise official.OfficialError(f"no checkpoint '{checkpoint}'")
    digest = hashlib.sha256()
    with open(checkpoint, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {
        "commits": code.commits,
        "stand_ins": list(code.stand_ins),
        **surroundings(("torch", "numpy", "scipy", "pillow")),
        "config": _config_name(config_name),
        "checkpoint": {"file": checkpoint.name, "sha256": digest.hexdigest()},
        **code.metadata(config),
        "samples": samples,
        "seed": seed,
    }


def surroundings(packages: Sequence[str]) -> dict[str, Any]:
    """What computes: ``tool``, ``versions`` of Python and ``packages``, and ``cpu``, part of a recording's provenance."""
    import torch

    return {
        "tool": f"tfmaskformer {tfmaskformer.__version__}",
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "cpu": {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
    }


def _config_name(name: str) -> str:
    """As below ``configs``, without ``.yaml``; of another folder's file, its name alone."""
    path = Path(name).with_suffix("")
    folders = path.parts[path.parts.index("configs") + 1 :] if "configs" in path.parts else path.parts
    return path.name if Path(*folders).is_absolute() else "/".join(folders)


def _earlier_cases(directory: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The cases of the trace that is in ``directory``, if any.

    Raises:
        TraceError: it was recorded in another way.
    """
    if not (directory / "manifest.json").exists():
        return {}
    manifest = trace.read_manifest(directory)
    recorded, wanted = manifest["provenance"], json.loads(json.dumps(provenance))
    names = [*wanted, *(name for name in recorded if name not in wanted and name not in INCIDENTAL)]
    differing = [name for name in names if recorded.get(name) != wanted.get(name)]
    if differing:
        raise TraceError(f"'{directory}' holds a trace with other {', '.join(differing)}; give another folder")
    return manifest["cases"]


def is_recorded(directory: Path, case: str, dtype: str, key: str) -> bool:
    """Whether a file is there, complete, and of the recording with this key."""
    try:
        with TraceFile(trace.file_path(directory, case, dtype)) as file:
            return file.facts.get("key") == key
    except TraceError:
        return False


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def say(text: str) -> None:
    """Tells of the progress."""
    print(text, file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``parity-check record``."""
    parser.add_argument("--src", required=True, metavar="FILE", help="official checkpoint, .pkl or .pth")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="YAML", help="official config, for example coco-panoptic/maskformer_panoptic_R50_bs64_554k")
    model.add_argument(
        "--port", metavar="FILE.py", help="another model, which this Python file describes (it is run); --case then is a name in its inputs"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the trace; cases that are there already are kept")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        dest="cases",
        metavar="[NAME=]FILE@HxW[:OBJECTS][,…]",
        help="a photograph, resized to H x W px, and how many objects to make up for the losses; several, separated by commas, "
        "are one padded batch; may be given again",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="store N elements of each large tensor, and exact statistics; default: everything"
    )
    parser.add_argument("--samples-float32", type=int, metavar="N", help="the same of the float32 file alone (default: as --samples)")
    parser.add_argument("--no-gradients", action="store_true", help="leave out all gradients, and the memory that they need")
    parser.add_argument(
        "--memory-budget",
        metavar="BYTES",
        help="memory to stay below, for example 6GB: what a backward pass needs beyond an eighth of it goes to a temporary file",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the made-up objects (default: 0)")
    for name, variable in official.FOLDERS.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=f"source folder of the official code (default: ${variable})")


def run(arguments: argparse.Namespace) -> int:
    """``parity-check record``: 0 recorded, 2 bad input, 3 could not run. Prints the path of the trace."""
    try:
        for option, samples in (("--samples", arguments.samples), ("--samples-float32", arguments.samples_float32)):
            if samples is not None and samples < 2:
                raise InputError(f"{option} {samples}: expected 2 or more, or leave it out to store everything")
        budget = memory_budget(arguments)
        if arguments.port:
            from parity import port_record

            port_record.record_port(
                ports.read(arguments.port),
                arguments.src,
                arguments.cases,
                arguments.out,
                samples=arguments.samples,
                samples_float32=arguments.samples_float32,
                gradients=not arguments.no_gradients,
                memory_budget=budget,
                command=_command(arguments),
            )
            print(arguments.out)
            return 0
        if not arguments.cases:
            raise InputError("no photographs: give --case [NAME=]FILE@HxW[:OBJECTS]")
        cases = [parse_case(text) for text in arguments.cases]
        code = official.load(arguments.maskformer, arguments.detectron2)
        record(
            code,
            arguments.config,
            arguments.src,
            cases,
            arguments.out,
            samples=arguments.samples,
            samples_float32=arguments.samples_float32,
            gradients=not arguments.no_gradients,
            memory_budget=budget,
            seed=arguments.seed,
            command=_command(arguments),
        )
    except (ConversionError, InputError, TraceError, official.OfficialError) as error:
        say(f"error: {error}")
        return 3 if isinstance(error, official.OfficialUnavailable) else 2
    except RecordError as error:
        say(f"error: {error}")
        return 3
    except ImportError as error:
        remedy = "\n  pip install 'tfmaskformer[torch]'" if error.name == "torch" else ""
        say(f"error: cannot import {error.name}: {error}{remedy}")
        return 3
    print(arguments.out)
    return 0


def memory_budget(arguments: argparse.Namespace) -> int | None:
    """The option --memory-budget, in bytes.

    Raises:
        InputError: it is no amount of memory.
    """
    try:
        return arguments.memory_budget and parse_bytes(arguments.memory_budget)
    except ValueError as error:
        raise InputError(f"--memory-budget: {error}") from error


def _command(arguments: argparse.Namespace) -> list[str]:
    """The command that was given, without the folders of this machine."""
    options = [
        "--src",
        Path(arguments.src).name,
        *(("--port", Path(arguments.port).name) if arguments.port else ("--config", _config_name(arguments.config))),
        "--out",
        Path(arguments.out).name,
    ]
    for case in arguments.cases:
        name, equals, files = case.rpartition("=")
        options += ["--case", name + equals + ",".join(Path(file).name for file in files.split(","))]
    for option, samples in (("--samples", arguments.samples), ("--samples-float32", arguments.samples_float32)):
        options += [option, str(samples)] if samples is not None else []
    options += ["--no-gradients"] if arguments.no_gradients else []
    return ["parity-check", "record", *options, *([] if arguments.port else ["--seed", str(arguments.seed)])]
