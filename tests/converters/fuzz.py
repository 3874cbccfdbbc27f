"""Reads damaged checkpoints by the thousand: ``python -m tests.converters.fuzz [--runs N] [--seed S] [--kind NAME]``.

Every file comes from a small good one, by changes that its kind, the seed and its number tell, so that it can be made again: opcodes and
fields dropped, doubled, exchanged and taken from other files, numbers inflated, bits flipped, blocks copied, ends cut off. A reader must
return tensors or raise ConversionError. Anything else is a failure: another exception, a death of the process, more than ``LIMIT_S`` of
processor time, or more memory than ``LIMIT_BYTES`` and ``LIMIT_FACTOR`` times the file. Such a file is kept. Exits with 1 if there is one.

Reading goes on in a child process, so that a failure of a C library is seen too.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import json
import mmap
import os
import pathlib
import pickle
import pickletools
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from converters import checkpoint, hdf5
from converters.errors import ConversionError
from converters.safetensors_file import DTYPES, read_safetensors, write_safetensors
from converters.torch_zip import read_zip, write_zip
from converters.unpickle import read_model

LIMIT_S = 2.0
LIMIT_BYTES = 1 << 17
LIMIT_FACTOR = 200
MAX_BYTES = 1 << 23

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "torch"

Blocks = list[bytes]


@dataclasses.dataclass(frozen=True)
class Seed:
    """A good file in blocks (opcodes, fields), and what makes a file of changed ones."""

    blocks: Blocks
    join: Callable[[Blocks], bytes] = b"".join


@dataclasses.dataclass(frozen=True)
class Kind:
    """Name, seeds, the reader (content of a file → its tensors), and of how many files one is tried, where reading takes long."""

    name: str
    seeds: Callable[[], list[Seed]]
    read: Callable[[bytes], Iterable[np.ndarray]]
    every: int = 1


def blocks_of_pickle(data: bytes) -> Blocks:
    """A pickle, or several in a row, opcode by opcode."""
    file = io.BytesIO(data)
    starts = []
    while data[file.tell() : file.tell() + 1] in (b"\x80", b"(", b"}", b"c"):
        base = file.tell()
        starts += [base + (position or 0) - (0 if base == 0 else base) for _, _, position in pickletools.genops(file)]
    starts.append(file.tell())
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True) if start < end]


TENSORS = {
    "backbone.stem.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "backbone.stem.bias": np.array([1.5, -2.0], np.float16),
    "index": np.arange(4),
    "none": np.zeros((0, 2), np.float32),
}
FILE = {
    "model": TENSORS | {"fortran": np.asfortranarray(TENSORS["backbone.stem.weight"]), "big": np.array([1.0], ">f8")},
    "optimizer": {"state": {0: {"step": np.float32(3)}}, "param_groups": [{"betas": (0.9, 0.999), "lr": None, "params": [0, 300]}]},
    "scheduler": {"milestones": collections.Counter({70_000: 1}), "rates": collections.OrderedDict(a=[1e-4])},
    "iteration": 2**40,
    "__author__": "me",
}


def pickles(protocol: int) -> list[Seed]:
    """With arrays of NumPy, and with tensors of PyTorch."""
    files = pickle.dumps(FILE, protocol), (GOLDEN / f"tensors_protocol{protocol}.pkl").read_bytes()
    return [Seed(blocks_of_pickle(data)) for data in files]


def archives() -> list[Seed]:
    """Of ``torch.save``: changed as they are, and with a changed pickle in a good archive."""
    file = io.BytesIO()
    write_zip(file, TENSORS, {})
    seeds = []
    for data in (file.getvalue(), *((GOLDEN / name).read_bytes() for name in ("checkpoint.pth", "state_dict.pth"))):
        starts = [match.start() for match in re.finditer(rb"PK[\x01-\x08][\x02-\x08]", data)]
        seeds.append(Seed([data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]))
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in contents if name.endswith("/data.pkl"))
        seeds.append(
            Seed(blocks_of_pickle(contents[name]), lambda blocks, name=name, contents=contents: archive_of(contents, name, blocks))
        )
    return seeds


def archive_of(contents: dict[str, bytes], name: str, blocks: Blocks) -> bytes:
    """The archive with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for entry, content in contents.items():
            archive.writestr(zipfile.ZipInfo(entry), b"".join(blocks) if entry == name else content)
    return file.getvalue()


