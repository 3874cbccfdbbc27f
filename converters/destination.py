"""A file or a directory that appears whole or not at all.

Everything is written into a sibling directory, which is renamed into place at the end, or out of which the file is. Replacing a directory
swaps the two names in one step (Linux ``renameat2``; where that is missing, the old directory is first renamed, and the next run undoes a
break in between). A killed run leaves a sibling called ``.NAME.converting-…`` or ``.NAME.replaced-…``, which the next run into the same
destination removes; a lock, which the kernel frees when a process dies, tells it from a run that is alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator

from converters.errors import ConversionError, quoted

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Destination:
    """A file or a directory to be made, or to be replaced.

    Args:
        path: of it. Its parent must exist.
        force: whether what ``convert`` wrote there before is replaced; other things never are.
        own_files: names that such a directory has; ``own_files[0]`` tells it from others. Empty for a file.
        is_own: whether the file that is there is one that ``convert`` may have written.

    Raises:
        ConversionError: it exists, or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        force: bool,
        own_files: tuple[str, ...],
        is_own: Callable[[pathlib.Path], bool] = lambda path: False,
    ):
        self.path = pathlib.Path(os.path.abspath(path))
        self.force = force
        self.own_files = own_files
        self._is_own = is_own
        parent = self.path.parent
        try:
            if not parent.is_dir():
                remedy = f"mkdir -p {shlex.quote(str(parent))}"
                raise ConversionError(f"cannot write {quoted(path)}: the directory {quoted(parent)} does not exist", remedy)
            if self.path.is_symlink():
                what = "directory" if own_files else "file"
                raise ConversionError(f"cannot write {quoted(path)}: it is a symbolic link", f"name the {what} itself")
            self._check_existing()
        except OSError as error:
            raise self._unwritable(error) from None

    @contextlib.contextmanager
    def staging(self) -> Iterator[pathlib.Path]:
        """A new directory beside the destination. It is removed at the end unless :meth:`commit` moved it into place.

        A file is to be written there under the destination's name.
        """
        try:
            self._remove_leftovers()
            directory, lock = self._make()
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            yield directory
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)

    def commit(self, directory: pathlib.Path) -> None:
        """Moves what was staged into place; after a crash of the machine too, there is the old state or the new one."""
        for file in (*directory.iterdir(), directory):
            sync(file)
        self._check_existing()
        if not self.own_files:
            self._commit_file(directory / self.path.name)
        elif not self._exists():
            directory.rename(self.path)  # refuses to replace a directory that has files
        elif not _exchange(directory, self.path):
            old = self._sibling("replaced")
            self.path.rename(old)
            directory.rename(self.path)
            shutil.rmtree(old)
        sync(self.path.parent)

    def _commit_file(self, file: pathlib.Path) -> None:
        if self.force:
            file.replace(self.path)
            return
        try:
            os.link(file, self.path)  # unlike a rename, it refuses to replace
        except FileExistsError:
            self._check_existing()
            raise
        except OSError:  # a file system without links
            self._check_existing()
            file.replace(self.path)

    def _exists(self) -> bool:
        if not self.own_files:
            return self.path.exists()
        return self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))

    def _check_existing(self) -> None:
        if not self._exists():
            return
        name = quoted(self.path)
        if not self.own_files:
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
            foreign = [name for name in names if name not in self.own_files]
            if self.own_files[0] not in names or foreign:
                raise ConversionError(
                    f"{name} exists and holds other files than a converted checkpoint: {', '.join(map(quoted, (foreign or names)[:3]))}",
                    "choose another --dst; --force replaces only what 'convert' wrote",
                )
        if not self.force:
            raise ConversionError(f"{name} exists", "choose another --dst, or add --force to replace it")

    def _sibling(self, what: str) -> pathlib.Path:
        return self.path.parent / f".{self.path.name}.{what}-{secrets.token_hex(4)}"

    def _make(self) -> tuple[pathlib.Path, int]:
        """A locked new directory. Another run may remove it between the two steps; then there is another try."""
        for _ in range(10):
            directory = self._sibling("converting")
            directory.mkdir()
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                lock = _lock(directory)
                if directory.is_dir():
                    return directory, lock
                os.close(lock)
        raise ConversionError(f"cannot write {quoted(self.path)}: other runs keep removing their leftovers there", "try again")

    def _remove_leftovers(self) -> None:
        for leftover in self.path.parent.glob(f".{_literal(self.path.name)}.converting-*"):
            try:
                lock = _lock(leftover)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                raise ConversionError(
                    f"another conversion into {quoted(self.path)} is running", "wait for it, or choose another --dst"
                ) from None
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)
        for replaced in self.path.parent.glob(f".{_literal(self.path.name)}.replaced-*"):
            if self.path.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(self.path)
                self._check_existing()

    def _unwritable(self, error: OSError) -> ConversionError:
        remedies = {
            errno.ENOSPC: "free space on the disk, or choose another --dst",
            errno.EDQUOT: "free space within your quota, or choose another --dst",
            errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another --dst",
            errno.ENOTEMPTY: "another conversion finished first; add --force to replace it",
            errno.EROFS: "the file system is read-only; choose another --dst",
            errno.ENAMETOOLONG: "choose a shorter --dst",
        }
        what = f"cannot write {quoted(self.path)}: {error.strerror or error}"
        return ConversionError(what, remedies.get(error.errno or 0, "choose another --dst, or make its parent writable"))


def _lock(directory: pathlib.Path) -> int:
    """A file descriptor that holds the directory's lock; BlockingIOError where another process has it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sync(path: pathlib.Path) -> None:
    """Waits until the disk has the file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Swaps two names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _literal(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
