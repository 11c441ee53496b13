"""`rebpf top` on topics: a fleet's table for scripts, and records of any types."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.cli.view import GROUPS
from producer.commands.top import Top, once
from producer.config.load import Registry
from producer.consume.follow import Start
from producer.encode.batch import BatchEncoder
from producer.events import CAUSES, FLOWS, RETRANSMITS, Batch, Stream
from producer.host.cgroups import CgroupPaths
from producer.schemas import load_schema
from producer.view.flows import Flows
from producer.view.keys import Choice
from producer.view.records import Records
from producer.view.screen import Display, Frame, render
from producer.view.table import SORTS, details, table
from producer.view.topics import TopicSource
from tests.support import mock_cluster
from tests.support.encoding import OFFSET_NS, messages
from tests.support.mock_topics import Cluster
from tests.support.views import flows, retransmits

TOPICS = (FLOWS.topic, RETRANSMITS.topic)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


def put(cluster: Cluster, stream: Stream, host: str, rows: Any) -> None:
    schema, fields = load_schema(stream.schema_file), {"host": host, "boot_id": f"boot of {host}"}
    encoder = BatchEncoder(stream, schema, stream.fixed_schema_id, fields, CgroupPaths(None), "host")
    for _, value in messages(encoder.encode(Batch(stream, rows), OFFSET_NS)):
        cluster.put(stream.topic, value)


def source(cluster: Cluster, stop: threading.Event) -> TopicSource:
    return TopicSource(
        cluster.brokers, TOPICS, registry=Registry(None), client_settings={}, start=Start.BEGINNING, stop=stop
    )


def shown(cluster: Cluster, capsys: pytest.CaptureFixture[str], choice: Choice) -> Any:
    """Return the table for scripts."""
    stop = threading.Event()
    once(source(cluster, stop), choice, 5.0, "fleet", stop, as_json=True, width=80)
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_fleet_is_read_from_the_topics(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    for number, host in enumerate(("web-1", "web-2", "db-1")):
        sent = [{"reason": "interval", "sk_cookie": 1, "daddr": "10.2.0.9", "segs_out": segs} for segs in (10, 110)]
        for row in sent:
            put(cluster, FLOWS, host, flows(row))
        put(cluster, RETRANSMITS, host, retransmits({"cause": "rto", "sk_cookie": 1, "segs": 1 + number}))
    cluster.put(FLOWS.topic, b"foreign")
    found = shown(cluster, capsys, Choice(by="host"))
    assert {line["name"]: line["causes"] for line in found["lines"]} == {
        "db-1": {"rto": 3}, "web-2": {"rto": 2}, "web-1": {"rto": 1},
    }  # fmt: skip
    assert (found["lost"], found["kernel_retrans_segs"]) == (1, None)
    chosen = shown(cluster, capsys, Choice(by="host", filter_text="host web-*"))
    assert {line["name"] for line in chosen["lines"]} == {"web-1", "web-2"}


@pytest.mark.slow
def test_a_printed_table_selects_nothing(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    put(cluster, RETRANSMITS, "web-1", retransmits({"cause": "rto", "sk_cookie": 1, "daddr": "10.2.0.9"}))
    stop = threading.Event()
    once(source(cluster, stop), Choice(), 5.0, "fleet", stop, as_json=False, width=80)
    assert capsys.readouterr().out.splitlines()[3].startswith(" 10.2.0.9 ")


def several(cluster: Cluster, segs: dict[str, int]) -> None:
    """Add retransmissions to peers."""
    rows = [{"cause": "rto", "daddr": peer, "sk_cookie": int(peer[-1]), "segs": n} for peer, n in segs.items()]
    put(cluster, RETRANSMITS, "web-1", retransmits(*rows))


def after(top: Top, *keys: str, height: int = 24) -> Frame:
    """Return what is shown after keys."""
    for key in keys:
        top.press(key)
    return top.frame(height)


def read_all(top: Top, retransmitted: int) -> None:
    """Read until this number of segments has been seen."""
    while sum(sum(line.causes.values()) for line in top.table(50).lines) < retransmitted:
        top.read(report=True)


@pytest.fixture
def view(cluster: Cluster) -> Iterator[Top]:
    """A view of three peers, the first of them the worst."""
    several(cluster, {"10.2.0.1": 9, "10.2.0.2": 8, "10.2.0.3": 1})
    stop = threading.Event()
    with source(cluster, stop) as opened:
        top = Top(opened, Choice(), 60.0, "fleet")
        read_all(top, 18)
        yield top


def names(shown: Frame) -> list[str]:
    return [line.name[-1] for line in shown.table.lines]


def test_the_selection_and_its_details_stay_with_their_peer(cluster: Cluster, view: Top) -> None:
    shown = after(view, "down", "enter")
    assert (names(shown), shown.name) == (["1", "2", "3"], "10.2.0.2")
    several(cluster, {"10.2.0.3": 50})
    read_all(view, 68)
    shown = after(view)
    assert (names(shown), shown.name, shown.selected) == (["3", "1", "2"], "10.2.0.2", 2)
    assert shown.details is not None
    assert [detail.retransmitted for detail in shown.details] == [8]
    assert after(view, "escape", "up").name == "10.2.0.1"
    assert after(view, "s").selected == 0, "a new order begins with its first line"


def test_a_line_with_the_name_of_another_can_be_selected(cluster: Cluster, view: Top) -> None:
    """Hosts may have the same private addresses."""
    for host in ("web-2", "web-3"):
        put(cluster, RETRANSMITS, host, retransmits({"cause": "rto", "daddr": "10.2.0.1", "sk_cookie": 1, "segs": 9}))
    read_all(view, 36)
    after(view, "f")
    assert [after(view, "down").selected for _ in range(4)] == [1, 2, 3, 4]
    assert [after(view, "up").selected for _ in range(2)] == [3, 2]


def test_keys_act_on_what_was_shown_and_not_on_what_has_arrived_since(cluster: Cluster, view: Top) -> None:
    assert after(view).name == "10.2.0.1"
    several(cluster, {"10.2.0.3": 50})
    read_all(view, 68)
    assert after(view, "enter").name == "10.2.0.1"


def test_without_a_selection_the_first_line_is_the_worst_peer(cluster: Cluster, view: Top) -> None:
    assert after(view).name == "10.2.0.1"
    several(cluster, {"10.2.0.3": 50})
    read_all(view, 68)
    assert after(view).name == "10.2.0.3"


def test_a_paused_table_is_frozen_and_can_be_sorted(cluster: Cluster, view: Top) -> None:
    after(view)
    before = after(view, " ", "down")
    several(cluster, {"10.2.0.3": 50})
    read_all(view, 68)
    shown = after(view)
    assert (shown.table, shown.paused) == (before.table, True)
    resorted = after(view, *"ssssss")
    assert (resorted.sort, names(resorted)) == ("name", ["1", "2", "3"])
    assert names(after(view, "s", " ")) == ["3", "1", "2"]


@pytest.mark.slow
def test_a_new_filter_compares_with_the_records_from_before(cluster: Cluster, view: Top) -> None:
    """The next record of an open connection would otherwise be the first one, from which nothing has grown."""
    connection = {"reason": "interval", "sk_cookie": 1, "daddr": "10.2.0.1", "start_ns": 0, "dport": 443}
    put(cluster, FLOWS, "web-1", flows({**connection, "segs_out": 100}))
    while not view.table(1).total.flows:
        view.read(report=True)
    after(view, "/", *"port 443", "enter")
    put(cluster, FLOWS, "web-1", flows({**connection, "segs_out": 400}))
    seen = 0
    while not seen:
        view.read(report=True)
        seen = round(view.as_dict()["total"]["segments"] * view.as_dict()["window_s"])
    assert seen == 300


@pytest.mark.slow
def test_a_new_filter_does_not_end_the_view_while_kafka_is_down() -> None:
    cluster = mock_cluster.Cluster()
    for topic in TOPICS:
        cluster.create(topic)
    stop = threading.Event()
    try:
        with TopicSource(cluster.brokers, TOPICS, registry=Registry(None), client_settings={}, stop=stop) as opened:
            top = Top(opened, Choice(), 60.0, "fleet")
            cluster.down()
            assert after(top, "/", *"port 443", "enter").filter_text == "port 443"
    finally:
        cluster.close()


def test_there_are_lines_beyond_the_screen(cluster: Cluster, view: Top) -> None:
    shown = after(view, "down", "down", height=1)
    assert (shown.name, names(shown)) == ("10.2.0.3", ["1", "2", "3"])


odd = st.one_of(st.none(), st.integers(-(1 << 63), (1 << 63) - 1))
NUMBERS = ("sk_cookie", "sport", "dport", "segs", "segs_out", "total_retrans", "ts_ns", "start_ns", "srtt_us",
           "min_rtt_us", "snd_cwnd", "mss", "rto_us", "lost_out", "busy_time_us", "rwnd_limited_us", "bytes_sent",
           "sndbuf_limited_us", "data_segs_out", "dsack_dups", "netns", "sample_rate")  # fmt: skip
TEXTS = ("host", "boot_id", "saddr", "daddr", "unit", "container", "comm", "cause", "reason", "state", "error")
texts = st.none() | st.sampled_from(["interval", "close", "SYN_SENT", *CAUSES]) | st.text(max_size=9)


@settings(max_examples=30)
@given(
    st.lists(
        st.fixed_dictionaries({**dict.fromkeys(NUMBERS, odd), **dict.fromkeys(TEXTS, texts)}), min_size=1, max_size=5
    ),
    st.sampled_from(GROUPS),
    st.sampled_from(SORTS),
)
def test_numbers_that_no_kernel_writes_are_shown_somehow(rows: list[dict[str, Any]], by: str, sort: str) -> None:
    """Whoever may write to a topic chooses them."""
    found = Flows(0)
    for now in (1.0, 2.0, 9.0):
        found.add(Records.from_rows(FLOWS, rows), now)
        found.add(Records.from_rows(RETRANSMITS, rows), now)
    made = table(found, by, sort, 9.0, 10.0, 50)
    rest = details(found, by, made.lines[0].name, 9.0, 5) if made.lines else None
    frame = Frame(made, by, sort, "", "fleet", 0, False, "", rest, None, 0)
    for size in ((80, 24), (200, 50)):
        lines = render(frame, Display(*size, color=False, unicode=True))
        assert all(line.isprintable() for line in lines)
    found.forget(1000.0)
    assert len(found.rows) == 0
