"""Filters in the kernel: addresses and ports of either side, and the agent's own sockets."""

import contextlib
import ipaddress
import itertools
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from producer.demo.lab import Lab
from producer.events import RETRANSMITS, TRANSMITS, Rows
from tests.support.capture import DEADLINE_S, Pair, Recording, hook_settings, inside, wait_for
from tests.support.rules import filtered

pytestmark = pytest.mark.root


def endpoints(rows: Rows) -> set[tuple[str, int, str, int]]:
    flows = rows["s"]["flow"]
    return {
        (text(each["saddr"]), int(each["sport"]), text(each["daddr"]), int(each["dport"]))
        for each in flows
    }  # fmt: skip


def text(address: object) -> str:
    parsed = ipaddress.IPv6Address(bytes(address))  # type: ignore[call-overload]  # an array of 16 bytes
    return str(parsed.ipv4_mapped or parsed)


def test_a_flow_passes_with_a_listed_address_and_a_listed_port_on_either_side(lab: Lab, port: int) -> None:
    wanted = ("127.0.0.7", "::1")
    rules = filtered(map(ipaddress.ip_address, wanted), (port, port + 10_000))
    settings = hook_settings(rules=rules)
    expected = set()
    with Recording(settings) as capture:
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
        wait_for(lambda: len(capture.all(TRANSMITS)) == capture.kernel.counters(TRANSMITS).passed, "all events")
        assert endpoints(capture.all(TRANSMITS)) == expected
        assert len(capture.all(RETRANSMITS)) == capture.kernel.counters(RETRANSMITS).passed == 0


@pytest.fixture
def broker() -> Iterator[socket.socket]:
    """A listener in this process's namespace, like the test broker."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def ask(client: socket.socket, broker: socket.socket) -> None:
    """Connect to a broker, send a request, and receive an answer."""
    client.connect(broker.getsockname())
    with broker.accept()[0] as accepted:
        client.sendall(b"question")
        assert accepted.recv(8)
        accepted.sendall(b"answer")
        assert client.recv(6)


def test_only_the_agents_own_sockets_are_excluded(broker: socket.socket) -> None:
    port = broker.getsockname()[1]
    with Recording(hook_settings(rules=filtered(ports=(port,)))) as capture:
        capture.kernel.exclude_listener(ipaddress.IPv4Address("127.0.0.1"), port)
        with socket.socket() as own, socket.socket() as other:
            capture.kernel.exclude_socket(own.fileno())
            for client in (own, other):
                ask(client, broker)
            visible = ("127.0.0.1", other.getsockname()[1], "127.0.0.1", port)
        # Another process, unrelated to the agent, uses the same port.
        program = (
            "import socket, sys\n"
            "with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as s:\n"
            "    print(s.getsockname()[1])\n"
        )
        command = [sys.executable, "-c", program, str(port)]
        stranger = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        broker.accept()[0].close()
        wait_for(lambda: len(capture.all(TRANSMITS)) == capture.kernel.counters(TRANSMITS).passed, "all events")
        assert endpoints(capture.all(TRANSMITS)) == {visible, ("127.0.0.1", stranger, "127.0.0.1", port)}


def test_neither_end_of_the_agents_own_connections_is_seen(broker: socket.socket) -> None:
    """A broker on this host that the agent did not start: its answers to the agent would feed back too."""
    port = broker.getsockname()[1]
    with Recording(hook_settings(rules=filtered(ports=(port,)))) as capture:
        with socket.socket() as own, socket.socket() as other:
            capture.kernel.exclude_socket(own.fileno())
            for client in (own, other):
                ask(client, broker)
            visible = ("127.0.0.1", other.getsockname()[1], "127.0.0.1", port)
        wait_for(lambda: len(capture.all(TRANSMITS)) == capture.kernel.counters(TRANSMITS).passed, "all events")
        assert endpoints(capture.all(TRANSMITS)) == {visible, (*visible[2:], *visible[:2])}


def test_listeners_of_others_on_the_same_port_stay_visible(broker: socket.socket, lab: Lab) -> None:
    """Endpoints are per network namespace: the same address and port in another one is different."""
    port = broker.getsockname()[1]
    with Recording(hook_settings(rules=filtered(ports=(port,)))) as capture:
        capture.kernel.exclude_listener(ipaddress.IPv4Address("127.0.0.1"), port)
        with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
            pair.exchange(1, 1)
        rows = capture.wait_rows(TRANSMITS, port, 3)
        assert (rows["s"]["flow"]["sport"] == port).any()


def test_an_address_pair_of_the_agents_in_another_namespace_stays_visible(broker: socket.socket, lab: Lab) -> None:
    port = broker.getsockname()[1]
    with Recording(hook_settings(rules=filtered(ports=(port,)))) as capture, socket.socket() as own:
        capture.kernel.exclude_socket(own.fileno())
        ask(own, broker)
        with inside(lab.client), socket.create_server(("127.0.0.1", port)) as there, socket.socket() as other:
            other.bind(own.getsockname())
            ask(other, there)
            pair = (*other.getsockname(), *there.getsockname())
        rows = settled(capture)
        assert endpoints(rows) == {pair, (*pair[2:], *pair[:2])}
        assert set(rows["s"]["flow"]["netns"]) == {lab.client.netns}


@pytest.mark.parametrize("ended_by", ["client", "broker", "reset"])
def test_the_agents_own_connection_is_excluded_to_its_last_segment(lab: Lab, port: int, ended_by: str) -> None:
    with Recording(hook_settings(rules=filtered(ports=(port,)))) as capture, inside(lab.client):
        with listening(port) as broker, socket.socket() as own:
            capture.kernel.exclude_socket(own.fileno())
            own.connect(broker.getsockname())
            end_by(ended_by, own, broker.accept()[0])
        assert len(settled(capture)) == 0


@pytest.mark.parametrize("ended_by", ["broker", "reset"])
def test_an_address_pair_is_captured_again_once_the_agents_connection_is_closed(
    lab: Lab, port: int, ended_by: str
) -> None:
    """Also if the next connection comes from the broker's side."""
    with Recording(hook_settings(rules=filtered(ports=(port,)))) as capture, inside(lab.client):
        with listening(port) as broker, socket.socket() as own:
            capture.kernel.exclude_socket(own.fileno())
            own.connect(broker.getsockname())
            local = own.getsockname()
            end_by(ended_by, own, broker.accept()[0])
        with listening(port) as broker, socket.socket() as other:
            connect_from(local, other, broker)
            pair = (*local, *broker.getsockname())
            reset(other)
        wait_for(lambda: endpoints(settled(capture)) == {pair, (*pair[2:], *pair[:2])}, "both ends")
        seen = len(settled(capture))
        with listening(local[1]) as listener, socket.socket() as other:
            connect_from(("127.0.0.1", port), other, listener)
            reset(other)
        wait_for(lambda: len(settled(capture)) >= seen + 3, "SYN, SYN-ACK and ACK")
        assert endpoints(settled(capture)[seen:]) == {pair, (*pair[2:], *pair[:2])}


