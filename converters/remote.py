"""Sources and destinations that are elsewhere: zoo entries and URLs, which are downloaded, and what TensorFlow can reach (``gs://…``)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from checkpoints import registry
from converters import checkpoint, target
from converters.errors import ConversionError, quoted

_BLOCK_BYTES = 8 << 20

Progress = Callable[[str, float], None]


@contextlib.contextmanager
def local_copy(source: str | os.PathLike[str], progress: Progress) -> Iterator[pathlib.Path]:
    """The local path of a source: its own, the downloaded file's, or that of a temporary copy.

    Raises:
        ConversionError: it cannot be downloaded or read.
    """
    name = os.fspath(source)
    scheme = name.partition("://")[0] if "://" in name else ""
    if scheme in ("http", "https"):
        yield _downloaded(lambda fetch, **how: fetch.download(name, **how), progress)
    elif scheme:
        with tempfile.TemporaryDirectory(prefix="tfmaskformer-") as folder:
            yield _copied_here(name, pathlib.Path(folder) / (name.rstrip("/").rpartition("/")[2] or "checkpoint"), progress)
    elif not os.path.lexists(name) and (entry := _entry(name)) is not None:
        yield _downloaded(lambda fetch, **how: fetch.fetch(entry, **how), progress)
    elif not os.path.lexists(name) and os.sep not in name and not pathlib.Path(name).suffix:
        try:
            registry.entry(name)
        except registry.ZooError as error:
            raise ConversionError(f"{quoted(name)} does not exist, and {error}") from None
        raise ConversionError(f"{quoted(name)} is a test model, which has no official file", f"tfmaskformer zoo synthesize {name} --dst …")
    else:
        yield pathlib.Path(name)


@contextlib.contextmanager
def upload(destination: str | os.PathLike[str], force: bool) -> Iterator[pathlib.Path]:
    """A local path to write to. Where the destination is elsewhere, what is there at the end is copied to it, the manifest last.

    Raises:
        ConversionError: the destination exists, or cannot be written.
    """
    name = os.fspath(destination)
    if "://" not in name:
        yield pathlib.Path(name)
        return
    there = _Remote(name.rstrip("/"), target.format_of(name).files)
    there.check(force)
    with tempfile.TemporaryDirectory(prefix="tfmaskformer-") as folder:
        local = pathlib.Path(folder) / name.rstrip("/").rpartition("/")[2]
        yield local
        there.check(force)
        there.put(local)


def _entry(name: str) -> registry.Entry | None:
    with contextlib.suppress(registry.ZooError):
        entry = registry.entry(name)
        return entry if entry.url else None
    return None


def _downloaded(download: Callable[..., pathlib.Path], progress: Progress) -> pathlib.Path:
    from checkpoints import fetch

    def told(done_bytes: int, total_bytes: int | None) -> None:
        progress("downloading", done_bytes / total_bytes if total_bytes else 0)

    try:
        return download(fetch, progress=told)
    except registry.ZooError as error:
        failure = ConversionError(str(error))
        failure.exit_code = getattr(error, "exit_code", failure.exit_code)
        raise failure from None


def _copied_here(name: str, local: pathlib.Path, progress: Progress) -> pathlib.Path:
    gfile, failed = _gfile()
    try:
        if not gfile.isdir(name):
            _copy(name, local, lambda share: progress("copying", share))
            return local
        local.mkdir()
        for file in gfile.listdir(name):
            if not file.endswith("/"):
                _copy(f"{name.rstrip('/')}/{file}", local / file, lambda share: progress("copying", share))
        return local
    except failed as error:
        if shutil.disk_usage(local.parent).free < _BLOCK_BYTES:
            what = f"no room for a copy of {quoted(name)} in '{local.parent.parent}'"
            raise ConversionError(what, "make room there, or set $TMPDIR to a folder on a larger disk") from None
        raise ConversionError(f"cannot read {quoted(name)}: {_said(error)}", "is the name right, and may you read it?") from None


def _copy(source: str, destination: str | pathlib.Path, progress: Callable[[float], None] = lambda share: None) -> None:
    gfile, _ = _gfile()
    total_bytes, done_bytes = max(gfile.stat(str(source)).length, 1), 0
    with gfile.GFile(str(source), "rb") as reader, gfile.GFile(str(destination), "wb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            writer.write(block)
            done_bytes += len(block)
            progress(done_bytes / total_bytes)


def _digest(name: str) -> str:
    gfile, _ = _gfile()
    digest = hashlib.sha256()
    with gfile.GFile(name, "rb") as reader:
        while block := reader.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class _Remote:
    """A file or directory that TensorFlow can reach. There is no rename, so a directory is whole when its manifest is there."""

    def __init__(self, name: str, files: tuple[str, ...]):
        self.name = name
        self.files = files

    def check(self, force: bool) -> None:
        """Raises where something is there that must not be replaced."""
        gfile, failed = _gfile()
        try:
            exists = gfile.exists(self.name)
            names = gfile.listdir(self.name) if exists and gfile.isdir(self.name) else []
        except failed as error:
            raise self._unwritable(error) from None
        foreign = [file for file in names if file not in self.files]
        if foreign:
            raise ConversionError(
                f"{quoted(self.name)} exists and holds other files than a converted checkpoint: {', '.join(map(quoted, foreign[:3]))}",
                "choose another --dst; --force replaces only what 'convert' wrote",
            )
        if (names or (exists and not self.files)) and not force:
            raise ConversionError(f"{quoted(self.name)} exists", "choose another --dst, or add --force to replace it")
        if exists and not self.files and not self._is_own():
            raise ConversionError(
                f"{quoted(self.name)} exists and was not written by 'convert'",
                "choose another --dst; --force replaces only what 'convert' wrote",
            )

    def _is_own(self) -> bool:
        with tempfile.NamedTemporaryFile(prefix="tfmaskformer-") as head:
            gfile, _ = _gfile()
            with gfile.GFile(self.name, "rb") as file:
                head.write(file.read(target.HEAD_BYTES))
            head.flush()
            return target.is_own(pathlib.Path(head.name))

    def put(self, local: pathlib.Path) -> None:
        """Copies a file, or the files of a directory: those that make it a checkpoint go first and come last."""
        gfile, failed = _gfile()
        last = (checkpoint.CONFIG_FILE, checkpoint.MANIFEST_FILE)
        try:
            if not self.files:
                self._put_file(local, self.name)
                return
            gfile.makedirs(self.name)
            for file in (checkpoint.MANIFEST_FILE, checkpoint.CONFIG_FILE):
                if gfile.exists(f"{self.name}/{file}"):
                    gfile.remove(f"{self.name}/{file}")
            for file in (*(file for file in self.files if file not in last), *last):
                self._put_file(local / file, f"{self.name}/{file}")
        except failed as error:
            raise self._unwritable(error) from None

    def _put_file(self, local: pathlib.Path, there: str) -> None:
        """Copies a file, and reads it again."""
        gfile, _ = _gfile()
        if gfile.exists(there):
            gfile.remove(there)
        _copy(str(local), there)
        if _digest(str(local)) != _digest(there):
            raise ConversionError(f"{quoted(there)} reads back differently than it was written", "write to a local path, and copy that")

    def _unwritable(self, error: Exception) -> ConversionError:
        return ConversionError(f"cannot write {quoted(self.name)}: {_said(error)}", "choose another --dst, or ask for access to it")


def _gfile() -> tuple[Any, tuple[type[Exception], ...]]:
    """TensorFlow's file systems, and what they raise."""
    import tensorflow as tf

    return tf.io.gfile, (tf.errors.OpError, OSError)


def _said(error: Exception) -> str:
    return (str(getattr(error, "message", error)) or type(error).__name__).splitlines()[0]
