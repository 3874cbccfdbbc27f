"""Official checkpoints, and files at any http(s) address, into a cache that a file enters whole, or not at all.

A download is written to ``NAME.part``, with ``NAME.part.json`` telling what it is a part of. One that broke off goes on where it stopped
(HTTP ``Range``), unless the file changed on the server in between (``If-Range``). ``NAME.part`` is locked, so two runs do not mix; it gets
its name in one step. ``NAME.json`` keeps the SHA-256 of that first download, and whenever the file is asked for again it is compared.
How, and what is refused: docs/checkpoints.md. Why no library: docs/decisions/0012-downloads.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import http.client
import json
import os
import pathlib
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import BinaryIO, NoReturn

from checkpoints import registry

_ATTEMPTS = 5
_BACKOFF_S = 1.0  # before the second attempt; doubled before each further one
_TIMEOUT_S = 30.0  # to connect, and without a byte
_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 64
_ZIP_END_BYTES = 22 + 65535  # the record that ends a zip archive, and the longest comment behind it

# How checkpoints begin; the first that fits. torch.save before 1.6 writes several pickles, then raw numbers.
_KINDS = {
    "safetensors": re.compile(rb".{6}\x00\x00\{", re.DOTALL),
    "zip": re.compile(rb"PK\x03\x04"),
    "HDF5": re.compile(rb"\x89HDF\r\n\x1a\n"),
    "torch": re.compile(re.escape(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")),
    "pickle": re.compile(rb"\x80[\x02-\x05]|\(d|\}|c[\w.]+\n\w+\n"),
}

Progress = Callable[[int, int | None], None]


class FetchError(registry.ZooError):
    """A name, an address, a content or a cache that cannot be used.

    The first line says what and where; ``details`` say expected and got, and end with the next step.
    """

    exit_code = 2

    def __init__(self, what: str, *details: str):
        super().__init__("\n  ".join((what, *details)))


class NetworkError(FetchError):
    """The download could not run, or did not come to its end; what has arrived is kept for the next run."""

    exit_code = 3


def fetch(
    entry: registry.Entry, *, cache: pathlib.Path | None = None, progress: Progress = lambda done, total: None, force: bool = False
) -> pathlib.Path:
    """The file of an official checkpoint: from the cache if it is there and unchanged, else downloaded.

    Says on stderr which licence the weights have, and if the file's MD5 does not begin with ``entry.file_hash``.

    Args:
        entry: with a ``url``, so none of the test models.
        cache: directory to keep files in; default: :func:`cache_directory`.
        progress: called with the bytes that are there, and the file's size in bytes or None where the server does not tell it.
        force: downloads again what is in the cache, from the first byte.

    Raises:
        FetchError: the file has another content than it should, or cannot be written; NetworkError: it cannot be had now.
    """
    if not entry.url:
        raise FetchError(f"'{entry.name}' is a test model: it has no official file", "all that can be downloaded: tfmaskformer zoo list")
    _say(f"{entry.name}: its weights have a licence of their own, {entry.weights_license} (not for commercial use)")
    path, record = _get(entry.url, cache, progress, force, f"tfmaskformer zoo fetch {entry.name} --force", entry.sha256)
    if not record.md5.startswith(entry.file_hash):
        _say(
            f"warning: the MD5 of '{path}' is {record.md5}; by its name it begins with {entry.file_hash}\n"
            f"  the published file may have been replaced; its SHA-256 is {record.sha256}"
        )
    return path


def download(
    url: str, *, cache: pathlib.Path | None = None, progress: Progress = lambda done, total: None, force: bool = False
) -> pathlib.Path:
    """The checkpoint at any http(s) address, in the same way as :func:`fetch`.

    Raises:
        FetchError: the address or the file's content is no good, or the cache cannot be written; NetworkError: it cannot be had now.
    """
    return _get(url, cache, progress, force, "delete it")[0]


def cache_directory() -> pathlib.Path:
    """``$TFMASKFORMER_CACHE``, else ``$XDG_CACHE_HOME/tfmaskformer``, else ``~/.cache/tfmaskformer``."""
    if own := os.environ.get("TFMASKFORMER_CACHE"):
        return pathlib.Path(own).expanduser()
    shared = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else pathlib.Path.home() / ".cache") / "tfmaskformer"


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a file is: where it came from, the server's marks of its version ("" if none), and, once it is whole, its hashes."""

    url: str
    etag: str
    last_modified: str
    size_bytes: int | None
    sha256: str = ""
    md5: str = ""

    @property
    def validator(self) -> str:
        """What ``If-Range`` takes, or "": a weak ETag is none."""
        return self.last_modified if self.etag.startswith("W/") else self.etag or self.last_modified


