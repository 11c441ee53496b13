"""How `rebpf status` asks a producer: at its HTTP endpoint, or through the socket in its state folder.

Something else may answer there: the whole visit has a deadline and a size limit.
"""

import contextlib
import os
import stat
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from socket import AF_UNIX, SHUT_RDWR, socket
from typing import Any
from urllib.parse import urlsplit

from producer.errors import UnavailableError
from producer.host.text import parse_json, printable

_TIMEOUT_S = 5.0
_MOST_STATUS_BYTES = 1 << 20


class _LocalConnection(HTTPConnection):
    """A connection to a Unix socket. Others may have replaced it, so links are not followed."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        found = os.open(self._path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISSOCK(os.fstat(found).st_mode):
                raise OSError(f"{self._path} is not a socket")
            self.sock = socket(AF_UNIX)
            self.sock.settimeout(_TIMEOUT_S)
            self.sock.connect(f"/proc/self/fd/{found}")  # so that the path can have any length
        finally:
            os.close(found)


def ask(url: str, local: Path | None = None) -> dict[str, Any]:
    """Return the status of the producer whose endpoint is at `url`. Raises UnavailableError if it does not answer.

    If `local` is set, ask through that socket instead.
    """
    # The URL is from agent.json, so it is as trustworthy as whoever can write that file.
    try:
        own = _LocalConnection(local) if local else HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)
        with contextlib.closing(own) as connection, _deadline(connection):
            connection.request("GET", "/status")
            response = connection.getresponse()
            status = parse_json(response.read(_MOST_STATUS_BYTES))
    except (OSError, ValueError, RuntimeError, HTTPException) as error:  # RuntimeError: no thread
        why = f"the producer does not answer at {url}/status: {error or 'no response'}"
        raise UnavailableError(printable(why)) from error
    if not isinstance(status, dict):
        raise UnavailableError(f"{url}/status: expected the status of a producer, found something else")
    if response.status != HTTPStatus.OK:
        reasons = status.get("reasons")
        reason = reasons[0] if isinstance(reasons, list) and reasons else f"answers with HTTP status {response.status}"
        raise UnavailableError(printable(f"the producer {reason}"))
    return status


@contextlib.contextmanager
def _deadline(connection: HTTPConnection) -> Iterator[None]:
    """Connect, and disconnect when the time is over: the timeout of a socket bounds each read."""
    end_s = time.monotonic() + _TIMEOUT_S
    connection.connect()
    with connection.sock.dup() as own:  # http.client drops its socket before the body is read
        timer = threading.Timer(max(0.0, end_s - time.monotonic()), _disconnect, [own])
        timer.daemon = True
        timer.start()
        try:
            yield
        except (OSError, ValueError, HTTPException) as error:
            if time.monotonic() >= end_s:
                raise TimeoutError(f"no complete response within {_TIMEOUT_S:g} s") from error
            raise
        finally:
            timer.cancel()


def _disconnect(sock: socket) -> None:
    with contextlib.suppress(OSError):  # disconnected already
        sock.shutdown(SHUT_RDWR)
