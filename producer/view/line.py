"""Records as lines in fixed columns: what happened, the segment, who. The flow is last, because it may be long."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from rich.color import ColorSystem
from rich.style import Style

from producer.events import FLOWS, RETRANSMITS, Stream
from producer.host.endpoints import endpoint
from producer.host.text import printable
from producer.view.records import Records

Record = Mapping[str, Any]

_MAX_FLOWS = 16_384
"""Flows whose first sequence number is remembered."""
_MAX_TEXT = 256
_WITH_FLOW = 100
"""Narrower screens show the peer alone."""
_HALF, _WHOLE = 1 << 31, 1 << 32
_MS, _S = 1_000, 1_000_000
FAULT, WARNING, ORDINARY = "bold red", "yellow", "dim"
_STYLES = {"rto": FAULT, "syn": FAULT, "syn_ack": FAULT}


class _Column(NamedTuple):
    title: str
    width: int
    """Of the text; negative aligns to the left, and 0 is the last column, of any width."""
    least: int
    """Shown on screens of at least this width."""
    text: Callable[["Lines", Stream, Record], str]
    most: int = 1 << 16


def is_event(stream: Stream, record: Record) -> bool:
    """Return whether a trace shows a record: no retransmission twice, and of connections only those that failed."""
    if stream == FLOWS:
        return record["reason"] == "close" and record["error"] is not None
    return stream == RETRANSMITS or not record["is_retransmit"]


class Lines:
    """Formats events as lines. `hosts` adds the host; without `color`, lines are plain."""

    def __init__(self, width: int, *, hosts: bool, color: bool) -> None:
        fitting = (each for each in _COLUMNS if each.least <= width <= each.most)
        self._columns = [each for each in fitting if hosts or each.title != "HOST"]
        self._color = color
        self._first: OrderedDict[Any, int] = OrderedDict()

    def header(self) -> str:
        """Return the titles."""
        return " ".join(_fit(each.title, each.width) for each in self._columns).rstrip()

    def lines(self, records: Records) -> Iterator[str]:
        """Yield a line for each event."""
        for record in records.rows():
            if is_event(records.stream, record):
                yield self._line(records.stream, record)

    def _line(self, stream: Stream, record: Record) -> str:
        cells = [_fit(printable(each.text(self, stream, record)[:_MAX_TEXT]), each.width) for each in self._columns]
        line = " ".join(cells).rstrip()
        if not self._color:
            return line
        return Style.parse(_style(stream, record)).render(line, color_system=ColorSystem.STANDARD)

    def _sequence(self, stream: Stream, record: Record) -> str:
        """Return the first byte's number, counted from the first segment of the flow that was seen."""
        if stream == FLOWS:
            return ""
        key = flow_key(record)
        first = self._first.setdefault(key, record["seq"])
        self._first.move_to_end(key)
        if len(self._first) > _MAX_FLOWS:
            self._first.popitem(last=False)
        return str((record["seq"] - first + _HALF) % _WHOLE - _HALF)


def flow_key(record: Record) -> tuple[Any, ...]:
    """Return what identifies a connection."""
    if record["sk_cookie"]:
        return record["host"], record["boot_id"], record["sk_cookie"]
    return tuple(record[name] for name in ("host", "boot_id", "netns", "saddr", "sport", "daddr", "dport"))


def who(record: Record) -> str:
    """Return the process, the unit or the container of a record."""
    unit = (record.get("unit") or "").removesuffix(".service")
    return record.get("comm") or unit or (record.get("container") or "")[:12] or "-"


def duration(us: int | None) -> str:
    """Return microseconds with three digits and a unit."""
    if us is None:
        return "-"
    return f"{us}us" if us < _MS else f"{us / _MS:.3g}ms" if us < _S - _MS / 2 else f"{us / _S:.3g}s"


def _style(stream: Stream, record: Record) -> str:
    if stream == FLOWS:
        return FAULT
    return _STYLES.get(record["cause"], WARNING) if stream == RETRANSMITS else ORDINARY


def _fit(text: str, width: int) -> str:
    size = abs(width)
    if len(text) > size > 0:
        text = text[: size - 1] + "~"
    return text.ljust(size) if width <= 0 else text.rjust(size)


def _cause(_: Lines, stream: Stream, record: Record) -> str:
    if stream == RETRANSMITS:
        number = record["retransmit_no"]
        return f"{record['cause']} #{number}" if number else str(record["cause"])
    if stream == FLOWS:
        return f"{'connect' if record['state'] == 'SYN_SENT' else 'close'} {record['error']}"
    return "sent"


def _flow(_: Lines, stream: Stream, record: Record) -> str:
    return f"{endpoint(record['saddr'], record['sport'])} > {endpoint(record['daddr'], record['dport'])}"


def _count(name: str) -> Callable[[Lines, Stream, Record], str]:
    def text(_: Lines, stream: Stream, record: Record) -> str:
        value = record.get(name)
        return "-" if value is None else str(value)

    return text


def _time_of(name: str) -> Callable[[Lines, Stream, Record], str]:
    return lambda _, stream, record: duration(record.get(name))


def _time(_: Lines, stream: Stream, record: Record) -> str:
    return f"{datetime.fromtimestamp(record['ts_ns'] / 1e9):%H:%M:%S.%f}"[:-3]


def _peer(_: Lines, stream: Stream, record: Record) -> str:
    return endpoint(record["daddr"], record["dport"])


_COLUMNS = (
    _Column("TIME", -12, 0, _time),
    _Column("CAUSE", -20, 0, _cause),
    _Column("HOST", -16, 0, lambda _, stream, record: str(record["host"])),
    _Column("SEQ", 10, _WITH_FLOW, Lines._sequence),
    _Column("LEN", 6, 120, _count("payload_len")),
    _Column("SEGS", 4, 150, _count("segs")),
    _Column("RTO", 6, 0, _time_of("rto_us")),
    _Column("SRTT", 6, 120, _time_of("srtt_us")),
    _Column("CWND", 5, 150, _count("snd_cwnd")),
    _Column("LOST", 4, 150, _count("lost_out")),
    _Column("WHO", -15, 0, lambda _, stream, record: who(record)),
    _Column("PEER", 0, 0, _peer, most=_WITH_FLOW - 1),
    _Column("FLOW", 0, _WITH_FLOW, _flow),
)
