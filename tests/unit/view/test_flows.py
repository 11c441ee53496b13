"""The table of `rebpf top`: growth from cumulative counters, groups, and what happened in the last seconds."""

from typing import Any

import numpy as np
import pytest

from producer.cli.view import GROUPS
from producer.events import CAUSES, FLOWS, KNOWN, RETRANSMITS
from producer.view import flows as view_flows
from producer.view.flows import HISTORY_S, Flows
from producer.view.table import SORTS, Line, Table, details, table
from tests.support.encoding import OFFSET_NS
from tests.support.views import decoded, flows, retransmits

ENDS = {"saddr": "10.0.0.1", "sport": 443, "daddr": "10.2.0.9", "dport": 51234, "sk_cookie": 5}
NOW = 1000.0


def add_flows(to: Flows, now: float, *events: dict[str, Any]) -> None:
    to.add(decoded(FLOWS, flows(*({**ENDS, "reason": "interval", **event} for event in events))), now)


def add_retransmits(to: Flows, now: float, *events: dict[str, Any]) -> None:
    to.add(decoded(RETRANSMITS, retransmits(*({**ENDS, "cause": "rto", **event} for event in events))), now)


def shown(of: Flows, by: str = "peer", now: float = NOW, sort: str = "retransmitted") -> Table:
    return table(of, by, sort, now, 10.0, 50)


def started() -> Flows:
    """Return flows of a view that began just after the clock's start."""
    return Flows(OFFSET_NS + 1)


def test_an_old_connection_counts_from_its_first_record() -> None:
    found = started()
    add_flows(found, NOW - 2, {"segs_out": 1000, "total_retrans": 100})
    assert shown(found).lines[0].segments == 0
    add_flows(found, NOW - 1, {"segs_out": 1040, "total_retrans": 110})
    [line] = shown(found).lines
    assert (line.name, line.segments, line.ratio, line.flows) == ("10.2.0.9", 4.0, 0.25, 1)


def test_a_new_connection_counts_from_its_beginning() -> None:
    found = started()
    add_flows(found, NOW - 1, {"segs_out": 20, "total_retrans": 1, "start_ns": 500})
    assert shown(found).lines[0].segments == 2.0


def test_the_syn_acks_of_accepted_connections_are_segments_too() -> None:
    found = started()
    syn_acks = {"segs_out": 4, "total_retrans": 2, "retrans_syn_ack": 2, "start_ns": 500}
    add_flows(found, NOW - 1, {**syn_acks, "role": "server", "reason": "close"})
    [line] = shown(found).lines
    assert (line.segments, line.ratio) == (0.7, 2 / 7)


def test_names_beyond_the_limit_are_null_until_others_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_flows, "MAX_CHARACTERS", 500)
    found = started()
    for number in range(1, 101):
        event = {"comm": f"process-{number:03}", "sk_cookie": number, "segs_out": 20, "start_ns": 500}
        add_flows(found, NOW - 1, event)
    assert sum(map(len, found.texts())) <= 500
    lines = {line.name: line.flows for line in shown(found, "comm").lines}
    assert 0 < lines["-"] < 100
    assert sum(lines.values()) == 100
    found.forget(NOW + 10_000)
    add_flows(found, NOW + 10_000, {"comm": "process-101", "sk_cookie": 101, "segs_out": 20, "start_ns": 500})
    assert "process-101" in found.texts()


def test_several_records_of_a_connection_in_a_batch_count_once() -> None:
    found = started()
    add_flows(found, NOW - 1, {"segs_out": 10, "start_ns": 5}, {"segs_out": 30, "start_ns": 5, "reason": "close"})
    [line] = shown(found).lines
    assert (line.segments, line.flows) == (3.0, 0)


def test_a_closed_connection_stays_closed_until_its_socket_connects_again() -> None:
    """While it closed on one CPU, another one reported it as open."""
    found = started()
    closing, behind = {"segs_out": 30, "start_ns": 5, "reason": "close", "ts": 900}, {"start_ns": 5, "ts": 901}
    for events in ([closing, behind], [behind]):
        add_flows(found, NOW - 1, *events)
        assert shown(found).lines[0].flows == 0
    add_flows(found, NOW - 1, {"segs_out": 1, "start_ns": 950, "ts": 960})
    assert shown(found).lines[0].flows == 1


def test_retransmissions_are_counted_by_cause_and_second() -> None:
    found = started()
    add_retransmits(found, NOW - 30, {"segs": 7, "cause": "tlp"})
    add_retransmits(found, NOW - 1, {"segs": 2}, {"segs": 3, "cause": "fast"})
    [line] = shown(found).lines
    assert line.retransmitted == 0.5
    assert line.causes == {"rto": 2, "fast": 3, "tlp": 7}
    assert (line.history[-2], line.history[-31], sum(line.history)) == (5, 7, 12)


def test_a_retransmission_that_was_sampled_stands_for_others() -> None:
    found = started()
    add_flows(found, NOW - 1, {"segs_out": 2000, "total_retrans": 100, "start_ns": 500})
    add_retransmits(found, NOW - 1, {"segs": 2, "sample_rate": 50})
    [line] = shown(found).lines
    assert (line.retransmitted, line.segments * line.ratio, line.causes) == (10.0, 10.0, {"rto": 100})


