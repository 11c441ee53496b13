"""Decoded events, and messages of them, with values that tests name."""

import io
import json
import struct
from typing import Any

import fastavro

from producer.events import Stream
from producer.paths import SCHEMAS

SECOND_NS = 1_000_000_000
TRANSMIT: dict[str, Any] = {
    "ts_ns": 1_790_000_000_123_456_000,
    "host": "web-1",
    "boot_id": "boot",
    "netns": 1,
    "sk_cookie": 5,
    "saddr": "10.0.0.1",
    "sport": 40001,
    "daddr": "fd00::2",
    "dport": 443,
    "tcp_flags": 24,
    "seq": 4294967290,
    "end_seq": 1442,
    "ack_seq": 77,
    "payload_len": 1448,
    "segs": 1,
    "is_retransmit": False,
}
RETRANSMIT = {
    **{name: value for name, value in TRANSMIT.items() if name != "is_retransmit"},
    "cause": "rto",
    "retransmit_no": 3,
    "rto_us": 204_000,
    "srtt_us": 57,
    "err": 0,
}
VALUES = {"long": 1_790_000_000_123, "int": 7, "string": "text", "boolean": False, "map": {"dc": "fra-1"}}


def message(stream: Stream, **fields: Any) -> bytes:
    schema = json.loads((SCHEMAS / stream.schema_file).read_text())
    record = {field["name"]: VALUES[type_name(field["type"])] for field in schema["fields"]} | fields
    buffer = io.BytesIO()
    buffer.write(struct.pack(">bI", 0, stream.fixed_schema_id))
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(schema), record)
    return buffer.getvalue()


def type_name(kind: Any) -> str:
    if isinstance(kind, list):
        return type_name(kind[1])
    return kind["type"] if isinstance(kind, dict) else kind


def event(number: int, second: float, host: str = "web-1", segs: int = 1, **fields: Any) -> dict[str, Any]:
    made = {"ts_ns": int(second * SECOND_NS), "host": host, "boot_id": "boot", "cpu": 0, "cpu_seq": number}
    made |= {"saddr": "10.0.0.1", "sport": 40_000, "daddr": "192.0.2.1", "dport": 443}
    return made | {"segs": segs, "sample_rate": 1} | fields