def old_files() -> list[Seed]:
    """What ``torch.save`` wrote before PyTorch 1.6."""
    return [Seed(blocks_of_pickle((GOLDEN / "old.pth").read_bytes()))]


def safetensors_files() -> list[Seed]:
    """Changed as they are, and with a length that fits a changed header."""
    file = io.BytesIO()
    write_safetensors(file, TENSORS | {name: np.zeros(3, dtype) for name, dtype in DTYPES.items()}, {"format": "pt"})
    data = file.getvalue()
    end = 8 + int.from_bytes(data[:8], "little")
    tokens = re.findall(rb'"[^"]*"|[0-9]+|.', data[8:end])
    content = data[end:]
    return [Seed([data[:8], *tokens, content]), Seed(tokens, lambda blocks: with_length(b"".join(blocks)) + content)]


def with_length(header: bytes) -> bytes:
    """The header of a safetensors file."""
    return struct.pack("<Q", len(header)) + header


def hdf5_files() -> list[Seed]:
    """Plain, and of Keras: changed between the signatures of their parts."""
    seeds = []
    for groups in ((), ("layers/conv2d/vars", "_layer_checkpoint_dependencies")):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "a.h5"
            names = {f"{groups[0]}/{index}" if groups else name: tensor for index, (name, tensor) in enumerate(TENSORS.items())}
            hdf5.write(path, names, groups, {"tfmaskformer.config": "{}"})
            data = path.read_bytes()
        starts = [match.start() for match in re.finditer(rb"\x89HDF|TREE|HEAP|SNOD|OHDR", data)]
        seeds.append(Seed([data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]))
    return seeds


def read_hdf5(data: bytes) -> Iterable[np.ndarray]:
    """Written to a file, for the process that lists it."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return hdf5.read(pathlib.Path(file.name), mapped(data)).tensors.values()


def tensorflow_checkpoints() -> list[Seed]:
    """The index and the data file of a checkpoint, with the length of the index in front."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        checkpoint.write(path, {name: tensor for name, tensor in TENSORS.items() if tensor.size})
        index, content = ((path / name).read_bytes() for name in checkpoint.FILES[1:])
    parts = re.split(rb"(?=model/|_CHECK)", index)
    return [Seed(parts, lambda blocks: with_length(b"".join(blocks)) + content)]


def read_tensorflow_checkpoint(data: bytes) -> list[np.ndarray]:
    """Written to a directory, and read with all its tensors."""
    length = int.from_bytes(data[:8], "little")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / checkpoint.FILES[0]).write_text('model_checkpoint_path: "ckpt"')
        (path / checkpoint.FILES[1]).write_bytes(data[8 : 8 + length])
        (path / checkpoint.FILES[2]).write_bytes(data[8 + length :])
        return [np.asarray(tensor) for tensor in checkpoint.read(path).tensors.values()]


def mapped(data: bytes) -> mmap.mmap:
    """As if the file was mapped into memory."""
    memory = mmap.mmap(-1, max(len(data), 1))
    memory.write(data)
    return memory


KINDS = [
    *(
        Kind(f"pickle {protocol}", lambda protocol=protocol: pickles(protocol), lambda data: read_model(data).tensors.values())
        for protocol in range(6)
    ),
    Kind("torch.save", archives, lambda data: read_zip(mapped(data)).tensors.values()),
    Kind("torch.save before 1.6", old_files, lambda data: read_model(data).tensors.values()),
    Kind("safetensors", safetensors_files, lambda data: read_safetensors(data).tensors.values()),
    Kind("HDF5", hdf5_files, read_hdf5, every=20),
    Kind("TensorFlow checkpoint", tensorflow_checkpoints, read_tensorflow_checkpoint, every=20),
]


def changed(seeds: Sequence[Seed], generator: random.Random) -> bytes:
    """A file like the seeds with one to six changes, before and after its blocks are joined."""
    seed = generator.choice(seeds)
    blocks = list(seed.blocks)
    for _ in range(generator.choice((0, 0, 1, 1, 2, 4))):
        generator.choice(BLOCK_CHANGES)(blocks, generator.choice(seeds).blocks, generator)
    data = bytearray(seed.join(blocks))
    for _ in range(generator.choice((0, 0, 0, 1, 2) if blocks != seed.blocks else (1, 1, 2))):
        generator.choice(BYTE_CHANGES)(data, generator)
    return bytes(data)


