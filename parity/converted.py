"""What ``convert`` wrote beside a checkpoint: whose weights it has, and whether a recording is of the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CheckError(ValueError):
    """The checkpoint, the trace or the settings cannot be used; the message says what, where and the next step."""


def read_manifest(checkpoint: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which tells in ``source`` what it was converted from.

    Raises:
        CheckError: it has none.
    """
    path = Path(checkpoint) / "manifest.json"
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        return manifest | {"source": dict(manifest["source"])}
    except FileNotFoundError as error:
        raise CheckError(
            f"'{checkpoint}' has no manifest.json, which tells whose weights it has; expected a directory from 'convert'"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"'{path}' cannot be read ({error!r}); convert the checkpoint again") from error


def require_same_weights(checkpoint: str | Path, source: Mapping[str, Any], other: str, file: Mapping[str, Any]) -> None:
    """Raises CheckError unless a checkpoint was converted from the official file that something else is of.

    Args:
        checkpoint: the directory.
        source: of its manifest.
        other: what the something else is, up to its file: ``'trace' was recorded from``.
        file: name and SHA-256 of its official file, as in ``source``: ``file``, ``sha256``.
    """
    if file.get("sha256") != source.get("sha256"):
        raise CheckError(
            f"other weights: '{checkpoint}' was converted from {source.get('file')} (SHA-256 {source.get('sha256')}),\n"
            f"  but {other} {file.get('file')} (SHA-256 {file.get('sha256')})\n"
            "  convert that file, or record this one: parity-check record (record-steps) --src …"
        )
