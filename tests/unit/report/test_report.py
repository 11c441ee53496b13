"""The report: its figures are those of the events, and hostile names stay text."""

import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import rebpf
from producer.commands.export import export
from producer.commands.report import _commands, report
from producer.consume.period import Period
from producer.errors import UnavailableError
from producer.events import FLOWS, RETRANSMITS, TRANSMITS
from producer.export.arrow import schema_of
from producer.export.events import matching
from producer.export.sources import Files
from producer.host.text import printable
from producer.report.collect import collect
from producer.report.connections import COLUMNS, connections
from producer.report.frame import Frame
from producer.report.plots import draw_srtt, svg
from producer.report.summary import summarize
from tests.support.analysis import HOSTILE, NOON_NS, SECOND_NS, record, write_container, write_scene

pytestmark = pytest.mark.slow

INTERVAL_NS = 10 * SECOND_NS


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def page(scene_folder: Path) -> str:
    report(Files([scene_folder]), Period(), scene_folder / "report.html", scene_folder / "report.png")
    return (scene_folder / "report.html").read_text()


def test_the_figures_are_those_of_the_events(scene_folder: Path) -> None:
    summary = summarize(collect(Files([scene_folder]), Period()), Period())
    flows = rebpf.read(scene_folder, topic="tcp_flow").to_pylist()
    assert summary.totals is not None
    assert summary.totals.sent == sum(each["segs_out"] for each in flows) == 60_005
    assert summary.totals.retransmitted == sum(each["total_retrans"] for each in flows) == 150
    assert {cause: count for cause, count in summary.totals.causes.items() if count} == {"fast": 120, "rto": 30}
    assert (summary.totals.spurious, summary.totals.connections, summary.totals.partial) == (15, 65, 0)
    worst = summary.worst["peer"][0]
    assert (worst.name, worst.retransmitted, worst.sent, worst.cause) == ("10.0.0.7", 150, 3000, "fast")
    assert {line.name: line.sent for line in summary.worst["host"]} == {
        name: sum(each["segs_out"] for each in flows if each["host"] == name) for name in ("web-1", "web-2", HOSTILE)
    }
    assert [(each.error, each.peer, each.count) for each in summary.failures] == [("ECONNREFUSED", "10.9.9.9", 5)]
    assert summary.timeline is not None
    assert {cause: int(counts.sum()) for cause, counts in summary.timeline.causes.items()} == {"rto": 30, "fast": 120}
    assert [flow.retransmitted for flow in summary.flows] == [50, 50, 50]
    assert all(quality.missing == 0 for quality in summary.quality.values())


def test_an_export_makes_the_same_report(scene_folder: Path, page: str, tmp_path: Path) -> None:
    export(Files([scene_folder]), tmp_path / "export", "parquet", Period(), frozenset({FLOWS, RETRANSMITS, TRANSMITS}))
    report(Files([tmp_path / "export"]), Period(), tmp_path / "report.html", None)
    assert (tmp_path / "report.html").read_text() == page


def test_a_filter_chooses_connections_and_events(scene_folder: Path) -> None:
    choice = matching("peer 10.0.0.7 and not host web-2")
    summary = summarize(collect(Files([scene_folder]), Period(), choice), Period())
    assert summary.totals is not None
    assert (summary.totals.sent, summary.totals.retransmitted) == (2000, 100)
    assert [flow.retransmitted for flow in summary.flows] == [50, 50]


def test_a_filter_does_not_apply_to_the_records_that_counters_grow_from(tmp_path: Path) -> None:
    records = [connection(1, at, 0, count) for at, count in ((0, 1), (1, 4), (2, 9))]
    path = write_container(tmp_path / "flows.avro", FLOWS, records)
    period = Period(NOON_NS + 1)
    summary = summarize(collect(Files([path]), period, matching("retrans > 3")), period)
    assert summary.totals is not None
    assert summary.totals.retransmitted == 8


