"""Recording: runs the official code on a checkpoint and photographs, and writes a trace (:mod:`parity.trace`).

Each case is run in float64, the reference, and in float32 in four ways that PyTorch offers and the official code allows. How far
these miss the reference is the floor of every tensor: what float32 costs the official code itself.

One forward pass serves everything: evaluation mode (no dropout), gradients on. Inference, costs, losses and gradients all come from its
outputs, through the official functions. PyTorch is imported when a recording starts, not before.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import tfmaskformer
from parity import official, trace
from parity.inputs import CaseSpec, InputError, make_targets, parse_case
from parity.meta_architectures import META_ARCHITECTURES, Emit, RecordError, Targets, Task, numpy
from parity.trace import Trace, TraceError, TraceFileWriter


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


@dataclasses.dataclass(frozen=True)
class LoadedCase:
    """A case in memory: ``images`` uint8 [H, W, 3], and the targets of each."""

    name: str
    images: list[np.ndarray]
    targets: list[Targets]
    description: list[dict[str, Any]]


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
    seed: int = 0,
    command: Sequence[str] = (),
) -> Trace:
    """Records a trace, or completes one: a case that is there and was recorded in the same way is kept.

    Args:
        code: from :func:`parity.official.load`.
        config_name: official YAML file (see :meth:`parity.official.Official.config`).
        checkpoint: official ``.pkl`` or ``.pth`` file.
        cases: from :func:`parity.inputs.parse_case`; their names differ.
        directory: made if it is not there.
        options: keys and values that change the config (Detectron2's ``merge_from_list``).
        samples: elements to store of each large tensor; None: all.
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
    keys = {case.name: _digest([provenance, case.description]) for case in loaded}
    manifest_cases = _earlier_cases(Path(directory), provenance)
    manifest_cases.update({case.name: {"key": keys[case.name], "images": case.description} for case in loaded})
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        when = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": list(command)}
        trace.write_manifest(directory, {**provenance, **when}, manifest_cases)
    except OSError as error:
        raise TraceError(f"cannot write trace '{directory}': {error}") from error

    task = None
    for case in loaded:
        if _is_recorded(directory, case.name, keys[case.name]):
            _say(f"{case.name}: there already")
            continue
        if task is None:
            task = META_ARCHITECTURES[config.MODEL.META_ARCHITECTURE](code.model(config, checkpoint))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the official code's deprecations
            _record_case(task, case, Path(directory), samples, {"key": keys[case.name]})
    return Trace(directory)


def _record_case(task: Task, case: LoadedCase, directory: Path, samples: int | None, facts: Mapping[str, Any]) -> None:
    with _Spool(directory) as spool:
        runs = RUNS["float64"]
        with TraceFileWriter(directory, case.name, "float64", runs=[run.name for run in runs], samples=samples, facts=facts) as writer:
            for index, (pixels, targets) in enumerate(zip(case.images, case.targets, strict=True)):
                writer.add("inputs", f"images/{index}", pixels)
                for name, target in targets.items():
                    writer.add("inputs", f"targets/{index}/{name}", target)

            def add_reference(group: str, name: str, array: np.ndarray) -> None:
                writer.add(group, name, array)
                spool.write(group, name, array)
                if group == "matcher" and name.endswith("/total"):
                    writer.add(group, name.replace("total", "gap"), np.array(assignment_gap(array)))

            _run(task, REFERENCE, case, add_reference)
            _measure(task, runs, case, writer, spool)
        runs = RUNS["float32"]
        with TraceFileWriter(directory, case.name, "float32", runs=[run.name for run in runs], samples=samples, facts=facts) as writer:
            _measure(task, runs, case, writer, spool, baseline=True)


def _measure(task: Task, runs: Sequence[Run], case: LoadedCase, writer: TraceFileWriter, spool: _Spool, *, baseline: bool = False) -> None:
    """Runs each of ``runs`` and stores its errors against the spooled reference; with ``baseline``, the values of the first run too."""
    errors: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    noise: dict[str, float] = collections.defaultdict(float)
    for run in runs:
        seen: set[tuple[str, str]] = set()

        def compare(group: str, name: str, array: np.ndarray, run: Run = run, seen: set[tuple[str, str]] = seen) -> None:
            if baseline and run is runs[0]:
                writer.add(group, name, array)
            seen.add((group, name))
            if array.dtype.kind != "f":  # ids and assignments have no error
                return
            expected = spool.read(group, name)
            if expected.shape != array.shape:
                raise RecordError(
                    f"{case.name}: {group} '{name}' is {array.shape} in {run.dtype} {run.name}, {expected.shape} in the reference"
                )
            errors[group, name].append(trace.relative_error(array, expected))
            if group == "matcher" and name.endswith("/total"):
                noise[name] = max(noise[name], float(np.abs(array - expected).max(initial=0)))

        _run(task, run, case, compare)
        if seen != spool.keys():
            raise RecordError(
                f"{case.name}: {run.dtype} {run.name} and the reference do not have the same tensors: {sorted(seen ^ spool.keys())[:3]}"
            )
    for (group, name), of_runs in errors.items():
        writer.set_floor(group, name, of_runs)
    if baseline:
        for name, value in noise.items():
            writer.add("matcher", name.replace("total", "cost_noise"), np.array(value))


def _run(task: Task, run: Run, case: LoadedCase, emit: Emit) -> None:
    """One forward and backward pass of the official model; every result goes to ``emit`` in the order of computation."""
    import torch

    start = time.perf_counter()
    model = task.model
    model.to(getattr(torch, run.dtype), memory_format=torch.channels_last if run.channels_last else torch.contiguous_format)
    where = f"{case.name}, {run.dtype} {run.name}"
    sizes = [pixels.shape[:2] for pixels in case.images]
    inputs = [{"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy())} for pixels in case.images]
    with torch.backends.mkldnn.flags(enabled=run.onednn), torch.enable_grad():
        seen: dict[str, Any] = {}
        with _taps(task, emit, seen):
            results = model([{**image, "height": height, "width": width} for image, (height, width) in zip(inputs, sizes, strict=True)])
        images, returned = seen["images"], seen["returned"]
        for path, tensor in _flatten(task.outputs(returned)):
            emit("outputs", _output_name(path), numpy(tensor))
        _assert_undisturbed(task, images, returned, where)
        with task.given(returned), torch.no_grad():
            resized = model([{**image, **_other_size(size)} for image, size in zip(inputs, sizes, strict=True)])
        for index in range(len(inputs)):
            for prefix, result in ((f"{index}/", results[index]), (f"{index}/resized/", resized[index])):
                _emit_inference(result, prefix, emit)
        del results, resized

        try:
            losses, total = task.losses(returned, images, case.targets, emit)
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from error
        for name, loss in losses.items():
            emit("losses", name, numpy(loss))
        emit("losses", "total", numpy(total))
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                raise RecordError(f"{where}: the loss does not depend on parameter '{name}'")
            emit("gradients", name, numpy(gradient))
    _say(f"{case.name}: {run.dtype} {run.name} {time.perf_counter() - start:.1f} s")


@contextlib.contextmanager
def _taps(task: Task, emit: Emit, seen: dict[str, Any]) -> Iterator[None]:
    """Emits the output of every module call at once (ReLUs that work in place would change it), and the batch that enters the backbone.

    Of the head that is the network's outputs, before what some heads do at inference. ``seen`` receives the batch (``images``) and what
    the head's method returned (``returned``), with their graph.
    """
    calls: collections.Counter[str] = collections.Counter()

    def emit_call(name: str, output: Any) -> None:
        index = calls[name]
        calls[name] += 1
        for path, tensor in _flatten(output):
            emit("taps", f"{name}#{index}" + "".join(f"[{item}]" for item in path), numpy(tensor))

    def hook_for(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: emit_call(name, output)

    def see_images(_module: Any, inputs: Any) -> None:
        seen["images"] = inputs[0]
        emit("taps", "images#0", numpy(inputs[0]))

    def see_returned(returned: Any) -> None:
        seen["returned"] = returned
        emit_call("sem_seg_head", task.outputs(returned))

    untapped = ("", "sem_seg_head", "criterion")
    named = [(name, module) for name, module in task.model.named_modules() if name not in untapped and not name.startswith("criterion.")]
    handles = [module.register_forward_hook(hook_for(name)) for name, module in named]
    handles.append(task.model.backbone.register_forward_pre_hook(see_images))
    try:
        with task.watched(see_returned):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _assert_undisturbed(task: Task, images: Any, returned: Any, where: str) -> None:
    """The same pass without hooks gives the same bits."""
    import torch

    again = getattr(task.model.sem_seg_head, task.method)(task.model.backbone(images))
    tensors = dict(_flatten(task.outputs(again)))
    for path, tensor in _flatten(task.outputs(returned)):
        if not torch.equal(tensor, tensors[path]):
            raise RecordError(
                f"{where}: without hooks, '{_output_name(path)}' has other bits; the recording would not show what the model computes"
            )


def _other_size(size: tuple[int, int]) -> dict[str, int]:
    """An output size (px) that is larger than the image in one axis and smaller in the other."""
    return {"height": size[0] * 4 // 3, "width": size[1] * 3 // 4}


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


def _output_name(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


class _Spool:
    """The float64 reference of a case, on disk in a temporary file: whole tensors, read back one at a time."""

    def __init__(self, directory: Path):
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 closed by __exit__
        self._places: dict[tuple[str, str], tuple[int, np.dtype, tuple[int, ...]]] = {}

    def write(self, group: str, name: str, array: np.ndarray) -> None:
        self._places[group, name] = (self._file.tell(), array.dtype, array.shape)
        self._file.write(np.ascontiguousarray(array).data)

    def read(self, group: str, name: str) -> np.ndarray:
        if (group, name) not in self._places:
            raise RecordError(f"the float64 reference has no {group} '{name}'")
        offset, dtype, shape = self._places[group, name]
        self._file.seek(offset)
        return np.frombuffer(self._file.read(dtype.itemsize * math.prod(shape)), dtype).reshape(shape)

    def keys(self) -> set[tuple[str, str]]:
        return set(self._places)

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def _provenance(code: official.Official, config_name: str, config: Any, checkpoint: Path, samples: int | None, seed: int) -> dict[str, Any]:
    """Everything that the values of a recording depend on."""
    import torch

    if not checkpoint.is_file():
        raise official.OfficialError(f"no checkpoint '{checkpoint}'")
    digest = hashlib.sha256()
    with open(checkpoint, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {
        "tool": f"tfmaskformer {tfmaskformer.__version__}",
        "commits": code.commits,
        "stand_ins": list(code.stand_ins),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "numpy", "scipy", "pillow")},
        "cpu": {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "config": _config_name(config_name),
        "checkpoint": {"file": checkpoint.name, "sha256": digest.hexdigest()},
        **code.metadata(config),
        "samples": samples,
        "seed": seed,
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
    differing = [name for name in wanted if recorded.get(name) != wanted[name]]
    if differing:
        raise TraceError(f"'{directory}' holds a trace with other {', '.join(differing)}; give another folder")
    return manifest["cases"]


def _is_recorded(directory: str | Path, name: str, key: str) -> bool:
    try:
        with trace.Case(directory, name) as case:
            return case.reference.facts["key"] == key
    except TraceError:
        return False


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``parity-check record``."""
    parser.add_argument("--src", required=True, metavar="FILE", help="official checkpoint, .pkl or .pth")
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="official config, for example coco-panoptic/maskformer_panoptic_R50_bs64_554k"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the trace; cases that are there already are kept")
    parser.add_argument(
        "--case",
        required=True,
        action="append",
        dest="cases",
        metavar="[NAME=]FILE@HxW[:OBJECTS][,…]",
        help="a photograph, resized to H x W px, and how many objects to make up for the losses; several, separated by commas, "
        "are one padded batch; may be given again",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="store N elements of each large tensor, and exact statistics; default: everything"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the made-up objects (default: 0)")
    for name, variable in official.FOLDERS.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=f"source folder of the official code (default: ${variable})")


def run(arguments: argparse.Namespace) -> int:
    """``parity-check record``: 0 recorded, 2 bad input, 3 could not run. Prints the path of the trace."""
    try:
        if arguments.samples is not None and arguments.samples < 2:
            raise InputError(f"--samples {arguments.samples}: expected 2 or more, or leave it out to store everything")
        cases = [parse_case(text) for text in arguments.cases]
        code = official.load(arguments.maskformer, arguments.detectron2)
        record(
            code,
            arguments.config,
            arguments.src,
            cases,
            arguments.out,
            samples=arguments.samples,
            seed=arguments.seed,
            command=_command(arguments),
        )
    except (InputError, TraceError, official.OfficialError) as error:
        _say(f"error: {error}")
        return 3 if isinstance(error, official.OfficialUnavailable) else 2
    except RecordError as error:
        _say(f"error: {error}")
        return 3
    print(arguments.out)
    return 0


def _command(arguments: argparse.Namespace) -> list[str]:
    """The command that was given, without the folders of this machine."""
    options = [
        "--src",
        Path(arguments.src).name,
        "--config",
        _config_name(arguments.config),
        "--out",
        Path(arguments.out).name,
    ]
    for case in arguments.cases:
        name, equals, files = case.rpartition("=")
        options += ["--case", name + equals + ",".join(Path(file).name for file in files.split(","))]
    options += ["--samples", str(arguments.samples)] if arguments.samples is not None else []
    return ["parity-check", "record", *options, "--seed", str(arguments.seed)]