def test_a_line_of_a_cause_has_its_retransmissions_alone() -> None:
    found = started()
    add_flows(found, NOW - 1, {"segs_out": 20, "total_retrans": 5, "start_ns": 500, "srtt_us": 100})
    add_retransmits(found, NOW - 1, {"segs": 2, "cause": "other"}, {"segs": 3, "cause": "fast"})
    shown_by_cause = shown(found, "cause", sort="srtt")
    assert {line.name: line.retransmitted for line in shown_by_cause.lines} == {"fast": 0.3, "other": 0.2}
    for line in shown_by_cause.lines:
        assert (line.segments, line.ratio, line.flows, line.srtt_p50_us, line.limit) == (0, None, 0, None, None)
    assert (shown_by_cause.total.segments, shown_by_cause.total.flows) == (2.0, 1)


def test_nothing_limits_what_is_not_established() -> None:
    found = started()
    add_flows(found, NOW - 1, {"state": "SYN_SENT", "segs_out": 3, "total_retrans": 2, "start_ns": 500})
    add_retransmits(found, NOW - 1, {"segs": 2, "cause": "syn"}, {"segs": 3, "cause": "syn_ack", "sk_cookie": 9})
    assert shown(found).lines[0].limit is None
    assert [each.limit for each in details(found, "cause", "syn", NOW, 5)] == [None]
    assert [each.limit for each in details(found, "cause", "syn_ack", NOW, 5)] == [None], "without a record of it"
    add_flows(found, NOW, {"state": "ESTABLISHED", "segs_out": 5, "total_retrans": 2, "start_ns": 500})
    assert shown(found).lines[0].limit == details(found, "cause", "syn", NOW, 5)[0].limit == "idle"


def test_a_failed_connect_is_counted() -> None:
    found = started()
    add_flows(found, NOW - 1, {"reason": "close", "state": "SYN_SENT", "error": 110, "start_ns": 5})
    add_flows(found, NOW - 1, {"reason": "close", "state": "ESTABLISHED", "error": 104, "sk_cookie": 6})
    assert shown(found).lines[0].failed == 1


def test_a_connect_that_its_process_gave_up_is_counted_as_alerts_and_reports_do() -> None:
    found = started()
    given_up = {"reason": "close", "state": "SYN_SENT", "unknown": KNOWN["error"], "start_ns": 5}
    add_flows(found, NOW - 1, given_up, given_up)
    assert shown(found).lines[0].failed == 1


def test_a_connect_without_a_port_of_its_own_belongs_to_the_peers_port() -> None:
    found = started()
    add_flows(found, NOW - 1, {"reason": "close", "state": "SYN_SENT", "error": 99, "sport": 0, "dport": 8080})
    assert [line.name for line in shown(found, "port").lines] == ["8080"]


def test_lines_are_sorted() -> None:
    found = started()
    for number, count in enumerate((3, 9, 1)):
        where = {"daddr": f"10.2.0.{number}", "sk_cookie": 10 + number, "start_ns": 9}
        add_flows(found, NOW - 1, {**where, "segs_out": 100 - count, "total_retrans": count, "srtt_us": count * 1000})
        add_retransmits(found, NOW - 1, {**where, "segs": count})
    names = {sort: [line.name[-1] for line in shown(found, sort=sort).lines] for sort in SORTS}
    assert names["retransmitted"] == names["ratio"] == ["1", "0", "2"]
    assert names["segments"] == ["2", "0", "1"]
    assert names["name"] == ["0", "1", "2"]
    assert {len(each) for each in names.values()} == {3}
    assert shown(found).total.retransmitted == pytest.approx(1.3)


def test_lines_are_sorted_by_the_round_trip_times_that_they_show() -> None:
    found = started()
    for peer, times_ms in enumerate(((10, 10, 900), (300,), (20, 30))):
        for number, srtt_ms in enumerate(times_ms):
            where = {"daddr": f"10.2.0.{peer}", "sk_cookie": 10 * peer + number + 1}
            add_flows(found, NOW - 1, {**where, "srtt_us": srtt_ms * 1000})
    lines = shown(found, sort="srtt").lines
    assert [(line.name[-1], line.srtt_p50_us) for line in lines] == [("1", 300_000), ("2", 25_000), ("0", 10_000)]


def test_connections_are_sorted_by_address_and_port() -> None:
    found = started()
    ends = [("10.0.0.10", 80), ("10.0.0.9", 8080), ("10.0.0.9", 443)]
    for number, (peer, port) in enumerate(ends):
        where = {"daddr": peer, "dport": port, "sk_cookie": 10 + number}
        add_flows(found, NOW - 1, {**where, "segs_out": 100, "start_ns": 9})
    names = [line.name.partition(" > ")[2] for line in shown(found, "flow", sort="name").lines]
    assert names == ["10.0.0.9:443", "10.0.0.9:8080", "10.0.0.10:80"]


