"""Rules in the kernel keep, drop and sample segments, and a reload neither loses nor duplicates any."""

import contextlib
import ctypes
import ipaddress
import itertools
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from producer.demo.lab import Lab
from producer.events import RETRANSMITS, TRANSMITS, Rows
from producer.host.cgroups import cgroup2_root
from producer.kernel import bpf_syscall
from producer.kernel.rule_maps import RuleMaps
from producer.rules.tables import MOST_CGROUP_LEVELS, Action, Rule, tables
from tests.support.capture import Pair, Recording, hook_settings, inside, receive
from tests.support.capture import rules as firewall

pytestmark = pytest.mark.root

KEEP, DROP = Action(), Action(transmit=False, retransmit=False)
EXCHANGES, SIZE = 101, 7


# Not the ports of the session's recording, whose rings are not read meanwhile.
_ports = itertools.count(30_000 + os.getpid() % 50 * 50)


@pytest.fixture
def port() -> int:
    return next(_ports)


@pytest.fixture(scope="module")
def ruled(root: None) -> Iterator[Recording]:
    """A recording whose rules each test sets."""
    with Recording(hook_settings(rules=tables([], DROP))) as capture:
        yield capture


def put(capture: Recording, *rules: Rule) -> int:
    return capture.kernel.rules.put(tables(rules, DROP))


def sent_by(capture: Recording, port: int) -> Rows:
    """Return the exchanges' segments, without retransmissions, which may happen on a slow machine."""
    rows = capture.of_port(TRANSMITS, port)
    chosen: Rows = rows[(rows["s"]["payload_len"] == SIZE) & (rows["is_retransmit"] == 0)]
    return chosen


def exchange(lab: Lab, port: int, count: int = EXCHANGES) -> None:
    with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
        pair.exchange(count, SIZE)


def on_port(port: int, action: Action = KEEP, **conditions: object) -> Rule:
    return Rule("r", action, port=((port, port),), **conditions)  # type: ignore[arg-type]  # any of the conditions


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        ({}, True),
        ({"uid": (os.geteuid(),)}, True),
        ({"uid": (os.geteuid() + 1,)}, False),
        ({"netns": (1,)}, False),
        ({"local_address": (ipaddress.ip_network("127.0.0.0/30"),)}, True),
        ({"remote_address": (ipaddress.ip_network("::ffff:127.0.0.1/128"),)}, True),
        ({"address": (ipaddress.ip_network("127.0.0.4/30"),)}, False),
        ({"state": ("ESTABLISHED",)}, True),
        ({"state": ("LAST_ACK", "SYN_SENT")}, False),
    ],
)
def test_a_condition_is_met_or_not(
    ruled: Recording, lab: Lab, port: int, conditions: dict[str, object], kept: bool
) -> None:
    put(ruled, on_port(port, **conditions))
    exchange(lab, port)
    assert len(sent_by(ruled, port)) == (EXCHANGES if kept else 0)


def test_a_state_is_decided_for_each_segment_of_a_socket(ruled: Recording, lab: Lab, port: int) -> None:
    put(ruled, on_port(port, state=("CLOSE_WAIT",)))
    with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
        pair.exchange(3, SIZE)
        assert len(sent_by(ruled, port)) == 0
        pair.client.shutdown(socket.SHUT_WR)
        assert pair.accepted.recv(1) == b""
        pair.accepted.sendall(bytes(SIZE))
        receive(pair.client, SIZE)
        assert len(sent_by(ruled, port)) == 1


def test_a_socket_that_connects_again_is_decided_again(ruled: Recording, lab: Lab, port: int) -> None:
    other = next(_ports)
    put(ruled, on_port(port))
    with (
        inside(lab.client),
        socket.create_server(("127.0.0.1", port)) as server,
        socket.create_server(("127.0.0.1", other)) as other_server,
        socket.socket() as client,
    ):
        for listener, connected in ((other_server, other), (server, port), (other_server, other)):
            client.connect(("127.0.0.1", connected))
            with listener.accept()[0] as accepted:
                client.sendall(bytes(SIZE))
                receive(accepted, SIZE)
                disconnect(client)
    assert len(sent_by(ruled, port)) == 1
    assert len(ruled.of_port(TRANSMITS, other)) == 0


