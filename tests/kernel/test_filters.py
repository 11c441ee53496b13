"""Filters in the kernel: addresses and ports of either side, and the agent's own sockets."""

import ipaddress
import itertools
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from producer.events import RETRANSMITS, TRANSMITS, Rows
from producer.lab import Lab
from producer.rules import filtered
from tests.kernel.capture import Capture, Pair, hook_settings, inside, wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]


def endpoints(rows: Rows) -> set[tuple[str, int, str, int]]:
    flows = rows["s"]["flow"]
    return {
        (text(each["saddr"]), int(each["sport"]), text(each["daddr"]), int(each["dport"]))
        for each in flows
    }  # fmt: skip


def text(address: object) -> str:
    parsed = ipaddress.IPv6Address(bytes(address))  # type: ignore[call-overload]  # an array of 16 bytes
    return str(parsed.ipv4_mapped or parsed)


def test_a_flow_passes_with_a_wanted_address_and_a_wanted_port_on_any_side(lab: Lab, port: int) -> None:
    wanted = ("127.0.0.7", "::1")
    rules = filtered(map(ipaddress.ip_address, wanted), (port, port + 10_000))
    settings = hook_settings(rules=rules)
    expected = set()
    with Capture(settings) as capture:
        for address, number in itertools.product(("127.0.0.7", "127.0.0.1", "::1"), (port, port + 5_000)):
            with Pair(lab.client, lab.client, address, number) as pair:
                pair.exchange(3, 3)
                here, there = pair.client.getsockname()[:2], pair.accepted.getsockname()[:2]
            if address in wanted and number == port:
                expected |= {(*here, *there), (*there, *here)}
        # By the client's side: its port and its address.
        with inside(lab.client), socket.create_server(("127.0.0.1", port + 5_000)):
            socket.create_connection(("127.0.0.1", port + 5_000), source_address=("127.0.0.7", port + 10_000)).close()
        expected |= {
            ("127.0.0.7", port + 10_000, "127.0.0.1", port + 5_000),
            ("127.0.0.1", port + 5_000, "127.0.0.7", port + 10_000),
        }
        wait_for(lambda: len(capture.all(TRANSMITS)) == capture.hooks.counters(TRANSMITS).passed, "all events")
        assert endpoints(capture.all(TRANSMITS)) == expected
        assert len(capture.all(RETRANSMITS)) == capture.hooks.counters(RETRANSMITS).passed == 0


@pytest.fixture
def broker() -> Iterator[socket.socket]:
    """A listener in this process's own namespace, as the embedded broker is."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def ask(client: socket.socket, broker: socket.socket) -> None:
    """Connect to a broker, ask it something, and get an answer."""
    client.connect(broker.getsockname())
    with broker.accept()[0] as accepted:
        client.sendall(b"question")
        assert accepted.recv(8)
        accepted.sendall(b"answer")
        assert client.recv(6)


def test_only_the_agents_own_sockets_are_left_out(broker: socket.socket) -> None:
    port = broker.getsockname()[1]
    with Capture(hook_settings(rules=filtered(ports=(port,)), own_listeners=True)) as capture:
        capture.hooks.exclude_listener(ipaddress.IPv4Address("127.0.0.1"), port)
        with socket.socket() as own, socket.socket() as other:
            capture.hooks.exclude_socket(own.fileno())
            for client in (own, other):
                ask(client, broker)
            visible = ("127.0.0.1", other.getsockname()[1], "127.0.0.1", port)
        # Another process, which knows nothing of the agent, talks to the same port.
        program = (
            "import socket, sys\n"
            "with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as s:\n"
            "    print(s.getsockname()[1])\n"
        )
        command = [sys.executable, "-c", program, str(port)]
        stranger = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        broker.accept()[0].close()
        wait_for(lambda: len(capture.all(TRANSMITS)) == capture.hooks.counters(TRANSMITS).passed, "all events")
        assert endpoints(capture.all(TRANSMITS)) == {visible, ("127.0.0.1", stranger, "127.0.0.1", port)}


def test_neither_end_of_the_agents_own_connections_is_seen(broker: socket.socket) -> None:
    """A broker on this host that is not the agent's: what it answers the agent would feed back too."""
    port = broker.getsockname()[1]
    with Capture(hook_settings(rules=filtered(ports=(port,)))) as capture:
        with socket.socket() as own, socket.socket() as other:
            capture.hooks.exclude_socket(own.fileno())
            for client in (own, other):
                ask(client, broker)
            visible = ("127.0.0.1", other.getsockname()[1], "127.0.0.1", port)
        wait_for(lambda: len(capture.all(TRANSMITS)) == capture.hooks.counters(TRANSMITS).passed, "all events")
        assert endpoints(capture.all(TRANSMITS)) == {visible, (*visible[2:], *visible[:2])}


def test_listeners_of_others_on_the_same_port_stay_visible(broker: socket.socket, lab: Lab) -> None:
    """The endpoint is one in the agent's network namespace: not the same address and port in another."""
    port = broker.getsockname()[1]
    with Capture(hook_settings(rules=filtered(ports=(port,)), own_listeners=True)) as capture:
        capture.hooks.exclude_listener(ipaddress.IPv4Address("127.0.0.1"), port)
        with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
            pair.exchange(1, 1)
        rows = capture.wait_rows(TRANSMITS, port, 3)
        assert (rows["s"]["flow"]["sport"] == port).any()
