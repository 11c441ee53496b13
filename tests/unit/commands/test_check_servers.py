"""Brokers that answer and yet are of no use: `check` and `init` say why.

They advertise names that this host cannot reach, or are the in-process test broker.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from producer.commands.check_servers import batches, kafka
from producer.commands.init import create_topics
from producer.config.load import Config, Kafka
from producer.errors import UnavailableError
from producer.host.reachable import unreachable
from producer.kafka.admin import TopicInfo
from tests.support.mock_topics import Cluster
from tests.support.pty_command import PtyCommand
from tests.support.rebpf import command

REAL, ADVERTISED = b"127.0.0.1", b"x.invalid"
"""Of one length, so that an answer with the one instead of the other stays well-formed."""


@contextmanager
def advertising(brokers: str, name: bytes) -> Iterator[str]:
    """Pass a cluster's connections on, with another name in what it answers; yield the address."""
    host, _, port = brokers.rpartition(":")
    sockets: list[socket.socket] = []
    server = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket, *, is_answer: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data.replace(REAL, name) if is_answer else data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    threads: list[threading.Thread] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                visitor, _ = server.accept()
                upstream = socket.create_connection((host, int(port)))
                sockets.extend((visitor, upstream))
                for source, target, is_answer in ((visitor, upstream, False), (upstream, visitor, True)):
                    thread = threading.Thread(target=copy, args=(source, target), kwargs={"is_answer": is_answer})
                    thread.start()
                    threads.append(thread)

    acceptor = threading.Thread(target=serve)
    acceptor.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        acceptor.join()
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for each in (*sockets, server):
            each.close()


@pytest.fixture
def brokers() -> Iterator[str]:
    cluster = Cluster()
    with advertising(cluster.brokers, ADVERTISED) as address:
        yield address
    cluster.close()


def test_check_names_an_advertised_broker_that_does_not_resolve(brokers: str) -> None:
    (finding,) = kafka(Config(kafka=Kafka(brokers=brokers)))
    assert finding.exit_code == UnavailableError.exit_code
    assert f"Kafka at {brokers} answers" in finding.text
    assert "x.invalid:" in finding.text
    assert "advertised.listeners" in finding.text


def test_init_names_an_advertised_broker_that_does_not_resolve(brokers: str) -> None:
    with pytest.raises(UnavailableError, match=r"x\.invalid:\d+ .*advertised\.listeners"):
        create_topics(Config(kafka=Kafka(brokers=brokers)), 1, 1)


def test_check_and_init_need_more_than_the_test_broker() -> None:
    cluster = Cluster()
    config = Config(kafka=Kafka(brokers=cluster.brokers))
    (finding,) = kafka(config)
    assert finding.exit_code == UnavailableError.exit_code
    assert "in-process test broker" in finding.text
    with pytest.raises(UnavailableError, match=r"in-process test broker .* use a real Kafka"):
        create_topics(config, 1, 1)
    cluster.close()


def test_brokers_that_take_a_connection_are_reachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        there, away = server.getsockname(), closed.getsockname()
        names = [("a" * 70 + ".invalid", 9092), ("", 9092), ("..", 9092), ("127.0.0.1", 1 << 20), ("\ud800", 9092)]
        found = unreachable([there, away, *names])
    assert set(found) >= {away, names[0], names[2], names[3], names[4]}
    assert there not in found


def test_without_threads_brokers_are_not_checked() -> None:
    usual = threading.stack_size(1 << 46)  # more than the address space
    try:
        found = unreachable([("127.0.0.1", 9092), ("x.invalid", 9092)])
    finally:
        threading.stack_size(usual)
    assert set(found.values()) == {"not checked: can't start new thread"}


def test_a_broker_that_advertises_thousands_of_others_costs_a_bounded_number_of_threads() -> None:
    before, most = threading.active_count(), 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, threading.active_count() - before)

    watcher = threading.Thread(target=watch)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, ExitStack() as stack:
        for _ in range(2):  # a full queue: later connections get no answer
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        watcher.start()
        names = [server.getsockname(), *(("127.0.0.1", 1 << 20 | number) for number in range(2000))]
        found = unreachable([*names[:1] * 300, *names], 1)
        done.set()
        watcher.join()
    assert set(found) == set(names)
    assert "no response within 1 s" in found[names[0]] or "timed out" in found[names[0]]
    assert 0 < most <= 70


@pytest.mark.parametrize(
    ("most", "warns"), [("999999", True), ("65536", True), ("1000000", False), ("1048588", False), ("999", False)]
)
def test_a_topic_that_rejects_whole_batches_is_named(most: str, warns: bool) -> None:
    found = list(batches("t", TopicInfo(1, 1, may_write=True, settings={"max.message.bytes": most})))
    assert [each.warns for each in found] == [True] * warns
    assert all(f'set "batch.size" = {most} in [kafka.settings]' in each.text for each in found)
    assert not list(batches("t", TopicInfo(1, 1, may_write=True, settings={})))
    assert not list(batches("t", UnavailableError("no such topic")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["check", "init"])
def test_a_terminal_shows_that_it_waits_for_kafka(name: str) -> None:
    with PtyCommand(command(name, "--brokers", "127.0.0.1:1"), 80, 24) as waiting:
        assert waiting.wait() != 0
    assert "connecting to Kafka at 127.0.0.1:1 ..." in waiting.output
