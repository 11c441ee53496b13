"""No writer of a topic can stop, exhaust or stall a member: with the real engine and decoder."""

import io
import math
import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import fastavro
import pytest

from producer.alert import evaluate, last_alerts, silence
from producer.alert.connections import Fleet
from producer.alert.engine import FLOW_FIELDS, Engine
from producer.alert.last_alerts import last_of
from producer.alert.model import Alert, Counts
from producer.alert.reading import _decided_ns as decided_ns
from producer.alert.record import AlertEncoder
from producer.alert.silence import Hosts
from producer.alert.windows import MOST_SEGS, Room
from producer.config.alerts import AlertRule
from producer.consume.decode import Decoder
from producer.events import ALERTS, FLOWS, HEARTBEATS, RETRANSMITS
from producer.health.heartbeat import HeartbeatEncoder
from producer.schemas import load_schema
from tests.support.flows import Flow, values
from tests.support.records import message
from tests.support.statuses import status

SECOND_NS = 1_000_000_000
NOW_NS = 1_790_000_000 * SECOND_NS
MANY = AlertRule(name="many", measure="count", window_s=10, threshold=5, clear=2)
LOSS = AlertRule(name="loss", window_s=10, threshold=0.1, clear=0.1)
ALERT = Alert("many", "host", "web-1", True, "count", 9.0, 5.0, 2.0, 10 * SECOND_NS, 10.0, 0, 9, 10 * SECOND_NS)


def engine(counts: Counts, hosts: Hosts | None = None, room: Room | None = None) -> Engine:
    return Engine([MANY, LOSS], [], NOW_NS - 100 * SECOND_NS, 0, Decoder(None), counts, hosts, room)


def event(**fields: Any) -> bytes:
    return message(
        RETRANSMITS, **{"ts_ns": NOW_NS, "cpu_seq": 1, "segs": 1, "sample_rate": 1, "cause": "rto", **fields}
    )


def flow(number: int, **fields: Any) -> Flow:
    at_ms = NOW_NS // 1_000_000
    return Flow("web-1", number, at_ms, at_ms - 1, **{"segs": 10, "causes": {"rto": 5}, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"ts_ns": -1},
        {"ts_ns": -(1 << 63)},
        {"segs": -1},
        {"segs": -(1 << 31)},
        {"sport": -1},
        {"dport": 1 << 16},
        {"sample_rate": 0},
        {"sample_rate": -5},
        {"sample_rate": (1 << 63) - 1},
        {"host": "x" * 2049},
    ],
    ids=str,
)
def test_an_event_with_impossible_fields_is_counted_and_changes_nothing(fields: dict[str, Any]) -> None:
    counts = Counts()
    made = engine(counts)
    assert made.put(RETRANSMITS, [event(**fields)], NOW_NS)
    assert (counts.undecodable, counts.read) == (1, 0)
    assert made.decide(NOW_NS + 20 * SECOND_NS) == []


@pytest.mark.parametrize(
    "fields",
    [{"segs_out": -1}, {"retrans_rto": 1 << 40}, {"srtt_us": -5}, {"sample_rate": 1 << 40}, {"ts_ns": -1}],
    ids=str,
)
def test_a_flow_with_impossible_fields_is_counted_and_changes_nothing(fields: dict[str, Any]) -> None:
    counts = Counts()
    made = engine(counts)
    usual = {"ts_ns": NOW_NS, "start_ns": NOW_NS - 1, "sample_rate": 1, "reason": "interval"}
    counters = {field["name"]: 7 for field in load_schema(FLOWS.schema_file)["fields"] if "retrans" in field["name"]}
    made.put(FLOWS, [message(FLOWS, **{**usual, **counters, "segs_out": 9, "srtt_us": 5, **fields})], NOW_NS)
    assert (counts.undecodable, counts.read) == (1, 0)
    assert made.decide(NOW_NS + 20 * SECOND_NS) == []


def test_sums_of_segments_stay_within_an_alert() -> None:
    made = engine(Counts())
    most = {"segs": (1 << 31) - 1, "sample_rate": (1 << 31) - 1}
    made.put(RETRANSMITS, [event(cpu_seq=number, **most) for number in range(1, 4)], NOW_NS)
    (alert,) = made.decide(NOW_NS + 20 * SECOND_NS)[:1]
    assert alert.retransmitted_segs == MOST_SEGS
    AlertEncoder(ALERTS.fixed_schema_id).encode(alert, 0.0)


def test_a_record_from_the_future_is_not_counted() -> None:
    counts = Counts()
    made = engine(counts)
    made.put(RETRANSMITS, [event(ts_ns=NOW_NS + 7200 * SECOND_NS, segs=100)], NOW_NS)
    assert (counts.ahead, made.decide(NOW_NS + 9000 * SECOND_NS)) == (1, [])


