"""The command ``parity-check``, also ``tfmaskformer parity-check``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tfmaskformer.cli import BAD_INPUT, COULD_NOT_RUN, OK, OutputError, failed, require_writable, write_whole

if TYPE_CHECKING:
    from parity.check import Check, Settings

PHOTOS = Path(__file__).parents[1] / "checkpoints" / "photos"
DEFAULT_IMAGES = ("coffee.png@256x320", "chelsea.png@225x301")
"""What --reference official takes without --image: two sizes, one of them odd in both axes."""

MATCH, MISMATCH = OK, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Compare a TensorFlow checkpoint with the official PyTorch model, layer by layer; record what that computes; compare two reports.

    Returns 0 match, 1 mismatch, 2 usage or bad input, 3 could not run.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "record": _record,
        "record-steps": _record_steps,
        "steps": _steps,
        "inputs": _inputs,
        "compare": _compare,
        "selftest": _selftest,
    }
    try:
        return commands[arguments[0]](arguments[1:]) if arguments[:1] and arguments[0] in commands else _check(arguments)
    except OutputError as error:
        return failed(str(error), error.exit_code)


def _record(argv: Sequence[str]) -> int:
    if any(argument.startswith("--framework") for argument in argv):
        return _record_tensorflow(argv)
    from parity import record

    parser = _parser_of(
        "record",
        "Runs the official PyTorch code on a checkpoint and photographs, and writes a trace of all that it computes.",
        "0 recorded, 2 usage or bad input, 3 could not run",
        "'parity-check record --framework tensorflow --help' tells how TensorFlow is recorded. ",
    )
    record.add_arguments(parser)
    return record.run(parser.parse_args(argv))


def _record_tensorflow(argv: Sequence[str]) -> int:
    from parity import tensorflow_record

    parser = _parser_of(
        "record",
        "Runs the TensorFlow model on the inputs of a trace, and writes a trace of all that it computes, which 'parity-check --actual' "
        "compares anywhere.",
        "0 recorded, 2 usage or bad input, 3 could not run",
    )
    tensorflow_record.add_arguments(parser)
    return tensorflow_record.run_command(parser.parse_args(argv))


def _inputs(argv: Sequence[str]) -> int:
    from parity import tensorflow_record
    from parity.trace import TraceError

    parser = _parser_of(
        "inputs",
        "Copies of a trace what 'parity-check record --framework tensorflow' needs where it runs: the inputs, not the results.",
        "0 copied, 2 usage or bad input",
    )
    parser.add_argument("trace", metavar="DIR", help="a trace of the official code")
    parser.add_argument("copy", metavar="COPY", help="a new folder")
    arguments = parser.parse_args(argv)
    try:
        tensorflow_record.copy_inputs(arguments.trace, arguments.copy)
    except (OSError, TraceError) as error:
        return failed(str(error), BAD_INPUT)
    print(arguments.copy)
    return MATCH


def _record_steps(argv: Sequence[str]) -> int:
    from parity import trajectory_record

    parser = _parser_of(
        "record-steps",
        "Runs steps of the official PyTorch training and records losses, learning rates, gradients, weights and moments of each, and how "
        "far official runs on other kernels and numbers of threads drift apart. Into the folder 'steps' of a trace, they are a part of "
        "its checks.",
        "0 recorded, 2 usage or bad input, 3 could not run",
    )
    trajectory_record.add_arguments(parser)
    return trajectory_record.run(parser.parse_args(argv))


def _steps(argv: Sequence[str]) -> int:
    from parity import trajectory

    parser = _parser_of(
        "steps",
        "Trains a TensorFlow checkpoint as a recorded official training, and compares both after every step. Needs no PyTorch.",
        "0 match, 1 mismatch, 2 usage or bad input, 3 could not run",
    )
    trajectory.add_arguments(parser)
    return trajectory.run(parser.parse_args(argv))


def _compare(argv: Sequence[str]) -> int:
    from parity import regression

    parser = _parser_of(
        "compare",
        "Compares two runs by their report.json: what newly fails or passes, whose error grew, what appeared or vanished, and what is "
        "different about the surroundings.",
        "0 no regression, 1 regression, 2 usage or bad input, 3 could not run",
    )
    parser.add_argument("before", metavar="A.json", help="report of the run to compare with")
    parser.add_argument("after", metavar="B.json", help="report of the run that is judged")
    parser.add_argument(
        "--factor", type=float, default=regression.FACTOR, metavar="X", help="by which an error may grow (default: %(default)s)"
    )
    _add_json(parser)
    arguments = parser.parse_args(argv)
    if not arguments.factor >= 1:
        parser.error(f"--factor {arguments.factor:g}: expected 1 or more")
    require_writable(arguments.json)
    try:
        names = (arguments.before, arguments.after)
        before, after = map(regression.read, names)
        found = regression.regression(before, after, names, arguments.factor)
    except (OSError, regression.ReportError) as error:
        return failed(str(error), BAD_INPUT)
    _tell(arguments.json, lambda: regression.text(found), lambda: regression.as_json(found))
    return MISMATCH if found.regressed else MATCH


def _selftest(argv: Sequence[str]) -> int:
    parser = _parser_of(
        "selftest",
        "Proves the check itself: runs it on unbroken models, where nothing may fail, and on models with one fault each, every one of "
        "which it has to catch, and to say where it is and from what it comes. Takes some minutes.",
        "0 proven, 1 not, 2 usage or bad input, 3 could not run",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="KIND",
        help="one kind of faults (weights, layers, …), held-out for those made after the diagnosis, or clean for the unbroken models",
    )
    _add_json(parser)
    parser.add_argument("--readme", metavar="FILE", help="also put the table into its place in this Markdown file")
    arguments = parser.parse_args(argv)
    if arguments.readme and arguments.only:
        parser.error("--readme takes the whole proof, not --only a part of it")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from parity import selftest

    for path in (arguments.readme, arguments.json):
        require_writable(path)
    try:
        if arguments.readme:
            selftest.page_with(Path(arguments.readme), "")  # it has a place for the table
        proof = selftest.prove(arguments.only, lambda step: print(step, file=sys.stderr, flush=True))
    except (OSError, ValueError) as error:
        return failed(str(error), BAD_INPUT)
    except (selftest.SelftestError, ImportError) as error:
        return failed(str(error), COULD_NOT_RUN)
    _tell(arguments.json, lambda: selftest.text(proof), lambda: selftest.as_json(proof))
    if arguments.readme:
        try:
            page = selftest.page_with(Path(arguments.readme), f"\n{selftest.table(proof)}\n")
        except (OSError, ValueError) as error:  # it was another page before the proof
            return failed(str(error), COULD_NOT_RUN)
        write_whole(arguments.readme, page)
    return MATCH if proof.passed else MISMATCH


def _parser_of(command: str, description: str, codes: str, more: str = "") -> argparse.ArgumentParser:
    """The parser of a command; ``codes``: its exit codes, in words."""
    return argparse.ArgumentParser(prog=f"parity-check {command}".strip(), description=description, epilog=f"{more}exit codes: {codes}")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON to FILE, or to stdout only (-)")


def _tell(json_to: str | None, text: Callable[[], str], as_json: Callable[[], str]) -> None:
    """Prints a result, and writes it as JSON to a file, or prints it as JSON alone."""
    if json_to == "-":
        print(as_json(), end="")
        return
    print(text())
    if json_to:
        write_whole(json_to, as_json())


def _check(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.ckpt is None) == (arguments.actual is None):
        parser.error("give either --ckpt, a checkpoint to run, or --actual, a trace that TensorFlow recorded")
    if arguments.actual is None and arguments.baseline:
        parser.error("--baseline is for --actual: a checkpoint that is run here is held to the floors of the trace")
    if arguments.actual is not None and (option := _needs_run(parser, arguments)):
        parser.error(f"{option} is for --ckpt: a trace has been recorded already")
    if arguments.reference != "official" and (arguments.src or arguments.config or arguments.image):
        parser.error("--src, --config and --image are for --reference official; a trace says what it was recorded from")
    if arguments.memory_budget and arguments.mode != "eager":
        parser.error("--memory-budget needs --mode eager: a compiled function hands over all taps at once")
    if arguments.reference == "official" and not arguments.src:
        parser.error("--reference official needs --src, the official checkpoint that --ckpt was converted from")
    if arguments.reference == "official" and arguments.case:
        parser.error("--case chooses from a trace; --reference official checks every --image")
    if arguments.reference == "official" and arguments.port:
        parser.error("--port needs a trace: parity-check record --port …")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # that every case is traced anew is no fault
    from parity.converted import CheckError
    from parity.inputs import InputError
    from parity.spool import prepare

    require_writable(arguments.report, folder=True)
    if not _in_report(arguments):
        require_writable(arguments.json)
    try:
        with tempfile.TemporaryDirectory(prefix="parity-check-") as scratch:
            if arguments.reference == "official" and (code := _record_reference(arguments, scratch)):
                return code
            settings = _settings(arguments, scratch)
            prepare(settings.memory_budget)
            return _run(arguments, settings)
    except (OSError, CheckError, InputError) as error:
        return failed(str(error), BAD_INPUT)


def _in_report(arguments: argparse.Namespace) -> bool:
    """Whether the JSON lies in the folder of the report, which may have to be made."""
    folder, file = arguments.report, arguments.json
    return bool(folder and file and file != "-" and Path(file).resolve().parent == Path(folder).resolve())


def _needs_run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str | None:
    """An option that was given and says how to run the model."""
    given = (
        name
        for name in ("dtype", "mode", "padding", "pad_to", "port", "memory_budget")
        if getattr(arguments, name) != parser.get_default(name)
    )
    found = "reference official" if arguments.reference == "official" else next(given, None)
    return found and f"--{found.replace('_', '-')}"


def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    try:
        from converters.errors import ConversionError
        from parity import check, recorded, report
        from parity.spool import over_budget
        from parity.trace import TraceError
        from parity.trajectory import StepsError

        unusable: tuple[type[Exception], ...] = (check.CheckError, ConversionError, StepsError, TraceError)
        if arguments.actual is None:  # two traces are compared without TensorFlow
            from tfmaskformer.checkpoint import CheckpointError

            unusable += (CheckpointError,)
            if not gc.get_freeze_count():  # TensorFlow's own million objects, which else are looked through again and again
                gc.collect()
                gc.freeze()
    except ImportError as error:
        return failed(f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[cpu]'", COULD_NOT_RUN)

    def progress(step: str) -> None:
        print(f"{step} …", file=sys.stderr, flush=True)

    try:
        if arguments.actual is None:
            result: Check = check.check(settings, progress)
        else:
            result = recorded.check_recorded(arguments.actual, arguments.reference, arguments.baseline, settings, progress)
    except unusable as error:
        return failed(str(error), BAD_INPUT)
    except check.EnvironmentBrokenError as error:
        return failed(str(error), COULD_NOT_RUN)
    except MemoryError:
        return failed("out of memory; check one case at a time (--case) or one dtype (--dtype float32)", COULD_NOT_RUN)
    except KeyboardInterrupt:
        return failed("interrupted; nothing was concluded", COULD_NOT_RUN)
    if warning := over_budget(settings.memory_budget):
        print(f"warning: {warning}", file=sys.stderr)
    if _in_report(arguments):
        with contextlib.suppress(OSError):  # told when the report is written
            Path(arguments.report).mkdir(parents=True, exist_ok=True)
    _tell(arguments.json, lambda: report.text(result, colour=sys.stdout.isatty()), lambda: report.as_json(result))
    if arguments.report:
        report.write(result, Path(arguments.report))
        if arguments.json != "-":
            print(f"report: {arguments.report}")
    return MATCH if result.passed else MISMATCH


def _parser() -> argparse.ArgumentParser:
    parser = _parser_of(
        "",
        "Compares a TensorFlow checkpoint with what the official PyTorch code computes: every tap, output, cost, assignment, loss, "
        "gradient, inference result and, where the trace has one, training step. Against a trace it needs no PyTorch.",
        "0 match, 1 mismatch, 2 usage or bad input, 3 could not run",
        "'parity-check record --help' tells how traces are made, 'parity-check compare --help' how two reports are compared. ",
    )
    parser.add_argument("--ckpt", metavar="DIR", help="the checkpoint, written by convert")
    parser.add_argument(
        "--actual", metavar="DIR", help="in place of --ckpt: a trace that TensorFlow recorded, maybe elsewhere ('parity-check record')"
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="DIR",
        help="with --actual: a trace of the same precision that TensorFlow recorded on a CPU; of several the largest error is the floor",
    )
    parser.add_argument("--reference", required=True, metavar="DIR", help="a trace, or 'official' to record one now")
    parser.add_argument("--port", metavar="FILE.py", help="another model, which this Python file describes (it is run)")
    parser.add_argument(
        "--dtype", choices=("float32", "float64", "both"), default="both", help="what TensorFlow computes in (default: both)"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="check this case, or training (steps/plain), only; may be given again"
    )
    parser.add_argument("--mode", choices=("graph", "eager", "xla"), default="graph", help="how TensorFlow runs (default: graph)")
    parser.add_argument(
        "--padding", choices=("official", "masked"), default="official", help="masked: all cases of one image in one padded batch"
    )
    parser.add_argument("--pad-to", type=int, nargs=2, metavar=("H", "W"), help="canvas of masked padding, px (default: a little larger)")
    parser.add_argument(
        "--all-stages", action="store_true", help="judge what comes behind the first broken stage too (default: stop there)"
    )
    parser.add_argument("--no-gradients", action="store_true", help="leave out all gradients, and the memory that they need")
    parser.add_argument(
        "--memory-budget",
        metavar="BYTES",
        help="memory to stay below, for example 6GB: with --mode eager, what taps take beyond an eighth of it goes to a temporary file",
    )
    parser.add_argument("--report", metavar="DIR", help="write report.html, .txt and .json, junit.xml and error_along_depth.png into DIR")
    _add_json(parser)
    official = parser.add_argument_group("with --reference official (needs PyTorch)")
    official.add_argument("--src", metavar="FILE", help="the official checkpoint that DIR was converted from; it must be trusted")
    official.add_argument("--config", metavar="YAML", help="official config (default: that of the zoo entry in the manifest of DIR)")
    official.add_argument(
        "--image", action="append", default=[], metavar="FILE@HxW", help="what 'record' takes as --case; may be given again"
    )
    official.add_argument("--maskformer", metavar="DIR", help="source folder of facebookresearch/MaskFormer")
    official.add_argument("--detectron2", metavar="DIR", help="source folder of facebookresearch/detectron2")
    return parser


def _settings(arguments: argparse.Namespace, scratch: str) -> Settings:
    from parity.check import Settings
    from parity.record import memory_budget

    return Settings(
        checkpoint=arguments.ckpt or arguments.actual,
        reference=scratch if arguments.reference == "official" else arguments.reference,
        dtypes=("float32", "float64") if arguments.dtype == "both" else (arguments.dtype,),
        cases=tuple(arguments.case),
        mode=arguments.mode,
        padding=arguments.padding,
        pad_to=tuple(arguments.pad_to) if arguments.pad_to else None,
        all_stages=arguments.all_stages,
        gradients=not arguments.no_gradients,
        memory_budget=memory_budget(arguments),
        port=arguments.port,
    )


def _record_reference(arguments: argparse.Namespace, directory: str) -> int:
    """Records the images, and a training step of the first, into ``directory``; returns an exit code, 0 where it worked.

    Raises:
        CheckError: the checkpoint was not converted from ``--src``.
    """
    from parity.converted import read_manifest, require_same_weights

    config = arguments.config or _zoo_config(arguments.ckpt)
    if config is None:
        return failed(
            f"the manifest of '{arguments.ckpt}' names no zoo entry, so its official config is not known; give --config", BAD_INPUT
        )
    given = {"file": arguments.src, "sha256": hashlib.sha256(Path(arguments.src).read_bytes()).hexdigest()}
    require_same_weights(arguments.ckpt, read_manifest(arguments.ckpt)["source"], "--src is", given)
    argv = ["--src", arguments.src, "--config", config]
    for name in ("maskformer", "detectron2"):
        if getattr(arguments, name):
            argv += [f"--{name}", getattr(arguments, name)]
    stdout, sys.stdout = sys.stdout, sys.stderr  # the path of a temporary folder is no result
    images = arguments.image or [f"{PHOTOS / name}" for name in DEFAULT_IMAGES]
    try:
        code = _record([*argv, "--out", directory, *(part for image in images for part in ("--case", image))])
        if code or arguments.no_gradients:
            return code
        step = ["--steps", "1", "--training", "plain", "--case", images[0], "--out", str(Path(directory) / "steps")]
        return _record_steps([*argv, *step])
    finally:
        sys.stdout = stdout


def _zoo_config(checkpoint: str) -> str | None:
    """The official YAML file of a converted checkpoint, below ``configs``; None where its manifest does not tell."""
    from checkpoints import registry
    from parity.converted import read_manifest

    try:
        return registry.entry(read_manifest(checkpoint)["model"]["zoo_entry"]).official_config.removeprefix("configs/")
    except (ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    sys.exit(main())
