"""The command ``convert``, also ``tfmaskformer convert``."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfmaskformer.cli import COULD_NOT_RUN, OK, OutputError, failed, require_writable, write_whole

if TYPE_CHECKING:
    from converters.convert import Conversion

DIFFERENT = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a checkpoint into one of another kind, look at one, or compare two.

    Returns 0; 1 where ``diff`` found differences; 2 for bad input or usage (nothing was written); 3 where it could not run.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _arguments(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from converters.errors import ConversionError, quoted

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    progress = _Progress(sys.stderr.isatty())
    try:
        return arguments.run(arguments, progress)
    except ConversionError as error:
        return _failed(progress, str(error), error.exit_code)
    except ImportError as error:
        remedy = "\n  pip install 'tfmaskformer[cpu]'" if error.name in ("tensorflow", "keras") else ""
        return _failed(progress, f"cannot import {error.name}: {error}{remedy}", COULD_NOT_RUN)
    except MemoryError:
        return _failed(progress, f"{quoted(arguments.what)} needs more memory than there is: about 1.3 times its size", COULD_NOT_RUN)
    except KeyboardInterrupt:
        return _failed(
            progress, "interrupted; on this machine nothing was written, in a bucket nothing that counts as a checkpoint", COULD_NOT_RUN
        )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    command, *rest = argv or [""]
    if command == "inspect":
        return _inspect_parser().parse_args(rest)
    if command == "diff":
        return _diff_parser().parse_args(rest)
    parser = _parser()
    arguments = parser.parse_args(argv)
    arguments.what = arguments.src or arguments.init
    if bool(arguments.dst) == arguments.dry_run:
        parser.error("--dst or --dry-run, one of the two")
    if arguments.port and (arguments.init or arguments.config or arguments.dtype):
        parser.error("--init, --config and --dtype are for MaskFormer; a port says itself what it is")
    if arguments.init and not arguments.config:
        parser.error("--init needs --config: the model that is to be trained")
    if arguments.seed is not None and not arguments.init:
        parser.error("--seed belongs to --init: a converted checkpoint has no initial values")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Converts a MaskFormer checkpoint of any kind into one of any other: official ones (.pkl, .pth) into TensorFlow's, and "
        "back.\nThe model is told from the tensors; the result is re-read and compared before it appears.",
        epilog="convert inspect FILE     what a checkpoint is, and what in it looks wrong\n"
        "convert diff A B         two checkpoints of any kinds, tensor by tensor\n\n"
        "exit codes: 0 converted, 2 usage or bad input (nothing was written), 3 could not run",
    )
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument(
        "--src",
        metavar="FILE",
        help=".pkl, .pth, .safetensors, .h5, .weights.h5, a directory with a TensorFlow checkpoint, a file of Hugging Face, a zoo entry or "
        "a URL (downloaded), or gs://…",
    )
    sources.add_argument("--init", metavar="FILE", help="weights of a backbone to train from, e.g. R-50.pkl; needs --config")
    parser.add_argument(
        "--dst",
        metavar="PATH",
        help="what to make; its name says which kind: .pkl, .pth, .safetensors, .weights.h5, .h5, else a directory that tfmaskformer.load "
        "reads. Also gs://…",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and tell what would be converted, but write nothing")
    _add_config(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="round the weights, and tell the loss of each tensor; default: float32, if that holds them exactly",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="with --init: of the initial values that are random; default: 0")
    parser.add_argument(
        "--port",
        metavar="FILE.py",
        help="the source is of another model, which this Python file describes (it is run); PATH becomes a directory with Keras weights",
    )
    parser.add_argument("--force", action="store_true", help="replace what an earlier conversion wrote to PATH")
    parser.add_argument("--json", metavar="FILE", help="also write the manifest as JSON to FILE, or to stdout only (-)")
    parser.set_defaults(run=_convert)
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert inspect",
        description="Tells what a checkpoint is: its kind, the model, the zoo entry that it fits, its tensors, and those that look wrong "
        "(NaN, infinite, all zero or all the same). Files need no TensorFlow.",
        epilog="exit codes: 0 it can be read, 2 it cannot, 3 could not run",
    )
    parser.add_argument("what", metavar="FILE", help="as convert --src")
    _add_config(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_inspect)
    return parser


def _diff_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert diff",
        description="Compares two checkpoints of any kinds, tensor by tensor, under their official names and in PyTorch's layout.",
        epilog="exit codes: 0 the same bits, 1 differences, 2 one of them cannot be read, 3 could not run",
    )
    parser.add_argument("what", metavar="A", help="as convert --src")
    parser.add_argument("other", metavar="B", help="the same")
    _add_config(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_diff)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="zoo entry, official YAML file or config.json, for what tensors cannot tell; default: what lies beside them, or the entry "
        "that fits",
    )


def _convert(arguments: argparse.Namespace, progress: _Progress) -> int:
    from converters.convert import convert
    from converters.init import initialize

    start_s = time.monotonic()
    json_file = _writable(arguments.json, (arguments.what, arguments.dst))
    if arguments.port:
        return _convert_port(arguments, json_file)
    how = {"dtype": arguments.dtype, "force": arguments.force, "progress": progress}
    if arguments.init:
        conversion = initialize(arguments.init, arguments.dst, arguments.config, arguments.seed or 0, **how)
    else:
        conversion = convert(arguments.src, arguments.dst, arguments.config, **how)
    progress.end()
    if arguments.json == "-":
        _print(json.dumps(conversion.manifest))
    else:
        if json_file is not None:
            _write_json(json_file, conversion.manifest)
        _print(_summary(conversion, time.monotonic() - start_s))
    return OK


def _convert_port(arguments: argparse.Namespace, json_file: pathlib.Path | None) -> int:
    from converters import ports

    manifest = ports.convert(ports.read(arguments.port), arguments.src, arguments.dst, force=arguments.force)
    if arguments.json == "-":
        _print(json.dumps(manifest))
        return OK
    if json_file is not None:
        _write_json(json_file, manifest)
    _print(ports.summary(manifest, arguments.dst))
    return OK


def _inspect(arguments: argparse.Namespace, progress: _Progress) -> int:
    from converters.inspection import inspect

    found = inspect(arguments.what, arguments.config, progress)
    progress.end()
    _print(json.dumps(found.to_dict(), indent=2) if arguments.json else found.text())
    return OK


def _diff(arguments: argparse.Namespace, progress: _Progress) -> int:
    from converters.difference import diff

    found = diff(arguments.what, arguments.other, arguments.config, progress)
    progress.end()
    _print(json.dumps(found.to_dict(), indent=2) if arguments.json else found.text())
    return OK if found.same else DIFFERENT


def _writable(path: str | None, others: Sequence[str | None]) -> pathlib.Path | None:
    """The file to write the manifest to; refused where it is the source, the destination, or a file that is no JSON."""
    from converters.errors import ConversionError, quoted

    if path in (None, "-"):
        return None
    file = pathlib.Path(str(path))
    try:
        if any(other and file.resolve() == pathlib.Path(other).resolve() for other in others):
            raise ConversionError(f"--json {quoted(path)} is the source or the destination", "choose another --json file")
        require_writable(file)
        if file.is_file() and file.stat().st_size and file.read_bytes()[:1] != b"{":
            raise ConversionError(f"{quoted(path)} exists and is no JSON", "choose another --json file")
    except OutputError as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        raise ConversionError(f"cannot write {quoted(path)}: {error.strerror}", "choose another --json file") from None
    return file


def _write_json(file: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    from converters.errors import ConversionError

    try:
        write_whole(file, json.dumps(manifest) + "\n")
    except OutputError as error:
        raise ConversionError(str(error), "the conversion itself is complete") from None


def _summary(conversion: Conversion, seconds: float) -> str:
    from converters.errors import printable

    manifest, config = conversion.manifest, conversion.inference.config
    source, entry = manifest["source"], manifest["model"]["zoo_entry"]
    elements = sum(math.prod(tensor["target_shape"]) for tensor in manifest["tensors"])
    dropped: dict[str, list[str]] = {}
    for drop in manifest["dropped"]:
        dropped.setdefault(drop["reason"], []).append(drop["source"])
    done = "; re-read, every tensor equal" if conversion.destination else "; a dry run, nothing was written"
    rows = {
        "source": f"{source['file']}, {source['bytes'] / 1e6:.1f} MB, key layout {source['key_layout']}, SHA-256 {source['sha256']}",
        "model": f"{config.name}" + (" (the tensors fit exactly)" if entry else ""),
        "": _architecture(config.to_dict()),
        "weights": f"{len(manifest['tensors'])} tensors, {elements / 1e6:.2f} M elements, {manifest['dtype']}{done}",
        "rounded": _rounding(manifest["tensors"]),
        "no weight": "; ".join(f"{_listed(names)} ({reason})" for reason, names in dropped.items()),
        "left out": ", ".join(conversion.left_out),
        "origin": conversion.origin,
    }
    if initial := [line["target"] for line in manifest.get("initial", [])]:
        rows["initial"] = f"{len(initial)} more variables at their initial values, seed {manifest['seed']}: {', '.join(_parts(initial))}"
    if assumed := manifest["model"]["assumed"]:
        rows["assumed"] = ", ".join(f"{field}={json.dumps(value)}" for field, value in assumed.items())
        if alternatives := manifest["model"]["alternatives"]:
            rows["or take"] = "these settings from another model: " + ", ".join(f"--config {name}" for name in alternatives)
    rows["licence"] = manifest["weights_license"]
    rows["time"] = f"{seconds:.1f} s"
    wrap = textwrap.TextWrapper(width=120, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)
    lines = [wrap.fill(f"  {label:<11}{printable(text, 2000)}") for label, text in rows.items() if text]
    return "\n".join([f"{printable(source['file'])} → {printable(conversion.destination or 'nothing')}", *lines])


def _rounding(tensors: Sequence[Mapping[str, Any]]) -> str:
    """What rounding lost, over all tensors; each tensor's loss is in the manifest."""
    losses = [(tensor["loss"], tensor["source"]) for tensor in tensors if "loss" in tensor]
    if not losses:
        return ""
    worst, name = max(losses, key=lambda item: item[0]["relative_l2"])
    zeros = sum(loss["underflows"] for loss, _ in losses)
    if not worst["relative_l2"]:
        return ""
    return f"{len(losses)} tensors; the largest relative L2 error is {worst['relative_l2']:.1e}, of {name}; {zeros} values became 0"