def test_equal_lines_are_in_the_order_of_their_names() -> None:
    found = started()
    for number in (20, 3, 10):
        add_flows(found, NOW - 1, {"daddr": f"10.2.0.{number}", "sk_cookie": number, "start_ns": 9, "segs_out": number})
    assert [line.name for line in shown(found).lines] == ["10.2.0.3", "10.2.0.10", "10.2.0.20"]


@pytest.mark.parametrize("by", GROUPS)
def test_every_grouping_has_the_same_retransmissions(by: str) -> None:
    found = started()
    for number in range(40):
        where = {"daddr": f"10.{number % 3}.0.{number}", "dport": 80 + number % 2, "sk_cookie": 1 + number}
        add_flows(found, NOW - 1, {**where, "comm": f"p{number % 5}", "segs_out": 10, "start_ns": 9})
        add_retransmits(found, NOW - 1, {**where, "cause": CAUSES[number % 6]})
    lines = shown(found, by).lines
    assert sum(line.retransmitted for line in lines) == pytest.approx(4.0)
    expected = {"peer": 40, "flow": 40, "host": 1, "port": 2, "subnet": 3, "comm": 5, "cause": 6}
    assert len(lines) == expected.get(by, len(lines))
    worst = details(found, by, lines[0].name, NOW, 5)
    assert worst
    assert all(each.retransmitted for each in worst)


def test_details_show_the_worst_connections() -> None:
    found = started()
    add_flows(found, NOW - 1, {"segs_out": 50, "total_retrans": 5, "start_ns": 5, "comm": "curl"})
    add_retransmits(found, NOW - 1, {"segs": 4, "lost_out": 3, "snd_cwnd": 7, "rto_us": 204_000})
    [detail] = details(found, "peer", "10.2.0.9", NOW, 5)
    assert detail.flow == "10.0.0.1:443 > 10.2.0.9:51234"
    assert (detail.who, detail.retransmitted, detail.ratio) == ("curl", 4, 0.1)
    assert (detail.lost_out, detail.snd_cwnd, detail.rto_us) == (3, 7, 204_000)


def test_details_are_of_the_last_minute() -> None:
    found = started()
    add_flows(found, NOW - 99, {"segs_out": 1_000_000}, {"sk_cookie": 6, "segs_out": 1_000_000, "total_retrans": 9999})
    add_flows(found, NOW - 1, {"segs_out": 1_000_100, "total_retrans": 50})
    add_retransmits(found, NOW - 1, {"segs": 50})
    assert [(each.retransmitted, each.ratio) for each in details(found, "peer", "10.2.0.9", NOW, 5)] == [
        (50, 0.5),
        (0, None),
    ]


def test_retransmissions_older_than_a_minute_are_forgotten() -> None:
    found = started()
    add_retransmits(found, NOW, {"daddr": "10.9.9.9", "sk_cookie": 8})
    add_retransmits(found, NOW + HISTORY_S / 2, {"segs": 2})
    before = shown(found, now=NOW + HISTORY_S / 2)
    assert [line.name for line in before.lines] == ["10.2.0.9", "10.9.9.9"]
    found.forget(NOW + HISTORY_S + 1)
    [line] = shown(found, now=NOW + HISTORY_S + 1).lines
    assert (line.name, line.causes) == ("10.2.0.9", {"rto": 2})
    assert "10.9.9.9" not in found.texts()
    add_flows(found, NOW + HISTORY_S + 1, {"segs_out": 10, "start_ns": 9})
    assert shown(found, now=NOW + HISTORY_S + 1).lines[0].segments == 1.0


def test_an_open_connection_is_remembered_between_rare_records() -> None:
    found = started()
    add_flows(found, NOW, {"segs_out": 100}, {"segs_out": 5, "sk_cookie": 6, "reason": "close"})
    found.forget(NOW + 2 * HISTORY_S)
    assert len(found.rows) == 1
    add_flows(found, NOW + 2 * HISTORY_S, {"segs_out": 120})
    assert shown(found, now=NOW + 2 * HISTORY_S).lines[0].segments == 2.0


def test_segments_without_a_socket_are_distinguished_by_their_addresses() -> None:
    found = started()
    add_retransmits(found, NOW, {"sk_cookie": 0, "cause": "syn_ack"}, {"sk_cookie": 0, "dport": 5, "cause": "syn_ack"})
    assert len(shown(found, "flow").lines) == 2


def test_an_empty_view_has_no_lines() -> None:
    for by in GROUPS:
        assert shown(started(), by).lines == []
    assert shown(started()).total == Line("total", 0, 0, None, [0] * 60, {}, None, None, 0, 0, None)


def test_own_namespace_is_counted_apart() -> None:
    found = Flows(0, netns=7)
    add_retransmits(found, NOW, {"netns": 7, "segs": 3}, {"netns": 8, "segs": 5})
    assert found.in_netns == 3


def test_round_trips_have_percentiles() -> None:
    found = started()
    add_flows(found, NOW, *({"sk_cookie": 1 + each, "srtt_us": 1000 * each} for each in range(101)))
    [line] = shown(found).lines
    assert (line.srtt_p50_us, line.srtt_p95_us) == tuple(np.percentile(range(1000, 101_000, 1000), [50, 95]))
