"""An HTTP request with a deadline and a size limit for the response.

A socket timeout bounds a single read: a server that sends a byte per second could block for hours, and name resolution
has no configurable timeout. So the request runs in a separate thread; at the deadline, its connection is shut down and
the thread abandoned. This includes the response of a proxy (https_proxy), which could otherwise keep a thread forever.
Redirects are not followed: only the responses of the given server count. Bodies are not decompressed.

Proxies are those of the environment. Networks in no_proxy (10.0.0.0/8), as in Kubernetes, are excluded, too.
"""

import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    ProxyHandler,
    Request,
    build_opener,
    getproxies_environment,
)

from producer.errors import Stopped
from producer.host.signals import Flag
from producer.host.text import printable

MOST_BYTES = 1 << 20
"""Maximum size of a body."""
_SHOWN = 200
_LOOK_S = 0.1
_PIECE_BYTES = 1 << 16


class ExchangeError(Exception):
    """No complete response; the text has the reason."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete response with any status."""

    status: int
    content_type: str
    body: bytes


@dataclass(slots=True)
class _Attempt:
    """A request in its thread."""

    deadline: float
    done: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None
    error: Exception | None = None
    is_abandoned: bool = False
    _sock: socket.socket | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Held to shut down and to close, since the descriptor may be reused later."""

    def connect(self, *where: Any) -> socket.socket:
        """Connect as socket.create_connection, and keep a copy of the socket: TLS takes the original's descriptor."""
        sock = socket.create_connection(*where)
        with self._lock:
            self._sock = sock.dup()
        if self.is_abandoned:
            self.abandon()
        return sock

    def abandon(self) -> None:
        """Shut down the connection, so that the thread ends."""
        self.is_abandoned = True
        with self._lock, suppress(OSError):  # disconnected already
            if self._sock is not None:
                self._sock.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Close the copy of the socket, and end the wait for the answer."""
        with self._lock:
            if self._sock is not None:
                self._sock.close()
        self.done.set()


def exchange(
    request: Request,
    timeout_s: float,
    *,
    tls: ssl.SSLContext | None = None,
    most_bytes: int = MOST_BYTES,
    stop: Flag | None = None,
) -> Answer:
    """Return the response. Raises ExchangeError if none arrives in time, Stopped if `stop` is set meanwhile."""
    attempt = _Attempt(time.monotonic() + timeout_s)
    host = request.host
    thread = threading.Thread(target=_run, args=(attempt, request, timeout_s, tls, most_bytes), daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise ExchangeError(f"{error}: the limit on processes (TasksMax, ulimit -u) or memory is reached") from error
    try:
        while not attempt.done.wait(max(0.0, min(_LOOK_S, attempt.deadline - time.monotonic()))):
            if stop is not None and stop.is_set():
                raise Stopped(f"stopped while waiting for {request.host}")
            if time.monotonic() >= attempt.deadline:
                raise ExchangeError(f"no complete response within {timeout_s:g} s{_through(request, host)}")
    finally:
        attempt.abandon()
    if attempt.answer is None:
        reason = str(attempt.error).strip() or type(attempt.error).__name__  # may quote the server
        raise ExchangeError(printable(reason[:_SHOWN]) + _through(request, host)) from attempt.error
    return attempt.answer


def _through(request: Request, host: str) -> str:
    """Return the end of a message: the proxy that urllib has put in the place of the host, without its password."""
    return "" if request.host == host else printable(f", through the proxy {request.host}"[:_SHOWN])


def _is_excluded(request: Request) -> bool:
    """Return whether a network in no_proxy has the host's address. urllib compares names only."""
    excluded = getproxies_environment().get("no", "").split(",")
    try:
        address = ip_address(urlsplit(request.full_url).hostname or "")
    except ValueError:
        return False
    for each in excluded:
        with suppress(ValueError):
            if address in ip_network(each.strip(), strict=False):
                return True
    return False


def _run(attempt: _Attempt, request: Request, timeout_s: float, tls: ssl.SSLContext | None, most_bytes: int) -> None:
    try:
        attempt.answer = _answer(attempt, request, timeout_s, tls, most_bytes)
    except (OSError, HTTPException, ValueError, ExchangeError) as error:  # ValueError: headers, addresses
        attempt.error = error
    finally:
        attempt.end()


def _answer(
    attempt: _Attempt, request: Request, timeout_s: float, tls: ssl.SSLContext | None, most_bytes: int
) -> Answer:
    direct = [ProxyHandler({})] if _is_excluded(request) else []
    opener = build_opener(_Stay, _Handler(attempt, tls), *direct)
    try:
        response: Any = opener.open(request, timeout=timeout_s)
    except HTTPError as error:
        response = error
    with response:
        body = bytearray()
        while piece := response.read1(_PIECE_BYTES):
            body += piece
            if len(body) > most_bytes:
                raise ExchangeError(f"the response is longer than {most_bytes} bytes")
            if time.monotonic() >= attempt.deadline:
                raise ExchangeError("the response takes too long")
        expected = response.headers.get("Content-Length")
        if expected is not None and expected != str(len(body)) and response.headers.get("Transfer-Encoding") is None:
            raise ExchangeError(f"the response ends after {len(body)} of {expected[:20]} bytes")
        return Answer(response.status, printable(response.headers.get_content_type()), bytes(body))


class _Stay(HTTPRedirectHandler):
    """Treats a redirect as a response."""

    def redirect_request(self, *_: Any) -> None: ...


class _Handler(HTTPHandler, HTTPSHandler):
    """Opens connections, with and without TLS, that another thread can shut down."""

    def __init__(self, attempt: _Attempt, context: ssl.SSLContext | None) -> None:
        super().__init__(context=context)
        self._attempt, self._context = attempt, context

    def http_open(self, req: Request) -> Any:
        return self.do_open(partial(self._connection, HTTPConnection), req)

    def https_open(self, req: Request) -> Any:
        return self.do_open(partial(self._connection, HTTPSConnection, context=self._context), req)

    def _connection(self, kind: type[HTTPConnection], host: str, **settings: Any) -> HTTPConnection:
        connection = kind(host, **settings)
        # http.client has no public way to the socket before a proxy's response.
        connection._create_connection = self._attempt.connect  # type: ignore[attr-defined]
        return connection
