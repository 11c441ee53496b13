"""Connections by slot: their latest figures, and what has recently happened to them.

Records of connections carry the kernel's cumulative counters, so growth is the difference to a connection's previous
record, and a lost record loses nothing but its moment. A connection that began before this view counts from its first
record on. Retransmissions are counted by their events.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from producer.events import CAUSES, FLOWS, RETRANSMITS
from producer.view.limits import Interval
from producer.view.records import Column, Mask, Records

Numbers = NDArray[Any]

HISTORY_S = 60
"""For how long retransmissions are remembered, and closed connections."""
_UNSEEN_S = 600
"""For how long an open connection is remembered without a record; producers report it every 10 seconds or so."""
MAX_FLOWS = 2_000_000
"""Connections beyond this are not followed until others have been forgotten."""

NAMES = ("host", "saddr", "daddr", "unit", "container", "comm")
"""Text fields of a slot."""
COUNTERS = Interval._fields[1:8]
GAUGES = ("srtt_us", "min_rtt_us", "snd_cwnd", "mss", "rto_us")
_GROWING = ("ts_ns", "segs_out", *COUNTERS)
_DTYPE = np.dtype(
    [
        ("key", "<u8"),
        *((name, "<i4") for name in NAMES),
        ("sport", "<i4"),
        ("dport", "<i4"),
        ("seen_s", "<f8"),
        ("counted", "?"),
        ("closed", "?"),
        ("judged_s", "<f8"),
        ("lost_out", "<i8"),
        *((name, "<i8") for name in GAUGES),
        *((prefix + name, "<i8") for prefix in ("", "middle_", "base_") for name in _GROWING),
    ]
)
_MIX = [np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)]
_NO_COOKIE = np.uint64(1) << np.uint64(63)
_MAX_PORT, _MAX_TIME_NS, _MAX_NUMBER = 65_535, 1 << 62, 1 << 40
_JUDGE_S = 5.0
"""What limits a connection is judged over one to two of these."""


class Happened(NamedTuple):
    """What happened to connections: arrays of equal length."""

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

    def select(self, chosen: NDArray[np.bool_]) -> "Happened":
        """Return the chosen rows."""
        return Happened(*(column[chosen] for column in self))


class Flows:
    """The connections of all records since `start_ns`, in nanoseconds since 1970."""

    def __init__(self, start_ns: int, netns: int = 0) -> None:
        self._start_ns = start_ns
        self._netns = netns
        self._slots: dict[int, int] = {}
        self._texts: dict[str, int] = {"": 0}
        self._rows = np.zeros(1024, _DTYPE)
        self._log: list[Happened] = []
        self.in_netns = 0
        """Retransmitted segments of the network namespace `netns` so far."""

    @property
    def rows(self) -> NDArray[np.void]:
        """The connections, by slot."""
        return self._rows[: len(self._slots)]

    def texts(self) -> list[str]:
        """Return the texts to which the text fields refer; the first is null."""
        return list(self._texts)

    def happened(self) -> Happened:
        """Return what happened in the last minute."""
        if len(self._log) > 1:
            self._log = [Happened(*(np.concatenate(columns) for columns in zip(*self._log, strict=True)))]
        return self._log[0] if self._log else Happened(*(np.zeros(0, np.int64) for _ in Happened._fields))

    def add(self, records: Records, now_s: float) -> None:
        """Add records that arrived now."""
        if not len(records) or records.stream not in (FLOWS, RETRANSMITS):
            return
        slots, followed = self._find(records)
        if not followed.all():
            records, slots = records.select(followed), slots[followed]
        rows = self._rows
        rows["seen_s"][slots] = now_s
        if records.stream == RETRANSMITS:
            self._add_retransmissions(records, slots, now_s)
        else:
            self._add_flows(records, slots, now_s)

    def forget(self, now_s: float) -> None:
        """Drop what is too old."""
        happened = self.happened()
        happened = happened.select(happened.at_s > now_s - HISTORY_S)
        is_open = self.rows["counted"] & ~self.rows["closed"]
        kept = self.rows["seen_s"] > now_s - np.where(is_open, _UNSEEN_S, HISTORY_S)
        places = np.cumsum(kept) - 1
        rows = self.rows[kept]
        used, places_of_texts = np.unique(np.concatenate([[0], *(rows[name] for name in NAMES)]), return_inverse=True)
        texts = self.texts()
        self._texts = {texts[at]: number for number, at in enumerate(used.tolist())}
        for number, name in enumerate(NAMES):
            rows[name] = places_of_texts[1 + number * len(rows) : 1 + (number + 1) * len(rows)]
        self._rows = np.concatenate([rows, np.zeros(max(1024, len(rows) // 2), _DTYPE)])
        self._slots = dict(zip(rows["key"].tolist(), range(len(rows)), strict=True))
        self._log = [happened._replace(slot=places[happened.slot])] if len(happened.slot) else []

    def _find(self, records: Records) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the slot of each record, new ones included, and whether it has one."""
        texts = self._interned(records)
        keys = _keys(records)
        found = np.array(list(map(self._slots.get, keys.tolist())), np.float64)  # None becomes not a number
        missing = np.isnan(found)
        if missing.any():
            fresh = np.unique(keys[missing])[: MAX_FLOWS - len(self._slots)].tolist()
            self._slots.update(zip(fresh, range(len(self._slots), len(self._slots) + len(fresh)), strict=True))
            if len(self._slots) > len(self._rows):
                more = np.zeros(max(len(self._rows), len(self._slots) - len(self._rows)), _DTYPE)
                self._rows = np.concatenate([self._rows, more])
            found = np.array(list(map(self._slots.get, keys.tolist())), np.float64)
        followed = ~np.isnan(found)
        slots = np.where(followed, found, 0).astype(np.int64)
        chosen, rows = slots[followed], self._rows
        rows["key"][chosen] = keys[followed]
        for name, ids in texts.items():
            known = followed & (ids > 0)
            rows[name][slots[known]] = ids[known]
        for name in ("sport", "dport"):
            rows[name][chosen] = _bounded(records, name)[followed]
        return slots, followed

    def _interned(self, records: Records) -> dict[str, NDArray[np.int64]]:
        """Return the numbers of the texts of each field of a slot; 0 is null."""
        table = self._texts
        return _by_text(records, NAMES, lambda text: table.setdefault(text, len(table)))

    def _add_retransmissions(self, records: Records, slots: NDArray[np.int64], now_s: float) -> None:
        segs = _bounded(records, "segs")
        zeros = np.zeros_like(segs)
        self._log.append(
            Happened(np.full(len(segs), now_s), slots, zeros, zeros, segs, _causes(records["cause"]), zeros)
        )
        self.in_netns += int(segs[records["netns"].cells == self._netns].sum())
        for name in ("lost_out", "srtt_us", "snd_cwnd", "mss", "rto_us"):
            valid = records[name].valid
            self._rows[name][slots[valid]] = _bounded(records, name)[valid]

    def _add_flows(self, records: Records, slots: NDArray[np.int64], now_s: float) -> None:
        """Only the last record of each connection counts, because counters are cumulative."""
        _, from_end = np.unique(slots[::-1], return_index=True)
        last = np.zeros(len(slots), np.bool_)
        last[len(slots) - 1 - from_end] = True
        failed = _equals(records["state"], "SYN_SENT") & _equals(records["reason"], "close") & records["error"].valid
        records, slots, failed = records.select(last), slots[last], failed[last]
        known = records["segs_out"].valid
        rows, now = self._rows, {name: np.where(known, _bounded(records, name), 0) for name in _GROWING}
        is_new = ~rows["counted"][slots]
        began_here = records["start_ns"].valid & (_bounded(records, "start_ns") >= self._start_ns)
        growth = {}
        for name in ("segs_out", "total_retrans"):
            before = np.where(is_new & ~began_here, now[name], np.where(is_new, 0, rows[name][slots]))
            growth[name] = np.where(now[name] >= before, now[name] - before, now[name])
        changed = (growth["segs_out"] > 0) | failed
        zeros = np.zeros(int(changed.sum()), np.int64)
        self._log.append(
            Happened(
                np.full(len(zeros), now_s), slots[changed], growth["segs_out"][changed],
                growth["total_retrans"][changed], zeros, zeros, failed[changed].astype(np.int64),
            )
        )  # fmt: skip
        self._remember(records, slots, now, is_new, began_here, now_s)

    def _remember(
        self,
        records: Records,
        slots: NDArray[np.int64],
        now: dict[str, NDArray[np.int64]],
        is_new: NDArray[np.bool_],
        began_here: NDArray[np.bool_],
        now_s: float,
    ) -> None:
        """Store the latest figures, and from time to time those from which limits are judged."""
        rows = self._rows
        due = ~is_new & (now_s - rows["judged_s"][slots] >= _JUDGE_S)
        rows["judged_s"][slots[is_new | due]] = now_s
        start = np.where(began_here, _bounded(records, "start_ns"), now["ts_ns"])
        for name in _GROWING:
            first = np.where(began_here, start if name == "ts_ns" else 0, now[name])
            for prefix in ("base_", "middle_"):
                rows[prefix + name][slots[is_new]] = first[is_new]
            rows["base_" + name][slots[due]] = rows["middle_" + name][slots[due]]
            rows["middle_" + name][slots[due]] = now[name][due]
            rows[name][slots] = now[name]
        for name in GAUGES:
            valid = records[name].valid
            rows[name][slots[valid]] = _bounded(records, name)[valid]
        rows["counted"][slots] = True
        rows["closed"][slots] = _equals(records["reason"], "close")


