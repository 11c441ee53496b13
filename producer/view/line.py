"""Records as lines in fixed columns: what happened, the segment, who. The flow is last, because it may be long."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from producer.connections import GIVEN_UP
from producer.host.endpoints import endpoint
from producer.host.text import printable
from producer.view.cells import fit, size, styled

Record = Mapping[str, Any]

_MAX_FLOWS = 16_384
"""Flows whose first sequence number is remembered."""
_MAX_TEXT = 256
_MAX_REASON = 100
_MAX_REASONS = 100
_SHORT = 6
"""The length of what a connection did that leaves room for its retransmissions: open or closed."""
_HOST_WIDTH = 16
_WITH_WHO = 71
"""Narrower screens cut the process, so that a peer has room."""
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
    """Shown on screens of at least this width, to which that of the host is added if it is shown."""
    text: Callable[["Lines", Record], str]
    most: int = 1 << 16


def is_retransmission(record: Record) -> bool:
    """Return whether this is a retransmit event, by a field that only these have."""
    return "cause" in record


def is_connection(record: Record) -> bool:
    """Return whether this is a record of a connection."""
    return "reason" in record


def is_event(record: Record) -> bool:
    """Return whether a trace shows a record: no retransmission twice, and of connections only those that failed."""
    if is_connection(record):
        return failure(record) is not None
    return is_retransmission(record) or not record.get("is_retransmit")


def failure_text(record: Record) -> str | None:
    """Return how a connection failed: `connect ECONNREFUSED`, or `close ECONNRESET` of an established one."""
    error = failure(record)
    return error and f"{'connect' if record['state'] == 'SYN_SENT' else 'close'} {error}"


def failure(record: Record) -> str | None:
    """Return the error by which a connection ended, or GIVEN_UP; None if it did not fail."""
    if record["reason"] != "close":
        return None
    return record.get("error") or (GIVEN_UP if record["state"] == "SYN_SENT" else None)


class Lines:
    """Formats events as lines. `hosts` adds the host, `connections` the records of connections that have not failed.

    `rejected` counts records that cannot be formatted, by reason: in topics, fields can be missing or of other types.
    """

    def __init__(self, width: int, *, hosts: bool, color: bool, connections: bool = False) -> None:
        self._connections = connections
        self._width = width
        room = width - (1 + _HOST_WIDTH) * hosts
        fitting = (each for each in _COLUMNS if each.least <= room <= each.most)
        self._columns = [each for each in fitting if hosts or each.title != "HOST"]
        self._color = color
        self._first: OrderedDict[int, int] = OrderedDict()
        self._day = _day(time.time())
        self.rejected: Counter[str] = Counter()

    def header(self) -> str:
        """Return the titles, with the zone of the times unless it is UTC."""
        moment, *others = self._columns
        titles = [moment._replace(title=f"{moment.title} {self._day.partition(' ')[2]}"), *others]
        return " ".join(fit(each.title, each.width) for each in titles).rstrip()

    def lines(self, records: Iterable[Record]) -> list[str]:
        """Return a line for each event, in order of time: Kafka keeps the order only within a partition.

        If it is not of the same day as the one before, or the first not of today, the day precedes it.
        """
        shown = []
        for record in records:
            try:
                if is_event(record) or (self._connections and is_connection(record)):
                    shown.append((int(record["ts_ns"]), self.line(record)))
            except LookupError as error:
                self._reject(f"no field {error}")
            except (TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
                self._reject(f"{type(error).__name__}: {error}")
        return [self._dated(ts_ns, line) for ts_ns, line in sorted(shown, key=lambda each: each[0])]

    def _dated(self, ts_ns: int, line: str) -> str:
        before, self._day = self._day, _day(ts_ns / 1e9)
        return line if self._day == before else f"-- {self._day}\n{line}"

    def _reject(self, reason: str) -> None:
        cut = printable(reason[:_MAX_REASON])
        self.rejected[cut if cut in self.rejected or len(self.rejected) < _MAX_REASONS else "other reasons"] += 1

    def line(self, record: Record) -> str:
        """Format a record. Raises LookupError, TypeError or another error if fields are missing or of other types."""
        cells = [fit(str(each.text(self, record))[:_MAX_TEXT], each.width) for each in self._columns]
        line = " ".join(cells).rstrip()
        if size(line) > self._width:
            line = " ".join([*cells[:-1], printable(_peer(self, record)[:_MAX_TEXT])])
        return styled(line, _style(record)) if self._color else line

    def _sequence(self, record: Record) -> str:
        """Return the first byte's number, counted from the first segment of the flow that was seen."""
        if is_connection(record):
            return ""
        key = hash(flow_key(record))  # names in topics may be long
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


def _style(record: Record) -> str:
    if is_connection(record):
        return ORDINARY if failure(record) is None else FAULT
    return _STYLES.get(record["cause"], WARNING) if is_retransmission(record) else ORDINARY


def _cause(_: Lines, record: Record) -> str:
    if is_retransmission(record):
        number = record["retransmit_no"]
        text = f"{record['cause']} #{number}" if number else str(record["cause"])
        return f"{text} err {record['err']}" if record["err"] else text
    if not is_connection(record):
        return "sent"
    text = failure_text(record) or ("open" if record["reason"] == "interval" else "closed")
    return f"{text}, {record['total_retrans']} retr" if record["total_retrans"] and len(text) <= _SHORT else text


def _flow(_: Lines, record: Record) -> str:
    return f"{endpoint(record['saddr'], record['sport'])} > {endpoint(record['daddr'], record['dport'])}"


def _count(name: str) -> Callable[[Lines, Record], str]:
    def text(_: Lines, record: Record) -> str:
        value = record.get(name)
        return "-" if value is None else str(value)

    return text


def _time_of(name: str) -> Callable[[Lines, Record], str]:
    return lambda _, record: duration(record.get(name) or None)  # 0: not measured yet


def _day(time_s: float) -> str:
    """Return the local date of a time, with the zone unless it is UTC: 2026-11-29 +0100."""
    return time.strftime("%Y-%m-%d %z", time.localtime(time_s)).removesuffix(" +0000")


def _time(_: Lines, record: Record) -> str:
    return f"{datetime.fromtimestamp(record['ts_ns'] / 1e9):%H:%M:%S.%f}"[:-3]


def _peer(_: Lines, record: Record) -> str:
    return endpoint(record["daddr"], record["dport"])


_COLUMNS = (
    _Column("TIME", -12, 0, _time),
    _Column("CAUSE", -20, 0, _cause),
    _Column("HOST", -_HOST_WIDTH, 0, lambda _, record: str(record["host"])),
    _Column("SEQ", 10, _WITH_FLOW, Lines._sequence),
    _Column("LEN", 6, 120, _count("payload_len")),
    _Column("SEGS", 4, 150, _count("segs")),
    _Column("RTO", 6, 78, _time_of("rto_us")),
    _Column("SRTT", 6, 120, _time_of("srtt_us")),
    _Column("CWND", 5, 150, _count("snd_cwnd")),
    _Column("LOST", 4, 150, _count("lost_out")),
    _Column("WHO", -8, 60, lambda _, record: who(record), most=_WITH_WHO - 1),
    _Column("WHO", -15, _WITH_WHO, lambda _, record: who(record)),
    _Column("PEER", 0, 0, _peer, most=_WITH_FLOW - 1),
    _Column("FLOW", 0, _WITH_FLOW, _flow),
)
