"""`rebpf trace`: print this host's retransmissions and failed connections as they happen, without Kafka."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from producer.connections import Connections
from producer.consume.period import Period
from producer.errors import ReaderGoneError
from producer.events import CAUSES, FLOWS, RETRANSMITS, Ints
from producer.export.sources import read_file
from producer.host.endpoints import endpoint
from producer.host.output import echo, require_reader
from producer.host.signals import Flag
from producer.host.text import printable, to_json
from producer.view.cells import fit, size
from producer.view.file import RecordFile
from producer.view.filter import Filter
from producer.view.limits import LIMITS, Interval, limits, spurious
from producer.view.line import Lines, Record, failure_text, flow_key, is_event, who
from producer.view.local import LocalSource
from producer.view.records import Records, Row, in_order

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_REPORT_S = 10.0
"""Between two records of an open connection, as in the topics."""
_MAX_FLOWS = 16_384
_LEAST_CAUSES = 17
"""Columns that are left to the causes in the counts: room for `connect ETIMEDOUT`."""
_WITH_ALL = 72
"""Narrower screens show neither spurious retransmissions nor the process in the counts."""
_COUNTERS, _GAUGES = Interval._fields[1:8], Interval._fields[8:]


@dataclass(frozen=True, slots=True)
class Output:
    """What to print: at most `limit` events, as lines or JSON, and counts by flow at the end."""

    lines: Lines
    as_json: bool
    limit: int | None
    counts: bool
    width: int

    def format(self, events: Iterable[Row]) -> Iterable[str]:
        """Return a line for each event."""
        if self.as_json:
            return (to_json({"topic": stream.topic, **event}, compact=True) for stream, event in events)
        return self.lines.lines(event for _, event in events)


def live(source: LocalSource, stop: Flag) -> Iterator[list[Records]]:
    """Yield this host's records as they arrive, those of open connections at intervals and at the end.

    The rings are read one after the other, so what is later than the first of these reads waits for the next.
    """
    later: list[Records] = []
    due_s = 0.0
    with source:
        while not stop.is_set():
            if time.monotonic() >= due_s:
                source.report()
                due_s = time.monotonic() + _REPORT_S
            now_ns = time.time_ns()
            found = [(each, each["ts_ns"].cells <= now_ns) for each in source.read()]
            yield [*later, *(each.select(is_due) for each, is_due in found)]
            later = [each.select(~is_due) for each, is_due in found if not is_due.all()]
            stop.wait(_POLL_S)
        source.report()
        yield [*later, *source.read()]
        if lost := source.lost():
            logger.warning("trace: events are missing lost=%d", lost)


def from_file(path: Path, period: Period, stop: Flag) -> Iterator[list[Records]]:
    """Yield the records of a file in a period."""
    for part in read_file(path, {}, in_order=True):
        if stop.is_set():
            return
        records = Records.from_table(part.stream, part.table)
        yield [records.select(period.mask(records["ts_ns"].cells))]


def trace(source: Iterable[list[Records]], chosen: Filter, output: Output, stop: Flag, file: RecordFile | None) -> None:
    """Print the chosen events until the source ends, or there are enough; also write all chosen records to a file."""
    summary = Summary() if output.counts else None
    left = output.limit
    with contextlib.suppress(ReaderGoneError):
        if not output.as_json:
            echo(output.lines.header())
        for batch in source:
            rows = in_order(each.select(chosen(each)) for each in batch)
            events = [row for row in rows if is_event(row[1])][:left]
            if file is not None and rows:
                file.write(rows)
            if events:
                echo("\n".join(output.format(events)), color=True)
            if summary is not None:
                summary.add(row for row in rows if row[0] == FLOWS)
                summary.add(event for event in events if event[0] == RETRANSMITS)
            if left is not None:
                left -= len(events)
                if not left:
                    stop.set()
            require_reader()
        if summary is not None:
            echo(summary.text(output.width, as_json=output.as_json))
        return
    stop.set()
    for _ in source:  # the reader has gone: release the hooks
        pass


@dataclass(slots=True)
class _Flow:
    """A connection in the summary."""

    name: str
    who: str
    causes: Counter[str] = field(default_factory=Counter)
    first: Record | None = None
    last: Record | None = None
    error: str | None = None


class Summary:
    """Counts by flow, and what limited each."""

    def __init__(self) -> None:
        self._flows: dict[Any, _Flow] = {}
        self._is_full = False

    def add(self, rows: Iterable[Row]) -> None:
        """Count retransmissions and records of connections."""
        for stream, record in rows:
            flow = self._flow(record)
            if flow is None:
                self._is_full = True
                continue
            if stream == RETRANSMITS:
                flow.causes[record["cause"]] += record["segs"] * (record["sample_rate"] or 1)
            else:
                flow.first, flow.last = flow.first or record, record
                flow.error = failure_text(record) or flow.error
                flow.who = who(record)

    def _flow(self, record: Record) -> _Flow | None:
        key = flow_key(record)
        if key not in self._flows and len(self._flows) < _MAX_FLOWS:
            ends = (endpoint(record[f"{side}addr"], record[f"{side}port"]) for side in "sd")
            self._flows[key] = _Flow(" > ".join(ends), who(record))
        return self._flows.get(key)

    def rows(self) -> list[dict[str, Any]]:
        """Return the flows with retransmissions or an error, worst first."""
        flows = [flow for flow in self._flows.values() if flow.causes or flow.error]
        return [self._row(flow) for flow in sorted(flows, key=lambda flow: -flow.causes.total())]

    @staticmethod
    def _row(flow: _Flow) -> dict[str, Any]:
        limit, unneeded = judged(flow.first, flow.last)
        causes = {cause: flow.causes[cause] for cause in CAUSES if flow.causes[cause]}
        return {
            "retransmitted": flow.causes.total(), "causes": causes, "spurious": unneeded, "limit": limit,
            "error": flow.error, "who": flow.who, "flow": flow.name,
        }  # fmt: skip

    def text(self, width: int, *, as_json: bool) -> str:
        """Return the summary as lines for a screen of this width, or as one JSON object."""
        rows = self.rows()
        if as_json:
            return to_json({"flows": rows}, compact=True)
        what = "retransmissions or an error" if len(rows) == 1 else "retransmissions or errors"
        title = f"{len(rows)} {'flow' if len(rows) == 1 else 'flows'} with {what}"
        title += "; further flows are not counted" if self._is_full else ""
        if not rows:
            return title
        # Narrow screens show the peer alone, and cut the causes.
        head = _before_causes(("RETRANS", "SPURIOUS", "LIMIT", "WHO"), width)
        room = width - len(head) - max(size(_peer(row)) for row in rows) - 1
        why = min(max(size(_why(row)) for row in rows), max(room, _LEAST_CAUSES))
        head += f"{'CAUSES':<{why}} FLOW"
        return "\n".join([title, head, *(_line(row, why, width) for row in rows)])


def _why(row: dict[str, Any]) -> str:
    worst = sorted(row["causes"].items(), key=lambda each: -each[1])
    return " ".join(f"{cause}={count}" for cause, count in worst) or str(row["error"])


def _peer(row: dict[str, Any]) -> str:
    return str(row["flow"].partition(" > ")[2])


def _before_causes(cells: tuple[str, str, str, str], width: int) -> str:
    fitted = [fit(text, size) for text, size in zip(cells, (7, 8, -11, -10), strict=True)]
    return " ".join([*(fitted[::2] if width < _WITH_ALL else fitted), ""])


def _line(row: dict[str, Any], why: int, width: int) -> str:
    unneeded = "-" if row["spurious"] is None else str(row["spurious"])
    text = _before_causes((str(row["retransmitted"]), unneeded, row["limit"] or "-", row["who"]), width)
    text += f"{fit(_why(row), -why)} "
    return printable(text + (row["flow"] if size(text + row["flow"]) <= width else _peer(row)))


def judged(first: Record | None, last: Record | None) -> tuple[str | None, int | None]:
    """Return what limited a connection between two records, and its spurious retransmissions; None if unknown.

    With a single record, this is since the connection began.
    """
    if last is None or last["busy_time_us"] is None or last["srtt_us"] is None or last["state"] == "SYN_SENT":
        return None, None
    records = [last] if first is None or first is last else [first, last]

    def column(name: str) -> Ints:
        return np.array([record[name] or 0 for record in records], np.int64)

    table = Connections(_COUNTERS, floor_ns=0, most=1)
    key, is_open = np.zeros(len(records), np.int64), np.zeros(len(records), np.bool_)
    growth = table.add(key, column("ts_ns"), column("start_ns"), is_open, [column(name) for name in _COUNTERS])
    if growth.elapsed_ns[-1] <= 0:
        return None, None
    gauges = (column(name)[-1:] for name in _GAUGES)
    interval = Interval(growth.elapsed_ns[-1:] // 1000, *growth.counts[-1:].T, *gauges)
    return LIMITS[limits(interval)[0]], int(spurious(interval)[0])
