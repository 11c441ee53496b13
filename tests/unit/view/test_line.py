"""Lines of a trace: fixed columns, the cause first, relative sequence numbers, and nothing that a terminal obeys."""

import re
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from producer.events import FLOWS, KNOWN, RETRANSMITS, TRANSMITS
from producer.host.endpoints import endpoint
from producer.view.line import Lines, duration
from tests.support.records import RETRANSMIT, TRANSMIT
from tests.support.views import decoded, flows, retransmits, transmits

ENDS = {"saddr": "10.0.0.1", "sport": 443, "daddr": "10.2.0.9", "dport": 51234, "sk_cookie": 5}


def lines(width: int, *, color: bool = False, hosts: bool = False) -> list[str]:
    shown = Lines(width, hosts=hosts, color=color)
    events = retransmits(
        {**ENDS, "cause": "rto", "retransmit_no": 2, "seq": (1 << 32) - 1, "payload_len": 1448, "rto_us": 204_000},
        {**ENDS, "cause": "slow_start", "seq": 1447, "payload_len": 1448, "rto_us": 204_000, "segs": 3},
    )
    failed = flows({**ENDS, "reason": "close", "error": 111, "state": "SYN_SENT", "comm": "curl"})
    records = [*decoded(RETRANSMITS, events).rows(), *decoded(FLOWS, failed).rows()]
    return [shown.header(), *shown.lines(records)]


