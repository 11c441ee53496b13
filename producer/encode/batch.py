"""Encodes rows of a ring as Kafka messages: maps columns and constants of the host to fields of the schema."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from producer.encode.avro import Coded, Column, Encoder, Group, Ints, Schema, Table
from producer.encode.flows import FLOW_FIELDS, Cgroups, FlowTable
from producer.encode.isolate import Unencodable
from producer.errors import SchemaError
from producer.events import (
    CA_STATES,
    CAUSES,
    KNOWN,
    SEGMENT,
    STATES,
    TCP_FIELDS,
    UNKNOWN,
    Batch,
    EncodedBatch,
    Rows,
    SchemaId,
    Stream,
)
from producer.schemas import frame

_NAMES: Mapping[str, tuple[str, ...]] = {"state": STATES, "ca_state": CA_STATES, "cause": CAUSES}
_NULL = 256
_BIT = {**KNOWN, **dict.fromkeys(TCP_FIELDS, KNOWN["tcp"])}
_MILLISECOND_NS = 1_000_000
_MAX_INT = (1 << 31) - 1
_MAX_LONG = (1 << 63) - 1
_MAX_TIME_NS = 1 << 62
"""Leaves space for adding the offset to UTC."""


class BatchEncoder:
    """Encodes batches of one stream with a record schema.

    `host_fields` are the values of fields that are the same in all events of this host. A field of the schema that no
    row has gets its default; SchemaError if it has none.
    """

    def __init__(
        self, stream: Stream, schema: Schema, schema_id: SchemaId, host_fields: Mapping[str, Any], cgroup_paths: Cgroups
    ) -> None:
        fields = {field["name"]: field for field in schema["fields"]}
        carried = {*(SEGMENT.names or ()), *(stream.dtype.names or ()), "ts_ns"}
        constant = fields.keys() - carried | FLOW_FIELDS
        for name in constant - FLOW_FIELDS:
            if "default" not in fields[name]:
                raise SchemaError(f"{stream.schema_file}: no event carries the field {name}, and it has no default")
        self._stream = stream
        self._encoder = Encoder(schema, frame(schema_id), frozenset(constant))
        groups = [group for group in self._encoder.groups if constant.issuperset(group.split(","))]
        self._flows = FlowTable(self._encoder, groups, host_fields, cgroup_paths)
        self._names = {
            group: _name_table(self._encoder, group, _NAMES[group]) for group in self._encoder.groups if group in _NAMES
        }

    def fit(self, rows: Rows) -> int:
        """Return how many leading rows can be encoded in a short time: new flows take longer."""
        return self._flows.fit(rows)

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        """Encode a batch; `utc_offset_ns` plus the monotonic clock is nanoseconds since 1970.

        Raises Unencodable if a number is too large for its field, which the kernel never writes.
        """
        rows = batch.rows
        _check(rows)
        numbers = self._flows.number(rows)
        segments = rows["s"]
        known = segments["known"]
        always = int(np.bitwise_and.reduce(known))
        columns: dict[Group, Column] = {group: Coded(numbers, table) for group, table in self._flows.groups.items()}
        for group in self._encoder.groups:
            if group not in columns:
                bit = _BIT.get(group, 0)
                valid = None if always & bit == bit else known & np.uint32(bit) != 0
                columns[group] = self._column(group, rows, valid, utc_offset_ns)
        encoded = self._encoder.encode(columns, len(rows))
        keys = self._flows.keys
        return EncodedBatch(
            batch.stream,
            encoded.buffer,
            encoded.starts,
            encoded.lengths,
            keys.matrix.reshape(-1),
            numbers * keys.matrix.shape[1],
            keys.lengths.take(numbers),
        )

    def _column(self, name: Group, rows: Rows, valid: NDArray[np.bool_] | None, utc_offset_ns: int) -> Column:
        if name == "ts_ns":
            return Ints(rows["s"]["ts"].astype(np.int64) + utc_offset_ns)
        if name == "ts":
            return Ints((rows["s"]["ts"].astype(np.int64) + utc_offset_ns) // _MILLISECOND_NS)
        values = rows[name] if name in (self._stream.dtype.names or ()) else rows["s"][name]
        if name in self._names:
            return Coded(values if valid is None else np.where(valid, values, np.uint16(_NULL)), self._names[name])
        if self._encoder.step(name).boolean:
            return Ints(values != 0, valid)
        return Ints(values, valid)


def _check(rows: Rows) -> None:
    """Raise Unencodable if a number does not fit its field's type in the schema."""
    segments, flows = rows["s"], rows["s"]["flow"]
    for numbers, most in (
        *((segments[name], _MAX_INT) for name in ("cpu", "payload_len", "segs")),
        *((rows[name], _MAX_INT) for name in ("retransmit_no",) if name in (rows.dtype.names or ())),
        (segments["ts"], _MAX_TIME_NS),
        (segments["cpu_seq"], _MAX_LONG),
        *((flows[name], _MAX_LONG) for name in ("sk_cookie", "cgroup_id")),
    ):
        if len(numbers) and numbers.max() > most:
            raise Unencodable(f"{numbers.max()} is too large for its field", numbers > most)


def _name_table(encoder: Encoder, name: Group, names: Sequence[str]) -> Table:
    """Return the encoded name of each number that a byte can hold, followed by null if the field is nullable."""
    known = [encoder.value(name, {name: names[i] if i < len(names) else UNKNOWN}) for i in range(_NULL)]
    return Table([*known, encoder.value(name, {name: None})] if encoder.step(name).nullable else known)
