"""The readers reject truncated, unframed and overlong values, and distinguish null from empty."""

import struct
from io import BytesIO

import fastavro
import pytest

from tests.support.servers.consume import Message, decode, parse_kcat

SCHEMA = {"type": "record", "name": "R", "fields": [{"name": "a", "type": "long"}]}


def framed(magic: int, schema_id: int, record: dict[str, int]) -> bytes:
    body = BytesIO()
    fastavro.schemaless_writer(body, SCHEMA, record)
    return struct.pack(">bI", magic, schema_id) + body.getvalue()


def test_kcat_output_is_split_by_sizes_not_by_what_the_bytes_look_like():
    assert parse_kcat(b"2 7 1700000000000 4 2\n0 0\n\n\xff0 0 -1 -1 0\n") == [
        Message(b"0 0\n", b"\n\xff", 2, 7, 1_700_000_000_000),
        Message(None, b"", 0, 0, -1),
    ]


def test_kcat_output_that_ends_inside_a_message_is_refused():
    with pytest.raises(ValueError, match="3 bytes wanted"):
        parse_kcat(b"0 0 1 1 3\nkva")


def test_kcat_output_with_bytes_between_messages_is_refused():
    with pytest.raises(ValueError, match="no message at byte 12"):
        parse_kcat(b"0 0 1 1 1\nkv\n0 1 1 1 1\nkv")


def test_a_framed_value_decodes_to_its_schema_id_and_record():
    assert decode(framed(0, 70_000, {"a": -1}), SCHEMA) == (70_000, {"a": -1})


def test_a_parsed_schema_decodes_too():
    assert decode(framed(0, 1, {"a": 2**62}), fastavro.parse_schema(SCHEMA)) == (1, {"a": 2**62})


def test_a_value_with_another_magic_byte_is_refused():
    with pytest.raises(ValueError, match="magic byte 1"):
        decode(framed(1, 7, {"a": -1}), SCHEMA)


def test_a_value_with_bytes_after_its_record_is_refused():
    with pytest.raises(ValueError, match="1 bytes after"):
        decode(framed(0, 7, {"a": -1}) + b"\x00", SCHEMA)


def test_a_value_that_ends_inside_its_record_is_refused():
    with pytest.raises((EOFError, IndexError)):
        decode(framed(0, 7, {"a": 1_000_000})[:-1], SCHEMA)