def test_a_port_is_captured_again_once_the_agent_stops_listening_on_it(lab: Lab, port: int) -> None:
    with Recording(hook_settings(rules=filtered(ports=(port,)))) as capture, inside(lab.client):
        with listening(port) as broker:
            capture.kernel.exclude_listener(ipaddress.IPv4Address("127.0.0.1"), port)
            with socket.socket() as client:
                ask(client, broker)
            assert {each[1] for each in endpoints(settled(capture))} != {port}
            assert port not in {each[1] for each in endpoints(settled(capture))}
        with listening(port) as stranger, socket.socket() as client:
            ask(client, stranger)
        wait_for(lambda: port in {each[1] for each in endpoints(settled(capture))}, "the answers")


def test_a_connection_that_nobody_accepts_hides_nothing(lab: Lab, port: int) -> None:
    """The client of an unavailable broker tries many local ports, which others use afterwards."""
    with Recording(hook_settings(rules=filtered(ports=(port,)))) as capture, inside(lab.client):
        with socket.socket() as own:
            capture.kernel.exclude_socket(own.fileno())
            own.bind(("127.0.0.1", 0))
            local = own.getsockname()
            with pytest.raises(ConnectionRefusedError):
                own.connect(("127.0.0.1", port))
        assert len(settled(capture)) == 0
        with listening(port) as broker, socket.socket() as other:
            connect_from(local, other, broker)
            reset(other)
        pair = (*local, "127.0.0.1", port)
        wait_for(lambda: endpoints(settled(capture)) == {pair, (*pair[2:], *pair[:2])}, "both ends")


def settled(capture: Recording) -> Rows:
    """Wait for all transmits that the programs have counted, and return them."""
    wait_for(lambda: len(capture.all(TRANSMITS)) == capture.kernel.counters(TRANSMITS).passed, "all events")
    return capture.all(TRANSMITS)


def listening(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def connect_from(local: tuple[str, int], client: socket.socket, listener: socket.socket) -> None:
    """Connect from a port that a socket in time wait may still use, and exchange data."""

    def connects() -> bool:
        with contextlib.suppress(OSError):
            client.bind(local)
            return True
        return False

    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    wait_for(connects, "the port")
    ask(client, listener)


def end_by(how: str, client: socket.socket, accepted: socket.socket) -> None:
    """End a connection from either side, or by a reset."""
    client.settimeout(DEADLINE_S)
    client.sendall(b"question")
    assert accepted.recv(8)
    first, second = (accepted, client) if how == "broker" else (client, accepted)
    if how == "reset":
        reset(client)
    else:
        first.close()
        assert second.recv(1) == b""
    second.close()


def reset(end: socket.socket) -> None:
    """Close with a reset, so that nothing is left in time wait."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
