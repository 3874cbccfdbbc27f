"""Recording a training: the official model, criterion, optimizer and schedule for K steps, as :mod:`parity.trajectory` describes.

The float64 training is the reference. The others, float32 on different kernels and numbers of threads, are trained from the same start
on the same images; how far they are from the reference after each step is the drift. PyTorch is imported when a recording starts, not
before.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from parity import official, record
from parity.inputs import CaseSpec, InputError, parse_case
from parity.meta_architectures import RecordError, numpy
from parity.record import LoadedCase, Run, load_case
from parity.sampling import sketch
from parity.trace import POSITION_EMBEDDING, SKETCH, TraceError, TraceFileWriter
from parity.trajectory import BUFFERS, EQUAL, TRAININGS, _kind, hash_of, kept, records_of

STEPS = 20
SAMPLES = 8
"""Elements that are stored of a large tensor; its sketch stands for all of them."""


class ThreadedRun(NamedTuple):
    """A run (:class:`parity.record.Run`) on a number of threads."""

    run: Run
    threads: int

    @property
    def name(self) -> str:
        """As it is written in the files."""
        return f"{self.run.name}+{self.threads} threads"


REFERENCE = ThreadedRun(record.REFERENCE, 1)
RUNS = {
    "float64": tuple(ThreadedRun(run, 1) for run in record.RUNS["float64"]),
    "float32": tuple(ThreadedRun(run, threads) for threads in (1, 2) for run in record.RUNS["float32"] if threads == 1 or run.onednn),
}
"""The trainings of each file of which the drift is stored; the values of the first float32 one are stored too."""

NORMS = ("GroupNorm", "LayerNorm")
POSITIONS = ("relative_position_bias_table", "absolute_pos_embed")


class TrainingData(NamedTuple):
    """What an official dataset mapper makes of a data set, and the fact ``data`` of the recording."""

    batches: Sequence[LoadedCase]
    fact: Mapping[str, Any]


class _Brief(NamedTuple):
    """What is kept of a tensor of the reference until the others are compared with it: all of it, or its sketch."""

    values: np.ndarray
    l2: float


def record_steps(
    code: official.Official,
    config_name: str,
    checkpoint: str | Path,
    cases: Sequence[CaseSpec],
    directory: str | Path,
    *,
    steps: int = STEPS,
    trainings: Sequence[str] = TRAININGS,
    options: Sequence[Any] = (),
    samples: int | None = SAMPLES,
    seed: int = 0,
    command: Sequence[str] = (),
    data: TrainingData | None = None,
    tensors_after: Sequence[int] | None = None,
) -> None:
    """Records trainings; one that is there already is recorded again.

    Args:
        code: from :func:`parity.official.load`.
        config_name, checkpoint, options: as of :func:`parity.record.record`; the options also change the recipe.
        cases: the batches, which the steps take in turn.
        directory: made if it is not there.
        steps: how many.
        trainings: of :data:`parity.trajectory.TRAININGS`.
        samples: elements to store of each large tensor; None: all.
        seed: of the targets and of the masks.
        command: how this was asked for.
        data: the batches, in the place of ``cases``; of them hashes are recorded.
        tensors_after: the steps after which gradients, moments, weights and buffers are recorded; None: all.

    Raises:
        official.OfficialError, InputError, TraceError: bad input, nothing recorded.
        RecordError: the official code did not do what a recording relies on.
    """
    config = code.config(config_name)
    config.merge_from_list(list(options))
    loaded = [load_case(case, config, seed) for case in cases] if data is None else data.batches
    provenance = record._provenance(code, config_name, config, Path(checkpoint), samples, seed)
    ends = np.cumsum([len(case.images) for case in loaded]).tolist()
    facts = {
        **provenance,
        "options": [str(option) for option in options],
        "recipe": json.loads(json.dumps(config.SOLVER)),
        "steps": steps,
        **({} if data is None else {"data": data.fact}),
        **({} if tensors_after is None else {"tensors_after": list(tensors_after)}),
        "batches": [list(range(end - len(case.images), end)) for case, end in zip(loaded, ends, strict=True)],
        "cases": {case.name: case.description for case in loaded if data is None},
        "command": list(command),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TraceError(f"cannot write '{directory}': {error}") from error
    for name in trainings:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the official code's deprecations
            _record_training(
                _Trainer(code, config, checkpoint, loaded, steps, seed, name == "dropout", data is not None, tensors_after),
                Path(directory),
                name,
                samples,
                facts,
            )


@dataclasses.dataclass(frozen=True)
class _Trainer:
    """What a training is made of.

    ``assignments``: step → what the matcher of the reference returned, call after call. The other trainings take it as it is: where two
    assignments cost the same but for rounding, each run would choose for itself, and all that comes after would be another training.
    """

    code: official.Official
    config: Any
    checkpoint: str | Path
    batches: Sequence[LoadedCase]
    steps: int
    seed: int
    dropout: bool
    of_data_set: bool
    tensors_after: Sequence[int] | None
    assignments: dict[int, list[tuple[np.ndarray, np.ndarray]]] = dataclasses.field(default_factory=dict)

    def train(self, how: ThreadedRun, emit: Callable[[str, str, np.ndarray], None]) -> dict[str, str]:
        """Trains from the checkpoint; every record goes to ``emit``. Returns parameter → part."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(how.threads)
        try:
            with torch.backends.mkldnn.flags(enabled=how.run.onednn):
                return self._train(how, emit)
        finally:
            torch.set_num_threads(threads)

    def _train(self, how: ThreadedRun, emit: Callable[[str, str, np.ndarray], None]) -> dict[str, str]:
        import torch

        start = time.perf_counter()
        model = self.code.model(
            self.config, self.checkpoint, dtype=how.run.dtype, channels_last=how.run.channels_last, training=True, seed=self.seed
        )
        if not self.dropout:
            _silence(model)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the names of position tables
            optimizer = self.code.trainer().build_optimizer(self.config, model)
        scheduler = self.code.trainer().build_lr_scheduler(self.config, optimizer)
        groups = {id(group["params"][0]): group for group in optimizer.param_groups}
        parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in groups}
        if len(groups) != len(optimizer.param_groups) or len(parameters) != len(groups):
            raise RecordError(f"the official optimizer has {len(groups)} groups for {len(parameters)} parameters, expected one for each")
        parts = _parts(model, parameters)
        before, held_before = _weights(parameters), _held(model)
        emit("scalars", "decay", np.array([groups[id(parameter)]["weight_decay"] for parameter in parameters.values()]))
        for step in range(1, self.steps + 1):
            index = (step - 1) % len(self.batches)
            emit("scalars", f"{step}/lr", np.array([groups[id(parameter)]["lr"] for parameter in parameters.values()]))
            with contextlib.ExitStack() as stack:
                if self.dropout:
                    stack.enter_context(_shared_masks(model, self.seed, step))
                if step <= (1 if self.of_data_set else len(self.batches)) and how is REFERENCE:
                    stack.enter_context(_position_embeddings(model, index, emit))
                if how.run.dtype == "float64":  # the baselines cast logits to float32, for the sake of mixed precision
                    stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.clone))
                calls = stack.enter_context(_assignments(self.assignments.get(step) if how is not REFERENCE else None))
                losses = model(_inputs(self.batches[index]))
            if how is REFERENCE and self.of_data_set:
                emit("scalars", f"{step}/data", hash_of(self.batches[index].images, self.batches[index].targets))
            if how is REFERENCE and calls:
                self.assignments[step] = calls
                emit("scalars", f"{step}/assignment", _assignment(calls, self.batches[index]))
            total = sum(losses.values())
            for key, loss in {**losses, "total_loss": total}.items():
                emit("scalars", f"{step}/losses/{key}", numpy(loss))
            optimizer.zero_grad()
            total.backward()
            with _clipping() as norms:
                optimizer.step()
            scheduler.step()
            if not norms:
                norms = [_norm(parameters)]
            emit("scalars", f"{step}/gradient_norm", numpy(norms[0]))
            if self.tensors_after is not None and step not in self.tensors_after:
                continue
            states = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
            tensors: dict[str, Mapping[str, np.ndarray]] = {"clipped": {name: numpy(item.grad) for name, item in parameters.items()}}
            for slot in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if all(state.get(slot) is not None for state in states.values()):
                    tensors[slot] = {name: numpy(state[slot]) for name, state in states.items()}
            tensors["weights"] = {name: array - before[name] for name, array in _weights(parameters).items()}
            for quantity, of in tensors.items():
                for name, array in records_of(step, quantity, of, parts):
                    emit("steps", name, array)
            for name, array in records_of(step, BUFFERS, {BUFFERS: _held(model) - held_before}, {BUFFERS: BUFFERS}):
                emit("steps", name, array)
        record.say(f"{'dropout' if self.dropout else 'plain'}: {how.run.dtype} {how.name} {time.perf_counter() - start:.1f} s")
        return parts


