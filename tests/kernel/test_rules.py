"""Rules in the kernel: what they keep, drop and sample, and that a reload loses no segment and takes none twice."""

import ipaddress
import os
import socket
import threading

import numpy as np
import pytest

from producer.events import RETRANSMITS, TRANSMITS
from producer.hooks import Hooks, HookSettings
from producer.lab import Lab
from producer.rules import Action, Rule, Tables, filtered, tables
from tests.kernel.capture import ALLOWED, Capture, Pair

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

KEEP, DROP = Action(), Action(transmit=False, retransmit=False)
EXCHANGES = 101


def sent_by(capture: Capture, port: int) -> np.ndarray:
    rows = capture.of_port(TRANSMITS, port)
    return rows[rows["s"]["payload_len"] == 7]


def exchange(lab: Lab, port: int) -> None:
    with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
        pair.exchange(EXCHANGES, 7)


def only_port(port: int, **conditions: object) -> Rule:
    return Rule("kept", KEEP, port=((port, port),), **conditions)  # type: ignore[arg-type]


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
def test_a_condition_is_met_or_not(lab: Lab, port: int, conditions: dict[str, object], kept: bool) -> None:
    rules = tables([only_port(port, **conditions)], DROP)
    with Capture(HookSettings(hooks=ALLOWED, rules=rules)) as capture:
        exchange(lab, port)
        assert len(sent_by(capture, port)) == (EXCHANGES if kept else 0)


def test_a_namespace_and_a_cgroup_above_the_sockets_are_conditions(lab: Lab, port: int) -> None:
    with Capture(HookSettings(hooks=ALLOWED, rules=filtered(ports=(port,)))) as capture:
        exchange(lab, port)
        flow = sent_by(capture, port)["s"]["flow"][0]
        for rule, expected in (
            (only_port(port, netns=(lab.client.netns,)), True),
            (only_port(port, netns=(lab.server.netns,)), False),
            (only_port(port, cgroup=(int(flow["cgroup_id"]),)), True),
            (only_port(port, cgroup=(1,)), True),  # the root's id
            (only_port(port, cgroup=(2,)), False),
        ):
            before = len(sent_by(capture, port))
            capture.hooks.put_rules(tables([rule], DROP, {int(flow["cgroup_id"]): (1,)}))
            exchange(lab, port)
            assert len(sent_by(capture, port)) - before == (EXCHANGES if expected else 0), rule


def test_the_first_of_1024_rules_that_matches_decides(lab: Lab, port: int) -> None:
    others = [Rule(str(i), KEEP, local_port=((i + 1, i + 1),)) for i in range(1021)]
    both = [Rule("dropped", DROP, port=((port, port),)), Rule("too late", KEEP, port=((port, port),))]
    for rules, kept in ((both, 0), (both[::-1], EXCHANGES)):
        with Capture(HookSettings(hooks=ALLOWED, rules=tables([*others, *rules], DROP))) as capture:
            exchange(lab, port)
            assert len(sent_by(capture, port)) == kept


def test_one_connection_in_so_many_is_taken_whole_and_says_so(lab: Lab, port: int) -> None:
    rule = Rule("sampled", Action(sample_rate=4), port=((port, port),))
    connections, segments = 199, 3
    with Capture(HookSettings(hooks=ALLOWED, rules=tables([rule], DROP))) as capture:
        for _ in range(connections):
            with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
                pair.exchange(segments, 7)
        rows = sent_by(capture, port)
    assert set(rows["s"]["sample_rate"]) == {4}
    taken, counts = np.unique(rows["s"]["flow"]["sport"], return_counts=True)
    assert set(counts) == {segments}, "all of a connection's segments, or none"
    assert connections / 8 < len(taken) < connections / 2


def test_one_event_in_so_many_is_taken(lab: Lab, port: int) -> None:
    rule = Rule("sampled", Action(sample_rate=3, sample_by_event=True), port=((port, port),))
    with Capture(HookSettings(hooks=ALLOWED, rules=tables([rule], DROP))) as capture:
        for _ in range(9):
            exchange(lab, port)
        rows = sent_by(capture, port)
    assert set(rows["s"]["sample_rate"]) == {3}
    assert 9 * EXCHANGES / 6 < len(rows) < 9 * EXCHANGES / 1.5


def test_a_stream_can_be_kept_by_itself(lab: Lab, port: int) -> None:
    rule = Rule("retransmits", Action(transmit=False), port=((port, port),))
    with Capture(HookSettings(hooks=ALLOWED, rules=tables([rule], DROP))) as capture:
        exchange(lab, port)
        assert capture.hooks.counters(TRANSMITS).passed == 0
        assert capture.hooks.counters(RETRANSMITS).passed == 0
        exchange(lab, port)


def test_reloads_lose_no_segment_and_take_none_twice(lab: Lab, port: int) -> None:
    def generation(number: int) -> Tables:
        return tables([Rule(str(i), DROP, uid=(1 << 20 | i,)) for i in range(number % 7)] + [only_port(port)], DROP)

    done = threading.Event()
    versions = [1]
    with Capture(HookSettings(hooks=ALLOWED, rules=generation(0))) as capture:

        def reload(hooks: Hooks) -> None:
            while not done.is_set():
                versions.append(hooks.put_rules(generation(len(versions))))

        thread = threading.Thread(target=reload, args=(capture.hooks,))
        with Pair(lab.client, lab.client, "127.0.0.1", port) as pair:
            pair.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread.start()
            pair.exchange(1009, 7)
            while len(versions) < 51:
                pair.exchange(101, 7)
            done.set()
            thread.join()
        rows = sent_by(capture, port)
    sequence = rows["s"]["seq"].astype(np.int64)
    assert (np.diff(sequence) % (1 << 32) == 7).all(), "each segment once, none missing"
    assert set(rows["s"]["rules_version"]) <= set(versions)
    assert len(set(rows["s"]["rules_version"])) > 10
