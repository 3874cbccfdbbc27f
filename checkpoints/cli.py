"""``tfmaskformer zoo``: what the model zoo has, and synthetic checkpoints in its layout."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from checkpoints import registry, synthesize


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one ``tfmaskformer zoo`` command.

    Returns:
        0, or 2 for a name that the zoo does not know or a destination that cannot be written.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (registry.ZooError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


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