def _record_training(trainer: _Trainer, directory: Path, name: str, samples: int | None, facts: Mapping[str, Any]) -> None:
    reference: dict[tuple[str, str], _Brief] = {}
    facts = {**facts, "dropout": trainer.dropout}
    facts["key"] = record._digest([facts, name])

    def writer_of(dtype: str) -> TraceFileWriter:
        return TraceFileWriter(directory, name, dtype, runs=[run.name for run in RUNS[dtype]], samples=samples, facts=facts)

    with writer_of("float64") as writer:
        index = 0
        for case in () if trainer.of_data_set else trainer.batches:
            for pixels, targets in zip(case.images, case.targets, strict=True):
                writer.add("inputs", f"images/{index}", pixels)
                for key, target in targets.items():
                    writer.add("inputs", f"targets/{index}/{key}", target)
                index += 1

        def add_reference(group: str, record_name: str, array: np.ndarray) -> None:
            writer.add(group, record_name, array)
            if group != "taps" and _kind(record_name) not in EQUAL:
                reference[group, record_name] = _brief(group, record_name, array, samples)

        writer.facts["parts"] = trainer.train(REFERENCE, add_reference)
        _measure(trainer, RUNS["float64"], writer, reference, samples, baseline=False)
    with writer_of("float32") as writer:
        _measure(trainer, RUNS["float32"], writer, reference, samples, baseline=True)


