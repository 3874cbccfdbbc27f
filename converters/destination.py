"""What ``convert`` makes: a file or a directory that appears whole or not at all (:mod:`tfmaskformer.destination`)."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

from converters.errors import ConversionError, quoted
from tfmaskformer import destination


class Destination(destination.Destination):
    """A file or a directory to be made, or to be replaced.

    Args:
        path: of it. Its parent must exist.
        force: whether what ``convert`` wrote there before is replaced; other things never are.
        own_files: names that such a directory has; ``own_files[0]`` tells it from others. Empty for a file.
        is_own: whether the file that is there is one that ``convert`` may have written.

    Raises:
        ConversionError: it exists, or cannot be written.
    """

    writing, run = "converting", "conversion"

    def __init__(
        self,
        path: str | os.PathLike[str],
        force: bool,
        own_files: tuple[str, ...],
        is_own: Callable[[pathlib.Path], bool] = lambda path: False,
    ):
        self._own_files, self._is_own = own_files, is_own
        super().__init__(pathlib.Path(os.path.abspath(path)), force, bool(own_files))

    def error(self, what: str, *details: str) -> ConversionError:
        return ConversionError(what, *details)

    def check(self) -> None:
        name = quoted(self.path)
        if self.path.is_symlink():
            what = "directory" if self.is_directory else "file"
            raise ConversionError(f"cannot write {name}: it is a symbolic link", f"name the {what} itself")
        if not self.exists:
            return
        if not self.is_directory:
            if self.path.is_dir():
                raise ConversionError(f"{name} is a directory, and the name asks for a file", "choose another --dst")
            if self.force and not self._is_own(self.path):
                raise ConversionError(
                    f"{name} exists and was not written by 'convert'",
                    "choose another --dst; --force replaces only what 'convert' wrote",
                )
        elif not self.path.is_dir():
            raise ConversionError(f"{name} exists and is no directory", "choose another --dst")
        else:
            names = sorted(os.listdir(self.path))
            foreign = [name for name in names if name not in self._own_files]
            if self._own_files[0] not in names or foreign:
                raise ConversionError(
                    f"{name} exists and holds other files than a converted checkpoint: {', '.join(map(quoted, (foreign or names)[:3]))}",
                    "choose another --dst; --force replaces only what 'convert' wrote",
                )
        if not self.force:
            raise ConversionError(f"{name} exists", "choose another --dst, or add --force to replace it")
