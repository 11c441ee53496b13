"""The counts of a real capture with real loss agree: in the kernel, a plain consumer, the views, the Flink job and the
alerting consumer.

The demo's traffic between two namespaces, a producer as a user runs it, and the topics' readers as users run them.
"""

import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fastavro
import pyarrow.compute as pc
import pyarrow.csv
import pytest

from producer.commands.top import Top
from producer.config.load import Registry
from producer.demo.lab import Lab
from producer.demo.reconcile import Tally, compare
from producer.events import CAUSES, FLOWS, RETRANSMITS
from producer.export.read import read as read_events
from producer.view.keys import Choice
from producer.view.topics import TopicSource
from tests.support import topics
from tests.support.rebpf import DEADLINE_S, Run, command, rebpf, wait_until
from tests.support.servers import fetch, flink
from tests.support.servers.consume import decode, kcat_messages
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.registry import SchemaRegistry
from tests.support.topics import FLOW, RETRANSMIT, TRANSMIT

# The first time Flink is downloaded.
pytestmark = [pytest.mark.root, pytest.mark.real_kafka, pytest.mark.timeout(fetch.DEADLINE_S)]

HOST = "lab"
LOSS, TRAFFIC_S = 0.02, 5.0
SYN_ACK = 0x12
MOST_UNRECORDED = 2
ROUNDS = 3


class Captured(NamedTuple):
    """A capture, as counted by the kernel and as read by a plain consumer."""

    prefix: str
    """Of its topics."""
    counters: dict[str, int]
    events: dict[str, list[dict[str, Any]]]
    tops: dict[str, dict[str, Any]]
    """What `rebpf top` showed over the whole time."""

    def segs(self, topic: str) -> int:
        """Return the number of segments of the topic's events."""
        return sum(event["segs"] * event["sample_rate"] for event in self.events[topic])

    @property
    def connections(self) -> list[dict[str, Any]]:
        """The last record of each connection. All connections are new, and closed."""
        last: dict[tuple[int, int], dict[str, Any]] = {}
        for record in sorted(self.events[FLOW], key=lambda record: record["ts_ns"]):
            last[record["netns"], record["sk_cookie"]] = record
        assert {record["reason"] for record in last.values()} == {"close"}
        return list(last.values())

    @property
    def beginnings_seen(self) -> bool:
        """Whether the kernel ran a program at the beginning of each connection."""
        return all(record["start_ns"] is not None for record in self.connections)

    @property
    def sent(self) -> dict[str, int]:
        """Segments that connections to each peer sent, SYN-ACKs included: in the kernel's counters, too."""
        sent, again = (summed(self.connections, name, "daddr") for name in ("segs_out", "retrans_syn_ack"))
        accepted = Counter((each["daddr"],) for each in self.connections if each["role"] == "server")
        return {peer: count for (peer,), count in (sent + again + accepted).items()}

    def of_connections(self, counter: str) -> int:
        """Return the sum of a counter over the connections."""
        return summed(self.connections, counter, "host")[(HOST,)]


@pytest.fixture(scope="module")
def captured(kafka, registry, tmp_path_factory) -> Captured:
    """A capture that saw each connection begin; now and then the kernel does not run a program (docs/truth.md)."""
    for number in range(ROUNDS):
        found = capture(kafka, registry, tmp_path_factory.mktemp("figures"), f"figures{number}.")
        if found.beginnings_seen:
            break
    return found


