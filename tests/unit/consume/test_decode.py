"""Decoding: our messages are read, all others raise one kind of error."""

import io
import json
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.alert.engine import Engine
from producer.alert.model import Counts
from producer.alert.silence import Hosts
from producer.config import load
from producer.consume import decode
from producer.consume.accepted import NotAccepted, accepted
from producer.consume.decode import Decoder, UndecodableError
from producer.errors import Stopped, UnavailableError
from producer.events import SchemaId
from producer.paths import SCHEMAS
from tests.support.batches import decoded
from tests.support.records import VALUES, type_name

OURS = {name: json.loads((SCHEMAS / f"{file}.avsc").read_text()) for name, file in
        (("TcpTransmit", "tcp_transmit"), ("TcpAlert", "tcp_alerts"), ("RebpfAgent", "rebpf_agent"))}  # fmt: skip
OTHER = {**OURS["TcpTransmit"], "fields": [*OURS["TcpTransmit"]["fields"], {"name": "a", "type": "long", "default": 0}]}
"""Another version of a schema of ours."""


def frame(schema_id: int, schema: dict[str, Any], **fields: Any) -> bytes:
    """Return a message; fields that are not given have some value of their type."""
    buffer = io.BytesIO()
    buffer.write(struct.pack(">bI", 0, schema_id))
    values = {field["name"]: VALUES[type_name(field["type"])] for field in schema["fields"]}
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(schema), {**values, **fields})
    return buffer.getvalue()


class Registry(BaseHTTPRequestHandler):
    """Has schemas 77 and 100 to 109, and counts requests. For 79 it answers `failure`: a status and an error code."""

    requests: list[str]
    failure = 404, 40403

    def do_GET(self) -> None:
        self.requests.append(self.path)
        answers: dict[str, tuple[int, dict[str, Any]]] = {
            "/schemas/ids/77": (200, {"schema": json.dumps(OTHER)}),
            "/schemas/ids/79": (self.failure[0], {"error_code": self.failure[1], "message": "failed"}),
            **{f"/schemas/ids/{number}": (200, {"schema": json.dumps(OTHER)}) for number in range(100, 110)},
            "/config": (200, {"compatibilityLevel": "BACKWARD"}),
        }
        status, answer = answers.get(self.path, (404, {"error_code": 40403, "message": "Schema not found"}))
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def registry() -> Iterator[ThreadingHTTPServer]:
    Registry.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def at(port: int) -> load.Registry:
    return load.Registry(f"http://127.0.0.1:{port}")


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda rest: b"\0\0\0\0\2" + rest))
def test_any_bytes_are_a_record_or_the_one_error(value: bytes) -> None:
    try:
        record = decoded(Decoder(None), value)
    except UndecodableError:
        return
    assert "seq" in record


def test_a_message_without_a_value_is_rejected() -> None:
    with pytest.raises(UndecodableError, match="wire format"):
        decoded(Decoder(None), None)


def test_an_id_that_is_not_fixed_asks_for_the_registry() -> None:
    with pytest.raises(UndecodableError, match="--registry"):
        decoded(Decoder(None), frame(77, OTHER))


def test_a_value_with_trailing_bytes_is_rejected(registry: ThreadingHTTPServer) -> None:
    with pytest.raises(UndecodableError, match="not a value"):
        decoded(Decoder(at(registry.server_port)), frame(77, OTHER) + b"\0")


def test_a_registrys_schema_is_fetched_once(registry: ThreadingHTTPServer) -> None:
    decoder = Decoder(at(registry.server_port))
    assert [decoded(decoder, frame(77, OTHER, a=n))["a"] for n in (1, 2, 3)] == [1, 2, 3]
    assert len(Registry.requests) == 1


