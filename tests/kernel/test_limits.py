"""What limits a connection: each limit is made on purpose, and found from the kernel's figures."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from producer.demo.lab import Host, Lab
from producer.events import FLOWS, Rows
from producer.view.limits import LIMITS, Interval, limits
from tests.support.capture import Pair, Recording, cookie_of, hook_settings, rules, wait_for
from tests.support.rules import filtered

pytestmark = pytest.mark.root

_PORTS = range(7300, 7320)
_SNDBUF = 1 << 17
"""Smaller ones are one segment of segmentation offload, of which the kernel does not see that it fills the buffer."""
_SO_MAX_PACING_RATE = 47
_PACE = 20_000_000
"""In bytes per second. If all leaves at once, nothing waits when the buffer is full, and the kernel does not see it."""
_SECONDS = 2.0
"""How long each connection is watched."""
_WAIT_US = 3_000_000
"""A retransmission timeout that is longer."""


@pytest.fixture(scope="module")
def flows() -> Iterator[Recording]:
    with Recording(hook_settings(streams=(FLOWS,), rules=filtered(ports=_PORTS))) as recording:
        yield recording


@contextlib.contextmanager
def queue(host: Host, discipline: str) -> Iterator[None]:
    subprocess.run(host.command(*f"tc qdisc add dev veth0 root {discipline}".split()), check=True)
    try:
        yield
    finally:
        subprocess.run(host.command("tc", "qdisc", "del", "dev", "veth0", "root"), check=True)


@contextlib.contextmanager
def running(*steps: Callable[[], Any]) -> Iterator[None]:
    """Repeat each step in a thread of its own until the end."""
    end = threading.Event()

    def repeat(step: Callable[[], Any]) -> None:
        with contextlib.suppress(OSError):
            while not end.is_set():
                step()

    threads = [threading.Thread(target=repeat, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def record(flows: Recording, end: socket.socket, after: int) -> Rows:
    """Return a new record of a connection."""
    cookie = cookie_of(end)

    def condition() -> Rows | None:
        flows.kernel.report_flows()
        rows = flows.all(FLOWS)
        chosen: Rows = rows[(rows["flow"]["sk_cookie"] == cookie) & (rows["ts"] > after)]
        return chosen[-1:] if len(chosen) else None

    return wait_for(condition, "a record of the connection")


def limit(flows: Recording, pair: Pair) -> str:
    """Return what limits the client's end from now on."""
    first = record(flows, pair.client, time.monotonic_ns())
    time.sleep(_SECONDS)
    last = record(flows, pair.client, time.monotonic_ns())
    grown = {name: last[name].astype(np.int64) - first[name].astype(np.int64) for name in Interval._fields[1:8]}
    gauges = {name: last[name].astype(np.int64) for name in Interval._fields[8:]}
    elapsed_us = (last["ts"].astype(np.int64) - first["ts"].astype(np.int64)) // 1000
    found = Interval(elapsed_us, **grown, **gauges)
    return LIMITS[limits(found)[0]]


def drain(pair: Pair) -> Callable[[], Any]:
    return lambda: pair.accepted.recv(1 << 18)


def fill(pair: Pair, size: int = 1 << 18) -> Callable[[], Any]:
    pair.client.settimeout(0.2)

    def step() -> None:
        with contextlib.suppress(TimeoutError):
            pair.client.send(bytes(size))

    pair.accepted.settimeout(0.2)
    return step


def quiet(step: Callable[[], Any]) -> Callable[[], Any]:
    def tried() -> None:
        with contextlib.suppress(TimeoutError):
            step()

    return tried


def test_a_slow_writer_is_limited_by_its_application(flows: Recording, lab: Lab) -> None:
    with Pair(lab.client, lab.server, lab.server.ipv4, _PORTS[0]) as pair:

        def write() -> None:
            pair.client.send(b"x" * 100)
            time.sleep(0.1)

        fill(pair)
        with running(write, quiet(drain(pair))):
            assert limit(flows, pair) == "application"


def test_a_slow_reader_is_the_limit_of_its_sender(flows: Recording, lab: Lab) -> None:
    with Pair(lab.client, lab.server, lab.server.ipv4, _PORTS[1]) as pair:

        def read() -> None:
            pair.accepted.recv(1 << 16)
            time.sleep(0.05)

        with running(fill(pair), quiet(read)):
            assert limit(flows, pair) == "receiver"


def test_a_small_send_buffer_is_the_limit(flows: Recording, lab: Lab) -> None:
    with (
        queue(lab.server, "tbf rate 64kbit burst 300 limit 20k"),  # acknowledgements take 8 ms each
        Pair(lab.client, lab.server, lab.server.ipv4, _PORTS[2]) as pair,
    ):
        pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SNDBUF)
        pair.client.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _PACE)
        # BBR, some hosts' default, sends no faster than these acknowledgements allow.
        pair.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        with running(fill(pair), quiet(drain(pair))):
            assert limit(flows, pair) == "send_buffer"


def test_random_loss_is_the_limit(flows: Recording, lab: Lab) -> None:
    drop = "meta l4proto tcp numgen random mod 100 < 5 drop"
    with (
        Pair(lab.client, lab.server, lab.server.ipv4, _PORTS[3]) as pair,
        rules(lab.server, "prerouting", f"tcp dport {_PORTS[3]} {drop}"),
        running(fill(pair), quiet(drain(pair))),
    ):
        assert limit(flows, pair) == "loss"


def test_a_full_link_is_congestion(flows: Recording, lab: Lab) -> None:
    with (
        queue(lab.client, "tbf rate 20mbit burst 32k limit 200k"),
        Pair(lab.client, lab.server, lab.server.ipv4, _PORTS[4]) as pair,
        running(fill(pair), quiet(drain(pair))),
    ):
        assert limit(flows, pair) == "congestion"


def test_a_peer_that_no_longer_answers_is_loss_while_the_timer_waits(flows: Recording, lab: Lab) -> None:
    with Pair(lab.client, lab.server, lab.server.ipv4, _PORTS[5]) as pair:
        pair.exchange(1, 100)
        with rules(lab.server, "prerouting", f"tcp dport {_PORTS[5]} drop"):
            pair.client.send(b"x")
            wait_for(
                lambda: (record(flows, pair.client, time.monotonic_ns())["rto_us"] > _WAIT_US).all(), "a long wait"
            )
            assert limit(flows, pair) == "loss"