def capture(kafka: KafkaServer, registry: SchemaRegistry, folder: Path, prefix: str) -> Captured:
    """Capture the demo's traffic to topics of this prefix."""
    text = f'host = "{HOST}"\nkafka.topic_prefix = "{prefix}"\nregistry.url = "{registry.url}"\n'
    (folder / "init.toml").write_text(text)
    done = rebpf("init", "--config", folder / "init.toml", "--brokers", kafka.bootstrap, "--partitions", 3)
    assert done.returncode == 0, done.stderr
    with Lab(LOSS) as lab:
        addresses = [word for address in lab.addresses for word in ("--address", address)]
        with Run(folder / "run", "--brokers", kafka.bootstrap, *addresses, config=text) as run, ExitStack() as stack:
            run.ready()
            tops = {name: stack.enter_context(view) for name, view in views(lab, kafka, registry, prefix).items()}
            refresh(tops)
            with ThreadPoolExecutor(1) as pool:
                sent = pool.submit(lab.traffic, TRAFFIC_S)
                while not sent.done():
                    refresh(tops)
                    time.sleep(0.2)
            sent.result()
            assert lab.wait_idle(DEADLINE_S)
            balance = run.finish()
            refresh(tops)
            shown = {name: top.as_dict() for name, top in tops.items()}
        counters = lab.counters()
    events = {
        topic: [e.record for e in topics.read(kafka.bootstrap, topic, prefix)] for topic in (TRANSMIT, RETRANSMIT, FLOW)
    }
    for topic, records in events.items():
        account = balance[prefix + topic]
        assert (account["lost"], account["delivered"]) == ({}, len(records))
    return Captured(prefix, counters, events, shown)


def views(
    lab: Lab, kafka: KafkaServer, registry: SchemaRegistry, prefix: str
) -> dict[str, AbstractContextManager[Top]]:
    """Return views. One of this host would be a second capture, beside which the kernel may skip more runs."""
    streams = (RETRANSMITS, FLOWS)
    topic_names = [prefix + stream.topic for stream in streams]
    fleet = TopicSource(
        kafka.bootstrap, topic_names, registry=Registry(registry.url), client_settings={}, stop=threading.Event()
    )
    chosen = " or ".join(f"addr {address}" for address in lab.addresses)
    return {"fleet": view(fleet, chosen)}


@contextmanager
def view(source: TopicSource, filter_text: str) -> Iterator[Top]:
    with source:
        yield Top(source, Choice(filter_text=filter_text), 60.0, "view")


def refresh(tops: dict[str, Top]) -> None:
    for top in tops.values():
        top.read(report=True)


def test_a_plain_consumer_counts_what_the_kernel_counted(captured):
    tally = Tally()
    for topic, records in captured.events.items():
        for record in records:
            tally.add(topic, record)
    comparison = compare(tally, captured.counters)

    assert comparison.retransmitted.counted > 0
    others = comparison.of_flows, comparison.first_transmissions
    assert [row for row in comparison.rows if row.difference and row not in others] == []
    # Segments without a socket pass no hook: answers from TIME_WAIT, each to a retransmission.
    assert -comparison.retransmitted.counted < comparison.first_transmissions.difference <= 0
    # A retransmitted SYN-ACK is one event, and in both counters.
    both = tally.first_transmissions + tally.marked_retransmits - tally.retransmitted["syn_ack"]
    assert (captured.segs(TRANSMIT), captured.segs(RETRANSMIT)) == (both, captured.counters["RetransSegs"])
    # Each connection's record agrees with its segments. A SYN-ACK is in no connection's segs_out.
    flow = ("netns", "saddr", "sport", "daddr", "dport")
    sent = summed((each for each in captured.events[TRANSMIT] if each["tcp_flags"] != SYN_ACK), "segs", *flow)
    sent_again = summed(captured.events[RETRANSMIT], "segs", *flow)
    recorded = summed(captured.connections, "segs_out", *flow)
    recorded_again = summed(captured.connections, "total_retrans", *flow)
    # Few have no record, since the kernel may not run a program at their end: docs/truth.md.
    unrecorded = (sent.keys() | sent_again.keys()) - recorded.keys()
    assert len(unrecorded) <= MOST_UNRECORDED
    assert recorded == {key: sent[key] for key in recorded}
    assert recorded_again == {key: sent_again[key] for key in recorded}
    assert -comparison.of_flows.difference == sum(sent_again[key] for key in unrecorded)
    # So a ratio is that of nstat, whose OutSegs has first transmissions and all SYN-ACKs.
    counters = captured.counters
    sent_by_kernel = counters["OutSegs"] + counters["RetransSegs"] - tally.retransmitted["syn_ack"]
    all_sent = summed(captured.events[TRANSMIT], "segs", *flow)
    of_no_connection = sum(all_sent[key] for key in all_sent.keys() - recorded.keys())
    of_no_connection -= comparison.first_transmissions.difference
    assert sum(captured.sent.values()) == sent_by_kernel - of_no_connection


