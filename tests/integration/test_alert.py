"""`rebpf alert` on a real Kafka: one member is active, it is killed, and each change is sent once.

The records follow a plan, window by window, so the expected alerts are known.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from producer.alert.last_alerts import last_alerts
from producer.alert.model import Alert
from producer.alert.record import AlertEncoder
from producer.commands.init import create_topics
from producer.config.load import Config, Kafka
from producer.consume.decode import Decoder
from producer.events import ALERTS, HEARTBEATS, RETRANSMITS
from producer.health.heartbeat import HeartbeatEncoder
from tests.support.alert_member import Member
from tests.support.alerts import alert_records
from tests.support.events import Sent, messages
from tests.support.flows import Flow, values
from tests.support.rebpf import rebpf, repeating, wait_until
from tests.support.statuses import status
from tests.support.topics import FIXED_IDS

pytestmark = pytest.mark.real_kafka

WINDOW_S, LATENESS_S = 2, 5
CONFIG = """
kafka.brokers = "{brokers}"
kafka.topic_prefix = "{prefix}"
kafka.settings = {{ "session.timeout.ms" = 6000 }}
[alert]
listen = "127.0.0.1:0"
lateness_s = {lateness}
lookback_s = 10
missed_heartbeats = 1  # 10 s
[[alert.rules]]
name = "loss"
window_s = 2
threshold = 0.1
clear = 0.03
minimum = 50
labels = {{ team = "net" }}
[[alert.rules]]
name = "long"
window_s = 2
for_s = 2
threshold = 0.1
clear = 0.03
[[alert.rules]]
name = "many"
by = "peer"
measure = "count"
window_s = 2
threshold = 30
clear = 5
[[alert.rules]]
name = "fails"
by = "subnet"
measure = "failed_connects"
window_s = 2
threshold = 3
clear = 1
"""
STEADY = "steady"
# Retransmitted segments, of 100, window by window.
PLAN = {STEADY: (0, 15, 15, 6, 6, 2, 15, 15, 0), "changing": (12, 0, 12, 0, 12, 0, 12, 0, 12), "quiet": (1,) * 9}
WINDOWS = len(PLAN[STEADY])
FAILED = (0, 0, 4, 0, 0, 3, 3, 0, 0)
DYING, LIVING = "dying", "living"


class Change(NamedTuple):
    """The checked fields of an alert."""

    rule: str
    group: str
    firing: bool
    window: int
    value: float


def changes(
    rule: str, group: str, values: Sequence[float], begins: float, ends: float, before: int = 0
) -> list[Change]:
    """Return the expected alerts of a group, by the simplest computation."""
    firing, found, run = False, [], 0
    for window, value in enumerate([*values, 0.0]):
        run = run + 1 if value >= begins else 0
        if (value < ends) if firing else run > before:
            firing = not firing
            found.append(Change(rule, group, firing, window, value))
    return found


def reference() -> list[Change]:
    """Return the expected alerts of the plan."""
    found = []
    for host, again in PLAN.items():
        ratios = [each / 100 for each in again]
        found += changes("loss", host, ratios, 0.1, 0.03) + changes("long", host, ratios, 0.1, 0.03, before=1)
    total = [sum(each) for each in zip(*PLAN.values(), strict=True)]
    found += changes("many", "192.0.2.1", total, 30, 5)
    found += changes("fails", "192.0.2.0/24", FAILED, 3, 1)
    return sorted(found)


class Feed:
    """Puts flow records, retransmissions and heartbeats into the topics."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        self._client = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random"})
        self._prefix = prefix
        self._ids = {prefix + topic: number for topic, number in FIXED_IDS.items()}
        self._beats = HeartbeatEncoder(HEARTBEATS.fixed_schema_id)
        self._sent = 0

    def window(self, number: int, start_s: int) -> None:
        """Produce what happened in a window of the plan, some of it twice."""
        flows, sent = [], []
        for host, again in PLAN.items():
            total = sum(again[: number + 1])
            at_ms, start_ms = start_s * 1000 + 1500, (start_s - number * WINDOW_S) * 1000 + 1
            flows.append(Flow(host, 1, at_ms, start_ms, 100 * (number + 1), {"fast": total}))
            for _ in range(again[number]):
                self._sent += 1
                sent.append(Sent(RETRANSMITS, host, self._sent, at_ms, "192.0.2.1", 50_000, 1, cause="fast"))
        flows += [
            Flow(DYING, 100 * number + each, start_s * 1000 + 1500, start_s * 1000, 3, state="SYN_SENT", close=True,
                 error="ECONNREFUSED", daddr=f"192.0.2.{each + 7}")
            for each in range(FAILED[number])
        ]  # fmt: skip
        for flow in [*flows, *flows[::2]]:
            self._client.produce(f"{self._prefix}tcp_flow", values([flow])[0], flow.host)
        for topic, key, value in messages(sent + sent[::7], self._ids, self._prefix):
            self._client.produce(topic, value, key)
        self._flush()

    def beat(self, host: str) -> None:
        key, value = self._beats.encode(status(host=host), time.time())
        self._client.produce(f"{self._prefix}rebpf_agent", value, key)
        self._flush()

    def _flush(self) -> None:
        assert self._client.flush(30) == 0


