"""Servers with unexpected answers, and visitors with unexpected requests."""

import contextlib
import http.client
import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st

from producer.alert.alertmanager import Alertmanager
from producer.alert.model import Alert
from producer.config.load import Registry
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.event_id import read_events
from producer.errors import RebpfError
from producer.events import STREAMS, Topic
from producer.health.board import StatusBoard
from producer.health.endpoint import Endpoint
from producer.health.endpoint_client import ask
from producer.health.status import table
from producer.registry.schema_ids import SchemaIds
from producer.schemas import load_schema
from tests.fuzz.engine import Check, FindingError, Target
from tests.fuzz.mutation import mutated, mutated_json
from tests.support import spool_folders
from tests.support.batches import decoded
from tests.support.statuses import status

_SCHEMA = {"type": "record", "name": "R", "fields": [{"name": "a", "type": "long"}]}
_ENCODED = spool_folders.encoded(STREAMS[0], 1, 2)
_EVENT = _ENCODED.payload[: int(_ENCODED.lengths[0])].tobytes()[5:]


class _Server:
    """Sends the same bytes on each connection and closes it."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                visitor, _ = self._socket.accept()
            except OSError:
                return
            with visitor, contextlib.suppress(OSError):
                visitor.settimeout(1)
                visitor.recv(1 << 16)
                visitor.sendall(self.answer)
                visitor.shutdown(socket.SHUT_WR)
                while visitor.recv(1 << 16):
                    pass

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


@contextlib.contextmanager
def _server() -> Iterator[_Server]:
    server = _Server()
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def _status() -> Iterator[Check]:
    """`rebpf status` prints a report, or exits with one line."""
    with _server() as server:

        def check(answer: bytes) -> None:
            server.answer = answer
            try:
                table(ask(server.url))
            except RebpfError as error:
                _one_line(error)

        yield check


@contextlib.contextmanager
def _registry() -> Iterator[Check]:
    """A registry returns a valid id, or there is a one-line error with a documented code."""
    with _server() as server, tempfile.TemporaryDirectory() as folder:

        def check(answer: bytes) -> None:
            server.answer = answer
            for register in (True, False):
                settings = Registry(server.url, timeout_s=1, register=register)
                ids = SchemaIds(settings, Path(folder) / "cache", attempts=1)
                try:
                    (found,) = ids.find({Topic("topic"): _SCHEMA}).values()
                except RebpfError as error:
                    _one_line(error)
                else:
                    if type(found) is not int or not 0 < found < 1 << 31:
                        raise FindingError(f"schema id {found!r}")

        yield check


@contextlib.contextmanager
def _schemas() -> Iterator[Check]:
    """A schema from a registry makes a message decodable, or undecodable, or the registry unavailable.

    A decoder that has read a message of ours reads on, whatever the registry answers then.
    """
    with _server() as server:

        def check(example: tuple[bytes, bytes]) -> None:
            server.answer, body = example
            decoder = Decoder(Registry(server.url, timeout_s=1))
            try:
                decoded(decoder, b"\0\0\0\0\x07" + body)
            except UndecodableError:
                pass
            except RebpfError as error:
                _one_line(error)
            server.answer = _json({"schema": json.dumps(load_schema(STREAMS[0].schema_file))})
            decoder = Decoder(Registry(server.url, timeout_s=1))
            value = b"\0\0\0\0\x07" + _EVENT
            decoded(decoder, value)
            server.answer = example[0]
            with contextlib.suppress(UndecodableError):
                decoded(decoder, b"\0\0\0\0\x08" + body)
            events, _ = read_events(decoder, [b"\0\0\0\0\x08" + body, value])
            if not len(events) or events.rows[-1] != 1:
                raise FindingError("a message of another schema costs one of ours")

        yield check


class _StopError(Exception):
    """Do not retry."""


@contextlib.contextmanager
def _alertmanager() -> Iterator[Check]:
    """Alertmanager accepts an alert, or rejects it, or it is retried."""

    def stop(seconds: float) -> None:
        raise _StopError

    with _server() as server:
        alert = Alert("rule", "host", "h", True, "count", 1.0, 1.0, 0.5, 0, 60.0, 1, 1, 0)

        def check(answer: bytes) -> None:
            server.answer = answer
            manager = Alertmanager(server.url, 60.0, stop)
            with contextlib.suppress(_StopError):
                manager.send([alert])

        yield check


@contextlib.contextmanager
def _endpoint() -> Iterator[Check]:
    """Whatever a visitor sends, a request with an end gets a response, and the next visitor a healthy one."""
    board = StatusBoard(hangs_after_s=1e9, answer_timeout_s=0.01)
    board.publish(status())
    with Endpoint("127.0.0.1", 0, board) as endpoint:
        port = int((endpoint.url or "").rpartition(":")[2])

        def check(request: bytes) -> None:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as visitor, contextlib.suppress(OSError):
                visitor.sendall(request)
                visitor.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: visitor.recv(1 << 16), b""))
                if b"\n\r\n" in request and not answer:
                    raise FindingError("no response")
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/healthz")
            if connection.getresponse().status != 200:
                raise FindingError("the endpoint is not well")
            connection.close()

        yield check


def _one_line(error: RebpfError) -> None:
    if error.exit_code == 70 or len(str(error).splitlines()) != 1:
        raise FindingError(f"exit code {error.exit_code}: {str(error)!r}")


def _response(body: bytes, code: int = 200) -> bytes:
    head = f"HTTP/1.1 {code} OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _json(value: object, code: int = 200) -> bytes:
    return _response(json.dumps(value).encode(), code)


_codes = st.sampled_from([200, 200, 200, 204, 301, 400, 401, 404, 409, 422, 429, 500, 503])
_STATUS, _ID = status().as_dict(), {"id": 7, "version": 1, "subject": "topic-value", "schema": json.dumps(_SCHEMA)}
_ERROR = {"error_code": 40403, "message": "Schema not found"}
_HTML = b"<html>\n<body>log in\n</body></html>"
_ids = st.one_of(
    st.tuples(mutated_json([_ID, _ERROR, 7, []]), _codes).map(lambda pair: _json(*pair)),
    mutated([_json(_ID), _json(_ERROR, 404), _response(_HTML), _response(_HTML, 404)]),
)
_schema = mutated_json(
    [
        _SCHEMA,
        *(load_schema(stream.schema_file) for stream in STREAMS),
        {"type": "array", "items": "null"},
        {"type": "map", "values": "long"},
        "string",
    ]
)
_given = st.one_of(
    _schema.map(lambda schema: _json({"schema": json.dumps(schema)})), mutated([_json({"schema": json.dumps(_SCHEMA)})])
)
_REQUESTS = (
    b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: application/openmetrics-text;q=0.5\r\nConnection: close\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nAccept: text/plain;version=0.0.4;q=0.2;escaping=values,*/*\r\nConnection: close\r\n\r\n",
    b"GET /status HTTP/1.0\r\n\r\n",
    b"HEAD /healthz HTTP/1.1\r\nConnection: close\r\n\r\n",
    b"POST /readyz HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
)

TARGETS = (
    Target("status", st.one_of(mutated_json([_STATUS]).map(_json), mutated([_json(_STATUS)])), _status, 120),
    Target("registry", _ids, _registry, 15),
    Target("schemas", st.tuples(_given, st.one_of(st.binary(max_size=20), mutated([_EVENT]))), _schemas, 6),
    Target(
        "alertmanager",
        st.one_of(mutated([_json({}), _response(_HTML, 400), _json({}, 503)]), st.binary(max_size=99)),
        _alertmanager,
        60,
    ),
    Target("endpoint", mutated(_REQUESTS), _endpoint, 80),
)