def test_a_schema_in_use_is_kept_however_many_others_come(
    registry: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MOST_SCHEMAS", 3)
    decoder = Decoder(at(registry.server_port))
    for schema_id in range(100, 110):
        for each in (77, schema_id):
            assert decoded(decoder, frame(each, OTHER, a=1))["a"] == 1
    assert Registry.requests.count("/schemas/ids/77") == 1


def test_an_id_that_the_registry_does_not_know_is_rejected(registry: ThreadingHTTPServer) -> None:
    with pytest.raises(UndecodableError, match="does not know schema id 78"):
        decoded(Decoder(at(registry.server_port)), frame(78, OTHER))


def test_a_registry_that_is_down_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # A port on which nobody listens.
        decoder = Decoder(at(taken.getsockname()[1]))
        with pytest.raises(UnavailableError, match="registry"):
            decoded(decoder, frame(77, OTHER))


def test_a_refused_id_is_requested_once_a_minute(registry: ThreadingHTTPServer) -> None:
    now = 1000.0
    decoder = Decoder(at(registry.server_port), clock=lambda: now)
    for time_s, requests in ((1000.0, 1), (1059.0, 1), (1061.0, 2)):
        now = time_s
        for _ in range(5):
            with pytest.raises(UndecodableError, match="does not know schema id 78"):
                decoded(decoder, frame(78, OTHER))
        assert len(Registry.requests) == requests


def test_new_ids_are_requested_at_a_bounded_rate(registry: ThreadingHTTPServer) -> None:
    now = 1000.0
    decoder = Decoder(at(registry.server_port), clock=lambda: now)
    for time_s, requests in ((1000.0, 100), (1001.0, 110)):
        now = time_s
        for schema_id in range(1000, 1300):
            with pytest.raises(UndecodableError, match=r"does not know|too many"):
                decoded(decoder, frame(schema_id, OTHER))
        assert len(Registry.requests) == requests


@pytest.mark.parametrize(("status", "code"), [(500, 50001), (403, 40301), (404, 404), (422, 42201)])
def test_an_id_for_which_the_registry_fails_ends_no_consumer(
    registry: ThreadingHTTPServer, status: int, code: int
) -> None:
    Registry.failure = status, code
    decoder = Decoder(at(registry.server_port))
    for _ in range(2):
        with pytest.raises(UndecodableError, match="does not answer for schema id 79"):
            decoded(decoder, frame(79, OTHER))
    assert decoded(decoder, frame(77, OTHER, a=3))["a"] == 3
    with pytest.raises(UndecodableError, match="does not answer for schema id 79"):
        decoded(decoder, frame(79, OTHER))


def test_a_registry_that_goes_down_ends_no_consumer_and_is_not_waited_for_at_each_message() -> None:
    now = 1000.0
    Registry.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        decoder = Decoder(at(server.server_port), clock=lambda: now)
        decoded(decoder, frame(77, OTHER))
        server.shutdown()
        thread.join()
    with pytest.raises(UndecodableError, match="does not answer for schema id 78"):
        decoded(decoder, frame(78, OTHER))
    with pytest.raises(UndecodableError, match="new schema ids are not requested"):
        decoded(decoder, frame(79, OTHER))
    now += 61
    with pytest.raises(UndecodableError, match="does not answer for schema id 79"):
        decoded(decoder, frame(79, OTHER))


def test_a_stop_ends_the_wait_for_a_schema() -> None:
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def take() -> None:
            visitor, _ = silent.accept()
            with visitor:
                stop.set()
                visitor.recv(1 << 16)
                visitor.recv(1)  # until the client is gone

        thread = threading.Thread(target=take)
        thread.start()
        with pytest.raises(Stopped):
            decoded(Decoder(at(silent.getsockname()[1]), stop=stop), frame(77, OTHER))
        thread.join()


def test_an_id_that_no_registry_assigns_is_not_requested(registry: ThreadingHTTPServer) -> None:
    decoder = Decoder(at(registry.server_port))
    for schema_id in (0, 1 << 31, (1 << 32) - 1):
        with pytest.raises(UndecodableError, match="is out of range"):
            decoded(decoder, frame(schema_id, OTHER))
    assert Registry.requests == []


def test_alert_counts_a_message_whose_schema_the_registry_refuses(registry: ThreadingHTTPServer) -> None:
    counts = Counts()
    hosts = Hosts(3, [])
    hosts.next = 7
    engine = Engine([], [], 0, 0, Decoder(at(registry.server_port)), counts, hosts)
    for offset in (7, 8):
        engine.put_beats([frame(78, OTHER)], [offset], 0)
    assert (counts.undecodable, hosts.next, len(Registry.requests)) == (2, 9, 1)


def test_a_value_of_more_than_a_mebibyte_is_rejected() -> None:
    with pytest.raises(UndecodableError, match="longer than"):
        decoded(Decoder(None), b"\0\0\0\0\2" + bytes(1 << 20))


@pytest.mark.parametrize("path", sorted(SCHEMAS.rglob("*.avsc")), ids=str)
def test_each_schema_of_ours_is_accepted(path: Path) -> None:
    text = path.read_text()
    names = [field["name"] for field in json.loads(text)["fields"]]
    assert [field["name"] for field in accepted(text)["fields"]] == names


def of_type(kind: Any, name: str = "RebpfAgent") -> dict[str, Any]:
    """Return one of our schemas with one more field."""
    fields = OURS.get(name, OURS["RebpfAgent"])["fields"]
    return {"type": "record", "name": name, "namespace": "rebpf.v1", "fields": [*fields, {"name": "a", "type": kind}]}


def nested(levels: int) -> Any:
    kind: Any = "long"
    for level in range(levels):
        fields = [{"name": "a", "type": kind}]
        kind = {"type": "array", "items": {"type": "record", "name": f"R{level}", "fields": fields}}
    return kind


LISTS = [
    {"type": "array", "items": "null"},
    {"type": "array", "items": {"type": "null"}},
    {"type": "array", "items": {"type": "record", "name": "Empty", "fields": []}},
    {"type": "array", "items": {"type": "record", "name": "Nil", "fields": [{"name": "n", "type": "null"}]}},
    {"type": "array", "items": {"type": "fixed", "name": "Fixed", "size": 0}},
    {"type": "array", "items": {"type": "array", "items": "long"}},
    {"type": "array", "items": "RebpfAgent"},
]


@pytest.mark.parametrize(
    "schema",
    [
        *map(of_type, LISTS),
        of_type("null"),
        of_type("RebpfAgent"),
        of_type(["null", "RebpfAgent"]),
        of_type(["null", ["null", "long"]]),
        of_type(["null", "long", "string"]),
        of_type({"type": "map", "values": "long"}),
        of_type(nested(3)),
        of_type(nested(1), "TcpTransmit"),
        of_type("long", "Other"),
        {**of_type("long"), "namespace": "other"},
        {**of_type("long"), "name": "other.RebpfAgent"},
        {**of_type("long"), "fields": []},
        {**of_type("long"), "fields": None},
        {**of_type("long"), "doc": "x" * (64 << 10)},
        {**of_type(LISTS[0]), "__fastavro_parsed__": True, "__named_schemas": {}},
        "long",
        ["null", "long"],
        None,
    ],
    ids=lambda schema: str(schema)[:120],
)
def test_a_schema_that_is_not_like_ours_is_refused(schema: Any) -> None:
    with pytest.raises(NotAccepted):
        accepted(json.dumps(schema))


def changed(change: Any, name: str = "TcpTransmit") -> dict[str, Any]:
    """Return one of our schemas with changed fields."""
    return {**OURS[name], "fields": [each for field in OURS[name]["fields"] for each in change(dict(field))]}


def replaced(name: str, **parts: Any) -> Any:
    return lambda field: [{**field, **parts}] if field["name"] == name else [field]


def without(name: str) -> Any:
    return lambda field: [] if field["name"] == name else [field]


RECORDS = {"type": "array", "items": {"type": "record", "name": "S", "fields": [{"name": "topic", "type": "long"}]}}


@pytest.mark.parametrize(
    "schema",
    [
        *(changed(without(name)) for name in ("ts_ns", "host", "seq", "segs", "sample_rate")),
        *(changed(replaced(name, type="string")) for name in ("ts_ns", "cpu", "segs", "sample_rate")),
        changed(replaced("host", type="bytes")),
        changed(replaced("host", type=["null", "string"])),
        changed(replaced("segs", type="double")),
        changed(replaced("uid", type="string")),
        changed(lambda field: [field, field] if field["name"] == "host" else [field]),
        changed(lambda field: [field, *({"name": f"{field['name']}{n}", "type": "long"} for n in range(5))]),
        changed(replaced("firing", type="string"), "TcpAlert"),
        changed(without("interval_s"), "RebpfAgent"),
        changed(replaced("streams", type="string"), "RebpfAgent"),
        changed(replaced("streams", type=RECORDS), "RebpfAgent"),
    ],
    ids=lambda schema: str(len(str(schema))),
)
def test_a_schema_by_our_name_with_other_fields_is_refused(schema: Any) -> None:
    with pytest.raises(NotAccepted):
        accepted(json.dumps(schema))


def test_a_schema_with_other_defaults_and_words_is_accepted_without_them() -> None:
    schema = changed(lambda field: [{**field, "doc": "x" * 99, "default": None}])
    assert "default" not in json.dumps(accepted(json.dumps(schema)))


def test_a_string_of_more_than_4096_characters_is_rejected() -> None:
    decoder = Decoder(None)
    assert len(decoded(decoder, frame(1, OURS["TcpTransmit"], host="x" * 4096))["host"]) == 4096
    with pytest.raises(UndecodableError, match="4096 characters"):
        decoded(decoder, frame(1, OURS["TcpTransmit"], host="x" * 4097))


@pytest.mark.parametrize("text", ["", "{", "[" * 60_000, "\ud800", 'syntax = "proto3";'])
def test_a_text_that_is_no_schema_is_rejected(text: str) -> None:
    with pytest.raises(NotAccepted):
        accepted(text)


def test_without_a_registry_all_fixed_ids_are_known() -> None:
    """Those of alerts and heartbeats, too, which `rebpf tail --topic` reads."""
    names = {number: Decoder(None).schema(number)["name"] for number in range(1, 6)}
    assert names == {
        1: "rebpf.v1.TcpTransmit", 2: "rebpf.v1.TcpRetransmit", 3: "rebpf.v1.RebpfAgent", 4: "rebpf.v1.TcpAlert",
        5: "rebpf.v1.TcpFlow",
    }  # fmt: skip


def test_an_arrays_count_takes_no_more_than_the_bytes_that_are_there() -> None:
    schema = of_type({"type": "array", "items": "long"})
    count = io.BytesIO()
    fastavro.schemaless_writer(count, "long", 1 << 40)
    decoder = Decoder(None, {SchemaId(9): schema})
    tracemalloc.start()
    try:
        with pytest.raises(UndecodableError, match="not a value"):
            decoded(decoder, b"\0\0\0\0\x09" + count.getvalue() + bytes(1000))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


MANY_TEXTS = """
import resource
from producer import _native
from producer.consume.plan import plan_for_all
resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
fields = [{"name": f"field{i}", "type": "string"} for i in range(65)]
try:
    _native.decode([None] * (1 << 24), plan_for_all({"fields": fields}).steps, 65, 0, str)
except ValueError as error:
    print(error)
"""


def test_more_texts_than_a_table_can_number_are_refused() -> None:
    """The number of slots, a power of two with 32 bits, would become 0."""
    done = subprocess.run([sys.executable, "-c", MANY_TEXTS], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1090519040 texts are more than 1073741824\n", "")
