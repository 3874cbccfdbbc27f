"""``python -m tfmaskformer.model_garden``: the Model Garden's training driver, for our experiments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from tfmaskformer.cli import BAD_INPUT, COULD_NOT_RUN, OK, failed

DIVERGED = 1
MODES = ("train", "eval", "train_and_eval", "continuous_eval", "train_and_post_eval")


def main(argv: Sequence[str] | None = None) -> int:
    """Train or evaluate an experiment with TensorFlow Model Garden.

    Returns 0; 1 where the training went wrong; 2 for usage or bad input; 3 where it could not run.
    """
    arguments = _arguments(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf

        import tfmaskformer.model_garden.task  # noqa: F401 (registers the experiments)
        from tfmaskformer.data.records import UNREADABLE
        from tfmaskformer.data.tfrecords import bad_data
        from tfmaskformer.evaluation.devices import DeviceError
    except ImportError as error:
        return _failed(str(error), COULD_NOT_RUN)
    try:
        runner = _runner(arguments)
    except LookupError as error:
        return _failed(f"{error.args[0]}\n  'tfmaskformer zoo list' has the experiments, docs/model_garden.md their fields", BAD_INPUT)
    except (ValueError, TypeError) as error:
        return _failed(str(error), BAD_INPUT)
    except (DeviceError, OSError, tf.errors.OpError) as error:
        return _failed(getattr(error, "message", str(error)), COULD_NOT_RUN)
    goes_on = "\n  the same command goes on from the last checkpoint"
    try:
        _run(runner, arguments.mode)
    except RuntimeError as error:
        if "loss value" not in str(error):  # the Model Garden's own words for NaN, and for more than trainer.loss_upper_bound
            raise
        return _failed(f"{error}{goes_on}", DIVERGED)
    except (OSError, tf.errors.OpError) as error:
        bad = bad_data(error)
        if bad and bad.problem.kind != UNREADABLE:
            return _failed(str(bad), BAD_INPUT)
        return _failed(f"{bad or getattr(error, 'message', error)}{goes_on}", COULD_NOT_RUN)
    except KeyboardInterrupt:
        return _failed(f"interrupted{goes_on}", COULD_NOT_RUN)
    return OK


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tfmaskformer.model_garden",
        description="Trains or evaluates an official entry as an experiment of TensorFlow Model Garden, with its Orbit trainer. The "
        "options are those of its own drivers. The same command goes on with a training that ended early.",
        epilog="docs/model_garden.md tells more. exit codes: 0 done, 1 the training went wrong, 2 usage or bad input, 3 could not run",
    )
    parser.add_argument("--experiment", required=True, metavar="NAME", help="a zoo entry")
    parser.add_argument("--mode", required=True, choices=MODES, metavar="MODE", help=f"one of {', '.join(MODES)}")
    parser.add_argument("--model_dir", required=True, metavar="DIR", help="for checkpoints and curves; may be gs://…")
    parser.add_argument("--config_file", action="append", default=[], metavar="FILE", help="YAML with values to change; may be repeated")
    parser.add_argument("--params_override", default="", metavar="YAML", help="values to change, as task.train_data.input_path=DIR")
    parser.add_argument("--tpu", metavar="NAME", help="a TPU by its name or address, for runtime.distribution_strategy=tpu")
    return parser.parse_args(argv)


def _runner(arguments: argparse.Namespace) -> Any:
    """All that is needed, made and checked, with the weights to begin with."""
    import tensorflow as tf
    from official.common import distribute_utils
    from official.core import task_factory, train_utils
    from official.modeling import performance

    from tfmaskformer.evaluation.devices import DeviceError
    from tfmaskformer.model_garden.task import Runner

    options = train_utils.ParseConfigOptions(
        arguments.experiment, arguments.config_file, tpu=arguments.tpu, params_override=arguments.params_override
    )
    params = train_utils.parse_configuration(options)
    runtime = params.runtime
    if runtime.num_gpus > (found := len(tf.config.list_physical_devices("GPU"))):  # TensorFlow would take the CPU for each
        raise DeviceError(f"runtime.num_gpus is {runtime.num_gpus}, and TensorFlow sees {found} GPUs")
    performance.set_mixed_precision_policy(runtime.mixed_precision_dtype or "float32")
    strategy = distribute_utils.get_distribution_strategy(
        distribution_strategy=runtime.distribution_strategy,
        all_reduce_alg=runtime.all_reduce_alg,
        num_gpus=runtime.num_gpus,
        tpu_address=runtime.tpu,
    )
    with strategy.scope():
        task = task_factory.get_task(params.task, logging_dir=arguments.model_dir)
    curves = strategy.extended.should_save_summary  # of several workers the first
    return Runner(strategy, task, arguments.mode, params, arguments.model_dir, save_summary=curves)


def _run(runner: Any, mode: str) -> None:
    from official.core import train_utils

    if "train" in mode and runner.strategy.extended.should_checkpoint:  # the file is the training's, even if an evaluation runs beside it
        train_utils.serialize_config(runner.params, runner.model_dir)
    runner.run()


def _failed(message: str, code: int) -> int:
    lines = [line for line in message.splitlines() if "In call to configurable" not in line]  # gin's, through which all of it is called
    return failed("\n".join(lines), code)


if __name__ == "__main__":
    sys.exit(main())
