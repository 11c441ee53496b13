"""The endpoint with a web.config file, and its visitors."""

import base64
import http.client
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import bcrypt

from producer.health.board import StatusBoard
from producer.health.endpoint import Endpoint
from producer.health.web_config import WebSettings
from tests.support.servers.certificates import Authority, Certificate
from tests.support.statuses import status

RIGHT, WRONG = "r\u00efght:with:colons", "wrong"
USERS = {"alice": bcrypt.hashpw(RIGHT.encode(), bcrypt.gensalt(4)).decode()}
TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n"
CLIENTS = "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: authority.pem\n"
PASSWORDS = f"basic_auth_users:\n  alice: {USERS['alice']}\n"
HEADERS = "http_server_config:\n  headers:\n    X-Content-Type-Options: nosniff\n"


def visits() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


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
