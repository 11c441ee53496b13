"""The budget for transmits samples connections: nested sets, all of them in turn, and nothing but transmits."""

import contextlib
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from producer.demo.lab import Lab
from producer.events import FLOWS, REASONS, RETRANSMITS, TRANSMITS, Rows
from producer.rules.tables import Action, Rule, tables
from tests.support.capture import DEADLINE_S, Recording, cookie_of, hook_settings, inside, rules, wait_for

pytestmark = pytest.mark.root

_CONNECTIONS = 101


class Connections:
    """Connections between the two hosts, both ends in this process."""

    def __init__(self, recording: Recording, lab: Lab, port: int, stack: contextlib.ExitStack) -> None:
        self._recording = recording
        self._port = port
        with inside(lab.server):
            listener = stack.enter_context(socket.create_server((lab.server.ipv4, port), backlog=_CONNECTIONS))
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        for _ in range(_CONNECTIONS):
            with inside(lab.client):
                client = stack.enter_context(socket.create_connection((lab.server.ipv4, port), timeout=DEADLINE_S))
            accepted = stack.enter_context(listener.accept()[0])
            accepted.settimeout(DEADLINE_S)
            self.pairs.append((client, accepted))
        self.cookies = {cookie_of(client) for client, _ in self.pairs}

    def captured(self, rate: int, turn: int) -> dict[int, int]:
        """Send a segment on each connection; return the captured ones' cookies and sampling rates."""
        before = len(self._recording.of_port(TRANSMITS, self._port))
        self._recording.kernel.limit_transmits(rate, turn)
        for client, accepted in self.pairs:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
        rows = self._recording.of_port(TRANSMITS, self._port)[before:]["s"]
        data = rows[(rows["payload_len"] > 0) & (rows["flow"]["dport"] == self._port)]
        return dict(zip(data["flow"]["sk_cookie"].tolist(), data["sample_rate"].tolist(), strict=True))


@pytest.fixture
def connections(flows: Recording, lab: Lab, port: int) -> Iterator[Connections]:
    with contextlib.ExitStack() as stack:
        stack.callback(flows.kernel.limit_transmits, 1, 0)
        yield Connections(flows, lab, port, stack)


def test_connections_captured_at_a_rate_are_also_captured_at_each_lower_one(connections: Connections) -> None:
    for turn in (0, 5):
        lower = connections.captured(1, turn)
        assert lower.keys() == connections.cookies
        for rate in (2, 4, 8):
            captured = connections.captured(rate, turn)
            assert captured.keys() < lower.keys()
            assert set(captured.values()) == {rate}
            lower = captured


def test_each_connection_has_its_turn_so_scaled_sums_are_exact(connections: Connections) -> None:
    rate, seen, scaled = 8, set[int](), 0
    for turn in range((1 << 32) - 3, (1 << 32) + 5):
        captured = connections.captured(rate, turn % (1 << 32))
        assert not seen & captured.keys()
        seen |= captured.keys()
        scaled += sum(captured.values())
    assert seen == connections.cookies
    assert scaled == rate * _CONNECTIONS


def test_the_rate_of_a_rule_and_the_budget_multiply(lab: Lab, port: int) -> None:
    sampled = tables((Rule("sampled", Action(sample_rate=3), port=((port, port),)),), Action(False, False))
    with Recording(hook_settings(rules=sampled)) as recording, contextlib.ExitStack() as stack:
        connections = Connections(recording, lab, port, stack)
        by_rule = connections.captured(1, 0)
        both = connections.captured(4, 0)
        assert 0 < len(both) < len(by_rule) < _CONNECTIONS
        assert both.keys() < by_rule.keys()
        assert (set(by_rule.values()), set(both.values())) == ({3}, {12})


def test_retransmissions_and_records_of_connections_are_not_sampled(flows: Recording, lab: Lab, port: int) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(flows.kernel.limit_transmits, 1, 0)
        connections = Connections(flows, lab, port, stack)
        flows.kernel.limit_transmits(1 << 16, 0)
        before = len(flows.of_port(TRANSMITS, port))
        with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
            for client, _ in connections.pairs:
                client.sendall(b"x")

            def retransmitted() -> Rows | None:
                rows = flows.of_port(RETRANSMITS, port)
                return rows if set(rows["s"]["flow"]["sk_cookie"]) >= connections.cookies else None

            rows = wait_for(retransmitted, "a retransmission on each connection")
        assert set(rows["s"]["sample_rate"]) == {1}
        assert len(flows.of_port(TRANSMITS, port)) - before < _CONNECTIONS / 2
        for client, accepted in connections.pairs:
            assert accepted.recv(1) == b"x"
            client.close()
            assert accepted.recv(1) == b""
            accepted.close()
    closed = wait_for(lambda: rows if len(rows := flows.of_port(FLOWS, port)) >= 2 * _CONNECTIONS else None, "records")
    assert set(closed["reason"]) == {REASONS.index("close")}
    assert set(closed["sample_rate"]) == {1}
    assert len(np.unique(closed["flow"]["sk_cookie"])) == len(closed) == 2 * _CONNECTIONS
