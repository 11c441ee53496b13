"""The line of an event: tcpdump's notation, colours, and no control characters."""

import re
from datetime import datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from producer.consume.event_line import EventFormatter, flag_letters
from producer.host.endpoints import endpoint
from tests.support.records import RETRANSMIT, TRANSMIT


def plain(record: dict[str, Any]) -> str:
    return EventFormatter(color=False).line(record)


@pytest.mark.parametrize(
    ("tcp_flags", "letters"),
    [(0x02, "S"), (0x12, "S."), (0x18, "P."), (0x11, "F."), (0x04, "R"), (0x10, "."), (0xC2, "SEW"), (0, "none")],
)
def test_flags_are_tcpdumps_letters(tcp_flags: int, letters: str) -> None:
    assert flag_letters(tcp_flags) == letters


def test_an_ipv6_endpoint_is_in_brackets() -> None:
    assert endpoint("fd00::2", 443) == "[fd00::2]:443"


def test_a_transmit_has_time_flow_flags_and_numbers() -> None:
    time = datetime.fromtimestamp(1_790_000_000.123456).strftime("%H:%M:%S.123456")
    assert plain(TRANSMIT) == (f"{time} 10.0.0.1:40001 > [fd00::2]:443 [P.] seq 4294967290:1442 ack 77 len 1448 segs 1")


def test_a_retransmit_says_why() -> None:
    assert plain(RETRANSMIT).endswith("segs 1 retransmit rto #3 rto 204ms srtt 0.057ms")


def test_a_failed_retransmit_says_the_error() -> None:
    assert plain({**RETRANSMIT, "err": -1}).endswith("err -1")


FLOW: dict[str, Any] = {
    **{name: TRANSMIT[name] for name in ("ts_ns", "saddr", "sport", "daddr", "dport")},
    "reason": "close",
    "state": "SYN_SENT",
    "error": "ECONNREFUSED",
    "bytes_sent": 0,
    "bytes_received": 1,
    "segs_out": 3,
    "total_retrans": 2,
    "srtt_us": 57,
    "role": "client",
    "comm": "curl",
}


def test_the_record_of_a_connection_says_how_it_ended_what_it_sent_and_whose_it_is() -> None:
    assert plain(FLOW).endswith(
        "10.0.0.1:40001 > [fd00::2]:443 close ECONNREFUSED out 0 in 1 segs 3 retransmitted 2 srtt 0.057ms client curl"
    )
    unknown = dict.fromkeys(("error", "bytes_sent", "bytes_received", "segs_out", "total_retrans", "srtt_us", "comm"))
    assert plain({**FLOW, **unknown}).endswith("[fd00::2]:443 close SYN_SENT")


def test_what_is_unknown_is_left_out() -> None:
    unknown = dict.fromkeys(("ack_seq", "retransmit_no", "rto_us", "srtt_us"))
    assert plain({**RETRANSMIT, **unknown}).endswith("seq 4294967290:1442 len 1448 segs 1 retransmit rto")


@pytest.mark.parametrize(("record", "color"), [(TRANSMIT, "\x1b[32m"), (RETRANSMIT, "\x1b[33m"), (FLOW, "\x1b[36m")])
def test_colours_tell_the_kinds_apart(record: dict[str, Any], color: str) -> None:
    line = EventFormatter(color=True).line(record)
    assert f"{color}10.0.0.1:40001" in line
    assert re.sub(r"\x1b\[[\d;]*m", "", line) == plain(record)


def test_escape_sequences_of_a_stranger_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in plain({**RETRANSMIT, "cause": "\x1b]0;gone\x07", "saddr": "\x1b[2J"})


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
@example(changes={"tcp_flags": None}, missing=set())
@example(changes={"saddr": 5}, missing=set())
@example(changes={"srtt_us": "57"}, missing=set())
@example(changes={"seq": "x" * (1 << 20), "cause": "y" * (1 << 20), "saddr": "\x1b" * (1 << 20)}, missing=set())
def test_a_record_of_any_types_is_a_bounded_line_or_counted_and_costs_no_other(
    changes: dict[str, Any], missing: set[str]
) -> None:
    formatter = EventFormatter(color=False)
    odd = {name: value for name, value in {**RETRANSMIT, **changes}.items() if name not in missing}
    lines = formatter.lines([RETRANSMIT, odd, TRANSMIT])
    assert len(lines) + formatter.rejected.total() == 3
    assert {plain(RETRANSMIT), plain(TRANSMIT)} <= set(lines)
    assert all(line.isprintable() and len(line) < 8192 for line in [*lines, *formatter.rejected])


def test_lines_come_in_the_order_of_time() -> None:
    records = [{**TRANSMIT, "ts_ns": TRANSMIT["ts_ns"] + late, "seq": late} for late in (3, 1, 2)]
    assert [line.split("seq ")[1][0] for line in EventFormatter(color=False).lines(records)] == ["1", "2", "3"]


def test_reasons_are_bounded() -> None:
    formatter = EventFormatter(color=False)
    assert formatter.lines({**TRANSMIT, "ts_ns": "x", str(number): 0} for number in range(3)) == []
    assert formatter.lines({**TRANSMIT, "ts_ns": 10**30 + 10**20 * number} for number in range(1000)) == []
    assert formatter.rejected.total() == 1003
    assert len(formatter.rejected) <= 101
