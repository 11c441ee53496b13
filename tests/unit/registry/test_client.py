"""The registry's answers: others' answers are rejected, and none takes longer than its deadline."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from producer.config.load import Registry
from producer.errors import ConfigError, PermissionDenied, SchemaError, Stopped, UnavailableError
from producer.registry.client import NoAnswer, RegistryClient
from producer.registry.schema_ids import SchemaIds

SCHEMA = {"type": "record", "name": "TcpTransmit", "namespace": "rebpf.v1", "fields": [{"name": "ts", "type": "long"}]}
TEXT = json.dumps(SCHEMA)
JSON = "application/vnd.schemaregistry.v1+json"
LONG_S = 30

Reply = Callable[[BaseHTTPRequestHandler], None]


def reply(status: int, content: Any, kind: str = JSON, **headers: str) -> Reply:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


@contextmanager
def serving(answer: Reply) -> Iterator[tuple[str, list[str]]]:
    """Serve one answer to every request; yield the address and the paths asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                answer(self)
            except OSError:  # the client is gone
                self.close_connection = True

        do_GET = do_POST
        do_PUT = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", paths
        finally:
            server.shutdown()
            thread.join()


def find(url: str, cache: Path | None, *optional: str, timeout_s: float = LONG_S) -> dict[Any, Any]:
    ids = SchemaIds(Registry(url, timeout_s=timeout_s), cache, attempts=1)
    return dict(ids.find({"events": SCHEMA}, dict.fromkeys(optional, SCHEMA)))


def cache_of(url: str, tmp_path: Path, *optional: str) -> Path:
    """Return a cache file as an earlier start wrote it."""
    cache = tmp_path / "ids.json"
    with serving(reply(200, {"id": 7, "schema": TEXT})) as (earlier, _):
        assert find(earlier, cache, *optional) == dict.fromkeys(("events", *optional), 7)
    cache.write_text(cache.read_text().replace(earlier, url))
    return cache


NO_ANSWERS = {
    "a 404 page": reply(404, b"<html>not here</html>", "text/html"),
    "a 404 page that calls itself JSON": reply(404, b"<html>not here</html>"),
    "JSON of another service": reply(404, {"detail": "not found"}),
    "an error code of another status": reply(404, {"error_code": 50001, "message": "no"}),
    "a login": reply(200, {"login": "https://login"}),
    "a login page": reply(200, b"<html>login</html>", "text/html"),
    "an error with status 200": reply(200, {"id": 3, "schema": TEXT, "error_code": 50001}),
    "no object": reply(200, [3]),
    "id 0": reply(200, {"id": 0, "schema": TEXT}),
    "a negative id": reply(200, {"id": -3, "schema": TEXT}),
    "an id as text": reply(200, {"id": "3", "schema": TEXT}),
    "an id that is a boolean": reply(200, {"id": True, "schema": TEXT}),
    "an id with a fraction": reply(200, {"id": 3.0, "schema": TEXT}),
    "an id of 32 bits": reply(200, {"id": 1 << 31, "schema": TEXT}),
    "no schema, as of another service": reply(200, {"id": 3, "name": "a user"}),
    "another schema": reply(200, {"id": 3, "schema": json.dumps({**SCHEMA, "fields": []})}),
    "a schema that is nested deep": reply(200, {"id": 3, "schema": "[" * 900 + "]" * 900}),
    "a server error": reply(500, {"error_code": 50001, "message": "no"}),
    "2 MiB": reply(200, {"id": 3, "schema": TEXT, "more": "x" * (2 << 20)}),
    "less than it says": reply(200, b'{"id": 3}', **{"Content-Length": "100", "Connection": "close"}),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_answers_of_other_services_are_ignored_and_earlier_ids_are_used(name: str, tmp_path: Path) -> None:
    with serving(NO_ANSWERS[name]) as (url, _):
        fresh = tmp_path / "fresh.json"
        with pytest.raises(UnavailableError):
            find(url, fresh)
        assert not fresh.exists()
        cache = cache_of(url, tmp_path)
        before = cache.read_text()
        assert find(url, cache) == {"events": 7}
        assert cache.read_text() == before


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, 40401, "run `rebpf init`"),
        (404, 40403, "run `rebpf init`"),
        (409, 409, "incompatible"),
        (422, 42201, "rejects the schema"),
    ],
)
def test_the_registrys_own_refusal_counts_more_than_the_cache(
    status: int, code: int, said: str, tmp_path: Path
) -> None:
    with serving(reply(status, {"error_code": code, "message": "no"})) as (url, _):
        cache = cache_of(url, tmp_path)
        with pytest.raises(SchemaError, match=said):
            find(url, cache)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("kind", [JSON, "text/html"])
