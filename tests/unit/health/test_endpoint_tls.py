"""The endpoint with TLS, client certificates and passwords, and visitors that are slow, many or hostile there."""

import http.client
import logging
import shutil
import socket
import ssl
import subprocess
from contextlib import ExitStack, suppress

import pytest

from tests.support.endpoint import CLIENTS, HEADERS, PASSWORDS, RIGHT, TLS, WRONG, Place, visits
from tests.support.rebpf import wait_until
from tests.support.servers.certificates import Authority


def test_all_pages_are_served_by_tls(place: Place) -> None:
    with place.serving(TLS + HEADERS):
        assert place.url.startswith("https://")
        for path, code in {"/metrics": 200, "/healthz": 200, "/readyz": 200, "/status": 200, "/none": 404}.items():
            found, headers = place.get(path)
            assert (found, headers["X-Content-Type-Options"]) == (code, "nosniff")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_answer_ends_as_tls_says_and_loses_nothing(place: Place, version: ssl.TLSVersion) -> None:
    """Also where the visitor has sent more than was read."""
    with place.serving(TLS):
        context = place.context()
        context.minimum_version = context.maximum_version = version
        with (
            socket.create_connection(place.address, timeout=30) as raw,
            context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as visitor,
        ):
            visitor.sendall(b"POST /metrics HTTP/1.1\r\nContent-Length: 200000\r\n\r\n" + bytes(200000))
            assert b"".join(iter(lambda: visitor.recv(1 << 16), b"")).endswith(b"expected GET or HEAD\n")


@pytest.mark.skipif(not shutil.which("curl"), reason="NO CURL")
def test_curl_is_answered(place: Place) -> None:
    with place.serving(TLS + PASSWORDS):
        command = ["curl", "--silent", "--show-error", "--fail", "--max-time", "30", f"{place.url}/readyz"]
        trust = ["--cacert", str(place.authority.certificate)]
        right = subprocess.run([*command, *trust, "--user", f"alice:{RIGHT}"], capture_output=True, text=True)
        assert (right.returncode, right.stderr) == (0, "")
        assert '"state"' in right.stdout
        assert subprocess.run([*command, *trust], capture_output=True).returncode == 22, "401"
        assert subprocess.run(command, capture_output=True).returncode == 60, "an unknown authority"


def test_plain_http_at_a_tls_port_and_tls_at_a_plain_one_get_a_reason(place: Place) -> None:
    with place.serving(TLS), socket.create_connection(place.address, timeout=30) as visitor:
        visitor.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        got = b"".join(iter(lambda: visitor.recv(1 << 16), b""))
        assert got.startswith(b"HTTP/1.0 400 Expected HTTPS")
    with place.serving(""), pytest.raises(ssl.SSLError), socket.create_connection(place.address, timeout=30) as raw:
        place.context().wrap_socket(raw, server_hostname="localhost")


def test_a_client_certificate_is_wanted_for_each_page(place: Place) -> None:
    right, stranger = place.authority.issue("prometheus"), Authority(place.folder / "others").issue("prometheus")
    expired = place.authority.issue("prometheus", expired=True)
    with place.serving(TLS + CLIENTS):
        assert place.get("/metrics", client=right)[0] == 200
        for client in (None, stranger, expired):
            with pytest.raises((OSError, http.client.HTTPException)):
                place.get("/healthz", client=client)


def test_a_client_certificate_has_one_of_the_names_that_are_allowed(place: Place) -> None:
    client = place.authority.issue("prometheus")  # for localhost and 127.0.0.1
    for names, admitted in (("[a, 127.0.0.1]", True), ("[LOCALHOST, 127.0.0.10]", False)):
        with place.serving(TLS + CLIENTS + f"  client_allowed_sans: {names}\n"):
            if admitted:
                assert place.get("/metrics", client=client)[0] == 200
            else:
                with pytest.raises((OSError, http.client.HTTPException)):
                    place.get("/metrics", client=client)


def stalled(place: Place, stack: ExitStack, sent: bytes = b"") -> socket.socket:
    visitor = stack.enter_context(socket.create_connection(place.address, timeout=30))
    visitor.sendall(sent)
    return visitor


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    connection = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("sent", [b"", b"\x16", client_hello()[:40], client_hello()], ids=["none", "1", "40", "hello"])
def test_visitors_that_stall_in_the_handshake_do_not_keep_health_from_answering(place: Place, sent: bytes) -> None:
    with place.serving(TLS), ExitStack() as stack:
        for _ in range(64):
            stalled(place, stack, sent)
        for path in ("/healthz", "/readyz"):
            assert place.get(path)[0] == 200
        wait_until("the others have ended", lambda: visits() <= 33, 30)
    wait_until("none is left", lambda: visits() == 0, 30)


