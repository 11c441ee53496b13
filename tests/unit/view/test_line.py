"""Lines of a trace: fixed columns, the cause first, relative sequence numbers, and nothing that a terminal obeys."""

import re

import pytest

from producer.events import FLOWS, RETRANSMITS, TRANSMITS
from producer.view.line import Lines, duration
from tests.support.views import decoded, flows, retransmits, transmits

ENDS = {"saddr": "10.0.0.1", "sport": 443, "daddr": "10.2.0.9", "dport": 51234, "sk_cookie": 5}


def lines(width: int, *, color: bool = False) -> list[str]:
    shown = Lines(width, hosts=False, color=color)
    events = retransmits(
        {**ENDS, "cause": "rto", "retransmit_no": 2, "seq": (1 << 32) - 1, "payload_len": 1448, "rto_us": 204_000},
        {**ENDS, "cause": "slow_start", "seq": 1447, "payload_len": 1448, "rto_us": 204_000, "segs": 3},
    )
    failed = flows({**ENDS, "reason": "close", "error": 111, "state": "SYN_SENT", "comm": "curl"})
    return [shown.header(), *shown.lines(decoded(RETRANSMITS, events)), *shown.lines(decoded(FLOWS, failed))]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_lines_fit_the_screen_and_columns_stay_in_place(width: int) -> None:
    shown = lines(width)
    assert all(len(line) <= width for line in shown)
    for title in ("CAUSE", "WHO", "PEER" if width == 80 else "FLOW"):
        start = shown[0].index(title)
        assert all(line[start - 1] == " " and line[start] != " " for line in shown[1:]), title


def test_the_cause_comes_first_and_sequence_numbers_are_relative() -> None:
    header, rto, rest, failed = lines(200)
    assert header.split()[:2] == ["TIME", "CAUSE"]
    assert rto.split()[1:4] == ["rto", "#2", "0"]
    assert rest.split()[1:3] == ["slow_start", "1448"]
    assert failed.split()[1:3] == ["connect", "ECONNREFUSED"]
    assert "curl" in failed
    assert rto.endswith("10.0.0.1:443 > 10.2.0.9:51234")


def test_a_narrow_screen_shows_the_peer() -> None:
    assert lines(80)[1].endswith(" 10.2.0.9:51234")
    assert "10.0.0.1" not in lines(80)[1]


def test_only_new_segments_and_failed_connections_are_events() -> None:
    shown = Lines(200, hosts=False, color=False)
    sent = decoded(TRANSMITS, transmits({**ENDS, "is_retransmit": 1}, {**ENDS, "is_retransmit": 0}))
    assert [line.split()[1] for line in shown.lines(sent)] == ["sent"]
    closed = decoded(FLOWS, flows({"reason": "close", "unknown": 1 << 12}, {"reason": "interval", "error": 111}))
    assert [*shown.lines(closed)] == []


def test_faults_have_colors() -> None:
    assert "\x1b[1;31m" in lines(80, color=True)[1]
    assert "\x1b[33m" in lines(80, color=True)[2]
    assert re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines(80, color=True)[1:])) == "\n".join(lines(80)[1:])


@pytest.mark.parametrize(
    ("us", "text"), [(None, "-"), (0, "0us"), (999, "999us"), (1000, "1ms"), (204_000, "204ms"), (1_500_000, "1.5s")]
)
def test_durations_have_three_digits_and_a_unit(us: int | None, text: str) -> None:
    assert duration(us) == text
