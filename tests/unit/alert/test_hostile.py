"""No writer of a topic can stop, exhaust or stall a member: with real partitions, stages and decoder."""

import io
import json
import math
import struct
import tracemalloc
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import fastavro
import numpy as np
import pytest

from producer.alert import evaluate, last_alerts, silence, sums_topic
from producer.alert.commit import CommitStep, PartitionId
from producer.alert.evaluate import RETRANSMITS, Decider
from producer.alert.last_alerts import last_of
from producer.alert.model import Alert
from producer.alert.partitions import Committed, Counts, EventPartition, HeartbeatPartition, Partition, SumsPartition
from producer.alert.record import AlertEncoder
from producer.alert.windows import MOST_SEGS, Grouping, Outcome, SourceSums, Sums
from producer.config.load import AlertRule
from producer.consume.decode import Decoder
from producer.events import RETRANSMITS as STREAM
from producer.health.heartbeat import HeartbeatEncoder
from producer.schemas import ALERT_FILE, ALERT_ID, HEARTBEAT_FILE, HEARTBEAT_ID, load_schema
from tests.support.batches import add_events
from tests.support.records import event, message
from tests.support.statuses import status

SECOND_NS = 1_000_000_000
NOW_NS = 1_790_000_000 * SECOND_NS
RULE = AlertRule(name="many", by="host", measure="count", window_s=10, threshold=5, clear=2)
GROUPING = Grouping("host", 10 * SECOND_NS)
END_NS = NOW_NS - NOW_NS % GROUPING.width_ns + GROUPING.width_ns
"""Of the window that is open now."""
START = Committed(0)
ALERT = Alert("many", "host", "web-1", True, "count", 9.0, 5.0, 2.0, 10 * SECOND_NS, 10.0, 0, 9, 10 * SECOND_NS)


def decoder() -> Decoder:
    return Decoder(None, {HEARTBEAT_ID: load_schema(HEARTBEAT_FILE), ALERT_ID: load_schema(ALERT_FILE)})


def source(counts: Counts, committed: Committed = START, memory_bytes: int = 1 << 20) -> EventPartition:
    return EventPartition("events", RETRANSMITS, "events/0", [RULE], 5, committed, decoder(), counts, memory_bytes)


def sums(counts: Counts, committed: Committed = START, memory_bytes: int = 1 << 20) -> SumsPartition:
    return SumsPartition("sums", [RULE], ["events/0"], [], committed, counts, memory_bytes)


