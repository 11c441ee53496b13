"""Released schemas never change, and current and released versions can read each other's records."""

import copy
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from fastavro.schema import SchemaParseException

from producer.alert.record import AlertEncoder
from producer.encode.batch import BatchEncoder
from producer.events import KNOWN, STREAMS, Batch, SchemaId
from producer.health.heartbeat import HeartbeatEncoder
from producer.host.cgroups import CgroupPaths
from producer.paths import SCHEMAS
from tests.support.alerts import COUNT, LOSS, SILENT
from tests.support.statuses import status

Schema = dict[str, Any]

RELEASED = {
    "0.1.0/rebpf_agent.avsc": "3015383052be6b45e0e3cc2cfebec97cdce44271d4eb007aa0aaf3cc65209e3f",
    "0.1.0/tcp_alerts.avsc": "31292bc0c7a384033816515f91017af707d3bab625f60854e357e40e7cf8862a",
    "0.1.0/tcp_retransmit.avsc": "8fee8b36d7c56a71dffcd5515ca5b7de25f2336bcaa1aed1fa78e30b0f45dc14",
    "0.1.0/tcp_transmit.avsc": "766fb74d7629f00736022a2491040a03059b6adc93a96a3a6148df6edaa6c5e8",
}
"""SHA-256 of each schema that was released: a line is added with a release, and none ever changes."""

HOST = {"host": "db-1.example", "boot_id": "5f0c0e2a-9e3e-4d0d-8f0e-5a2f0d1c7b11", "labels": {"env": "prod"}}
FRAME_BYTES = 5
ROWS = len(KNOWN) + 2
NOW_S = 1_790_000_123.456
STREAM_OF = {stream.schema_file: stream for stream in STREAMS}


def read(path: str | Path) -> Schema:
    schema: Schema = json.loads((SCHEMAS / path).read_text())
    return schema


def test_released_schemas_are_what_they_were() -> None:
    folder = SCHEMAS / "released"
    there = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in there.items()} == RELEASED


def test_each_released_topic_is_still_published() -> None:
    assert {Path(name).name for name in RELEASED} <= {path.name for path in SCHEMAS.glob("*.avsc")}


def bodies(name: str, schema: Schema) -> list[bytes]:
    """Return records of this version's encoder with `schema`: all fields set, all optional ones null, and between."""
    stream = STREAM_OF.get(name)
    if stream is None:
        return [written(body, read(name), schema) for body in OTHERS[name]()]
    rows = np.zeros(ROWS, stream.dtype)
    events = rows["s"] if "s" in (stream.dtype.names or ()) else rows
    events["known"] = [0, *(1 << bit for bit in range(ROWS - 2)), sum(KNOWN.values())]
    events["flow"]["flow_known"] = events["known"]
    events["cpu_seq"] = np.arange(1, ROWS + 1)
    events["sample_rate"] = 1
    encoded = BatchEncoder(stream, schema, SchemaId(1), HOST, CgroupPaths(None)).encode(Batch(stream, rows), 10**18)
    payload = encoded.payload.tobytes()
    spans = zip(encoded.starts.tolist(), encoded.lengths.tolist(), strict=True)
    return [payload[start + FRAME_BYTES : start + length] for start, length in spans]


def heartbeats() -> list[bytes]:
    encoder = HeartbeatEncoder(SchemaId(3))
    return [encoder.encode(each, NOW_S)[1][FRAME_BYTES:] for each in (status(), status(streams=()))]


def alerts() -> list[bytes]:
    encoder = AlertEncoder(SchemaId(4))
    return [encoder.encode(each, NOW_S)[1][FRAME_BYTES:] for each in (LOSS, COUNT, SILENT)]


OTHERS = {"rebpf_agent.avsc": heartbeats, "tcp_alerts.avsc": alerts}
"""Records of the topics that have no events, as this version makes them."""


def written(body: bytes, now: Schema, schema: Schema) -> bytes:
    """Return a record of this version with the fields that `schema` has."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(copy.deepcopy(schema)), decoded(body, now, now))
    return out.getvalue()


def decoded(body: bytes, writer: Schema, reader: Schema) -> Mapping[str, Any]:
    source = io.BytesIO(body)
    parsed = (fastavro.parse_schema(copy.deepcopy(each)) for each in (writer, reader))
    record: Any = fastavro.schemaless_reader(source, *parsed)
    assert not source.read()
    return record


def assert_read(name: str, written_with: Schema, read_with: Schema) -> None:
    """Check that a consumer with one schema reads records of the other, with equal values in common fields."""
    shared = {field["name"] for field in written_with["fields"]} & {field["name"] for field in read_with["fields"]}
    for body in bodies(name, written_with):
        own = decoded(body, written_with, written_with)
        seen = decoded(body, written_with, read_with)
        assert seen.keys() == {field["name"] for field in read_with["fields"]}
        assert {key: seen[key] for key in shared} == {key: own[key] for key in shared}


@pytest.mark.parametrize("released", RELEASED)
def test_a_consumer_with_a_released_schema_reads_new_events(released: str) -> None:
    name = Path(released).name
    assert_read(name, read(name), read(f"released/{released}"))


@pytest.mark.parametrize("released", RELEASED)
def test_a_consumer_with_the_new_schema_reads_events_of_a_release(released: str) -> None:
    name = Path(released).name
    assert_read(name, read(f"released/{released}"), read(name))


@pytest.mark.parametrize("released", RELEASED)
def test_new_fields_follow_those_of_a_release_so_its_file_reads_new_events_without_a_registry(released: str) -> None:
    old, now = read(f"released/{released}"), read(Path(released).name)
    for body in bodies(Path(released).name, now):
        whole = decoded(body, now, now)
        seen = fastavro.schemaless_reader(io.BytesIO(body), fastavro.parse_schema(copy.deepcopy(old)), None)
        assert seen == {field["name"]: whole[field["name"]] for field in old["fields"]}


def grown(schema: Schema) -> Schema:
    """Return a compatible later version: with one more field, with a default."""
    return {**schema, "fields": [*schema["fields"], {"name": "new", "type": ["null", "long"], "default": None}]}


@pytest.mark.parametrize("name", [*STREAM_OF, *OTHERS])
def test_a_field_with_a_default_may_be_added(name: str) -> None:
    now = read(name)
    assert_read(name, now, grown(now))
    assert_read(name, grown(now), now)


@pytest.mark.parametrize("name", STREAM_OF)
def test_a_change_that_breaks_a_reader_is_seen(name: str) -> None:
    now = read(name)
    without_default = {**now, "fields": [*now["fields"], {"name": "new", "type": "long"}]}
    other_type = {**now, "fields": [{**field, "type": "string"} if field["name"] == "sport" else field
                                    for field in now["fields"]]}  # fmt: skip
    for changed in (without_default, other_type):
        with pytest.raises((SchemaParseException, fastavro.read.SchemaResolutionError)):
            assert_read(name, now, changed)
