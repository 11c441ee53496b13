"""`rebpf verify` on a real Kafka: it reports exactly the missing, duplicate and late numbers that were produced."""

import ipaddress
import json
import random
import re
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient

from producer.encode.batch import BatchEncoder
from producer.events import RETRANSMITS, STREAMS, TRANSMITS, Batch, EncodedBatch, SchemaId, Stream, common
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema
from tests.support.rebpf import Run, rebpf
from tests.support.servers.kafka import KafkaServer
from tests.support.traffic import Echo, exchange

pytestmark = pytest.mark.real_kafka

FLOWS = 31
PARTITIONS = 3
START_NS = 1_790_000_000_000_000_000
GENERATION = 1 << 32


class Given(NamedTuple):
    """An event's identity; its time increases with `tick`, in microseconds."""

    host: str
    boot_id: str
    cpu: int
    cpu_seq: int
    tick: int

    @property
    def flow(self) -> int:
        return self.cpu_seq % FLOWS


def encoded(stream: Stream, events: Sequence[Given], schema_id: int) -> Iterator[tuple[bytes, bytes]]:
    """Encode events as the agents of their hosts would; yield keys and values in the same order."""
    by_boot: dict[tuple[str, str], list[int]] = defaultdict(list)
    for at, each in enumerate(events):
        by_boot[each.host, each.boot_id].append(at)
    made: dict[int, tuple[bytes, bytes]] = {}
    for (host, boot_id), places in by_boot.items():
        rows = np.zeros(len(places), stream.dtype)
        local = np.frombuffer(ipaddress.IPv6Address("::ffff:10.0.0.1").packed, np.uint8)
        for row, at in zip(common(rows), places, strict=True):
            row["flow"]["saddr"] = row["flow"]["daddr"] = local
            row["flow"]["sport"], row["flow"]["dport"] = 40_000 + events[at].flow, 443
            row["cpu"], row["cpu_seq"], row["ts"] = (
                events[at].cpu,
                events[at].cpu_seq,
                events[at].tick * 1000,
            )
        host_fields = {"host": host, "boot_id": boot_id}
        encoder = BatchEncoder(
            stream, load_schema(stream.schema_file), SchemaId(schema_id), host_fields, CgroupPaths(None)
        )
        for at, message in zip(places, messages(encoder.encode(Batch(stream, rows), START_NS)), strict=True):
            made[at] = message
    return (made[at] for at in range(len(events)))


def messages(batch: EncodedBatch) -> Iterator[tuple[bytes, bytes]]:
    for i in range(len(batch)):
        key = batch.keys[batch.key_starts[i] :][: batch.key_lengths[i]]
        yield key.tobytes(), batch.payload[batch.starts[i] :][: batch.lengths[i]].tobytes()


class Topics:
    """The topics of events below a prefix, of PARTITIONS partitions each."""

    def __init__(self, kafka: KafkaServer, prefix: str) -> None:
        self.bootstrap = kafka.bootstrap
        self.prefix = prefix
        for stream in STREAMS:
            # The messages' timestamps are of one day, however long ago.
            kafka.create_topic(self.name(stream), PARTITIONS, settings={"retention.ms": "-1"})

    def name(self, stream: Stream) -> str:
        return self.prefix + stream.topic

    def put(self, stream: Stream, events: Sequence[Given], schema_id: int | None = None, timestamp_ms: int = 0) -> None:
        self.put_raw(stream, encoded(stream, events, schema_id or stream.fixed_schema_id), timestamp_ms)

    def put_raw(self, stream: Stream, pairs: Iterable[tuple[bytes, bytes]], timestamp_ms: int = 0) -> None:
        settings = {"bootstrap.servers": self.bootstrap, "partitioner": "murmur2_random", "enable.idempotence": True}
        producer = Producer({**settings, "linger.ms": 20})
        for key, value in pairs:
            producer.produce(self.name(stream), value, key, timestamp=timestamp_ms)
        assert producer.flush(60) == 0
        producer.close()

    def verify(self, *arguments: object, by_topics: bool = True) -> "subprocess.CompletedProcess[str]":
        chosen = [word for stream in STREAMS for word in ("--topic", self.name(stream))] if by_topics else []
        return rebpf("verify", "--brokers", self.bootstrap, *chosen, *arguments)

    def reports(self, *arguments: object) -> tuple[dict[str, Any], int]:
        """Return verify's JSON by stream name, and its exit code."""
        done = self.verify("--json", *arguments)
        (line,) = done.stdout.splitlines() or [done.stderr]
        report = json.loads(line)
        return {stream.name: report[self.name(stream)] for stream in STREAMS}, done.returncode


