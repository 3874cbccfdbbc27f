"""``tfmaskformer COMMAND …``: runs the command that an installed package registered under that name.

Commands are entry points of the group ``tfmaskformer.commands``, each a ``main(argv) -> exit code``. They are found by name, so this
package needs to know neither the converter nor the parity harness.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import metadata

GROUP = "tfmaskformer.commands"
OK, BAD_INPUT, COULD_NOT_RUN = 0, 2, 3
"""Exit codes; 1 is a command's own: what it was to find out is not as it should be."""


def failed(message: str, code: int) -> int:
    """Tells on stderr what went wrong, and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


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