def _measure(
    trainer: _Trainer,
    runs: Sequence[ThreadedRun],
    writer: TraceFileWriter,
    reference: Mapping[tuple[str, str], _Brief],
    samples: int | None,
    *,
    baseline: bool,
) -> None:
    """Trains as each of ``runs`` and stores how far it is from the reference; with ``baseline``, the values of the first too."""
    drift: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for run in runs:
        seen: set[tuple[str, str]] = set()

        def compare(group: str, name: str, array: np.ndarray, run: ThreadedRun = run, seen: set[tuple[str, str]] = seen) -> None:
            if baseline and run is runs[0]:
                writer.add(group, name, array)
            seen.add((group, name))
            expected = reference[group, name]
            difference = float(np.linalg.norm(_values(group, name, array, samples) - expected.values))
            drift[group, name].append(difference / expected.l2 if expected.l2 else math.inf if difference else 0.0)

        trainer.train(run, compare)
        if seen != reference.keys():
            raise RecordError(
                f"{run.run.dtype} {run.name} and the reference do not have the same records: {sorted(seen ^ reference.keys())[:3]}"
            )
    for (group, name), of_runs in drift.items():
        writer.set_floor(group, name, of_runs)


def _brief(group: str, name: str, array: np.ndarray, samples: int | None) -> _Brief:
    return _Brief(_values(group, name, array, samples), float(np.linalg.norm(np.float64(array).ravel())))


def _values(group: str, name: str, array: np.ndarray, samples: int | None) -> np.ndarray:
    whole = group != "steps" or samples is None or array.size <= samples
    return np.float64(array).ravel() if whole else sketch(name, array, SKETCH[group])


def _parts(model: Any, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Parameter → those that upstream's ``build_optimizer`` tells apart: backbone or not; norm, embedding, position table or the rest."""
    modules = dict(model.named_modules())
    parts = {}
    for name in parameters:
        path, _, last = name.rpartition(".")
        kind = type(modules[path]).__name__
        what = "norm" if kind in NORMS else "embed" if kind == "Embedding" else "position" if last in POSITIONS else "weight"
        parts[name] = f"{'backbone' if 'backbone' in path else 'sem_seg_head'}.{what}"
    return parts


def _weights(parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: numpy(parameter).astype(np.float64) for name, parameter in parameters.items()}


def _held(model: Any) -> np.ndarray:
    """All buffers of the network that a training could move, in a row, float64."""
    of_network = [buffer for name, buffer in sorted(model.named_buffers()) if name.startswith(("backbone.", "sem_seg_head."))]
    return np.concatenate([np.zeros(0), *(numpy(buffer).astype(np.float64).ravel() for buffer in of_network if buffer.is_floating_point())])


def _norm(parameters: Mapping[str, Any]) -> Any:
    import torch

    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters.values()])


