"""What a checkpoint is, and what in it looks wrong: ``convert inspect``. Files need no TensorFlow."""

from __future__ import annotations

import collections
import dataclasses
import os
import textwrap
from typing import Any

import numpy as np

from converters.convert import Progress
from converters.errors import ConversionError, printable, quoted
from converters.infer import Inference, infer
from converters.named_config import named_config
from converters.official import official
from converters.remote import local_copy
from converters.source import Source, open_source
from converters.tensor import Tensor, is_float
from tfmaskformer.config import MaskFormerConfig

_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        name: of the file or directory.
        kind: of checkpoint.
        size_bytes: of the file, or of the directory's checkpoint.
        author: what the file says, or "".
        others: what is in it beside the model: "optimizer", …
        key_layout: of the names, or "" where they are no MaskFormer's.
        model: name of the config.
        entry: the zoo entry that the tensors fit exactly, or "".
        problem: why the model is not known, or "".
        tensors: how many there are.
        elements: of all of them.
        dtypes: dtype → number of tensors.
        suspicious: name → what is wrong with its values.
    """

    name: str
    kind: str
    size_bytes: int
    author: str
    others: tuple[str, ...]
    key_layout: str
    model: str
    entry: str
    problem: str
    tensors: int
    elements: int
    dtypes: dict[str, int]
    suspicious: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """For a terminal."""
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        rows = {
            "kind": f"{self.kind}, {self.size_bytes / 1e6:.1f} MB",
            "author": printable(self.author, 200),
            "model": f"{self.model}" + (" (the tensors fit exactly)" if self.entry else "") if self.model else f"unknown: {self.problem}",
            "names": f"key layout {self.key_layout}" if self.key_layout else "",
            "tensors": f"{self.tensors} ({dtypes}), {self.elements / 1e6:.2f} M elements",
            "also": ", ".join(self.others),
            "values": "none are NaN, infinite, all zero or all the same" if not self.suspicious else f"{len(self.suspicious)} suspicious:",
        }
        wrap = textwrap.TextWrapper(width=120, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False)
        lines = [wrap.fill(f"  {label:<9}{printable(text, 2000)}") for label, text in rows.items() if text]
        lines += [f"           {quoted(name)}: {what}" for name, what in list(self.suspicious.items())[:_LISTED]]
        lines += [f"           … and {len(self.suspicious) - _LISTED} more"] * (len(self.suspicious) > _LISTED)
        return "\n".join([printable(self.name), *lines])


def inspect(path: str | os.PathLike[str], config: str | None = None, progress: Progress = lambda step, share: None) -> Inspection:
    """Looks at a checkpoint of any kind, also at one that cannot be converted.

    Args:
        path: as ``convert`` takes it.
        config: of the model, where the checkpoint has none beside it and tensors cannot tell.
        progress: told what is being done.

    Raises:
        ConversionError: it cannot be read.
    """
    with local_copy(path, progress) as file, open_source(file) as source:
        base = named_config(config) if config else source.config
        inference, key_layout, problem = _model(source, base)
        suspicious = {}
        for count, (name, tensor) in enumerate(source.tensors.items(), 1):
            if what := _suspicion(tensor):
                suspicious[name] = what
            source.release(tensor)
            progress("reading", count / len(source.tensors))
        return Inspection(
            name=source.path.name,
            kind=source.kind,
            size_bytes=source.size_bytes,
            author=source.author,
            others=source.others,
            key_layout=key_layout,
            model=inference.config.name if inference else base.name if base and not problem else "",
            entry=inference.entry.name if inference and inference.entry else "",
            problem=problem,
            tensors=len(source.tensors),
            elements=sum(tensor.size for tensor in source.tensors.values()),
            dtypes=dict(collections.Counter(tensor.dtype.name for tensor in source.tensors.values()).most_common()),
            suspicious=suspicious,
        )


def _model(source: Source, base: MaskFormerConfig | None) -> tuple[Inference | None, str, str]:
    """The model, the key layout, and why the model is not known. What Keras saved cannot be told without Keras."""
    key_layout = ""
    try:
        found = official(source, base)
        key_layout = found.key_layout
        return infer(found.v2(), source.path.name, base), key_layout, ""
    except ConversionError as error:
        return None, key_layout, str(error).partition("\n")[0]
    except ImportError as error:
        return None, key_layout, "" if base else f"{error.name} is not installed"


def _suspicion(tensor: Tensor) -> str:
    """What is odd about a tensor's values, or ""."""
    if tensor.size < 2:
        return "" if tensor.size and np.isfinite(np.asarray(tensor)).all() else "not finite" * bool(tensor.size)
    array = np.asarray(tensor)
    if is_float(array.dtype) and not np.isfinite(array).all():
        nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        return f"{nan} values are NaN and {infinite} infinite, of {array.size}"
    first = array.flat[0]
    if (array == first).all():
        return "all zero" if first == 0 else f"all {first}"
    return ""