def run_of(host: str, boot_id: str, cpus: int, numbers: Iterable[int]) -> list[Given]:
    """Return events of several CPUs in turn, each with the same numbers."""
    return [Given(host, boot_id, cpu, number, number * cpus + cpu) for number in numbers for cpu in range(cpus)]


def counts(boot: dict[str, Any]) -> dict[str, Any]:
    """Return the counts above 0."""
    return {name: value for name, value in boot.items() if value and name not in ("first_ns", "last_ns", "boot_id")}


@pytest.fixture
def topics(kafka: KafkaServer, request: pytest.FixtureRequest) -> Topics:
    return Topics(kafka, re.sub(r"\W", "-", request.node.name) + ".")


def test_complete_topics_are_reported_so_and_nothing_is_left_behind(topics: Topics, tmp_path) -> None:
    events = [*run_of("web-1", "boot-a", 4, range(1, 5001)), *run_of("web-2", "boot-b", 2, range(1, 12))]
    for stream in STREAMS:
        topics.put(stream, events)
    config = tmp_path / "rebpf.toml"
    config.write_text(f'kafka.topic_prefix = "{topics.prefix}"\n')
    done = topics.verify("--config", config, by_topics=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 9
    for line, stream in zip(lines[2::3], STREAMS, strict=True):
        assert line == f"{topics.name(stream)} partitions=3 messages=20022 undecodable=0 complete"
    assert " host=web-1 boot=boot-a first=2026-09-21T14:13:20.000Z last=2026-09-21T14:13:20.020Z " in lines[0]
    groups = AdminClient({"bootstrap.servers": topics.bootstrap}).list_consumer_groups().result(30).valid
    assert not [group.group_id for group in groups if "verify" in group.group_id]


def test_a_transaction_that_is_left_open_hides_nothing(topics: Topics) -> None:
    topics.put(TRANSMITS, run_of("web-1", "boot-a", 1, range(1, 20)))
    somebody = Producer({"bootstrap.servers": topics.bootstrap, "transactional.id": topics.prefix})
    somebody.init_transactions(60)
    somebody.begin_transaction()
    for partition in range(PARTITIONS):
        somebody.produce(topics.name(TRANSMITS), b"open", partition=partition)
    somebody.flush(60)
    topics.put(TRANSMITS, run_of("web-1", "boot-a", 1, range(20, 101)))
    topics.put(RETRANSMITS, run_of("web-1", "boot-a", 1, range(1, 5)))
    reports, _ = topics.reports()
    somebody.abort_transaction(60)
    somebody.close()
    (boot,) = reports[TRANSMITS.name]["boots"]
    assert (boot["events"], boot["missing"], reports[TRANSMITS.name]["undecodable"]) == (100, 0, PARTITIONS)


def test_missing_duplicate_and_late_numbers_are_reported_exactly(topics: Topics) -> None:
    first = run_of("web-1", "boot-a", 3, [*range(1, 100), *range(107, 2000), *range(2001, 2100)])  # 7 and 1 lacking
    second = run_of("web-1", "boot-b", 2, [*range(1, 500), *range(3 * GENERATION + 5, 3 * GENERATION + 100)])
    other = run_of("web-2", "boot-c", 1, range(11, 700))
    # Resent after a crash: in order, late, and some of it twice.
    twice = [*first[1000:2000], *first[1500:1600]]
    # An event after the next one of its flow, in each of two flows.
    late = [500, 501]
    for at in late:
        other[at], other[at + FLOWS] = other[at + FLOWS], other[at]
    topics.put(TRANSMITS, [*first, *second, *twice, *other])
    topics.put_raw(TRANSMITS, [(b"k", b"not avro"), (b"k", b"\0\0\0\0\x09and no schema")])
    topics.put(RETRANSMITS, run_of("web-1", "boot-a", 2, [1, 2, 4]))

    reports, code = topics.reports()
    assert code == 65
    transmits = reports["transmit"]
    assert (transmits["messages"], transmits["undecodable"]) == (len([*first, *second, *twice, *other]) + 2, 2)
    assert [counts(boot) for boot in sorted(transmits["boots"], key=lambda boot: str(boot["boot_id"]))] == [
        {"host": "web-1", "events": len(first), "duplicates": len(twice), "gaps": 6, "missing": 3 * 8},
        {"host": "web-1", "events": len(second), "gaps": 2, "missing": 2 * 4, "restarts": 1},
        {"host": "web-2", "events": len(other), "out_of_order": 2, "first_numbers": {"0": 11}},
    ]
    (boot,) = reports["retransmit"]["boots"]
    assert counts(boot) == {"host": "web-1", "events": 6, "gaps": 2, "missing": 2}

    done = topics.verify()
    name = topics.name(TRANSMITS)
    assert done.returncode == 65
    assert done.stderr.splitlines()[-1] == (
        f"rebpf: {name}: missing 32, restarts 1, out_of_order 2, undecodable 2; {topics.name(RETRANSMITS)}: missing 2"
    )
    assert "first_numbers=0:11" in done.stdout

    alone, code = topics.reports("--host", "web-2")
    assert code == 65  # undecodable
    assert [boot["host"] for boot in alone["transmit"]["boots"]] == ["web-2"]
    assert alone["transmit"]["other_hosts"] == len([*first, *second, *twice])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_faults_of_many_hosts_are_those_that_a_count_by_hand_finds(topics: Topics, seed: int) -> None:
    chosen = random.Random(seed)
    whole = [
        each
        for host in range(5)
        for boot in range(3)
        for each in run_of(f"web-{host}", f"boot-{host}-{boot}", 4, range(1, 150))
    ]
    chosen.shuffle(whole)
    sent = [each for each in whole for _ in range(chosen.choices([0, 1, 2, 3], [2, 90, 6, 2])[0])]
    topics.put(TRANSMITS, sent)
    reports, code = topics.reports()
    assert code == 65
    assert reports["retransmit"]["messages"] == 0
    assert len(reports["transmit"]["boots"]) == 15
    for boot in reports["transmit"]["boots"]:
        here = [each for each in sent if each.boot_id == boot["boot_id"]]
        assert (boot["events"], boot["duplicates"]) == (len(set(here)), len(here) - len(set(here)))
        missing = gaps = 0
        for cpu in range(4):
            held = {each.cpu_seq for each in here if each.cpu == cpu}
            lacking = set(range(min(held), max(held))) - held
            missing += len(lacking)
            gaps += len([number for number in lacking if number - 1 not in lacking])
        assert (boot["missing"], boot["gaps"]) == (missing, gaps)
        latest: dict[int, int] = {}
        late = 0
        for each in dict.fromkeys(here):
            late += each.tick < latest.get(each.flow, 0)
            latest[each.flow] = max(each.tick, latest.get(each.flow, 0))
        assert boot["out_of_order"] == late


def test_events_deleted_by_retention_are_no_gap_and_later_missing_ones_are(topics: Topics) -> None:
    minute_ms, now_ms = 60_000, START_NS // 1_000_000
    old = run_of("web-1", "boot-a", 2, range(1, 1000))
    new = [each for each in run_of("web-1", "boot-a", 2, range(1000, 2000)) if each.cpu_seq != 1500]
    topics.put(TRANSMITS, old, timestamp_ms=now_ms)
    topics.put(TRANSMITS, new, timestamp_ms=now_ms + 3 * minute_ms)
    admin = AdminClient({"bootstrap.servers": topics.bootstrap})
    cut = TopicPartition(topics.name(TRANSMITS), 1, 100)
    admin.delete_records([cut])[cut].result(30)

    reports, code = topics.reports()
    assert code == 65
    (boot,) = reports["transmit"]["boots"]
    assert (boot["missing"], boot["gaps"], boot["events"]) == (2, 2, len([*old, *new]) - 100)
    assert boot["out_of_order"] == 0
    lacking_at_the_beginning = sum(number - 1 for number in boot["first_numbers"].values())
    assert boot["perhaps_deleted"] + lacking_at_the_beginning == 100

    reports, code = topics.reports("--since-offset", -10)
    assert code == 0
    assert reports["transmit"]["messages"] == 10 * PARTITIONS
    assert reports["transmit"]["boots"][0]["perhaps_deleted"] > 0


def test_the_schemas_ids_are_the_registry_s(topics: Topics, registry) -> None:
    with SchemaRegistryClient({"url": registry.url, "timeout": 10}) as client:
        for name in "abcd":  # so that the ids are not the fixed ones
            client.register_schema("other-value", Schema(json.dumps({"type": "record", "name": name, "fields": []})))
        for stream in STREAMS:
            schema = Schema(json.dumps(load_schema(stream.schema_file)))
            schema_id = client.register_schema(f"{topics.name(stream)}-value", schema)
            topics.put(stream, run_of("web-1", "boot-a", 2, range(1, 102)), schema_id)
    reports, code = topics.reports("--registry", registry.url)
    assert code == 0
    assert [(report["undecodable"], report["boots"][0]["events"]) for report in reports.values()] == [(0, 202)] * 3
    reports, code = topics.reports()
    assert code == 65
    assert [(report["undecodable"], report["boots"]) for report in reports.values()] == [(202, [])] * 3


def test_it_ends_where_the_topic_ended_while_others_go_on_writing(topics: Topics) -> None:
    topics.put(TRANSMITS, run_of("web-1", "boot-a", 1, range(1, 1000)))
    enough = threading.Event()

    def write() -> None:
        start = 1000
        while not enough.is_set():
            topics.put(TRANSMITS, run_of("web-1", "boot-a", 1, range(start, start + 10)))
            start += 10

    writer = threading.Thread(target=write)
    writer.start()
    try:
        reports, _ = topics.reports()
    finally:
        enough.set()
        writer.join()
    assert reports["transmit"]["messages"] >= 999
    assert reports["transmit"]["boots"][0]["duplicates"] == 0


def test_a_topic_that_does_not_exist_is_69(topics: Topics) -> None:
    done = topics.verify("--topic", "nowhere", by_topics=False)
    assert (done.returncode, done.stdout) == (69, "")
    assert "topic nowhere: " in done.stderr


@pytest.mark.root
def test_runs_that_stop_and_go_on_are_complete_and_a_crash_without_rings_is_reported(topics: Topics, tmp_path) -> None:
    arguments = ["--brokers", topics.bootstrap]
    config = f'kafka.topic_prefix = "{topics.prefix}"\n'
    passed = 0
    with Echo() as echo:
        for _ in range(2):
            with Run(tmp_path, *arguments, "--port", echo.port, config=config) as run:
                run.ready()
                exchange(echo.port, 53)
                passed += run.finish()[topics.name(TRANSMITS)]["passed"]
        reports, code = topics.reports()
        (boot,) = reports["transmit"]["boots"]
        assert (boot["events"], boot["missing"], boot["first_numbers"], boot["restarts"]) == (passed, 0, {}, 0)
        assert code == 0

        for ending in (Run.kill, Run.finish):
            with Run(tmp_path, *arguments, "--port", echo.port, config=config) as run:
                run.ready()
                exchange(echo.port, 53)
                ending(run)
    reports, code = topics.reports()
    assert code == 65
    (boot,) = reports["transmit"]["boots"]
    assert boot["restarts"] == 1
    assert boot["events"] > passed
