"""The producer's HTTP endpoint, for its operator and Prometheus, and how `rebpf status` asks it.

GET /metrics   all metrics
GET /healthz   200 while the loop makes steps, otherwise 503
GET /readyz    200 and {"state", "reasons"} while the producer captures, also where it is degraded; otherwise 503
GET /status    the whole status in JSON, or 503

The loop alone knows how things are, and nobody else touches its parts: a visitor waits for its next step, which leaves
a status on the board. While nobody asks, that costs a look at a flag for each step.
"""

import http.client
import json
import logging
import socketserver
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6, SHUT_RDWR, socket
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from producer import metrics
from producer.errors import UnavailableError
from producer.status import Status

logger = logging.getLogger(__name__)

_VISITOR_TIMEOUT_S = 5.0
_MOST_VISITORS = 8
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
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=_VISITOR_TIMEOUT_S)
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        status: dict[str, Any] = json.load(response)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnavailableError(f"the producer does not answer at {url}/status: {error or 'nothing'}") from error
    finally:
        connection.close()
    if response.status != HTTPStatus.OK:
        raise UnavailableError(f"the producer {status['reasons'][0]}")
    return status


class _Server(ThreadingHTTPServer):
    """A thread for each of a few visitors at a time: visitors must not use up the producer's file descriptors."""

    block_on_close = False
    allow_reuse_port = False
    request_queue_size = 64

    def __init__(self, host: str, port: int, board: Board) -> None:
        if ":" in host:
            self.address_family = AF_INET6
        self.board = board
        self.metrics = metrics.registry(board.last, board.idle_s)
        self._places = threading.BoundedSemaphore(_MOST_VISITORS)
        self._stopping = False
        super().__init__((host, port), _Visit)

    def serve(self) -> None:
        """Serve until `stop`. serve_forever would wake up twice a second to see whether it is told to stop."""
        while not self._stopping:
            self.handle_request()

    def stop(self) -> None:
        self._stopping = True
        self.socket.shutdown(SHUT_RDWR)  # ends the wait for visitors

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
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        logger.debug("metrics: a visitor went away", exc_info=True)


class _Visit(BaseHTTPRequestHandler):
    server: _Server
    timeout = _VISITOR_TIMEOUT_S

    def do_GET(self) -> None:
        page = _PAGES.get(self.path.partition("?")[0])
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        code, kind, body = page(self)
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
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