@pytest.fixture(autouse=True)
def today(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all records be of today, except where days are tested."""
    if "zone" not in request.fixturenames:
        monkeypatch.setattr("producer.view.line._day", lambda time_s: "2026-11-30")


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Set the local time zone."""

    def set_zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield set_zone
    monkeypatch.undo()
    time.tzset()


def shown_at(*times: str) -> list[str]:
    """Return the header, and the times and days of the lines of events."""
    events = [{**RETRANSMIT, "ts_ns": int(datetime.fromisoformat(each).timestamp() * 1e9)} for each in times]
    view = Lines(80, hosts=False, color=False)
    shown = "\n".join(view.lines(events))
    cut = [line if line.startswith("--") else line[:8] for line in shown.splitlines()]
    return [view.header().partition("CAUSE")[0].rstrip(), *cut]


def test_the_day_is_shown_when_it_is_not_today_and_when_it_changes(zone: Callable[[str], None]) -> None:
    zone("UTC")
    today = datetime.now(UTC).replace(hour=12)
    assert shown_at(today.isoformat()) == ["TIME", "12:" + f"{today:%M:%S}"]
    found = shown_at("2026-02-27T23:59:59Z", "2026-02-28T00:00:01Z", "2026-02-28T23:00:00Z", today.isoformat())
    days = ["-- 2026-02-27", "23:59:59", "-- 2026-02-28", "00:00:01", "23:00:00"]
    assert found == ["TIME", *days, f"-- {today:%Y-%m-%d}", "12:" + f"{today:%M:%S}"]


def test_times_that_are_not_utc_name_their_zone_also_when_clocks_change(zone: Callable[[str], None]) -> None:
    zone("<+0530>-5:30")
    assert shown_at("2026-02-27T18:29:59Z", "2026-02-27T18:30:00Z") == [
        *("TIME +0530", "-- 2026-02-27 +0530", "23:59:59", "-- 2026-02-28 +0530", "00:00:00"),
    ]
    zone("CET-1CEST,M3.5.0,M10.5.0/3")
    assert shown_at("2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z")[1:] == [
        *("-- 2026-10-25 +0200", "02:30:00", "-- 2026-10-25 +0100", "02:30:00"),
    ]


@pytest.mark.parametrize("hosts", [False, True])
@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_lines_fit_the_screen_and_columns_stay_in_place(width: int, *, hosts: bool) -> None:
    shown = lines(width, hosts=hosts)
    assert all(len(line) <= width for line in shown)
    assert ("HOST" in shown[0]) == hosts
    for title in ("CAUSE", "WHO", "FLOW" if width >= (120 if hosts else 100) else "PEER"):
        start = shown[0].index(title)
        assert all(line[start - 1] == " " and line[start] != " " for line in shown[1:]), title


def test_names_of_flows_are_not_kept() -> None:
    """A topic's writer can choose others for each record."""
    [record] = decoded(RETRANSMITS, retransmits({**ENDS, "cause": "rto"})).rows()
    shown = Lines(200, hosts=True, color=False)
    shown.lines([record])
    tracemalloc.start()
    try:
        for number in range(1000):
            shown.lines([{**record, "host": f"{number:04096}"}])
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_cause_comes_first_and_sequence_numbers_are_relative() -> None:
    header, rto, rest, failed = lines(200)
    assert header.split()[:2] == ["TIME", "CAUSE"]
    assert rto.split()[1:4] == ["rto", "#2", "0"]
    assert rest.split()[1:3] == ["slow_start", "1448"]
    assert failed.split()[1:3] == ["connect", "ECONNREFUSED"]
    assert "curl" in failed
    assert rto.endswith("10.0.0.1:443 > 10.2.0.9:51234")


def test_a_narrow_screen_shows_the_peer() -> None:
    for width in (60, 80):
        assert lines(width)[1].endswith(" 10.2.0.9:51234")
        assert "10.0.0.1" not in lines(width)[1]
    assert lines(40)[1].split()[1:] == ["rto", "#2", "10.2.0.9:51234"]


def test_a_round_trip_time_that_is_not_measured_is_no_time() -> None:
    assert " 0us " not in plain({**RETRANSMIT, "srtt_us": 0})


def test_a_long_flow_does_not_wrap() -> None:
    shown = Lines(100, hosts=True, color=False)
    ends = {**ENDS, "saddr": "10.111.202.25", "sport": 46246, "cause": "rto", "comm": "a-long-name-too"}
    (line,) = shown.lines(decoded(RETRANSMITS, retransmits(ends)).rows())
    assert line.endswith(" 10.2.0.9:51234")
    assert len(line) <= 100


def test_only_new_segments_and_failed_connections_are_events() -> None:
    shown = Lines(200, hosts=False, color=False)
    sent = decoded(TRANSMITS, transmits({**ENDS, "is_retransmit": 1}, {**ENDS, "is_retransmit": 0}))
    assert [line.split()[1] for line in shown.lines(sent.rows())] == ["sent"]
    closed = decoded(FLOWS, flows({"reason": "close", "unknown": 1 << 12}, {"reason": "interval", "error": 111}))
    assert [*shown.lines(closed.rows())] == []


def test_the_record_of_a_connection_has_its_retransmissions_so_far() -> None:
    shown = Lines(80, hosts=False, color=False, connections=True)
    records = flows(
        {**ENDS, "reason": "interval", "unknown": KNOWN["error"], "ts": 1},
        {**ENDS, "reason": "interval", "unknown": KNOWN["error"], "total_retrans": 7, "ts": 2},
        {**ENDS, "reason": "close", "unknown": KNOWN["error"], "total_retrans": 123_456, "ts": 3},
    )
    lines = shown.lines(decoded(FLOWS, records).rows())
    assert [line[13:34].rstrip() for line in lines] == ["open", "open, 7 retr", "closed, 123456 retr"]


def test_a_connect_that_its_process_gave_up_is_a_failed_one() -> None:
    given_up = {**ENDS, "reason": "close", "state": "SYN_SENT", "unknown": KNOWN["error"]}
    (line,) = Lines(200, hosts=False, color=False).lines(decoded(FLOWS, flows(given_up)).rows())
    assert line.split()[1:3] == ["connect", "closed"]


def test_faults_have_colors() -> None:
    assert "\x1b[1;31m" in lines(80, color=True)[1]
    assert "\x1b[33m" in lines(80, color=True)[2]
    assert re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines(80, color=True)[1:])) == "\n".join(lines(80)[1:])


