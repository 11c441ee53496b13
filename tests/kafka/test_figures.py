"""The figures of a real capture with real loss are the same wherever they are looked at: in the kernel, a plain
consumer, the Flink job and the alerting consumer.

The demo's traffic between two namespaces, a producer as a user runs it, and the topics' readers as users run them.
"""

import json
from collections import Counter
from typing import Any, NamedTuple

import pytest

from producer.lab import Lab
from producer.reconcile import Tally, compare
from tests.kafka import topics
from tests.kafka.rebpf import Run, rebpf
from tests.kafka.topics import RETRANSMIT, TRANSMIT
from tests.servers import fetch, flink
from tests.servers.consume import kcat_messages

# The first time Flink is downloaded.
pytestmark = [pytest.mark.root, pytest.mark.real_kafka, pytest.mark.timeout(fetch.DEADLINE_S)]

PREFIX, HOST = "figures.", "lab"
LOSS, TRAFFIC_S = 0.02, 5.0


class Captured(NamedTuple):
    """What was captured, as the kernel counts it and as a plain consumer reads it."""

    counters: dict[str, int]
    events: dict[str, list[dict[str, Any]]]

    def segs(self, topic: str) -> int:
        """Return how many segments the topic's events stand for."""
        return sum(event["segs"] * event["sample_rate"] for event in self.events[topic])

    @property
    def causes(self) -> Counter[str]:
        """Retransmit events by cause."""
        return Counter(event["cause"] for event in self.events[RETRANSMIT])


@pytest.fixture(scope="module")
def captured(kafka, registry, tmp_path_factory) -> Captured:
    folder = tmp_path_factory.mktemp("figures")
    text = f'host = "{HOST}"\nkafka.topic_prefix = "{PREFIX}"\nregistry.url = "{registry.url}"\n'
    (folder / "init.toml").write_text(text)
    done = rebpf("init", "--config", folder / "init.toml", "--brokers", kafka.bootstrap, "--partitions", 3)
    assert done.returncode == 0, done.stderr
    with Lab(LOSS) as lab:
        addresses = [word for address in lab.addresses for word in ("--address", address)]
        with Run(folder / "run", "--brokers", kafka.bootstrap, *addresses, config=text) as run:
            run.ready()
            lab.traffic(TRAFFIC_S)
            assert lab.wait_idle()
            balance = run.finish()
        counters = lab.counters()
    events = {
        topic: [e.record for e in topics.read(kafka.bootstrap, topic, PREFIX)] for topic in (TRANSMIT, RETRANSMIT)
    }
    for topic, records in events.items():
        account = balance[PREFIX + topic]
        assert (account["lost"], account["delivered"]) == ({}, len(records))
    return Captured(counters, events)


def test_a_plain_consumer_counts_what_the_kernel_counted(captured):
    tally = Tally()
    for topic, records in captured.events.items():
        for record in records:
            tally.add(topic, record)
    comparison = compare(tally, captured.counters)

    assert comparison.retransmitted.counted > 10
    assert [row for row in comparison.rows if row.difference and row is not comparison.sent_first] == []
    # What is sent without a socket passes no hook: an answer from TIME_WAIT, each to something that was sent again.
    assert -comparison.retransmitted.counted < comparison.sent_first.difference <= 0
    # A SYN-ACK that is sent again is one event, and in both counters.
    both = tally.sent_first + tally.sent_again - tally.retransmitted["syn_ack"]
    assert (captured.segs(TRANSMIT), captured.segs(RETRANSMIT)) == (both, captured.counters["RetransSegs"])


def test_the_flink_jobs_sums_over_all_minutes_are_the_same(captured, kafka, registry, tmp_path):
    if absent := fetch.flink_missing():
        pytest.skip(f"NO REAL FLINK: it is not in the cache, and this machine lacks {', '.join(absent)}")
    result = f"{PREFIX}tcp_retransmit_minute"
    kafka.create_topic(result, settings={"cleanup.policy": "compact"})
    flink.run_sql(
        tmp_path, flink.tables(tmp_path, kafka.bootstrap, registry.url, PREFIX), flink.FLINK / "retransmits.sql"
    )

    last = {message.key: message.value for message in kcat_messages(kafka.bootstrap, result)}
    rows = [json.loads(value) for value in last.values()]
    assert {row["host"] for row in rows} == {HOST}
    assert {row["daddr"] for row in rows} == {event["daddr"] for event in captured.events[TRANSMIT]}
    assert sum(row["segs"] for row in rows) == captured.segs(TRANSMIT)
    assert sum(row["retransmitted_segs"] for row in rows) == captured.counters["RetransSegs"]
    assert sum((Counter(row["causes"]) for row in rows), Counter()) == captured.causes
