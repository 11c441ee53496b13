"""What was read from the topics beside the kernel's own counters: pure counting, no input or output.

The kernel counts what it sends for the first time in OutSegs, and every SYN-ACK too, also one sent again. What it sends
again it counts in RetransSegs and, by cause, in one of the others; a cause without a counter of its own is in the rest.
The transmit topic marks what was sent before, and so is a second witness of the retransmits.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from producer.consume.event_line import is_retransmit_event

_REST_CAUSES = ("rto", "tlp", "other")
_SYN_ACK = 0x12
_LOSSES = {
    "nested": "the kernel skipped runs in which a program would have interrupted itself",
    "ring_full": "the agent came too late to a full ring",
}


@dataclass(frozen=True, slots=True)
class Row:
    """Segments by the events, and by the kernel; `counter` names the kernel's."""

    what: str
    seen: int
    counter: str
    counted: int

    @property
    def difference(self) -> int:
        """By how much the events say more than the kernel."""
        return self.seen - self.counted

    def as_dict(self) -> dict[str, Any]:
        """Return the row as it is printed in JSON."""
        return {**asdict(self), "difference": self.difference}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows of the table: retransmits in all and by cause, and both kinds of transmit."""

    retransmitted: Row
    causes: Sequence[Row]
    sent_again: Row
    sent_first: Row

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, in the table's order."""
        return self.retransmitted, *self.causes, self.sent_again, self.sent_first

    @property
    def agrees(self) -> bool:
        """Whether every row does."""
        return not any(row.difference for row in self.rows)


@dataclass(slots=True)
class _Numbers:
    """The event numbers of one topic, by CPU: each comes once, and none is left out."""

    by_cpu: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    repeated: int = 0

    def add(self, cpu: int, cpu_seq: int) -> None:
        seen = self.by_cpu[cpu]
        self.repeated += cpu_seq in seen
        seen.add(cpu_seq)

    @property
    def missing(self) -> int:
        return sum(max(seen) - len(seen) for seen in self.by_cpu.values())


class Tally:
    """Counts events as they are read."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.retransmitted: Counter[str] = Counter()
        self.sent_first = 0
        self.sent_again = 0
        self._syn_acks: set[tuple[Any, ...]] = set()
        self._numbers: dict[str, _Numbers] = defaultdict(_Numbers)

    def add(self, topic: str, record: Mapping[str, Any]) -> None:
        """Count one event."""
        self.events[topic] += 1
        self._numbers[topic].add(record["cpu"], record["cpu_seq"])
        if is_retransmit_event(record):
            self.retransmitted[record["cause"]] += record["segs"]
        elif record["tcp_flags"] == _SYN_ACK:
            self._add_syn_ack(record)
        elif record["is_retransmit"]:
            self.sent_again += record["segs"]
        else:
            self.sent_first += record["segs"]

    def _add_syn_ack(self, record: Mapping[str, Any]) -> None:
        # It has no socket that could tell whether it was sent before; its initial sequence number does.
        self.sent_first += 1
        key = tuple(record[name] for name in ("saddr", "sport", "daddr", "dport", "seq"))
        self.sent_again += key in self._syn_acks
        self._syn_acks.add(key)

    @property
    def repeated(self) -> int:
        """Events that were read more than once."""
        return sum(numbers.repeated for numbers in self._numbers.values())

    @property
    def missing(self) -> int:
        """Event numbers below the highest read that were not read."""
        return sum(numbers.missing for numbers in self._numbers.values())


def compare(tally: Tally, counters: Mapping[str, int]) -> Comparison:
    """Set the events against the counters, which began at 0 with them."""
    causes = tally.retransmitted
    by_cause = (
        Row("  fast", causes["fast"], "TCPFastRetrans", counters["TCPFastRetrans"]),
        Row("  slow_start", causes["slow_start"], "TCPSlowStartRetrans", counters["TCPSlowStartRetrans"]),
        Row("  syn, syn_ack", causes["syn"] + causes["syn_ack"], "TCPSynRetrans", counters["TCPSynRetrans"]),
    )
    rest = sum(causes[cause] for cause in _REST_CAUSES)
    counted_rest = counters["RetransSegs"] - sum(row.counted for row in by_cause)
    return Comparison(
        Row("retransmitted", causes.total(), "RetransSegs", counters["RetransSegs"]),
        (*by_cause, Row(f"  {', '.join(_REST_CAUSES)}", rest, "RetransSegs less those", counted_rest)),
        Row("transmitted again", tally.sent_again, "RetransSegs", counters["RetransSegs"]),
        Row("transmitted first", tally.sent_first, "OutSegs", counters["OutSegs"]),
    )


def reasons(tally: Tally, comparison: Comparison, balance: Mapping[str, Any]) -> list[str]:
    """Say why the numbers differ, as far as the producer's balance and the events tell; empty if they agree."""
    found = _losses(tally, balance)
    skipped = tally.sent_again - tally.retransmitted.total()
    nested = any("nested" in account["lost"] for account in balance.values())
    if skipped > 0 and not nested and not comparison.sent_again.difference:
        found.append(
            f"{skipped} segments are in the transmit topic as sent again and not in the retransmit topic:"
            " this kernel did not run the retransmit hook for them"
        )
    if comparison.sent_first.difference < 0:
        found.append(
            f"{-comparison.sent_first.difference} segments of OutSegs are not in the transmit topic: what the kernel"
            " sends without a socket, an acknowledgement from TIME_WAIT or a reset, passes no hook"
        )
    if not found and not comparison.agrees:
        found.append("no event was lost: the hooks and the kernel's counters see this traffic differently")
    return found


def _losses(tally: Tally, balance: Mapping[str, Any]) -> list[str]:
    found = []
    for topic, account in balance.items():
        for why, count in account["lost"].items():
            meaning = f" ({_LOSSES[why]})" if why in _LOSSES else ""
            found.append(f"{topic}: {count} events lost, {why}{meaning}")
        unread = account["delivered"] - tally.events[topic]
        if unread > 0:
            found.append(f"{topic}: {unread} events were delivered to the broker and not read back")
    if tally.repeated:
        found.append(f"{tally.repeated} events were read twice")
    return found