def test_the_other_end_of_the_agents_connection_is_captured_once_it_connects_elsewhere(
    ruled: Recording, lab: Lab, port: int
) -> None:
    elsewhere = next(_ports)
    put(ruled, Rule("both", KEEP, port=((port, port), (elsewhere, elsewhere))))
    with (
        inside(lab.client),
        socket.create_server(("127.0.0.1", port)) as broker,
        socket.create_server(("127.0.0.1", elsewhere)) as other_server,
        socket.socket() as agents,
    ):
        ruled.kernel.exclude_socket(agents.fileno())
        agents.connect(("127.0.0.1", port))
        with broker.accept()[0] as partner:
            partner.sendall(bytes(SIZE))
            receive(agents, SIZE)
            disconnect(partner)
            partner.connect(("127.0.0.1", elsewhere))
            with other_server.accept()[0] as accepted:
                partner.sendall(bytes(SIZE))
                receive(accepted, SIZE)
    assert len(sent_by(ruled, port)) == 0
    assert len(sent_by(ruled, elsewhere)) == 1


def disconnect(connected: socket.socket) -> None:
    """Dissolve the association, so that the socket can connect again: connect(2) with AF_UNSPEC."""
    assert ctypes.CDLL(None).connect(connected.fileno(), bytes(16), 16) == 0


def test_a_namespace_and_a_cgroup_above_the_sockets_are_conditions(ruled: Recording, lab: Lab, port: int) -> None:
    put(ruled, on_port(port))
    exchange(lab, port)
    own = int(sent_by(ruled, port)["s"]["flow"]["cgroup_id"][0])
    for rule, expected in (
        (on_port(port, netns=(lab.client.netns,)), True),
        (on_port(port, netns=(lab.server.netns,)), False),
        (on_port(port, cgroup=(own,)), True),
        (on_port(port, cgroup=(1,)), True),  # the root's id
        (on_port(port, cgroup=(2,)), False),
    ):
        before = len(sent_by(ruled, port))
        ruled.kernel.rules.put(tables([rule], DROP, {own: (1,)}))
        exchange(lab, port)
        assert len(sent_by(ruled, port)) - before == (EXCHANGES if expected else 0), rule


@pytest.fixture
def cgroups() -> Iterator[list[Path]]:
    """Nested folders, deeper than a rule can name; the outermost first."""
    root = cgroup2_root()
    if root is None:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    folders = [root / f"rebpf-rules-{os.getpid()}"]
    for _ in range(MOST_CGROUP_LEVELS + 8):
        folders.append(folders[-1] / "d")
    for folder in folders:
        folder.mkdir()
    yield folders
    for folder in reversed(folders):
        folder.rmdir()


_CLIENT = """\
import os, socket, sys
open(sys.argv[1], "w").write(str(os.getpid()))
with socket.create_connection(("127.0.0.1", int(sys.argv[2]))) as client:
    client.sendall(bytes(int(sys.argv[3])))
    client.recv(1)
"""


def send_from(lab: Lab, cgroup: Path, port: int) -> None:
    """Start a process in a cgroup that connects and sends one segment."""
    argv = lab.client.command(sys.executable, "-c", _CLIENT, str(cgroup / "cgroup.procs"), str(port), str(SIZE))
    with inside(lab.client), socket.create_server(("127.0.0.1", port)) as server, subprocess.Popen(argv) as child:
        with server.accept()[0] as accepted:
            receive(accepted, SIZE)
        assert child.wait(60) == 0


def test_a_cgroup_matches_sockets_at_any_depth_below_it(
    ruled: Recording, lab: Lab, port: int, cgroups: list[Path]
) -> None:
    """Rules name the outermost folder, the deepest one that can be named, and an unrelated one."""
    ids = [folder.stat().st_ino for folder in cgroups]
    above = {each: [*ids[:i][::-1], 1] for i, each in enumerate(ids)}
    for place in (1, 14, 15, 16, 17, 30, 31, len(cgroups) - 1):
        for named in (0, 15, MOST_CGROUP_LEVELS - 2):
            before = len(sent_by(ruled, port))
            ruled.kernel.rules.put(tables([on_port(port, cgroup=(ids[named],))], DROP, above))
            send_from(lab, cgroups[place], port)
            assert len(sent_by(ruled, port)) - before == (1 if named <= place else 0), (place, named)


