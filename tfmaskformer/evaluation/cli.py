"""The command ``tfmaskformer eval``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tfmaskformer.cli import BAD_INPUT, COULD_NOT_RUN, OK, OutputError, Progress, failed, positive, require_writable, write_whole
from tfmaskformer.data.layouts import LAYOUTS

_GROUPS = ("all", "things", "stuff")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint on a data set: PQ, mIoU, AP.

    Returns 0; 2 for usage or bad input; 3 where it could not run.
    """
    arguments = _arguments(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    progress = Progress()
    try:
        import tensorflow as tf

        from tfmaskformer.checkpoint import CheckpointError
        from tfmaskformer.data.records import DataError
        from tfmaskformer.evaluation.devices import DeviceError
        from tfmaskformer.evaluation.sources import EvaluationError
    except ImportError as error:
        return _failed(progress, f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[cpu]'", COULD_NOT_RUN)
    goes_on = "\n  the same command goes on with the other images" if arguments.resume else ""
    try:
        return _evaluate(arguments, progress)
    except (EvaluationError, CheckpointError, DataError) as error:
        return _failed(progress, str(error), BAD_INPUT)
    except OutputError as error:
        return _failed(progress, str(error), error.exit_code)
    except (DeviceError, ImportError) as error:  # the latter tells of pycocotools
        return _failed(progress, str(error), COULD_NOT_RUN)
    except (OSError, tf.errors.OpError) as error:
        return _failed(progress, f"{getattr(error, 'message', error)}{goes_on}", COULD_NOT_RUN)
    except KeyboardInterrupt:
        return _failed(progress, f"interrupted{goes_on}", COULD_NOT_RUN)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tfmaskformer eval",
        description="Evaluates a checkpoint on a data set as the official code does: its metrics, overall and per class, in percent.",
        epilog="docs/evaluate.md tells more. exit codes: 0 evaluated, 2 usage or bad input, 3 could not run",
    )
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="directory written by 'convert'; may be gs://…")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="the folder of all data sets (DETECTRON2_DATASETS), this one's, or of its TFRecords ('tfmaskformer data tfrecords'); may be gs://…",
    )
    names = ", ".join(LAYOUTS)
    parser.add_argument("--dataset", choices=LAYOUTS, metavar="NAME", help=f"one of {names}; default: the checkpoint's")
    parser.add_argument("--split", metavar="NAME", help="default: the one that official evaluation takes, val or test")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    parser.add_argument("--ap", action="store_true", help="also the AP of the things in panoptic results; needs pycocotools")
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation: the sizes and mirroring of the official config, averaged, for the semantic result alone",
    )
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at bad data; skip leaves its image out (default: stop)"
    )
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--tpu", metavar="NAME", help="a TPU by its name or address; 'local' on a TPU VM")
    devices.add_argument("--gpu", action="store_const", const="gpu", dest="device", help="all GPUs; default if there are any")
    devices.add_argument("--cpu", action="store_const", const="cpu", dest="device", help="the CPU")
    parser.add_argument("--replicas", type=positive, metavar="N", default=1, help="with --cpu: split it into N devices, for tests")
    parser.add_argument("--batch", type=positive, metavar="N", default=1, help="images for each device at a time (default: 1)")
    parser.add_argument(
        "--canvas",
        type=positive,
        nargs="+",
        metavar=("H", "W"),
        help="fixed shapes of the model's input, px; each is compiled once. Default: up to 4, chosen from the sizes of the images",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON to FILE, or to stdout only (-)")
    parser.add_argument("--results", metavar="DIR", help="also write the predictions as panopticapi and Detectron2 read them")
    parser.add_argument("--resume", metavar="DIR", help="save there what was counted, and go on with it")
    arguments = parser.parse_args(argv)
    if arguments.replicas > 1 and arguments.device != "cpu":
        parser.error("--replicas belongs to --cpu: other devices are what they are")
    if arguments.tta and arguments.ap:
        parser.error("--ap is of panoptic results, --tta gives semantic ones alone; leave one of them out")
    if arguments.canvas:
        if len(arguments.canvas) % 2:
            parser.error("--canvas takes pairs of height and width")
        arguments.canvas = list(zip(arguments.canvas[::2], arguments.canvas[1::2], strict=True))
    arguments.device = "tpu" if arguments.tpu else arguments.device
    return arguments


def _evaluate(arguments: argparse.Namespace, progress: Progress) -> int:
    from tfmaskformer.checkpoint import read_config
    from tfmaskformer.evaluation import evaluate, sources
    from tfmaskformer.evaluation.augmentation import official_augmentation
    from tfmaskformer.evaluation.devices import strategy_for, worker

    require_writable(arguments.json)
    config = read_config(arguments.ckpt)
    strategy = strategy_for(arguments.device, tpu=arguments.tpu or "", replicas=arguments.replicas)
    shard = worker(strategy)
    source = sources.open_source(
        arguments.data,
        arguments.dataset,
        arguments.split,
        default_name=config.dataset,
        on_error=arguments.on_error,
        limit=arguments.limit,
        shard=shard,
    )
    evaluation = evaluate.Evaluation(
        arguments.ckpt,
        source,
        strategy,
        sources.metrics_of(config, source, instances=arguments.ap, augmented=arguments.tta),
        batch=arguments.batch,
        canvases=arguments.canvas,
        augmentation=official_augmentation(config) if arguments.tta else None,
        on_error=arguments.on_error,
        results=arguments.results,
        resume=arguments.resume,
    )
    evaluation.run(progress)
    progress.end()
    counts = evaluation.total()
    if shard[1]:  # the first worker tells
        return OK
    report = evaluation.report(counts)
    for problem in report["problems"]:
        print(f"skipped: {problem['file']}: {problem['kind']}", file=sys.stderr)
    # First: on a full disk the result is not lost.
    print(json.dumps(report, indent=1) if arguments.json == "-" else "\n".join(_tables(report)), flush=True)
    if arguments.json not in (None, "-"):
        try:
            write_whole(arguments.json, json.dumps(report, indent=1) + "\n")
        except OutputError as error:
            return _failed(progress, f"{error}\n  the result is printed above", error.exit_code)
    evaluation.write_results(counts)
    return OK


def _tables(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people."""
    from tfmaskformer.evaluation.counts import headline

    images, dataset, checkpoint, metrics = report["images"], report["dataset"], report["checkpoint"], report["metrics"]
    yield f"{checkpoint['model']} on {dataset['name']} {dataset['split']}: {images['evaluated']} images, {images['skipped']} skipped"
    if panoptic := metrics.get("panoptic"):
        rows = [(group, *(panoptic[group][key] for key in ("pq", "sq", "rq", "num_classes"))) for group in _GROUPS]
        yield from _table(("", "PQ", "SQ", "RQ", "classes"), rows)
        yield from _table(("class", "PQ", "SQ", "RQ"), [tuple(row.values()) for row in panoptic["classes"]])
    if semantic := metrics.get("semantic"):
        yield from _table(("", "mIoU", "fwIoU", "mACC", "pACC"), [("all", *(semantic[key] for key in ("miou", "fwiou", "macc", "pacc")))])
        yield from _table(("class", "IoU", "ACC"), [tuple(row.values()) for row in semantic["classes"]])
    if instances := metrics.get("instances"):
        keys = ("ap", "ap50", "ap75", "aps", "apm", "apl")
        yield from _table(("", "AP", "AP50", "AP75", "APs", "APm", "APl"), [("things", *(instances[key] for key in keys))])
        yield from _table(("class", "AP"), [tuple(row.values()) for row in instances["classes"]])
    yield ""
    for name, value in headline(metrics).items():
        name += " (ms+flip)" * bool(report["run"]["augmentation"])
        if name in checkpoint["published"]:
            yield f"{name} {value:.2f}; published for {checkpoint['model']}: {checkpoint['published'][name]}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    width = max(len(str(row[0])) for row in [header, *rows])
    yield ""
    for name, *values in [header, *rows]:
        cells = ("–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value) for value in values)
        yield f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells)


def _failed(progress: Progress, message: str, code: int) -> int:
    progress.end()
    return failed(message, code)


if __name__ == "__main__":
    sys.exit(main())
