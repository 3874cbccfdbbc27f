"""``tfmaskformer COMMAND …``: runs the command that an installed package registered under that name.

Commands are entry points of the group ``tfmaskformer.commands``, each a ``main(argv) -> exit code``. They are found by name, so this
package needs to know neither the converter nor the parity harness.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

GROUP = "tfmaskformer.commands"
OK, BAD_INPUT, COULD_NOT_RUN = 0, 2, 3
"""Exit codes; 1 is a command's own: what it was to find out is not as it should be."""


class OutputError(Exception):
    """A result that cannot be written; the message says which, why and the next step.

    Attributes:
        exit_code: what a command returns then: 2 before its work (:func:`require_writable`), 3 behind it (:func:`write_whole`).
    """

    def __init__(self, path: object, why: object, exit_code: int):
        super().__init__(f"cannot write {str(path)!r}: {why}; give another place")
        self.exit_code = exit_code


def failed(message: str, code: int) -> int:
    """Tells on stderr what went wrong, and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def require_writable(path: str | Path | None, *, folder: bool = False) -> None:
    """Raises OutputError, before any work, where :func:`write_whole` could not write a file.

    Args:
        path: of the file, in a folder that exists; None (there is nothing to write) and "-" (stdout) are always right.
        folder: whether it is a folder for several files instead, which is there or can be made.
    """
    if path is None or str(path) == "-":
        return
    given, place = Path(path), Path(os.path.realpath(path))
    try:
        if folder:
            needed = [next(above for above in (place, *place.parents) if above.exists())]
            why = "" if needed[0].is_dir() else f"'{needed[0]}' is no folder"
        elif given.exists() and not given.is_file():  # a folder, or /dev/stderr and the like
            needed, why = [given], "it is a folder, expected a file" if given.is_dir() else ""
        else:
            needed = [place.parent, *([place] if given.exists() else [])]
            why = "" if place.parent.is_dir() else f"there is no folder '{place.parent}'"
        if not why and not all(os.access(one, os.W_OK) for one in needed):
            why = "no permission"
    except OSError as error:  # a name that is too long
        why = str(error.strerror)
    if why:
        raise OutputError(path, why, BAD_INPUT)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, that is never seen in part: into a new one beside it, which then takes its place.

    A link stays one; what is no file, such as /dev/stderr, is written as it is.

    Raises:
        OutputError: it could not be written; what was there before is there still.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if Path(path).exists() and not Path(path).is_file():
            Path(path).write_bytes(data)
            return
        file = Path(os.path.realpath(path))
        beside = file.with_name(f".{file.name[:40]}.{os.getpid()}")
        try:
            beside.write_bytes(data)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(path, error.strerror or error, COULD_NOT_RUN) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``argv`` (default: the process's arguments) and returns the command's exit code; 2 where there is no such command."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    commands = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
    if name in commands:
        return commands[name].load()(rest)
    if name in ("-h", "--help"):
        print(_usage(commands))
        return 0
    if name == "--version":
        print(f"tfmaskformer {metadata.version('tfmaskformer')}")
        return 0
    if not name:
        print(_usage(commands), file=sys.stderr)
        return 2
    nearest = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean 'tfmaskformer {nearest[0]}'?" if nearest else "see 'tfmaskformer --help'"
    print(f"error: no command {name!r}\n  expected one of: {', '.join(sorted(commands))}\n  {hint}", file=sys.stderr)
    return 2


def _usage(commands: dict[str, metadata.EntryPoint]) -> str:
    lines = [f"  {name:<14}{(entry.load().__doc__ or '').strip().splitlines()[0]}" for name, entry in sorted(commands.items())]
    return "\n".join(
        ["usage: tfmaskformer COMMAND …", "       tfmaskformer --version", "", *lines, "", "'tfmaskformer COMMAND --help' tells more."]
    )
