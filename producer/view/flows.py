"""Connections by slot: their latest figures, and what has recently happened to them.

A connection that began before this view counts from its first record on. Retransmissions are counted by their events.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from producer.connections import Connections, Growth, connection_keys
from producer.consume.columns import Column
from producer.events import CAUSES, FLOWS, RETRANSMITS, Ints, Mask
from producer.view.limits import Interval
from producer.view.records import Records

Numbers = NDArray[Any]

HISTORY_S = 60
"""For how long retransmissions are remembered, and closed connections."""
_UNSEEN_S = 600
"""For how long an open connection is remembered without a record; producers report it every 10 seconds or so."""
MAX_FLOWS = 2_000_000
"""Connections beyond this are not followed until others have been forgotten."""
MAX_CHARACTERS = 1 << 26
"""Of all names of connections; more are null until others have been forgotten."""

NAMES = ("host", "saddr", "daddr", "unit", "container", "comm")
"""Text fields of a slot."""
COUNTERS = Interval._fields[1:8]
GAUGES = ("srtt_us", "min_rtt_us", "snd_cwnd", "mss", "rto_us")
_GROWING = ("segs_out", *COUNTERS, "retrans_syn_ack")
_DTYPE = np.dtype(
    [
        *((name, "<i4") for name in NAMES),
        ("sport", "<i4"),
        ("dport", "<i4"),
        ("seen_s", "<f8"),
        ("counted", "?"),
        ("closed", "?"),
        ("established", "?"),  # or was, by a record
        ("judged_s", "<f8"),
        ("lost_out", "<i8"),
        *((name, "<i8") for name in GAUGES),
        # What limits a connection is judged by the growth of elapsed nanoseconds and of COUNTERS.
        *((part, "<i8", 1 + len(COUNTERS)) for part in ("recent", "before")),
    ]
)
_MAX_PORT, _MAX_TIME_NS, _MAX_NUMBER, _MAX_RATE = 65_535, 1 << 62, 1 << 40, 1 << 20
_JUDGE_S = 5.0
"""What limits a connection is judged over one to two of these."""


class Activity(NamedTuple):
    """What happened to connections in the last minute: arrays of equal length."""

    at_s: Numbers
    slot: Numbers
    segs: Numbers
    """Segments sent, and how many of these were retransmissions, by the records of connections."""
    resent: Numbers
    retransmitted: Numbers
    """Retransmitted segments, by their events."""
    cause: Numbers
    failed: Numbers
    """Failed connects."""

    def select(self, chosen: Mask) -> "Activity":
        """Return the chosen rows."""
        return Activity(*(column[chosen] for column in self))


class Flows:
    """The connections of all records since `start_ns`, in nanoseconds since 1970."""

    def __init__(self, start_ns: int, netns: int = 0) -> None:
        self._netns = netns
        self._table = Connections(_GROWING, start_ns - 1, MAX_FLOWS)
        self._texts: dict[str, int] = {"": 0}
        self._characters = 0
        self._rows = np.zeros(1024, _DTYPE)
        self._log: list[Activity] = []
        self.in_netns = 0
        """Retransmitted segments of the network namespace `netns` so far."""

    @property
    def rows(self) -> NDArray[np.void]:
        """The connections, by slot."""
        return self._rows[: len(self._table)]

    def texts(self) -> list[str]:
        """Return the texts to which the text fields refer; the first is null."""
        return list(self._texts)

    def activity(self, now_s: float) -> Activity:
        """Return what happened in the last minute."""
        if len(self._log) > 1:
            self._log = [Activity(*(np.concatenate(columns) for columns in zip(*self._log, strict=True)))]
        activity = self._log[0] if self._log else Activity(*(np.zeros(0, np.int64) for _ in Activity._fields))
        return activity.select(activity.at_s > now_s - HISTORY_S)

    def add(self, records: Records, now_s: float) -> None:
        """Add records that arrived now."""
        if not len(records) or records.stream not in (FLOWS, RETRANSMITS):
            return
        growth = self._growth(records)
        followed = growth.slots >= 0
        if not followed.all():
            records, growth = records.select(followed), growth.select(followed)
        self._describe(records, growth.slots, now_s)
        if records.stream == RETRANSMITS:
            self._add_retransmissions(records, growth.slots, now_s)
        else:
            self._add_flows(records, growth, now_s)

    def forget(self, now_s: float) -> None:
        """Drop what is too old."""
        activity = self.activity(now_s)
        is_open = self.rows["counted"] & ~self.rows["closed"]
        kept = self.rows["seen_s"] > now_s - np.where(is_open, _UNSEEN_S, HISTORY_S)
        places = np.cumsum(kept) - 1
        rows = self.rows[kept]
        used, places_of_texts = np.unique(np.concatenate([[0], *(rows[name] for name in NAMES)]), return_inverse=True)
        texts = self.texts()
        self._texts = {texts[at]: number for number, at in enumerate(used.tolist())}
        self._characters = sum(map(len, self._texts))
        for number, name in enumerate(NAMES):
            rows[name] = places_of_texts[1 + number * len(rows) : 1 + (number + 1) * len(rows)]
        self._rows = np.concatenate([rows, np.zeros(max(1024, len(rows) // 2), _DTYPE)])
        self._table.keep(kept)
        self._log = [activity._replace(slot=places[activity.slot])] if len(activity.slot) else []

    def _growth(self, records: Records) -> Growth:
        """Find the connections, and what they did; retransmissions have no counters of their connection."""
        texts = _by_text(records, ("host", "boot_id", "saddr", "daddr"), hash)  # the same when texts are forgotten
        ends = [texts["saddr"], texts["daddr"], _bounded(records, "sport"), _bounded(records, "dport")]
        cookie = records["sk_cookie"]
        has_cookie = cookie.valid & (cookie.cells != 0)
        netns = np.zeros(len(records), np.int64)  # from Linux 5.10 on, a cookie is unique on its host
        keys = connection_keys(texts["host"], texts["boot_id"], netns, cookie.cells, has_cookie, ends)
        return self._table.add(
            keys,
            _bounded(records, "ts_ns"),
            _bounded(records, "start_ns"),
            _equals(records["reason"], "close"),
            [_bounded(records, name) for name in _GROWING],
            records["segs_out"].valid,
            _equals(records["role"], "server"),
        )

    def _describe(self, records: Records, slots: Ints, now_s: float) -> None:
        """Store whose the connections are, new ones included."""
        if len(self._table) > len(self._rows):
            more = np.zeros(max(len(self._rows), len(self._table) - len(self._rows)), _DTYPE)
            self._rows = np.concatenate([self._rows, more])
        rows = self._rows
        for name, ids in _by_text(records, NAMES, self._intern).items():  # 0 is null
            known = ids > 0
            rows[name][slots[known]] = ids[known]
        for name in ("sport", "dport"):
            rows[name][slots] = _bounded(records, name)
        rows["seen_s"][slots] = now_s

    def _intern(self, text: str) -> int:
        number = self._texts.get(text)
        if number is None:
            if self._characters + len(text) > MAX_CHARACTERS:
                return 0
            number = self._texts[text] = len(self._texts)
            self._characters += len(text)
        return number

    def _add_retransmissions(self, records: Records, slots: Ints, now_s: float) -> None:
        rates = np.clip(records["sample_rate"].cells.astype(np.int64), 1, _MAX_RATE)
        segs = np.minimum(_bounded(records, "segs") * rates, _MAX_NUMBER)
        zeros = np.zeros_like(segs)
        self._log.append(
            Activity(np.full(len(segs), now_s), slots, zeros, zeros, segs, _causes(records["cause"]), zeros)
        )
        self.in_netns += int(segs[records["netns"].cells == self._netns].sum())
        for name in ("lost_out", "srtt_us", "snd_cwnd", "mss", "rto_us"):
            valid = records[name].valid
            self._rows[name][slots[valid]] = _bounded(records, name)[valid]

    def _add_flows(self, records: Records, growth: Growth, now_s: float) -> None:
        connecting = _equals(records["state"], "SYN_SENT")
        failed = growth.closed & connecting
        segs, resent = growth.counts[:, 0], growth.counts[:, _GROWING.index("total_retrans")]
        changed = (segs > 0) | failed
        zeros = np.zeros(int(changed.sum()), np.int64)
        self._log.append(
            Activity(
                np.full(len(zeros), now_s), growth.slots[changed], segs[changed], resent[changed],
                zeros, zeros, failed[changed].astype(np.int64),
            )
        )  # fmt: skip
        rows, slots = self._rows, growth.slots
        np.add.at(rows["recent"], slots, np.column_stack([growth.elapsed_ns, growth.counts[:, 1:-1]]))
        is_new = ~rows["counted"][slots]
        due = slots[~is_new & (now_s - rows["judged_s"][slots] >= _JUDGE_S)]
        rows["before"][due], rows["recent"][due] = rows["recent"][due], 0
        rows["judged_s"][due] = rows["judged_s"][slots[is_new]] = now_s
        for name in GAUGES:
            valid = records[name].valid
            rows[name][slots[valid]] = _bounded(records, name)[valid]
        rows["counted"][slots], rows["established"][slots] = True, ~connecting
        closes = _equals(records["reason"], "close")
        turns = closes | growth.opened  # a record of an open connection may follow its close
        rows["closed"][slots[turns]] = closes[turns]


def interval(rows: NDArray[np.void]) -> Interval:
    """Return the growth from which limits of connections are judged."""
    elapsed_ns, *grown = (rows["before"] + rows["recent"]).T
    return Interval(elapsed_ns // 1000, *grown, *(rows[name] for name in Interval._fields[8:]))


def _by_text(records: Records, names: Sequence[str], number: Callable[[str], int]) -> dict[str, Ints]:
    """Return a number for each text of these fields, and 0 for null; the columns of a batch often share their texts."""
    numbers: dict[int, Ints] = {}
    found = {}
    for name in names:
        column = records[name]
        if not column.texts:
            found[name] = np.zeros(len(records), np.int64)
            continue
        if id(column.texts) not in numbers:
            numbers[id(column.texts)] = np.array(list(map(number, column.texts)), np.int64)
        found[name] = np.where(column.valid, numbers[id(column.texts)][np.where(column.valid, column.cells, 0)], 0)
    return found


def _bounded(records: Records, name: str) -> Ints:
    """Return numbers, limited to what a kernel could write: whoever may write to a topic chooses them."""
    most = _MAX_PORT if name in ("sport", "dport") else _MAX_TIME_NS if name.endswith("_ns") else _MAX_NUMBER
    return np.clip(records[name].cells.astype(np.int64), 0, most)


def _equals(column: Column, text: str) -> Mask:
    if not column.texts or text not in column.texts:
        return np.zeros(len(column.cells), np.bool_)
    equal: Mask = column.valid & (column.cells == column.texts.index(text))
    return equal


def _causes(column: Column) -> Ints:
    """Return the causes as indexes in CAUSES."""
    number = {cause: index for index, cause in enumerate(CAUSES)}
    by_text = np.array([number.get(text, 0) for text in column.texts or [""]])
    return by_text[np.where(column.valid, column.cells, 0)]
