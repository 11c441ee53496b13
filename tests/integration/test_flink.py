"""The jobs of deploy/flink on a real Flink, Kafka and registry: their results match the input.

Two hosts send to three peers over three minutes. Some events are duplicated, with a corrected clock, and some come
after all others, as from a spool.
"""

import json
import runpy
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Producer

from producer.commands.init import register_schemas
from producer.config.load import Config, Kafka, Registry
from producer.events import CAUSES, RETRANSMITS, ROLES, TRANSMITS, Stream, Topic
from producer.registry.schema_ids import SchemaIds
from producer.schemas import load_schema
from tests.support.events import Sent, messages
from tests.support.flows import Flow, values
from tests.support.servers import fetch, flink
from tests.support.servers.consume import kcat_messages

FLINK = Path(__file__).resolve().parents[2] / "deploy" / "flink"
# The first time Flink is downloaded.
pytestmark = pytest.mark.timeout(fetch.DEADLINE_S)
PREFIX = "flink."
MS, MINUTE_MS = 1_000_000, 60_000
START_MS = 1_800_000_000_000  # a full minute
CLOCK_STEP_MS = -2
HOSTS = ("host-a", "host-b")
PEERS = ("192.0.2.1", "192.0.2.2", "2001:db8::3")
MINUTES = 3
WITHOUT_COOKIE = (5, 10)
CLOSES = 8
"""The number of the record after which some sockets connect again."""
WRAPS = 4
"""The cookie of an older connection whose counter of segments wraps."""
RESTARTS = 4
"""The number of the first record of a producer that has restarted, and knows no causes of before."""


def traffic() -> list[Sent]:
    """Return all events in order of time; late ones, and one without a transmit, have distinct ports."""
    made: list[Sent] = []
    numbers: Counter[tuple[str, Stream]] = Counter()

    def add(stream: Stream, host: str, **fields: Any) -> int:
        numbers[host, stream] += 1
        made.append(Sent(stream, host, numbers[host, stream], **fields))
        return numbers[host, stream]

    for minute in range(MINUTES):
        for cell, (host, daddr) in enumerate((host, daddr) for host in HOSTS for daddr in PEERS):
            for i in range(7 + 4 * cell + minute):
                at_ms = START_MS + minute * MINUTE_MS + 1 + i * 100
                flow = {"daddr": daddr, "dport": 50_000}
                srtt_us = (i * 37 + cell * 11) % 100 * 100
                rate = 2 if minute == 1 else 1
                last = add(TRANSMITS, host, at_ms=at_ms, segs=1 + i % 3, srtt_us=srtt_us, sample_rate=rate, **flow)
                if i % (2 + cell) == 1:
                    again = {"at_ms": at_ms + 50, "segs": 1 + i % 2, "sample_rate": rate, **flow}
                    add(TRANSMITS, host, is_retransmit=True, srtt_us=srtt_us, **again)
                    add(RETRANSMITS, host, cause=CAUSES[(i + cell + minute) % len(CAUSES)], last=last, **again)
    for host in HOSTS:
        for daddr in PEERS[:2]:
            add(TRANSMITS, host, at_ms=START_MS + 30_000, segs=5, daddr=daddr, dport=60_000)
    add(RETRANSMITS, "host-a", at_ms=START_MS + 31_000, segs=1, daddr=PEERS[2], dport=60_001, cause="syn")
    return sorted(made, key=lambda event: (event.dport, event.at_ms))


@pytest.fixture(scope="module")
def sent() -> list[Sent]:
    return traffic()