def _drop(blocks: Blocks, others: Blocks, generator: random.Random) -> None:
    at = generator.randrange(len(blocks) + 1)
    del blocks[at : at + generator.choice((1, 1, 2, 8))]


def _double(blocks: Blocks, others: Blocks, generator: random.Random) -> None:
    at, count = generator.randrange(len(blocks) + 1), generator.choice((1, 1, 2, 8))
    blocks[at:at] = blocks[at : at + count] * generator.choice((1, 1, 3, 100))


def _exchange(blocks: Blocks, others: Blocks, generator: random.Random) -> None:
    if blocks:
        first, second = generator.randrange(len(blocks)), generator.randrange(len(blocks))
        blocks[first], blocks[second] = blocks[second], blocks[first]


def _take(blocks: Blocks, others: Blocks, generator: random.Random) -> None:
    at, start = generator.randrange(len(blocks) + 1), generator.randrange(len(others))
    blocks[at : at + generator.choice((0, 1))] = others[start : start + generator.choice((1, 1, 2, 8))]


def _splice(blocks: Blocks, others: Blocks, generator: random.Random) -> None:
    blocks[generator.randrange(len(blocks) + 1) :] = others[generator.randrange(len(others)) :]


def _change_block(blocks: Blocks, others: Blocks, generator: random.Random) -> None:
    if blocks:
        at = generator.randrange(len(blocks))
        data = bytearray(blocks[at])
        generator.choice(BYTE_CHANGES)(data, generator)
        blocks[at] = bytes(data)


def _flip(data: bytearray, generator: random.Random) -> None:
    if data:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def _inflate(data: bytearray, generator: random.Random) -> None:
    """A number becomes an extreme one: one in digits, if there is any, or some bytes."""
    digits = list(re.finditer(rb"[0-9]+", data))
    value = generator.choice((0, 1, 127, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1))
    if digits and generator.random() < 0.5:
        found = generator.choice(digits)
        data[found.start() : found.end()] = generator.choice((b"%d" % value, b"-%d" % value, b"9" * 300, b"9" * 5000))
    else:
        size = generator.choice((1, 2, 4, 8))
        at = generator.randrange(len(data) + 1)
        data[at : at + size] = (value % 256**size).to_bytes(size, generator.choice(("little", "big")))


def _copy(data: bytearray, generator: random.Random) -> None:
    start, at = generator.randrange(len(data) + 1), generator.randrange(len(data) + 1)
    part = data[start : start + generator.choice((1, 4, 16, 200))]
    data[at : at + len(part) * generator.choice((0, 1))] = part


def _cut(data: bytearray, generator: random.Random) -> None:
    at = generator.randrange(len(data) + 1)
    del data[at : at + generator.choice((1, 2, 8, len(data)))]


def _replace(data: bytearray, generator: random.Random) -> None:
    at = generator.randrange(len(data) + 1)
    data[at : at + generator.choice((0, 1, 4))] = generator.randbytes(generator.choice((1, 1, 2, 8)))


BLOCK_CHANGES = (_drop, _double, _exchange, _take, _splice, _change_block, _change_block, _change_block)
BYTE_CHANGES = (_flip, _inflate, _inflate, _copy, _cut, _replace)


@dataclasses.dataclass
class Outcome:
    """What became of some files."""

    read: int = 0
    refused: int = 0
    errors: set[str] = dataclasses.field(default_factory=set)
    most_bytes: float = 0
    longest_s: float = 0

    def add(self, read: int, refused: int, errors: Iterable[str], most_bytes: float, longest_s: float) -> None:
        """Counts further ones."""
        self.read += read
        self.refused += refused
        self.errors |= set(errors)
        self.most_bytes = max(self.most_bytes, most_bytes)
        self.longest_s = max(self.longest_s, longest_s)


def file_of(kind: Kind, seeds: Sequence[Seed], seed: int, number: int) -> bytes:
    """The file of this number."""
    return changed(seeds, random.Random(f"{seed} {kind.name} {number}"))


