"""Two checkpoints of any kinds, compared tensor by tensor: ``convert diff``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.convert import Progress
from converters.errors import ConversionError, quoted
from converters.named_config import named_config
from converters.official import official
from converters.remote import local_copy
from converters.source import VARIABLES, Source, open_source
from converters.tensor import Tensor, is_float
from tfmaskformer.config import MaskFormerConfig

_LISTED = 20


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs.

    Attributes:
        name: official v2 name, or the file's own.
        what: shapes or dtypes that differ, or "".
        relative_l2: L2 norm of the differences over that of the first; None where shapes differ.
        max_abs: the largest difference; NaN where one of two values is NaN.
        elements: how many differ in value.
    """

    name: str
    what: str
    relative_l2: float | None
    max_abs: float | None
    elements: int | None

    def text(self) -> str:
        """One line."""
        parts = [self.what] if self.what else []
        if self.elements:
            parts.append(f"{self.elements} values differ, by up to {self.max_abs:.3g}, relative L2 {self.relative_l2:.3g}")
        elif self.elements == 0:
            parts.append("equal values")
        return f"{quoted(self.name)}: {'; '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class Difference:
    """What two checkpoints have in common, and what not.

    Attributes:
        first, second: their paths, as given.
        equal: number of tensors that have the same bits in both.
        differences: the other ones that both have, the largest difference first.
        only_first, only_second: names that only one has.
    """

    first: str
    second: str
    equal: int
    differences: tuple[TensorDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether every tensor is in both, with the same bits."""
        return not (self.differences or self.only_first or self.only_second)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; a number that is not finite is the text "nan" or "inf"."""
        values = dataclasses.asdict(self)
        for item in values["differences"]:
            item |= {name: str(value) for name, value in item.items() if isinstance(value, float) and not np.isfinite(value)}
        return values | {"same": self.same}

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.first} and {self.second}: {self.equal} tensors have the same bits" + ", and there are no others" * self.same]
        groups = {
            "differ": [difference.text() for difference in self.differences],
            f"only in {self.first}": [quoted(name) for name in self.only_first],
            f"only in {self.second}": [quoted(name) for name in self.only_second],
        }
        for what, items in groups.items():
            if items:
                lines.append(f"  {len(items)} {what}:")
                lines += [f"    {item}" for item in items[:_LISTED]] + [f"    … and {len(items) - _LISTED} more"] * (len(items) > _LISTED)
        return "\n".join(lines)


def diff(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    config: str | None = None,
    progress: Progress = lambda step, share: None,
) -> Difference:
    """Compares two checkpoints, of any kinds, under their official names and in PyTorch's layout.

    Args:
        first, second: as ``convert`` takes them.
        config: of a checkpoint of variables that has none beside it.
        progress: told what is being done.

    Raises:
        ConversionError: one of them cannot be read.
    """
    base = named_config(config) if config else None
    with local_copy(first, progress) as one, local_copy(second, progress) as two, open_source(one) as a, open_source(two) as b:
        tensors, others = _named(a, base), _named(b, base)
        common = [name for name in tensors if name in others]
        found = []
        for count, name in enumerate(common, 1):
            if difference := _compare(name, tensors[name], others[name]):
                found.append(difference)
            a.release(tensors[name])
            b.release(others[name])
            progress("comparing", count / len(common))
    found.sort(key=lambda item: -np.inf if item.relative_l2 is None else -np.nan_to_num(item.relative_l2, nan=np.inf))
    return Difference(
        first=os.fspath(first),
        second=os.fspath(second),
        equal=len(common) - len(found),
        differences=tuple(found),
        only_first=tuple(name for name in tensors if name not in others),
        only_second=tuple(name for name in others if name not in tensors),
    )


def _named(source: Source, config: MaskFormerConfig | None) -> Mapping[str, Tensor]:
    """The tensors under official names, and what has none under its own; all under their own where there is no MaskFormer."""
    try:
        found = official(source, config)
    except ConversionError:
        if source.kind in VARIABLES:
            raise
        return source.tensors
    return {**found.v2(), **{name: source.tensors[name] for name, _ in found.dropped}}


def _compare(name: str, first: Tensor, second: Tensor) -> TensorDifference | None:
    """None where they have the same bits."""
    if first.shape != second.shape:
        return TensorDifference(name, f"shapes {first.shape} and {second.shape}", None, None, None)
    a, b = np.ascontiguousarray(first), np.ascontiguousarray(second)
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return None
    what = f"{a.dtype.name} and {b.dtype.name}" if a.dtype != b.dtype else ""
    exact, other = a.astype(np.float64), b.astype(np.float64)
    differ = ~((exact == other) | (np.isnan(exact) & np.isnan(other)))
    if a.dtype == b.dtype and not is_float(a.dtype):
        differ = a != b
    if not differ.any():
        return TensorDifference(name, what or "the same values in other bits (a sign of 0, or a NaN)", 0.0, 0.0, 0)
    with np.errstate(invalid="ignore"):
        distance = np.where(differ, np.abs(exact - other), 0)
    norm = float(np.linalg.norm(exact))
    return TensorDifference(
        name, what, float(np.linalg.norm(distance)) / norm if norm else float("inf"), float(distance.max()), int(differ.sum())
    )
