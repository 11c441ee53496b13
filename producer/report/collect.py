"""Reads what a report needs: the events of a period, by column, and whether any are missing."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from producer.consume.audit import Audit, BootReport
from producer.consume.columns import Columns, Table
from producer.consume.period import Period
from producer.errors import UnavailableError
from producer.events import FLOWS, RETRANSMITS, TRANSMITS, Mask, Stream
from producer.export.arrow import batch_of, schema_of
from producer.export.events import PartFilter, within
from producer.export.part import Part
from producer.export.sources import Files, Topics
from producer.host.progress import Progress
from producer.report.connections import COLUMNS, MARGIN_NS
from producer.report.frame import Frame

_SEGMENT = frozenset(
    {"ts_ns", "cpu", "cpu_seq", "host", "boot_id", "netns", "sk_cookie", "saddr", "daddr", "sport", "dport"}
    | {"unit", "container", "comm", "seq", "end_seq", "segs", "sample_rate", "snd_cwnd", "lost_out", "rto_us"}
)
NAMES: Mapping[Stream, frozenset[str]] = {
    FLOWS: COLUMNS,
    RETRANSMITS: _SEGMENT | {"cause"},
    TRANSMITS: _SEGMENT | {"is_retransmit"},
}
_MOST_EVENTS = 20_000_000
"""About 6 GB of memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Quality:
    """Whether the events of a topic are complete. What the topic's retention deleted may count as missing."""

    events: int
    boots: tuple[BootReport, ...]
    sampled: int
    """Events that stand for more than themselves."""

    @property
    def missing(self) -> int:
        """Events that are missing between others."""
        return sum(boot.missing for boot in self.boots)


@dataclass(frozen=True, slots=True, eq=False)
class Collected:
    """The events, and the quality of each topic."""

    frames: Mapping[Stream, Frame]
    quality: Mapping[Stream, Quality]
    undecodable: int


def collect(source: Files | Topics, period: Period, matches: PartFilter | None = None) -> Collected:
    """Read flows and retransmissions, and count transmits; `matches` does not apply to the quality.

    It does not apply to records of connections before the period either, from which their counters grow.
    """
    batches: dict[Stream, list[object]] = {FLOWS: [], RETRANSMITS: []}
    schemas = {stream: schema_of(stream, NAMES[stream]) for stream in batches}
    audits = {stream: Audit() for stream in NAMES}
    counts = dict.fromkeys(NAMES, 0)
    sampled = dict.fromkeys(NAMES, 0)
    kept = 0
    with Progress("reading events") as progress:
        for part in source.parts(NAMES if matches is None else {}, progress):
            chosen = within(part, _earlier(period) if part.stream == FLOWS else period)
            audited = within(part, period)
            counts[part.stream] += int(np.count_nonzero(audited))
            sampled[part.stream] += _sampled(part.table, audited)
            _audit(audits[part.stream], part, audited)
            if matches is not None:
                chosen &= matches(part) | ~audited
            if part.stream in batches and chosen.any():
                batches[part.stream].append(batch_of(schemas[part.stream], part.table, chosen))
                kept += int(np.count_nonzero(chosen))
            if kept > _MOST_EVENTS:
                raise UnavailableError(f"more than {_MOST_EVENTS:,} events: use a shorter period or a filter")
    frames = {stream: Frame(pa.Table.from_batches(found, schemas[stream])) for stream, found in batches.items()}
    quality = {
        stream: Quality(counts[stream], tuple(audits[stream].boots()), sampled[stream])
        for stream in NAMES
        if counts[stream]
    }
    return Collected(frames, quality, source.undecodable)


def collect_segments(source: Files | Topics, period: Period, chosen_flows: "FlowChoice") -> Frame:
    """Read the transmits of a few connections."""
    schema = schema_of(TRANSMITS, NAMES[TRANSMITS])
    found = []
    with Progress("reading segments") as progress:
        for part in source.parts(NAMES, progress):
            if part.stream == TRANSMITS:
                chosen = within(part, period)
                chosen &= chosen_flows.mask(part.table)
                if chosen.any():
                    found.append(batch_of(schema, part.table, chosen))
    return Frame(pa.Table.from_batches(found, schema))


@dataclass(frozen=True, slots=True)
class FlowChoice:
    """Chooses connections by host, socket cookie and both ports."""

    wanted: frozenset[tuple[str, int, int, int]]

    def mask(self, table: Table) -> Mask:
        """Return which rows are of these connections."""
        cells = dict(zip(table.plan.names, table.cells, strict=True))
        nothing = np.zeros(table.cells.shape[1], np.int64)
        columns = [cells.get(name, nothing) for name in ("host", "sk_cookie", "sport", "dport")]
        chosen = nothing.astype(np.bool_)
        for host, *numbers in self.wanted:
            if host in table.texts:
                given = (table.texts.index(host), *numbers)
                chosen |= np.logical_and.reduce([column == each for column, each in zip(columns, given, strict=True)])
        return chosen


def _earlier(period: Period) -> Period:
    since_ns = None if period.since_ns is None else period.since_ns - MARGIN_NS
    return Period(since_ns, period.until_ns)


def _sampled(table: Table, chosen: Mask) -> int:
    if "sample_rate" not in table.plan.names:
        return 0
    return int(np.count_nonzero(table.cells[table.plan.names.index("sample_rate")][chosen] > 1))


def _audit(audit: Audit, part: Part, chosen: Mask) -> None:
    table = part.table
    chosen = chosen & (table.cells[table.plan.names.index("cpu_seq")] > 0)
    if not chosen.any():
        return
    zeros = np.zeros(len(chosen), np.int64)
    cells = dict(zip(table.plan.names, table.cells, strict=True)) | {"sent_ms": zeros}
    cells["partition"] = part.partitions if part.partitions is not None else zeros
    audit.add(Columns(np.arange(len(chosen)), cells, {}, table.texts, table.hashes).select(chosen))
