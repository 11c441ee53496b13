"""A client that sends to twenty peers, of which one is behind a lossy path: the scene of the views' tests and pictures.

The loss is in the receiver's prerouting, so the client's kernel counts what it has sent.
"""

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator

from producer.demo.lab import Host, Lab
from tests.support.capture import DEADLINE_S, inside, rules

PORT = 7411
PEERS = [f"10.99.0.{number}" for number in range(1, 21)]
NETWORK = "10.99.0.0/24"
GUILTY = PEERS[6]
_DROP = f"ip daddr {GUILTY} tcp dport {PORT} numgen random mod 100 < 20 drop"
_SEND_S = 0.05
_MESSAGE = bytes(5000)


def _serve(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            end, _ = listener.accept()
            threading.Thread(target=_echo, args=(end,), daemon=True).start()


def _echo(end: socket.socket) -> None:
    with end, contextlib.suppress(OSError):
        while end.recv(1 << 16):
            end.sendall(b"!")


def _send(client: Host, peer: str, stop: threading.Event) -> None:
    with inside(client):
        end = socket.create_connection((peer, PORT), timeout=DEADLINE_S)
    with end, contextlib.suppress(OSError):
        while not stop.wait(_SEND_S):
            end.sendall(_MESSAGE)
            end.recv(1)


@contextlib.contextmanager
def twenty_peers() -> Iterator[Host]:
    """Send to the peers while the context lasts; yield the client."""
    with Lab(loss=0) as lab, contextlib.ExitStack() as stack:
        for peer in PEERS:
            subprocess.run(lab.server.command("ip", "address", "add", f"{peer}/32", "dev", "lo"), check=True)
        subprocess.run(lab.client.command("ip", "route", "add", NETWORK, "via", lab.server.ipv4), check=True)
        with inside(lab.server):
            listener = stack.enter_context(socket.create_server(("0.0.0.0", PORT), backlog=64))
        stop = threading.Event()
        threads = [threading.Thread(target=_send, args=(lab.client, peer, stop)) for peer in PEERS]
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        stack.enter_context(rules(lab.server, "prerouting", _DROP))
        for thread in threads:
            thread.start()
        yield lab.client
        stop.set()
        for thread in threads:
            thread.join()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
