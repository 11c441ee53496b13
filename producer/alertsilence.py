"""The core of alerting on silence, without I/O: hosts whose heartbeats have stopped.

Time is that of the heartbeats' arrival, which the reader passes in: a host's own clock may be wrong.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Silence(NamedTuple):
    """A change: a host has gone silent, or is heard again."""

    host: str
    silent: bool
    last_s: float
    """When it was heard last, or is heard again, in seconds since 1970 UTC."""


class Hosts:
    """Which hosts are silent: not heard for `missed` of their intervals, and not stopped as they should be."""

    def __init__(self, missed: float = 3) -> None:
        self._missed = missed
        self._last_s: dict[str, float] = {}
        self._due_s: dict[str, float] = {}
        self.silent: set[str] = set()

    def heard(self, heartbeat: Mapping[str, Any], arrived_s: float) -> list[Silence]:
        """Take a heartbeat; one that is older than the last of its host changes nothing."""
        host = heartbeat["host"]
        if arrived_s < self._last_s.get(host, arrived_s):
            return []
        self._last_s[host] = arrived_s
        self._due_s[host] = arrived_s + self._missed * heartbeat["interval_s"]
        if heartbeat["state"] == "stopped":
            del self._due_s[host]
        if host not in self.silent:
            return []
        self.silent.remove(host)
        return [Silence(host, False, arrived_s)]

    def look(self, now_s: float) -> list[Silence]:
        """Return the hosts that have gone silent since the last look.

        `now_s` is up to when all heartbeats have been read: a reader that lags would take its own delay for silence.
        """
        gone = sorted(host for host, due_s in self._due_s.items() if due_s < now_s)
        for host in gone:
            del self._due_s[host]
        self.silent.update(gone)
        return [Silence(host, True, self._last_s[host]) for host in gone]