def _get(
    url: str, cache: pathlib.Path | None, progress: Progress, force: bool, remedy: str, sha256: str = ""
) -> tuple[pathlib.Path, _Record]:
    """``remedy``: how to get a file anew that changed in the cache. ``sha256``: which it must have, "" if that is not known."""
    url = _checked(url)
    path = _place(url, cache or cache_directory())
    try:
        if not force:  # needs no lock, so that a cache may be read-only
            with contextlib.suppress(_ChangedError):
                return path, _cached(path, sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part(path) as part:
            if path.exists() and not force:  # another run finished it, or it was changed
                return path, _cached(path, sha256)
            if force:
                part.restart()
            _transfer(url, part, progress)
            if not part.is_whole():
                part.refuse(f"{_shown(url)} is no whole checkpoint: it ends in the middle", "it may have been cut off on the server")
            if sha256 and part.sha256.hexdigest() != sha256:
                part.refuse(f"{_shown(url)} is another file than it was", f"SHA-256 expected {sha256}, got {part.sha256.hexdigest()}")
            return path, part.commit()
    except _ChangedError as changed:
        raise FetchError(f"'{path}' is not what was downloaded", str(changed), f"to have it anew: {remedy}") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        next_step = "make room and run the same again, it goes on from here" if full else "choose another cache, with $TFMASKFORMER_CACHE"
        raise FetchError(f"cannot keep '{path}': {error.strerror or error}", next_step) from None


def _checked(url: str) -> str:
    """``url`` in ASCII and without a fragment; FetchError if it is none of http or https."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected http://… or https://…")
        if "@" in parts.netloc:
            raise ValueError("it holds a user name or password, which would be kept in the cache")
        _ = parts.port
        host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
    except ValueError as error:
        raise FetchError(f"cannot use the address {_shown(url)!r}: {error}") from None
    path, query = (urllib.parse.quote(part, safe="%/:=&?~+!$,;'@()*[]") for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def _shown(url: str) -> str:
    """``url`` as it is told and kept: without its query, which may be a signature that opens the file to whoever reads it.

    >>> _shown("https://example.org/model_final.pkl?token=abc")
    'https://example.org/model_final.pkl?…'
    """
    address, mark, _ = url.partition("?")
    return f"{address}?…" if mark else address


def _place(url: str, cache: pathlib.Path) -> pathlib.Path:
    """Each address has a directory of its own, which begins with the name of the file's folder.

    >>> _place("https://example.org/maskformer_R50/model_final_d8dbeb.pkl", pathlib.Path("cache")).as_posix()
    'cache/maskformer_R50-cbb49235f3c4/model_final_d8dbeb.pkl'
    """
    parts = urllib.parse.urlsplit(url)
    names = [str(parts.hostname), *filter(None, re.split(r"[/\\]", urllib.parse.unquote(parts.path)))]
    safe = [re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:].lstrip(".-") or "file" for name in names]
    folder, name = (safe[-2], safe[-1]) if len(safe) > 1 else (safe[0], "file")
    return cache / f"{folder}-{hashlib.sha256(url.encode()).hexdigest()[:12]}" / name


def _beside(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(path.name + suffix)


def _read(path: pathlib.Path) -> _Record | None:
    try:
        return _Record(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # none, or a killed run's half
        return None


class _ChangedError(Exception):
    """A file in the cache that is not as it was downloaded, or none."""


def _cached(path: pathlib.Path, sha256: str) -> _Record:
    """The record of a file that is as it was downloaded; else _ChangedError."""
    record = _read(_beside(path, ".json"))
    expected = sha256 or (record.sha256 if record else "")
    got = hashlib.sha256()
    if path.exists():
        with path.open("rb") as file:
            _digest(file, got)
    if record is None or got.hexdigest() != expected:
        raise _ChangedError(f"SHA-256 expected {expected or 'unknown'}, got {got.hexdigest()}")
    return record


def _digest(file: BinaryIO, *digests: hashlib._Hash) -> None:
    while block := file.read(_BLOCK_BYTES):
        for digest in digests:
            digest.update(block)


class _Part:
    """``NAME.part``, open and locked, and ``NAME.part.json``, its record. ``size_bytes`` and the hashes are of what is there.

    What is found there is gone on with if the record can tell whether the server still has the same file.
    """

    def __init__(self, path: pathlib.Path, file: BinaryIO):
        self._path = path
        self._record_path = _beside(path, ".part.json")
        self._file = file
        self.record = _read(self._record_path)
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        file.seek(0)
        _digest(file, self.sha256, self.md5)
        self.size_bytes = file.tell()
        if self.record and self.record.sha256 and not self.size_bytes:  # killed between the last two lines of commit
            os.replace(self._record_path, _beside(path, ".json"))
        if not self.can_go_on:
            self.restart()

    @property
    def can_go_on(self) -> bool:
        """Whether there are bytes, and the server can be asked for the rest of the same file."""
        return bool(self.size_bytes and self.record and self.record.validator)

    def restart(self, record: _Record | None = None) -> None:
        """Drops all that is there; the record always comes before the bytes it tells of, and goes before them."""
        self._record_path.unlink(missing_ok=True)
        self._file.truncate(0)
        self.record, self.size_bytes = record, 0
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        if record:
            self._write_record(record)

    def append(self, block: bytes) -> None:
        self._file.write(block)
        self._file.flush()
        self.sha256.update(block)
        self.md5.update(block)
        self.size_bytes += len(block)

    def refuse(self, what: str, *details: str) -> NoReturn:
        self.restart()
        raise FetchError(what, *details, "nothing of it was kept")

    def is_whole(self) -> bool:
        """Whether it ends as it began: a pickle with its STOP, a zip archive with its directory. Others are not judged."""
        self._file.seek(0)
        kind = _kind(self._file.read(_HEAD_BYTES))
        self._file.seek(-min(self.size_bytes, _ZIP_END_BYTES), os.SEEK_END)
        tail = self._file.read()
        return tail.endswith(b".") if kind == "pickle" else b"PK\x05\x06" in tail if kind == "zip" else True

    def commit(self) -> _Record:
        """Gives the file its name. What is on the disk after a kill at any point is either a part or the file."""
        assert self.record
        os.fsync(self._file.fileno())
        record = dataclasses.replace(self.record, size_bytes=self.size_bytes, sha256=self.sha256.hexdigest(), md5=self.md5.hexdigest())
        self._write_record(record)
        os.replace(_beside(self._path, ".part"), self._path)
        os.replace(self._record_path, _beside(self._path, ".json"))
        return record

    def _write_record(self, record: _Record) -> None:
        with self._record_path.open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(record), file, indent=2)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _part(path: pathlib.Path) -> Iterator[_Part]:
    """The part of ``path``, locked; waits while another run has it. The kernel frees the lock of a process that dies."""
    place = _beside(path, ".part")

    def is_there(file: BinaryIO) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), place.stat())
        return False

    while True:
        with place.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"another run is downloading '{path.name}'; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not is_there(file):  # the other run finished: this is the file itself now
                continue
            try:
                yield _Part(path, file)
            finally:
                if is_there(file) and not os.fstat(file.fileno()).st_size:
                    _beside(path, ".part.json").unlink(missing_ok=True)
                    place.unlink()
            return


class _BrokenError(Exception):
    """An attempt that did not come to its end. ``anew``: what is there cannot be gone on with. ``unreachable``: there was no server."""

    def __init__(self, what: str, anew: bool = False, unreachable: bool = False):
        super().__init__(what)
        self.anew = anew
        self.unreachable = unreachable


def _transfer(url: str, part: _Part, progress: Progress) -> None:
    """Fills the part, in several attempts if need be."""
    for attempt in range(_ATTEMPTS):
        try:
            if not part.record or part.size_bytes != part.record.size_bytes:
                _attempt(url, part, progress)
            return
        except _BrokenError as error:
            if error.anew or not part.can_go_on:
                part.restart()
            hopeless = error.unreachable and attempt == 0
            if hopeless or attempt == _ATTEMPTS - 1:
                kept = f"{part.size_bytes:,} bytes are kept; " if part.size_bytes else ""
                offline = "without a network, only what is in the cache can be had; behind a proxy, set $https_proxy; " if hopeless else ""
                raise NetworkError(f"cannot download {_shown(url)}: {error}", f"{kept}{offline}run the same again later") from None
            pause_s = _BACKOFF_S * 2**attempt
            _say(f"{error}; attempt {attempt + 2} of {_ATTEMPTS} in {pause_s:.0f} s")
            time.sleep(pause_s)


def _attempt(url: str, part: _Part, progress: Progress) -> None:
    """One request, for all that is not there yet."""
    headers = {"User-Agent": "tfmaskformer"}
    if part.record:
        headers |= {"Range": f"bytes={part.size_bytes}-", "If-Range": part.record.validator}
    with _open(url, headers) as response:
        # http.client stops at Content-Length, so that a server which sends more would go unseen.
        told_bytes, response.length = response.length, None
        etag, last_modified = (_printable(response.headers.get(name, "")) for name in ("ETag", "Last-Modified"))
        offered = _Record(_shown(url), etag, last_modified, told_bytes)
        blocks = _blocks(response)
        if response.status == http.HTTPStatus.PARTIAL_CONTENT and part.record:
            part.record = dataclasses.replace(part.record, size_bytes=_total_bytes(response, offered, part))
        elif response.status == http.HTTPStatus.OK:
            head = b""
            while len(head) < _HEAD_BYTES and (block := next(blocks, b"")):
                head += block
            if len(head) < min(_HEAD_BYTES, told_bytes or 0):
                raise _BrokenError(f"the connection broke off after {len(head)} of {told_bytes:,} bytes")
            _check_head(url, head)
            if part.size_bytes:
                _say("from the first byte again: the file changed on the server, or the server cannot go on in the middle")
            part.restart(offered)
            part.append(head)
        else:
            raise NetworkError(f"cannot download {_shown(url)}: the server gave an answer that was not asked for, HTTP {response.status}")
        total_bytes = part.record.size_bytes if part.record else None
        progress(part.size_bytes, total_bytes)
        try:
            for block in blocks:
                part.append(block)
                progress(part.size_bytes, total_bytes)
                if total_bytes is not None and part.size_bytes > total_bytes:
                    break
        except _BrokenError:
            if part.size_bytes != total_bytes:
                raise
    if total_bytes is not None and part.size_bytes > total_bytes:
        part.refuse(f"cannot use {_shown(url)}: the server sends more than the {total_bytes:,} bytes it told")
    if part.size_bytes < total_bytes if total_bytes is not None else not part.is_whole():
        raise _BrokenError(f"the connection broke off after {part.size_bytes:,} of {total_bytes or 'unknown'} bytes")


def _total_bytes(response: http.client.HTTPResponse, offered: _Record, part: _Part) -> int | None:
    """The whole file's size, of an answer that goes on where the part ends, with the same version; else _BrokenError."""
    assert part.record
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not found or int(found[1]) != part.size_bytes:
        answer = _printable(response.headers.get("Content-Range"))
        raise _BrokenError(f"asked for the bytes from {part.size_bytes:,} on, the server sends '{answer}'", anew=True)
    known, total = part.record.size_bytes, None if found[2] == "*" else int(found[2])
    versions = [(offered.etag, part.record.etag), (offered.last_modified, part.record.last_modified), (total, known)]
    if any(now and now != then for now, then in versions if then):
        raise _BrokenError("the file changed on the server", anew=True)
    return total or known


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while block := response.read1(_BLOCK_BYTES):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(f"the connection broke off ({_reason(error)})") from None


def _kind(head: bytes) -> str:
    """The kind of checkpoint that begins like this, or ""."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.match(head)), "")


def _check_head(url: str, head: bytes) -> None:
    """FetchError if a file that begins like this is no checkpoint."""
    if _kind(head):
        return
    if not head:
        found = "an empty file"
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        found = "a web page: often an error message in place of the file"
    else:
        found = f"something that begins with {head[:16]!r}"
    raise FetchError(
        f"{_shown(url)} is no checkpoint but {found}", "expected a .pkl, .pth, .safetensors or .h5 file; nothing of it was kept"
    )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https alone, and never from https to http."""

    def http_error_302(self, req, fp, code, msg, headers):  # urllib's names
        fp.close()  # its page is not read, however long
        target = urllib.parse.urljoin(req.full_url, headers.get("Location", ""))
        schemes = [urllib.parse.urlsplit(url).scheme for url in (req.full_url, target)]
        if schemes[1] not in ("http", "https") or schemes == ["https", "http"]:
            what = f"cannot download {_shown(req.full_url)}: it leads to {_printable(_shown(target))}"
            raise FetchError(what, f"a redirect from {schemes[0]} to {schemes[1]} is not followed")
        return super().http_error_302(req, fp, 307 if code == 308 else code, msg, headers)  # Python 3.10 does not know 308

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # not build_opener, which also knows file: and ftp:
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """The answer to a GET: a success. Everything else is an error that says what to do."""
    try:
        return _opener().open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        raise _refusal(url, error) from None
    except http.client.InvalidURL as error:
        raise FetchError(f"cannot use the address {_shown(url)!r}: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise NetworkError(
                f"cannot download {_shown(url)}: the server's certificate is not valid ({reason.verify_message})",
                "check the machine's date; for a proxy with a certificate of its own, set $SSL_CERT_FILE",
            ) from None
        unreachable = isinstance(reason, socket.gaierror | ConnectionRefusedError) or (
            isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
        )
        host = urllib.parse.urlsplit(url).netloc
        raise _BrokenError(f"no answer from {host} ({_reason(reason)})", unreachable=unreachable) from None


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    answer = f"HTTP {error.code} {_printable(error.reason)}"
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return _BrokenError(f"the server cannot go on in the middle ({answer})", anew=True)
    if error.code in (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS) or error.code >= 500:
        return _BrokenError(f"the server fails ({answer})")
    if error.code in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
        return FetchError(f"{_shown(url)} is not there ({answer})", "check the address")
    return NetworkError(f"cannot download {_shown(url)}: {answer}", "the server, or a proxy before it, does not give the file")


def _reason(error: object) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return _printable(text or error) or type(error).__name__


def _printable(text: object) -> str:
    """``text`` in one line, without what a server could do to a terminal."""
    return "".join(character if character.isprintable() else " " for character in str(text))[:200].strip()


def _say(text: str) -> None:
    """A line on stderr; on a terminal, in place of a progress bar that is there."""
    print(("\r\x1b[K" if sys.stderr.isatty() else "") + text, file=sys.stderr)
