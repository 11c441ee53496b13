"""Records of connections that hosts have only now and then."""

import contextlib
import errno
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from producer.demo.lab import Lab
from producer.events import FLOWS, KNOWN, REASONS, ROLES, STATES, STREAMS, Rows
from producer.paths import BPF
from tests.support.capture import Pair, Recording, disconnect, hook_settings, inside, receive, rules, setting, wait_for
from tests.support.rules import filtered

pytestmark = pytest.mark.root

_IPPROTO_MPTCP = 262


def of_role(recording: Recording, port: int, role: str, count: int, reason: str) -> Rows:
    """Wait for a number of records of a port."""

    def condition() -> Rows | None:
        rows = recording.of_port(FLOWS, port)
        chosen: Rows = rows[(rows["role"] == ROLES.index(role)) & (rows["reason"] == REASONS.index(reason))]
        return chosen if len(chosen) >= count else None

    return wait_for(condition, f"{count} records")


def test_a_connect_without_a_free_port_has_its_error(flows: Recording, lab: Lab, port: int) -> None:
    with (
        setting(lab.client, "net.ipv4.ip_local_port_range", "40000 40000"),
        inside(lab.client),
        socket.create_server(("", 40000)),
        pytest.raises(OSError, match="Cannot assign requested address"),
    ):
        socket.create_connection((lab.server.ipv4, port))
    (row,) = of_role(flows, port, "client", 1, "close")
    assert (STATES[row["state"]], row["flow"]["sport"]) == ("SYN_SENT", 0)
    assert (row["known"] & KNOWN["error"], row["error"]) == (KNOWN["error"], errno.EADDRNOTAVAIL)


def test_a_connect_that_sends_no_syn_does_not_have_the_sockets_earlier_error(
    flows: Recording, lab: Lab, port: int
) -> None:
    with contextlib.ExitStack() as stack:
        with inside(lab.server):
            listener = stack.enter_context(socket.create_server((lab.server.ipv4, port)))
        with inside(lab.client):
            client = stack.enter_context(socket.create_connection((lab.server.ipv4, port)))
            stack.enter_context(socket.create_server(("", 40000)))
        stack.enter_context(listener.accept()[0])
        disconnect(client)  # leaves ECONNRESET
        stack.enter_context(setting(lab.client, "net.ipv4.ip_local_port_range", "40000 40000"))
        assert client.connect_ex((lab.server.ipv4, port)) == errno.EADDRNOTAVAIL
    _, row = of_role(flows, port, "client", 2, "close")
    assert (STATES[row["state"]], row["segs_out"]) == ("SYN_SENT", 0)
    assert not row["known"] & KNOWN["error"]


def test_a_connection_whose_beginning_no_program_has_seen_does_not_have_its_listeners_start(
    lab: Lab, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in softirqs in which some kernels run no program of a tracepoint: docs/truth.md."""
    copy = tmp_path / "bpf"
    shutil.copytree(BPF, copy)
    text, first = (copy / "flow.h").read_text(), "	if (new_state == TCP_SYN_SENT)\n"
    assert text.count(first) == 1
    skipped = "	if (old_state == TCP_LISTEN || old_state == TCP_SYN_RECV)\n		return 0;\n"
    (copy / "flow.h").write_text(text.replace(first, skipped + first))
    monkeypatch.setattr("producer.kernel.capture.BPF", copy)
    with Recording(hook_settings(streams=STREAMS, rules=filtered(ports=[port]))) as recording:
        with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
            pair.end()
        (row,) = of_role(recording, port, "server", 1, "close")
    assert not row["known"] & KNOWN["start_ns"]
    assert row["known"] & KNOWN["process"]


def _fast_open(stack: contextlib.ExitStack, lab: Lab, port: int) -> tuple[socket.socket, socket.socket]:
    """Return a client that has sent "hello" with its SYN, whose SYN-ACK is lost, and the server's end."""
    lost = f"tcp sport {port} tcp flags & (syn|ack) == syn|ack numgen inc mod 997 == 0 drop"
    for host, without_cookie in ((lab.client, 0x5), (lab.server, 0x202)):
        stack.enter_context(setting(host, "net.ipv4.tcp_fastopen", without_cookie))
    with inside(lab.server):
        listener = stack.enter_context(socket.create_server((lab.server.ipv4, port)))
    with inside(lab.client):
        client = stack.enter_context(socket.socket())
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 100)
    stack.enter_context(rules(lab.client, "prerouting", lost))
    client.setblocking(False)  # it does not wait for the SYN-ACK
    client.sendto(b"hello", socket.MSG_FASTOPEN, (lab.server.ipv4, port))
    client.setblocking(True)
    accepted = stack.enter_context(listener.accept()[0])
    receive(accepted, 5)
    return client, accepted


def test_a_server_that_closes_within_tcp_fast_opens_handshake_has_its_start(
    flows: Recording, lab: Lab, port: int
) -> None:
    """Usual over any distance; without its start, alerts and metrics would take it for an older connection."""
    with contextlib.ExitStack() as stack:
        client, accepted = _fast_open(stack, lab, port)
        accepted.close()
        assert client.recv(1) == b""
    (row,) = of_role(flows, port, "server", 1, "close")
    assert row["known"] & KNOWN["start_ns"]


def test_a_server_that_is_reset_within_tcp_fast_opens_handshake_has_a_record(
    flows: Recording, lab: Lab, port: int
) -> None:
    """The client has closed its socket, so the repeated SYN-ACK gets a reset."""
    with contextlib.ExitStack() as stack:
        client, accepted = _fast_open(stack, lab, port)
        client.close()
        with pytest.raises(ConnectionResetError):
            accepted.recv(1)
        (row,) = of_role(flows, port, "server", 1, "close")
    assert (STATES[row["state"]], row["error"], row["bytes_received"]) == ("SYN_RECV", errno.ECONNRESET, 5)


def test_subflows_that_the_kernel_adds_to_multipath_tcp_have_no_process(flows: Recording, port: int) -> None:
    with Lab(loss=0) as lab:
        near, other, far = "10.224.0.1", "10.224.0.3", "10.224.0.2"
        for host, address in ((lab.client, near), (lab.client, other), (lab.server, far)):
            subprocess.run(host.command("ip", "address", "add", f"{address}/24", "dev", "veth0"), check=True)
        subprocess.run(lab.client.command("ip", "mptcp", "endpoint", "add", near, "subflow"), check=True)
        for host in lab.hosts:
            subprocess.run(host.command("ip", "mptcp", "limits", "set", "subflow", "2"), check=True)
        with inside(lab.server):
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP)
        with inside(lab.client):
            client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP)
        with listener, client:
            listener.bind((lab.server.ipv4, port))
            listener.listen()
            client.connect((lab.server.ipv4, port))
            accepted, _ = listener.accept()
            with accepted:
                client.sendall(b"hello")
                receive(accepted, 5)
                accepted.sendall(b"!")
                receive(client, 1)
                wait_for(lambda: lab.server.counters()["PassiveOpens"] == 2, "a worker's subflow")
                subprocess.run(lab.client.command("ip", "mptcp", "endpoint", "add", other, "subflow"), check=True)
                wait_for(lambda: lab.server.counters()["PassiveOpens"] == 3, "a subflow of this command")
        rows = of_role(flows, port, "client", 3, "close")
    process = {row["flow"]["saddr"].tobytes()[-4:]: int(row["pid"]) for row in rows}
    assert process == dict(zip(map(socket.inet_aton, (lab.client.ipv4, near, other)), (os.getpid(), 0, 0), strict=True))