class Recorder:
    """A writer and a sink that encode what they are given."""

    def __init__(self) -> None:
        self.sent: list[Alert] = []
        self._encoder = AlertEncoder(ALERT_ID)

    def put(self, partition: int, value: bytes) -> None:
        assert sums_topic.read(value)
        assert len(value) < 1_000_000  # Kafka's limit by default

    def flush(self) -> None: ...

    def send(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            self._encoder.encode(alert, 0.0)
        self.sent += alerts

    def repeat(self, firing: Collection[Alert]) -> None: ...

    def close(self) -> None: ...


def run_step(partition: Partition) -> list[Alert]:
    recorder = Recorder()
    CommitStep(recorder, 3, [recorder], lambda assigned: [each.committed() for each in assigned.values()] and None).run(
        {PartitionId(partition.topic, 0): partition}
    )
    return recorder.sent


@pytest.mark.parametrize(
    "fields",
    [
        {"ts_ns": -1},
        {"ts_ns": -(1 << 63)},
        {"segs": -1},
        {"segs": -(1 << 31)},
        {"sample_rate": 0},
        {"sample_rate": -5},
        {"sample_rate": (1 << 63) - 1},
        {"host": "x" * 2049},
    ],
    ids=str,
)
def test_an_event_with_impossible_fields_is_counted_and_changes_nothing(fields: dict[str, Any]) -> None:
    counts = Counts()
    partition = source(counts)
    partition.put([message(STREAM, **{"ts_ns": NOW_NS, "segs": 1, "sample_rate": 1, **fields})], np.array([7]), NOW_NS)
    assert (counts.undecodable, partition.next, partition.sums.watermark_ns, partition.sums.position) == (1, 8, 0, 8)


def test_sums_of_segments_stay_within_an_alert() -> None:
    most = SourceSums([GROUPING], 0, 0)
    for number in range(3):
        add_events(most, [event(number, 1, segs=(1 << 31) - 1, sample_rate=(1 << 31) - 1)], number, NOW_NS)
    most.read_to_end(NOW_NS)
    (taken,) = most.take()
    assert taken.segs == {"web-1": MOST_SEGS}
    counts = Counts()
    partition = sums(counts)
    for offset, name in enumerate(("events/0", "events/1")):
        (_, value), *_ = sums_topic.sums_messages(RETRANSMITS, name, Sums(GROUPING, 0, {"web-1": MOST_SEGS}), 1)
        partition.put([value], np.array([offset]), NOW_NS)
    partition.put([sums_topic.watermark_message("events/0", GROUPING.width_ns)], np.array([2]), NOW_NS)
    (alert,) = run_step(partition)
    assert (alert.retransmitted_segs, counts.undecodable) == (MOST_SEGS, 0)


def test_a_flood_of_groups_and_ids_takes_bounded_memory_and_known_groups_are_still_counted() -> None:
    flooded = SourceSums([GROUPING], 0, 0, memory_bytes=20_000)
    outcomes = [
        outcome for n in range(1000) for outcome in add_events(flooded, [event(n << 12, 1, f"host-{n}")], n, NOW_NS)
    ]
    assert outcomes.count(Outcome.CROWDED) > 900
    assert flooded.ids_forgotten > 800
    assert add_events(flooded, [event(2000 << 12, 2, "host-0")], 2000, NOW_NS) == [Outcome.COUNTED]
    flooded.read_to_end(NOW_NS)
    (taken,) = flooded.take()
    assert taken.segs["host-0"] == 2
    assert add_events(flooded, [event(3000, NOW_NS // SECOND_NS, "other")], 3000, NOW_NS) == [Outcome.COUNTED]


def test_a_flood_of_windows_takes_bounded_memory() -> None:
    flooded = SourceSums([GROUPING], 3600 * SECOND_NS, 0, memory_bytes=20_000)
    outcomes = add_events(flooded, [event(n, n * 10) for n in range(1, 500)], 1, 4000 * SECOND_NS)
    assert outcomes.count(Outcome.CROWDED) > 300


def test_names_that_are_long_make_no_message_that_kafka_refuses() -> None:
    counts = Counts()
    partition = source(counts, memory_bytes=1 << 24)
    for number in range(600):
        host = f"{number}\u1234" + "\u1234" * 1900
        value = message(STREAM, ts_ns=NOW_NS, cpu_seq=number, host=host, segs=1, sample_rate=1)
        partition.put([value], np.array([number]), NOW_NS)
    partition.until = (600, NOW_NS + 100 * SECOND_NS)
    run_step(partition)
    assert (counts.read, counts.undecodable, partition.sums.position) == (600, 0, 600)


def sums_json(**fields: Any) -> bytes:
    message = {"part": "events/0", "stream": RETRANSMITS, "by": "host", "width_ns": 10 * SECOND_NS}
    return json.dumps({**message, "start_ns": NOW_NS - NOW_NS % (10 * SECOND_NS), "segs": {"a": 9}, **fields}).encode()


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"null",
        b'"watermark_ns"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff",
        b'{"part": 1, "watermark_ns": 5}',
        *(b'{"part": "events/0", "watermark_ns": %s}' % each for each in (b"NaN", b"1e400", b'"5"', b"null", b"true")),
        b'{"part": "events/0", "watermark_ns": -1}',
        b'{"part": "events/0", "watermark_ns": %s}' % (b"9" * 30),
        b'{"part": "events/0", "watermark_ns": %s}' % (b"9" * 5000),
        sums_json(segs={"a": math.nan}),
        sums_json(segs={"a": "9"}),
        sums_json(segs={"a": -9}),
        sums_json(segs={"a": 1 << 63}),
        sums_json(segs=["a"]),
        sums_json(segs={"\ud800": 9}),
        sums_json(segs={"a" * 2049: 9}),
        sums_json(by=["host"]),
        sums_json(width_ns=None),
        sums_json(start_ns="5"),
        sums_json(start_ns=NOW_NS + 7200 * SECOND_NS),
        sums_json(stream=None),
        b'{"part": "events/0", "by": "host"}',
        b" " * (1 << 20) + b"{}",
    ],
    ids=lambda value: repr(value)[:50],
)
def test_a_message_of_sums_that_none_of_us_wrote_is_counted_and_passed_over(value: bytes | None) -> None:
    counts = Counts()
    partition = sums(counts)
    partition.put([value], np.array([7]), NOW_NS)
    assert (counts.undecodable, partition.next) == (1, 8)
    partition.put([sums_json()], np.array([8]), NOW_NS)
    partition.put([sums_topic.watermark_message("events/0", END_NS)], np.array([9]), END_NS)
    assert [alert.group for alert in run_step(partition)] == ["a"]


def test_a_watermark_of_the_future_decides_no_window_to_come() -> None:
    counts = Counts()
    partition = sums(counts)
    partition.put([sums_topic.watermark_message("events/0", MOST_SEGS)], np.array([0]), NOW_NS)
    assert run_step(partition) == []
    assert partition.committed().facts()["decided_ns"] == NOW_NS
    later = NOW_NS + 30 * SECOND_NS
    partition.put([sums_json(start_ns=later - later % GROUPING.width_ns - GROUPING.width_ns)], np.array([1]), later)
    partition.put([sums_topic.watermark_message("events/0", later)], np.array([2]), later)
    assert [alert.group for alert in run_step(partition)] == ["a"]


@pytest.mark.parametrize("fact", ['"5"', "null", "-1", "1e9", "NaN", "true", "[]", str(1 << 63)])
def test_what_stands_beside_an_offset_is_believed_where_it_is_a_time_that_was(fact: str) -> None:
    metadata = f'{{"watermark_ns": {fact}, "decided_ns": {fact}, "next": {fact}}}'
    assert Committed(7, metadata).facts() == {}
    source(Counts(), Committed(7, metadata))
    sums(Counts(), Committed(7, metadata))


def test_a_time_beside_an_offset_is_at_most_now() -> None:
    assert Committed(7, f'{{"watermark_ns": {1 << 62}, "next": 9}}', NOW_NS).facts() == {
        "watermark_ns": NOW_NS,
        "next": 9,
    }
    assert Committed(7, "[" * 4096).facts() == {}


def test_a_flood_of_sums_takes_bounded_memory_and_is_counted() -> None:
    counts = Counts()
    partition = sums(counts, memory_bytes=20_000)
    partition.put([sums_json(segs={f"host-{n}": 9 for n in range(1000)})], np.array([0]), NOW_NS)
    for number in range(1000):
        partition.put([sums_json(part=f"events/{number}", segs={"a": 9})], np.array([number + 1]), NOW_NS)
    assert counts.crowded > 1800
    assert counts.undecodable == 0


def test_a_flood_of_firing_groups_is_alerted_on_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "MOST_FIRING", 10)
    counts = Counts()
    partition = sums(counts)
    for number in range(100):
        partition.put([sums_json(segs={f"host-{number:02}": 9})], np.array([number]), NOW_NS)
    partition.put([sums_topic.watermark_message("events/0", END_NS)], np.array([100]), END_NS)
    assert len(run_step(partition)) == len(partition.firing) == 10
    assert counts.crowded == 90


def test_many_windows_are_decided_in_one_pass_over_them() -> None:
    decider = Decider([RULE], ["events/0"], [], 0)
    for number in range(20_000):
        decider.add(RETRANSMITS, "events/0", Sums(GROUPING, number * GROUPING.width_ns, {"a": 1}), number)
    decider.advance("events/0", 20_000 * GROUPING.width_ns, 20_000)
    assert decider.decide() == []
    assert decider.position == 20_001


def beat(**fields: Any) -> bytes:
    _, value = HeartbeatEncoder(HEARTBEAT_ID).encode(status(), 100)
    schema = fastavro.parse_schema(load_schema(HEARTBEAT_FILE))
    record: Any = fastavro.schemaless_reader(io.BytesIO(value[5:]), schema, None)
    buffer = io.BytesIO()
    buffer.write(struct.pack(">bI", 0, HEARTBEAT_ID))
    fastavro.schemaless_writer(buffer, schema, {**record, **fields})
    return buffer.getvalue()


@pytest.mark.parametrize("interval_s", [0.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan])
def test_a_heartbeat_with_an_impossible_interval_makes_no_host_silent(interval_s: float) -> None:
    counts = Counts()
    partition = HeartbeatPartition("hosts", 3, [], Committed(0), decoder(), counts)
    partition.put([beat(interval_s=interval_s)], np.array([0]), NOW_NS)
    partition.until = (1, 2 * NOW_NS)
    assert (run_step(partition), counts.undecodable) == ([], 1)


@pytest.mark.parametrize("ts", [-62_135_596_800_000, 253_402_300_799_999])
def test_a_heartbeat_of_any_time_makes_an_alert_that_can_be_written_or_none(ts: int) -> None:
    partition = HeartbeatPartition("hosts", 3, [], Committed(0), decoder(), Counts())
    partition.put([beat(ts=ts)], np.array([0]), NOW_NS)
    partition.until = (1, 2 * NOW_NS)
    run_step(partition)


def test_a_flood_of_hosts_takes_bounded_memory_and_known_hosts_are_still_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "MOST_HOSTS", 10)
    counts = Counts()
    partition = HeartbeatPartition("hosts", 3, [], Committed(0), decoder(), counts)
    for number in range(100):
        partition.put([beat(host=f"host-{number:02}")], np.array([number]), NOW_NS)
    assert counts.crowded == 90
    partition.put([beat(host="host-00", state="stopped")], np.array([100]), NOW_NS)
    partition.until = (101, NOW_NS + 1000 * SECOND_NS)
    assert [alert.group for alert in run_step(partition)] == [f"host-{number:02}" for number in range(1, 10)]


