"""The demo's table: events and the kernel's counters side by side, and a reason for each difference."""

from collections.abc import Mapping
from itertools import count
from typing import Any

from producer.demo.reconcile import Tally, compare, reasons
from producer.events import FLOWS, RETRANSMITS, TRANSMITS

NUMBERS = count(1)
COUNTERS = {
    "OutSegs": 100,
    "RetransSegs": 23,
    "TCPFastRetrans": 11,
    "TCPSlowStartRetrans": 2,
    "TCPSynRetrans": 3,
}
NOTHING_LOST: Mapping[str, Any] = {
    TRANSMITS.topic: {"delivered": 0, "lost": {}},
    RETRANSMITS.topic: {"delivered": 0, "lost": {}},
}


def transmit(segs: int, *, again: bool = False, **fields: Any) -> dict[str, Any]:
    number = {"cpu": 0, "cpu_seq": next(NUMBERS)}
    return {**number, "segs": segs, "is_retransmit": again, "tcp_flags": 0x18} | fields


def retransmit(cause: str, segs: int) -> dict[str, Any]:
    return {"cpu": 1, "cpu_seq": next(NUMBERS), "segs": segs, "cause": cause}


def flow(cookie: int, total_retrans: int) -> dict[str, Any]:
    number = {"cpu": 0, "cpu_seq": next(NUMBERS)}
    return {**number, "reason": "interval", "sk_cookie": cookie, "total_retrans": total_retrans}


def syn_ack(seq: int) -> dict[str, Any]:
    flow = {"saddr": "10.0.0.2", "sport": 80, "daddr": "10.0.0.1", "dport": 40000, "seq": seq}
    return transmit(1, tcp_flags=0x12, is_retransmit=None, **flow)


def tally_of(retransmits: Mapping[str, int], *, first: int, again: int) -> Tally:
    tally = Tally()
    for cause, segs in retransmits.items():
        tally.add(RETRANSMITS.topic, retransmit(cause, segs))
    tally.add(TRANSMITS.topic, transmit(first))
    tally.add(TRANSMITS.topic, transmit(again, again=True))
    for cookie, total in ((7, 1), (7, again - 4), (8, 4), (7, 3)):
        tally.add(FLOWS.topic, flow(cookie, total))
    return tally


AGREEING = {"fast": 11, "slow_start": 2, "syn": 2, "syn_ack": 1, "rto": 4, "tlp": 3}


def test_events_that_agree_need_no_reason() -> None:
    tally = tally_of(AGREEING, first=100, again=23)
    comparison = compare(tally, COUNTERS)
    assert comparison.agrees
    assert reasons(tally, comparison, NOTHING_LOST) == []


def test_each_cause_is_set_against_its_own_counter() -> None:
    rows = compare(tally_of({"fast": 13, "syn": 5, "other": 1}, first=0, again=0), COUNTERS).causes
    assert [(row.seen, row.counted, row.difference) for row in rows] == [(13, 11, 2), (0, 2, -2), (5, 3, 2), (1, 7, -6)]


def test_each_syn_ack_is_a_first_transmission_and_a_retransmission_from_the_second_on() -> None:
    tally = Tally()
    for seq in (7, 7, 8, 7):
        tally.add(TRANSMITS.topic, syn_ack(seq))
    assert (tally.first_transmissions, tally.marked_retransmits) == (4, 2)


def test_repeated_and_missing_numbers_are_counted() -> None:
    tally = Tally()
    for number in (1, 2, 2, 5):
        tally.add(TRANSMITS.topic, transmit(1, cpu_seq=number))
    assert (tally.repeated, tally.missing) == (1, 2)


def why(tally: Tally, balance: Mapping[str, Any] = NOTHING_LOST) -> str:
    return "\n".join(reasons(tally, compare(tally, COUNTERS), balance))


def test_losses_of_the_balance_are_reasons() -> None:
    lost = {**NOTHING_LOST, RETRANSMITS.topic: {"delivered": 6, "lost": {"nested": 1, "unheard_of": 2}}}
    text = why(tally_of({**AGREEING, "fast": 6}, first=100, again=23), lost)
    assert "tcp_retransmit: 1 events lost, nested (the kernel skipped runs" in text
    assert "tcp_retransmit: 2 events lost, unheard_of" in text
    assert "did not run" not in text


def test_events_that_the_reader_missed_are_a_reason() -> None:
    late = {**NOTHING_LOST, TRANSMITS.topic: {"delivered": 5, "lost": {}}}
    assert "tcp_transmit: 3 events were delivered to the broker, but not read back" in why(
        tally_of(AGREEING, first=90, again=23), late
    )


def test_the_transmit_topic_is_a_witness_for_runs_that_the_kernel_left_out() -> None:
    assert why(tally_of({**AGREEING, "tlp": 1}, first=100, again=23)).startswith(
        "2 segments are marked as retransmitted"
    )


def test_segments_without_a_socket_are_a_reason() -> None:
    assert why(tally_of(AGREEING, first=93, again=23)).startswith("7 segments of OutSegs are not in the transmit topic")


def test_a_difference_without_a_known_reason_says_so() -> None:
    assert "see this traffic differently" in why(tally_of(AGREEING, first=101, again=23))
