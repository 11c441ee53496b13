"""`rebpf run` without brokers: the embedded one serves other processes, and none of it is in the events."""

import json
import shutil
import subprocess

import pytest

from tests.kafka import proc, topics
from tests.kafka.rebpf import DEADLINE_S, Run, command, wait_until
from tests.kafka.topics import TRANSMIT
from tests.kafka.traffic import Echo, Segment, exchange

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed (apt-get install kcat)"),
]

LISTED = ["--topic", TRANSMIT, "--from-beginning", "--json"]


def settled(bootstrap: str, ports: set[int]) -> list[topics.Event]:
    """Read the transmit topic once it has the last segments, those with FIN, of connections to all `ports`."""

    def look() -> list[topics.Event] | None:
        events = topics.read(bootstrap, TRANSMIT)
        ended = {event.record["sport"] for event in events if event.record["tcp_flags"] & 1}
        return events if ports <= ended else None

    events: list[topics.Event] = wait_until("the last segments are in the topic", look)
    return events


def test_kcat_and_tail_read_the_same_events(tmp_path):
    with Echo() as echo, Run(tmp_path, "--port", echo.port) as run:
        brokers = run.ready()
        sent = exchange(echo.port, 11)
        events = settled(brokers, {each.sport for each in sent})
        tail = subprocess.run(
            command("tail", "--state-dir", run.state_dir, "-n", len(events), *LISTED),
            capture_output=True, text=True, timeout=DEADLINE_S, check=True,
        )  # fmt: skip
        run.finish()

    shown = [json.loads(line) for line in tail.stdout.splitlines()]
    assert len(shown) == len(events) > 11 * 16
    told = [{"topic": TRANSMIT, "key": e.message.key.decode(), **e.record} for e in events]
    by_id = {(each["cpu"], each["cpu_seq"]): each for each in told}
    assert {(each["cpu"], each["cpu_seq"]) for each in shown} == by_id.keys()
    for each in shown:
        expected = by_id[each["cpu"], each["cpu_seq"]]
        del each["ts"], expected["ts"]  # a time here, text there; ts_ns is the same to the nanosecond
        assert each == expected


def test_tail_stops_after_so_many_events(tmp_path):
    with Echo() as echo, Run(tmp_path, "--port", echo.port) as run:
        run.ready()
        exchange(echo.port, 3)
        tail = subprocess.run(
            command("tail", "--state-dir", run.state_dir, "-n", 7, *LISTED),
            capture_output=True, text=True, timeout=DEADLINE_S, check=True,
        )  # fmt: skip
        run.finish()

    assert len([json.loads(line) for line in tail.stdout.splitlines()]) == 7


def test_neither_the_producers_nor_its_brokers_segments_are_events_and_its_readers_are(tmp_path):
    """Without any filter, while kcat reads."""
    with Echo() as echo, Run(tmp_path) as run:
        brokers = run.ready()
        port = int(brokers.rpartition(":")[2])
        sent = exchange(echo.port, 53)
        settled(brokers, {each.sport for each in sent})
        own = {each.local[1] for each in proc.connections(run.pid)}
        sent = exchange(echo.port, 53)
        events = settled(brokers, {each.sport for each in sent})
        balance = run.finish()

    assert port in own
    assert len(own) > 1, "the client's side is a socket of its own"
    assert not own & {event.record["sport"] for event in events}
    assert port in {event.record["dport"] for event in events}, "kcat's requests"
    assert balance[TRANSMIT]["passed"] == balance[TRANSMIT]["delivered"] >= len(events)


@pytest.mark.parametrize("way", ["options", "environment", "file"])
def test_address_and_port_filters_take_both_directions_and_nothing_else(tmp_path, way):
    with Echo() as one, Echo() as two, Echo() as other:
        ports = [one.port, two.port]
        env, config, arguments = {}, "", []
        if way == "options":
            arguments = ["--address", "::1", "--port", one.port, "--port", two.port]
        elif way == "environment":
            env = {"REBPF_ADDRESS": "::1", "REBPF_PORT": " ".join(map(str, ports))}
        else:
            config = f'[capture]\naddresses = ["::1"]\nports = {ports}'
        with Run(tmp_path, *arguments, env=env, config=config) as run:
            brokers = run.ready()
            sent = [each for port in (other.port, *ports) for each in exchange(port, 4)]
            wanted = {each[:4] for each in sent if each.saddr == "::1" and {each.sport, each.dport} & set(ports)}
            events = settled(brokers, {sport for _, sport, *_ in wanted})
            run.finish()

    assert len(wanted) == 2 * 4
    assert {Segment(*topics.segment(event))[:4] for event in events} == wanted
