"""Caches the encoded fields that are constant per connection.

The flows of a batch (bpf/events.h, struct flow) are looked up at once, in an array indexed by a hash of their bytes. On
a miss (a new flow, or one whose slot another flow took), a row goes through a dictionary.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from producer.encode.avro import Encoder, Group, Table
from producer.events import FLOW, HOOKS, KNOWN, UNKNOWN, Rows
from producer.host import cgroups
from producer.host.endpoints import endpoint


class Cgroups(Protocol):
    """Looks up paths of cgroups."""

    found: int
    """Number of ids found so far."""

    def path(self, cgroup_id: int) -> str | None:
        """Return the path of a cgroup; None if it is unknown, or not yet known."""

    def look(self) -> None:
        """Continue the search for unknown ids for a short time."""


FLOW_FIELDS = frozenset(
    {"host", "boot_id", "hook", "netns", "sk_cookie", "saddr", "daddr", "sport", "dport"}
    | {"cgroup_id", "cgroup", "unit", "container", "uid"}
)

_WORDS = FLOW.itemsize // 8
_SLOT_BITS = 15
_MOST_FLOWS = 1 << 15
MOST_NEW = 256
"""Most new flows per batch: each costs as much as a hundred rows of known ones."""


_Found = tuple[NDArray[np.void], NDArray[np.uint64], NDArray[np.int64], NDArray[np.intp]]


class FlowTable:
    """Numbers flows, and stores each one's encoded field groups and Kafka key by its number.

    `fields` are those that all flows of this host share (host, boot_id).
    """

    def __init__(
        self, encoder: Encoder, groups: Sequence[Group], fields: Mapping[str, Any], cgroup_paths: Cgroups
    ) -> None:
        self._encoder = encoder
        self._fields = fields
        self._cgroups = cgroup_paths
        self._found = 0
        self._fitted: tuple[Rows, _Found] | None = None
        """The result of `fit`'s look-up, for the next `number`."""
        # Random, so that nobody can choose flows that share a slot; odd, so that no bit of a word is lost.
        self._factors = np.random.default_rng().integers(0, 1 << 63, _WORDS, np.uint64) << np.uint64(1) | np.uint64(1)
        self.groups: dict[Group, Table] = {group: Table() for group in groups}
        self._clear()

    def _clear(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._unresolved: dict[int, list[bytes]] = {}
        """Flows of cgroups whose path was unknown, by the cgroup's id."""
        # No flow is all ones, because its padding is 0.
        self._seen = np.full((1 << _SLOT_BITS, _WORDS), ~np.uint64(0))
        self._slots: NDArray[np.int64] = np.zeros(1 << _SLOT_BITS, np.int64)
        self.keys = Table()
        for group in self.groups:
            self.groups[group] = Table()

    def fit(self, rows: Rows) -> int:
        """Return how many leading rows have at most MOST_NEW new flows in total."""
        self._make_room()
        found = flows, _, _, unseen = self._look_up(rows)
        self._fitted = rows, found
        if len(unseen) > MOST_NEW:
            new: set[bytes] = set()
            for row in unseen:
                raw = flows[row].tobytes()
                if raw not in self._numbers:
                    new.add(raw)
                if len(new) > MOST_NEW:
                    return int(row)
        return len(rows)

    def number(self, rows: Rows) -> NDArray[np.int64]:
        """Return the number of each row's flow. Numbers are valid until the next call of `number` or `fit`."""
        if self._fitted is None or self._fitted[0] is not rows:
            self._make_room()
            self._fitted = rows, self._look_up(rows)
        (_, (flows, words, slots, unseen)), self._fitted = self._fitted, None
        numbers = self._slots.take(slots)
        for row in unseen:
            number = self._number_of(flows[row])
            numbers[row] = self._slots[slots[row]] = number
            self._seen[slots[row]] = words[row]
        return numbers

    def _make_room(self) -> None:
        if len(self.keys) > _MOST_FLOWS:
            self._clear()
        self._forget_resolved()

    def _look_up(self, rows: Rows) -> tuple[NDArray[np.void], NDArray[np.uint64], NDArray[np.int64], NDArray[np.intp]]:
        """Return the rows' flows, the flows as words, their slots, and the rows whose flows are not in their slots."""
        flows = np.ascontiguousarray(rows["s"]["flow"])
        words = flows.view(np.uint64).reshape(-1, _WORDS)
        slots = self._slots_of(words)
        # Eight comparisons per row, read as one number: 0 if all are equal.
        differs = (words != self._seen.take(slots, axis=0)).view(np.uint64)[:, 0] != 0
        return flows, words, slots, np.flatnonzero(differs)

    def _slots_of(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (words @ self._factors >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)

    def _forget_resolved(self) -> None:
        """Forget flows whose cgroup's path is now known, so that their next event encodes it."""
        self._cgroups.look()
        if self._found == self._cgroups.found:
            return
        self._found = self._cgroups.found
        for cgroup_id in [each for each in self._unresolved if self._cgroups.path(each) is not None]:
            for raw in self._unresolved.pop(cgroup_id):
                del self._numbers[raw]
                self._seen[self._slots_of(np.frombuffer(raw, np.uint64).reshape(1, -1))] = ~np.uint64(0)

    def _number_of(self, flow: np.void) -> int:
        raw = flow.tobytes()
        number = self._numbers.get(raw)
        if number is None:
            values = self._values(flow)
            for group, table in self.groups.items():
                table.add(self._encoder.value(group, values))
            number = self._numbers[raw] = self.keys.add(key(values))
            if values["cgroup_id"] is not None and values["cgroup"] is None:
                self._unresolved.setdefault(values["cgroup_id"], []).append(raw)
        return number

    def _values(self, flow: np.void) -> dict[str, Any]:
        known = int(flow["flow_known"])
        cgroup_id = int(flow["cgroup_id"]) if known & KNOWN["cgroup_id"] else None
        path = None if cgroup_id is None else self._cgroups.path(cgroup_id)
        return {
            **self._fields,
            "hook": HOOKS[flow["hook"]] if flow["hook"] < len(HOOKS) else UNKNOWN,
            "netns": int(flow["netns"]),
            "sk_cookie": int(flow["sk_cookie"]) if known & KNOWN["sk_cookie"] else None,
            "saddr": address(flow["saddr"].tobytes()),
            "daddr": address(flow["daddr"].tobytes()),
            "sport": int(flow["sport"]),
            "dport": int(flow["dport"]),
            "cgroup_id": cgroup_id,
            "cgroup": path,
            "unit": None if path is None else cgroups.unit(path),
            "container": None if path is None else cgroups.container(path),
            "uid": int(flow["uid"]) if known & KNOWN["uid"] else None,
        }


def address(packed: bytes) -> str:
    """Return 16 bytes as an address in RFC 5952 form; an IPv4-mapped address as IPv4."""
    ip = ipaddress.IPv6Address(packed)
    return str(ip.ipv4_mapped or ip)


def key(flow: Mapping[str, Any]) -> bytes:
    """Return a flow's Kafka key, the same in all topics: `saddr:sport>daddr:dport`, with IPv6 in brackets."""
    return f"{endpoint(flow['saddr'], flow['sport'])}>{endpoint(flow['daddr'], flow['dport'])}".encode()
