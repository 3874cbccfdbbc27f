"""An HTTP server in a thread that can do to a download whatever a network, a server or a proxy does."""

from __future__ import annotations

import contextlib
import dataclasses
import email.message
import http.server
import ssl
import threading
from collections.abc import Iterator


@dataclasses.dataclass
class Answer:
    """What one request gets. By default ``body``, whole, with its true length, resumable.

    ``told``: the Content-Length in place of the true one; None: there is none. ``stop_after``: bytes of the body after which the
    connection breaks off; ``hold_after``: after which nothing comes until ``Server.go_on`` is set. ``content_range``: in place of the
    true one. ``ranges``: whether Range is understood; ``if_range``: whether If-Range is.
    """

    body: bytes = b""
    status: int = 200
    etag: str = '"1"'
    last_modified: str = ""
    told: int | None = -1
    stop_after: int | None = None
    hold_after: int | None = None
    ranges: bool = True
    if_range: bool = True
    content_range: str = ""
    chunked: bool = False
    location: str = ""


class Server:
    """Gives ``answers`` one after the other, the last one for ever; ``requests`` has the headers that came."""

    def __init__(self, url: str):
        self.url = url
        self.answers: list[Answer] = []
        self.requests: list[email.message.Message] = []
        self.go_on = threading.Event()

    def ranges(self) -> list[str | None]:
        """The Range header of each request."""
        return [headers["Range"] for headers in self.requests]


@contextlib.contextmanager
def serve(tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A server at a free port of this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.requests.append(self.headers)
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            with contextlib.suppress(OSError):  # the client left
                _answer(self, answer, server.go_on)
            self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:  # a handshake that failed
            pass

    httpd = Quiet(("127.0.0.1", 0), Handler)
    if tls:
        httpd.socket = tls.wrap_socket(httpd.socket, server_side=True)
    server = Server(f"{'https' if tls else 'http'}://127.0.0.1:{httpd.server_address[1]}")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def _answer(handler: http.server.BaseHTTPRequestHandler, answer: Answer, go_on: threading.Event) -> None:
    status, body, content_range = answer.status, answer.body, answer.content_range
    asked = handler.headers["Range"] if answer.ranges and status == 200 else None
    if asked and answer.if_range and handler.headers["If-Range"] not in (answer.etag, answer.last_modified):
        asked = None
    if asked:
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        status, body = (206, body[start:]) if start < len(answer.body) else (416, b"")
        content_range = content_range or f"bytes {start}-{len(answer.body) - 1}/{len(answer.body)}"
    handler.send_response(status)
    headers = {"ETag": answer.etag, "Last-Modified": answer.last_modified, "Location": answer.location, "Content-Range": content_range}
    if answer.chunked:
        headers["Transfer-Encoding"] = "chunked"
    elif answer.told is not None:
        headers["Content-Length"] = str(len(body) if answer.told == -1 else answer.told)
    for name, value in headers.items():
        if value:
            handler.send_header(name, value)
    handler.send_header("Connection", "close")
    if answer.hold_after == -1:  # not even headers
        go_on.wait(60)
    handler.end_headers()
    sent = 0
    for stop in sorted({stop for stop in (answer.hold_after, answer.stop_after) if stop is not None and stop >= 0} | {len(body)}):
        block = body[sent:stop]
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if answer.chunked and block else block)
        sent = max(sent, stop)
        if stop == answer.stop_after:
            return
        if stop == answer.hold_after:
            go_on.wait(60)
    if answer.chunked:
        handler.wfile.write(b"0\r\n\r\n")