@pytest.mark.slow
def test_a_visitor_that_stalls_in_the_handshake_is_closed_at_its_deadline(place: Place) -> None:
    with place.serving(TLS), ExitStack() as stack:
        visitors = [stalled(place, stack, sent) for sent in (b"\x16", client_hello()[:99], client_hello())]

        def closed(visitor: socket.socket) -> bool:
            try:
                return visitor.recv(1 << 16, socket.MSG_DONTWAIT) == b""
            except BlockingIOError:
                return False
            except OSError:
                return True

        wait_until("closed", lambda: all(map(closed, visitors)), 30)


def test_visitors_that_are_silent_after_the_handshake_make_room(place: Place) -> None:
    with place.serving(TLS), ExitStack() as stack:
        for _ in range(40):
            raw = stack.enter_context(socket.create_connection(place.address, timeout=30))
            stack.enter_context(place.context().wrap_socket(raw, server_hostname="localhost"))
        assert place.get("/healthz")[0] == 200
        wait_until("the others have ended", lambda: visits() <= 33, 30)


def test_headers_are_bounded_with_tls_too(place: Place) -> None:
    with place.serving(TLS), socket.create_connection(place.address, timeout=30) as raw:
        with place.context().wrap_socket(raw, server_hostname="localhost") as visitor:
            visitor.sendall(b"GET /healthz HTTP/1.1\r\nA: " + b"a" * 20_000)
            assert b" 431 " in visitor.recv(1 << 16)
        assert place.get("/healthz")[0] == 200


def test_garbage_in_a_handshake_logs_nothing_for_the_operator(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with place.serving(TLS), ExitStack() as stack:
        for sent in (b"\x16\x03\x01\xff\xff" + bytes(999), b"\x16" * 70000, client_hello() + b"\xff" * 99):
            with suppress(OSError):
                stalled(place, stack, sent).shutdown(socket.SHUT_WR)
        assert place.get("/healthz")[0] == 200
        wait_until("gone", lambda: visits() == 0, 30)
    assert caplog.records == []


@pytest.mark.slow
def test_a_renewed_certificate_is_presented_without_a_restart(place: Place) -> None:
    def presented() -> str:
        return ssl.get_server_certificate(place.address, timeout=30).strip()

    with place.serving(TLS):
        assert presented() == place.server.certificate.read_text().strip()
        renewed = place.authority.issue("renewed")
        (place.folder / "server.pem").write_bytes(renewed.certificate.read_bytes())
        wait_until("the half is seen", lambda: presented() != "" and place.web.last_error is not None, 30)
        assert place.get("/healthz")[0] == 200, "with the old certificate"
        (place.folder / "server.key").write_bytes(renewed.key.read_bytes())
        wait_until("renewed", lambda: presented() == renewed.certificate.read_text().strip(), 30)
        assert place.web.last_error is None


PAGES = ("/metrics", "/readyz", "/status", "/none")


def test_a_password_is_asked_for_each_page_but_health(place: Place) -> None:
    with place.serving(TLS + PASSWORDS + HEADERS):
        assert place.get("/healthz")[0] == 200
        assert place.get("/healthz", password=WRONG)[0] == 200
        for path in PAGES:
            code, headers = place.get(path)
            assert (code, headers["WWW-Authenticate"][:6]) == (401, "Basic ")
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert place.get(path, password=WRONG)[0] == 401
            assert place.get(path, password=RIGHT, user="bob")[0] == 401
            assert place.get(path, password=RIGHT)[0] == (404 if path == "/none" else 200)


@pytest.mark.slow
def test_a_user_who_is_taken_away_is_refused_though_known(place: Place) -> None:
    with place.serving(PASSWORDS):
        assert place.get("/metrics", password=RIGHT)[0] == 200
        (place.folder / "web.yml").write_text(PASSWORDS.replace("alice", "bob"))
        wait_until("refused", lambda: place.get("/metrics", password=RIGHT)[0] == 401, 30)
        assert place.get("/metrics", password=RIGHT, user="bob")[0] == 200