def test_a_refused_authentication_is_named_and_earlier_ids_are_used(status: int, kind: str, tmp_path: Path) -> None:
    with serving(reply(status, {"error_code": status, "message": "no"}, kind)) as (url, _):
        with pytest.raises(PermissionDenied, match="authentication"):
            find(url, None)
        assert find(url, cache_of(url, tmp_path)) == {"events": 7}


def test_ids_of_another_registry_are_not_used(tmp_path: Path) -> None:
    with serving(reply(500, {})) as (url, _), pytest.raises(UnavailableError):
        find(url, cache_of("http://other:8081", tmp_path))


def test_ids_of_optional_topics_are_cached_too(tmp_path: Path) -> None:
    with serving(reply(500, {})) as (url, _):
        assert find(url, cache_of(url, tmp_path, "beats"), "beats") == {"events": 7, "beats": 7}
        assert find(url, cache_of(url, tmp_path), "beats") == {"events": 7}


@pytest.mark.parametrize("refusal", [reply(401, {}), reply(404, {"error_code": 40401}), reply(500, {})])
def test_an_optional_topic_without_an_id_stops_no_start(refusal: Reply, caplog: pytest.LogCaptureFixture) -> None:
    found = reply(200, {"id": 7, "schema": TEXT})
    with serving(lambda handler: (refusal if "beats-value" in handler.path else found)(handler)) as (url, _):
        assert find(url, None, "beats") == {"events": 7}
    assert "not sending to topic beats" in caplog.text


@pytest.mark.parametrize("content", ["alice", " ", "token\nalice:secret"])
def test_a_file_without_user_and_password_is_refused_before_it_is_sent(content: str, tmp_path: Path) -> None:
    path = tmp_path / "auth"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"registry\.auth: .*/auth: expected USER:PASSWORD in the first line"):
        RegistryClient(Registry(url="http://127.0.0.1:1", auth=path))


def test_renewed_credentials_are_sent_with_the_next_request(tmp_path: Path) -> None:
    """`rebpf alert` asks for schemas after months."""
    sent: list[str] = []
    found = reply(200, {"schema": TEXT})

    def answer(handler: BaseHTTPRequestHandler) -> None:
        sent.append(base64.b64decode(handler.headers["Authorization"].removeprefix("Basic ")).decode())
        found(handler)

    auth = tmp_path / "auth"
    auth.write_text("alice:first")
    with serving(answer) as (url, _):
        client = RegistryClient(Registry(url, auth=auth))
        client.schema(3)
        auth.write_text("alice:second")
        client.schema(3)
        auth.unlink()
        with pytest.raises(NoAnswer, match=r"registry\.auth"):
            client.schema(3)
    assert sent == ["alice:first", "alice:second"]


READ_ONLY = {
    "by its mode": (reply(422, {"error_code": 42205, "message": "Subject is in read-only mode"}), SchemaError),
    "for this user": (reply(403, {"error_code": 40301, "message": "no"}), PermissionDenied),
}


@pytest.mark.parametrize("kind", READ_ONLY)
@pytest.mark.parametrize("has_it", [True, False])
def test_a_registry_that_is_read_only_is_asked_for_the_schema_instead(kind: str, has_it: bool) -> None:
    refusal, error = READ_ONLY[kind]
    found = reply(200, {"id": 7, "schema": TEXT}) if has_it else reply(404, {"error_code": 40403, "message": "no"})
    with serving(lambda handler: (refusal if handler.path.endswith("/versions") else found)(handler)) as (url, _):
        ids = SchemaIds(Registry(url, register=True), None, attempts=1)
        with nullcontext() if has_it else pytest.raises(error):
            assert ids.find({"events": SCHEMA}) == {"events": 7}


