"""Seeds for the fuzzer of native/decode.c: plans for the schemas and messages, in the layout of fuzz_decode.c.

python -m tests.native.decode_seeds FOLDER
"""

import io
import struct
import sys
from pathlib import Path
from typing import Any

import fastavro

from producer.alert.engine import EVENT_FIELDS, FLOW_FIELDS
from producer.consume.accepted import accepted
from producer.consume.plan import Plan, plan_for, plan_for_all
from producer.paths import SCHEMAS

_STEP_BYTES = 8
_TEXTS = ("", "web-1", "unit.service", "\u00e9\u1234\N{PILE OF POO}", "x" * 100)
_NUMBERS = (0, 7, -1, 1_790_000_000_123_456_789, -(1 << 63))


def value_of(kind: Any, number: int) -> Any:
    """Return some value of a type; with another number, another one."""
    if isinstance(kind, list):
        other = next(each for each in kind if each != "null")
        return None if number % 3 == 2 else value_of(other, number)
    if isinstance(kind, dict) and kind["type"] == "array":
        return [value_of(kind["items"], number + at) for at in range(number % 3)]
    if isinstance(kind, dict) and kind["type"] == "map":
        return {_TEXTS[at]: _TEXTS[at + 1] for at in range(number % len(_TEXTS))}
    if isinstance(kind, dict):
        return {field["name"]: value_of(field["type"], number + at) for at, field in enumerate(kind["fields"])}
    long = _NUMBERS[number % len(_NUMBERS)]
    values = {
        "boolean": number % 2 == 0,
        "int": long % (1 << 31),
        "long": long,
        "float": 0.5 * number,
        "double": 0.25 * number,
        "bytes": b"\xff" * number,
        "string": _TEXTS[number % len(_TEXTS)],
    }
    return values[kind]


def framed(schema: Any, number: int) -> bytes:
    """Return a message."""
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, schema, value_of(schema, number))
    return struct.pack(">bI", 0, 1) + buffer.getvalue()


def seed(plan: Plan, messages: list[bytes]) -> bytes:
    """Return an input that decodes messages by a plan."""
    head = struct.pack("<HHHQ", len(plan.steps) // _STEP_BYTES, len(plan.names), len(messages), 12345)
    return head + plan.steps + b"".join(struct.pack("<H", len(each)) + each for each in messages)


def main(folder: Path) -> None:
    """Write seeds: all fields of each schema, and what `rebpf alert` reads of events."""
    for path in sorted(SCHEMAS.glob("*.avsc")):
        schema = accepted(path.read_text())
        messages = [framed(schema, number) for number in range(4)]
        (folder / f"all.{path.stem}").write_bytes(seed(plan_for_all(schema), messages))
        fields = {"tcp_retransmit": EVENT_FIELDS, "tcp_flow": FLOW_FIELDS}.get(path.stem)
        if fields is not None:
            (folder / f"alert.{path.stem}").write_bytes(seed(plan_for(schema, fields), messages))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
