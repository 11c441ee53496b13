"""Rows of a ring to messages: fastavro reads back what the row holds, whatever is known of it, and keys stay right."""

import copy
import io
import ipaddress
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import events
from producer.encode import flows
from producer.encode.avro import Encoder
from producer.encode.batch import BatchEncoder
from producer.errors import SchemaError
from producer.events import FLOW, RETRANSMITS, SEGMENT, STREAMS, TRANSMITS, Batch, EncodedBatch, SchemaId, Stream
from producer.schemas import load_schema

HOST = {"host": "db-1.example", "boot_id": "5f0c0e2a-9e3e-4d0d-8f0e-5a2f0d1c7b11"}
OFFSET_NS = 1_790_000_000_123_456_789
NANOSECONDS = st.integers(0, 10**18)
PADDING = {"_pad0", "_pad1", "_pad2", "_pad3"}


def cgroup_path(cgroup_id: int) -> str | None:
    return None if cgroup_id % 3 == 0 else f"/system.slice/{cgroup_id}"


class PathsOfTests:
    """Cgroups of which every third has no path."""

    found = 0

    def path(self, cgroup_id: int) -> str | None:
        return cgroup_path(cgroup_id)

    def look(self) -> None: ...


def encoder_of(stream: Stream, schema: Mapping[str, Any] | None = None) -> BatchEncoder:
    return BatchEncoder(
        stream, schema or load_schema(stream.schema_file), SchemaId(stream.fixed_schema_id), HOST, PathsOfTests()
    )


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
    )
    extra = members(stream.dtype, cause=st.integers(0, 10), retransmit_no=st.integers(0, 2**31 - 1))
    return st.tuples(flow_values, segment, extra)