def _architecture(config: Mapping[str, Any]) -> str:
    parts = [_backbone(config["backbone"]), config["head"], config["pixel_decoder"]["name"]]
    if config["head"] != "PerPixelBaselineHead":
        parts.append(f"{config['predictor']['num_queries']} queries")
    return ", ".join([*parts, f"{config['num_classes']} classes"])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + f" and {len(names) - 2} more" * (len(names) > 2)


def _parts(names: Sequence[str]) -> list[str]:
    """The modules, two levels deep, that variables belong to.

    >>> _parts(["backbone.norm0.weight", "backbone.norm0.bias", "criterion.x"])
    ['backbone.norm0', 'criterion.x']
    """
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def _backbone(config: Mapping[str, Any]) -> str:
    if config["name"] == "ResNet":
        return f"ResNet-{config['depth']}" + " with the DeepLab stem" * (config["stem_type"] == "deeplab")
    return f"Swin Transformer of {config['embed_dim']} channels and {'-'.join(map(str, config['depths']))} blocks"


def _print(text: str) -> None:
    from converters.errors import ConversionError

    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it when it ends
        failure = ConversionError(f"cannot print: {error.strerror}")
        failure.exit_code = COULD_NOT_RUN
        raise failure from None


def _failed(progress: _Progress, message: str, code: int) -> int:
    progress.end()
    return failed(message, code)


class _Progress:
    """One line on a terminal that names the step; nothing elsewhere."""

    def __init__(self, on: bool):
        self._on = on
        self._shown = ""

    def __call__(self, step: str, share: float) -> None:
        line = f"{step} … {share:4.0%}" if share else f"{step} …"
        if self._on and line != self._shown:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._shown = line

    def end(self) -> None:
        """Clears the line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._shown = ""


if __name__ == "__main__":
    sys.exit(main())
