"""The one error of the converters: what is wrong, where, what was expected, and the next step."""

from __future__ import annotations


class ConversionError(ValueError):
    """A file, a config or a destination that cannot be used; nothing was written.

    The first line says what and where; ``details`` say expected and got, and end with the next step.

    >>> print(ConversionError("the file is empty", "download it again"))
    the file is empty
      download it again
    """

    exit_code = 2
    """Of the command: 2 for bad input, 3 where something outside of it failed, such as a network."""

    def __init__(self, what: str, *details: str):
        super().__init__("\n  ".join((what, *details)))


def quoted(name: object, limit: int = 120) -> str:
    """``name`` in quotes, control characters escaped and shortened to about ``limit`` characters: it may come from a hostile file.

    >>> quoted("a.weight")
    "'a.weight'"
    """
    text = str(name)
    return repr(text if len(text) <= limit else f"{text[: limit - 20]}… ({len(text)} characters)")


def printable(text: object, limit: int = 300) -> str:
    """Text from a file as a terminal may show it: control characters escaped, shortened to about ``limit`` characters.

    >>> print(printable("a" + chr(27) + "[2J"))
    a\\x1b[2J
    """
    shown = "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text)[:limit])
    return shown + "…" * (len(str(text)) > limit)
