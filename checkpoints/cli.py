"""``tfmaskformer zoo``: what the model zoo has, its files, and synthetic checkpoints in its layout."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from checkpoints import registry, synthesize


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one ``tfmaskformer zoo`` command.

    Returns:
        0; 2 for a name that the zoo does not know, a file with a wrong content, or a destination that cannot be written; 3 where a download
        could not run.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (registry.ZooError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfmaskformer zoo", description="The official MaskFormer checkpoints, and synthetic ones in their layout."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("list", help="the official checkpoints that are covered")
    command.add_argument("--json", action="store_true", help="all that is known of each, as JSON")
    command.set_defaults(run=_list)

    command = commands.add_parser("show", help="one checkpoint: its source, metrics, licence, configuration and tensors")
    command.add_argument("entry", metavar="ENTRY")
    command.add_argument("--json", action="store_true", help="as JSON, with every tensor")
    command.set_defaults(run=_show)

    command = commands.add_parser(
        "fetch",
        help="download official checkpoints into the cache, and print where they are",
        description="Downloads official checkpoints into the cache, unless they are there, and prints their paths. A download that broke "
        "off goes on where it stopped. The first download's SHA-256 is kept, and compared ever after.",
        epilog="exit codes: 0 all are there, 2 usage, wrong content or a cache that cannot be written, 3 could not be downloaded now",
    )
    command.add_argument("entries", metavar="ENTRY", nargs="*")
    command.add_argument("--all", action="store_true", help="all of 'tfmaskformer zoo list', about 8 GB")
    command.add_argument(
        "--cache", type=pathlib.Path, metavar="DIR", help="default: $TFMASKFORMER_CACHE, else tfmaskformer in $XDG_CACHE_HOME or ~/.cache"
    )
    command.add_argument("--force", action="store_true", help="download again what is in the cache")
    command.set_defaults(run=_fetch)

    command = commands.add_parser(
        "synthesize",
        help="write a checkpoint with made-up weights in the official layout",
        description="Writes a checkpoint with made-up weights in the official layout, to try things without the real file. It finds "
        "nothing in a picture. The same entry and seed give the same bytes everywhere.",
    )
    command.add_argument("entry", metavar="ENTRY")
    command.add_argument("--seed", type=int, default=0, help="0 or above; the weights are calibrated for 0 (default)")
    command.add_argument("--dst", type=pathlib.Path, required=True, metavar="FILE", help="for example model_final.pkl")
    command.add_argument("--force", action="store_true", help="replace FILE if it exists")
    command.set_defaults(run=_synthesize)
    return parser


def _list(arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps([_facts(item) for item in registry.entries()], indent=2))
        return
    rows = [("name", "task", "data set", "backbone", "parameters", "published")]
    rows += [
        (item.name, item.task, item.dataset, item.backbone, f"{item.num_parameters / 1e6:.1f} M", _metrics(item))
        for item in registry.entries()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show(arguments: argparse.Namespace) -> None:
    item = registry.entry(arguments.entry)
    layout = registry.layout(item)
    if arguments.json:
        tensors = [{"key": key, "shape": list(spec.shape), "dtype": spec.dtype, "kind": spec.kind} for key, spec in layout.items()]
        print(json.dumps({**_facts(item), "config": item.config, "tensors": tensors}, indent=2))
        return
    buffers = sum(spec.kind == "buffer" for spec in layout.values())
    lines = {
        "name": item.name,
        "task": f"{item.task} segmentation, {item.dataset}, {item.config['num_classes']} classes",
        "official config": item.official_config,
        "published": _metrics(item),
        "model id": item.model_id,
        "file": item.url,
        "weights licence": item.weights_license,
        "tensors": f"{len(layout) - buffers} parameters ({item.num_parameters:,} elements), {buffers} buffers",
    }
    for name, text in lines.items():
        if text:
            print(f"{name:<16} {text}")


def _fetch(arguments: argparse.Namespace) -> int:
    from checkpoints import fetch  # takes the time to import http and ssl

    if arguments.all == bool(arguments.entries):
        raise registry.ZooError("give names of checkpoints, or --all\n  all of them: tfmaskformer zoo list")
    worst = 0
    for item in registry.entries() if arguments.all else [registry.entry(name) for name in arguments.entries]:
        bar = _Bar(item.name)
        try:
            path = fetch.fetch(item, cache=arguments.cache, progress=bar, force=arguments.force)
        except fetch.FetchError as error:
            bar.clear()
            print(f"error: {error}", file=sys.stderr)
            if error.exit_code == fetch.NetworkError.exit_code:
                return error.exit_code  # it would be the same for the others
            worst = error.exit_code
        except KeyboardInterrupt:
            bar.clear()
            print("error: interrupted; the same again goes on from here", file=sys.stderr)
            return fetch.NetworkError.exit_code
        else:
            bar.end()
            print(path, flush=True)
    return worst


class _Bar:
    """How far a download is: on a terminal a line that changes, elsewhere one at the start; and one at the end."""

    def __init__(self, name: str):
        self._name = name
        self._on_terminal = sys.stderr.isatty()
        self._first_bytes = self._bytes = 0
        self._start_s = self._shown_s = 0.0

    def __call__(self, done_bytes: int, total_bytes: int | None) -> None:
        now_s = time.monotonic()
        if not self._start_s or done_bytes < self._bytes:  # it started, or started again
            self._start_s, self._first_bytes, self._shown_s = now_s, done_bytes, 0.0
            if not self._on_terminal:
                print(f"{self._name}: downloading {_megabytes(total_bytes)}", file=sys.stderr)
        self._bytes = done_bytes
        if self._on_terminal and (now_s - self._shown_s >= 0.1 or done_bytes == total_bytes):
            self._shown_s = now_s
            speed = self._bytes_per_s(now_s)
            line = f"{_megabytes(done_bytes)}, {speed / 1e6:.1f} MB/s"
            if total_bytes:
                line = f"{done_bytes / total_bytes:4.0%} of {_megabytes(total_bytes)}, {speed / 1e6:.1f} MB/s"
                if speed:
                    line += f", {datetime.timedelta(seconds=round((total_bytes - done_bytes) / speed))} left"
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print(f"\r\x1b[K{line}  {self._name}"[: width + 3], end="", file=sys.stderr, flush=True)

    def _bytes_per_s(self, now_s: float) -> float:
        return (self._bytes - self._first_bytes) / max(now_s - self._start_s, 1e-3)

    def clear(self) -> None:
        if self._on_terminal and self._start_s:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The last line: what was downloaded, or that nothing had to be."""
        self.clear()
        now_s = time.monotonic()
        if self._start_s:
            speed = f"{now_s - self._start_s:.1f} s, {self._bytes_per_s(now_s) / 1e6:.1f} MB/s"
            print(f"{self._name}: {_megabytes(self._bytes)} downloaded in {speed}", file=sys.stderr)
        else:
            print(f"{self._name}: in the cache, unchanged", file=sys.stderr)