def test_a_flood_of_groups_is_bounded_and_known_groups_are_still_counted() -> None:
    counts = Counts()
    made = engine(counts, room=Room(group_count=10, flows=5))
    for number in range(100):
        made.put(RETRANSMITS, [event(cpu_seq=number + 1, host=f"host-{number:02}", segs=9)], NOW_NS)
    made.put(RETRANSMITS, [event(cpu_seq=200, host="host-00", segs=9)], NOW_NS)
    assert counts.crowded == 90
    alerts = made.decide(NOW_NS + 10 * SECOND_NS)
    assert [(alert.group, alert.value) for alert in alerts] == [
        (f"host-{number:02}", 18 if number == 0 else 9) for number in range(10)
    ]
    assert sum(bool(alert.flows) for alert in alerts) == 5
    made.put(RETRANSMITS, [event(cpu_seq=201, host="other", ts_ns=NOW_NS + 15 * SECOND_NS, segs=9)], NOW_NS)
    assert "other" in [alert.group for alert in made.decide(NOW_NS + 20 * SECOND_NS)]


def test_decided_windows_give_all_their_room_back() -> None:
    """Of groups, of round-trip times, and of more flows than a group keeps."""
    room, slow = Room(), AlertRule(name="slow", measure="srtt", window_s=10, threshold=0.1, clear=0.1)
    whole = dict(vars(room))
    made = Engine([MANY, slow], [], NOW_NS - 100 * SECOND_NS, 0, Decoder(None), Counts(), room=room)
    made.put(FLOWS, list(values([flow(number, sport=number, srtt_us=200_000) for number in range(1, 200)])), NOW_NS)
    made.put(RETRANSMITS, [event(cpu_seq=number, sport=number, segs=9) for number in range(1, 200)], NOW_NS)
    taken = {name: before - vars(room)[name] for name, before in whole.items()}
    assert (taken["groups"], taken["samples"]) == (2, 199)
    assert 0 < taken["flows"] < 2 * 199, "some were dropped"
    assert len(made.decide(NOW_NS + 10 * SECOND_NS)) == 2
    assert vars(room) == whole


def test_alerts_that_are_resolved_are_forgotten() -> None:
    made = engine(Counts())
    for number in range(1, 51):
        at_ns = NOW_NS + 10 * number * SECOND_NS
        made.put(RETRANSMITS, [event(cpu_seq=number, host=f"host-{number}", ts_ns=at_ns, segs=9)], at_ns)
        made.decide(at_ns + 10 * SECOND_NS)
    assert max(len(evaluator._last) for _, evaluator in made._all()) <= 3


