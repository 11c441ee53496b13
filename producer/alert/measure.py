"""What a rule counts of a batch of records, and which records it selects, without I/O.

Names are compared once per distinct text of a batch, and then by column.
"""

import fnmatch
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from producer.alert.connections import CAUSE_COUNTERS, COUNTERS
from producer.config.alerts import GROUPS, AlertRule
from producer.connections import GIVEN_UP, Growth, service_port
from producer.consume.addresses import is_within, network, subnet
from producer.consume.columns import Columns, passing, text_to_map
from producer.consume.plan import Fields
from producer.events import CAUSES, Ints, Mask
from producer.host.endpoints import endpoint

_SYNS = ("syn", "syn_ack")
FIELDS: Fields = (
    ("ts_ns", "long"),
    ("host", "string"),
    ("saddr", "string"),
    ("daddr", "string"),
    ("sport", "long"),
    ("dport", "long"),
    ("unit", "string?"),
    ("container", "string?"),
    ("sample_rate", "long"),
    ("labels", "map?"),
)
"""The fields of all records that rules group and select by."""
FLOW = GROUPS["flow"]
_REMEMBERED = 1 << 16


class Measured(NamedTuple):
    """What a batch's records count.

    `totals` has a value for each record. A part is one of `causes` of one record, with a positive weight: segments, a
    connect, or a round-trip time in microseconds.
    """

    totals: Ints
    rows: Ints
    parts: Ints
    causes: Sequence[str]
    weights: Ints


def measured(rule: AlertRule, records: Columns, growth: Growth | None) -> Measured:
    """Return what a rule counts; `growth` is that of flow records."""
    if growth is None:
        return _events(rule, records)
    if rule.measure == "failed_connects":
        return _failed_connects(rule, records, growth)
    if rule.measure == "srtt":
        srtt_us = np.where(records.valid["srtt_us"] & growth.fresh, records["srtt_us"], 0)
        rows = np.flatnonzero(srtt_us)
        return Measured((srtt_us > 0).astype(np.int64), rows, np.zeros(len(rows), np.int64), [""], srtt_us[rows])
    allowed = causes_of(rule)
    counts = growth.counts * records["sample_rate"][:, None]
    columns = [COUNTERS.index(CAUSE_COUNTERS[CAUSES.index(cause)]) for cause in allowed]
    rows, parts = np.nonzero(counts[:, columns])
    totals = counts[:, COUNTERS.index("data_segs_out" if rule.measure == "data_ratio" else "segs_out")]
    return Measured(totals, rows, parts, allowed, counts[:, columns][rows, parts])


def causes_of(rule: AlertRule) -> list[str]:
    """Return the causes of the retransmissions that a ratio counts."""
    return [cause for cause in rule.cause or CAUSES if not (rule.measure == "data_ratio" and cause in _SYNS)]


def _events(rule: AlertRule, events: Columns) -> Measured:
    counted = _matching(events, "cause", lambda cause: not rule.cause or cause in rule.cause)
    rows = np.flatnonzero(counted & (events["segs"] > 0))
    weights = (events["segs"] * events["sample_rate"])[rows]
    return Measured(np.zeros(len(events), np.int64), rows, events["cause"][rows], events.texts, weights)


def _failed_connects(rule: AlertRule, flows: Columns, growth: Growth) -> Measured:
    failed = growth.closed & _matching(flows, "state", lambda state: state == "SYN_SENT")
    causes = [*flows.texts, GIVEN_UP]
    error = np.where(flows.valid["error"], flows["error"], len(flows.texts))
    if rule.cause:
        failed &= np.array([cause in rule.cause for cause in causes])[error]
    rows = np.flatnonzero(failed)
    return Measured(failed.astype(np.int64), rows, error[rows], causes, flows["sample_rate"][rows])


def _matching(records: Columns, name: str, test: Callable[[str], bool]) -> Mask:
    return passing(records[name], records.valid.get(name, np.ones(len(records), np.bool_)), records.texts, test)


class Selection:
    """A rule's filters and groups."""

    def __init__(self, rule: AlertRule) -> None:
        self._columns = GROUPS[rule.by]
        networks = [network(text) for text in rule.peer]
        self._ports = [
            (int(low), int(high or low)) for low, _, high in (str(each).partition("-") for each in rule.port)
        ]
        tests: tuple[tuple[str, object, Callable[[str], bool]], ...] = (
            ("host", rule.host, lru_cache(_REMEMBERED)(lambda text: _is_like(text, rule.host))),
            ("daddr", rule.peer, lambda text: is_within(text, networks)),
            ("unit", rule.unit, lru_cache(_REMEMBERED)(lambda text: _is_like(text, rule.unit))),
            ("labels", rule.only_labels, lambda text: rule.only_labels.items() <= text_to_map(text).items()),
        )
        self._tests = [(name, test) for name, wanted, test in tests if wanted]
        self._subnet = lru_cache(_REMEMBERED)(lambda text: subnet(text, rule.prefix, rule.prefix_v6))

    def chosen(self, records: Columns) -> Mask:
        """Return which records pass the filters and have a group."""
        chosen = np.ones(len(records), np.bool_)
        for name, test in self._tests:
            chosen &= _matching(records, name, test)
        if self._ports:
            near = [(low <= records[side]) & (records[side] <= high) for low, high in self._ports for side in _SIDES]
            chosen &= np.logical_or.reduce(near)
        for name in self._columns:
            if name in records.valid:
                chosen &= records.valid[name]
        return chosen

    def columns(self, records: Columns) -> list[Ints]:
        """Return the columns by which records are grouped."""
        return [self._column(records, name) for name in self._columns]

    def _column(self, records: Columns, name: str) -> Ints:
        if name == "port":
            return service_port(records["sport"], records["dport"])
        if name in _SIDES:
            return records[name]
        if name == "subnet":
            peers, peer_of_row = np.unique(records["daddr"], return_inverse=True)
            hashes = [hash(self._subnet(records.texts[peer])) for peer in peers.tolist()]
            return np.array(hashes, np.int64)[peer_of_row]
        return records.hashes[records[name]]

    def names(self, records: Columns, rows: Ints) -> list[str]:
        """Return the names of records' groups."""
        if self._columns == FLOW:
            return flow_names(records, rows)
        columns = [self._texts(records, name, rows) for name in self._columns]
        return [" ".join(parts) for parts in zip(*columns, strict=True)]

    def _texts(self, records: Columns, name: str, rows: Ints) -> list[str]:
        if name == "port":
            return [str(number) for number in self._column(records, name)[rows].tolist()]
        column = records["daddr" if name == "subnet" else name][rows].tolist()
        texts = [records.texts[index] for index in column]
        return [self._subnet(text) for text in texts] if name == "subnet" else texts


_SIDES = ("sport", "dport")


def flow_names(records: Columns, rows: Ints) -> list[str]:
    """Return the names of records' flows: the host, the addresses and the ports."""
    columns = [records[name][rows].tolist() for name in FLOW]
    texts = records.texts
    return [
        f"{texts[host]} {endpoint(texts[saddr], sport)}>{endpoint(texts[daddr], dport)}"
        for host, saddr, sport, daddr, dport in zip(*columns, strict=True)
    ]


def _is_like(text: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns)
