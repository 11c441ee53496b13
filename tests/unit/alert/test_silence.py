"""Silent hosts: by the heartbeat's own interval, alerted on once, and not after a clean stop."""

import math

import pytest

from producer.alert import silence
from producer.alert.engine import Engine
from producer.alert.model import Alert, Counts
from producer.alert.silence import Hosts
from producer.consume.decode import Decoder
from producer.events import HEARTBEATS
from producer.health.heartbeat import HeartbeatEncoder
from tests.support.statuses import status

SECOND_NS = 1_000_000_000


def beat(host: str = "web-1", state: str = "ok", interval_s: float = 10.0) -> dict[str, object]:
    return {"host": host, "state": state, "interval_s": interval_s}


def hear(hosts: Hosts, second: float, heartbeat: dict[str, object] | None = None, read: float | None = None) -> None:
    now = second if read is None else read
    hosts.heard(heartbeat or beat(), hosts.next, int(second * SECOND_NS), int(now * SECOND_NS))


def look(hosts: Hosts, second: float) -> list[tuple[str, bool, float]]:
    return [(each.group, each.firing, each.value) for each in hosts.changes(int(second * SECOND_NS))]


def silent_since(second: int) -> Alert:
    return Alert(
        "silent", "host", "web-1", True, "silence", 31, 30, 30, second * SECOND_NS, 30, 0, 0, second * SECOND_NS
    )


def test_a_host_is_silent_after_three_of_its_own_intervals_and_alerted_on_once() -> None:
    hosts = Hosts(3, [])
    hear(hosts, 100)
    hear(hosts, 100, beat("web-2", interval_s=60))
    assert look(hosts, 129) == []
    assert look(hosts, 130) == [("web-1", True, 30)]
    assert look(hosts, 140) == []
    assert [each.group for each in hosts.firing] == ["web-1"]


def test_time_is_up_to_when_heartbeats_were_read() -> None:
    hosts = Hosts(3, [])
    hear(hosts, 100)
    assert look(hosts, 0) == []


def test_a_clock_that_is_set_back_delays_no_silence() -> None:
    hosts = Hosts(3, [])
    hear(hosts, 10_000)
    assert look(hosts, 10_001) == []
    assert look(hosts, 2_802) == []
    hear(hosts, 2_803, beat("web-2"))
    assert [look(hosts, second) for second in range(2_803, 2_832)] == [[]] * 29
    assert look(hosts, 2_832) == [("web-1", True, 0)]
    assert look(hosts, 2_833) == [("web-2", True, 30)]


def test_a_host_that_is_heard_again_resolves_once_and_can_go_silent_again() -> None:
    hosts = Hosts(3, [])
    hear(hosts, 100)
    look(hosts, 131)
    hear(hosts, 132)
    hear(hosts, 133)
    assert look(hosts, 134) == [("web-1", False, 0)]
    assert [look(hosts, second) for second in range(135, 163)] == [[]] * 28
    assert look(hosts, 163) == [("web-1", True, 30)]


def test_a_host_that_stopped_as_it_should_is_not_silent_and_ends_its_alert() -> None:
    hosts = Hosts(3, [])
    hear(hosts, 100)
    hear(hosts, 105, beat(state="stopped"))
    assert look(hosts, 1000) == []
    hosts = Hosts(3, [silent_since(100)])
    hear(hosts, 140, beat(state="stopped"))
    assert look(hosts, 1000) == [("web-1", False, 0)]
    assert look(hosts, 2000) == []


def test_a_takeover_hears_each_living_host_and_gives_it_time() -> None:
    hosts = Hosts(3, [])
    hosts.next = 7
    for second, host in ((100, "web-1"), (101, "web-2"), (110, "web-1")):
        hear(hosts, second, beat(host))
    assert (hosts.next, hosts.position) == (10, 8)
    look(hosts, 131)
    assert hosts.position == 9
    again = Hosts(3, [])
    again.next = 9
    hear(again, 110, read=500)
    assert look(again, 529) == []
    assert look(again, 530) == [("web-1", True, 420)]


def test_a_heartbeat_that_is_read_again_after_a_takeover_ends_no_alert() -> None:
    hosts = Hosts(3, [silent_since(100)])
    hear(hosts, 100, read=140)
    assert look(hosts, 141) == []
    hear(hosts, 99, read=150)  # a clock that was set back
    assert look(hosts, 151) == [("web-1", False, 0)]


def test_hosts_that_could_not_be_heard_while_kafka_was_away_are_not_silent() -> None:
    hosts = Hosts(3, [])
    for host in ("web-1", "web-2"):
        hear(hosts, 100, beat(host))
    look(hosts, 105)
    assert look(hosts, 400) == []
    hear(hosts, 401)
    assert [look(hosts, second) for second in range(402, 420)] == [[]] * 18
    assert look(hosts, 420) == [("web-2", True, 320)]


def test_a_silent_host_is_heard_again_although_no_more_hosts_can_be_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "MOST_HOSTS", 1)
    hosts = Hosts(3, [silent_since(100)])
    hear(hosts, 140)
    assert look(hosts, 141) == [("web-1", False, 0)]


@pytest.mark.parametrize("interval_s", [math.inf, math.nan])
def test_an_invalid_heartbeat_is_ignored(monkeypatch: pytest.MonkeyPatch, interval_s: float) -> None:
    monkeypatch.setattr("producer.health.heartbeat.INTERVAL_S", interval_s)
    _, value = HeartbeatEncoder(HEARTBEATS.fixed_schema_id).encode(status(), 100)
    counts = Counts()
    hosts = Hosts(3, [])
    hosts.next = 7
    engine = Engine([], [], 0, 0, Decoder(None), counts, hosts)
    assert engine.put_beats([value], [7], 0)
    assert (hosts.next, counts.undecodable) == (8, 1)