def test_the_nearest_of_the_named_cgroups_decides_with_those_above_it(
    ruled: Recording, lab: Lab, port: int, cgroups: list[Path]
) -> None:
    ids = [folder.stat().st_ino for folder in cgroups]
    above = {ids[0]: [1], ids[20]: [*ids[:20][::-1], 1]}
    inner, outer = on_port(port, DROP, cgroup=(ids[20],)), on_port(port, cgroup=(ids[0],))
    for rules, kept in (([inner, outer], False), ([outer, inner], True)):
        before = len(sent_by(ruled, port))
        ruled.kernel.rules.put(tables(rules, DROP, above))
        send_from(lab, cgroups[-1], port)
        assert len(sent_by(ruled, port)) - before == kept


def test_the_first_of_1024_rules_that_matches_decides(ruled: Recording, lab: Lab, port: int) -> None:
    others = [Rule(str(i), KEEP, local_port=((i + 1, i + 1),)) for i in range(1022)]
    put(ruled, *others, on_port(port, DROP), on_port(port))
    exchange(lab, port)
    assert len(sent_by(ruled, port)) == 0
    put(ruled, *others, on_port(port), on_port(port, DROP))
    exchange(lab, port)
    assert len(sent_by(ruled, port)) == EXCHANGES


def test_sampling_by_connection_keeps_whole_connections(ruled: Recording, lab: Lab, port: int) -> None:
    put(ruled, on_port(port, Action(sample_rate=4)))
    for _ in range(199):
        exchange(lab, port, 3)
    rows = sent_by(ruled, port)
    assert set(rows["s"]["sample_rate"]) == {4}
    taken, counts = np.unique(rows["s"]["flow"]["sport"], return_counts=True)
    assert set(counts) == {3}, "all of a connection's segments, or none"
    assert 199 / 8 < len(taken) < 199 / 2


def test_sampling_by_event_keeps_single_events(ruled: Recording, lab: Lab, port: int) -> None:
    put(ruled, on_port(port, Action(sample_rate=3, sample_by_event=True)))
    exchange(lab, port, 997)
    rows = sent_by(ruled, port)
    assert set(rows["s"]["sample_rate"]) == {3}
    assert 997 / 6 < len(rows) < 997 / 1.5


def test_a_stream_is_kept_or_dropped_by_itself(ruled: Recording, lab: Lab, port: int) -> None:
    put(ruled, on_port(port, Action(transmit=False)))
    before = [ruled.kernel.counters(stream).passed for stream in (TRANSMITS, RETRANSMITS)]
    with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
        with firewall(lab.server, "prerouting", f"tcp dport {port} drop"):
            pair.client.sendall(bytes(SIZE))
            rows = ruled.wait_rows(RETRANSMITS, port, 1)
        pair.accepted.recv(SIZE)
    assert set(rows["s"]["payload_len"]) == {SIZE}
    after = [ruled.kernel.counters(stream).passed for stream in (TRANSMITS, RETRANSMITS)]
    assert after[0] == before[0]
    assert after[1] > before[1]


def test_reloads_lose_no_segment_and_take_none_twice(ruled: Recording, lab: Lab, port: int) -> None:
    done = threading.Event()
    versions = [put(ruled, on_port(port))]

    def reload() -> None:
        while not done.is_set():
            others = [Rule(str(i), DROP, uid=(1 << 20 | i,)) for i in range(len(versions) % 7)]
            versions.append(put(ruled, *others, on_port(port)))

    thread = threading.Thread(target=reload)
    with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
        thread.start()
        while len(versions) < 201:
            pair.exchange(101, SIZE)
        done.set()
        thread.join()
    rows = sent_by(ruled, port)
    assert (np.diff(rows["s"]["seq"].astype(np.int64)) % (1 << 32) == SIZE).all(), "each segment once, none missing"
    assert set(rows["s"]["rules_version"]) <= set(versions)
    assert len(set(rows["s"]["rules_version"])) > 20