def _megabytes(size_bytes: int | None) -> str:
    return "an unknown size" if size_bytes is None else f"{size_bytes / 1e6:.1f} MB"


def _synthesize(arguments: argparse.Namespace) -> None:
    item, destination = registry.entry(arguments.entry), arguments.dst
    if not destination.parent.is_dir():
        raise registry.ZooError(f"cannot write '{destination}': there is no folder '{destination.parent}'")
    if destination.is_dir():
        raise registry.ZooError(f"cannot write '{destination}': it is a folder; give a file, for example {destination / 'model_final.pkl'}")
    if destination.exists() and not arguments.force:
        raise registry.ZooError(f"'{destination}' exists; --force replaces it")
    synthesize.write_pickle(synthesize.synthesize(item, arguments.seed), destination)
    print(f"{destination}: {item.name}, seed {arguments.seed}, synthetic weights, {destination.stat().st_size:,} bytes", file=sys.stderr)
    if item.url:
        print(f"the real weights ({item.weights_license}): {item.url}", file=sys.stderr)


def _metrics(item: registry.Entry) -> str:
    return ", ".join(f"{name} {value}" for name, value in item.metrics.items())


def _facts(item: registry.Entry) -> dict[str, Any]:
    names = ("name", "task", "dataset", "backbone", "official_config", "model_id", "metrics", "url", "file_hash", "weights_license")
    return {name: getattr(item, name) for name in names} | {"num_parameters": item.num_parameters}
