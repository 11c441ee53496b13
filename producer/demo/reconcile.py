"""Compares the events in the topics with the kernel's counters. Pure computation, no input or output.

The kernel counts first transmissions in OutSegs, along with every SYN-ACK, also retransmitted ones. It counts
retransmissions in RetransSegs and, for some causes, in another counter; the other causes are the rest. The transmit
topic marks retransmitted segments, too, and the records of connections count them, so there are three sources for their
number.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from producer.view.line import is_connection, is_retransmission

_REST_CAUSES = ("rto", "tlp", "other")
_SYN_ACK = 0x12
_LOSSES = {
    "nested": "the kernel skipped runs in which a program would have interrupted itself",
    "unseen": "the kernel ran no program for them",
    "ring_full": "the agent was too slow, and the ring was full",
}


@dataclass(frozen=True, slots=True)
class Row:
    """Segments counted by events and by the kernel's `counter`."""

    what: str
    seen: int
    counter: str
    counted: int

    @property
    def difference(self) -> int:
        """Events minus the kernel's count."""
        return self.seen - self.counted

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON output."""
        return {**asdict(self), "difference": self.difference}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows of the table: all retransmissions, those by cause, marked ones, those of flows, and transmits."""

    retransmitted: Row
    causes: Sequence[Row]
    marked_retransmits: Row
    of_flows: Row
    first_transmissions: Row

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows in the order of the table."""
        return self.retransmitted, *self.causes, self.marked_retransmits, self.of_flows, self.first_transmissions

    @property
    def agrees(self) -> bool:
        """Whether every row agrees."""
        return not any(row.difference for row in self.rows)


@dataclass(slots=True)
class _Numbers:
    """The event numbers of one topic by CPU, to find duplicates and gaps."""

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
        self.first_transmissions = 0
        self.marked_retransmits = 0
        self._flows: Counter[int] = Counter()
        """Retransmitted segments by connection: the counters of a connection only increase."""
        self._syn_acks: set[tuple[Any, ...]] = set()
        self._numbers: dict[str, _Numbers] = defaultdict(_Numbers)

    def add(self, topic: str, record: Mapping[str, Any]) -> None:
        """Count one event."""
        self.events[topic] += 1
        self._numbers[topic].add(record["cpu"], record["cpu_seq"])
        if is_connection(record):
            self._flows[record["sk_cookie"]] = max(self._flows[record["sk_cookie"]], record["total_retrans"] or 0)
        elif is_retransmission(record):
            self.retransmitted[record["cause"]] += record["segs"]
        elif record["tcp_flags"] == _SYN_ACK:
            self._add_syn_ack(record)
        elif record["is_retransmit"]:
            self.marked_retransmits += record["segs"]
        else:
            self.first_transmissions += record["segs"]

    def _add_syn_ack(self, record: Mapping[str, Any]) -> None:
        # It has no socket with the history, but its initial sequence number identifies it.
        self.first_transmissions += 1
        key = tuple(record[name] for name in ("saddr", "sport", "daddr", "dport", "seq"))
        self.marked_retransmits += key in self._syn_acks
        self._syn_acks.add(key)

    @property
    def retransmitted_by_flows(self) -> int:
        """Retransmitted segments by the last record of each connection."""
        return self._flows.total()

    @property
    def repeated(self) -> int:
        """Number of events read more than once."""
        return sum(numbers.repeated for numbers in self._numbers.values())

    @property
    def missing(self) -> int:
        """Number of gaps below the highest event numbers."""
        return sum(numbers.missing for numbers in self._numbers.values())


def compare(tally: Tally, counters: Mapping[str, int]) -> Comparison:
    """Compare the events with the counters, which started at 0 with them."""
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
        (*by_cause, Row(f"  {', '.join(_REST_CAUSES)}", rest, "RetransSegs minus those", counted_rest)),
        Row("marked as retransmitted", tally.marked_retransmits, "RetransSegs", counters["RetransSegs"]),
        Row("of connections", tally.retransmitted_by_flows, "RetransSegs", counters["RetransSegs"]),
        Row("first transmissions", tally.first_transmissions, "OutSegs", counters["OutSegs"]),
    )


def reasons(tally: Tally, comparison: Comparison, balance: Mapping[str, Any]) -> list[str]:
    """Explain differences by the producer's balance and the events; empty if there are none."""
    found = _losses(tally, balance)
    skipped = tally.marked_retransmits - tally.retransmitted.total()
    is_told = any({"nested", "unseen"} & account["lost"].keys() for account in balance.values())
    if skipped > 0 and not is_told and not comparison.marked_retransmits.difference:
        found.append(
            f"{skipped} segments are marked as retransmitted in the transmit topic, but not in the retransmit topic:"
            " this kernel did not run the retransmit hook for them"
        )
    if comparison.first_transmissions.difference < 0:
        found.append(
            f"{-comparison.first_transmissions.difference} segments of OutSegs are not in the transmit topic: segments"
            " without a socket, such as acknowledgements from TIME_WAIT and resets, pass no hook"
        )
    if not found and not comparison.agrees:
        found.append("no event was lost, but the hooks and the kernel's counters see this traffic differently")
    return found


def _losses(tally: Tally, balance: Mapping[str, Any]) -> list[str]:
    found = []
    for topic, account in balance.items():
        for why, count in account["lost"].items():
            meaning = f" ({_LOSSES[why]})" if why in _LOSSES else ""
            found.append(f"{topic}: {count} events lost, {why}{meaning}")
        unread = account["delivered"] - tally.events[topic]
        if unread > 0:
            found.append(f"{topic}: {unread} events were delivered to the broker, but not read back")
    if tally.repeated:
        found.append(f"{tally.repeated} events were read twice")
    return found