def encoded(alert: Alert, key: bytes | None = None) -> tuple[bytes, bytes]:
    own, value = AlertEncoder(ALERT_ID).encode(alert, 0.0)
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
        (b"many/web-1", b""),
        (b"many/web-1", b"\0\0\0\0\x04"),
        (b"many/web-1", beat()),
    ],
    ids=str,
)
def test_a_foreign_alert_is_skipped_and_logged_once(key: bytes, value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    other = replace(ALERT, group="web-2")
    assert last_of([[(key, value)], [(key, value), encoded(other)]], "alerts", decoder(), NOW_NS) == [other]
    (record,) = caplog.records
    assert f"messages=2 of topic=alerts: key={key[:200]!r}: " in record.getMessage()
    assert len(record.getMessage()) < 500


def test_the_oldest_of_too_many_alerts_are_forgotten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(last_alerts, "MOST_ALERTS", 10)
    alerts = [replace(ALERT, group=f"web-{number}") for number in range(25)]
    found = last_of([list(map(encoded, alerts)), [(b"many/web-24", None)]], "alerts", decoder(), NOW_NS)
    assert [alert.group for alert in found] == [f"web-{number}" for number in range(15, 24)]
    assert "forgot the oldest 15" in caplog.text


@pytest.mark.parametrize("chosen", ["sources", "windows", "wide names"])
def test_whatever_a_writer_of_sums_chooses_takes_bounded_memory(chosen: str) -> None:
    decider = Decider([RULE], ["events/0"], [], 0, memory_bytes=1 << 20)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20_000):
            source = f"{number}/" + "x" * 500 if chosen == "sources" else "events/0"
            start_ns = GROUPING.width_ns * (number + 1 if chosen == "windows" else 7)
            segs = {f"{number}" + "\N{PILE OF POO}" * 500: 1} if chosen == "wide names" else {}
            decider.add(RETRANSMITS, source, Sums(GROUPING, start_ns, segs), number)
        assert tracemalloc.get_traced_memory()[0] - before < 3 << 19
    finally:
        tracemalloc.stop()
