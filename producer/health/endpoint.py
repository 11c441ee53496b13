"""The producer's HTTP endpoint, for operators and Prometheus.

GET /metrics   all metrics
GET /healthz   200 while the loop is running, otherwise 503; needs no password
GET /readyz    200 and {"state", "reasons"} while the producer is capturing, also if degraded; otherwise 503
GET /status    the full status in JSON, or 503

Only the loop knows the status: a request waits for the loop's next step, which publishes it on the board. Without
requests, a step only checks a flag.

Clients may be slow, many or hostile. Each visit has a deadline and a size limit; a new visitor replaces the oldest one;
and only a few visitors can wait for the loop. So /healthz always answers. The same holds with TLS: the handshake is
part of the visit, in the visitor's thread. While no thread can be started, a spare one serves them in turn.

With certificates or passwords, `rebpf status` uses a socket in the state folder that only its owner can connect to.
"""

import contextlib
import errno
import http.client
import io
import json
import logging
import os
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socket import AF_INET6, AF_UNIX, MSG_PEEK, SHUT_RDWR, SHUT_WR, socket
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from producer.health import metrics
from producer.health.board import StatusBoard
from producer.health.passwords import Passwords
from producer.health.visitor_threads import VisitorThreads
from producer.health.web_config import WebConfig, WebSettings
from producer.host import state_file
from producer.host.dns import Lookup
from producer.host.endpoints import endpoint
from producer.host.log_limit import LogLimit

logger = logging.getLogger(__name__)

_LOOKUP_S = 1.0
_REPEAT_LOG_S = 3600.0
_VISIT_TIMEOUT_S = 5.0
_MAX_VISITORS = 32
_MAX_WAITING_PER_PAGE = 8
_MAX_REQUEST_BYTES = 16 << 10
_METHODS = ("GET", "HEAD")
_TLS_HANDSHAKE = b"\x16"
_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"

Answer = tuple[HTTPStatus, str, bytes]


