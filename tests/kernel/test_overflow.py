"""A ring that fills wakes its reader, and a full one counts exactly what it loses, which readers see as a gap."""

import mmap
import os
import select
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from producer.events import RETRANSMITS, TRANSMITS
from producer.kernel.capture import Capture
from tests.support.capture import hook_settings
from tests.support.rules import filtered

pytestmark = pytest.mark.root

RECORD_BYTES = 8 + TRANSMITS.dtype.itemsize
# The kernel leaves one byte free, so that a full ring differs from an empty one.
CAPACITY = (mmap.PAGESIZE - 1) // RECORD_BYTES


@pytest.fixture
def one_cpu() -> Iterator[int]:
    """Bind this thread to a CPU: loopback delivers, and answers, on the CPU that sends."""
    before = os.sched_getaffinity(0)
    cpu = min(before)
    os.sched_setaffinity(0, {cpu})
    yield cpu
    os.sched_setaffinity(0, before)


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as accepted,
    ):
        yield client, accepted


def exchange(connection: tuple[socket.socket, socket.socket], count: int) -> None:
    client, accepted = connection
    for _ in range(count):
        client.sendall(b"?")
        assert accepted.recv(1) == b"?"
        accepted.sendall(b"!")
        assert client.recv(1) == b"!"


def test_a_full_ring_loses_what_it_counts(one_cpu: int, connection: tuple[socket.socket, socket.socket]) -> None:
    port = connection[1].getsockname()[1]
    pages = {"transmit_pipe": mmap.PAGESIZE, "retransmit_pipe": mmap.PAGESIZE}
    with Capture(hook_settings(rules=filtered(ports=(port,)), ring_bytes=pages)) as capture:
        capture.load()
        capture.attach()
        with capture.ring(TRANSMITS) as ring:
            exchange(connection, 1009)
            first = capture.counters(TRANSMITS)
            assert first.passed >= 2 * 1009
            assert ring.unread == CAPACITY == first.passed - first.ring_full
            assert ring.fill == CAPACITY * RECORD_BYTES / mmap.PAGESIZE

            rows = ring.read(CAPACITY + 1)
            assert set(rows["s"]["cpu"]) == {one_cpu}
            assert (rows["s"]["cpu_seq"] == np.arange(1, CAPACITY + 1)).all()

            # Rows were read but not committed: the ring is still full.
            exchange(connection, 1)
            # Now, because a delayed acknowledgement would later take the next number.
            connection[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            second = capture.counters(TRANSMITS)
            assert second.passed - second.ring_full == CAPACITY
            assert ring.unread == 0

            ring.commit(ring.position)
            exchange(connection, 1)
            row = ring.read(1)[0]
            assert row["s"]["cpu_seq"] == second.passed + 1
            assert row["s"]["cpu_seq"] - CAPACITY - 1 == second.ring_full, "the gap is what was lost"
        assert capture.counters(RETRANSMITS).passed == 0


def test_a_cpu_wakes_the_reader_before_the_ring_is_full_and_not_before(
    one_cpu: int, connection: tuple[socket.socket, socket.socket]
) -> None:
    settings = hook_settings(rules=filtered(ports=(connection[1].getsockname()[1],)))
    events = settings.wakeup_mask(TRANSMITS) + 1
    with Capture(settings) as capture, select.epoll() as epoll:
        capture.load()
        capture.attach()
        epoll.register(capture.ring_descriptor(TRANSMITS), select.EPOLLIN | select.EPOLLET)
        with capture.ring(TRANSMITS) as ring:
            # An acknowledgement of its own may follow each of the two segments.
            exchange(connection, events // 4 - 8)
            assert 0 < ring.unread < events
            assert not epoll.poll(0)
            exchange(connection, events // 2)
            assert events < ring.unread < settings.ring_bytes[TRANSMITS.ring] // RECORD_BYTES
            assert epoll.poll(0)
