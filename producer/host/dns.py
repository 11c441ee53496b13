"""Resolves host names without blocking: the C library's name resolution has no configurable timeout."""

import errno
import ipaddress
import socket
import threading


class Lookup:
    """Resolves a host name to an IPv4 address, in a thread; addresses are returned as they are."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._thread: threading.Thread | None = None
        self._found: str | OSError = ""

    def address(self, wait_s: float = 0.0) -> str:
        """Return the address. Raises OSError if the name does not resolve, or not within `wait_s`; then ask again."""
        try:
            return str(ipaddress.ip_address(self._host))
        except ValueError:
            pass
        if self._thread is None:
            thread = threading.Thread(target=self._look, name="lookup", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, str(error)) from error
            self._thread = thread
        self._thread.join(wait_s)
        if self._thread.is_alive():
            raise OSError(errno.EAGAIN, "the name is not resolved yet")
        self._thread = None
        if isinstance(self._found, OSError):
            raise self._found
        return self._found

    def _look(self) -> None:
        try:
            self._found = str(socket.getaddrinfo(self._host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            self._found = error