class Endpoint:
    """Serves while entered. If the port is not available, it logs a warning, and `url` is None until `open` succeeds.

    `local` is the path of a socket that serves the same without TLS and passwords. `registry` has the metrics;
    by default those of the producer.
    """

    def __init__(
        self,
        host: str,
        port: int,
        board: StatusBoard,
        web: WebSettings | None = None,
        local: Path | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._registry = registry or metrics.registry(board.last, board.idle_s)
        self._host, self._port, self._board, self._lookup = host, port, board, Lookup(host)
        self._web = web or WebSettings(None)
        self._local = local  # until it is served
        self._stack = contextlib.ExitStack()
        self._log_limit = LogLimit(_REPEAT_LOG_S)
        self.url: str | None = None
        """URL of the endpoint."""

    def __enter__(self) -> "Endpoint":
        self.open(_LOOKUP_S)
        return self

    def open(self, wait_s: float = 0.0) -> None:
        """Serve, unless it does already, the port is not available, or the name is not resolved within `wait_s`."""
        if not self.url:
            self._serve(wait_s)
        if self.url and self._local:
            self._serve_at(self._local)

    def _serve(self, wait_s: float) -> None:
        try:
            server = _Server(self._lookup.address(wait_s), self._port, self._board, self._web, self._registry)
            self._stack.enter_context(_running(server, "endpoint"))
        except OSError as error:
            if self._log_limit.allows(reason := error.strerror or str(error)):
                logger.warning("metrics: no endpoint at %s port %d: %s", self._host, self._port, reason)
            return
        scheme = "https" if self._web.current().tls else "http"
        self.url = f"{scheme}://{endpoint(self._host, server.server_address[1])}"

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _serve_at(self, path: Path) -> None:
        try:
            server = _LocalServer(path, self._board, self._web, self._registry)
            self._stack.enter_context(_running(server, "endpoint-local"))
            self._local = None
        except OSError as error:
            if self._log_limit.allows(f"socket: {error}"):
                logger.warning("metrics: no socket at %s, `rebpf status` does not work yet: %s", path, error.strerror)


@contextlib.contextmanager
def _running(server: "_Server", name: str) -> Iterator[None]:
    """Serve in threads. Raises OSError if they cannot be started."""
    thread = threading.Thread(target=server.serve, name=name, daemon=True)
    try:
        server.start_spare()
        thread.start()
    except RuntimeError as error:
        server.server_close()
        raise OSError(errno.EAGAIN, f"{error}: raise TasksMax, or ulimit -u") from error
    try:
        yield
    finally:
        server.stop()
        thread.join()
        server.server_close()


class _Server(VisitorThreads, HTTPServer):
    """Serves each visitor in a thread. Their number is bounded, to save the producer's file descriptors.

    The thread that accepts visitors also closes those past their deadline, and the oldest one if there are too many.
    """

    allow_reuse_port = False
    request_queue_size = 64

    def __init__(self, host: str, port: int, board: StatusBoard, web: WebSettings, registry: CollectorRegistry) -> None:
        if ":" in host:
            self.address_family = AF_INET6
        self.board = board
        self.web, self.passwords, self.metrics = web, Passwords(), registry
        self._deadlines: dict[socket, float] = {}  # of all visitors, oldest first
        self._served: set[socket] = set()  # visitors that wait for us; we wait for the others
        self._lock = threading.Lock()  # held to close a socket, since its descriptor may be reused later
        self._slots = {path: threading.BoundedSemaphore(_MAX_WAITING_PER_PAGE) for path in _PAGES}
        self._stopping = False
        super().__init__((host, port), _Visit)

    def serve(self) -> None:
        """Serve until `stop`. serve_forever would wake up twice a second to check for a stop."""
        while not self._stopping:
            self.timeout = self._close_late()
            self.handle_request()

    def stop(self) -> None:
        self._stopping = True
        self.socket.shutdown(SHUT_RDWR)  # ends the wait for visitors

    def make(self, path: str, visit: "_Visit") -> Answer:
        """Make a page. Meanwhile the visitor waits for us, so it is not replaced by a new one."""
        if not self._slots[path].acquire(blocking=False):
            return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"too many requests for this page\n"
        try:
            self._served.add(visit.accepted)
            return _PAGES[path](visit)
        finally:
            self._served.discard(visit.accepted)
            self._slots[path].release()

    def settings(self) -> WebConfig:
        """Return the settings for a new visitor."""
        return self.web.current()

    def get_request(self) -> tuple[socket, Any]:
        try:
            return super().get_request()
        except OSError:  # out of descriptors: the visitor stays queued, so a retry without a pause would spin
            time.sleep(0.1)
            raise

    def server_bind(self) -> None:
        # HTTPServer's would look up the host name.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        assert isinstance(request, socket)
        with self._lock:
            oldest = next((each for each in self._deadlines if each not in self._served), None)
            if oldest and len(self._deadlines) >= _MAX_VISITORS:
                self._cut(oldest)
            self._deadlines[request] = time.monotonic() + _VISIT_TIMEOUT_S
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket | tuple[bytes, socket]) -> None:
        assert isinstance(request, socket)
        with self._lock:
            self._deadlines.pop(request, None)
            super().shutdown_request(request)

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        logger.debug("metrics: a visitor disconnected", exc_info=True)

    def _close_late(self) -> float | None:
        """Close visitors past their deadline; return the seconds until the next deadline, None without visitors."""
        with self._lock:
            now = time.monotonic()
            for visitor in [each for each, deadline in self._deadlines.items() if deadline <= now]:
                self._cut(visitor)
            return min(self._deadlines.values()) - now if self._deadlines else None

    def _cut(self, visitor: socket) -> None:
        """End all waits of the visitor's thread, which then closes the socket."""
        del self._deadlines[visitor]
        try:
            visitor.shutdown(SHUT_RDWR)
        except OSError:
            logger.debug("metrics: a visitor had disconnected already")


class _LocalServer(_Server):
    """Serves on a Unix socket, without TLS and passwords."""

    address_family = AF_UNIX

    def __init__(self, path: Path, board: StatusBoard, web: WebSettings, registry: CollectorRegistry) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError:  # a folder, say
            state_file.set_aside(path)
        self._path = path
        super().__init__("", 0, board, web, registry)

    def settings(self) -> WebConfig:
        self.web.current()  # so that errors of the file are in the status
        return WebConfig()

    def server_bind(self) -> None:
        folder = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fchmod(self.socket.fileno(), 0o600)  # whatever the umask; bind() creates the file with this mode
            self.socket.bind(f"/proc/self/fd/{folder}/{self._path.name}")  # a path of any length
        finally:
            os.close(folder)

    def server_close(self) -> None:
        super().server_close()
        with contextlib.suppress(OSError):
            self._path.unlink()


class _Request(io.BufferedReader):
    """A visitor's request, bounded in size."""

    _remaining = _MAX_REQUEST_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(self._remaining + 1)
        self._remaining -= len(line)
        if self._remaining < 0:
            raise http.client.LineTooLong("request")
        return line


