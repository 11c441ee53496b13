"""`rebpf alert` and the Flink job that it writes give the same alerts for the same records, on real servers."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from producer.alert.flink import SINK
from producer.config.load import Config, Kafka, Registry, load
from producer.events import CAUSES, FLOWS, RETRANSMITS, ROLES
from producer.registry.schema_ids import SchemaIds
from producer.schemas import load_schema
from producer.topics import topic
from tests.support.alert_member import Member
from tests.support.alerts import alert_records
from tests.support.events import Sent, messages
from tests.support.flows import Flow, values
from tests.support.rebpf import rebpf, wait_until
from tests.support.servers import fetch, flink
from tests.support.servers.consume import kcat_messages

pytestmark = [pytest.mark.real_kafka, pytest.mark.timeout(fetch.DEADLINE_S)]
PREFIX = "both."
READ = (FLOWS, RETRANSMITS)
LABELS = {"host-a": {"env": "prod"}, "host-b": {"env": "prod", "dc": "b"}}
START_S, SECONDS = 1_780_000_020, 240
"""A full minute, long past, so that everything can be decided."""
CONFIG = """
kafka.brokers = "{brokers}"
kafka.topic_prefix = "both."
registry.url = "{registry}"
[alert]
listen = "127.0.0.1:0"
missed_heartbeats = 0
lateness_s = 5
[[alert.rules]]
name = "loss"
window_s = 10
threshold = 0.08
clear = 0.04
minimum = 20
[[alert.rules]]
name = "long"
window_s = 10
for_s = 15
only_labels = {{ env = "prod" }}
[[alert.rules]]
name = "data"
by = "port"
measure = "data_ratio"
window_s = 20
threshold = 0.04
clear = 0.02
cause = ["rto", "fast", "syn"]
peer = ["192.0.2.0/31", "192.0.2.2/32"]
[[alert.rules]]
name = "flows"
by = "flow"
window_s = 30
threshold = 0.1
host = ["*[ab]"]
port = ["443-500"]
[[alert.rules]]
name = "fails"
by = "peer"
measure = "failed_connects"
window_s = 10
threshold = 2
clear = 1
[[alert.rules]]
name = "slow"
measure = "srtt"
quantile = 0.9
window_s = 10
threshold = 0.17
clear = 0.15
[[alert.rules]]
name = "many"
by = "peer"
measure = "count"
window_s = 10
threshold = 12
clear = 6
"""


def traffic() -> tuple[list[Flow], list[Sent]]:
    """Return records of three hosts in order of time, with gaps, copies, and connections older than the producer."""
    chance = random.Random(5)
    flows, events = [], []
    for cookie in range(1, 31):
        host, daddr = f"host-{'abc'[cookie % 3]}", ["192.0.2.1", "192.0.2.2", "2001:db8::3"][cookie % 5 % 3]
        first_s = chance.randrange(SECONDS - 40)
        start_ms = None if cookie % 7 == 0 else (START_S + first_s) * 1000
        segs, causes = (0, {}) if start_ms else (1_000_000, {"rto": 70_000})
        common = {"daddr": daddr, "sport": 40_000 + cookie, "dport": 443 if cookie % 2 else 8443, "start_ms": start_ms}
        common["role"] = ROLES[1 + cookie // 2 % 2]
        for second in range(first_s + 1, min(SECONDS, first_s + 90), 5):
            at_ms = (START_S + second) * 1000 + cookie
            if start_ms is None and second == first_s + 46:  # the producer restarts, and knows no causes of before
                causes = {"other": sum(causes.values())}
            segs += chance.randrange(5, 40)
            if chance.random() < 0.6:
                cause = chance.choice(CAUSES)
                again = chance.randrange(1, 5)
                causes = {**causes, cause: causes.get(cause, 0) + again}
                event = {"at_ms": at_ms, "daddr": daddr, "dport": 50_000, "segs": again, "sample_rate": 1 + cookie % 2}
                events.append(Sent(RETRANSMITS, host, len(events) + 1, cause=cause, **event))
            srtt_us = chance.randrange(200_000)
            more = {"causes": causes, "srtt_us": srtt_us, "data_segs": segs // 2}
            flows.append(Flow(host, cookie if cookie % 5 else 0, at_ms, segs=segs, **more, **common))
    for cookie in range(100, 140):
        at_ms = (START_S + chance.randrange(SECONDS)) * 1000 + cookie
        error = chance.choice(["ECONNREFUSED", "ETIMEDOUT", ""])
        failed = {"daddr": f"192.0.2.{cookie % 2 + 1}", "state": "SYN_SENT", "close": True, "error": error}
        flows.append(Flow("host-a", cookie, at_ms, at_ms - 1000, 3, {"syn": 2}, **failed))
    for cookie in range(200, 212):  # sockets that connect twice
        at_ms, host = (START_S + chance.randrange(SECONDS - 20)) * 1000 + cookie, f"host-{'abc'[cookie % 3]}"
        ends = {"close": True, **({"state": "SYN_SENT", "error": "ETIMEDOUT"} if cookie % 2 else {})}
        for start_ms, segs in ((at_ms, 50), (at_ms + 6000, 20 + 4 * (cookie - 200))):
            flows.append(Flow(host, cookie, start_ms + 5000, start_ms, segs, {"rto": segs // 3}, **ends))
    for host, cookie in (("host-a", 300), ("host-b", 0)):  # the close of the socket's first connection is lost
        for start_s, segs in ((60, 1000), (95, 100)):
            start_ms = (START_S + start_s) * 1000
            flows.append(Flow(host, cookie, start_ms + 4000, start_ms, segs, {"rto": segs // 4}, sport=39_000))
    # An interval record of another CPU follows the close, and the socket's counters are gone.
    ends = {"start_ms": (START_S + 30) * 1000, "sport": 39_001}
    flows.append(Flow("host-a", 301, (START_S + 44) * 1000, segs=5000, causes={"rto": 1500}, close=True, **ends))
    flows.append(Flow("host-a", 301, (START_S + 44) * 1000 + 1, **ends))
    return sorted(flows, key=lambda flow: flow.at_ms), sorted(events, key=lambda event: event.at_ms)


def alerts(records: Sequence[dict[str, Any]], start_of: Any) -> list[tuple[Any, ...]]:
    names = ("rule", "by", "group", "firing", "measure", "threshold", "clear", "window_s", "segs", "severity")
    return sorted((start_of(each), *(each[name] for name in names), round(each["value"], 9)) for each in records)


def lag_s(member: Member) -> float:
    return float(json.loads(member.get("/status"))["lag_s"])


def test_the_flink_job_and_rebpf_alert_give_the_same_alerts(kafka, registry, tmp_path: Path) -> None:
    if absent := fetch.flink_missing():
        pytest.skip(f"NO REAL FLINK: it is not in the cache, and this machine lacks {', '.join(absent)}")
    path = tmp_path / "rebpf.toml"
    path.write_text(CONFIG.format(brokers=kafka.bootstrap, registry=registry.url))
    config = Config(state_dir=tmp_path, kafka=Kafka(topic_prefix=PREFIX), registry=Registry(registry.url))
    assert rebpf("init", "--alerts", "--config", path).returncode == 0
    schemas = SchemaIds(config.registry, cache=None)
    files = {topic(config, each): each.schema_file for each in READ}
    ids = {name: schemas.register(name, load_schema(file)) for name, file in files.items()}
    existing = AdminClient({"bootstrap.servers": kafka.bootstrap}).list_topics(timeout=10).topics
    for name in {f"{PREFIX}tcp_flow", f"{PREFIX}{SINK}"} - existing.keys():
        kafka.create_topic(name)
    flows, events = traffic()
    client = Producer({"bootstrap.servers": kafka.bootstrap, "partitioner": "murmur2_random"})
    for at, flow in enumerate(flows):
        (value,) = values([flow], ids[f"{PREFIX}tcp_flow"], LABELS)
        for _ in range(2 if at % 9 == 0 else 1):
            client.produce(f"{PREFIX}tcp_flow", value, flow.host)
    for name, key, value in messages(events + events[::7], ids, PREFIX):
        client.produce(name, value, key)
    assert client.flush(60) == 0

    sql = rebpf("alert", "--config", path, "--flink-sql", "--from-beginning")
    assert sql.returncode == 0, sql.stderr
    job = tmp_path / "job.sql"
    job.write_text(sql.stdout.replace("'value.format' =", "'scan.bounded.mode' = 'latest-offset',\n  'value.format' ="))
    with Member(tmp_path / "member", path, "--from-beginning") as member:
        member.wait_for(" active ")
        # All records are long past: what has been read to its end is decided.
        wait_until("all is decided", lambda: json.loads(member.get("/status"))["read"] > 0 and lag_s(member) < 3600)
        member.stop()
    flink.run_sql(tmp_path, job)

    ours = alerts(
        alert_records(kafka.bootstrap, PREFIX),
        lambda each: datetime.fromtimestamp(each["window_start_ns"] / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S"),
    )
    values_of_job = [json.loads(each.value or b"") for each in kcat_messages(kafka.bootstrap, PREFIX + SINK)]
    theirs = alerts(values_of_job, lambda each: each["window_start"])
    assert sorted((Counter(theirs) - Counter(ours)).elements()) == []
    assert sorted((Counter(ours) - Counter(theirs)).elements()) == []
    assert {rule for _, rule, *_ in ours} == {rule.name for rule in load(path).alert.rules}
