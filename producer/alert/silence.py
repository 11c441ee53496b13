"""Silent hosts, without I/O: hosts whose heartbeats have stopped, in one partition of the heartbeat topic.

A host's own clock may be wrong, so time is when a heartbeat was read. A new owner therefore gives every host a full
timeout, and resumes from `position`, from which each live host has at least one heartbeat. Time in which nothing could
be read, because Kafka was unavailable, does not count.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from producer.alert.model import Alert
from producer.alert.windows import MOST_GROUP, MOST_SEGS
from producer.config.alerts import SILENT

MEASURE = "silence"
MOST_HOSTS = 100_000
"""Most hosts to track; others are ignored."""
_LEAST_S, _MOST_S = 0.1, 86_400.0
"""Valid intervals between heartbeats."""
_SECOND_NS = 1_000_000_000
_STEP_NS = 5 * _SECOND_NS
"""The partition is read to its end once a second. Of a longer pause, only this much counts."""


class _Heard(NamedTuple):
    """The last heartbeat of a live host."""

    offset: int
    sent_ns: int
    due_ns: int
    timeout_s: float


class Hosts:
    """Finds silent hosts: no heartbeat for `missed` of their intervals, and the last one did not report `stopped`."""

    def __init__(self, missed: float, last_alerts: Iterable[Alert]) -> None:
        self._missed = missed
        self._live: dict[str, _Heard] = {}
        self._silent = {alert.group: alert for alert in last_alerts if alert.firing}
        self._changes: list[Alert] = []
        self._read_to_ns = 0
        self.next = 0
        """The offset to read next."""

    @property
    def position(self) -> int:
        """The offset to resume from: the oldest of the last heartbeats of live hosts."""
        return min((heard.offset for heard in self._live.values()), default=self.next)

    @property
    def firing(self) -> list[Alert]:
        """The silent hosts."""
        return list(self._silent.values())

    def heard(self, beat: Mapping[str, Any], offset: int, sent_ns: int, now_ns: int) -> bool:
        """Record a heartbeat sent at `sent_ns` and read now; return False if too many hosts are tracked.

        Raises ValueError for impossible numbers and names.
        """
        self.next = offset + 1
        host, interval_s = beat["host"], beat["interval_s"]
        # NaN is in no range.
        if not (_LEAST_S <= interval_s <= _MOST_S and 0 <= sent_ns <= MOST_SEGS and len(host) <= MOST_GROUP):
            raise ValueError("interval, time or name out of range")
        is_known = host in self._live or host in self._silent
        if not is_known and len(self._live) + len(self._silent) >= MOST_HOSTS:
            return False
        self._take(beat["state"], host, offset, sent_ns, now_ns, self._missed * interval_s)
        return True

    def _take(self, state: str, host: str, offset: int, sent_ns: int, now_ns: int, timeout_s: float) -> None:
        silent = self._silent.get(host)
        if silent is not None:
            if not self._read_to_ns and sent_ns <= silent.window_start_ns:  # an old heartbeat, read again
                return
            resolved = replace(silent, firing=False, value=0.0, window_start_ns=sent_ns)
            self._changes.append(resolved)
            del self._silent[host]
        if state == "stopped":
            self._live.pop(host, None)
        else:
            self._live[host] = _Heard(offset, sent_ns, now_ns + round(timeout_s * _SECOND_NS), timeout_s)

    def changes(self, read_to_ns: int) -> list[Alert]:
        """Return the changes; `read_to_ns` is the time up to which all heartbeats have been read, or 0.

        A lagging reader must not take its own delay for silence.
        """
        unread_ns = read_to_ns - self._read_to_ns - _STEP_NS
        if self._read_to_ns and unread_ns > 0:
            for host, heard in self._live.items():
                self._live[host] = heard._replace(due_ns=heard.due_ns + unread_ns)
        elif 0 < read_to_ns < self._read_to_ns:  # the clock was set back
            for host, heard in self._live.items():
                latest_ns = read_to_ns + round(heard.timeout_s * _SECOND_NS)
                self._live[host] = heard._replace(due_ns=min(heard.due_ns, latest_ns))
        self._read_to_ns = read_to_ns
        for host in sorted(host for host, heard in self._live.items() if heard.due_ns <= read_to_ns):
            heard = self._live.pop(host)
            silent_s = max(0.0, (read_to_ns - heard.sent_ns) / _SECOND_NS)
            self._silent[host] = _alert(host, silent_s, heard)
            self._changes.append(self._silent[host])
        changes, self._changes = self._changes, []
        return changes


def _alert(host: str, silent_s: float, heard: _Heard) -> Alert:
    return Alert(
        rule=SILENT,
        by="host",
        group=host,
        firing=True,
        measure=MEASURE,
        value=silent_s,
        threshold=heard.timeout_s,
        clear=heard.timeout_s,
        window_start_ns=heard.sent_ns,
        window_s=heard.timeout_s,
        segs=0,
        retransmitted_segs=0,
        since_ns=heard.sent_ns,
    )
