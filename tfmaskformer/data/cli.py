"""The command ``tfmaskformer data``: checks a data set, or packs it into TFRecords."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from tfmaskformer.cli import BAD_INPUT, COULD_NOT_RUN, OK, OutputError, Progress, failed, positive, require_writable, write_whole
from tfmaskformer.data.layouts import LAYOUTS

PROBLEMS = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Check a data set on disk or in a bucket, file by file, or pack it into TFRecords.

    Returns 0; 1 where there are problems; 2 for usage or bad input (nothing was written); 3 where it could not run.
    """
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        from tfmaskformer.data import datasets
        from tfmaskformer.data.records import DataError
    except ImportError as error:
        return failed(f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[cpu]'", COULD_NOT_RUN)
    try:
        require_writable(arguments.json)
        dataset = datasets.open_dataset(arguments.dataset, arguments.data, arguments.split)
    except (DataError, OSError, OutputError) as error:
        return failed(str(error), BAD_INPUT)
    progress = Progress()
    try:
        return arguments.run(arguments, dataset, progress)
    except KeyboardInterrupt:
        return failed("interrupted; a build goes on where it was when it is started again", COULD_NOT_RUN)
    finally:
        progress.end()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfmaskformer data",
        description="Checks a data set in its official layout, or packs it into TFRecords. docs/data.md has the layouts.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _command(
        commands,
        "check",
        "say what is missing or malformed, file by file",
        "0 no problems, 1 problems, 2 usage or bad input, 3 could not run",
    )
    command.add_argument("--fast", action="store_true", help="only whether all files are there; reads lists and JSON files, no image")
    command.set_defaults(run=_check)

    command = _command(
        commands,
        "tfrecords",
        "pack a split into checksummed TFRecord shards",
        "0 complete, 1 bad data, 2 usage or bad input, 3 could not run",
    )
    command.add_argument(
        "--out", required=True, metavar="DIR", help="folder to make, or of an unfinished build to go on with; may be gs://…"
    )
    command.add_argument("--shards", type=positive, metavar="N", help="default: one for 128 images")
    command.add_argument("--processes", type=positive, metavar="N", default=os.cpu_count(), help="default: one for each core")
    command.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at bad data; skip leaves its image out (default: stop)"
    )
    command.add_argument("--deeplab2", action="store_true", help="of panoptic data also DeepLab2's raw labels, 4 bytes a pixel")
    command.set_defaults(run=_tfrecords)
    return parser


def _command(commands: Any, name: str, what: str, exit_codes: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=f"exit codes: {exit_codes}")
    command.add_argument("--dataset", required=True, choices=LAYOUTS, metavar="NAME", help=f"one of {', '.join(LAYOUTS)}")
    command.add_argument(
        "--data", required=True, metavar="DIR", help="the folder of all data sets (DETECTRON2_DATASETS), or this one's; may be gs://…"
    )
    command.add_argument("--split", metavar="NAME", help="default: the one that official evaluation takes, val or test")
    command.add_argument("--json", metavar="FILE", help="also write the result as JSON to FILE, or to stdout only (-)")
    return command


def _check(arguments: argparse.Namespace, dataset: Any, progress: Progress) -> int:
    from tfmaskformer.data.check import check
    from tfmaskformer.data.records import DataError

    try:
        findings = check(dataset, fast=arguments.fast, progress=progress)
    except (DataError, OSError) as error:
        return failed(str(error), BAD_INPUT)
    progress.end()
    for problem in findings.problems:
        print(problem, file=sys.stderr)
    result = {
        "dataset": dataset.name,
        "split": dataset.split,
        "root": dataset.root,
        "fast": arguments.fast,
        "images": findings.images,
        "sound": findings.sound,
        "counts": findings.counts(),
        "problems": [dataclasses.asdict(problem) for problem in findings.problems],
    }
    what = "have all their files" if arguments.fast else "are sound"
    rows = [("images", findings.images), (f"… that {what}", findings.sound), *findings.counts().items()]
    code = PROBLEMS if findings.problems else OK
    return _told(arguments.json, result, f"{dataset.name} {dataset.split} in {dataset.root}", rows, code)


def _tfrecords(arguments: argparse.Namespace, dataset: Any, progress: Progress) -> int:
    import concurrent.futures

    import tensorflow as tf

    from tfmaskformer.data import tfrecords
    from tfmaskformer.data.records import DataError

    try:
        manifest = tfrecords.build(
            dataset,
            arguments.out,
            shards=arguments.shards,
            processes=arguments.processes,
            on_error=arguments.on_error,
            deeplab2=arguments.deeplab2,
            progress=progress,
        )
    except tfrecords.DestinationError as error:
        return failed(str(error), BAD_INPUT)
    except DataError as error:
        return failed(f"{error}\n  finished shards stay; --on-error skip leaves the image out", PROBLEMS)
    except (OSError, tf.errors.OpError, concurrent.futures.BrokenExecutor) as error:
        return failed(f"{error}\n  finished shards stay; the same command goes on with the others", COULD_NOT_RUN)
    progress.end()
    shards = manifest["shards"].values()
    problems = manifest["problems"] + [problem for shard in shards for problem in shard["problems"]]
    for problem in problems:
        print(f"skipped: {problem['file']}: {problem['kind']}", file=sys.stderr)
    rows = [
        ("shards", len(shards)),
        ("images", sum(shard["records"] for shard in shards)),
        ("problems skipped", len(problems)),
        ("MB", round(sum(shard["bytes"] for shard in shards) / 1e6, 1)),
    ]
    return _told(arguments.json, manifest, f"{dataset.name} {dataset.split} in {arguments.out}", rows, OK)


def _told(json_file: str | None, result: dict[str, Any], title: str, rows: Sequence[tuple[str, float]], code: int) -> int:
    """Prints the result, and then writes it: on a full disk it is not lost. Returns the exit code, ``code`` or 3."""
    width = max(len(name) for name, _ in rows)
    table = "\n".join([title, *(f"  {name:<{width}}  {value:>10}" for name, value in rows)])
    print(json.dumps(result, indent=1) if json_file == "-" else table, flush=True)
    if json_file not in (None, "-"):
        try:
            write_whole(str(json_file), json.dumps(result, indent=1) + "\n")
        except OutputError as error:
            return failed(f"{error}\n  the result is printed above", error.exit_code)
    return code


if __name__ == "__main__":
    sys.exit(main())
