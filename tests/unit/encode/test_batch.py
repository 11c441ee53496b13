"""Rows of a ring to messages: fastavro reads back what the row holds, whatever is known of it, and keys stay right."""

import copy
import io
import ipaddress
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import events
from producer.encode.batch import BatchEncoder, Key
from producer.encode.isolate import Unencodable
from producer.errors import SchemaError
from producer.events import FLOW, RETRANSMITS, SEGMENT, STREAMS, TRANSMITS, Batch, EncodedBatch, SchemaId, Stream
from producer.host.text import name as shown_name
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

    def look(self, ids: Iterable[int] = ()) -> None: ...


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


def test_a_million_flows_take_no_memory() -> None:
    encoder = encoder_of(TRANSMITS)
    before = _resident_bytes()
    for first in range(0, 10**6, 4000):
        encoder.encode(Batch(TRANSMITS, plain_rows(4000, first)), OFFSET_NS)
        if first == 40_000:
            before = _resident_bytes()
    assert _resident_bytes() - before < 4 << 20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_batches_keep_their_messages_while_others_are_encoded() -> None:
    encoder = encoder_of(TRANSMITS)
    kept = [encoder.encode(Batch(TRANSMITS, plain_rows(100, first)), OFFSET_NS) for first in range(0, 1000, 100)]
    for first, encoded in zip(range(0, 1000, 100), kept, strict=True):
        assert_plain(messages(encoded), first)


def test_rows_of_a_ring_lie_apart() -> None:
    records = np.zeros(10, np.dtype([("head", "u8"), ("row", TRANSMITS.dtype)]))
    records["row"] = plain_rows(10)
    assert_plain(encode(encoder_of(TRANSMITS), TRANSMITS, records["row"]), 0)


def test_a_batch_may_be_empty() -> None:
    for key in ("flow", "host"):
        assert encode(encoder_of(TRANSMITS, key=key), TRANSMITS, plain_rows(0)) == []


@pytest.mark.parametrize("host", ["db-1", "", "h\u00f6st", "h" * 5000])
def test_the_host_is_the_key_of_all_its_events(host: str) -> None:
    fields = {**HOST, "host": host}
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), fields, PathsOfTests(), "host")
    encoded = encoder.encode(Batch(TRANSMITS, plain_rows(3)), OFFSET_NS)
    assert [key for key, _ in messages(encoded)] == [host.encode()] * 3
    assert len(set(encoded.key_starts.tolist())) == 1
    assert [decode(value, PARSED["transmit"])[1]["host"] for _, value in messages(encoded)] == [host] * 3


@given(st.lists(addresses | st.binary(min_size=16, max_size=16).map(ipaddress.IPv6Address), min_size=1, max_size=50))
def test_addresses_are_in_the_text_form_of_rfc_5952(drawn: list[ipaddress.IPv6Address]) -> None:
    rows = np.zeros(len(drawn), TRANSMITS.dtype)
    for row, address in zip(rows, drawn, strict=True):
        row["s"]["flow"]["saddr"] = np.frombuffer(address.packed, np.uint8)
    told = encode(encoder_of(TRANSMITS), TRANSMITS, rows)
    assert [decode(value, PARSED["transmit"])[1]["saddr"] for _, value in told] == [text(each) for each in drawn]


@pytest.mark.parametrize("zeros", range(256))
def test_the_longest_run_of_zero_groups_is_left_out(zeros: int) -> None:
    groups = b"".join(b"\0\0" if zeros >> group & 1 else b"\x0a\xbc" for group in range(8))
    rows = np.zeros(1, TRANSMITS.dtype)
    rows["s"]["flow"]["daddr"] = np.frombuffer(groups, np.uint8)
    ((_, value),) = encode(encoder_of(TRANSMITS), TRANSMITS, rows)
    assert decode(value, PARSED["transmit"])[1]["daddr"] == str(ipaddress.IPv6Address(groups))


