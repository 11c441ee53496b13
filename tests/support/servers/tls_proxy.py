"""A proxy in front of a real server, with TLS, basic authentication and client certificates."""

import base64
import http.client
import ssl
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from .certificates import Authority

_TIMEOUT_S = 30


class Guarded:
    """Forwards requests to `url` if they have the right password or a client certificate of `authority`."""

    def __init__(self, url: str, authority: Authority, *, user: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        wanted = None if user is None else "Basic " + base64.b64encode(user.encode()).decode()
        self.refused = 0
        """Number of unauthorized requests."""
        guard = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = _TIMEOUT_S

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if wanted is not None and self.headers.get("Authorization") != wanted:
                    guard.refused += 1
                    self._answer(401, "text/plain", b"not you")
                    return
                there = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
                headers = {name: value for name, value in self.headers.items() if name.lower().startswith("content-t")}
                there.request(self.command, self.path, body, headers)
                answer = there.getresponse()
                self._answer(answer.status, answer.headers.get("Content-Type", ""), answer.read())
                there.close()

            do_GET = do_POST = do_PUT = _pass_on

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:  # a client that does not trust us disconnects
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own = authority.issue("localhost")
        context.load_cert_chain(own.certificate, own.key)
        if user is None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(authority.certificate)
        self._server = Server(("127.0.0.1", 0), Handler)
        # The handshake is in the connection's thread, so that a stalled one blocks no other.
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self._server.server_port}{parts.path}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