@pytest.mark.parametrize(
    ("us", "text"), [(None, "-"), (0, "0us"), (999, "999us"), (1000, "1ms"), (204_000, "204ms"), (1_500_000, "1.5s")]
)
def test_durations_have_three_digits_and_a_unit(us: int | None, text: str) -> None:
    assert duration(us) == text


def plain(record: dict[str, Any]) -> str:
    return Lines(200, hosts=True, color=False).line(record)


def test_an_ipv6_endpoint_is_in_brackets() -> None:
    assert endpoint("fd00::2", 443) == "[fd00::2]:443"


def test_a_failed_retransmit_says_the_error() -> None:
    assert " rto #3 err -1 " in plain({**RETRANSMIT, "err": -1})


def test_unknown_values_are_left_out() -> None:
    unknown = dict.fromkeys(("retransmit_no", "rto_us", "srtt_us"))
    assert plain({**RETRANSMIT, **unknown}).split()[1:3] == ["rto", "web-1"]


def test_foreign_escape_sequences_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in plain({**RETRANSMIT, "cause": "\x1b]0;gone\x07", "saddr": "\x1b[2J", "host": "\x1b[2J"})


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2000) | st.binary(max_size=20)


@given(
    changes=st.dictionaries(st.sampled_from(sorted(RETRANSMIT)), values | st.lists(values, max_size=3), max_size=5),
    missing=st.sets(st.sampled_from(sorted(RETRANSMIT)), max_size=2),
)
@example(changes={"ts_ns": 1 << 62}, missing=set())
@example(changes={"ts_ns": 1 << 80}, missing=set())
@example(changes={"ts_ns": 1 << 5000}, missing=set())
@example(changes={"ts_ns": float("nan")}, missing=set())
@example(changes={"ts_ns": "x"}, missing=set())
@example(changes={"sk_cookie": []}, missing=set())
@example(changes={"saddr": 5}, missing=set())
@example(changes={"srtt_us": "57"}, missing=set())
@example(changes={"seq": "x" * (1 << 20), "cause": "y" * (1 << 20), "saddr": "\x1b" * (1 << 20)}, missing=set())
def test_a_record_of_any_types_is_a_bounded_line_or_counted_and_costs_no_other(
    changes: dict[str, Any], missing: set[str]
) -> None:
    view = Lines(200, hosts=True, color=False)
    odd = {name: value for name, value in {**RETRANSMIT, **changes}.items() if name not in missing}
    shown = view.lines([RETRANSMIT, odd, TRANSMIT])
    assert len(shown) + view.rejected.total() + (not is_shown(odd)) == 3
    assert {plain(RETRANSMIT).split()[0], plain(TRANSMIT).split()[0]} <= {line.split()[0] for line in shown}
    assert all(line.isprintable() and len(line) < 8192 for line in [*shown, *view.rejected])


def is_shown(odd: dict[str, Any]) -> bool:
    """Without a cause, it is not known whether this segment was sent before."""
    return "cause" in odd or not odd.get("is_retransmit", False)


def test_lines_come_in_the_order_of_time() -> None:
    records = [{**TRANSMIT, "ts_ns": TRANSMIT["ts_ns"] + late, "payload_len": late} for late in (3, 1, 2)]
    shown = Lines(200, hosts=False, color=False).lines(records)
    assert [line.split()[3] for line in shown] == ["1", "2", "3"]


def test_reasons_are_bounded() -> None:
    view = Lines(200, hosts=True, color=False)
    assert view.lines({**TRANSMIT, "ts_ns": "x", str(number): 0} for number in range(3)) == []
    assert view.lines({**TRANSMIT, "ts_ns": 10**30 + 10**20 * number} for number in range(1000)) == []
    assert view.rejected.total() == 1003
    assert len(view.rejected) <= 101
