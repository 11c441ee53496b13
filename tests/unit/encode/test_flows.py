"""Records of connections to messages: fastavro reads back what the row holds, and null where it is not known."""

import copy
import errno
import io
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import fastavro
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.encode.batch import BatchEncoder
from producer.events import (
    CA_STATES,
    COUNTER_FIELDS,
    FLOW_EVENT,
    FLOWS,
    HOOKS,
    KNOWN,
    REASONS,
    ROLES,
    STATES,
    TCP_FIELDS,
    Batch,
)
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema
from tests.support.encoding import PLAIN

HOST = {"host": "db-1.example", "boot_id": "5f0c0e2a-9e3e-4d0d-8f0e-5a2f0d1c7b11", "labels": {"env": "prod"}}
OFFSET_NS = 1_790_000_000_123_456_789
FRAME_BYTES = 5
GAUGES = [name for name in TCP_FIELDS if name in (FLOW_EVENT.names or ()) and name != "total_retrans"]
BIT_OF = {
    **{name: name for name in KNOWN if name in (FLOW_EVENT.names or ())},
    **dict.fromkeys(COUNTER_FIELDS, "counters"),
    **dict.fromkeys(GAUGES, "tcp"),
    **dict.fromkeys(("pid", "comm"), "process"),
}
"""The bit of `known` for each field that may be null."""
ALL = sum(KNOWN.values())
# An Avro int or long has a sign, which the kernel's numbers never use.
rows_of_bytes = st.binary(min_size=FLOW_EVENT.itemsize, max_size=FLOW_EVENT.itemsize)
texts = st.binary(max_size=16)


def row_of(content: bytes, known: int, comm: bytes, cc: bytes) -> Any:
    rows = np.frombuffer(content, FLOW_EVENT).copy()
    for name in FLOW_EVENT.names or ():
        if rows.dtype[name].kind == "u":
            rows[name] >>= rows.dtype[name].type(1)
    for name in ("ts", "start_ns"):
        rows[name] >>= np.uint64(2)
    flow = rows["flow"]
    flow["flow_known"], flow["hook"] = 7, flow["hook"] % len(HOOKS)
    for name in ("sk_cookie", "cgroup_id"):
        flow[name] >>= np.uint64(1)
    rows["known"] = known
    rows["comm"][0] = np.frombuffer(comm.ljust(16, b"\0"), np.uint8)
    rows["cc"][0] = np.frombuffer(cc.ljust(16, b"\0"), np.uint8)
    return rows


def encoded(rows: Any) -> dict[str, Any]:
    """Return the record, as fastavro reads it."""
    schema = load_schema(FLOWS.schema_file)
    encoder = BatchEncoder(FLOWS, schema, FLOWS.fixed_schema_id, HOST, CgroupPaths(None))
    message = encoder.encode(Batch(FLOWS, rows), OFFSET_NS).packed()
    assert message[:FRAME_BYTES] == b"\0\0\0\0\5"
    plain = copy.deepcopy(dict(schema))
    for field in plain["fields"]:
        if "logicalType" in field["type"]:  # timestamps as the numbers that they are
            field["type"] = field["type"]["type"]
    body = io.BytesIO(message[FRAME_BYTES:])
    record: Any = fastavro.schemaless_reader(body, fastavro.parse_schema(plain), None)
    assert not body.read()
    return dict(record)


def named(names: tuple[str, ...], number: int) -> str:
    return names[number] if number < len(names) else "UNKNOWN"


def shown(raw: bytes) -> str:
    return quote_from_bytes(raw.partition(b"\0")[0], safe=PLAIN)


@given(rows_of_bytes, st.integers(0, ALL), texts, texts)
def test_fastavro_reads_every_field_as_the_row_has_it(content: bytes, known: int, comm: bytes, cc: bytes) -> None:
    rows = row_of(content, known, comm, cc)
    record, row = encoded(rows), rows[0]
    special = {
        "comm": shown(comm),
        "cc": shown(cc),
        "role": named(ROLES, int(row["role"])),
        "reason": named(REASONS, int(row["reason"])),
        "state": named(STATES, int(row["state"])),
        "ca_state": named(CA_STATES, int(row["ca_state"])),
        "error": errno.errorcode.get(int(row["error"]), "UNKNOWN"),
        "start_ns": int(row["start_ns"]) + OFFSET_NS,
        "ts": (int(row["ts"]) + OFFSET_NS) // 10**6,
    }
    for name in FLOW_EVENT.names or ():
        if name in ("flow", "known", "_pad1"):
            continue
        value = special[name] if name in special else int(row[name])
        is_known = name not in BIT_OF or known & KNOWN[BIT_OF[name]]
        assert record[name] == (value if is_known else None), name
    assert record["ts_ns"] == int(row["ts"]) + OFFSET_NS
    assert {name: record[name] for name in HOST} == HOST
    assert (record["sport"], record["dport"]) == (row["flow"]["sport"], row["flow"]["dport"])
    assert record["sk_cookie"] == row["flow"]["sk_cookie"]


@pytest.mark.parametrize("comm", [b"", b"nginx", b"100%25", b"\xff\n\x1b[0m\x7f", b"caf\xc3\xa9", b"0123456789abcde"])
def test_a_name_of_any_bytes_is_printable_and_can_be_reversed(comm: bytes) -> None:
    text = encoded(row_of(bytes(FLOW_EVENT.itemsize), ALL, comm, b"bbr"))["comm"]
    assert text.isprintable()
    assert text.isascii()
    assert unquote_to_bytes(text) == comm


def test_sixteen_bytes_without_a_zero_are_a_whole_name() -> None:
    record = encoded(row_of(bytes(FLOW_EVENT.itemsize), ALL, b"\n" * 16, b"0123456789abcdef"))
    assert (record["comm"], record["cc"]) == ("%0A" * 16, "0123456789abcdef")
