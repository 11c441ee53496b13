"""Notifications to systemd, and its file descriptor store: the protocol of sd_notify(3).

A message is a datagram of lines KEY=VALUE to the Unix socket in NOTIFY_SOCKET, with attached file descriptors. systemd
processes the messages of a service in order, even after the sender was killed. Standard library only.
"""

import functools
import logging
import os
import select
import socket
from array import array
from collections.abc import Sequence

from producer.errors import UnavailableError
from producer.host.log_limit import LogLimit
from producer.host.text import printable

logger = logging.getLogger(__name__)

_MOST_USEC = (1 << 63) - 1
_MOST_SHOWN = 40
_MOST_STATUS = 1024
REPEAT_LOG_S = 3600.0
TIMEOUT_S = 30.0  # for a full queue, while systemd itself hangs

_NOTIFY_TIMEOUT_S = 0.1


def notify(
    text: str, descriptors: Sequence[int] = (), *, status: str | None = None, timeout_s: float | None = None
) -> bool:
    """Send a message; return False without a service manager. Raises UnavailableError if it cannot be sent.

    `status` is the line for systemctl status. Line breaks in it are escaped, so they cannot add assignments.
    """
    if status is not None:
        text = "\n".join(filter(None, (text, f"STATUS={printable(status)[:_MOST_STATUS]}")))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    try:
        channel = _channel()
        channel.settimeout(TIMEOUT_S if timeout_s is None else timeout_s)
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.sendmsg([text.encode()], rights)
    except OSError as error:
        raise UnavailableError(f"the service manager at NOTIFY_SOCKET {address}: {error}") from error
    return True


@functools.cache
def _channel() -> socket.socket:
    """Return the socket of all messages: later there may be no free descriptor for another one."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


def is_service() -> bool:
    """Whether a service manager has started this process."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def try_notify(
    text: str, status: str | None = None, timeout_s: float = _NOTIFY_TIMEOUT_S, *, limit: LogLimit | None = None
) -> None:
    """Send a message, or log a warning: a service manager that hangs, or is gone, must not block or end the caller.

    `limit` is for messages that are repeated.
    """
    try:
        notify(text, status=status, timeout_s=timeout_s)
    except UnavailableError as error:
        if limit is None or limit.allows(text):
            logger.warning("systemd: cannot send %s: %s", text or "the status", error)


def barrier() -> None:
    """Return once systemd has processed all messages sent so far.

    systemd closes a descriptor when it reaches its message; before version 246, which has no BARRIER, because it does
    not use the descriptor.
    """
    ours, theirs = os.pipe()
    try:
        try:
            sent = notify("BARRIER=1", [theirs])
        finally:
            os.close(theirs)
        hangup = select.poll()
        hangup.register(ours, 0)  # POLLHUP is always reported
        if sent and not hangup.poll(TIMEOUT_S * 1000):
            raise UnavailableError(f"the service manager has not answered within {TIMEOUT_S:.0f} s")
    finally:
        os.close(ours)


def number(variable: str, most: int) -> int:
    """Return the number in an environment variable; 0 with a warning if it is not a number from 0 to `most`."""
    text = os.environ.get(variable, "")
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > len(str(most)) or int(text) > most:
        logger.warning("%s=%r is ignored: expected a number from 0 to %d", variable, text[:_MOST_SHOWN], most)
        return 0
    return int(text)


class Watchdog:
    """Notifies systemd of the process's progress, twice per WatchdogSec= of the unit; see sd_watchdog(3).

    Without a notification for that long, systemd restarts the process.
    """

    def __init__(self) -> None:
        mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._interval_s = number("WATCHDOG_USEC", _MOST_USEC) / 2e6 if mine else 0.0
        self._next = 0.0
        self._log_limit = LogLimit(REPEAT_LOG_S)

    def step(self, now_s: float) -> None:
        """Report progress at `now_s` of the monotonic clock. Nothing that the host lacks can make this fail."""
        if self._interval_s and now_s >= self._next:
            self._next = now_s + self._interval_s
            try_notify("WATCHDOG=1", limit=self._log_limit)
