"""Rows of a ring to messages: fastavro reads back what the row holds, whatever is known of it, and keys stay right."""

import ipaddress
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import events
from producer.encode.batch import BatchEncoder
from producer.encode.isolate import Unencodable
from producer.errors import SchemaError
from producer.events import RETRANSMITS, TRANSMITS, Batch, SchemaId, Stream
from producer.schemas import load_schema
from tests.support.encoding import (
    HOST,
    OFFSET_NS,
    PARSED,
    PathsOfTests,
    addresses,
    build,
    decode,
    encode,
    encoder_of,
    expected,
    expected_key,
    messages,
    parsed,
    resident_bytes,
    row_values,
    text,
)

SEGMENTS = pytest.mark.parametrize("stream", [TRANSMITS, RETRANSMITS], ids=lambda stream: stream.name)
"""Streams of segments; those of connections are in test_flows."""


@SEGMENTS
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


@SEGMENTS
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
    schema["fields"].insert(at, {"name": "color", "type": kind, "default": default})
    values = data.draw(st.lists(row_values(RETRANSMITS), min_size=1, max_size=3))
    told = encode(encoder_of(RETRANSMITS, schema), RETRANSMITS, build(RETRANSMITS, values))

    for (_, value), row in zip(told, values, strict=True):
        assert decode(value, parsed(schema))[1] == {**expected(RETRANSMITS, *row), "color": default}


def test_a_field_that_no_row_carries_and_that_has_no_default_is_refused() -> None:
    schema = load_schema(TRANSMITS.schema_file)
    schema["fields"].append({"name": "color", "type": ["null", "long"]})
    with pytest.raises(SchemaError, match=r"tcp_transmit\.avsc: no event carries the field color"):
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
    before = resident_bytes()
    for first in range(0, 10**6, 4000):
        encoder.encode(Batch(TRANSMITS, plain_rows(4000, first)), OFFSET_NS)
        if first == 40_000:
            before = resident_bytes()
    assert resident_bytes() - before < 4 << 20


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


@SEGMENTS
@given(data=st.data())
def test_a_flow_seen_before_is_encoded_as_by_a_new_encoder(stream: Stream, data: st.DataObject) -> None:
    rows = build(stream, data.draw(st.lists(row_values(stream), min_size=1, max_size=3)))
    rows = np.tile(rows, 3)
    head = rows.view("u1").reshape(len(rows), -1)[:, :64]
    changed = data.draw(st.lists(st.tuples(st.integers(0, len(rows) - 1), st.integers(0, 63)), max_size=4))
    for row, byte in changed:
        head[row, byte] ^= 1
    alone = [encode(encoder_of(stream), stream, rows[i : i + 1])[0] for i in range(len(rows))]
    assert encode(encoder_of(stream), stream, rows) == alone
