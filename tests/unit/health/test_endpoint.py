"""Visitors of the HTTP endpoint that are slow, many or hostile, and what it answers to each method and path."""

import gc
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from producer.health.board import StatusBoard
from producer.health.endpoint import Endpoint
from tests.support.endpoint import visits
from tests.support.rebpf import wait_until
from tests.support.statuses import status

MANY = 64
PATHS = ("/metrics", "/healthz", "/readyz", "/status")


@contextmanager
def serving() -> Iterator[tuple[str, int]]:
    """An endpoint whose loop makes a step each 5 ms."""
    board, stop = StatusBoard(), threading.Event()
    board.publish(status())

    def run() -> None:
        while not stop.wait(0.005):
            board.step(status)

    thread = threading.Thread(target=run)
    with Endpoint("127.0.0.1", 0, board) as server:
        assert server.url
        thread.start()
        try:
            host, _, port = server.url.removeprefix("http://").partition(":")
            yield host, int(port)
        finally:
            stop.set()
            thread.join()


def ask(address: tuple[str, int], path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def test_health_answers_while_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a user's processes are as many as the host allows: a supervisor would end a healthy producer."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with serving() as address:
        monkeypatch.setattr(threading.Thread, "start", start)
        assert [ask(address, path)[0].status for path in PATHS] == [200, 200, 200, 200]
        monkeypatch.undo()
        assert ask(address, "/healthz")[0].status == 200


def answer(address: tuple[str, int], request: bytes) -> bytes:
    """Send bytes, and no end; return all that comes until the endpoint closes."""
    with socket.create_connection(address, timeout=30) as visitor:
        visitor.sendall(request)
        return b"".join(iter(lambda: visitor.recv(1 << 16), b""))


def is_closed(visitor: socket.socket) -> bool:
    """Read what has come; tell whether the other end has closed."""
    try:
        while data := visitor.recv(1 << 16, socket.MSG_DONTWAIT):
            assert data
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def nothing(visitor: socket.socket) -> None:
    """Send nothing."""


def a_byte_at_a_time(visitor: socket.socket) -> None:
    visitor.send(b"G")


def headers_without_end(visitor: socket.socket) -> None:
    visitor.send(b"GET /healthz HTTP/1.1\r\nA: b\r\n")


def no_reading(visitor: socket.socket) -> None:
    visitor.send(b"GET /metrics HTTP/1.1\r\n\r\n")


SLOW = [nothing, a_byte_at_a_time, headers_without_end, no_reading]


def dribble(visitor: socket.socket) -> None:
    with suppress(OSError):  # closed by the endpoint
        visitor.send(b"x")


@pytest.mark.parametrize("begin", SLOW)
def test_slow_visitors_do_not_keep_health_from_answering(begin: Callable[[socket.socket], None]) -> None:
    with serving() as address, ExitStack() as stack:
        for _ in range(MANY):
            visitor = stack.enter_context(socket.create_connection(address, timeout=30))
            begin(visitor)

        for path in ("/healthz", "/readyz"):
            assert ask(address, path)[0].status == 200


@pytest.mark.slow
def test_a_visitor_that_sends_a_byte_now_and_then_is_closed_at_its_deadline() -> None:
    with serving() as address, socket.create_connection(address, timeout=30) as visitor:
        visitor.send(b"GET /healthz HTTP/1.1\r\nA: ")

        def closed() -> bool:
            dribble(visitor)
            return is_closed(visitor)

        wait_until("closed", closed, 30)


@pytest.mark.slow
def test_a_visitor_that_does_not_read_is_closed_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    large = b"x" * (64 << 20)
    monkeypatch.setattr(
        "producer.health.endpoint.choose_encoder", lambda accept: (lambda registry: large, "text/plain")
    )
    with serving() as address, socket.create_connection(address, timeout=30) as visitor:
        visitor.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        wait_until("the visit began", lambda: visits() == 1, 30)
        wait_until("the visit ended", lambda: visits() == 0, 30)
        got = b"".join(iter(lambda: visitor.recv(1 << 20), b""))

    assert len(got) < len(large)


@pytest.mark.slow
def test_visitors_take_a_bounded_number_of_threads_and_leave_none() -> None:
    with serving() as address:
        with ExitStack() as stack:
            for _ in range(4 * MANY):
                stack.enter_context(socket.create_connection(address, timeout=30))
            assert ask(address, "/healthz")[0].status == 200
            wait_until("few", lambda: visits() <= 32, 30)
        wait_until("none", lambda: visits() == 0, 30)


@pytest.mark.slow
def test_visitors_that_wait_for_the_loop_are_bounded() -> None:
    """With a loop that hangs, many requests for /status and /metrics leave room for /healthz."""
    board = StatusBoard(answer_timeout_s=30)
    board.publish(status())
    with Endpoint("127.0.0.1", 0, board) as server, ExitStack() as stack:
        assert server.url
        host, _, port = server.url.removeprefix("http://").partition(":")
        for path in PATHS * 32:
            visitor = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            visitor.send(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        began = time.monotonic()
        assert ask((host, int(port)), "/healthz")[0].status == 200
        assert time.monotonic() - began < 20, "it does not wait for the loop"
        wait_until("few", lambda: visits() <= 33, 20)
        board.publish(status())


def test_a_visitor_wakes_the_loop_and_gets_its_next_status() -> None:
    asked = threading.Event()
    board = StatusBoard(wake=asked.set, answer_timeout_s=30)
    board.publish(status(host="before"))

    def run() -> None:
        asked.wait(10)
        board.step(lambda: status(host="after"))

    thread = threading.Thread(target=run)
    with Endpoint("127.0.0.1", 0, board) as server:
        assert server.url
        thread.start()
        host, _, port = server.url.removeprefix("http://").partition(":")
        _, body = ask((host, int(port)), "/status")
        thread.join()
    assert asked.is_set()
    assert json.loads(body)["host"] == "after"


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_the_body(path: str) -> None:
    with serving() as address:
        get, body = ask(address, path)
        head, nothing = ask(address, path, "HEAD")

    assert (head.status, nothing) == (200, b"")
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert int(head.headers["Content-Length"]) > 0
    assert int(get.headers["Content-Length"]) == len(body)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "QUITE-UNKNOWN"])
