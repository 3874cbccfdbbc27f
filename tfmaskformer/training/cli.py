"""The command ``tfmaskformer train``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from tfmaskformer.cli import BAD_INPUT, COULD_NOT_RUN, GROUP, OK, failed, positive
from tfmaskformer.data.layouts import LAYOUTS

if TYPE_CHECKING:
    from tfmaskformer.config import MaskFormerConfig

DIVERGED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Train a model by an official recipe.

    Returns 0; 1 where the training went wrong; 2 for usage or bad input; 3 where it could not run.
    """
    arguments = _arguments(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf

        from tfmaskformer.checkpoint import CheckpointError
        from tfmaskformer.config import ConfigError
        from tfmaskformer.data.records import UNREADABLE, DataError
        from tfmaskformer.data.tfrecords import bad_data
        from tfmaskformer.evaluation.devices import DeviceError
        from tfmaskformer.evaluation.sources import EvaluationError
        from tfmaskformer.training.guard import DivergedError
        from tfmaskformer.training.run import RunError
    except ImportError as error:
        return failed(f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[cpu]'", COULD_NOT_RUN)
    goes_on = "\n  the same command goes on from the last checkpoint"
    try:
        return _train(arguments)
    except (ConfigError, RunError, EvaluationError, CheckpointError, DataError) as error:
        return failed(str(error), BAD_INPUT)
    except DivergedError as error:
        return failed(str(error), DIVERGED)
    except DeviceError as error:
        return failed(str(error), COULD_NOT_RUN)
    except (OSError, tf.errors.OpError) as error:
        bad = bad_data(error)
        if bad and bad.problem.kind != UNREADABLE:
            return failed(str(bad), BAD_INPUT)
        message = f"{bad or getattr(error, 'message', error)}"
        if lost := re.search(r"Collective ops is aborted by: (.*)", message):
            message, goes_on = f"another worker ended, or cannot be reached: {lost[1]}", f"{goes_on}; start it on all of them"
        return failed(f"{message}{goes_on}", COULD_NOT_RUN)
    except KeyboardInterrupt:
        return failed(f"interrupted{goes_on}", COULD_NOT_RUN)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tfmaskformer train",
        description="Trains a model as the official code does, by an official config. The same command goes on with a training that ended "
        "early. DIR becomes a checkpoint directory for 'tfmaskformer eval' and 'convert'.",
        epilog="docs/training.md tells more. exit codes: 0 trained, 1 the training went wrong, 2 usage or bad input, 3 could not run",
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a zoo entry, or an official YAML file")
    parser.add_argument("--data", required=True, metavar="DIR", help="the folder of all data sets, or this one's; may be gs://…")
    names = ", ".join(LAYOUTS)
    parser.add_argument("--dataset", choices=LAYOUTS, metavar="NAME", help=f"one of {names}; default: the config's")
    parser.add_argument(
        "--init", metavar="FILE", help="weights of the backbone (R-50.pkl, swin_….pth) or a checkpoint directory; default: random weights"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="for checkpoints, curves and evaluations; may be gs://…")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--tpu", metavar="NAME", help="a TPU by its name or address; 'local' on a TPU VM")
    devices.add_argument("--gpu", action="store_const", const="gpu", dest="device", help="all GPUs; default if there are any")
    devices.add_argument("--cpu", action="store_const", const="cpu", dest="device", help="the CPU")
    parser.add_argument("--replicas", type=positive, metavar="N", default=1, help="with --cpu: split it into N devices, for tests")
    parser.add_argument("--accumulate", type=positive, metavar="N", default=1, help="each device takes its images in N parts (default: 1)")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16, with weights, norms and losses in float32")
    parser.add_argument("--rematerialise", action="store_true", help="save memory by computing blocks again in the backward pass")
    parser.add_argument(
        "--canvas", type=positive, nargs=2, metavar=("H", "W"), help="size of all images, px; default: the config's largest"
    )
    parser.add_argument("--max-objects", type=positive, metavar="N", help="of an image; default: the number of queries")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="values to change in the config, as SOLVER.BASE_LR 5e-5")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.replicas > 1 and arguments.device != "cpu":
        parser.error("--replicas belongs to --cpu: other devices are what they are")
    arguments.device = "tpu" if arguments.tpu else arguments.device
    return arguments


def _train(arguments: argparse.Namespace) -> int:
    from checkpoints import registry
    from tfmaskformer.data.datasets import identity, open_training_set
    from tfmaskformer.data.layouts import LAYOUTS
    from tfmaskformer.evaluation.devices import strategy_for, worker
    from tfmaskformer.evaluation.sources import open_source
    from tfmaskformer.official_config import config_of, named_tree
    from tfmaskformer.official_yaml import override
    from tfmaskformer.training.loop import Settings, Training
    from tfmaskformer.training.recipe import recipe_of
    from tfmaskformer.training.run import Run, RunError

    name, tree = named_tree(arguments.config)
    weights, folder, test = tree["MODEL"]["WEIGHTS"], tree["OUTPUT_DIR"], tuple(tree["DATASETS"]["TEST"])
    override(tree, [part for option in arguments.options for part in option.split("=", 1)])
    for key, changed, instead in (
        ("MODEL.WEIGHTS", tree["MODEL"]["WEIGHTS"] != weights, "give --init"),
        ("OUTPUT_DIR", tree["OUTPUT_DIR"] != folder, "give --out"),
        ("DATASETS.TEST", tuple(tree["DATASETS"]["TEST"]) not in (test, ()), "that of --data is evaluated; '()' turns evaluations off"),
    ):
        if changed:
            raise RunError(f"'{key}' is not taken from the command line\n  {instead}")
    if arguments.dataset:
        tree["DATASETS"]["TRAIN"] = (registry.dataset(LAYOUTS[arguments.dataset].dataset).official_name,)
    config = config_of(tree, name)
    dataset_name = arguments.dataset or config.dataset
    if dataset_name not in LAYOUTS:
        raise RunError(f"DATASETS.TRAIN is {tree['DATASETS']['TRAIN']}, which is no data set known here\n  give --dataset")
    settings = Settings(
        tree,
        config,
        recipe_of(tree),
        seed=max(tree["SEED"], 0),  # upstream takes −1 for a seed of its own choice
        dtype="mixed_bfloat16" if arguments.bfloat16 else "float32",
        parts=arguments.accumulate,
        rematerialise=arguments.rematerialise,
        canvas=tuple(arguments.canvas) if arguments.canvas else None,
        max_objects=arguments.max_objects,
    )
    strategy = strategy_for(arguments.device, tpu=arguments.tpu or "", replicas=arguments.replicas)
    shard = worker(strategy)
    dataset = open_training_set(dataset_name, arguments.data)
    evaluated = bool(tree["DATASETS"]["TEST"])  # after the last step even if TEST.EVAL_PERIOD is 0, as upstream
    validation = open_source(arguments.data, dataset_name, shard=shard) if evaluated else None
    data = {"dataset": dataset_name, "images": len(dataset.records), "images_sha256": identity(dataset.records)}
    plan = {"config": name, **data, "init": arguments.init, **settings.plan()}
    run = Run(arguments.out, config, tree, plan, write=not shard[1])
    run.agree(strategy, validation=validation.identity if validation else "")
    if run.latest is None and arguments.init is None and weights:
        told = f"all weights are random; the recipe begins with those of a backbone (MODEL.WEIGHTS: {weights}): --init"
        print(f"note: {told}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        initial = _initial(arguments.init, config, settings.seed, scratch) if arguments.init and run.latest is None else None
        training = Training(settings, dataset, strategy, initial=initial, validation=validation)
    training.run(run, _Progress(settings.recipe.max_iter))
    if run.writes:
        print(f"{name}: {training.steps} steps on {dataset_name}: {arguments.out}")
    return OK


def _initial(given: str, config: MaskFormerConfig, seed: int, scratch: str) -> str:
    """A checkpoint directory: the given one, or one that the command ``convert`` makes of the weights of a backbone."""
    import tensorflow as tf

    from tfmaskformer import checkpoint
    from tfmaskformer.training.run import RunError

    if tf.io.gfile.isdir(given):
        if drawn := checkpoint.other_classes(given, config):
            told = f"{', '.join(drawn)}: drawn, since '{given}' has other classes than the {config.num_classes} that are trained"
            print(f"note: {told}", file=sys.stderr)
        return given
    [convert] = metadata.entry_points(group=GROUP, name="convert")
    file, directory = pathlib.Path(scratch, "config.json"), str(pathlib.Path(scratch, "initial"))
    file.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    with contextlib.redirect_stdout(sys.stderr):
        code = convert.load()(["--init", given, "--config", str(file), "--seed", str(seed), "--dst", directory])
    if code:  # it has said why
        raise RunError("--init: expected the weights of a backbone, or a directory that 'convert --src' made of a model's")
    return directory


class _Progress:
    """A line every few steps."""

    def __init__(self, steps: int):
        self._steps = steps
        self._started: tuple[int, float] | None = None

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        now_s = time.monotonic()
        left = ""
        if self._started is None:  # the first steps compile
            self._started = step, now_s
        else:
            left_s = round((now_s - self._started[1]) / (step - self._started[0]) * (self._steps - step))
            left = f", {left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left"
        told = f"total_loss {values['total_loss']:.4g}, gradient_norm {values['gradient_norm']:.3g}, lr {values['lr']:.3g}"
        print(f"step {step} of {self._steps}: {told}, {values['images_per_second']:.3g} images/s{left}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
