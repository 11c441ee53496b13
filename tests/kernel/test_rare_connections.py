"""Records of connections that hosts have only now and then."""

import errno
import os
import socket
import subprocess

import pytest

from producer.demo.lab import Lab
from producer.events import FLOWS, KNOWN, REASONS, ROLES, STATES, Rows
from tests.support.capture import Recording, inside, receive, setting, wait_for

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


def test_a_subflow_that_the_kernel_adds_to_multipath_tcp_is_of_no_kernel_thread(flows: Recording, port: int) -> None:
    with Lab(loss=0) as lab:
        near, far = "10.224.0.1", "10.224.0.2"
        for host, address in ((lab.client, near), (lab.server, far)):
            subprocess.run(host.command("ip", "address", "add", f"{address}/24", "dev", "veth0"), check=True)
        subprocess.run(lab.client.command("ip", "mptcp", "endpoint", "add", near, "subflow"), check=True)
        for host in lab.hosts:
            subprocess.run(host.command("ip", "mptcp", "limits", "set", "subflow", "1"), check=True)
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
                wait_for(lambda: lab.server.counters()["PassiveOpens"] == 2, "the other subflow")
        rows = of_role(flows, port, "client", 2, "close")
    process = {row["flow"]["saddr"].tobytes()[-4:]: int(row["pid"]) for row in rows}
    assert process == {socket.inet_aton(lab.client.ipv4): os.getpid(), socket.inet_aton(near): 0}