def test_other_methods_are_405_and_say_what_is_allowed(method: str, path: str) -> None:
    with serving() as address:
        response, body = ask(address, path, method)

    assert (response.status, response.headers["Allow"], body) == (405, "GET, HEAD", b"expected GET or HEAD\n")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/", "//metrics/..", "/%00", "*", "/healthz%0d%0a"])
def test_unknown_paths_are_404(method: str, path: str) -> None:
    with serving() as address:
        assert ask(address, path, method)[0].status == 404


def test_a_large_body_does_not_cost_the_visitor_its_answer() -> None:
    with serving() as address:
        head = b"POST /healthz HTTP/1.1\r\nContent-Length: 4000000\r\n\r\n"
        with socket.create_connection(address, timeout=30) as visitor:
            visitor.sendall(head + bytes(4000000))
            assert b"".join(iter(lambda: visitor.recv(1 << 16), b"")).startswith(b"HTTP/1.0 405 ")


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"GET /" + b"a" * 20_000, 414),
        (b"GET /healthz HTTP/1.1\r\nA: " + b"a" * 20_000, 431),
        (b"GET /healthz HTTP/1.1\r\n" + b"A: b\r\n" * 4_000, 431),
        (b"GET /healthz HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(11, 200)), 400),
        (b"\x00\xff\xfe", 400),
        (b"\r\n\r\n", 400),
        (b"GET /healthz HTTP/9.9.9\r\n\r\n", 400),
        (b"GET \xff\xfe\x00 \xe9 HTTP/1.1\r\n\r\n", 400),
        (b"GARBAGE\r\n\r\n", 400),
    ],
)
def test_garbage_and_oversized_requests_are_refused_at_once(request_bytes: bytes, code: int) -> None:
    with serving() as address:
        got = answer(address, request_bytes)
        assert f" {code} ".encode() in got.partition(b"\r\n")[0] or f"Error code: {code}".encode() in got
        assert ask(address, "/healthz")[0].status == 200


def test_visitors_that_go_away_log_nothing_for_the_operator(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    reset = b"\1\0\0\0\0\0\0\0"  # linger for no time: close() resets the connection
    with serving() as address:
        for request in [
            b"",
            b"GET",
            b"GET /metrics HTTP/1.1\r\n\r\n",
            b"POST /healthz HTTP/1.1\r\n\r\nbody",
            b"\x16\3",
        ]:
            for options in [None, reset]:
                with socket.create_connection(address, timeout=30) as visitor:
                    if options:
                        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, options)
                    visitor.sendall(request)
        wait_until("all gone", lambda: visits() == 0, 30)
        assert ask(address, "/healthz")[0].status == 200
    gc.collect()

    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("version", ["abc", "", "1.x.0", "-1", "1" * 5000, ".", "1..1", "\xb2"])
@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
def test_metrics_are_sent_whatever_version_a_visitor_accepts(kind: str, version: str) -> None:
    with serving() as address:
        request = f"GET /metrics HTTP/1.1\r\nAccept: {kind};version={version};escaping=x\r\nConnection: close\r\n\r\n"
        assert answer(address, request.encode("latin-1")).startswith(b"HTTP/1.0 200 OK\r\n")