def _inputs(batch: LoadedCase) -> list[dict[str, Any]]:
    """A batch as the official dataset mappers hand it to the model, without augmentation."""
    import torch
    from detectron2.structures import Instances

    inputs = []
    for pixels, target in zip(batch.images, batch.targets, strict=True):
        own: dict[str, Any] = {"image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))}
        if "sem_seg" in target:
            own["sem_seg"] = torch.from_numpy(target["sem_seg"]).long()
        else:
            own["instances"] = Instances(
                pixels.shape[:2], gt_classes=torch.from_numpy(target["labels"]), gt_masks=torch.from_numpy(target["masks"])
            )
        inputs.append(own)
    return inputs


@contextlib.contextmanager
def _assignments(given: Sequence[tuple[np.ndarray, np.ndarray]] | None) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Inside, the official matcher takes the given assignments, where there are any. Collects what it takes."""
    from mask_former.modeling import matcher

    own = matcher.linear_sum_assignment
    calls: list[tuple[np.ndarray, np.ndarray]] = []

    def assign(cost: Any) -> tuple[np.ndarray, np.ndarray]:
        calls.append(own(cost) if given is None else given[len(calls)])
        return calls[-1]

    with mock.patch.object(matcher, "linear_sum_assignment", assign):
        yield calls


def _assignment(calls: Sequence[tuple[np.ndarray, np.ndarray]], batch: LoadedCase) -> np.ndarray:
    """int32 [layers, images, objects], the query of each object, −1 for none; the final layer first, as the official criterion has it."""
    counts = [len(target["labels"]) for target in batch.targets]
    assignment = np.full((len(calls) // len(counts), len(counts), max(counts)), -1, np.int32)
    for number, (queries, objects) in enumerate(calls):
        assignment[number // len(counts), number % len(counts), objects] = queries
    return assignment


@contextlib.contextmanager
def _clipping() -> Iterator[list[Any]]:
    """Collects the norm that the official optimizer clips by."""
    import torch

    norms: list[Any] = []
    clip = torch.nn.utils.clip_grad_norm_

    def seen(*arguments: Any, **options: Any) -> Any:
        norms.append(clip(*arguments, **options))
        return norms[-1]

    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", seen):
        yield norms


@contextlib.contextmanager
def _position_embeddings(model: Any, batch: int, emit: Callable[[str, str, np.ndarray], None]) -> Iterator[None]:
    """Emits the first output of each position embedding."""
    handles, done = [], set()

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if name not in done:
                done.add(name)
                emit("taps", f"{name}#{batch}", numpy(output))

        return hook

    for name, module in model.named_modules():
        if name.endswith(POSITION_EMBEDDING):
            handles.append(module.register_forward_hook(hook_for(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rates(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, module, attribute with the rate) of everything that drops."""
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            yield name, module, "p"
        elif isinstance(module, torch.nn.MultiheadAttention):
            yield name, module, "dropout"
        elif type(module).__name__ == "DropPath":
            yield name, module, "drop_prob"


def _silence(model: Any) -> None:
    for _, module, attribute in _rates(model):
        setattr(module, attribute, 0.0)


@contextlib.contextmanager
def _shared_masks(model: Any, seed: int, step: int) -> Iterator[None]:
    """Inside, what drops takes its masks from :func:`parity.trajectory.kept`.

    Outside the backbone, dropout works on sequences, which upstream has length first; the masks are those of a batch first.
    """
    import torch

    calls: collections.Counter[str] = collections.Counter()

    def drop(name: str, inputs: Any, rate: float, shape: tuple[int, ...], sequence_first: bool) -> Any:
        place = f"{name}#{calls[name]}"
        calls[name] += 1
        mask = kept(seed, step, place, math.prod(shape), rate).reshape(shape)
        if sequence_first:
            mask = mask.swapaxes(0, 1)
        return inputs * (torch.from_numpy(np.ascontiguousarray(mask)).to(inputs.dtype) * (1 / (1 - rate)))

    def forward_of(name: str, module: Any, attribute: str) -> Callable[[Any], Any]:
        first = attribute == "p" and not name.startswith("backbone")

        def forward(inputs: Any) -> Any:
            rate, shape = getattr(module, attribute), tuple(inputs.shape)
            if rate == 0:
                return inputs
            if attribute == "drop_prob":
                shape = (shape[0],) + (1,) * (len(shape) - 1)
            elif first:
                shape = (shape[1], shape[0], *shape[2:])
            return drop(name, inputs, rate, shape, first)

        return forward

    def attention_of(name: str, module: Any) -> Callable[..., Any]:
        own = module.forward

        def forward(*arguments: Any, **options: Any) -> Any:
            def inner(weights: Any, p: float, training: bool = True, inplace: bool = False) -> Any:
                return drop(name, weights, p, tuple(weights.shape), False)

            with mock.patch.object(torch.nn.functional, "dropout", inner):
                return own(*arguments, **options)

        return forward

    with contextlib.ExitStack() as stack:
        for name, module, attribute in _rates(model):
            forward = attention_of(name, module) if attribute == "dropout" else forward_of(name, module, attribute)
            stack.enter_context(mock.patch.object(module, "forward", forward))
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``parity-check record-steps``."""
    parser.add_argument("--src", required=True, metavar="FILE", help="official checkpoint, .pkl or .pth, to start from")
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="official config, for example coco-panoptic/maskformer_panoptic_R50_bs64_554k"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the recording")
    parser.add_argument(
        "--case",
        required=True,
        action="append",
        dest="cases",
        metavar="[NAME=]FILE@HxW[:OBJECTS][,…]",
        help="a batch, as for 'parity-check record'; of several, the steps take one after the other",
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="K", help="default: %(default)s")
    parser.add_argument("--training", choices=TRAININGS, action="append", help="without dropout, or with shared masks (default: both)")
    parser.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        metavar="N",
        help="elements to store of each large tensor beside its sketch (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the made-up objects and of the masks (default: 0)")
    parser.add_argument(
        "--options", nargs="*", default=[], metavar="KEY VALUE", help="what to change in the config: SOLVER.BASE_LR 0.001 …"
    )
    for name, variable in official.FOLDERS.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=f"source folder of the official code (default: ${variable})")


def run(arguments: argparse.Namespace) -> int:
    """``parity-check record-steps``: 0 recorded, 2 bad input, 3 could not run. Prints the path of the recording."""
    try:
        for option, value, least in (("--steps", arguments.steps, 1), ("--samples", arguments.samples, 2)):
            if value < least:
                raise InputError(f"{option} {value}: expected {least} or more")
        if len(arguments.options) % 2:
            raise InputError(f"--options: {len(arguments.options)} words, expected pairs of a key and a value")
        record_steps(
            official.load(arguments.maskformer, arguments.detectron2),
            arguments.config,
            arguments.src,
            [parse_case(text) for text in arguments.cases],
            arguments.out,
            steps=arguments.steps,
            trainings=arguments.training or TRAININGS,
            options=arguments.options,
            samples=arguments.samples,
            seed=arguments.seed,
            command=_command(arguments),
        )
    except (InputError, TraceError, official.OfficialError) as error:
        record.say(f"error: {error}")
        return 3 if isinstance(error, official.OfficialUnavailable) else 2
    except RecordError as error:
        record.say(f"error: {error}")
        return 3
    print(arguments.out)
    return 0


def _command(arguments: argparse.Namespace) -> list[str]:
    """The command that was given, without the folders of this machine."""
    options = ["--src", Path(arguments.src).name, "--config", record._config_name(arguments.config), "--out", Path(arguments.out).name]
    for case in arguments.cases:
        name, equals, files = case.rpartition("=")
        options += ["--case", name + equals + ",".join(Path(file).name for file in files.split(","))]
    options += ["--steps", str(arguments.steps), "--samples", str(arguments.samples), "--seed", str(arguments.seed)]
    for name in arguments.training or ():
        options += ["--training", name]
    return ["parity-check", "record-steps", *options, *(["--options", *arguments.options] if arguments.options else [])]
