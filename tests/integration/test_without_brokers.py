"""`rebpf run` without brokers: other processes can use the test broker, whose own traffic is not captured."""

import json
import shutil
import subprocess
from collections import Counter
from typing import Any

import pytest

from tests.support import procfs, topics
from tests.support.rebpf import DEADLINE_S, Run, command, wait_until
from tests.support.topics import TRANSMIT
from tests.support.traffic import LOOPBACK, Echo, exchange
from tests.support.wire import Segment, captured

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed (apt-get install kcat)"),
]

LISTED = ["--topic", TRANSMIT, "--from-beginning", "--json"]


def complete(bootstrap: str, segments: "Counter[Segment]") -> list[topics.Event]:
    """Read the transmit topic once it has as many events as captured segments."""

    def look() -> list[topics.Event] | None:
        events = topics.read(bootstrap, TRANSMIT)
        return events if len(events) >= segments.total() else None

    events: list[topics.Event] = wait_until("all segments are in the topic", look)
    return events


def test_kcat_and_tail_read_the_same_events(tmp_path):
    with Echo() as echo, Run(tmp_path, "--port", echo.port) as run:
        brokers = run.ready()
        with captured(echo.port) as segments:
            exchange(echo.port, 11)
        events = complete(brokers, segments)
        tail = subprocess.run(
            command("tail", "--state-dir", run.state_dir, "-n", len(events), *LISTED),
            capture_output=True, text=True, timeout=DEADLINE_S, check=True,
        )  # fmt: skip
        run.finish()

    assert Counter(map(topics.segment, events)) == segments
    shown = {id_of(each): each for each in map(json.loads, tail.stdout.splitlines())}
    told = {id_of(e.record): {"topic": TRANSMIT, "key": (e.message.key or b"").decode(), **e.record} for e in events}
    for each in (*shown.values(), *told.values()):
        del each["ts"]  # a time here, text there; ts_ns is the same to the nanosecond
    assert shown == told


def id_of(record: dict[str, Any]) -> tuple[int, int]:
    return record["cpu"], record["cpu_seq"]


def test_tail_stops_after_the_given_number_of_events(tmp_path):
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
    """Without a filter, while kcat reads."""
    with Run(tmp_path) as run:
        brokers = run.ready()
        port = int(brokers.rpartition(":")[2])

        def readers() -> bool:
            return any(event.record["dport"] == port for event in topics.read(brokers, TRANSMIT))

        wait_until("events of kcat's own segments", readers)
        own = {each.local[1] for each in procfs.connections(run.pid)}
        events = topics.read(brokers, TRANSMIT)
        balance = run.finish()[TRANSMIT]

    assert port in own
    assert len(own) > 1, "the client's side is a socket of its own"
    assert not own & {event.record["sport"] for event in events}
    assert port in {event.record["dport"] for event in events}
    assert balance["passed"] == balance["delivered"] + sum(balance["lost"].values())


@pytest.mark.parametrize("way", ["options", "environment", "file"])
def test_address_and_port_filters_take_both_directions_and_nothing_else(tmp_path, way):
    with Echo() as one, Echo() as two, Echo() as other:
        ports = [one.port, two.port]
        env, config, arguments = {}, "", []
        if way == "options":
            arguments = ["--address", LOOPBACK[1], "--port", one.port, "--port", two.port]
        elif way == "environment":
            env = {"REBPF_ADDRESS": LOOPBACK[1], "REBPF_PORT": " ".join(map(str, ports))}
        else:
            config = f'[capture]\naddresses = ["{LOOPBACK[1]}"]\nports = {ports}'
        with Run(tmp_path, *arguments, env=env, config=config) as run:
            brokers = run.ready()
            exchange(other.port, 4)
            with captured(one.port) as to_one, captured(two.port) as to_two:
                exchange(one.port, 4)
                exchange(two.port, 4)
            wanted = Counter({each: count for each, count in (to_one + to_two).items() if each.saddr == LOOPBACK[1]})
            events = complete(brokers, wanted)
            balance = run.finish()

    assert wanted.total() > 2 * 2 * 16
    assert Counter(map(topics.segment, events)) == wanted
    assert balance[TRANSMIT]["passed"] == wanted.total()
