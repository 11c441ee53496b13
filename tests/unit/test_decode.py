"""The reader's side of the frame: what is ours is read, whatever else is refused as one error."""

import io
import json
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.decode import Decoder, UndecodableError
from producer.errors import UnavailableError

OLDER = {
    "type": "record",
    "name": "TcpTransmit",
    "namespace": "rebpf.v1",
    "fields": [{"name": "seq", "type": "long"}],
}


def frame(schema_id: int, schema: dict[str, Any], record: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    buffer.write(struct.pack(">bI", 0, schema_id))
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(schema), record)
    return buffer.getvalue()


class Registry(BaseHTTPRequestHandler):
    """Knows schema 77; requests are counted."""

    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        known = self.path.split("?")[0] == "/schemas/ids/77"
        answer = {"schema": json.dumps(OLDER)} if known else {"error_code": 40403, "message": "Schema not found"}
        body = json.dumps(answer).encode()
        self.send_response(200 if known else 404)
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


def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda rest: b"\0\0\0\0\2" + rest))
def test_any_bytes_are_a_record_or_the_one_error(value: bytes) -> None:
    try:
        record = Decoder(None).decode(value)
    except UndecodableError:
        return
    assert "seq" in record


def test_a_message_without_a_value_is_refused() -> None:
    with pytest.raises(UndecodableError, match="frame"):
        Decoder(None).decode(None)


def test_an_id_that_is_not_fixed_asks_for_the_registry() -> None:
    with pytest.raises(UndecodableError, match="--registry"):
        Decoder(None).decode(frame(77, OLDER, {"seq": 5}))


def test_a_value_with_something_behind_it_is_refused(registry: ThreadingHTTPServer) -> None:
    with pytest.raises(UndecodableError, match="not a value"):
        Decoder(url(registry)).decode(frame(77, OLDER, {"seq": 5}) + b"\0")


def test_a_registrys_schema_is_fetched_once(registry: ThreadingHTTPServer) -> None:
    decoder = Decoder(url(registry))
    assert [decoder.decode(frame(77, OLDER, {"seq": n})) for n in (1, 2, 3)] == [{"seq": 1}, {"seq": 2}, {"seq": 3}]
    assert len(Registry.requests) == 1


def test_an_id_that_the_registry_does_not_know_is_refused(registry: ThreadingHTTPServer) -> None:
    with pytest.raises(UndecodableError, match="does not know schema id 78"):
        Decoder(url(registry)).decode(frame(78, OLDER, {"seq": 5}))


def test_a_registry_that_is_down_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # A port on which nobody listens.
        decoder = Decoder(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(UnavailableError, match="registry"):
            decoder.decode(frame(77, OLDER, {"seq": 5}))
