"""A file or a directory that appears whole or not at all.

Everything is written into a sibling directory, which is renamed into place at the end, or out of which the file is. Replacing a directory
swaps the two names in one step (Linux ``renameat2``; where that is missing, the old directory is first renamed, and the next run undoes a
break in between). A killed run leaves a sibling called ``.NAME.WRITING-…`` or ``.NAME.replaced-…``, which the next run into the same
destination removes; a lock, which the kernel frees when a process dies, tells it from a run that is alive.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import secrets
import shlex
import shutil
from collections.abc import Iterator
from typing import Any, ClassVar

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Destination(abc.ABC):
    """A file or a directory to be made, or to be replaced.

    Args:
        path: of it, absolute. Its parent must exist.
        force: whether a file that is there is replaced. A directory is where :meth:`check` lets it be.
        is_directory: what it is to be.

    Raises:
        Exception: of :meth:`error`: it exists, or cannot be written.
    """

    writing: ClassVar[str]
    """In the name of the sibling."""
    run: ClassVar[str]
    """What writes, in messages: "another … into …"."""

    def __init__(self, path: pathlib.Path, force: bool, is_directory: bool):
        self.path, self.force, self.is_directory = path, force, is_directory
        parent = path.parent
        try:
            if not parent.is_dir():
                remedy = f"mkdir -p {shlex.quote(str(parent))}"
                raise self.error(f"cannot write {str(path)!r}: the directory {str(parent)!r} does not exist", remedy)
            self.check()
        except OSError as error:
            raise self._unwritable(error) from None

    @abc.abstractmethod
    def check(self) -> None:
        """Raises the error where something is there that may not be replaced."""

    @abc.abstractmethod
    def error(self, what: str, *details: str) -> Exception:
        """What is to be raised: the caller's own kind."""

    @property
    def exists(self) -> bool:
        """Whether something is there; an empty directory where a directory is to be is nothing."""
        if not self.is_directory:
            return self.path.exists()
        return self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))

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
        for file in (*directory.rglob("*"), directory):
            sync(file)
        self.check()
        if not self.is_directory:
            self._commit_file(directory / self.path.name)
        elif not self.exists:
            directory.rename(self.path)  # refuses to replace a directory that has files
        elif not exchange(directory, self.path):
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
            self.check()
            raise
        except OSError:  # a file system without links
            self.check()
            file.replace(self.path)

    def _sibling(self, what: str) -> pathlib.Path:
        return self.path.parent / f".{self.path.name}.{what}-{secrets.token_hex(4)}"

    def _make(self) -> tuple[pathlib.Path, int]:
        """A locked new directory. Another run may remove it between the two steps; then there is another try."""
        for _ in range(10):
            directory = self._sibling(self.writing)
            directory.mkdir()
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                lock = _lock(directory)
                if directory.is_dir():
                    return directory, lock
                os.close(lock)
        raise self.error(f"cannot write {str(self.path)!r}: other runs keep removing their leftovers there", "try again")

    def _remove_leftovers(self) -> None:
        for leftover in self.path.parent.glob(f".{_literal(self.path.name)}.{self.writing}-*"):
            try:
                lock = _lock(leftover)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                what = f"another {self.run} into {str(self.path)!r} is running"
                raise self.error(what, "wait for it, or choose another --dst") from None
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)
        for replaced in self.path.parent.glob(f".{_literal(self.path.name)}.replaced-*"):
            if self.path.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(self.path)
                self.check()

    def _unwritable(self, error: OSError) -> Exception:
        remedies = {
            errno.ENOSPC: "free space on the disk, or choose another --dst",
            errno.EDQUOT: "free space within your quota, or choose another --dst",
            errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another --dst",
            errno.ENOTEMPTY: f"another {self.run} finished first; add --force to replace it",
            errno.EROFS: "the file system is read-only; choose another --dst",
            errno.ENAMETOOLONG: "choose a shorter --dst",
        }
        what = f"cannot write {str(self.path)!r}: {error.strerror or error}"
        return self.error(what, remedies.get(error.errno or 0, "choose another --dst, or make its parent writable"))


def system_error(error: Any) -> OSError:
    """What the system told TensorFlow, which names it within its own text only: a full disk is one of its ResourceExhaustedError.

    Args:
        error: a ``tf.errors.OpError``.

    Returns:
        an error without ``errno`` where the text names none of the system's errors.
    """
    code = next((code for code in errno.errorcode if os.strerror(code) in error.message), 0)
    return OSError(code, os.strerror(code)) if code else OSError(f"TensorFlow says: {error.message}")


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


def exchange(first: pathlib.Path, second: pathlib.Path) -> bool:
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