def configured(kafka, folder: Path, prefix: str) -> Path:
    path = folder / "rebpf.toml"
    path.write_text(CONFIG.format(brokers=kafka.bootstrap, prefix=prefix, lateness=LATENESS_S))
    return path


def prepared(kafka, folder: Path, prefix: str) -> Path:
    """Create the topics, and return the configuration."""
    path = configured(kafka, folder, prefix)
    assert rebpf("init", "--alerts", "--partitions", 3, "--config", path).returncode == 0
    topics = AdminClient({"bootstrap.servers": kafka.bootstrap}).list_topics(timeout=10).topics
    if f"{prefix}tcp_flow" not in topics:
        kafka.create_topic(f"{prefix}tcp_flow", partitions=3)
    return path


def test_a_topic_that_is_missing_is_named_with_what_makes_it(kafka, tmp_path):
    done = rebpf("alert", "--config", configured(kafka, tmp_path, "missing."))
    assert done.returncode == 69
    assert "topic missing.tcp_" in done.stderr
    assert "run `rebpf init" in done.stderr.splitlines()[-1]


def test_firing_alerts_are_read_back_without_tombstones_and_foreign_messages(kafka, caplog):
    config = Config(kafka=Kafka(topic_prefix="known.", brokers=kafka.bootstrap))
    create_topics(config, 1, 1, alerts=True)
    fires, over, forgotten = (
        Alert("loss", "host", group, True, "ratio", 0.5, 0.1, 0.03, 0, 2, 10, 5, 0, "page", causes="fast=5")
        for group in ("a", "b", "c")
    )
    resolved = replace(over, firing=False, value=0.0)
    encoder = AlertEncoder(ALERTS.fixed_schema_id)
    client = Producer({"bootstrap.servers": kafka.bootstrap})
    for alert in (fires, over, forgotten, resolved):
        key, value = encoder.encode(alert, time.time())
        client.produce("known.tcp_alerts", value, key)
    client.produce("known.tcp_alerts", None, forgotten.key)
    client.produce("known.tcp_alerts", b"not ours", "loss/d")
    assert client.flush(30) == 0

    decoder = Decoder(config.registry)
    assert last_alerts(kafka.bootstrap, "known.tcp_alerts", {}, decoder) == [fires, resolved]
    assert "loss/d" in caplog.text


def test_a_standby_continues_where_the_killed_active_member_was(kafka, tmp_path):
    prefix = "alert."
    config = prepared(kafka, tmp_path, prefix)
    feed, heart, expected = Feed(kafka.bootstrap, prefix), Feed(kafka.bootstrap, prefix), reference()
    with (
        Member(tmp_path / "one", config) as one,
        repeating(lambda: heart.beat(LIVING), 0.5),
    ):
        one.wait_for(" active ")
        with Member(tmp_path / "two", config) as two:
            two.wait_for(" ready ")

            def steady_has_fired() -> bool:
                return any(each["group"] == STEADY for each in alert_records(kafka.bootstrap, prefix))

            first_s = (int(time.time()) // WINDOW_S + 1) * WINDOW_S
            for window in range(WINDOWS):
                time.sleep(max(0.0, first_s + window * WINDOW_S - time.time()))
                feed.window(window, first_s + window * WINDOW_S)
                if window < 2:
                    feed.beat(DYING)
                # The next active member has to know what fires now.
                if one.process.poll() is None and steady_has_fired():
                    assert '"state": "active"' in one.get("/status")
                    assert '"state": "standby"' in two.get("/status")
                    one.kill()
            if one.process.poll() is None:
                wait_until("it fires", steady_has_fired)
                one.kill()
            # And which hosts are silent.
            wait_until(
                "all are sent", lambda: len(alert_records(kafka.bootstrap, prefix)) > len(expected), deadline_s=90
            )
            metrics = two.get("/metrics")
            assert "rebpf_alert_active 1.0" in metrics
            assert float(re.findall(r"^rebpf_alert_lag_seconds (\S+)$", metrics, re.MULTILINE)[0]) < 120
            assert two.get("/healthz") == "ok\n"
            two.stop()

    found = alert_records(kafka.bootstrap, prefix)
    sent = [
        Change(
            record["rule"],
            record["group"],
            record["firing"],
            (record["window_start_ns"] // 10**9 - first_s) // WINDOW_S,
            record["value"],
        )
        for record in found
        if record["measure"] != "silence"
    ]
    assert sorted(sent) == expected
    of_key: dict[str, list[bool]] = defaultdict(list)
    for record in found:
        of_key[f"{record['rule']}/{record['group']}"].append(record["firing"])
    assert all(states == [not at % 2 for at in range(len(states))] for states in of_key.values())
    assert [(each["group"], each["firing"]) for each in found if each["measure"] == "silence"] == [(DYING, True)]
    (first, *_) = (each for each in found if each["rule"] == "loss" and each["group"] == STEADY)
    assert (first["causes"], first["hosts"], json.loads(first["labels"])) == ("fast=15", "steady=15", {"team": "net"})
    assert first["flows"] == "steady 10.0.0.1:40000>192.0.2.1:443=15"
