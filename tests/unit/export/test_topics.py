"""Topics as a source: every event once, counted rejects, and only topics that exist. test_export.py has periods."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import rebpf
from producer.alert.model import Alert
from producer.alert.record import AlertEncoder
from producer.commands.export import export
from producer.commands.report import report
from producer.consume.period import Period
from producer.errors import UnavailableError
from producer.events import ALERTS, FLOWS, RETRANSMITS, TRANSMITS
from producer.export.sources import Topics
from producer.report.collect import collect
from producer.report.summary import summarize
from tests.support.analysis import message, scene
from tests.support.mock_topics import Cluster

ALERT = Alert("many", "host", "web-1", True, "count", 9.0, 5.0, 2.0, 0, 10.0, 0, 9, 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Has the scene's connections and retransmissions, no transmits, a foreign message, and records of other topics."""
    cluster = Cluster()
    given = scene()
    for stream in (FLOWS, RETRANSMITS):
        for each in given[stream]:
            cluster.put(stream.topic, message(stream, each), each["host"])
    cluster.put(FLOWS.topic, b"foreign")
    cluster.put(FLOWS.topic, AlertEncoder(ALERTS.fixed_schema_id).encode(ALERT, 0.0)[1])
    cluster.put(FLOWS.topic, message(RETRANSMITS, given[RETRANSMITS][0]))
    yield cluster
    cluster.close()


def test_the_figures_of_topics_are_those_of_their_events(cluster: Cluster) -> None:
    source = Topics(cluster.brokers, {stream: stream.topic for stream in (FLOWS, RETRANSMITS)})
    summary = summarize(collect(source, Period()), Period())
    assert summary.totals is not None
    assert (summary.totals.sent, summary.totals.retransmitted) == (60_005, 150)
    assert {name: quality.events for name, quality in summary.quality.items()} == {
        "tcp_flow": 65,
        "tcp_retransmit": 150,
    }
    assert all(quality.missing == 0 for quality in summary.quality.values())
    assert summary.undecodable == 3


def test_a_topic_is_read_in_python(cluster: Cluster) -> None:
    table = rebpf.read(brokers=cluster.brokers, topic="tcp_retransmit", columns=["cause"])
    assert sorted(set(table["cause"].to_pylist())) == ["fast", "rto"]
    assert len(table) == 150


def test_messages_that_are_all_undecodable_are_no_empty_period(tmp_path: Path) -> None:
    cluster = Cluster()
    cluster.put(FLOWS.topic, b"\0\0\0\0\x4d" + bytes(99))
    source = Topics(cluster.brokers, {FLOWS: FLOWS.topic})
    why = "undecodable messages: 1, the first: schema id 77 is not one of the fixed ids: set --registry"
    with pytest.raises(UnavailableError, match=f"^no events in this period; {why}$"):
        export(source, tmp_path, "parquet", Period(), frozenset({FLOWS}))
    with pytest.raises(UnavailableError, match=f"^no connection records and .*; {why[:19]}"):
        report(source, Period(), tmp_path / "report.html", None)
    cluster.close()


def test_no_topic_is_an_error(cluster: Cluster) -> None:
    source = Topics(cluster.brokers, {TRANSMITS: "absent.tcp_transmit"})
    with pytest.raises(UnavailableError, match=r"no topic absent.tcp_transmit at"):
        list(source.parts({}))