def test_names_stay_text_and_nothing_comes_from_the_network(page: str) -> None:
    found = Page(page)
    assert "script" not in found.tags
    assert not {name for name in found.attributes if name.startswith("on") or name == "src"}
    assert not re.findall(r'(?:href|url)\s*[=(]\s*["\']?(?!#)\w+:', page)
    shown = " ".join(found.text.split())
    assert " ".join(printable(HOSTILE).split()) in shown
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_page_says_who_where_and_why_and_how_good_the_data_are(page: str) -> None:
    text = Page(page).text
    for words in (
        "150 of 60,005 segments were retransmitted: 0.250%.",
        "Worst peer: 10.0.0.7, 150 segments (5.00%), mostly fast.",
        "Causes over time",
        "What limits connections",
        "ECONNREFUSED",
        "No event is missing between the first and the last one.",
        "ss -ti dst 10.0.0.7",
        "rebpf trace 'peer 10.0.0.7'",
        "retransmitted: rto",
        "lost_out",
        "RTO, ms",
    ):
        assert words in text


def test_the_picture_is_a_png(page: str, scene_folder: Path) -> None:
    assert (scene_folder / "report.png").read_bytes().startswith(b"\x89PNG")


def flows_of(*records: dict[str, Any]) -> Frame:
    rows = [{name: value for name, value in each.items() if name in COLUMNS} for each in records]
    return Frame(pa.Table.from_pylist(rows, schema_of(FLOWS, COLUMNS)))


def connection(cookie: int, at: int, start: int | None, retransmitted: int, **fields: Any) -> dict[str, Any]:
    """Return a record at a number of intervals since noon."""
    start_ns = None if start is None else NOON_NS + start * INTERVAL_NS
    counters = {"segs_out": 10 * retransmitted, "total_retrans": retransmitted}
    return record(
        FLOWS,
        sk_cookie=cookie,
        ts_ns=NOON_NS + at * INTERVAL_NS,
        start_ns=start_ns,
        reason="interval",
        **counters,
        **fields,
    )


