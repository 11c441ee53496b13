"""The heartbeat, read back by fastavro as a consumer reads it, and what the documents say of it."""

import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import fastavro
import pytest

from producer.events import HEARTBEATS, STREAMS, SchemaId
from producer.health.heartbeat import INTERVAL_S, HeartbeatEncoder
from producer.paths import SCHEMAS
from tests.support.statuses import status

SCHEMA: dict[str, Any] = json.loads((SCHEMAS / "rebpf_agent.avsc").read_text())
NOW_S = 1_790_000_123.456


def decoded(value: bytes, schema: Any = SCHEMA) -> tuple[int, Any]:
    zero, schema_id = struct.unpack(">bI", value[:5])
    assert zero == 0
    body = io.BytesIO(value[5:])
    record = fastavro.schemaless_reader(body, fastavro.parse_schema(schema), None)
    assert not body.read()
    return schema_id, record


def test_a_consumer_reads_the_whole_status():
    key, value = HeartbeatEncoder(SchemaId(70_000)).encode(status(), NOW_S)
    schema_id, record = decoded(value)

    assert key.decode() == "höst-1"
    assert schema_id == 70_000
    expected = status().as_dict()
    del expected["started_s"]
    started, now = record.pop("started"), record.pop("ts")
    assert (started.timestamp(), now.timestamp()) == (1_790_000_000.25, NOW_S)
    assert record == {**expected, "interval_s": INTERVAL_S}


def test_each_record_stands_by_itself():
    encoder = HeartbeatEncoder(HEARTBEATS.fixed_schema_id)
    first, second = (decoded(encoder.encode(status(pid=pid), NOW_S)[1]) for pid in (1, 2))

    assert (first[0], second[0]) == (3, 3)
    assert (first[1]["pid"], second[1]["pid"]) == (1, 2)


def test_a_run_says_that_it_ends():
    record = decoded(HeartbeatEncoder(HEARTBEATS.fixed_schema_id).encode(status(stopped=True, streams=()), NOW_S)[1])[1]

    assert (record["state"], record["streams"]) == ("stopped", [])


def test_the_fixed_ids_and_topics_are_different_ones():
    assert len({HEARTBEATS.fixed_schema_id, *(stream.fixed_schema_id for stream in STREAMS)}) == len(STREAMS) + 1
    assert len({HEARTBEATS.topic, *(stream.topic for stream in STREAMS)}) == len(STREAMS) + 1


def records(schema: Any) -> list[Any]:
    """Return a record and those within it."""
    if not isinstance(schema, dict):
        return []
    inner = [field["type"] for field in schema.get("fields", [])] + [schema.get("items")]
    within = [record for kind in inner for record in records(kind)]
    return [schema, *within] if schema["type"] == "record" else within


def test_the_schema_can_grow_and_says_what_each_field_is():
    names = [record["name"] for record in records(SCHEMA)]
    assert names == ["RebpfAgent", "AgentStream", "AgentLoss"]
    for field in (field for record in records(SCHEMA) for field in record["fields"]):
        assert field["doc"].endswith("."), field["name"]
        assert not isinstance(field["type"], list) or (field["type"][0], field["default"]) == ("null", None)
    grown = {**SCHEMA, "fields": [*SCHEMA["fields"], {"name": "new", "type": ["null", "long"], "default": None}]}
    value = io.BytesIO(HeartbeatEncoder(HEARTBEATS.fixed_schema_id).encode(status(), NOW_S)[1][5:])
    record: Any = fastavro.schemaless_reader(value, fastavro.parse_schema(SCHEMA), fastavro.parse_schema(grown))
    assert record["new"] is None


def kind_of(kind: Any) -> str:
    if isinstance(kind, list):
        return " or ".join(map(kind_of, reversed(kind)))
    if not isinstance(kind, dict):
        return str(kind)
    if kind["type"] == "array":
        return f"array of {kind_of(kind['items'])}"
    if kind["type"] == "map":
        return f"map of {kind['values']}"
    return f"{kind['type']} ({kind['logicalType']})" if "logicalType" in kind else str(kind["name"])


@pytest.mark.parametrize("record", records(SCHEMA), ids=lambda record: record["name"])
def test_events_md_has_every_field_of_the_heartbeat_as_it_is(record):
    text = (Path(__file__).resolve().parents[3] / "docs" / "events.md").read_text()
    section = text.split("\n## Heartbeat\n")[1].split(f"\n### {record['name']}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.*) \|$", section, re.MULTILINE)
    assert rows == [(field["name"], kind_of(field["type"]), field["doc"]) for field in record["fields"]]
