"""What a service tells systemd, and what systemd keeps for it: the protocol of sd_notify(3).

A message is a datagram of lines KEY=VALUE to the Unix socket in NOTIFY_SOCKET, with file descriptors beside it. systemd
takes the messages of a service in their order, those too of a process that was killed meanwhile. Standard library only.
"""

import logging
import os
import select
import socket
from collections.abc import Callable, Sequence

from producer.errors import UnavailableError
from producer.host.text import printable

logger = logging.getLogger(__name__)

_MOST_USEC = (1 << 63) - 1
_MOST_SHOWN = 40
_MOST_STATUS = 1024
_TIMEOUT_S = 30.0  # for a queue that is full: as long as systemd itself is stuck

_TELL_TIMEOUT_S = 0.1


def notify(
    text: str, descriptors: Sequence[int] = (), *, status: str | None = None, timeout_s: float | None = None
) -> bool:
    """Send a message; return False where no service manager listens. UnavailableError where it does not take it.

    `status` is the line that systemctl status shows. A line break in it makes no assignment of its own.
    """
    if status is not None:
        text += f"\nSTATUS={printable(status)[:_MOST_STATUS]}"
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.settimeout(_TIMEOUT_S if timeout_s is None else timeout_s)
        try:
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            socket.send_fds(channel, [text.encode()], descriptors)
        except OSError as error:
            raise UnavailableError(f"the service manager at NOTIFY_SOCKET {address}: {error}") from error
    return True


def tell(text: str, status: str | None = None) -> None:
    """Send a message that may be lost: a service manager that is stuck or gone neither delays nor ends the caller."""
    try:
        notify(text, status=status, timeout_s=_TELL_TIMEOUT_S)
    except UnavailableError as error:
        logger.warning("systemd: not told %s: %s", text, error)


def barrier() -> None:
    """Return when all messages sent so far have been taken account of.

    systemd closes a descriptor when it is at its message; before 246, which knows no BARRIER, as one that it has no use
    for.
    """
    ours, theirs = os.pipe()
    try:
        try:
            sent = notify("BARRIER=1", [theirs])
        finally:
            os.close(theirs)
        hangup = select.poll()
        hangup.register(ours, 0)  # POLLHUP comes unasked
        if sent and not hangup.poll(_TIMEOUT_S * 1000):
            raise UnavailableError(f"the service manager has not answered within {_TIMEOUT_S:.0f} s")
    finally:
        os.close(ours)


def number(variable: str, most: int) -> int:
    """Return the number in an environment variable; 0, and a warning, where that is no number from 0 to `most`."""
    text = os.environ.get(variable, "")
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > len(str(most)) or int(text) > most:
        logger.warning("%s=%r is ignored: expected a number from 0 to %d", variable, text[:_MOST_SHOWN], most)
        return 0
    return int(text)


class Watchdog:
    """Tells systemd that the process makes progress, as often as WatchdogSec= of the unit asks for; see sd_watchdog(3).

    Where no word comes for that long, systemd ends the process and starts it again.
    """

    def __init__(self) -> None:
        mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._interval_s = number("WATCHDOG_USEC", _MOST_USEC) / 2e6 if mine else 0.0
        self._next = 0.0

    def step(self, now_s: float, status: Callable[[], str]) -> None:
        """Note progress at `now_s` of the monotonic clock; `status` makes the line that systemctl status shows."""
        if self._interval_s and now_s >= self._next:
            self._next = now_s + self._interval_s
            tell("WATCHDOG=1", status())