@pytest.mark.parametrize(
    ("records", "grown", "partial"),
    [
        pytest.param([(0, 0, 1), (1, 0, 4), (2, 0, 9)], 8, False, id="a record before the period"),
        pytest.param([(1, 1, 4), (2, 1, 9)], 9, False, id="began in the period"),
        pytest.param([(1, 0, 4), (2, 0, 9)], 5, True, id="began before, and no record before"),
        pytest.param([(1, None, 4), (2, None, 9)], 5, True, id="began before the producer"),
        pytest.param([(2, 0, 9), (0, 0, 1), (1, 0, 4)], 8, False, id="in another order"),
        pytest.param([(0, 0, 1), (0, 0, 1), (2, 0, 9), (2, 0, 9)], 8, False, id="duplicates"),
    ],
)
def test_a_counter_grows_from_the_last_record_before_the_period(
    records: list[tuple[int, int | None, int]], grown: int, partial: bool
) -> None:
    frame = flows_of(*(connection(1, *each) for each in records), connection(2, 0, 0, 77))
    found = connections(frame, NOON_NS + INTERVAL_NS // 2)
    assert found.growth["total_retrans"].tolist() == [grown]
    assert found.growth["segs_out"].tolist() == [10 * grown]
    assert found.partial.tolist() == [partial]


def test_without_a_period_a_connection_that_began_long_before_all_records_counts_from_its_first_one() -> None:
    """As in an export of an hour: it has sent for days."""
    old, new = ([connection(cookie, at, start, at) for at in (8640, 8645)] for cookie, start in ((1, 0), (2, 8635)))
    found = connections(flows_of(*old, *new), None)
    assert sorted(zip(found.growth["total_retrans"].tolist(), found.partial.tolist(), strict=True)) == [
        (5, True),
        (8645, False),
    ]


def test_connections_without_a_cookie_are_told_apart_by_their_ports() -> None:
    records = [{**connection(1, 1, 0, count), "sk_cookie": None, "sport": count} for count in (3, 5)]
    found = connections(flows_of(*records), None)
    assert sorted(found.growth["total_retrans"].tolist()) == [3, 5]


def test_a_counter_that_the_kernel_lacks_costs_only_that_one() -> None:
    found = connections(flows_of(connection(1, 1, 0, 5, dsack_dups=None, srtt_us=None)), None)
    assert (found.growth["total_retrans"].tolist(), found.growth["dsack_dups"].tolist()) == ([5], [0])


def test_the_syn_acks_of_accepted_connections_are_segments_too() -> None:
    records = [connection(1, at, 0, 1, retrans_syn_ack=1, role="server") for at in (1, 2)]
    assert connections(flows_of(*records), None).growth["segs_out"].tolist() == [10 + 1 + 1]


def test_each_failed_connect_of_a_socket_counts(tmp_path: Path) -> None:
    """One that finds no free port has none that would tell them apart."""
    error = {"reason": "close", "state": "SYN_SENT", "error": "EADDRNOTAVAIL", "daddr": "10.9.9.9"}
    records = [{**connection(1, at, at - 1, 0), **error} for at in (1, 3, 5)]
    path = write_container(tmp_path / "flows.avro", FLOWS, [*records, records[-1]])
    summary = summarize(collect(Files([path]), Period()), Period())
    assert summary.totals is not None
    assert (summary.totals.failed, summary.worst["peer"][0].failed) == (3, 3)
    assert [(each.error, each.peer, each.count) for each in summary.failures] == [("EADDRNOTAVAIL", "10.9.9.9", 3)]


def test_nothing_limits_a_connect_without_an_answer(tmp_path: Path) -> None:
    records = [connection(cookie, 1, 0, 2, state=state) for cookie, state in enumerate(("SYN_SENT", "ESTABLISHED"), 1)]
    path = write_container(tmp_path / "flows.avro", FLOWS, records)
    summary = summarize(collect(Files([path]), Period()), Period())
    assert [(each.limit, each.connections) for each in summary.limited] == [("idle", 1)]


def test_without_connection_records_there_are_counts_but_no_ratios(scene_folder: Path, tmp_path: Path) -> None:
    only = Files([scene_folder / "tcp_retransmit.avro"])
    (first, second) = report(only, Period(), tmp_path / "report.html", None)
    assert first == "150 segments were retransmitted."
    assert second == "Worst peer: 10.0.0.7, 150 segments, mostly fast."
    assert "ratios are unknown" in (tmp_path / "report.html").read_text()


def test_connection_records_from_before_the_period_alone_give_no_ratios(tmp_path: Path) -> None:
    flows = write_container(tmp_path / "flows.avro", FLOWS, [connection(1, 0, 0, 9)])
    lost = [record(RETRANSMITS, cause="rto", segs=3, ts_ns=NOON_NS + SECOND_NS)]
    events = write_container(tmp_path / "retransmits.avro", RETRANSMITS, lost)
    first, _ = report(Files([flows, events]), Period(NOON_NS + 1), tmp_path / "report.html", None)
    assert first == "3 segments were retransmitted."


@pytest.mark.parametrize("longest_us", [60, 900, 900_000])
def test_the_axis_of_round_trip_times_has_numbers(longest_us: int) -> None:
    """Within a decade, matplotlib labels the axis with formulas."""
    drawn = svg(partial(draw_srtt, np.array([22, 31, 40, longest_us])), "srtt", 8.5, 2.8)
    labels = re.findall(r"<text [^>]*>([^<]*)</text>", drawn)
    assert not [label for label in labels if "$" in label or "mathdefault" in label]
    assert {"0.05", "0.1"} & set(labels)


def test_a_connection_is_drawn_in_its_worst_seconds_with_its_segments_by_cause(tmp_path: Path) -> None:
    times = ((0, 1), (100, 9), (119, 3), (120, 2))
    events = [
        record(RETRANSMITS, cpu=0, cpu_seq=number, cause="rto", ts_ns=NOON_NS + at * SECOND_NS, segs=segs)
        for number, (at, segs) in enumerate(times, 1)
    ]
    path = write_container(tmp_path / "events.avro", RETRANSMITS, events)
    report(Files([path]), Period(), tmp_path / "report.html", None)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "15 segments retransmitted" in text
    assert "the worst 20 s" in text
    assert "retransmitted: rto (12)" in text


def test_beside_the_worst_connection_those_with_few_retransmissions_are_not_drawn(tmp_path: Path) -> None:
    events = [
        record(RETRANSMITS, cpu=0, cpu_seq=number, cause="rto", segs=segs, sk_cookie=number, sport=number)
        for number, segs in enumerate((3, 2), 1)
    ]
    path = write_container(tmp_path / "events.avro", RETRANSMITS, events)
    summary = summarize(collect(Files([path]), Period()), Period())
    assert [flow.retransmitted for flow in summary.flows] == [3]


def test_copies_of_an_event_count_once(tmp_path: Path) -> None:
    """As after a crash of the producer."""
    events = [
        record(RETRANSMITS, host=host, cpu=cpu, cpu_seq=number, cause="rto", segs=3)
        for host, cpu, number in (("a", 0, 1), ("a", 0, 1), ("a", 1, 1), ("b", 0, 1), ("a", 0, 2), ("a", 0, 1))
    ]
    path = write_container(tmp_path / "events.avro", RETRANSMITS, events)
    summary = summarize(collect(Files([path]), Period()), Period())
    assert summary.timeline is not None
    assert summary.timeline.total == 4 * 3
    assert {line.name: line.retransmitted for line in summary.worst["host"]} == {"a": 9, "b": 3}


def test_a_missing_event_is_in_the_data_quality(tmp_path: Path) -> None:
    events = [record(RETRANSMITS, cpu=0, cpu_seq=number, cause="rto", segs=1) for number in (1, 2, 5)]
    path = write_container(tmp_path / "events.avro", RETRANSMITS, events)
    report(Files([path]), Period(), tmp_path / "report.html", None)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "2 events are missing. If `rebpf trace -w` wrote the files with a filter" in " ".join(text.split())


def test_segments_of_connections_without_records_are_told_apart_from_the_totals(tmp_path: Path) -> None:
    event = record(RETRANSMITS, cause="syn_ack", segs=3, ts_ns=NOON_NS)
    folder = tmp_path / "events"
    folder.mkdir()
    write_container(folder / "retransmits.avro", RETRANSMITS, [event])
    write_container(folder / "flows.avro", FLOWS, [connection(1, 1, 0, 2)])
    report(Files([folder]), Period(), tmp_path / "report.html", None)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    assert "the events of 3 retransmitted segments." in text
    assert "An incoming connection whose SYN-ACK is never answered has none." in text


def test_an_empty_period_and_an_unwritable_file_are_one_line(scene_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no connection records and no retransmissions in this period"):
        report(Files([scene_folder]), Period(until_ns=1), tmp_path / "report.html", None)
    after_the_last = Period(NOON_NS + 119 * SECOND_NS)
    with pytest.raises(UnavailableError, match="no connection records and no retransmissions in this period"):
        report(Files([scene_folder]), after_the_last, tmp_path / "report.html", None)
    with pytest.raises(UnavailableError, match=r"in this period match the filter$"):
        report(Files([scene_folder]), Period(), tmp_path / "report.html", None, matches=matching("peer 1.2.3.4"))
    with pytest.raises(UnavailableError, match=r"cannot write to .*missing.report.html: No such file"):
        report(Files([scene_folder]), Period(), tmp_path / "missing" / "report.html", None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_noticed_before_the_events_are_read(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"cannot write to .*missing.report.png: No such file"):
        report(Files([tmp_path / "none"]), Period(), tmp_path / "report.html", tmp_path / "missing" / "report.png")


def test_the_commands_are_of_the_same_period_whenever_they_are_run(scene_folder: Path) -> None:
    period = Period(NOON_NS, NOON_NS + 3600 * SECOND_NS)
    summary = summarize(collect(Files([scene_folder]), period), period)
    *_, export = _commands(summary, ["--config", "a b.toml"], "port 443")
    assert export.startswith(
        "rebpf export --config 'a b.toml' --since 2026-09-21T12:00:00Z --until 2026-09-21T13:00:00Z"
        " --filter 'port 443' -o events  #"
    )
