"""Encodes rows of a ring as Kafka messages: says where each field of the schema comes from."""

import errno
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from producer import _native
from producer.encode.isolate import Unencodable
from producer.encode.plan import Column, Kind, Program, Schema, encoded, value_program
from producer.errors import SchemaError
from producer.events import (
    CA_STATES,
    CAUSES,
    COUNTER_FIELDS,
    FLOW,
    HOOKS,
    KNOWN,
    REASONS,
    ROLES,
    STATES,
    TCP_FIELDS,
    UNKNOWN,
    Batch,
    EncodedBatch,
    Ints,
    Rows,
    SchemaId,
    Stream,
)
from producer.host import cgroups
from producer.host.pods import Pod
from producer.schemas import frame

Key = Literal["flow", "host"]
"""`flow`: `saddr:sport>daddr:dport`, with IPv6 in brackets. `host`: the host's name. The same in all topics."""

_ERRORS = tuple(errno.errorcode.get(number, UNKNOWN) for number in range(max(errno.errorcode) + 1))
_NAMES = {
    "hook": HOOKS,
    "state": STATES,
    "ca_state": CA_STATES,
    "cause": CAUSES,
    "role": ROLES,
    "reason": REASONS,
    "error": _ERRORS,
}
_TEXTS = {"comm", "cc"}
_TIMES = {"ts", "start_ns"}
_PROCESS = ("pid", "comm")
_SEGMENT_BITS = {**KNOWN, **dict.fromkeys(TCP_FIELDS, KNOWN["tcp"]), **dict.fromkeys(_PROCESS, KNOWN["process"])}
_FLOW_BITS = {**_SEGMENT_BITS, **dict.fromkeys(COUNTER_FIELDS, KNOWN["counters"])}
_OWNER = ("cgroup", "unit", "container", "pod_uid", "pod", "namespace", "workload")
_MILLISECOND_NS = 1_000_000
_MAX_TIME_NS = 1 << 62
"""Leaves space for adding the offset to UTC."""
_MOST_SCRATCH_BYTES = 8 << 20
_MOST_LOOKED_UP = 256


class Cgroups(Protocol):
    """Looks up paths of cgroups."""

    found: int
    """Number of ids found so far."""

    def path(self, cgroup_id: int) -> str | None:
        """Return the path of a cgroup; None if it is unknown, or not yet known."""

    def look_up(self, ids: Iterable[int] = ()) -> None:
        """Search for these ids and other unknown ones for a short time."""


class PodNames(Protocol):
    """Looks up pods by UID."""

    version: int
    """Increases when pods may have become known."""

    def find(self, uid: str) -> Pod | None:
        """Return a pod; None if it is unknown, or not yet known."""


class BatchEncoder:
    """Encodes batches of one stream with a record schema.

    `host_fields` are the values of fields that are the same in all events of this host; `host` is among them if it is
    the key. A field of the schema that no row has gets its default; SchemaError if it has none.
    """

    def __init__(
        self,
        stream: Stream,
        schema: Schema,
        schema_id: SchemaId,
        host_fields: Mapping[str, Any],
        cgroup_paths: Cgroups,
        key: Key = "flow",
        pods: PodNames | None = None,
    ) -> None:
        value, keys, parts = programs(stream, schema, frame(schema_id), host_fields, key)
        fields = {each["name"]: each for each in schema["fields"]}
        self._parts = [[fields[name] for name in part] for part in parts]
        self._columns = dict(_columns(stream))
        self._steps = value.fields
        self._native = _native.Encoder(
            b"".join(value.steps), b"".join(keys.steps), tuple(value.strings), stream.dtype.itemsize
        )
        self._cgroups = cgroup_paths
        self._pods = pods
        self._seen = self._changes()
        self._scratch = np.empty(0, np.uint8)
        self._unresolved: set[int] = set()
        """Remembered cgroups whose path or pod was unknown."""

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        """Encode a batch; `utc_offset_ns` plus the monotonic clock is nanoseconds since 1970.

        Some 256 new cgroups are looked up at once; further ones are null, as are those that are not found yet.
        Raises Unencodable if a number is too large for its field, which the kernel never writes.
        """
        native, rows = self._native, batch.rows
        count = len(rows)
        self._resolve_late()
        looked_up = 0
        while looked_up < _MOST_LOOKED_UP and (ids := native.missing(rows)):
            self._remember(ids)
            looked_up += len(ids)
        scratch = self._room(native.bound(count))
        spans = np.empty((4, count), np.int64)
        size = native.encode(rows, utc_offset_ns, scratch, spans)
        if size is None:
            raise self._unencodable(rows, spans[1])
        payload = scratch[:size].copy()
        starts, lengths, key_starts, key_lengths = spans
        return EncodedBatch(batch.stream, payload, starts, lengths, payload, key_starts, key_lengths)

    def _room(self, size: int) -> NDArray[np.uint8]:
        """Return memory for messages of unknown length: the same each time, since fresh pages cost more than a copy."""
        if size <= len(self._scratch):
            return self._scratch
        room = np.empty(size, np.uint8)
        if size <= _MOST_SCRATCH_BYTES:
            self._scratch = room
        return room

    def _remember(self, ids: list[int]) -> None:
        """Cache the encoded owner of cgroups."""
        self._cgroups.look_up(ids)
        for cgroup_id in ids:
            path = self._cgroups.path(cgroup_id)
            uid = cgroups.pod_uid(path) if path is not None else None
            pod = self._pods.find(uid) if self._pods and uid else None
            if path is None or (self._pods and uid and not pod):
                if len(self._unresolved) == _native.MAX_IDS:
                    self._unresolved.clear()
                    self._native.forget()
                self._unresolved.add(cgroup_id)
            self._native.remember(cgroup_id, self._owner(path, uid, pod))

    def _owner(self, path: str | None, uid: str | None, pod: Pod | None) -> tuple[bytes, ...]:
        values: dict[str, Any] = dict.fromkeys(_OWNER)
        if path is not None:
            values |= {"cgroup": path, "unit": cgroups.unit(path), "container": cgroups.container(path), "pod_uid": uid}
        if pod is not None:
            values |= {"pod": pod.name, "namespace": pod.namespace, "workload": pod.workload}
        return tuple(encoded(fields, values) for fields in self._parts)

    def _changes(self) -> tuple[int, int]:
        return self._cgroups.found, self._pods.version if self._pods else 0

    def _resolve_late(self) -> None:
        """Cache the owner of cgroups whose path or pod has been found meanwhile."""
        self._cgroups.look_up()
        if self._seen == self._changes():
            return
        self._seen = self._changes()
        for cgroup_id in [each for each in self._unresolved if self._cgroups.path(each) is not None]:
            self._unresolved.discard(cgroup_id)
            self._remember([cgroup_id])

    def _unencodable(self, rows: Rows, lengths: Ints) -> Unencodable:
        bad = lengths < 0
        first = int(bad.argmax())
        name = self._steps[-1 - int(lengths[first])]
        column = self._columns[name]
        number = np.frombuffer(rows[first].tobytes(), column.dtype, 1, column.offset)[0]
        return Unencodable(f"{name}: {number} is too large for its field", bad)


