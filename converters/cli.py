"""The command ``convert``, also ``tfmaskformer convert``."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.convert import Conversion

OK, BAD_INPUT, COULD_NOT_RUN = 0, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Convert an official checkpoint, or the weights of a backbone, into a TensorFlow checkpoint.

    Returns 0; 2 for bad input or usage (nothing was written); 3 where the conversion could not run.
    """
    arguments = _arguments(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from converters.convert import convert
    from converters.errors import ConversionError, quoted
    from converters.init import initialize

    start_s = time.monotonic()
    progress = _Progress(sys.stderr.isatty())
    try:
        json_file = _writable(arguments.json)
        if arguments.init:
            seed = arguments.seed or 0
            conversion = initialize(arguments.init, arguments.dst, arguments.config, seed, force=arguments.force, progress=progress)
        else:
            conversion = convert(arguments.src, arguments.dst, arguments.config, force=arguments.force, progress=progress)
    except ConversionError as error:
        return _failed(progress, str(error), BAD_INPUT)
    except ImportError as error:
        return _failed(progress, f"cannot import {error.name}: {error}\n  pip install 'tfmaskformer[cpu]'", COULD_NOT_RUN)
    except MemoryError:
        return _failed(
            progress, f"{quoted(arguments.src or arguments.init)} needs more memory than there is: about 2.2 times its size", COULD_NOT_RUN
        )
    except KeyboardInterrupt:
        return _failed(progress, "interrupted; nothing was written", COULD_NOT_RUN)
    progress.end()
    if arguments.json == "-":
        print(json.dumps(conversion.manifest))
    else:
        if json_file is not None:
            json_file.write_text(json.dumps(conversion.manifest) + "\n", encoding="utf-8")
        print(_summary(conversion, time.monotonic() - start_s))
    return OK


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.init and not arguments.config:
        parser.error("--init needs --config: the model that is to be trained")
    if arguments.seed is not None and not arguments.init:
        parser.error("--seed belongs to --init: a converted checkpoint has no initial values")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert",
        description="Converts an official MaskFormer checkpoint (.pkl or .pth) into a TensorFlow checkpoint. The architecture is "
        "told from the tensors; the result is re-read and compared before it appears. With --init: makes the checkpoint that training "
        "starts from, of a backbone's weights.",
        epilog="exit codes: 0 converted, 2 usage or bad input (nothing was written), 3 could not run",
    )
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--src", metavar="FILE", help="the checkpoint, e.g. model_final_6f60dc.pkl")
    sources.add_argument("--init", metavar="FILE", help="weights of a backbone to train from, e.g. R-50.pkl; needs --config")
    parser.add_argument("--dst", required=True, metavar="DIR", help="directory to make; tfmaskformer.load reads it")
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="zoo entry, official YAML file or config.json, for what tensors cannot tell; default: the entry that fits",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="with --init: of the initial values that are random; default: 0")
    parser.add_argument("--force", action="store_true", help="replace what an earlier conversion wrote to DIR")
    parser.add_argument("--json", metavar="FILE", help="also write the manifest as JSON to FILE, or to stdout only (-)")
    return parser


def _writable(path: str | None) -> pathlib.Path | None:
    from converters.errors import ConversionError, quoted

    if path in (None, "-"):
        return None
    file = pathlib.Path(str(path))
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise ConversionError(f"cannot write {quoted(path)}", "choose another --json file, in a directory that exists")
    return file


def _summary(conversion: Conversion, seconds: float) -> str:
    manifest, config = conversion.manifest, conversion.inference.config
    source, entry = manifest["source"], manifest["model"]["zoo_entry"]
    elements = sum(_product(tensor["target_shape"]) for tensor in manifest["tensors"])
    dropped: dict[str, list[str]] = {}
    for drop in manifest["dropped"]:
        dropped.setdefault(drop["reason"], []).append(drop["source"])
    rows = {
        "source": f"{source['file']}, {source['bytes'] / 1e6:.1f} MB, key layout {source['key_layout']}, SHA-256 {source['sha256']}",
        "model": f"{config.name}" + (" (the tensors fit exactly)" if entry else ""),
        "": f"{_backbone(config.to_dict()['backbone'])}, {config.pixel_decoder.name}, "
        f"{config.predictor.num_queries} queries, {config.num_classes} classes",
        "written": f"{len(manifest['tensors'])} variables, {elements / 1e6:.2f} M elements; re-read, every byte equal",
        "dropped": "; ".join(f"{_listed(names)} ({reason})" for reason, names in dropped.items()),
    }
    if initial := [line["target"] for line in manifest.get("initial", [])]:
        rows["initial"] = f"{len(initial)} more variables at their initial values, seed {manifest['seed']}: {', '.join(_parts(initial))}"
    if assumed := manifest["model"]["assumed"]:
        rows["assumed"] = ", ".join(f"{field}={json.dumps(value)}" for field, value in assumed.items())
        if alternatives := manifest["model"]["alternatives"]:
            rows["or take"] = "these settings from another model: " + ", ".join(f"--config {name}" for name in alternatives)
    rows["licence"] = manifest["weights_license"]
    rows["time"] = f"{seconds:.1f} s"
    wrap = textwrap.TextWrapper(width=120, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False)
    lines = [wrap.fill(f"  {label:<9}{text}") for label, text in rows.items()]
    return "\n".join([f"{source['file']} → {conversion.destination}", *lines])


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


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _failed(progress: _Progress, message: str, code: int) -> int:
    progress.end()
    print(f"error: {message}", file=sys.stderr)
    return code


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