def test_an_abandoned_answer_that_drips_is_hung_up_on() -> None:
    gone = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        """Send the length of a chunk, which never ends, on a connection that is to close."""
        handler.send_response(200)
        handler.send_header("Content-Type", JSON)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.send_header("Connection", "close")
        handler.end_headers()
        try:
            while not gone.wait(0.02):
                handler.wfile.write(b"0")
        except OSError:
            gone.set()

    with serving(drip) as (url, _):
        with pytest.raises(NoAnswer):
            RegistryClient(Registry(url, timeout_s=0.2)).schema(7)
        assert gone.wait(LONG_S)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with serving(reply(200, {"id": 3})) as (elsewhere, paths):
        with serving(reply(status, {}, Location=f"{elsewhere}/schemas/ids/3")) as (url, _):
            client = RegistryClient(Registry(url, timeout_s=LONG_S))
            with pytest.raises(NoAnswer, match=f"status {status}"):
                client.schema(3)
        assert paths == []


def drip(over: threading.Event) -> Reply:
    """Send the body a byte at a time, until `over`."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", JSON)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not over.wait(0.02):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    return send


def drip_headers(over: threading.Event) -> Reply:
    """Send a header a byte at a time, until `over`."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not over.wait(0.02):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    return send


@pytest.mark.parametrize("dripping", [drip, drip_headers])
def test_an_answer_that_drips_ends_at_the_deadline(dripping: Callable[[threading.Event], Reply]) -> None:
    over = threading.Event()
    with serving(dripping(over)) as (url, _):
        begin = time.monotonic()
        with pytest.raises(UnavailableError, match="does not answer"):
            find(url, None, timeout_s=0.3)
        assert time.monotonic() - begin < LONG_S
        over.set()


def test_a_stop_ends_the_wait() -> None:
    over, stop = threading.Event(), threading.Event()

    def send(handler: BaseHTTPRequestHandler) -> None:
        stop.set()
        over.wait(LONG_S)

    with serving(send) as (url, _):
        begin = time.monotonic()
        ids = SchemaIds(Registry(url, timeout_s=10 * LONG_S), None, stop=stop)
        with pytest.raises(Stopped):
            ids.find({"events": SCHEMA})
        over.set()
    assert time.monotonic() - begin < LONG_S


def test_a_stop_ends_the_pause_between_attempts() -> None:
    stop = threading.Event()
    answer = reply(500, {})

    def send(handler: BaseHTTPRequestHandler) -> None:
        answer(handler)
        stop.set()

    with serving(send) as (url, _):
        ids = SchemaIds(Registry(url, timeout_s=LONG_S), None, attempts=1000, stop=stop)
        with pytest.raises(Stopped):
            ids.find({"events": SCHEMA})


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"3", b"\xff\x00", b"{", b"[" * 100_000, b'{"a": "' + b"x" * (2 << 20) + b'"}'],
    ids=["empty", "null", "list", "number", "garbage", "cut", "deep", "2 MiB"],
)
def test_a_cache_file_with_anything_else_is_ignored(content: bytes, tmp_path: Path) -> None:
    cache = tmp_path / "ids.json"
    cache.write_bytes(content)
    with serving(reply(500, {})) as (url, _), pytest.raises(UnavailableError):
        find(url, cache)
    with serving(reply(200, {"id": 3, "schema": TEXT})) as (url, _):
        assert find(url, cache) == {"events": 3}


@pytest.mark.parametrize("number", ["0", "-3", '"7"', "true", "7.0", "null", "[7]", str(1 << 31)])
def test_a_cached_id_that_no_registry_gives_is_not_used(number: str, tmp_path: Path) -> None:
    with serving(reply(500, {})) as (url, _):
        cache = cache_of(url, tmp_path)
        cache.write_text(cache.read_text().replace(": 7", f": {number}"))
        with pytest.raises(UnavailableError):
            find(url, cache)