def test_a_flood_of_connections_is_bounded_and_none_counts_from_its_beginning_again() -> None:
    counts = Counts()
    connections = Fleet(0, counts, most=64)
    for number in range(0, 400, 4):
        at_ms = NOW_NS // 1_000_000 + number
        batch = [replace(flow(each), at_ms=at_ms, start_ms=at_ms - 1) for each in range(number, number + 4)]
        records, _ = Decoder(None).columns(list(values(batch)), FLOW_FIELDS)
        assert connections.add(records).counts[:, 0].tolist() == [10] * 4
        assert len(connections) <= 64
    assert counts.forgotten >= 300
    records, _ = Decoder(None).columns(list(values([replace(flow(0), at_ms=NOW_NS // 1_000_000 + 900)])), FLOW_FIELDS)
    assert connections.add(records).counts[:, 0].tolist() == [0]


def test_a_flood_of_firing_groups_is_alerted_on_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "MOST_FIRING", 10)
    counts = Counts()
    made = engine(counts)
    made.put(RETRANSMITS, [event(cpu_seq=n + 1, host=f"host-{n:02}", segs=9) for n in range(100)], NOW_NS)
    assert len(made.decide(NOW_NS + 10 * SECOND_NS)) == len(made.firing) == 10
    assert counts.crowded == 90


@pytest.mark.parametrize("fact", ['"5"', "null", "-1", "1e9", "NaN", "true", "[]"])
def test_offsets_of_another_program_are_not_taken_for_a_time(fact: str) -> None:
    assert decided_ns(f'{{"decided_ns": {fact}}}', NOW_NS) == 0


@pytest.mark.parametrize("metadata", ["5", "null", "[]", "not JSON", "[" * 4096, None])
def test_metadata_that_is_not_ours_is_no_time(metadata: str | None) -> None:
    assert decided_ns(metadata, NOW_NS) == 0


def test_a_committed_time_is_at_most_now() -> None:
    assert decided_ns(f'{{"decided_ns": {1 << 70}}}', NOW_NS) == NOW_NS


def beat(**fields: Any) -> bytes:
    _, value = HeartbeatEncoder(HEARTBEATS.fixed_schema_id).encode(status(), 100)
    schema = fastavro.parse_schema(load_schema(HEARTBEATS.schema_file))
    record: Any = fastavro.schemaless_reader(io.BytesIO(value[5:]), schema, None)
    buffer = io.BytesIO()
    buffer.write(struct.pack(">bI", 0, HEARTBEATS.fixed_schema_id))
    fastavro.schemaless_writer(buffer, schema, {**record, **fields})
    return buffer.getvalue()


def silent(counts: Counts, *heartbeats: bytes, after_s: float = 1000) -> list[str]:
    """Return who is silent after heartbeats."""
    made = engine(counts, Hosts(3, []))
    made.put_beats(list(heartbeats), list(range(len(heartbeats))), NOW_NS)
    alerts = made.decide(NOW_NS, NOW_NS + round(after_s * SECOND_NS))
    for alert in alerts:
        AlertEncoder(ALERTS.fixed_schema_id).encode(alert, 0.0)
    return [alert.group for alert in alerts]


@pytest.mark.parametrize("interval_s", [0.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan])
def test_a_heartbeat_with_an_impossible_interval_makes_no_host_silent(interval_s: float) -> None:
    counts = Counts()
    assert (silent(counts, beat(interval_s=interval_s)), counts.undecodable) == ([], 1)


@pytest.mark.parametrize("ts", [-62_135_596_800_000, 253_402_300_799_999])
def test_a_heartbeat_of_any_time_makes_an_alert_that_can_be_written_or_none(ts: int) -> None:
    silent(Counts(), beat(ts=ts))


def test_a_flood_of_hosts_takes_bounded_memory_and_known_hosts_are_still_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "MOST_HOSTS", 10)
    counts = Counts()
    flood = [beat(host=f"host-{number:02}") for number in range(100)]
    found = silent(counts, *flood, beat(host="host-00", state="stopped"))
    assert counts.crowded == 90
    assert found == [f"host-{number:02}" for number in range(1, 10)]


def encoded(alert: Alert, key: bytes | None = None) -> tuple[bytes, bytes]:
    own, value = AlertEncoder(ALERTS.fixed_schema_id).encode(alert, 0.0)
    return own if key is None else key, value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        encoded(ALERT, b""),
        encoded(ALERT, b"x" * 1_000_000),
        encoded(replace(ALERT, value=math.nan)),
        encoded(replace(ALERT, threshold=math.inf)),
        encoded(replace(ALERT, window_start_ns=-1)),
        encoded(replace(ALERT, since_ns=-(1 << 63))),
        encoded(replace(ALERT, window_start_ns=MOST_SEGS)),
        encoded(replace(ALERT, segs=-1)),
        encoded(replace(ALERT, by="__name__")),
        encoded(replace(ALERT, measure="other")),
        encoded(replace(ALERT, labels="[]")),
        encoded(replace(ALERT, labels='{"team": 1}')),
        encoded(replace(ALERT, annotations="none")),
        (b"many/web-1", b""),
        (b"many/web-1", b"\0\0\0\0\x04"),
        (b"many/web-1", beat()),
    ],
    ids=str,
)
def test_a_foreign_alert_is_skipped_and_logged_once(key: bytes, value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    other = replace(ALERT, group="web-2")
    assert last_of([[(key, value)], [(key, value), encoded(other)]], "alerts", Decoder(None), NOW_NS) == [other]
    (record,) = caplog.records
    assert f"messages=2 of topic=alerts: key={key[:200]!r}: " in record.getMessage()
    assert len(record.getMessage()) < 500


def test_the_oldest_of_too_many_alerts_are_forgotten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(last_alerts, "MOST_ALERTS", 10)
    alerts = [replace(ALERT, group=f"web-{number}") for number in range(25)]
    found = last_of([list(map(encoded, alerts)), [(b"many/web-24", None)]], "alerts", Decoder(None), NOW_NS)
    assert [alert.group for alert in found] == [f"web-{number}" for number in range(15, 24)]
    assert "forgot the oldest 15" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["groups", "windows", "wide names"])
def test_whatever_a_writer_chooses_takes_bounded_memory(chosen: str) -> None:
    room = Room(group_count=500, flows=500)
    made = Engine([MANY], [], 0, 0, Decoder(None), Counts(), room=room)
    suffix = "\N{PILE OF POO}" * (1000 if chosen == "wide names" else 1)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(2000):
            ts_ns = NOW_NS - (number * 10 * SECOND_NS if chosen == "windows" else 0)
            made.put(RETRANSMITS, [event(host=f"{number}{suffix}", ts_ns=ts_ns)], NOW_NS)
        assert tracemalloc.get_traced_memory()[0] - before < 3 << 20
        assert min(room.groups, room.flows) >= 0
    finally:
        tracemalloc.stop()
