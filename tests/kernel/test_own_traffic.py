"""`rebpf run` alone in a network namespace: none of its own segments is an event, from start to end."""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from producer.demo.lab import Lab
from tests.support.capture import ALLOWED, inside, wait_for
from tests.support.rebpf import Run

pytestmark = pytest.mark.root


class Broker:
    """Listens on a broker's port, answers once it is enabled, and counts its answers."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family)
        port = self._listener.getsockname()[1]
        self.address = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self.answers = 0
        self._may_answer = threading.Event()
        self._asked: list[tuple[socket.socket, bytes]] = []
        self._thread = threading.Thread(target=self._serve)

    def answer(self) -> None:
        self._may_answer.set()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._ends:
                for key, _ in selector.select(0.02):
                    self._meet(selector, key.fileobj)
                if self._may_answer.is_set():
                    self._answer()

    def _meet(self, selector: selectors.BaseSelector, ready: object) -> None:
        assert isinstance(ready, socket.socket)
        if ready is self._listener:
            selector.register(ready.accept()[0], selectors.EVENT_READ)
        elif request := ready.recv(1 << 16):
            self._asked.append((ready, request[8:12]))
        else:
            selector.unregister(ready)
            ready.close()

    def _answer(self) -> None:
        for end, number in self._asked:
            if end.fileno() >= 0:
                # Too short an answer: the client closes the connection and opens another.
                end.sendall((4).to_bytes(4, "big") + number)
                self.answers += 1
        self._asked.clear()

    def __enter__(self) -> "Broker":
        self._ends = False
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends = True
        self._thread.join()
        self._listener.close()


@contextmanager
def run_alone(lab: Lab, folder: Path, *arguments: object) -> Iterator[Run]:
    """Run the producer in a namespace, where it captures everything that is sent."""
    netns = f"[[rules]]\nnetns = [{lab.client.netns}]\n"
    capture = f'capture.default = "drop"\ncapture.hooks = {list(ALLOWED)}\ncapture.flow_interval_s = 1\n'
    config = f"kafka.stop_timeout_s = 0\n{capture}{netns}"
    with inside(lab.client):
        run = Run(folder, *arguments, config=config)
    with run:
        yield run


def captured(run: Run) -> dict[str, int]:
    return {topic: balance["passed"] for topic, balance in run.finish().items()}


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_no_traffic_with_a_broker_on_this_host_is_seen(lab: Lab, tmp_path: Path, address: str) -> None:
    """Not even the answer to the client's first request."""
    with inside(lab.client), Broker(address) as broker, run_alone(lab, tmp_path, "--brokers", broker.address) as run:
        run.ready()
        broker.answer()
        wait_for(lambda: broker.answers > 2, "answers")
        assert captured(run) == {"tcp_transmit": 0, "tcp_retransmit": 0, "tcp_flow": 0}


def test_no_traffic_with_the_test_broker_is_seen(lab: Lab, tmp_path: Path) -> None:
    with run_alone(lab, tmp_path) as run:
        run.ready()
        wait_for(lambda: established(run) >= 2, "a connection's two ends")
        assert captured(run) == {"tcp_transmit": 0, "tcp_retransmit": 0, "tcp_flow": 0}


def established(run: Run) -> int:
    _, *lines = Path(f"/proc/{run.pid}/net/tcp").read_text().splitlines()
    return sum(line.split()[3] == "01" for line in lines)