class _Visit(BaseHTTPRequestHandler):
    server: _Server
    timeout = _VISIT_TIMEOUT_S
    command, requestline, request_version = "", "", "HTTP/1.0"  # for errors before they are read
    headers_of_all: Mapping[str, str] = {}

    def setup(self) -> None:
        self.accepted: socket = self.request
        self._speak_by(self.accepted)

    def _speak_by(self, connection: socket) -> None:
        self.request = connection
        super().setup()
        self.rfile = _Request(self.rfile.detach())

    def handle(self) -> None:
        """Read one request and answer it."""
        web = self.server.settings()
        self.headers_of_all = web.headers
        first = self.accepted.recv(1, MSG_PEEK)
        if first and web.tls and first == _TLS_HANDSHAKE:
            self._handle_tls(web, web.tls)
        elif first and web.tls:
            self.send_error(HTTPStatus.BAD_REQUEST, "Expected HTTPS")
        elif first and not first.isalpha():  # a TLS client would wait for a response to its first message
            self.send_error(HTTPStatus.BAD_REQUEST, "Expected HTTP without TLS")
        elif first and self._read():
            self._answer(web)
        # With unread bytes, the kernel would reset the connection, and the visitor would not get the response.
        self.accepted.shutdown(SHUT_WR)
        while self.accepted.recv(1 << 16):
            pass

    def _handle_tls(self, web: WebConfig, context: ssl.SSLContext) -> None:
        # On a copy: the server ends the visit through the accepted socket, whatever OpenSSL waits for.
        own = context.wrap_socket(self.accepted.dup(), server_side=True, do_handshake_on_connect=False)
        with own, contextlib.suppress(OSError):
            own.do_handshake()
            if web.admits(own.getpeercert()):
                self.rfile.close()
                self._speak_by(own)
                if self._read():
                    self._answer(web)
            own.settimeout(0)  # send the closing alert without waiting for a response
            own.unwrap()

    def _read(self) -> bool:
        try:
            self.raw_requestline = self.rfile.readline()
        except http.client.LineTooLong:
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return False
        return self.parse_request()

    def _answer(self, web: WebConfig) -> None:
        path = self.path.partition("?")[0]
        if web.users and path != "/healthz":
            code = self.server.passwords.check(web.users, self.headers.get("Authorization"), self.client_address[0])
            if code != HTTPStatus.OK:
                challenge = {"WWW-Authenticate": 'Basic realm="rebpf", charset="UTF-8"'}
                more = challenge if code == HTTPStatus.UNAUTHORIZED else {"Retry-After": "1"}
                self._send(code, _TEXT, f"{code.phrase}\n".encode(), more)
                return
        if path not in _PAGES:
            self.send_error(HTTPStatus.NOT_FOUND)
        elif self.command not in _METHODS:
            allowed = {"Allow": ", ".join(_METHODS)}
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"expected GET or HEAD\n", allowed)
        else:
            self._send(*self.server.make(path, self), {})

    def _send(self, code: HTTPStatus, kind: str, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in self.headers_of_all.items():
            self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        return "rebpf"

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug("metrics: " + format, *arguments)


def _metrics(visit: _Visit) -> Answer:
    encode: Callable[[CollectorRegistry], bytes]
    try:
        encode, kind = choose_encoder(visit.headers.get("Accept", ""))
    except (TypeError, ValueError):  # a version that is not a number
        encode, kind = choose_encoder("")
    return HTTPStatus.OK, kind, encode(visit.server.metrics)


def _healthz(visit: _Visit) -> Answer:
    if hang := visit.server.board.hang():
        return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"the loop {hang}\n".encode()
    return HTTPStatus.OK, _TEXT, b"ok\n"


def _status(visit: _Visit, keys: Iterable[str] = ()) -> Answer:
    """Answer with the status or parts of it, but not with an outdated one if the loop hangs."""
    status, hang = visit.server.board.last(), visit.server.board.hang()
    if status is None or hang:
        answer = {"state": "unavailable", "reasons": [hang or "does not capture yet"]}
        return HTTPStatus.SERVICE_UNAVAILABLE, _JSON, json.dumps(answer).encode()
    facts = status.as_dict()
    return HTTPStatus.OK, _JSON, json.dumps({key: facts[key] for key in keys or facts}).encode()


_PAGES: Mapping[str, Callable[[_Visit], Answer]] = {
    "/metrics": _metrics,
    "/healthz": _healthz,
    "/readyz": partial(_status, keys=("state", "reasons")),
    "/status": _status,
}