@pytest.mark.parametrize("name", ["fleet"])
def test_top_has_the_same(captured, name):
    shown = captured.tops[name]
    assert shown["lost"] == 0
    total = {counter: round(shown["total"][counter] * shown["window_s"]) for counter in ("segments", "retransmitted")}
    assert total["retransmitted"] == captured.counters["RetransSegs"]
    assert sum(shown["total"]["causes"].values()) == captured.counters["RetransSegs"]
    assert total["segments"] == sum(captured.sent.values())


def test_the_report_and_the_export_have_the_same(captured, kafka, registry, tmp_path):
    (tmp_path / "rebpf.toml").write_text(f'kafka.topic_prefix = "{captured.prefix}"\nregistry.url = "{registry.url}"\n')
    source = ("--config", tmp_path / "rebpf.toml", "--brokers", kafka.bootstrap)
    done = rebpf("report", *source, "-o", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    sent, sent_again = sum(captured.sent.values()), captured.of_connections("total_retrans")
    assert done.stdout.startswith(f"{sent_again:,} of {sent:,} segments were retransmitted: {sent_again / sent:.3%}.")
    assert "No event is missing" in (tmp_path / "report.html").read_text()

    for form in ("parquet", "csv"):
        done = rebpf("export", *source, "-o", tmp_path / form, "--format", form)
        assert done.returncode == 0, done.stderr
    events = read_events(tmp_path / "parquet", topic=RETRANSMIT)
    assert pc.sum(pc.multiply(events["segs"], events["sample_rate"])).as_py() == captured.counters["RetransSegs"]
    for topic, records in captured.events.items():
        (path,) = (tmp_path / "csv" / topic).glob("*/*.csv")
        assert len(pyarrow.csv.read_csv(path)) == len(records)


@pytest.mark.extended
def test_the_flink_jobs_sums_over_all_minutes_are_the_same(captured, kafka, registry, tmp_path):
    if absent := fetch.flink_missing():
        pytest.skip(f"NO REAL FLINK: it is not in the cache, and this machine lacks {', '.join(absent)}")
    result = f"{captured.prefix}tcp_retransmit_minute"
    kafka.create_topic(result, settings={"cleanup.policy": "compact"})
    flink.run_sql(
        tmp_path,
        flink.tables(tmp_path, kafka.bootstrap, registry.url, captured.prefix),
        flink.FLINK / "retransmits.sql",
    )

    last = {message.key: message.value for message in kcat_messages(kafka.bootstrap, result)}
    rows = [json.loads(value) for value in last.values()]
    assert {row["host"] for row in rows} == {HOST}
    assert {row["daddr"] for row in rows} == {event["daddr"] for event in captured.events[TRANSMIT]}
    segs = Counter[str]()
    for row in rows:
        segs[row["daddr"]] += row["segs"]
    assert segs == captured.sent
    assert sum(row["retransmitted_segs"] for row in rows) == captured.of_connections("total_retrans")
    causes = sum((Counter(row["causes"]) for row in rows), Counter[str]())
    assert causes == Counter({cause: captured.of_connections(f"retrans_{cause}") for cause in CAUSES})


def test_the_alerting_consumers_window_has_the_same(captured, kafka, registry, tmp_path):
    """One window contains the whole capture, so its alerts count all of it."""
    width_ns = width_of_a_window_around([event["ts_ns"] for events in captured.events.values() for event in events])
    rule = f"window_s = {width_ns / 1e9:.9f}, threshold = 0.0001, clear = 0.00005"
    text = f"""
        kafka = {{ brokers = "{kafka.bootstrap}", topic_prefix = "{captured.prefix}" }}
        registry.url = "{registry.url}"
        [alert]
        missed_heartbeats = 0
        lateness_s = 1
        rules = [
            {{ name = "host-ratio", by = "host", measure = "ratio", {rule} }},
            {{ name = "host-count", by = "host", measure = "count", {rule} }},
            {{ name = "peer-ratio", by = "peer", measure = "ratio", {rule} }},
        ]
    """
    (tmp_path / "rebpf.toml").write_text(text)
    done = rebpf("init", "--alerts", "--config", tmp_path / "rebpf.toml")
    assert done.returncode == 0, done.stderr

    # Ratios are of the connections' records; counts are of the retransmissions' own.
    sent, again_by_peer = captured.sent, summed(captured.connections, "total_retrans", "daddr")
    sent_again = {peer: count for (peer,), count in again_by_peer.items()}
    total, again = sum(sent.values()), sum(sent_again.values())
    expected = {
        ("host-ratio", HOST): (again / total, total, again),
        ("host-count", HOST): (captured.counters["RetransSegs"], 0, captured.counters["RetransSegs"]),
        **{("peer-ratio", peer): (again / sent[peer], sent[peer], again) for peer, again in sent_again.items()},
    }
    assert len(sent_again) > 1
    with alerting(tmp_path) as errors:
        found = wait_until(
            "all alerts", lambda: len(a := fired(kafka.bootstrap, captured.prefix)) >= len(expected) and a
        )
    assert "WARNING" not in errors.read_text()
    for key, (value, *segs) in expected.items():
        alert = found[key]
        assert alert["value"] == pytest.approx(value), key
        assert [alert["segs"], alert["retransmitted_segs"]] == segs, key
    assert found.keys() == expected.keys()


def summed(records: Iterable[dict[str, Any]], counter: str, *key: str) -> Counter[tuple[Any, ...]]:
    """Return the sums of a counter by the fields of `key`."""
    sums = Counter[tuple[Any, ...]]()
    for record in records:
        sums[tuple(record[name] for name in key)] += record[counter] * record["sample_rate"]
    return sums


def width_of_a_window_around(times_ns: list[int]) -> int:
    """Return a window width such that one window contains all these times and ends soon after."""
    second = 1_000_000_000
    end_ns = max(times_ns) + second
    width_ns = end_ns // (end_ns // (max(times_ns) - min(times_ns) + 2 * second))
    assert len({at // width_ns for at in times_ns}) == 1
    return width_ns


@contextmanager
def alerting(folder: Path) -> Iterator[Path]:
    """Run `rebpf alert` from the topics' beginning; yield its log file. It must exit with 0."""
    errors = folder / "errors"
    run = ["setpriv", "--pdeathsig", "KILL", *command("alert", "--config", folder / "rebpf.toml", "--from-beginning")]
    with errors.open("wb") as err:
        process = subprocess.Popen(run, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err)
    try:
        yield errors
        assert process.poll() is None, errors.read_text()
        process.terminate()
        assert process.wait(60) == 0, errors.read_text()
    finally:
        process.kill()
        process.wait()


def fired(bootstrap: str, prefix: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the first alert of each rule and group."""
    schema = fastavro.parse_schema(json.loads((topics.SCHEMAS / "tcp_alerts.avsc").read_text()))
    alerts = [decode(each.value or b"", schema)[1] for each in kcat_messages(bootstrap, f"{prefix}tcp_alerts")]
    return {(each["rule"], each["group"]): each for each in reversed(alerts) if each["firing"]}
