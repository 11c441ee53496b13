"""HTTP requests end at their deadline, with all that they hold, whatever the server sends."""

import gzip
import socket
import ssl
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.request import Request

import pytest

from producer.host.http_exchange import ExchangeError, exchange
from tests.support.procfs import open_files
from tests.support.rebpf import wait_until

LONG_S = 20
Reply = Callable[[socket.socket], None]


@contextmanager
def serving(reply: Reply) -> Iterator[int]:
    """Accept one visitor and reply; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            visitor, _ = server.accept()
            with visitor:
                visitor.settimeout(LONG_S)
                reply(visitor)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join(1)


def drip(begin: bytes, gone: threading.Event) -> Reply:
    """Send the beginning of an answer and then byte by byte, until the visitor disconnects."""

    def reply(visitor: socket.socket) -> None:
        visitor.recv(1 << 16)
        try:
            visitor.sendall(begin)
            while not gone.wait(0.02):
                visitor.sendall(b"0")
        except OSError:
            gone.set()

    return reply


def test_a_proxy_that_drips_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = threading.Event()
    with serving(drip(b"HTTP/1.1 200 Connection est", gone)) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        with pytest.raises(ExchangeError, match=r"within 0\.3 s"):
            exchange(Request("https://registry.example:8081/"), 0.3, tls=ssl.create_default_context())
        assert gone.wait(LONG_S)


def test_the_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://alice:s3cret@127.0.0.1:1")
        with pytest.raises(ExchangeError, match=r"refused.*, through the proxy 127\.0\.0\.1:1$"):
            exchange(Request(f"{scheme}://registry.example:8081/"), LONG_S)


@pytest.mark.parametrize("excluded", ["10.0.0.0/8, 127.0.0.0/8", "127.0.0.1/30", "127.0.0.1", "*"])
def test_a_network_in_no_proxy_is_asked_directly(monkeypatch: pytest.MonkeyPatch, excluded: str) -> None:
    """As clusters of Kubernetes set it, and Go and curl read it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", excluded)
    with serving(answer(b"{}")) as port:
        assert exchange(Request(f"http://127.0.0.1:{port}/"), LONG_S).body == b"{}"


@pytest.mark.parametrize("excluded", ["10.0.0.0/8", "::/0", "/", "127.0.0.0/99", ""])
def test_other_networks_in_no_proxy_exclude_nothing(monkeypatch: pytest.MonkeyPatch, excluded: str) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", excluded)
    with pytest.raises(ExchangeError, match="through the proxy"):
        exchange(Request("http://127.0.0.1:9/"), LONG_S)


def answer(body: bytes, *headers: str) -> Reply:
    def reply(visitor: socket.socket) -> None:
        visitor.recv(1 << 16)
        lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
        visitor.sendall("\r\n".join(lines).encode() + body)

    return reply


def test_no_descriptor_stays_open() -> None:
    before = Counter(open_files())
    with serving(answer(b"{}")) as port:
        assert exchange(Request(f"http://127.0.0.1:{port}/"), LONG_S).body == b"{}"
    wait_until("nothing more is open than before", lambda: Counter(open_files()) <= before)


def test_a_compressed_answer_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(100 << 20))
    with serving(answer(bomb, "Content-Type: application/json", "Content-Encoding: gzip")) as port:
        tracemalloc.start()
        try:
            found = exchange(Request(f"http://127.0.0.1:{port}/"), LONG_S)
            assert tracemalloc.get_traced_memory()[1] < 10 << 20
        finally:
            tracemalloc.stop()
    assert found.body == bomb


def test_without_threads_a_request_fails() -> None:
    usual = threading.stack_size(1 << 46)  # more than the address space
    try:
        with pytest.raises(ExchangeError, match="can't start new thread"):
            exchange(Request("http://127.0.0.1:9/"), LONG_S)
    finally:
        threading.stack_size(usual)


def test_a_content_type_with_control_characters_is_escaped() -> None:
    def reply(visitor: socket.socket) -> None:
        visitor.recv(1 << 16)
        visitor.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: a\x0bpplication/\x1b[31mjson\r\nContent-Length: 0\r\n\r\n")

    with serving(reply) as port:
        answer = exchange(Request(f"http://127.0.0.1:{port}/"), LONG_S)
    assert answer.content_type == "a\\x0bpplication/\\x1b[31mjson"
