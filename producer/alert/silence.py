"""Silent hosts, without I/O: those whose heartbeats have stopped, in one partition of the topic of heartbeats.

A host's own clock may be wrong: time is when a heartbeat was read. So who takes over gives every host a whole respite,
and goes on from `position`, from where each living host is heard at least once. And time in which nothing could be read
is left out: where Kafka was away, no host could be heard.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from producer.alert.model import Alert
from producer.alert.windows import MOST_GROUP, MOST_SEGS, Record

RULE, MEASURE = "silent", "silence"
MOST_HOSTS = 100_000
"""Hosts that are listened for at a time: others are passed over."""
_LEAST_S, _MOST_S = 0.1, 86_400.0
"""An interval between heartbeats."""
_SECOND_NS = 1_000_000_000
_STEP_NS = 5 * _SECOND_NS
"""All is read to the end once a second: of a longer time between two, this much counts."""


class _Heard(NamedTuple):
    """The last heartbeat of a host that lives."""

    offset: int
    sent_ns: int
    due_ns: int
    patience_s: float


class Hosts:
    """Which hosts are silent: not heard for `missed` of their own intervals, and not stopped as they should be."""

    def __init__(self, missed: float, known: Iterable[Alert], first: int) -> None:
        self._missed = missed
        self._living: dict[str, _Heard] = {}
        self._silent = {alert.group: alert for alert in known if alert.firing}
        self._changes: list[Alert] = []
        self._read_to_ns = 0
        self.next = first
        """The offset to read next."""

    @property
    def position(self) -> int:
        """The offset to go on from after a restart: of the oldest last heartbeat of the hosts that live."""
        return min((heard.offset for heard in self._living.values()), default=self.next)

    @property
    def firing(self) -> list[Alert]:
        """The silent hosts."""
        return list(self._silent.values())

    def heard(self, beat: Record, offset: int, sent_ns: int, now_ns: int) -> bool:
        """Take a heartbeat that is read now, and was sent at `sent_ns`; return whether there is room for its host.

        ValueError for numbers and names that no heartbeat has.
        """
        self.next = offset + 1
        host, interval_s = beat["host"], beat["interval_s"]
        # Not a number is in no range.
        if not (_LEAST_S <= interval_s <= _MOST_S and 0 <= sent_ns <= MOST_SEGS and len(host) <= MOST_GROUP):
            raise ValueError("no heartbeat has such an interval, time or name")
        is_known = host in self._living or host in self._silent
        if not is_known and len(self._living) + len(self._silent) >= MOST_HOSTS:
            return False
        self._take(beat["state"], host, offset, sent_ns, now_ns, self._missed * interval_s)
        return True

    def _take(self, state: str, host: str, offset: int, sent_ns: int, now_ns: int, patience_s: float) -> None:
        silent = self._silent.get(host)
        if silent is not None:
            if not self._read_to_ns and sent_ns <= silent.window_start_ns:  # read again: the alert is of later
                return
            resolved = replace(silent, firing=False, value=0.0, window_start_ns=sent_ns)
            self._changes.append(resolved)
            del self._silent[host]
        if state == "stopped":
            self._living.pop(host, None)
        else:
            self._living[host] = _Heard(offset, sent_ns, now_ns + round(patience_s * _SECOND_NS), patience_s)

    def look(self, read_to_ns: int) -> list[Alert]:
        """Return what has changed; `read_to_ns` is up to when all heartbeats have been read, or 0.

        A reader that lags would take its own delay for silence.
        """
        left_out_ns = read_to_ns - self._read_to_ns - _STEP_NS
        if self._read_to_ns and left_out_ns > 0:
            for host, heard in self._living.items():
                self._living[host] = heard._replace(due_ns=heard.due_ns + left_out_ns)
        self._read_to_ns = read_to_ns
        for host in sorted(host for host, heard in self._living.items() if heard.due_ns <= read_to_ns):
            heard = self._living.pop(host)
            silent_s = max(0.0, (read_to_ns - heard.sent_ns) / _SECOND_NS)
            self._silent[host] = _alert(host, silent_s, heard)
            self._changes.append(self._silent[host])
        changes, self._changes = self._changes, []
        return changes


def _alert(host: str, silent_s: float, heard: _Heard) -> Alert:
    return Alert(
        rule=RULE,
        by="host",
        group=host,
        firing=True,
        measure=MEASURE,
        value=silent_s,
        threshold=heard.patience_s,
        clear=heard.patience_s,
        window_start_ns=heard.sent_ns,
        window_s=heard.patience_s,
        segs=0,
        retransmitted_segs=0,
        since_ns=heard.sent_ns,
    )