def flows() -> list[Flow]:
    """Return records of connections in order of time: open for all minutes, some older, and some that connect again."""
    made = []
    for cookie, (host, daddr) in enumerate([(host, daddr) for host in HOSTS for daddr in PEERS] * 2, 1):
        causes: Counter[str] = Counter({"rto": 70})
        for i in range(MINUTES * 6):
            at_ms = START_MS + i * 10_000 + cookie
            start_ms, segs = None if cookie % 4 == 0 else START_MS - 5_000, 1000 + 100 * i * cookie
            if cookie % 3 == 0 and i > CLOSES:
                start_ms, segs = START_MS + CLOSES * 10_000 + cookie + 1, 10 * i
                causes = causes if i > CLOSES + 1 else Counter()
            if cookie % 4 == 0 and i == RESTARTS:
                causes = Counter({"other": causes.total()})
            causes[CAUSES[(i + cookie) % len(CAUSES)]] += 1 + i % 3
            if cookie == WRAPS:
                segs = (segs - 2000) % (1 << 32)
            more = {"daddr": daddr, "srtt_us": 1 + (i * 37 + cookie * 11) % 100 * 100}
            more["role"] = ROLES[1 + cookie // 4 % 2]
            more["close"] = cookie % 3 == 0 and i == CLOSES and cookie % 6 > 0  # some closes are lost
            known = 0 if cookie in WITHOUT_COOKIE else cookie
            made.append(Flow(host, known, at_ms, start_ms, segs, dict(causes), sport=40_000 + cookie, **more))
    return sorted(made, key=lambda flow: flow.at_ms)


@pytest.fixture(scope="module")
def connections() -> list[Flow]:
    return flows()


@pytest.fixture(scope="module")
def tables(kafka, registry, sent, connections, tmp_path_factory) -> Path:
    """Produce the events, and return a file of the tables, bounded at the topics' current ends."""
    if absent := fetch.flink_missing():
        pytest.skip(f"NO REAL FLINK: it is not in the cache, and this machine lacks {', '.join(absent)}")
    folder = tmp_path_factory.mktemp("state")
    config = Config(state_dir=folder, kafka=Kafka(topic_prefix=PREFIX), registry=Registry(registry.url))
    register_schemas(config)
    schemas = SchemaIds(config.registry, cache=None)
    schemas.register(Topic(f"{PREFIX}tcp_flow"), load_schema("tcp_flow.avsc"))
    ids = schemas.find({Topic(PREFIX + topic): load_schema(f"{topic}.avsc") for topic in flink.SOURCES})
    for topic in flink.SOURCES:
        kafka.create_topic(PREFIX + topic)
    for topic in ("tcp_retransmit_minute", "tcp_retransmit_last"):
        kafka.create_topic(PREFIX + topic, settings={"cleanup.policy": "compact"})

    client = Producer({"bootstrap.servers": kafka.bootstrap, "partitioner": "murmur2_random"})
    for topic, key, value in messages(sent, ids, PREFIX) + messages(sent[::5], ids, PREFIX, CLOCK_STEP_MS):
        client.produce(topic, value, key)
    # One host's records come after all others, as from a spool, and some twice.
    numbered = list(zip(connections, values(connections, ids[f"{PREFIX}tcp_flow"]), strict=True))
    late = [each for each in numbered if each[0].host == HOSTS[1]]
    for flow, value in [each for each in numbered if each[0].host == HOSTS[0]] + late + numbered[::5]:
        client.produce(f"{PREFIX}tcp_flow", value, flow.host)
    assert client.flush(60) == 0

    return flink.tables(folder, kafka.bootstrap, registry.url, PREFIX)


def results(kafka, topic: str) -> list[dict[str, Any]]:
    """Return the last row per key of a result."""
    return [
        json.loads(value)
        for value in {each.key: each.value for each in kcat_messages(kafka.bootstrap, PREFIX + topic)}.values()
    ]


def percentile(values: list[int], part: float) -> float:
    """Return a percentile like SQL's PERCENTILE_CONT: interpolated between the two nearest values."""
    return float(np.percentile(values, part * 100, method="linear"))


def test_the_committed_tables_are_those_of_the_schemas():
    assert (FLINK / "tables.sql").read_text() == runpy.run_path(str(FLINK / "ddl.py"))["tables"](
        "localhost:9092", "http://localhost:8081"
    )


def test_settings_of_the_clients_are_in_all_tables():
    options = ["--prefix", "x.", "--property", "sasl.jaas.config=a required password='p';"]
    made = subprocess.run([sys.executable, FLINK / "ddl.py", *options], capture_output=True, text=True, check=True)

    assert made.stdout.count("'properties.sasl.jaas.config' = 'a required password=''p'';',\n") == 5
    assert made.stdout.count("'topic' = 'x.tcp_") == 5


@pytest.mark.real_kafka
def test_minutes_have_what_connections_did_in_them(kafka, tables, connections, tmp_path):
    flink.run_sql(tmp_path, tables, FLINK / "retransmits.sql")

    expected: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    srtt_us: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    before: dict[int, Flow] = {}
    for flow in connections:
        minute = (flow.at_ms - START_MS) // MINUTE_MS
        key = (f"2027-01-15 08:{minute:02}:00", flow.host, flow.daddr)
        last = before.get(flow.sport)
        nothing = replace(flow, segs=0, causes={})
        if last is None:
            last = flow if flow.start_ms is None else nothing
        elif flow.start_ms is not None and flow.start_ms > last.at_ms and (last.close or flow.segs < last.segs):
            last = nothing
        elif flow.causes.get("rto", 0) < last.causes.get("rto", 0):
            last = replace(last, causes={"other": sum(last.causes.values())})
        # The first SYN-ACK, and those that were repeated: the counter of segments has none of them.
        syn_acks = flow.causes.get("syn_ack", 0) - last.causes.get("syn_ack", 0)
        syn_acks += flow.role == "server" and last is nothing
        expected[key] += Counter({"segs": (flow.segs - last.segs) % (1 << 32) + syn_acks})
        expected[key] += Counter({cause: flow.causes[cause] - last.causes.get(cause, 0) for cause in flow.causes})
        srtt_us[key].append(flow.srtt_us)
        before[flow.sport] = flow
    found = {
        (each["window_start"], each["host"], each["daddr"]): each for each in results(kafka, "tcp_retransmit_minute")
    }
    assert found.keys() == expected.keys()
    assert len(found) == MINUTES * len(HOSTS) * len(PEERS)
    for key, sums in expected.items():
        one, segs = found[key], sums.pop("segs")
        assert (one["segs"], one["retransmitted_segs"]) == (segs, sums.total()), key
        assert one["ratio"] == pytest.approx(sums.total() / segs)
        assert Counter(one["causes"]) == sums
        for name, part in (("srtt_us_p50", 0.5), ("srtt_us_p95", 0.95), ("srtt_us_p99", 0.99)):
            assert one[name] == pytest.approx(percentile(srtt_us[key], part)), (key, name)


@pytest.mark.extended
@pytest.mark.real_kafka
def test_a_retransmit_has_its_flows_last_transmit(kafka, sent, tables, tmp_path):
    flink.run_sql(tmp_path, tables, FLINK / "last_transmit.sql")

    found = results(kafka, "tcp_retransmit_last")
    expected = {(each.host, each.cpu_seq): (each.cause, each.last) for each in sent if each.stream is RETRANSMITS}
    assert {(each["host"], each["cpu_seq"]): (each["cause"], each["last_seq"]) for each in found} == expected
    assert len(found) == len(expected)
    assert {each["since_last_us"] for each in found if each["last_seq"]} <= {
        50_000,
        50_000 + CLOCK_STEP_MS * 1000,
        50_000 - CLOCK_STEP_MS * 1000,
    }
