"""The producer's HTTP endpoint, for its operator and Prometheus, and how `rebpf status` asks it.

GET /metrics   all metrics
GET /healthz   200 while the loop makes steps, otherwise 503
GET /readyz    200 and {"state", "reasons"} while the producer captures, also where it is degraded; otherwise 503
GET /status    the whole status in JSON, or 503

The loop alone knows how things are, and nobody else touches its parts: a visitor waits for its next step, which leaves
a status on the board. While nobody asks, that costs a look at a flag for each step.

Visitors may be slow, many or hostile. Each visit has a deadline and a bound on what it sends; the oldest visitor is
closed to make room for a new one; and few visitors at a time may wait for the loop. So /healthz always answers.
"""

import http.client
import io
import json
import logging
import socketserver
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6, MSG_PEEK, SHUT_RDWR, SHUT_WR, socket
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from producer import metrics, statefile
from producer.errors import UnavailableError
from producer.status import Status
from producer.text import printable

logger = logging.getLogger(__name__)

_VISIT_TIMEOUT_S = 5.0
_MOST_STATUS_BYTES = 1 << 20
_MAX_VISITORS = 32
_MAX_WAITING_PER_PAGE = 8
_MAX_REQUEST_BYTES = 16 << 10
_METHODS = ("GET", "HEAD")
_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"

Answer = tuple[HTTPStatus, str, bytes]


class Board:
    """Where the loop leaves its status for other threads.

    They wait at most `answer_timeout_s` for one; a loop that has made no step for `hangs_after_s` is held to hang.
    """

    def __init__(self, *, hangs_after_s: float = 10.0, answer_timeout_s: float = 2.0) -> None:
        self._hangs_after_s = hangs_after_s
        self._answer_timeout_s = answer_timeout_s
        self._fresh = threading.Condition()
        self._wanted = False
        self._status: Status | None = None
        self._number = 0
        self._stepped_at = time.monotonic()

    def step(self, status: Callable[[], Status]) -> None:
        """Note a step of the loop; make and leave a status where somebody waits for it."""
        self._stepped_at = time.monotonic()
        if self._wanted or self._status is None:
            self.leave(status())

    def leave(self, status: Status) -> None:
        """Leave a status that was made anyway."""
        with self._fresh:
            self._status, self._wanted = status, False
            self._number += 1
            self._fresh.notify_all()

    def idle_s(self) -> float:
        """Return the seconds since the loop's last step, or since this object was made."""
        return time.monotonic() - self._stepped_at

    def trouble(self) -> str | None:
        """Return what the loop does wrong; None where it makes its steps."""
        idle_s = self.idle_s()
        return f"has made no step for {idle_s:.1f} s" if idle_s > self._hangs_after_s else None

    def last(self) -> Status | None:
        """Return the status of the loop's next step, or the last one where the loop does not make it in time.

        None before the first.
        """
        with self._fresh:
            number = self._number
            if self._status is not None:
                self._wanted = True
                self._fresh.wait_for(lambda: self._number > number, self._answer_timeout_s)
            return self._status


class Endpoint:
    """Serves while it is entered. A port that cannot be had is a warning, and `url` is then None."""

    def __init__(self, host: str, port: int, board: Board) -> None:
        self._host, self._port, self._board = host, port, board
        self._server: _Server | None = None
        self.url: str | None = None
        """Where it is to be found."""

    def __enter__(self) -> "Endpoint":
        try:
            self._server = _Server(self._host, self._port, self._board)
        except OSError as error:
            logger.warning("metrics: no endpoint at %s port %d: %s", self._host, self._port, error.strerror or error)
            return self
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve, name="endpoint", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server:
            self._server.stop()
            self._thread.join()
            self._server.server_close()


