"""``manifest.json``: where a converted checkpoint comes from, tensor by tensor. It has no times, so equal input gives equal bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import tfmaskformer
from checkpoints import synthesize
from converters.infer import Inference
from converters.rules import Drop, Move
from converters.tensor import Tensor
from converters.transforms import Transform

FORMAT = "tfmaskformer-checkpoint"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Loss:
    """What rounding a tensor to another type did to it.

    Attributes:
        relative_l2: L2 norm of the differences over that of the tensor; 0 where nothing changed.
        max_abs: the largest difference.
        underflows: values that became 0.
        overflows: values that became infinite.
    """

    relative_l2: float
    max_abs: float
    underflows: int
    overflows: int

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray) -> Loss:
        """The loss from a finite array to its rounded one."""
        exact, rounded = before.astype(np.float64), after.astype(np.float64)
        overflows = int(np.isinf(rounded).sum())
        difference = np.abs(np.where(np.isinf(rounded), 0, rounded) - exact)
        norm = float(np.linalg.norm(exact))
        return cls(
            relative_l2=float(np.linalg.norm(difference)) / norm if norm else 0.0,
            max_abs=float(difference.max(initial=0)),
            underflows=int(((rounded == 0) & (exact != 0)).sum()),
            overflows=overflows,
        )


def manifest(
    *,
    source: Mapping[str, Any],
    table: str,
    inference: Inference,
    tensors: Mapping[str, Tensor],
    digests: Mapping[str, str],
    written: Mapping[str, str],
    moves: Sequence[Move],
    drops: Sequence[Drop],
    losses: Mapping[str, Loss],
    dtype: str,
    license: str | None = None,  # noqa: A002
) -> dict[str, Any]:
    """The manifest as JSON types.

    Args:
        source: what is known of the file: "file" (name without directories), "bytes", "sha256", "author", "key_layout".
        table: name and version of the rule table, or of those that follow each other.
        inference: the config and its origins.
        tensors: source name → tensor.
        digests: source name → SHA-256 of the tensor's elements in C order, as hex digits.
        written: the same of the elements as they are written, still in PyTorch's layout.
        moves: what became a variable.
        drops: what did not.
        losses: source name → what rounding did to it.
        dtype: of the variables.
        license: of the weights, where the source tells it.
    """
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tool": {"name": "tfmaskformer", "version": tfmaskformer.__version__, "rule_table": table},
        "source": dict(source),
        "weights_license": license or weights_license(inference, source["author"]),
        "dtype": dtype,
        "model": {
            "name": inference.config.name,
            "zoo_entry": inference.entry.name if inference.entry else None,
            "origins": inference.origins,
            "assumed": inference.assumed,
            "alternatives": list(inference.alternatives),
        },
        "tensors": [
            {
                "source": move.source,
                "target": move.target,
                **_transform(move.transform),
                "source_shape": list(tensors[move.source].shape),
                "target_shape": list(move.transform.shape(tensors[move.source].shape)),
                "dtype": tensors[move.source].dtype.name,
                "sha256": digests[move.source],
                **({"written": written[move.source]} if written.get(move.source, digests[move.source]) != digests[move.source] else {}),
                **({"loss": dataclasses.asdict(losses[move.source])} if move.source in losses else {}),
            }
            for move in moves
        ],
        "dropped": [
            {
                "source": drop.source,
                "reason": drop.reason,
                "shape": list(tensors[drop.source].shape),
                "dtype": tensors[drop.source].dtype.name,
                "sha256": digests[drop.source],
            }
            for drop in drops
        ],
    }


def weights_license(inference: Inference, author: str) -> str:
    """What is known of the licence of the weights."""
    ours = {synthesize.AUTHOR: "synthetic weights", synthesize.TRAINED_AUTHOR: "trained on generated images"}
    if author in ours:
        return f"Apache-2.0 ({ours[author]}, made by tfmaskformer)"
    if inference.entry is not None:
        return f"{inference.entry.weights_license} if these are the official weights of {inference.entry.name}"
    return "unknown; weights fine-tuned from official ones derive from CC-BY-NC-4.0"


def encoded(values: Mapping[str, Any]) -> str:
    """JSON text with a line for each tensor, so that it can be read and compared."""
    parts = []
    for key, value in values.items():
        if isinstance(value, list) and value:
            lines = ",\n    ".join(json.dumps(item) for item in value)
            parts.append(f'  "{key}": [\n    {lines}\n  ]')
        else:
            parts.append(f'  "{key}": ' + json.dumps(value, indent=2).replace("\n", "\n  "))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _transform(transform: Transform) -> dict[str, Any]:
    return {"transform": transform.name} | ({"permutation": list(transform.permutation)} if transform.permutation else {})
