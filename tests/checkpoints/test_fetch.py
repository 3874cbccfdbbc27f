"""Downloads: whatever the server, the network or the disk does, a file in the cache is the whole file, and what went wrong is said."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

import numpy as np
import pytest

from checkpoints import cli, fetch, registry
from tests.checkpoints.http_server import Answer, serve

ROOT = pathlib.Path(__file__).parents[2]
BODY = pickle.dumps({"model": {"a.weight": np.arange(50_000, dtype=np.float32)}}, protocol=4)
OTHER = pickle.dumps({"model": {"a.weight": -np.arange(40_000, dtype=np.float32)}}, protocol=4)
HALF = len(BODY) // 2


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """An empty cache, no proxy, and no patience."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TFMASKFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_BACKOFF_S", 0.0)
    monkeypatch.setattr(fetch, "_TIMEOUT_S", 10.0)


@pytest.fixture
def server():
    with serve() as running:
        yield running


def files(folder: pathlib.Path) -> list[str]:
    """Names of all files, without their place."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def get(server, **how) -> pathlib.Path:
    return fetch.download(f"{server.url}/zoo/model.pkl", **how)


def failure(server, kind=fetch.FetchError, **how) -> str:
    with pytest.raises(fetch.FetchError) as raised:
        get(server, **how)
    assert type(raised.value) is kind, raised.value
    return str(raised.value)


def assert_whole(path: pathlib.Path, body: bytes = BODY) -> None:
    assert path.read_bytes() == body
    assert files(path.parent) == [path.name, f"{path.name}.json"]
    record = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert record["sha256"] == hashlib.sha256(body).hexdigest()
    assert record["md5"] == hashlib.md5(body).hexdigest()
    assert record["size_bytes"] == len(body)


def test_a_download_and_the_cache(server, tmp_path):
    server.answers = [Answer(BODY, last_modified="Sun, 22 Nov 2026 10:00:00 GMT")]
    told = []
    path = get(server, progress=lambda done, total: told.append((done, total)))
    assert_whole(path)
    assert path.is_relative_to(tmp_path / "cache")
    assert told == sorted(told)
    assert told[-1] == (len(BODY), len(BODY))
    assert json.loads(path.with_name("model.pkl.json").read_text())["url"] == f"{server.url}/zoo/model.pkl"
    assert get(server) == path
    assert len(server.requests) == 1
    assert_whole(get(server, cache=tmp_path / "another"))
    assert (tmp_path / "another").is_dir()


@pytest.mark.parametrize("answer", [Answer(told=None), Answer(chunked=True)], ids=["until closed", "chunked"])
def test_a_server_that_tells_no_length(server, answer):
    server.answers = [dataclasses.replace(answer, body=BODY)]
    totals = set()
    assert_whole(get(server, progress=lambda done, total: totals.add(total)))
    assert totals == {None}


@pytest.mark.parametrize("answer", [Answer(), Answer(told=None), Answer(chunked=True)], ids=["length", "until closed", "chunked"])
def test_a_break_is_gone_on_with(server, answer, capsys):
    answer = dataclasses.replace(answer, body=BODY)
    server.answers = [dataclasses.replace(answer, stop_after=HALF), dataclasses.replace(answer, stop_after=1000), answer]
    assert_whole(get(server))
    assert server.ranges() == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]
    assert [headers["If-Range"] for headers in server.requests] == [None, '"1"', '"1"']
    said = capsys.readouterr().err
    assert "broke off" in said
    assert "attempt 3 of 5" in said


@pytest.mark.parametrize("stop_after", [0, 3])
def test_a_break_within_the_first_bytes(server, stop_after):
    server.answers = [Answer(BODY, stop_after=stop_after), Answer(BODY)]
    assert_whole(get(server))
    assert server.ranges() == [None, None]


def test_breaks_without_end_keep_the_part_for_the_next_run(server):
    server.answers = [Answer(BODY, stop_after=HALF), Answer(BODY, stop_after=0)]
    message = failure(server, fetch.NetworkError)
    assert f"broke off after {HALF:,} of {len(BODY)} bytes" in message
    assert f"{HALF:,} bytes are kept" in message
    assert len(server.requests) == 5
    server.requests.clear()
    server.answers = [Answer(BODY)]
    told = []
    assert_whole(get(server, progress=lambda done, total: told.append(done)))
    assert server.ranges() == [f"bytes={HALF}-"]
    assert told[0] == HALF


def test_waiting_grows(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(fetch, "_BACKOFF_S", 1.0)
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.answers = [Answer(status=503)]
    assert "HTTP 503" in failure(server, fetch.NetworkError)
    assert pauses == [1, 2, 4, 8]


def leave_a_part(server, **answer) -> None:
    server.answers = [Answer(BODY, stop_after=HALF, **answer), Answer(status=500)]
    failure(server, fetch.NetworkError)
    server.requests.clear()


def test_a_file_that_changed_between_two_runs(server, capsys):
    leave_a_part(server)
    server.answers = [Answer(OTHER, etag='"2"')]
    assert_whole(get(server), OTHER)
    assert server.ranges() == [f"bytes={HALF}-"]
    assert "from the first byte again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer",
    [
        Answer(OTHER, etag='"2"', if_range=False),
        Answer(OTHER, etag="", last_modified="now", if_range=False),
        Answer(BODY + b"..", if_range=False),
    ],
    ids=["etag", "date", "size"],
)
def test_a_file_that_changed_on_a_server_without_if_range(server, answer):
    leave_a_part(server, last_modified="then")
    server.answers = [answer]
    assert_whole(get(server), answer.body)
    assert server.ranges() == [f"bytes={HALF}-", None]


def test_a_server_without_ranges(server):
    leave_a_part(server)
    server.answers = [Answer(BODY, ranges=False)]
    assert_whole(get(server))
    assert server.ranges() == [f"bytes={HALF}-"]


@pytest.mark.parametrize(
    "content_range", [f"bytes 0-{len(BODY) - 1}/{len(BODY)}", f"bytes {HALF}-{len(BODY)}/{len(BODY) + 1}", "bytes", "\x1b[2Jbytes */*"]
)
def test_a_wrong_content_range(server, content_range, capsys):
    leave_a_part(server)
    server.answers = [Answer(BODY, content_range=content_range), Answer(BODY)]
    assert_whole(get(server))
    assert server.ranges() == [f"bytes={HALF}-", None]
    assert "\x1b" not in capsys.readouterr().err


def test_an_unsatisfiable_range(server):
    leave_a_part(server)
    server.answers = [Answer(BODY[: HALF - 10] + b".", if_range=False)]
    assert_whole(get(server), BODY[: HALF - 10] + b".")
    assert server.ranges() == [f"bytes={HALF}-", None]


def test_a_weak_etag_is_no_validator(server):
    leave_a_part(server, etag='W/"1"', last_modified="then")
    server.answers = [Answer(BODY, etag='W/"1"', last_modified="then")]
    assert_whole(get(server))
    assert server.requests[0]["If-Range"] == "then"


def test_without_a_validator_nothing_is_gone_on_with(server):
    server.answers = [Answer(BODY, etag="", stop_after=HALF)]
    assert "kept" not in failure(server, fetch.NetworkError)
    assert files(fetch.cache_directory()) == []
    server.answers = [Answer(BODY, etag="", stop_after=HALF), Answer(BODY, etag="")]
    assert_whole(get(server))
    assert set(server.ranges()) == {None}


def test_a_part_that_is_not_from_here_is_not_gone_on_with(server):
    leave_a_part(server)
    [part] = fetch.cache_directory().rglob("*.part.json")
    part.write_text(part.read_text()[:-20])  # as a kill leaves it
    server.answers = [Answer(BODY)]
    assert_whole(get(server))
    assert server.ranges() == [None]


def test_more_bytes_than_told(server):
    server.answers = [Answer(BODY, told=HALF)]
    assert f"sends more than the {HALF:,} bytes it told" in failure(server)
    assert files(fetch.cache_directory()) == []


def test_fewer_bytes_than_told(server):
    server.answers = [Answer(BODY, told=len(BODY) + 1, ranges=False)]
    assert f"broke off after {len(BODY):,} of {len(BODY) + 1} bytes" in failure(server, fetch.NetworkError)
    assert files(fetch.cache_directory()) == ["model.pkl.part", "model.pkl.part.json"]


def test_a_server_that_keeps_the_connection(server, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "_TIMEOUT_S", 0.5)
    server.answers = [Answer(BODY, hold_after=len(BODY))]
    assert_whole(get(server))
    assert len(server.requests) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("told", [-1, None])
def test_a_file_that_was_cut_off_on_the_server(server, told):
    server.answers = [Answer(BODY[:HALF], told=told)]
    if told == -1:
        assert "it ends in the middle" in failure(server)
        assert files(fetch.cache_directory()) == []
    else:
        assert f"broke off after {HALF:,} of unknown bytes" in failure(server, fetch.NetworkError)


HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>" + b" " * 5000


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(HTML), "a web page"),
        (Answer(b"\r\n \xef\xbb\xbf<html>"), "a web page"),
        (Answer(HTML, told=None), "a web page"),
        (Answer(HTML, status=404), "is not there (HTTP 404 Not Found)"),
        (Answer(b'{"error": "not found"}'), 'something that begins with b\'{"error"'),
        (Answer(b"cannot find this file\n"), "something that begins with b'cannot"),
        (Answer(b"\x1f\x8b\x08gzip"), "something that begins with"),
        (Answer(b""), "an empty file"),
    ],
    ids=["html 200", "html, blanks", "html, no length", "html 404", "json", "text", "gzip", "empty"],
)
def test_what_is_no_checkpoint_is_refused(server, answer, message):
    server.answers = [answer]
    assert message in failure(server)
    assert len(server.requests) == 1
    assert files(fetch.cache_directory()) == []


def test_a_web_page_in_place_of_the_rest_does_not_cost_the_part(server):
    leave_a_part(server)
    server.answers = [Answer(HTML, etag="")]
    assert "a web page" in failure(server)
    server.answers = [Answer(BODY)]
    assert_whole(get(server))
    assert server.ranges() == [f"bytes={HALF}-"] * 2


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("make", [dict, collections.OrderedDict])
def test_pickles_of_all_protocols_are_checkpoints(server, protocol, make):
    body = pickle.dumps(make(a=1, b=[2.5] * 20), protocol)
    server.answers = [Answer(body)]
    assert_whole(get(server), body)


@pytest.mark.parametrize("name", ["torch/checkpoint.pth", "torch/old.pth", "torch/tensors_protocol0.pkl", "tiny_swin/odd.float32.h5", None])
def test_other_checkpoints(server, name):
    header = b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    body = (ROOT / "tests/golden" / name).read_bytes() if name else len(header).to_bytes(8, "little") + header + b"abc"
    server.answers = [Answer(body)]
    assert_whole(get(server), body)


@pytest.mark.parametrize("name", ["torch/checkpoint.pth", "torch/tensors_protocol0.pkl"])
def test_other_checkpoints_that_were_cut_off(server, name):
    server.answers = [Answer((ROOT / "tests/golden" / name).read_bytes()[:-30])]
    assert "it ends in the middle" in failure(server)


@pytest.mark.parametrize("hold_after", [-1, 10, HALF], ids=["before the headers", "in the head", "in the middle"])
def test_a_server_that_hangs(server, hold_after, monkeypatch):
    monkeypatch.setattr(fetch, "_TIMEOUT_S", 0.5)
    server.answers = [Answer(BODY, hold_after=hold_after), Answer(BODY)]
    assert_whole(get(server))
    assert server.ranges() == [None, f"bytes={HALF}-" if hold_after == HALF else None]
    monkeypatch.setattr(fetch, "_ATTEMPTS", 2)
    server.answers = [Answer(BODY, etag="", hold_after=hold_after)]
    start_s = time.monotonic()
    assert "timed out" in failure(server, fetch.NetworkError, force=True)
    assert time.monotonic() - start_s < 20


@pytest.mark.parametrize(("status", "requests"), [(500, 5), (503, 5), (429, 5), (403, 1), (401, 1), (204, 1), (206, 1)])
def test_statuses(server, status, requests):
    server.answers = [Answer(BODY, status=status)]
    assert f"HTTP {status}" in failure(server, fetch.NetworkError)
    assert len(server.requests) == requests
    assert files(fetch.cache_directory()) == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_when_resuming_too(server, status):
    there = Answer(status=status, location="/there")
    server.answers = [there, Answer(BODY, stop_after=HALF), there, Answer(BODY)]
    path = get(server)
    assert_whole(path)
    assert path.name == "model.pkl"
    assert server.ranges() == [None, None, f"bytes={HALF}-", f"bytes={HALF}-"]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://x/"])
def test_redirects_to_elsewhere_are_refused(server, location):
    server.answers = [Answer(status=302, location=location)]
    message = failure(server)
    assert f"it leads to {location}" in message
    assert "is not followed" in message


def test_redirects_without_end(server):
    server.answers = [Answer(status=302, location="/again")]
    assert "HTTP 302" in failure(server, fetch.NetworkError)
    assert len(server.requests) < 20


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that no one but the test trusts, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
    command += "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 "
    command += f"-addext keyUsage=critical,digitalSignature,keyCertSign -keyout {file}.key -out {file}.crt"
    subprocess.run(command.split(), check=True, capture_output=True)
    file.write_bytes(file.with_name("both.pem.key").read_bytes() + file.with_name("both.pem.crt").read_bytes())
    return file


@pytest.fixture
def tls_server(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serve(context) as running:
        yield running


def trust(monkeypatch, certificate) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(fetch, "_opener", fetch._opener.__wrapped__)  # which is kept otherwise


def test_https(tls_server, certificate, monkeypatch):
    tls_server.answers = [Answer(BODY)]
    assert "certificate is not valid (self" in failure(tls_server, fetch.NetworkError)
    assert tls_server.requests == []
    trust(monkeypatch, certificate)
    assert_whole(get(tls_server))


def test_https_does_not_become_http(tls_server, certificate, server, monkeypatch):
    trust(monkeypatch, certificate)
    server.answers = [Answer(BODY)]
    tls_server.answers = [Answer(status=302, location=f"{server.url}/x")]
    assert "a redirect from https to http is not followed" in failure(tls_server)
    assert server.requests == []
    server.answers, tls_server.answers = [Answer(status=302, location=f"{tls_server.url}/x")], [Answer(BODY)]
    assert_whole(get(server))


def test_no_tls_where_it_should_be(server):
    with pytest.raises(fetch.NetworkError, match="no answer from 127"):
        fetch.download(server.url.replace("http:", "https:") + "/model.pkl")


def no_name(*arguments, **named):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_offline(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("no use waiting"))
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    with pytest.raises(fetch.NetworkError, match="Name or service not known") as raised:
        fetch.download("https://example.org/model.pkl")
    assert "without a network, only what is in the cache can be had" in str(raised.value)


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(fetch.NetworkError, match="Connection refused"):
        fetch.download(f"http://127.0.0.1:{port}/model.pkl")


def test_a_network_that_goes_during_a_download_is_waited_for(server, monkeypatch):
    server.answers = [Answer(BODY, stop_after=HALF), Answer(BODY)]
    outages = iter([no_name, no_name])

    def pause(seconds: float) -> None:
        if outage := next(outages, None):
            monkeypatch.setattr(socket, "getaddrinfo", outage)
        else:
            monkeypatch.setattr(socket, "getaddrinfo", look_up)

    look_up = socket.getaddrinfo
    monkeypatch.setattr(time, "sleep", pause)
    assert_whole(get(server))
    assert server.ranges() == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/a",
        "model.pkl",
        "",
        "http://",
        "https:///a",
        "http://[::1",
        "http://a:b/c",
        "http://me:pw@a/b",
    ],
)
def test_addresses_that_are_none(url):
    with pytest.raises(fetch.FetchError, match=re.escape("cannot use the address")):
        fetch.download(url)
    assert not fetch.cache_directory().exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/model.pkl?key=1#part", "model.pkl"),
        ("/..%2f..%2fpasswd", "passwd"),
        ("/a/..", "file"),
        ("/%2e%2e", "file"),
        ("/a\\b\\c.pkl", "c.pkl"),
        ("/", "file"),
        ("", "file"),
        ("/.bashrc", "bashrc"),
        ("/-rf", "rf"),
        ("/a%00b%0a%1b[2J.pkl", "a_b_2J.pkl"),
        ("/m ö.pkl", "m_.pkl"),
        ("/" + 300 * "x" + ".pkl", 76 * "x" + ".pkl"),
    ],
)
def test_file_names(server, path, name):
    server.answers = [Answer(BODY)]
    found = fetch.download(server.url + path)
    assert found.name == name
    assert found.parent.parent == fetch.cache_directory()
    assert_whole(found)


def test_addresses_do_not_share_files(server):
    server.answers = [Answer(BODY), Answer(OTHER)]
    assert_whole(fetch.download(f"{server.url}/a/model.pkl?version=1"))
    assert_whole(fetch.download(f"{server.url}/a/model.pkl?version=2"), OTHER)


def test_what_is_behind_a_question_mark_is_neither_told_nor_kept(server, tmp_path, capsys):
    redirect = Answer(status=302, location="/elsewhere.pkl?signature=SECRET")
    server.answers = [
        redirect,
        Answer(BODY, stop_after=HALF),
        Answer(BODY),
        Answer(status=302, location="ftp://x/?SECRET"),
        Answer(b"<html>"),
    ]
    path = fetch.download(f"{server.url}/zoo/model.pkl?signature=SECRET")
    record = path.with_name("model.pkl.json").read_text()
    assert json.loads(record)["url"] == f"{server.url}/zoo/model.pkl?…"
    messages = []
    for _ in range(2):
        with pytest.raises(fetch.FetchError) as raised:
            fetch.download(f"{server.url}/nothing.pkl?signature=SECRET")
        messages.append(str(raised.value))
    assert "SECRET" not in "".join([record, *messages, capsys.readouterr().err, *map(str, (tmp_path / "cache").rglob("*"))])


def test_a_changed_file_in_the_cache(server):
    server.answers = [Answer(BODY)]
    path = get(server)
    changed = bytearray(BODY)
    changed[HALF] ^= 1
    path.write_bytes(changed)
    message = failure(server)
    assert f"'{path}' is not what was downloaded" in message
    assert f"expected {hashlib.sha256(BODY).hexdigest()}, got {hashlib.sha256(changed).hexdigest()}" in message
    assert "delete it" in message
    assert path.read_bytes() == changed
    assert_whole(get(server, force=True))
    path.with_name("model.pkl.json").unlink()
    assert "expected unknown" in failure(server)
    path.unlink()
    assert_whole(get(server))


def test_force_keeps_the_old_file_until_the_new_one_is_whole(server):
    server.answers = [Answer(BODY)]
    path = get(server)
    server.answers = [Answer(OTHER, etag='"2"', stop_after=100)]
    failure(server, fetch.NetworkError, force=True)
    assert get(server) == path
    assert path.read_bytes() == BODY
    server.requests.clear()
    server.answers = [Answer(OTHER, etag='"2"')]
    assert_whole(get(server, force=True), OTHER)
    assert server.ranges() == [None]


def test_a_full_disk(server):
    server.answers = [Answer(BODY)]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, limit[1]))
    try:
        message = failure(server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "File too large" in message
    assert "make room and run the same again" in message
    assert files(fetch.cache_directory()) == ["model.pkl.part", "model.pkl.part.json"]
    assert_whole(get(server))
    assert server.ranges() == [None, f"bytes={HALF}-"]


def test_a_cache_that_cannot_be(server, tmp_path):
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", pathlib.Path("/proc/cache")):
        message = failure(server, cache=cache)
        assert f"cannot keep '{cache}/" in message
        assert "$TFMASKFORMER_CACHE" in message


def test_a_read_only_cache_is_read(server, monkeypatch):
    server.answers = [Answer(BODY)]
    path = get(server)

    def forbidden(*arguments):
        raise PermissionError

    monkeypatch.setattr(fetch, "_part", forbidden)
    assert get(server) == path


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TFMASKFORMER_CACHE", "~/own")
    assert fetch.cache_directory() == tmp_path / "own"
    monkeypatch.setenv("TFMASKFORMER_CACHE", "")
    assert fetch.cache_directory() == tmp_path / "xdg/tfmaskformer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert fetch.cache_directory() == tmp_path / ".cache/tfmaskformer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_directory() == tmp_path / ".cache/tfmaskformer"


CHILD = "import sys; from checkpoints import fetch; print(fetch.download(sys.argv[1]))"

# Kills itself before the n-th (argument 3) call of a function (argument 2) that changes the disk.
DIES = """
import os, pathlib, signal, sys
from checkpoints import fetch
owners = {"fsync": os, "replace": os, "unlink": pathlib.Path, "append": fetch._Part, "_write_record": fetch._Part}
calls, function = int(sys.argv[3]), getattr(owners[sys.argv[2]], sys.argv[2])
def dying(*arguments, **named):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **named)
setattr(owners[sys.argv[2]], sys.argv[2], dying)
fetch._BLOCK_BYTES = 80_000
print(fetch.download(sys.argv[1], force=True))
"""


def child(server, script: str = CHILD, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, f"{server.url}/zoo/model.pkl", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def part_bytes() -> int:
    return sum(path.stat().st_size for path in fetch.cache_directory().rglob("*.part"))


def test_kill_9_and_resume(server):
    server.answers = [Answer(BODY, hold_after=HALF), Answer(BODY)]
    with child(server) as process:
        wait_for(lambda: part_bytes() == HALF)
        process.send_signal(signal.SIGKILL)
    assert files(fetch.cache_directory()) == ["model.pkl.part", "model.pkl.part.json"]
    assert_whole(get(server))
    assert server.ranges() == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize(
    "moment",
    # in the order of a download that replaces a file in the cache
    ["unlink 0", "unlink 2", "_write_record 0", "fsync 0", "append 0", "append 1", "fsync 1", "_write_record 1", "fsync 2"]
    + ["replace 0", "replace 1"],
)
def test_a_kill_at_any_moment(server, moment):
    server.answers = [Answer(OTHER, etag='"0"')]
    path = get(server)
    server.answers = [Answer(BODY)]
    with child(server, DIES, *moment.split()) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    there = BODY if moment == "replace 1" else OTHER
    assert path.read_bytes() == there
    assert get(server).read_bytes() == there
    if there == OTHER:
        path.unlink()  # as if there had been no file
    assert_whole(get(server))


def test_two_at_once(server):
    server.answers = [Answer(BODY, hold_after=HALF)]
    with child(server) as first:
        wait_for(lambda: part_bytes() == HALF)
        with child(server) as second:
            assert second.stderr.readline() == "another run is downloading 'model.pkl'; waiting for it\n"
            server.go_on.set()
            outputs = {first.communicate()[0], second.communicate()[0]}
    assert (first.returncode, second.returncode) == (0, 0)
    [path] = outputs
    assert_whole(pathlib.Path(path.strip()))
    assert len(server.requests) == 1


def test_the_second_goes_on_where_the_first_was_killed(server):
    server.answers = [Answer(BODY, hold_after=HALF), Answer(BODY)]
    with child(server) as first:
        wait_for(lambda: part_bytes() == HALF)
        with child(server) as second:
            second.stderr.readline()
            first.kill()
            assert_whole(pathlib.Path(second.communicate()[0].strip()))
    assert server.ranges() == [None, f"bytes={HALF}-"]


def test_many_at_once(server):
    server.answers = [Answer(BODY)]
    processes = [child(server, DIES, "append", "1000") for _ in range(3)]
    for process in processes:
        with process:
            process.communicate()
        assert process.returncode == 0
    assert len(server.requests) == 3
    assert_whole(get(server))


@pytest.fixture
def entry(server):
    """An official checkpoint, which is here."""
    server.answers = [Answer(BODY)]
    digits = hashlib.md5(BODY).hexdigest()[:6]
    official = registry.entry("maskformer_R50_bs16_160k")
    return dataclasses.replace(official, url=f"{server.url}/maskformer_R50/model_final_{digits}.pkl", file_hash=digits)


def test_fetch(entry, server, capsys):
    path = fetch.fetch(entry)
    assert path.name == entry.url.rpartition("/")[2]
    assert path.parent.name.startswith("maskformer_R50-")
    assert_whole(path)
    assert fetch.download(entry.url) == path
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "CC-BY-NC-4.0 (not for commercial use)" in captured.err
    assert "warning" not in captured.err
    assert len(server.requests) == 1


def test_another_md5_is_a_warning(entry, capsys):
    entry = dataclasses.replace(entry, file_hash="d8dbeb")
    for _ in range(2):
        assert_whole(fetch.fetch(entry))
        said = capsys.readouterr().err
        assert f"is {hashlib.md5(BODY).hexdigest()}; by its name it begins with d8dbeb" in said
        assert hashlib.sha256(BODY).hexdigest() in said


def test_a_sha256_in_the_registry_must_be_met(entry):
    good = dataclasses.replace(entry, sha256=hashlib.sha256(BODY).hexdigest())
    bad = dataclasses.replace(entry, sha256=hashlib.sha256(OTHER).hexdigest())
    with pytest.raises(fetch.FetchError, match=f"expected {bad.sha256}, got {good.sha256}"):
        fetch.fetch(bad)
    assert files(fetch.cache_directory()) == []
    assert_whole(fetch.fetch(good))
    with pytest.raises(fetch.FetchError, match=f"expected {bad.sha256}, got {good.sha256}"):
        fetch.fetch(bad)


def test_test_models_have_no_file():
    with pytest.raises(fetch.FetchError, match="tfmaskformer zoo list"):
        fetch.fetch(registry.entry("tiny_panoptic"))


def test_official_addresses_give_their_file_names(tmp_path):
    places = {fetch._place(fetch._checked(item.url), tmp_path) for item in registry.entries()}
    assert {place.name for place in places} == {f"model_final_{item.file_hash}.pkl" for item in registry.entries()}
    assert all(item.url.startswith("https://") for item in registry.entries())


@pytest.fixture
def zoo(entry, server, monkeypatch):
    """Two official checkpoints, which are here."""
    second = dataclasses.replace(entry, name="maskformer_R101_bs16_160k", url=f"{server.url}/maskformer_R101/model.pkl")
    zoo = {item.name: item for item in (entry, second)}
    monkeypatch.setattr(registry, "entries", lambda: tuple(zoo.values()))
    monkeypatch.setattr(registry, "_entries", lambda: zoo)
    return list(zoo)


def test_command(zoo, tmp_path, capsys):
    assert cli.main(["fetch", zoo[0], "--cache", str(tmp_path / "mine")]) == 0
    captured = capsys.readouterr()
    [path] = (tmp_path / "mine").rglob("*.pkl")
    assert captured.out == f"{path}\n"
    assert_whole(path)
    lines = captured.err.splitlines()
    assert "CC-BY-NC-4.0" in lines[0]
    assert lines[1] == f"{zoo[0]}: downloading 0.2 MB"
    assert re.fullmatch(rf"{zoo[0]}: 0\.2 MB downloaded in \d+\.\d s, \d+\.\d MB/s", lines[2])
    assert len(lines) == 3
    assert cli.main(["fetch", zoo[0], "--cache", str(tmp_path / "mine")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{path}\n"
    assert captured.err.splitlines()[1:] == [f"{zoo[0]}: in the cache, unchanged"]


@pytest.mark.parametrize("all_", [True, False])
def test_command_for_several(zoo, all_, capsys):
    assert cli.main(["fetch", "--all"] if all_ else ["fetch", *zoo]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert [pathlib.Path(path).parent.name.partition("-")[0] for path in paths] == ["maskformer_R50", "maskformer_R101"]
    for path in paths:
        assert_whole(pathlib.Path(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "give names"), (["--all", "{0}"], "give names"), (["{0}", "maskformer_R5"], "no zoo entry 'maskformer_R5'")],
)
def test_command_with_bad_names(zoo, server, arguments, message, capsys):
    assert cli.main(["fetch", *(argument.format(*zoo) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: {message}" in captured.err
    assert server.requests == []


def test_command_with_bad_content_goes_on_to_the_next(zoo, server, capsys):
    server.answers = [Answer(HTML), Answer(BODY)]
    assert cli.main(["fetch", *zoo]) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "a web page" in captured.err


def test_command_without_a_network(zoo, server, capsys):
    server.answers = [Answer(status=500)]
    assert cli.main(["fetch", *zoo]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: cannot download") == 1


def test_command_on_a_changed_file(zoo, capsys):
    assert cli.main(["fetch", zoo[0]]) == 0
    path = pathlib.Path(capsys.readouterr().out.strip())
    path.write_bytes(OTHER)
    assert cli.main(["fetch", zoo[0]]) == 2
    assert f"tfmaskformer zoo fetch {zoo[0]} --force" in capsys.readouterr().err
    assert cli.main(["fetch", zoo[0], "--force"]) == 0
    assert_whole(path)


def test_interrupted(zoo, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._Bar, "__call__", interrupt)
    assert cli.main(["fetch", zoo[0]]) == 3
    assert "error: interrupted" in capsys.readouterr().err


def test_bar_on_a_terminal(monkeypatch, capsys):
    now_s = iter([10.0, 10.05, 12.0, 13.0, 14.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now_s))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((60, 24)))
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    bar = cli._Bar("maskformer_R50_bs16_160k")
    for done in (50_000_000, 51_000_000, 60_000_000, 200_000_000):
        bar(done, 200_000_000)
    bar.end()
    lines = capsys.readouterr().err.split("\r\x1b[K")
    assert lines == [
        "",
        " 25% of 200.0 MB, 0.0 MB/s  maskformer_R50_bs16_160k",
        " 30% of 200.0 MB, 5.0 MB/s, 0:00:28 left  maskformer_R50_bs",
        "100% of 200.0 MB, 50.0 MB/s, 0:00:00 left  maskformer_R50_b",
        "maskformer_R50_bs16_160k: 200.0 MB downloaded in 4.0 s, 37.5 MB/s\n",
    ]
