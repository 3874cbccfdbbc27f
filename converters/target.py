"""What ``convert`` writes: a format for each ending of a name, and a TensorFlow checkpoint for any other name."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from checkpoints import synthesize
from converters import checkpoint, hdf5, keras_weights, safetensors_file, source, torch_zip
from converters.errors import ConversionError, quoted
from converters.manifest import encoded
from converters.tables import maskformer as table
from converters.tensor import BFLOAT16, Tensor
from tfmaskformer.config import MaskFormerConfig


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is to be written.

    Attributes:
        config: the model's.
        author: what the source says in ``__author__``, or "".
        tensors: v2 name → tensor in PyTorch's layout: every official tensor, in the official order. Empty for formats that hold variables.
        variables: name → variable in TensorFlow's layout, for formats that hold variables.
        manifest: where it comes from, for formats with a place for it.
    """

    config: MaskFormerConfig
    author: str
    tensors: Mapping[str, Tensor]
    variables: Mapping[str, np.ndarray]
    manifest: Mapping[str, Any]

    @property
    def facts(self) -> dict[str, str]:
        """What lies beside the tensors in files that have a place for it."""
        return {source.CONFIG_KEY: json.dumps(self.config.to_dict()), source.AUTHOR_KEY: self.author}


@dataclasses.dataclass(frozen=True)
class Format:
    """How a checkpoint is written.

    Attributes:
        kind: what :func:`converters.source.kind_of` says of the result.
        endings: of names that ask for it.
        write: writes the file, or into the directory.
        files: of a directory; empty for a file.
    """

    kind: str
    endings: tuple[str, ...]
    write: Callable[[pathlib.Path, Contents], None]
    files: tuple[str, ...] = ()

    @property
    def holds_variables(self) -> bool:
        """Whether it has variables of TensorFlow, in its layout."""
        return self.kind in source.VARIABLES


def format_of(path: str) -> Format:
    """The format that a destination's name asks for.

    >>> format_of("model_final.pkl").kind, format_of("a/tf_ckpt").kind
    ('pickle', 'TensorFlow checkpoint')
    """
    return next((found for found in FILES if path.lower().endswith(found.endings)), DIRECTORY)


def is_own(path: pathlib.Path) -> bool:
    """Whether ``convert`` may have written a file: every kind has a mark near its beginning."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return head.startswith(synthesize.PICKLE_HEAD) or torch_zip.MARK.encode() in head or source.CONFIG_KEY.encode() in head


HEAD_BYTES = 1 << 20
"""Of a file, among which the mark is."""


def _write_pickle(path: pathlib.Path, contents: Contents) -> None:
    _refuse_bfloat16(contents, "NumPy's pickles have")
    with path.open("wb") as file:
        synthesize.write_pickle_to(file, contents.tensors, contents.author or "tfmaskformer")


def _write_torch(path: pathlib.Path, contents: Contents) -> None:
    with path.open("wb") as file:
        torch_zip.write_zip(file, contents.tensors, table.versions(contents.tensors))


def _write_safetensors(path: pathlib.Path, contents: Contents) -> None:
    file: BinaryIO
    with path.open("wb") as file:
        safetensors_file.write_safetensors(file, contents.tensors, {"format": "pt", **contents.facts})


def _write_hdf5(path: pathlib.Path, contents: Contents) -> None:
    _refuse_bfloat16(contents, "HDF5 has")
    hdf5.write(path, contents.tensors, (), contents.facts)


def _write_keras(path: pathlib.Path, contents: Contents) -> None:
    _refuse_bfloat16(contents, "HDF5 has")
    places = keras_weights.paths(contents.config)
    variables = {places[name]: value for name, value in contents.variables.items()}
    hdf5.write(path, variables, keras_weights.groups(contents.config), contents.facts)


def _write_directory(path: pathlib.Path, contents: Contents) -> None:
    checkpoint.write(path, contents.variables)
    (path / checkpoint.CONFIG_FILE).write_text(json.dumps(contents.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    (path / checkpoint.MANIFEST_FILE).write_text(encoded(contents.manifest), encoding="utf-8")


def _refuse_bfloat16(contents: Contents, who: str) -> None:
    names = [name for name, tensor in (contents.tensors or contents.variables).items() if tensor.dtype == BFLOAT16]
    if names:
        raise ConversionError(
            f"{who} no bfloat16: {quoted(names[0])} and {len(names) - 1} more",
            "write .pth, .safetensors or a TensorFlow checkpoint, or take --dtype float16",
        )


DIRECTORY = Format(source.TENSORFLOW, (), _write_directory, (checkpoint.MANIFEST_FILE, checkpoint.CONFIG_FILE, *checkpoint.FILES))
FILES = (
    Format(source.PICKLE, (".pkl",), _write_pickle),
    Format(source.TORCH, (".pth", ".pt"), _write_torch),
    Format(source.SAFETENSORS, (".safetensors",), _write_safetensors),
    Format(source.KERAS, (".weights.h5",), _write_keras),
    Format(source.HDF5, (".h5", ".hdf5"), _write_hdf5),
)
"""A plain pickle carries no version, so the official loader expects v1 names in it; in a .pth file ``_metadata`` tells that they are v2."""
