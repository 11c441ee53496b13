"""What a rule counts of a batch of records, and which records it selects, without I/O.

Names are compared once per distinct text of a batch, and then by column.
"""

import fnmatch
import ipaddress
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from producer.alert.connections import CAUSE_COUNTERS, COUNTERS
from producer.config.alerts import GROUPS, AlertRule
from producer.connections import Growth
from producer.consume.columns import Columns, Ints, Mask, text_to_map
from producer.consume.plan import Fields
from producer.events import CAUSES

SYNS = ("syn", "syn_ack")
CLOSED = "closed"
"""The cause of a failed connect without an error: its process gave up."""
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
FLOW = ("host", "saddr", "sport", "daddr", "dport")
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
    is_data = rule.measure == "data_ratio"
    allowed = [cause for cause in rule.cause or CAUSES if not (is_data and cause in SYNS)]
    counts = growth.counts * records["sample_rate"][:, None]
    columns = [COUNTERS.index(CAUSE_COUNTERS[CAUSES.index(cause)]) for cause in allowed]
    rows, parts = np.nonzero(counts[:, columns])
    totals = counts[:, COUNTERS.index("data_segs_out" if is_data else "segs_out")]
    return Measured(totals, rows, parts, allowed, counts[:, columns][rows, parts])


def _events(rule: AlertRule, events: Columns) -> Measured:
    counted = _matching(events, "cause", lambda cause: not rule.cause or cause in rule.cause)
    rows = np.flatnonzero(counted & (events["segs"] > 0))
    weights = (events["segs"] * events["sample_rate"])[rows]
    return Measured(np.zeros(len(events), np.int64), rows, events["cause"][rows], events.texts, weights)


def _failed_connects(rule: AlertRule, flows: Columns, growth: Growth) -> Measured:
    failed = growth.closed & _matching(flows, "state", lambda state: state == "SYN_SENT")
    causes = [*flows.texts, CLOSED]
    error = np.where(flows.valid["error"], flows["error"], len(flows.texts))
    if rule.cause:
        failed &= np.array([cause in rule.cause for cause in causes])[error]
    rows = np.flatnonzero(failed)
    return Measured(failed.astype(np.int64), rows, error[rows], causes, flows["sample_rate"][rows])


def _matching(records: Columns, name: str, test: Callable[[str], bool]) -> Mask:
    """Return which records' text passes a test; null does not."""
    cells, valid = records[name], records.valid.get(name, np.ones(len(records), np.bool_))
    used, passes = np.zeros((2, len(records.texts) + 1), np.bool_)
    used[cells[valid]] = True
    passes[used] = [test(records.texts[at]) for at in np.flatnonzero(used).tolist()]
    return passes[cells] & valid


class Selection:
    """A rule's filters and groups."""

    def __init__(self, rule: AlertRule) -> None:
        self._rule = rule
        self._columns = GROUPS[rule.by]
        networks = [ipaddress.ip_network(text) for text in rule.peer]
        self._ports = [_range(value) for value in rule.port]
        self._is_peer = lru_cache(_REMEMBERED)(lambda text: _is_within(text, networks))
        self._is_host = lru_cache(_REMEMBERED)(lambda text: _is_like(text, rule.host))
        self._is_unit = lru_cache(_REMEMBERED)(lambda text: _is_like(text, rule.unit))
        self._has_labels = lambda text: rule.only_labels.items() <= text_to_map(text).items()
        self._subnet = lru_cache(_REMEMBERED)(lambda text: _subnet(text, rule.prefix, rule.prefix_v6))

    def chosen(self, records: Columns) -> Mask:
        """Return which records pass the filters and have a group."""
        rule, chosen = self._rule, np.ones(len(records), np.bool_)
        for name, wanted, test in (
            ("host", rule.host, self._is_host),
            ("daddr", rule.peer, self._is_peer),
            ("unit", rule.unit, self._is_unit),
            ("labels", rule.only_labels, self._has_labels),
        ):
            if wanted:
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
            return port(records)
        if name in _SIDES:
            return records[name]
        if name == "subnet":
            hashes = np.array([hash(self._subnet(text)) for text in records.texts], np.int64)
            return hashes[records["daddr"]]
        return records.hashes[records[name]]

    def names(self, records: Columns, rows: Ints) -> list[str]:
        """Return the names of records' groups."""
        if self._columns == FLOW:
            return flow_names(records, rows)
        columns = [self._texts(records, name, rows) for name in self._columns]
        return [" ".join(parts) for parts in zip(*columns, strict=True)]

    def _texts(self, records: Columns, name: str, rows: Ints) -> list[str]:
        if name == "port":
            return [str(number) for number in port(records)[rows].tolist()]
        column = records["daddr" if name == "subnet" else name][rows].tolist()
        texts = [records.texts[index] for index in column]
        return [self._subnet(text) for text in texts] if name == "subnet" else texts


_SIDES = ("sport", "dport")


def port(records: Columns) -> Ints:
    """Return each record's service port: nearly always the lower one; 0 is none."""
    sport, dport = records["sport"], records["dport"]
    return np.where(sport > 0, np.minimum(sport, dport), dport)


def flow_names(records: Columns, rows: Ints) -> list[str]:
    """Return the names of records' flows: the host, the addresses and the ports."""
    columns = [records[name][rows].tolist() for name in FLOW]
    texts = records.texts
    return [
        f"{texts[host]} {_endpoint(texts[saddr], sport)}>{_endpoint(texts[daddr], dport)}"
        for host, saddr, sport, daddr, dport in zip(*columns, strict=True)
    ]


def _endpoint(address: str, number: int) -> str:
    return f"[{address}]:{number}" if ":" in address else f"{address}:{number}"


def _range(value: int | str) -> tuple[int, int]:
    low, _, high = str(value).partition("-")
    return int(low), int(high or low)


def _is_like(text: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns)


def _is_within(text: str, networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return any(address in network for network in networks)


def _subnet(text: str, prefix: int, prefix_v6: int) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    length = prefix if address.version == 4 else prefix_v6
    return str(ipaddress.ip_network((address.packed, length), strict=False))
