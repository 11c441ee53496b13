"""Retransmissions do not wait for `capture.latency_s`, and quiet traffic causes one produce request per read.

With a latency of a minute, no transmit has arrived when the retransmissions have.
"""

import contextlib
import subprocess
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, TopicPartition

from tests.support.rebpf import Run, rebpf, wait_until
from tests.support.servers.kafka import KafkaServer

pytestmark = [pytest.mark.root, pytest.mark.real_kafka]

PREFIX = "latency."
PORT = 9137
SYNS = 3
SCRIPT = f"""
import socket, subprocess, sys
def ip(line):
    subprocess.run(["ip", *line.split()], check=True)
ip("link add veth0 type veth peer name veth1")
ip("address add 10.112.0.1/24 dev veth0")
ip("link set veth0 up")
ip("link set veth1 up")
ip("neighbour add 10.112.0.2 lladdr 02:00:00:00:00:02 dev veth0 nud permanent")
connection = socket.socket()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, {SYNS})
connection.setblocking(False)
connection.connect_ex(("10.112.0.2", {PORT}))
sys.stdin.read()
"""
"""Connects to a host that never answers, so the kernel retransmits the SYN."""


@contextlib.contextmanager
def unanswered_syn() -> Iterator[None]:
    """Send a SYN and its retransmissions in a network namespace of its own."""
    with subprocess.Popen(["unshare", "--net", "python3", "-c", SCRIPT], stdin=subprocess.PIPE) as sender:
        yield
        assert sender.stdin
        sender.stdin.close()
    assert sender.returncode == 0


def count(consumer: Consumer) -> int:
    return sum(message.error() is None for message in consumer.consume(100, 0.1))


def test_retransmissions_of_a_quiet_host_do_not_wait_and_transmits_do(kafka: KafkaServer, tmp_path) -> None:
    config = f'[kafka]\ntopic_prefix = "{PREFIX}"\n[capture]\nlatency_s = 60\n'
    (tmp_path / "init.toml").write_text(config)
    done = rebpf("init", "--config", tmp_path / "init.toml", "--brokers", kafka.bootstrap, "--partitions", 1)
    assert done.returncode == 0, done.stderr
    found = {f"{PREFIX}tcp_transmit": 0, f"{PREFIX}tcp_retransmit": 0}
    consumers = {
        topic: Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": topic, "auto.offset.reset": "earliest"})
        for topic in found
    }
    for topic, consumer in consumers.items():
        consumer.assign([TopicPartition(topic, 0, 0)])

    def arrived() -> bool:
        for topic, consumer in consumers.items():
            found[topic] += count(consumer)
        return found[f"{PREFIX}tcp_retransmit"] >= SYNS

    with Run(tmp_path, "--brokers", kafka.bootstrap, "--port", PORT, config=config) as run:
        run.ready()
        with unanswered_syn():
            wait_until("the retransmissions", arrived)
        assert found == {f"{PREFIX}tcp_transmit": 0, f"{PREFIX}tcp_retransmit": SYNS}
        balance = run.finish()
    for consumer in consumers.values():
        consumer.close()
    assert [balance[topic]["delivered"] for topic in found] == [1 + SYNS, SYNS]
