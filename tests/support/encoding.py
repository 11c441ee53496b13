"""Rows of a ring with any content, and what fastavro must read of them."""

import copy
import io
import ipaddress
import mmap
import string
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import fastavro
import numpy as np
from hypothesis import strategies as st

from producer import events
from producer.encode.batch import BatchEncoder, Key
from producer.events import FLOW, SEGMENT, STREAMS, TRANSMITS, Batch, EncodedBatch, SchemaId, Stream
from producer.schemas import load_schema

HOST = {
    "host": "db-1.example",
    "boot_id": "5f0c0e2a-9e3e-4d0d-8f0e-5a2f0d1c7b11",
    "labels": {"dc": "fra-1", "env": "prød"},
}
OFFSET_NS = 1_790_000_000_123_456_789
NANOSECONDS = st.integers(0, 10**18)
PLAIN = (string.ascii_letters + string.digits + string.punctuation + " ").replace("%", "")
PADDING = {"_pad0", "_pad1", "_pad2", "_pad3"}


def cgroup_path(cgroup_id: int) -> str | None:
    return None if cgroup_id % 3 == 0 else f"/system.slice/{cgroup_id}"


class PathsOfTests:
    """Cgroups of which every third has no path."""

    found = 0

    def path(self, cgroup_id: int) -> str | None:
        return cgroup_path(cgroup_id)

    def look_up(self, ids: Iterable[int] = ()) -> None: ...


def encoder_of(stream: Stream, schema: Mapping[str, Any] | None = None, key: Key = "flow") -> BatchEncoder:
    schema = schema or load_schema(stream.schema_file)
    return BatchEncoder(stream, schema, SchemaId(stream.fixed_schema_id), HOST, PathsOfTests(), key)


def messages(encoded: EncodedBatch) -> list[tuple[bytes, bytes]]:
    payload, keys = encoded.payload.tobytes(), encoded.keys.tobytes()
    return [
        (keys[key : key + key_length], payload[start : start + length])
        for key, key_length, start, length in zip(
            encoded.key_starts.tolist(), encoded.key_lengths.tolist(),
            encoded.starts.tolist(), encoded.lengths.tolist(), strict=True,
        )
    ]  # fmt: skip


def decode(value: bytes, schema: Mapping[str, Any]) -> tuple[int, Any]:
    magic, schema_id = struct.unpack_from(">bI", value)
    assert magic == 0
    body = io.BytesIO(value[5:])
    record = fastavro.schemaless_reader(body, schema, return_record_name=False)
    assert body.read() == b""
    return schema_id, record


def encode(encoder: BatchEncoder, stream: Stream, rows: Any) -> list[tuple[bytes, bytes]]:
    encoded = encoder.encode(Batch(stream, rows), OFFSET_NS)
    assert len(encoded) == len(rows)
    return messages(encoded)


v4 = st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address)
v6 = st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address)
addresses = st.one_of(
    v4.map(lambda address: ipaddress.IPv6Address(b"\0" * 10 + b"\xff\xff" + address.packed)),
    v6,
    st.sampled_from(["::", "::1", "2001:db8::1:0:0:1", "fe80::1", "::ffff:0.0.0.0", "::1.2.3.4"]).map(
        ipaddress.IPv6Address
    ),
)


def numbers(dtype: np.dtype[Any]) -> st.SearchStrategy[int]:
    limits = np.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)
    return st.integers(low, high) | st.sampled_from([0, 1, 63, 64, 8191, 8192, high, low]).filter(
        lambda value: low <= value <= high
    )