def test_an_address_of_one_family_takes_none_of_the_other(ruled: Recording, lab: Lab, port: int) -> None:
    """Also if both are named, and for IPv4 through an IPv6 socket."""
    four, six = ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")
    addresses = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    for named, taken in (((six,), {"::1"}), ((four,), {"127.0.0.1", "::ffff:127.0.0.1"}), ((four, six), {*addresses})):
        put(ruled, on_port(port, address=named))
        for address in addresses:
            before = len(sent_by(ruled, port))
            with Pair(lab.client, lab.client, address, port) as pair:
                pair.exchange(3, SIZE)
            assert len(sent_by(ruled, port)) - before == (3 if address in taken else 0), (named, address)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The arguments of each write to a map, and of each deletion."""
    calls: list[object] = []

    def counted(call: Callable[..., None], *arguments: object) -> None:
        calls.append(arguments)
        call(*arguments)

    for name in ("update", "delete"):
        monkeypatch.setattr(bpf_syscall, name, partial(counted, getattr(bpf_syscall, name)))
    return calls


def test_a_reload_writes_what_differs_and_nothing_else(
    ruled: Recording, lab: Lab, port: int, written: list[object]
) -> None:
    maps = RuleMaps(ruled.kernel._maps)
    peers = tuple(ipaddress.ip_network(0x0B000000 + i) for i in range(5_000))
    many = Rule("many", DROP, address=peers)

    def writes(*rules: Rule) -> int:
        written.clear()
        maps.put(tables(rules, DROP))
        return len(written)

    for _ in range(2):  # afterwards this process has written both generations
        writes(on_port(port))
    assert writes(many, on_port(port)) >= 5_000
    assert max(writes(many, on_port(each)) for each in (1, 2, port, 3, port)) < 20
    more = Rule("more", DROP, address=(*peers[:-1], ipaddress.ip_network("12.0.0.0/8")))
    assert writes(more, on_port(port)) >= 5_000, "the other generation is filled once"
    assert writes(many, on_port(port)) < 20
    assert writes(more, on_port(port)) < 20
    exchange(lab, port)
    assert len(sent_by(ruled, port)) == EXCHANGES


def test_a_step_of_a_reload_writes_a_bounded_number_of_elements(
    ruled: Recording, lab: Lab, port: int, written: list[object]
) -> None:
    """A thousand rules, each with ports, an address and a user of its own."""
    maps = RuleMaps(ruled.kernel._maps)
    networks = [(ipaddress.ip_network(0x0B000000 + i),) for i in range(1_000)]
    rules = [
        Rule(str(i), DROP, address=network, port=((8 * i, 8 * i),), uid=(1 << 20 | i,))
        for i, network in enumerate(networks, 1)
    ]
    steps = []
    for _ in maps.put_in_steps(tables([on_port(port), *rules[:-1]], DROP)):
        steps.append(len(written))
        written.clear()
    assert max(steps) <= 1024, steps
    assert len(steps) >= 4
    exchange(lab, port)
    assert len(sent_by(ruled, port)) == EXCHANGES


def test_a_reload_that_fails_changes_nothing_and_the_next_is_complete(ruled: Recording, lab: Lab, port: int) -> None:
    """The kernel's table is too small for the addresses."""
    maps = RuleMaps(ruled.kernel._maps)
    maps.put(tables([on_port(port)], DROP))
    too_many = tuple(ipaddress.ip_network(0x0D000000 + i) for i in range(8_000))
    with full(ruled.kernel._maps["rule_prefixes"]):
        with pytest.raises(OSError, match="No space"):
            maps.put(tables([Rule("n", DROP, address=too_many), on_port(port, DROP)], DROP))
        exchange(lab, port)
        assert len(sent_by(ruled, port)) == EXCHANGES
    maps.put(tables([Rule("n", DROP, address=too_many), on_port(port)], DROP))
    exchange(lab, port)
    assert len(sent_by(ruled, port)) == 2 * EXCHANGES


@contextlib.contextmanager
def full(prefixes: int) -> Iterator[None]:
    """Leave space for 1,000 prefixes: fill the rest with keys that no program looks up."""
    there: list[bytes] = []
    try:
        with contextlib.suppress(OSError):
            for i in itertools.count():
                key = struct.pack("<IIQQ", 32 + 128, 7, i, 0)
                bpf_syscall.update(prefixes, key, bytes(4))
                there.append(key)
        for _ in range(1_000):
            bpf_syscall.delete(prefixes, there.pop())
        yield
    finally:
        for key in there:
            bpf_syscall.delete(prefixes, key)
