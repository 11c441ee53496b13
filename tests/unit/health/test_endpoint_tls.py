"""The endpoint with TLS, client certificates and passwords, and visitors that are slow, many or hostile there."""

import base64
import http.client
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

import bcrypt
import pytest

from producer.errors import UnavailableError
from producer.health.endpoint import Endpoint, StatusBoard, ask
from producer.health.passwords import Passwords
from producer.health.web_config import WebSettings
from tests.support.rebpf import wait_until
from tests.support.servers.certificates import Authority, Certificate
from tests.support.statuses import status
from tests.unit.health.test_endpoint import visits

RIGHT, WRONG = "r\u00efght:with:colons", "wrong"
USERS = {"alice": bcrypt.hashpw(RIGHT.encode(), bcrypt.gensalt(4)).decode()}
TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n"
CLIENTS = "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: authority.pem\n"
PASSWORDS = f"basic_auth_users:\n  alice: {USERS['alice']}\n"
HEADERS = "http_server_config:\n  headers:\n    X-Content-Type-Options: nosniff\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Certificate:
    return authority.issue("server")


class Place:
    """A folder with a web.config file, and the endpoint of that."""

    def __init__(self, folder: Path, authority: Authority, server: Certificate) -> None:
        self.folder, self.authority, self.server = folder, authority, server
        (folder / "server.pem").write_bytes(server.certificate.read_bytes())
        (folder / "server.key").write_bytes(server.key.read_bytes())
        (folder / "authority.pem").write_bytes(authority.certificate.read_bytes())
        self.web: WebSettings
        self.address = ("", 0)
        self.url = ""

    @property
    def socket(self) -> Path:
        return self.folder / "status.sock"

    @contextmanager
    def serving(self, text: str, *, step: bool = True) -> Iterator[None]:
        (self.folder / "web.yml").write_text(text)
        self.web = WebSettings(self.folder / "web.yml")
        board, stop = StatusBoard(), threading.Event()
        board.publish(status())

        def run() -> None:
            while step and not stop.wait(0.005):
                board.step(status)

        thread = threading.Thread(target=run)
        with Endpoint("127.0.0.1", 0, board, self.web, self.socket) as endpoint:
            assert endpoint.url
            self.url = endpoint.url
            self.address = ("127.0.0.1", int(endpoint.url.rpartition(":")[2]))
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def context(self, client: Certificate | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        if client:
            context.load_cert_chain(client.certificate, client.key)
        return context

    def get(
        self, path: str, *, password: str | None = None, user: str = "alice", client: Certificate | None = None
    ) -> tuple[int, Mapping[str, str]]:
        connection = (
            http.client.HTTPSConnection(*self.address, timeout=30, context=self.context(client))
            if self.url.startswith("https:")
            else http.client.HTTPConnection(*self.address, timeout=30)
        )
        try:
            connection.request("GET", path, headers={} if password is None else basic(user, password))
            response = connection.getresponse()
            response.read()
            return response.status, response.headers
        finally:
            connection.close()


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def place(tmp_path: Path, authority: Authority, server: Certificate) -> Place:
    return Place(tmp_path, authority, server)


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


def test_plain_http_at_a_tls_port_and_tls_at_a_plain_one_are_told_so(place: Place) -> None:
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
        assert visits() <= 33
    wait_until("none is left", lambda: visits() == 0, 30)


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
        assert visits() <= 33


def test_headers_are_bounded_with_tls_too(place: Place) -> None:
    with place.serving(TLS), socket.create_connection(place.address, timeout=30) as raw:
        with place.context().wrap_socket(raw, server_hostname="localhost") as visitor:
            visitor.sendall(b"GET /healthz HTTP/1.1\r\nA: " + b"a" * 20_000)
            assert b" 431 " in visitor.recv(1 << 16)
        assert place.get("/healthz")[0] == 200


def test_rubbish_in_a_handshake_is_nothing_for_the_operator(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with place.serving(TLS), ExitStack() as stack:
        for sent in (b"\x16\x03\x01\xff\xff" + bytes(999), b"\x16" * 70000, client_hello() + b"\xff" * 99):
            with suppress(OSError):
                stalled(place, stack, sent).shutdown(socket.SHUT_WR)
        assert place.get("/healthz")[0] == 200
        wait_until("gone", lambda: visits() == 0, 30)
    assert caplog.records == []


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


def test_a_user_who_is_taken_away_is_refused_though_known(place: Place) -> None:
    with place.serving(PASSWORDS):
        assert place.get("/metrics", password=RIGHT)[0] == 200
        (place.folder / "web.yml").write_text(PASSWORDS.replace("alice", "bob"))
        wait_until("refused", lambda: place.get("/metrics", password=RIGHT)[0] == 401, 30)
        assert place.get("/metrics", password=RIGHT, user="bob")[0] == 200


HEADERS_WITHOUT_CREDENTIALS = [
    None,
    "",
    "Basic",
    "Basic ",
    "Basic \xff",
    "Basic !!!!",
    "Basic " + base64.b64encode(b"alice").decode(),
    "Basic " + base64.b64encode(b"\xff:a").decode(),
    "Basic " + base64.b64encode(b"alice:" + RIGHT.encode() + b"\0").decode(),
    "Bearer " + base64.b64encode(f"alice:{RIGHT}".encode()).decode(),
    "Digest a=b",
]


@pytest.mark.parametrize("header", HEADERS_WITHOUT_CREDENTIALS)
def test_what_is_no_credentials_is_refused_without_work(header: str | None) -> None:
    hashed = {"alice": USERS["alice"].replace("$04$", "$14$")}
    began = time.process_time()
    for _ in range(100):
        assert Passwords().check(hashed, header, "a") == HTTPStatus.UNAUTHORIZED
    assert time.process_time() - began < 5, "each check would take a second"


def test_what_is_known_is_not_checked_again() -> None:
    costly = {"alice": bcrypt.hashpw(b"right", bcrypt.gensalt(12)).decode()}
    passwords = Passwords()
    for password, code in (("right", HTTPStatus.OK), ("wrong", HTTPStatus.UNAUTHORIZED)):
        header = basic("alice", password)["Authorization"]
        began = time.process_time()
        for _ in range(300):
            assert passwords.check(costly, header, "a") == code
        assert time.process_time() - began < 30, "of 300 checks one: all would take a minute and more"


def test_a_password_of_more_than_72_bytes_is_cut_as_bcrypt_does() -> None:
    long = "x" * 100
    users = {"alice": bcrypt.hashpw(long.encode()[:72], bcrypt.gensalt(4)).decode()}
    assert Passwords().check(users, basic("alice", long)["Authorization"], "a") == HTTPStatus.OK
    assert Passwords().check(users, basic("alice", "x" * 71)["Authorization"], "a") == HTTPStatus.UNAUTHORIZED


def test_wrong_passwords_in_numbers_keep_no_right_one_out_and_take_no_core() -> None:
    users = {"alice": bcrypt.hashpw(b"right", bcrypt.gensalt(10)).decode()}
    passwords, stop, codes = Passwords(), threading.Event(), []
    right = basic("alice", "right")["Authorization"]

    def guess(number: int) -> None:
        guesses = 0
        while not stop.is_set():
            header = basic("alice", f"{number} {guesses}")["Authorization"]
            codes.append(passwords.check(users, header, f"192.0.2.{number % 2}"))
            guesses += 1
            stop.wait(0.002)

    threads = [threading.Thread(target=guess, args=[number]) for number in range(16)]
    for thread in threads:
        thread.start()
    try:
        assert passwords.check(users, right, "2001:db8::1") == HTTPStatus.OK
        wait_until("guesses are refused", lambda: codes.count(HTTPStatus.UNAUTHORIZED) >= 3, 60)
        assert codes.count(HTTPStatus.TOO_MANY_REQUESTS) > codes.count(HTTPStatus.UNAUTHORIZED)
        assert passwords.check(users, right, "192.0.2.1") == HTTPStatus.OK, "known, from an address of the guesses"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert HTTPStatus.OK not in codes


def test_guesses_from_one_ipv6_network_are_one_visitors() -> None:
    users = {"alice": bcrypt.hashpw(b"right", bcrypt.gensalt(12)).decode()}
    passwords, codes = Passwords(), []
    ready = threading.Barrier(12)

    def guess(number: int) -> None:
        ready.wait(30)
        codes.append(passwords.check(users, basic("a", str(number))["Authorization"], f"2001:db8::{number}"))

    threads = [threading.Thread(target=guess, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes.count(HTTPStatus.TOO_MANY_REQUESTS) > 0


def test_status_comes_by_the_socket_where_the_endpoint_asks_for_more(place: Place) -> None:
    with place.serving(TLS + CLIENTS + PASSWORDS):
        assert ask(place.url, place.socket)["pid"] == status().pid
    assert not place.socket.exists()


def test_who_asks_by_the_socket_learns_what_is_wrong_with_the_file(place: Place) -> None:
    with place.serving(TLS + PASSWORDS):
        (place.folder / "web.yml").write_text("colour: red")
        wait_until("seen", lambda: ask(place.url, place.socket) and place.web.last_error, 30)


def test_a_socket_that_cannot_be_found_or_is_something_else_is_not_asked(place: Place) -> None:
    with place.serving(TLS):
        place.socket.rename(place.folder / "real.sock")
        with pytest.raises(UnavailableError, match="does not answer"):
            ask(place.url, place.socket)
        place.socket.symlink_to("real.sock")
        with pytest.raises(UnavailableError, match="does not answer"):
            ask(place.url, place.socket)
        place.socket.unlink()
        place.socket.write_text("")
        with pytest.raises(UnavailableError, match="is not a socket"):
            ask(place.url, place.socket)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "socket"])
def test_what_stands_in_the_place_of_the_socket_goes(place: Place, kind: str) -> None:
    if kind == "folder":
        place.socket.mkdir()
        (place.socket / "mine").touch()
    elif kind == "link":
        (place.folder / "victim").write_text("as it was")
        place.socket.symlink_to("victim")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(place.socket))
    else:
        place.socket.touch()
    with place.serving(PASSWORDS):
        assert ask(place.url, place.socket)["pid"] == status().pid
    assert kind != "link" or (place.folder / "victim").read_text() == "as it was"


def test_a_state_folder_with_a_long_path_has_its_socket(
    tmp_path: Path, authority: Authority, server: Certificate
) -> None:
    folder = tmp_path / ("a" * 100) / ("b" * 100)
    folder.mkdir(parents=True)
    place = Place(folder, authority, server)
    with place.serving(PASSWORDS):
        assert ask(place.url, place.socket)["pid"] == status().pid
