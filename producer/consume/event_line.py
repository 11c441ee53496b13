"""Formats an event as one line, in tcpdump's notation: transmits in green, retransmits in yellow and red.

Records of connections are in cyan.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from rich.color import ColorSystem
from rich.style import Style

from producer.host.endpoints import endpoint
from producer.host.text import printable

# tcpdump's letters, in its order, by the bit in the flags byte.
_FLAGS = ((1, "F"), (2, "S"), (4, "R"), (8, "P"), (16, "."), (32, "U"), (64, "E"), (128, "W"))
_FLAG_TEXTS = tuple("".join(letter for bit, letter in _FLAGS if flags & bit) or "none" for flags in range(256))
_MOST_PART = 512
"""Most characters of a part of a line, before escaping."""
_MOST_REASON = 100
_MOST_REASONS = 100


def flag_letters(tcp_flags: int) -> str:
    """Return the flags byte as tcpdump prints it, without the brackets."""
    return _FLAG_TEXTS[tcp_flags & 0xFF]


def is_retransmit_event(record: Mapping[str, Any]) -> bool:
    """Return whether this is a retransmit event, by a field that only these have."""
    return "cause" in record


def is_flow_record(record: Mapping[str, Any]) -> bool:
    """Return whether this is the record of a connection, by a field that only these have."""
    return "reason" in record


class EventFormatter:
    """Formats records as lines, without line ends. `rejected` counts records that cannot be formatted, by reason."""

    def __init__(self, *, color: bool) -> None:
        self._color = color
        self.rejected: Counter[str] = Counter()

    def lines(self, records: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return the lines of a consumer's batch, in order of time.

        Kafka keeps the order only within a partition; each flow has one partition.
        """
        shown = []
        for record in records:
            try:
                shown.append((record["ts_ns"], self.line(record)))
            except LookupError as error:
                self._reject(f"no field {error}")
            except (TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
                self._reject(f"{type(error).__name__}: {error}")
        return [line for _, line in sorted(shown, key=lambda each: each[0])]

    def _reject(self, reason: str) -> None:
        cut = printable(reason[:_MOST_REASON])
        self.rejected[cut if cut in self.rejected or len(self.rejected) < _MOST_REASONS else "other reasons"] += 1

    def line(self, record: Mapping[str, Any]) -> str:
        """Format a record of any topic of events.

        Raises LookupError for a missing field, and TypeError, ValueError, AttributeError, ArithmeticError or OSError
        for one of another type.
        """
        time = f"{datetime.fromtimestamp(record['ts_ns'] / 1e9):%H:%M:%S.%f}"
        if is_flow_record(record):
            return f"{self._paint(time, 'dim')} {self._paint(self._clean(_flow(record)), 'cyan')}"
        segment = self._clean(_segment(record))
        if not is_retransmit_event(record):
            return f"{self._paint(time, 'dim')} {self._paint(segment, 'green')}"
        why = self._clean(_retransmission(record))
        return f"{self._paint(time, 'dim')} {self._paint(segment, 'yellow')} {self._paint(why, 'bold red')}"

    def _paint(self, text: str, style: str) -> str:
        # rich's markup and wrapping would cost several times as much as the line itself.
        return Style.parse(style).render(text, color_system=ColorSystem.STANDARD) if self._color else text

    def _clean(self, text: str) -> str:
        # Untrusted: no escape sequence may reach the terminal.
        return printable(text if len(text) <= _MOST_PART else text[:_MOST_PART] + "...[cut]")


def _segment(record: Mapping[str, Any]) -> str:
    source = endpoint(record["saddr"], record["sport"])
    destination = endpoint(record["daddr"], record["dport"])
    ack = "" if record["ack_seq"] is None else f" ack {record['ack_seq']}"
    return (
        f"{source} > {destination} [{flag_letters(record['tcp_flags'])}] seq {record['seq']}:{record['end_seq']}{ack}"
        f" len {record['payload_len']} segs {record['segs']}"
    )


def _flow(record: Mapping[str, Any]) -> str:
    words = [endpoint(record["saddr"], record["sport"]), ">", endpoint(record["daddr"], record["dport"])]
    words += [record["reason"], record["error"] or record["state"]]
    for name, field in (("out", "bytes_sent"), ("in", "bytes_received"), ("segs", "segs_out")):
        if record[field] is not None:
            words.append(f"{name} {record[field]}")
    if record["total_retrans"]:
        words.append(f"retransmitted {record['total_retrans']}")
    if record["srtt_us"] is not None:
        words.append(f"srtt {_milliseconds(record['srtt_us'])}")
    if record["comm"] is not None:
        words.append(f"{record['role'] or 'process'} {record['comm']}")
    return " ".join(words)


def _retransmission(record: Mapping[str, Any]) -> str:
    words = ["retransmit", record["cause"]]
    if record["retransmit_no"] is not None:
        words.append(f"#{record['retransmit_no']}")
    for name in ("rto_us", "srtt_us"):
        if record[name] is not None:
            words.append(f"{name[:-3]} {_milliseconds(record[name])}")
    if record["err"]:
        words.append(f"err {record['err']}")
    return " ".join(words)


def _milliseconds(us: int) -> str:
    return f"{us / 1000:.3g}ms" if us < 1_000_000 else f"{us / 1000:.0f}ms"
