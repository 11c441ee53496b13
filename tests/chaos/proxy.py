"""A proxy in front of the registry that may answer nonsense."""

import contextlib
import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

MODES = ("pass", "html", "json", "drip", "refuse", "error")
_TIMEOUT_S = 5.0
_DRIPS = 600


class Proxy:
    """Answers on a port of 127.0.0.1 as its `mode` says, one of MODES."""

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream)
        self.mode = "pass"
        proxy = self

        class Visit(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(OSError):
                    proxy.answer(self)

            do_POST = do_PUT = do_DELETE = do_GET

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Visit)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}{self._upstream.path}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, visit: BaseHTTPRequestHandler) -> None:
        mode = self.mode
        body = visit.rfile.read(int(visit.headers.get("Content-Length") or 0))
        if mode == "refuse":
            visit.close_connection = True
        elif mode == "html":
            _send(visit, 404, "text/html", b"<html><body>404 not found</body></html>")
        elif mode == "json":
            _send(visit, 200, "application/json", b'{"login": "https://sso.example/", "id": null}')
        elif mode == "error":
            _send(visit, 500, "application/json", b'{"error_code": 50001, "message": "out of order"}')
        elif mode == "drip":
            visit.send_response(200)
            visit.send_header("Content-Length", str(_DRIPS))
            visit.end_headers()
            for _ in range(_DRIPS):
                visit.wfile.write(b" ")
                time.sleep(1)
        else:
            self._pass(visit, body)

    def _pass(self, visit: BaseHTTPRequestHandler, body: bytes) -> None:
        upstream = http.client.HTTPConnection(self._upstream.netloc, timeout=_TIMEOUT_S)
        with contextlib.closing(upstream):
            headers = {name: value for name, value in visit.headers.items() if name.lower() != "host"}
            upstream.request(visit.command, visit.path, body, headers)
            response = upstream.getresponse()
            _send(visit, response.status, response.headers.get("Content-Type", ""), response.read())


def _send(visit: BaseHTTPRequestHandler, code: int, kind: str, body: bytes) -> None:
    visit.send_response(code)
    visit.send_header("Content-Type", kind)
    visit.send_header("Content-Length", str(len(body)))
    visit.end_headers()
    visit.wfile.write(body)