def read_one(kind: Kind, data: bytes, outcome: Outcome) -> str | None:
    """Reads a file and looks at each tensor; what went wrong, or None."""
    tracemalloc.reset_peak()
    before_bytes, _ = tracemalloc.get_traced_memory()
    start_s = time.process_time()
    read, refused, errors = 0, 0, []
    try:
        for tensor in kind.read(data):
            np.count_nonzero(tensor)
        read = 1
    except ConversionError as error:
        refused = 1
        errors = [re.sub(r"[0-9]+|'[^']*'|b\".*|\(.*", "…", str(error).partition("\n")[0])]
    except BaseException:
        return traceback.format_exc()
    finally:
        took_s = time.process_time() - start_s
        peak_bytes = tracemalloc.get_traced_memory()[1] - before_bytes
    outcome.add(read, refused, errors, (peak_bytes - LIMIT_BYTES) / max(len(data), 1), took_s)
    if peak_bytes > LIMIT_BYTES + LIMIT_FACTOR * len(data):
        return f"{peak_bytes} bytes of memory for a file of {len(data)}"
    return None


def run(kind: Kind, runs: int, seed: int, directory: pathlib.Path) -> tuple[Outcome, list[str]]:
    """All files of a kind; what went wrong."""
    outcome, failures = Outcome(), []
    current = mmap.mmap(-1, 16 + MAX_BYTES)  # number, length and content of the file that is being read, in memory shared with the child
    start = 0
    while start < runs:
        current[:16] = bytes(16)
        results, sent = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.close(results)
                _child(kind, range(start, runs), seed, current, sent)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(sent)
        with os.fdopen(results) as lines:
            reported = lines.read()
        _, status = os.waitpid(child, 0)
        number, length = struct.unpack("<QQ", current[:16])
        if not length:
            raise RuntimeError(f"{kind.name}: a good file cannot be read")
        problem = f"the process ended with {status}"
        if os.WIFSIGNALED(status):
            problem = f"the process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
            problem += f": more than {LIMIT_S} s" if os.WTERMSIG(status) == signal.SIGPROF else ""
        elif reported:
            found = json.loads(reported)
            problem = found.pop("problem")
            outcome.add(**found)
        if problem is not None:
            path = directory / f"fuzz-{kind.name.replace(' ', '-')}-{seed}-{number}"
            path.write_bytes(current[16 : 16 + length])
            failures.append(f"{path}: {problem}")
        start = number + 1
    return outcome, failures


def _child(kind: Kind, numbers: range, seed: int, current: mmap.mmap, sent: int) -> None:
    """Reads files up to the first failure and writes what happened to a pipe; ends the process."""
    outcome, problem = Outcome(), None
    seeds = kind.seeds()
    for good in seeds:
        for tensor in kind.read(good.join(good.blocks)):
            np.count_nonzero(tensor)
    size_bytes = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + (1 << 30),) * 2)
    tracemalloc.start()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a process in which TensorFlow was before may hand down that it is ignored
    for number in numbers:
        data = file_of(kind, seeds, seed, number)[:MAX_BYTES] or b"\0"
        current[: 16 + len(data)] = struct.pack("<QQ", number, len(data)) + data
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # its signal ends the process, also within a C library
        problem = read_one(kind, data, outcome)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if problem is not None:
            break
    with os.fdopen(sent, "w") as file:
        json.dump(dataclasses.asdict(outcome) | {"errors": sorted(outcome.errors), "problem": problem}, file)
    os._exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each kind; 1 if there was a failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.converters.fuzz", description="Reads damaged checkpoints by the thousand.")
    parser.add_argument(
        "--runs", type=int, default=10_000, metavar="N", help="files of each kind; default: 10000; of slow kinds a twentieth"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the changes; default: 0")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="only this kind")
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path(), metavar="DIR", help="where offending files go; default: here")
    arguments = parser.parse_args(argv)
    failed = False
    print("| kind | files | read | refused | kinds of errors | memory ≤ 128 KiB + | longest | time |\n|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        if arguments.kind in (None, kind.name):
            start_s = time.monotonic()
            outcome, failures = run(kind, max(arguments.runs // kind.every, 1), arguments.seed, arguments.keep)
            counts = f"{outcome.read + outcome.refused + len(failures)} | {outcome.read} | {outcome.refused} | {len(outcome.errors)}"
            limits = f"{max(outcome.most_bytes, 0):.0f} × size | {outcome.longest_s * 1e3:.0f} ms"
            print(f"| {kind.name} | {counts} | {limits} | {time.monotonic() - start_s:.0f} s |", flush=True)
            for failure in failures:
                print(f"error: {failure}", file=sys.stderr)
            failed |= bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