def programs(
    stream: Stream, schema: Schema, header: bytes, host_fields: Mapping[str, Any], key: Key
) -> tuple[Program, Program, list[tuple[str, ...]]]:
    """Return the programs for messages and for keys, which share strings, and the parts of the cache of cgroups."""
    columns = dict(_columns(stream))
    try:
        owner = dict.fromkeys(_OWNER, columns["cgroup_id"])
        value, parts = value_program(schema, header, columns, host_fields, owner)
    except SchemaError as error:
        raise SchemaError(f"{stream.schema_file}: {error}") from error
    return value, _key_program(key, columns, host_fields, value.strings), parts


def _columns(stream: Stream) -> Iterator[tuple[str, Column]]:
    """Yield the fields that rows carry. Padding and nested records are none."""
    is_segment = "s" in (stream.dtype.names or ())
    bits = _SEGMENT_BITS if is_segment else _FLOW_BITS
    base, record = (_offset(stream.dtype, "s"), stream.dtype["s"]) if is_segment else (0, stream.dtype)
    flow, known = base + _offset(record, "flow"), base + _offset(record, "known")
    places = [(FLOW, flow, flow + _offset(FLOW, "flow_known")), (record, base, known), (stream.dtype, 0, known)]
    for name, column in chain.from_iterable(_members(*place, bits) for place in places):
        yield name, column
        if name == "ts":
            yield "ts_ns", column
            yield "ts", replace(column, divisor=_MILLISECOND_NS)


def _members(dtype: "np.dtype[Any]", base: int, known: int, bits: Mapping[str, int]) -> Iterator[tuple[str, Column]]:
    for name in dtype.names or ():
        member = dtype[name]
        if member.names is None and not name.startswith("_pad"):
            bit = bits.get(name, 0).bit_length()
            place = (known + (bit - 1) // 8, 1 << (bit - 1) % 8) if bit else (0, 0)
            names = (*_NAMES[name], UNKNOWN) if name in _NAMES else ()
            column = Column(base + _offset(dtype, name), member, place, names, is_text=name in _TEXTS)
            yield name, replace(column, utc=True, most=_MAX_TIME_NS) if name in _TIMES else column


def _offset(dtype: "np.dtype[Any]", name: str) -> int:
    assert dtype.fields is not None
    return int(dtype.fields[name][1])


def _key_program(
    key: Key, columns: Mapping[str, Column], host_fields: Mapping[str, Any], strings: list[bytes]
) -> Program:
    """Return the program for keys; its strings are added to `strings`."""
    program = Program(strings)
    if key == "host":
        program.constant(str(host_fields["host"]).encode())
        return program
    for address, port, end in (("saddr", "sport", b">"), ("daddr", "dport", b"")):
        program.add(Kind.KEY_ADDRESS, address, columns[address])
        program.constant(b":")
        program.add(Kind.KEY_NUMBER, port, columns[port])
        if end:
            program.constant(end)
    return program