def interval(rows: NDArray[np.void]) -> Interval:
    """Return the growth from which limits of connections are judged."""
    grown = [np.maximum(rows[name] - rows["base_" + name], 0) for name in COUNTERS]
    elapsed_us = np.maximum(rows["ts_ns"] - rows["base_ts_ns"], 0) // 1000
    return Interval(elapsed_us, *grown, *(rows[name] for name in Interval._fields[8:]))


def _by_text(records: Records, names: Sequence[str], number: Callable[[str], int]) -> dict[str, NDArray[np.int64]]:
    """Return a number for each text of these fields, and 0 for null; the columns of a batch often share their texts."""
    numbers: dict[int, NDArray[np.int64]] = {}
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


def _keys(records: Records) -> NDArray[np.uint64]:
    """Return a number for each connection: of the host's boot and the socket, or of the addresses and ports.

    It is made of hashes, which stay the same when texts are forgotten.
    """
    texts = _by_text(records, ("host", "boot_id", "saddr", "daddr"), hash)
    cookie = records["sk_cookie"]
    ports = _bounded(records, "sport") << 16 | _bounded(records, "dport")
    ends = _mixed(texts["saddr"], texts["daddr"], ports) ^ _NO_COOKIE
    socket = np.where(cookie.valid & (cookie.cells != 0), cookie.cells.astype(np.uint64), ends)
    return _mixed(texts["host"], texts["boot_id"], socket)


def _bounded(records: Records, name: str) -> NDArray[np.int64]:
    """Return numbers as far as a kernel could write them: whoever may write to a topic chooses them."""
    most = _MAX_PORT if name in ("sport", "dport") else _MAX_TIME_NS if name.endswith("_ns") else _MAX_NUMBER
    return np.clip(records[name].cells.astype(np.int64), 0, most)


def _mixed(*columns: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of numbers. Collisions only mix up two lines on a screen."""
    mixed = np.zeros(len(columns[0]), np.uint64)
    for column, factor in zip(columns, _MIX, strict=True):
        mixed = (mixed ^ column.astype(np.uint64)) * factor
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _equals(column: Column, text: str) -> NDArray[np.bool_]:
    if not column.texts or text not in column.texts:
        return np.zeros(len(column.cells), np.bool_)
    equal: Mask = column.valid & (column.cells == column.texts.index(text))
    return equal


def _causes(column: Column) -> NDArray[np.int64]:
    """Return the causes as indexes in CAUSES."""
    number = {cause: index for index, cause in enumerate(CAUSES)}
    by_text = np.array([number.get(text, 0) for text in column.texts or [""]])
    return by_text[np.where(column.valid, column.cells, 0)]