def build(stream: Stream, values: Sequence[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> Any:
    rows = np.zeros(len(values), stream.dtype)
    for row, (flow, segment, extra) in zip(rows, values, strict=True):
        for name, value in flow.items():
            row["s"]["flow"][name] = np.frombuffer(value.packed, np.uint8) if name in ("saddr", "daddr") else value
        for name, value in segment.items():
            row["s"][name] = value
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
        if isinstance(field["type"], dict):
            field["type"] = field["type"]["type"]
    return fastavro.parse_schema(plain)


PARSED = {stream.name: parsed(load_schema(stream.schema_file)) for stream in STREAMS}


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
@given(data=st.data())
def test_fastavro_reads_every_field_as_the_row_has_it(stream: Stream, data: st.DataObject) -> None:
    values = data.draw(st.lists(row_values(stream), min_size=1, max_size=8))
    told = encode(encoder_of(stream), stream, build(stream, values))

    for (key, value), row in zip(told, values, strict=True):
        schema_id, record = decode(value, PARSED[stream.name])
        assert schema_id == stream.fixed_schema_id
        assert record == expected(stream, *row)
        assert key == expected_key(row[0])


@given(st.integers(0, 2**32 - 1))
def test_each_frame_begins_with_the_schemas_id(schema_id: int) -> None:
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(schema_id), HOST, PathsOfTests())
    ((_, value),) = encode(encoder, TRANSMITS, np.zeros(1, TRANSMITS.dtype))
    assert decode(value, PARSED["transmit"])[0] == schema_id


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
@given(data=st.data())
def test_a_schema_with_fewer_fields_gives_those_that_it_has(stream: Stream, data: st.DataObject) -> None:
    schema = load_schema(stream.schema_file)
    names = [field["name"] for field in schema["fields"]]
    kept = data.draw(st.sets(st.sampled_from(names), min_size=1))
    schema["fields"] = [field for field in schema["fields"] if field["name"] in kept]
    values = data.draw(st.lists(row_values(stream), min_size=1, max_size=3))
    told = encode(encoder_of(stream, schema), stream, build(stream, values))

    for (key, value), row in zip(told, values, strict=True):
        record = expected(stream, *row)
        assert decode(value, parsed(schema))[1] == {name: record[name] for name in kept}
        assert key == expected_key(row[0])


@pytest.mark.parametrize(
    ("kind", "default"),
    [(["null", "long"], None), ("int", -7), ("string", "none yet"), ("boolean", True)],
)
@given(data=st.data())
def test_a_field_that_no_row_carries_has_its_default(kind: Any, default: Any, data: st.DataObject) -> None:
    schema = load_schema(RETRANSMITS.schema_file)
    at = data.draw(st.integers(0, len(schema["fields"])))
    schema["fields"].insert(at, {"name": "colour", "type": kind, "default": default})
    values = data.draw(st.lists(row_values(RETRANSMITS), min_size=1, max_size=3))
    told = encode(encoder_of(RETRANSMITS, schema), RETRANSMITS, build(RETRANSMITS, values))

    for (_, value), row in zip(told, values, strict=True):
        assert decode(value, parsed(schema))[1] == {**expected(RETRANSMITS, *row), "colour": default}


def test_a_field_that_no_row_carries_and_that_has_no_default_is_refused() -> None:
    schema = load_schema(TRANSMITS.schema_file)
    schema["fields"].append({"name": "colour", "type": ["null", "long"]})
    with pytest.raises(SchemaError, match=r"tcp_transmit\.avsc: no event carries the field colour"):
        encoder_of(TRANSMITS, schema)


def plain_rows(count: int, first: int = 0) -> Any:
    """Rows of as many flows, told apart by the cookie, with the cookie's number in both addresses' last bytes."""
    rows = np.zeros(count, TRANSMITS.dtype)
    number = np.arange(first, first + count)
    flow = rows["s"]["flow"]
    flow["sk_cookie"] = number
    flow["flow_known"] = events.KNOWN["sk_cookie"]
    for name in ("saddr", "daddr"):
        flow[name][:, 0] = 0x20
        flow[name][:, 12:] = number.astype(">u4").view(np.uint8).reshape(-1, 4)
    flow["sport"], flow["dport"] = number % 50_000, 443
    return rows


def plain_key(number: int) -> bytes:
    address = ipaddress.IPv6Address(b"\x20" + bytes(11) + number.to_bytes(4, "big"))
    return f"[{address}]:{number % 50_000}>[{address}]:443".encode()


def assert_plain(told: Sequence[tuple[bytes, bytes]], first: int) -> None:
    for number, (key, value) in enumerate(told, first):
        assert key == plain_key(number)
        assert decode(value, PARSED["transmit"])[1]["sk_cookie"] == number


def test_batches_keep_their_keys_and_values_when_the_flow_table_starts_anew() -> None:
    encoder = encoder_of(TRANSMITS)
    most, half = flows._MOST_FLOWS, 2048
    before = [plain_rows(2 * half, first) for first in range(0, most, 2 * half)]
    # The last to be encoded before: its keys lie where those of new flows would lie next.
    before.append(np.concatenate([plain_rows(half), plain_rows(half, most)]))
    after = plain_rows(2 * half, 10**6)
    kept = [encoder.encode(Batch(TRANSMITS, rows), OFFSET_NS) for rows in (*before, after)]

    assert_plain(messages(kept[0]), 0)
    assert_plain(messages(kept[-2])[:half], 0)
    assert_plain(messages(kept[-2])[half:], most)
    assert_plain(messages(kept[-1]), 10**6)


def test_the_flow_table_does_not_grow_without_bound() -> None:
    table = flows.FlowTable(Encoder(load_schema(TRANSMITS.schema_file)), [], HOST, PathsOfTests())
    for first in range(0, 2 * flows._MOST_FLOWS, 4096):
        table.number(plain_rows(4096, first))
        assert len(table.keys) <= flows._MOST_FLOWS + 4096


@pytest.mark.parametrize("before", [0, flows._MOST_FLOWS + 1])
def test_a_burst_of_new_flows_is_taken_a_few_at_a_time(before: int) -> None:
    table = flows.FlowTable(Encoder(load_schema(TRANSMITS.schema_file)), [], HOST, PathsOfTests())
    if before:
        table.number(plain_rows(before))
    burst = plain_rows(20_000, 10**6)
    left = burst
    while len(left):
        count = table.fit(left)
        assert count > 0
        had = len(table.keys)
        table.number(left[:count])
        assert len(table.keys) - had <= flows.MOST_NEW
        left = left[count:]
    assert table.fit(burst) == len(burst)
    assert table.fit(np.repeat(plain_rows(1, 10**7), 4096)) == 4096


def test_flows_that_share_a_place_are_told_apart() -> None:
    """More flows than places, so that many must share; each comes twice in a batch, and again in the next."""
    encoder = encoder_of(TRANSMITS)
    once = plain_rows(1 << 15, 7)
    places = flows.FlowTable(Encoder(load_schema(TRANSMITS.schema_file)), [], HOST, PathsOfTests())
    assert len(set(places.number(once).tolist())) == 1 << 15
    some = plain_rows(3000, 7)
    rows = np.concatenate([some, some[::-1]])
    for _ in range(2):
        encoder.encode(Batch(TRANSMITS, once), OFFSET_NS)
        told = encode(encoder, TRANSMITS, rows)
        assert_plain(told[:3000], 7)
        assert_plain(told[3000:][::-1], 7)


def test_flows_that_differ_in_one_byte_are_told_apart_though_they_share_a_place() -> None:
    table = flows.FlowTable(Encoder(load_schema(TRANSMITS.schema_file)), [], HOST, PathsOfTests())
    table._factors[:] = 0  # all flows have the place 0
    base = plain_rows(1)
    assert table.number(base).tolist() == [0]
    offsets = [
        at
        for name, (member, start, *_) in (FLOW.fields or {}).items()
        if name not in ("hook", "_pad0")
        for at in range(start, start + member.itemsize)
    ]
    for number, at in enumerate(offsets, 1):
        changed = bytearray(base["s"]["flow"].tobytes())
        changed[at] ^= 1
        other = base.copy()
        other["s"]["flow"] = np.frombuffer(bytes(changed), FLOW)
        assert table.number(other).tolist() == [number]
        assert table.number(base).tolist() == [0]
        assert table.number(np.concatenate([other, base, other])).tolist() == [number, 0, number]
        assert table.number(base).tolist() == [0]


@pytest.mark.parametrize(
    ("packed", "shown"),
    [
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:0:1:0:0:1", "2001:db8::1:0:0:1"),
        ("::", "::"),
        ("::1", "::1"),
        ("::192.0.2.1", "::c000:201"),
        ("64:ff9b::192.0.2.1", "64:ff9b::c000:201"),
    ],
)
def test_addresses_are_in_the_text_form_of_rfc_5952(packed: str, shown: str) -> None:
    assert flows.address(ipaddress.IPv6Address(packed).packed) == shown


class LatePaths:
    """Cgroups that are found only after they were asked for."""

    def __init__(self) -> None:
        self.found = 0
        self.names: dict[int, str] = {}

    def path(self, cgroup_id: int) -> str | None:
        return self.names.get(cgroup_id)

    def look(self) -> None: ...


def test_a_flow_gets_the_path_of_its_cgroup_when_that_is_known():
    paths = LatePaths()
    schema = load_schema(TRANSMITS.schema_file)
    encoder = BatchEncoder(TRANSMITS, schema, SchemaId(1), HOST, paths)
    rows = np.zeros(3, TRANSMITS.dtype)
    rows["s"]["flow"]["flow_known"] = events.KNOWN["cgroup_id"]
    rows["s"]["flow"]["cgroup_id"] = 7, 8, 7

    def read() -> list[tuple[str | None, str | None]]:
        records = [decode(value, schema)[1] for _, value in encode(encoder, TRANSMITS, rows)]
        return [(record["cgroup"], record["unit"]) for record in records]

    assert read() == [(None, None)] * 3
    paths.names[7], paths.found = "/system.slice/a.service", 1
    assert read() == [("/system.slice/a.service", "a.service"), (None, None), ("/system.slice/a.service", "a.service")]
    assert read() == [("/system.slice/a.service", "a.service"), (None, None), ("/system.slice/a.service", "a.service")]


def test_names_of_numbers_that_mean_nothing_are_unknown():
    encoder, schema = encoder_of(TRANSMITS), load_schema(TRANSMITS.schema_file)
    rows = np.zeros(1, TRANSMITS.dtype)
    rows["s"]["known"] = events.KNOWN["ca_state"]
    rows["s"]["flow"]["hook"] = rows["s"]["state"] = rows["s"]["ca_state"] = 255
    record = decode(encode(encoder, TRANSMITS, rows)[0][1], schema)[1]
    assert (record["hook"], record["state"], record["ca_state"]) == (events.UNKNOWN,) * 3


@pytest.mark.parametrize("name", ["cpu", "payload_len", "segs", "ts", "cpu_seq"])
def test_a_number_that_no_field_can_hold_is_refused(name):
    rows = np.zeros(3, TRANSMITS.dtype)
    rows["s"][name][1] = np.iinfo(rows["s"][name].dtype).max
    with pytest.raises(ValueError, match="too large for its field"):
        encode(encoder_of(TRANSMITS), TRANSMITS, rows)