def ask(url: str) -> dict[str, Any]:
    """Return the status of the producer whose endpoint is at `url`; UnavailableError where it does not answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=_VISIT_TIMEOUT_S)
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        status = statefile.parse(response.read(_MOST_STATUS_BYTES))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnavailableError(f"the producer does not answer at {url}/status: {error or 'nothing'}") from error
    finally:
        connection.close()
    if not isinstance(status, dict):
        raise UnavailableError(f"{url}/status: expected a producer's status, found something else")
    if response.status != HTTPStatus.OK:
        reasons = status.get("reasons")
        reason = reasons[0] if isinstance(reasons, list) and reasons else f"answers with status {response.status}"
        raise UnavailableError(printable(f"the producer {reason}"))
    return status


class _Server(ThreadingHTTPServer):
    """A thread for each of a bounded number of visitors: they must not use up the producer's file descriptors.

    The thread that accepts visitors also closes those whose time is over, and the oldest where there are too many.
    """

    block_on_close = False
    allow_reuse_port = False
    request_queue_size = 64

    def __init__(self, host: str, port: int, board: Board) -> None:
        if ":" in host:
            self.address_family = AF_INET6
        self.board = board
        self.metrics = metrics.registry(board.last, board.idle_s)
        self._deadlines: dict[socket, float] = {}  # of all visitors, the oldest first
        self._served: set[socket] = set()  # those who wait for us: the others we wait for
        self._lock = threading.Lock()  # a socket is closed under it: its descriptor may belong to somebody else later
        self._places = {path: threading.BoundedSemaphore(_MAX_WAITING_PER_PAGE) for path in _PAGES}
        self._stopping = False
        super().__init__((host, port), _Visit)

    def serve(self) -> None:
        """Serve until `stop`. serve_forever would wake up twice a second to see whether it is told to stop."""
        while not self._stopping:
            self.timeout = self._close_late()
            self.handle_request()

    def stop(self) -> None:
        self._stopping = True
        self.socket.shutdown(SHUT_RDWR)  # ends the wait for visitors

    def make(self, path: str, visit: "_Visit") -> Answer:
        """Make a page. Meanwhile the visitor waits for us, and is not closed to make room for another."""
        if not self._places[path].acquire(blocking=False):
            return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"too many visitors wait for this page\n"
        try:
            self._served.add(visit.connection)
            return _PAGES[path](visit)
        finally:
            self._served.discard(visit.connection)
            self._places[path].release()

    def get_request(self) -> tuple[socket, Any]:
        try:
            return super().get_request()
        except OSError:  # no descriptor is left: the visitor is still there, and the next try would come at once
            time.sleep(0.1)
            raise

    def server_bind(self) -> None:
        # Without HTTPServer's, which asks the name service for the host's name.
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
        logger.debug("metrics: a visitor went away", exc_info=True)

    def _close_late(self) -> float | None:
        """Close the visitors whose time is over; return the seconds until the next one's is, None without visitors."""
        with self._lock:
            now = time.monotonic()
            for visitor in [each for each, deadline in self._deadlines.items() if deadline <= now]:
                self._cut(visitor)
            return min(self._deadlines.values()) - now if self._deadlines else None

    def _cut(self, visitor: socket) -> None:
        """End whatever the visitor's thread waits for. The thread then closes the socket."""
        del self._deadlines[visitor]
        try:
            visitor.shutdown(SHUT_RDWR)
        except OSError:
            logger.debug("metrics: a visitor was gone already")


class _Request(io.BufferedReader):
    """What a visitor sends, up to a bound."""

    _left = _MAX_REQUEST_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("request")
        return line


class _Visit(BaseHTTPRequestHandler):
    server: _Server
    timeout = _VISIT_TIMEOUT_S
    command, requestline, request_version = "", "", "HTTP/1.0"  # for an error before they are known

    def setup(self) -> None:
        super().setup()
        self.rfile = _Request(self.rfile.detach())

    def handle(self) -> None:
        """Read one request and answer it."""
        first = self.connection.recv(1, MSG_PEEK)
        if first and not first.isalpha():  # a TLS client would wait for an answer to its first message
            self.send_error(HTTPStatus.BAD_REQUEST, "Expected HTTP without TLS")
        elif first and self._read():
            self._answer()
        # Unread bytes would make the kernel reset the connection, and the visitor lose the answer.
        self.connection.shutdown(SHUT_WR)
        while self.connection.recv(1 << 16):
            pass

    def _read(self) -> bool:
        try:
            self.raw_requestline = self.rfile.readline()
        except http.client.LineTooLong:
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return False
        return self.parse_request()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if path not in _PAGES:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        code, kind, body = HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"expected GET or HEAD\n"
        if self.command in _METHODS:
            code, kind, body = self.server.make(path, self)
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", ", ".join(_METHODS))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "rebpf"

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug("metrics: " + format, *arguments)


def _metrics(visit: _Visit) -> Answer:
    encode: Callable[[CollectorRegistry], bytes]
    encode, kind = choose_encoder(visit.headers.get("Accept", ""))
    return HTTPStatus.OK, kind, encode(visit.server.metrics)


def _healthz(visit: _Visit) -> Answer:
    trouble = visit.server.board.trouble()
    if trouble:
        return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"the loop {trouble}\n".encode()
    return HTTPStatus.OK, _TEXT, b"ok\n"


def _readyz(visit: _Visit) -> Answer:
    return _of_status(visit, ("state", "reasons"))


def _status(visit: _Visit) -> Answer:
    return _of_status(visit, None)


def _of_status(visit: _Visit, keys: tuple[str, ...] | None) -> Answer:
    """Answer with the status, or some of it; that of before the loop hung would not be true."""
    status, trouble = visit.server.board.last(), visit.server.board.trouble()
    if status is None or trouble:
        answer = {"state": "unavailable", "reasons": [trouble or "does not capture yet"]}
        return HTTPStatus.SERVICE_UNAVAILABLE, _JSON, json.dumps(answer).encode()
    facts = status.as_dict()
    return HTTPStatus.OK, _JSON, json.dumps({key: facts[key] for key in keys or facts}).encode()


_PAGES = {"/metrics": _metrics, "/healthz": _healthz, "/readyz": _readyz, "/status": _status}