def members(dtype: np.dtype[Any], **chosen: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw values of a dtype's members, by name; `chosen` where not any number of theirs will do."""
    drawn = {
        name: chosen[name] if name in chosen else numbers(dtype[name])
        for name in dtype.names or ()
        if name in chosen or (name not in PADDING and dtype[name].names is None)
    }
    return st.fixed_dictionaries(drawn)


# The schema's longs are of 64 bits with a sign; a cookie or a cgroup's inode never needs the last one.
below_2_63 = st.integers(0, 2**63 - 1)
flow_values = members(
    FLOW,
    saddr=addresses,
    daddr=addresses,
    sk_cookie=below_2_63,
    cgroup_id=below_2_63,
    hook=st.integers(0, len(events.HOOKS) - 1),
)


def row_values(stream: Stream) -> st.SearchStrategy[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    segment = members(
        SEGMENT,
        ts=NANOSECONDS,
        cpu_seq=below_2_63,
        known=st.integers(0, 2 ** len(events.KNOWN) - 1),
        payload_len=st.integers(0, 2**31 - 1),
        segs=st.integers(0, 2**31 - 1),
        cpu=st.integers(0, 2**31 - 1),
        state=st.integers(0, 20),
        ca_state=st.integers(0, 8),
        pid=st.integers(0, 2**31 - 1),
        comm=st.binary(max_size=16),
    )
    extra = members(stream.dtype, cause=st.integers(0, 10), retransmit_no=st.integers(0, 2**31 - 1))
    return st.tuples(flow_values, segment, extra)


def build(stream: Stream, values: Sequence[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> Any:
    rows = np.zeros(len(values), stream.dtype)
    for row, (flow, segment, extra) in zip(rows, values, strict=True):
        for name, value in flow.items():
            row["s"]["flow"][name] = np.frombuffer(value.packed, np.uint8) if name in ("saddr", "daddr") else value
        for name, value in segment.items():
            row["s"][name] = np.frombuffer(value.ljust(16, b"\0"), np.uint8) if name == "comm" else value
        for name, value in extra.items():
            row[name] = value
    return rows


def name_of(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else "UNKNOWN"


def text(address: ipaddress.IPv6Address) -> str:
    return str(address.ipv4_mapped or address)


def expected(stream: Stream, flow: dict[str, Any], segment: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the record by the contract's own words: a field whose bit in `known` is not set is null."""
    flow_known, known = flow["flow_known"], segment["known"]

    def if_known(bits: int, name: str, value: Any) -> Any:
        return value if bits & events.KNOWN[name] else None

    ns = segment["ts"] + OFFSET_NS
    cgroup_id = if_known(flow_known, "cgroup_id", flow["cgroup_id"])
    record = {
        **HOST,
        "ts": ns // 10**6,
        "ts_ns": ns,
        "hook": events.HOOKS[flow["hook"]],
        "netns": flow["netns"],
        "sk_cookie": if_known(flow_known, "sk_cookie", flow["sk_cookie"]),
        "saddr": text(flow["saddr"]),
        "daddr": text(flow["daddr"]),
        "cgroup_id": cgroup_id,
        "cgroup": None if cgroup_id is None else cgroup_path(cgroup_id),
        "unit": None,
        "container": None,
        "pod_uid": None,
        "pod": None,
        "namespace": None,
        "workload": None,
        "pid": if_known(known, "process", segment["pid"]),
        "comm": if_known(known, "process", quote_from_bytes(segment["comm"].partition(b"\0")[0], safe=PLAIN)),
        "uid": if_known(flow_known, "uid", flow["uid"]),
        "ack_seq": if_known(known, "ack_seq", segment["ack_seq"]),
        "state": name_of(events.STATES, segment["state"]),
        "ca_state": if_known(known, "ca_state", name_of(events.CA_STATES, segment["ca_state"])),
        "ifindex": if_known(known, "ifindex", segment["ifindex"]),
        **{name: if_known(known, "tcp", segment[name]) for name in events.TCP_FIELDS},
        **{name: flow[name] for name in ("sport", "dport")},
        **{
            name: segment[name]
            for name in (
                "cpu",
                "cpu_seq",
                "tcp_flags",
                "seq",
                "end_seq",
                "payload_len",
                "segs",
                "sample_rate",
                "rules_version",
            )
        },
    }
    if stream is TRANSMITS:
        return {**record, "is_retransmit": if_known(known, "is_retransmit", extra["is_retransmit"] != 0)}
    return {
        **record,
        "cause": name_of(events.CAUSES, extra["cause"]),
        "err": extra["err"],
        "retransmit_no": if_known(known, "retransmit_no", extra["retransmit_no"]),
    }


def expected_key(flow: dict[str, Any]) -> bytes:
    ends = [text(flow[name]) for name in ("saddr", "daddr")]
    source, target = (f"[{end}]" if ":" in end else end for end in ends)
    return f"{source}:{flow['sport']}>{target}:{flow['dport']}".encode()


def parsed(schema: Mapping[str, Any]) -> Any:
    """Return the schema as fastavro wants it, and timestamps as the numbers that they are."""
    plain = copy.deepcopy(dict(schema))
    for field in plain["fields"]:
        if "logicalType" in field["type"]:
            field["type"] = field["type"]["type"]
    return fastavro.parse_schema(plain)


PARSED = {stream.name: parsed(load_schema(stream.schema_file)) for stream in STREAMS}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