@pytest.mark.parametrize(
    ("packed", "shown"),
    [
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:0:1:0:0:1", "2001:db8::1:0:0:1"),
        ("::192.0.2.1", "::c000:201"),
        ("64:ff9b::192.0.2.1", "64:ff9b::c000:201"),
    ],
)
def test_only_mapped_addresses_are_shown_as_ipv4(packed: str, shown: str) -> None:
    rows = np.zeros(1, TRANSMITS.dtype)
    rows["s"]["flow"]["saddr"] = np.frombuffer(ipaddress.IPv6Address(packed).packed, np.uint8)
    ((_, value),) = encode(encoder_of(TRANSMITS), TRANSMITS, rows)
    assert decode(value, PARSED["transmit"])[1]["saddr"] == shown


def cgroup_rows(ids: Sequence[int]) -> Any:
    rows = np.zeros(len(ids), TRANSMITS.dtype)
    rows["s"]["flow"]["flow_known"] = events.KNOWN["cgroup_id"]
    rows["s"]["flow"]["cgroup_id"] = ids
    return rows


class NamedPaths:
    """Cgroups with chosen paths; counts the look-ups."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        self.found = 0
        self.asked = 0
        self._paths = paths

    def path(self, cgroup_id: int) -> str | None:
        self.asked += 1
        return self._paths.get(cgroup_id)

    def look(self, ids: Iterable[int] = ()) -> None: ...


def cgroups_of(encoder: BatchEncoder, ids: Sequence[int]) -> list[str | None]:
    told = encode(encoder, TRANSMITS, cgroup_rows(ids))
    return [decode(value, PARSED["transmit"])[1]["cgroup"] for _, value in told]


@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=5))
def test_a_cgroup_may_have_any_name(names: list[bytes]) -> None:
    shown = [shown_name(b"/" + raw) for raw in names]
    paths = NamedPaths(dict(enumerate(shown)))
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), HOST, paths)
    assert cgroups_of(encoder, range(len(names))) == shown
    assert cgroups_of(encoder, range(len(names))) == shown
    assert paths.asked == len(names)


def test_many_cgroups_are_looked_up_a_few_at_a_time() -> None:
    paths = NamedPaths({number: f"/{number}" for number in range(1000)})
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), HOST, paths)
    for known in (256, 512, 768, 1000):
        assert cgroups_of(encoder, range(1000)) == [f"/{number}" if number < known else None for number in range(1000)]
        assert paths.asked == known
    assert paths.asked == 1000


@pytest.mark.parametrize("length", [1, 1000])
def test_the_memory_of_cgroups_is_bounded(length: int) -> None:
    """More cgroups than are remembered; all long, or all short. Some have no path."""
    paths = NamedPaths({number: f"/{number}".ljust(length, "x") for number in range(40_000) if number % 3})
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), HOST, paths)
    before = _resident_bytes()
    for first in range(0, 40_000, 200):
        ids = range(first, first + 200)
        told = [each and each.rstrip("x") for each in cgroups_of(encoder, ids)]
        assert told == [f"/{number}" if number % 3 else None for number in ids]
    assert _resident_bytes() - before < 16 << 20


class LatePaths:
    """Cgroups that are found only after they were asked for."""

    def __init__(self) -> None:
        self.found = 0
        self.names: dict[int, str] = {}

    def path(self, cgroup_id: int) -> str | None:
        return self.names.get(cgroup_id)

    def look(self, ids: Iterable[int] = ()) -> None: ...


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


@pytest.mark.parametrize("member", ["cpu", "payload_len", "segs", "ts", "cpu_seq"])
def test_a_number_that_no_field_can_hold_is_refused(member):
    rows = np.zeros(5, TRANSMITS.dtype)
    most = np.iinfo(rows["s"][member].dtype).max
    rows["s"][member][[1, 3]] = most
    with pytest.raises(
        Unencodable, match=f"{member.replace('ts', 'ts.*')}: {most} is too large for its field"
    ) as error:
        encode(encoder_of(TRANSMITS), TRANSMITS, rows)
    assert error.value.rows.tolist() == [False, True, False, True, False]
