"""Avro files that cost their reader time, memory or its stack: a few bytes that a schema of others unfolds."""

import json
from typing import Any

_SYNC = bytes(16)
_NULLS = {"type": "array", "items": "null"}
_MANY = b"\x80\xe1\xeb\x17"
"""25 million, as Avro writes it: the length of a list whose items take no byte."""


def container(schema: Any, data: bytes, *, codec: bytes = b"null") -> bytes:
    """Return an object container file of one record."""
    entries = {b"avro.schema": json.dumps(schema).encode(), b"avro.codec": codec}
    header = b"".join(_long(len(part)) + part for entry in entries.items() for part in entry)
    return b"Obj\x01" + _long(len(entries)) + header + b"\0" + _SYNC + _long(1) + _long(len(data)) + data + _SYNC


def _long(value: int) -> bytes:
    value <<= 1
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _flow(kind: Any) -> dict[str, Any]:
    return {"type": "record", "name": "TcpFlow", "namespace": "rebpf.v1", "fields": [{"name": "x", "type": kind}]}


HOSTILE = {
    "list": container(_NULLS, _MANY + b"\0"),
    "union of lists": container([_NULLS, "null"], b"\0" + _MANY + b"\0"),
    "record with a list": container(_flow(_NULLS), _MANY + b"\0"),
    "union with a record with a list": container([_flow(_NULLS)], b"\0" + _MANY + b"\0"),
    "recursive record": container(_flow(["null", "TcpFlow"]), b"\x02" * 100_000 + b"\0"),
    "union with a recursive record": container([_flow(["null", "TcpFlow"])], b"\0" + b"\x02" * 100_000 + b"\0"),
}
