"""What connections did between two of their records: against a model, and where keys and memory are reused."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import _native
from producer.connections import Connections, Growth

NAMES = ("segs_out", "bytes_sent")


class Record(NamedTuple):
    """A record of a connection."""

    key: int
    ts: int
    segs: int
    start: int = 0
    closes: bool = False
    bytes: int = 0
    counts: bool = True


def added(table: Connections, *records: Record) -> Growth:
    keys, ts, segs, start, closes, size, counts = (np.array(each) for each in zip(*records, strict=True))
    return table.add(keys, ts, start, closes, [segs, size], counts)


def segments(table: Connections, *records: Record) -> list[int]:
    return added(table, *records).counts[:, 0].tolist()


def table(floor: int = 100, most: int = 1 << 10) -> Connections:
    return Connections(NAMES, floor, most)


histories = st.lists(st.tuples(st.integers(0, 5), st.integers(0, (1 << 31) - 1), st.integers(0, 1 << 40)), max_size=40)


@given(histories, st.integers(1, 7))
def test_growth_is_the_difference_to_the_record_before_however_batches_are_cut(
    steps: Sequence[tuple[int, int, int]], size: int
) -> None:
    totals: dict[int, tuple[int, int]] = {}
    records, expected = [], []
    for at, (key, segs, sent) in enumerate(steps):
        is_new = key % 2 == 0
        expected.append((segs, sent) if is_new or key in totals else (0, 0))
        before = totals.get(key, (0, 0))
        totals[key] = before[0] + segs, before[1] + sent
        records.append(Record(key, 200 + at, totals[key][0] % (1 << 32), 101 if is_new else 50, bytes=totals[key][1]))
    found, made = [], table()
    for first in range(0, len(records), size):
        found += [tuple(row) for row in added(made, *records[first : first + size]).counts.tolist()]
    assert found == expected
    assert len(made) == len(totals)


def test_elapsed_time_is_since_the_record_before_or_the_beginning() -> None:
    made = table()
    found = added(made, Record(1, 500, 9, start=450), Record(2, 500, 9, start=50), Record(1, 530, 9, start=450))
    assert found.elapsed_ns.tolist() == [50, 0, 30]
    assert found.opened.tolist() == [True, False, False]


def test_copies_and_old_records_count_nothing() -> None:
    made = table()
    found = added(made, *[Record(1, 200, 5, 150), Record(1, 300, 9, 150, closes=True)] * 2)
    assert found.counts[:, 0].tolist() == [5, 4, 0, 0]
    assert found.fresh.tolist() == [True, True, False, False]
    assert found.closed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("segs", [3, 30])
def test_a_socket_that_connects_again_counts_from_its_beginning(segs: int) -> None:
    made = table()
    found = added(made, Record(1, 200, 10, 150, closes=True), Record(1, 400, segs, 300), Record(1, 500, segs + 1, 300))
    assert found.counts[:, 0].tolist() == [10, segs, 1]
    assert found.opened.tolist() == [True, True, False]


def test_without_room_a_connection_counts_when_it_closes_unless_its_beginning_is_unknown() -> None:
    late = [Record(2, 200, 7, 150), Record(2, 300, 9, 150, closes=True), Record(3, 300, 9, 50, closes=True)]
    assert segments(table(most=1), Record(1, 200, 5, 150), *late) == [5, 0, 9, 0]


def test_ports_that_are_used_again_count_from_the_beginning_also_if_the_end_was_lost() -> None:
    assert segments(table(), Record(1, 200, 10, 150), Record(1, 400, 4, 300)) == [10, 4]
    assert segments(table(), Record(1, 200, 10, closes=True), Record(1, 400, 4)) == [0, 4]


def test_a_clock_that_was_set_counts_nothing_twice() -> None:
    made = table()
    assert segments(made, Record(1, 200, 10, 150), Record(1, 900, 12, 850), Record(1, 910, 13, 850)) == [10, 2, 1]


def test_a_counter_that_falls_a_little_adds_nothing_until_it_is_above_its_highest() -> None:
    assert segments(table(), Record(1, 200, 10, 150), Record(1, 210, 8, 150), Record(1, 220, 12, 150)) == [10, 0, 2]


def test_an_accepted_connection_also_sent_syn_acks_the_first_before_it_had_a_socket() -> None:
    made = Connections(("segs_out", "retrans_syn_ack"), 100, 16)
    keys, ts, start = np.array([1, 2, 3, 1]), np.array([200, 200, 200, 300]), np.array([150, 150, 50, 150])
    segs, again, accepted = np.array([10, 10, 10, 15]), np.array([2, 0, 2, 3]), np.array([True, False, True, True])
    found = made.add(keys, ts, start, keys < 0, [segs, again], accepted=accepted)
    assert found.counts[:, 0].tolist() == [10 + 2 + 1, 10, 0, 5 + 1]


def causes(*records: tuple[int, int, int, int, int]) -> list[list[int]]:
    """Return what records of one connection add: time, all retransmissions, by rto, by fast, and others."""
    made = Connections(("total_retrans", "retrans_rto", "retrans_fast", "retrans_other"), 100, 16)
    ts, *counters = (np.array(each) for each in zip(*records, strict=True))
    nothing = np.zeros_like(ts)
    return made.add(nothing, ts, nothing, nothing > 0, counters).counts.tolist()


def test_causes_begin_again_when_other_programs_count_them_and_the_total_goes_on() -> None:
    before, restarted, later, last = (200, 50, 40, 10, 0), (210, 53, 1, 0, 52), (220, 60, 8, 0, 52), (230, 62, 8, 2, 52)
    assert causes(before, restarted, later, last)[1:] == [[3, 1, 0, 2], [7, 7, 0, 0], [2, 0, 2, 0]]
    assert causes(before, last)[1:] == [[12, 8, 2, 2]]


def test_an_older_record_begins_no_cause_again() -> None:
    assert causes((200, 9, 2, 7, 0), (300, 12, 5, 7, 0), (250, 10, 3, 7, 0), (310, 13, 6, 7, 0))[1:] == [
        [3, 3, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0],
    ]  # fmt: skip


def test_a_record_without_counters_only_gets_a_slot() -> None:
    found = added(table(), Record(1, 300, 0, counts=False), Record(1, 200, 7, 150), Record(2, 200, 7, 150))
    assert found.slots.tolist() == [0, 0, 1]
    assert found.counts[:, 0].tolist() == [0, 7, 7]


def test_without_room_a_connection_counts_when_it_closes() -> None:
    made = table(most=1)
    found = added(made, Record(1, 200, 5, 150), Record(2, 200, 5, 150), Record(2, 210, 9, 150, closes=True))
    assert (found.slots.tolist(), found.counts[:, 0].tolist()) == ([0, -1, -1], [5, 0, 9])


def test_a_connection_that_was_dropped_counts_from_its_next_record() -> None:
    made = table(most=4)
    added(made, *(Record(key, 200 + key, 5, 150) for key in range(4)))
    assert made.make_room(2) == 2
    assert (len(made), made.floor_ns) == (2, 201)
    assert segments(made, Record(0, 300, 8, 150), Record(3, 300, 8, 150)) == [0, 3]
    assert segments(made, Record(0, 310, 9, 150)) == [1]
    added(made, Record(3, 320, 9, 150, closes=True))
    assert made.forget(open_ns=305) == 1
    assert len(made) == 1


def test_slots_stay_in_order_and_the_table_grows() -> None:
    made = table(most=1 << 20)
    records = [Record(key, 200, 1, 150) for key in range(5000)]
    assert added(made, *records).slots.tolist() == list(range(5000))
    made.keep(np.arange(5000) % 2 == 1)
    assert added(made, *records[1::2]).slots.tolist() == list(range(2500))


def test_a_table_whose_sizes_do_not_fit_is_refused() -> None:
    entries, records = np.zeros((4, 4), np.int64), np.zeros((2, 5), np.int64)
    for slots, count in ((np.zeros(4, np.uint64), 0), (np.zeros(9, np.uint64), 0), (np.zeros(8, np.uint64), 5)):
        with pytest.raises(ValueError, match="do not fit"):
            _native.index_connections(slots, entries, b"\0", count, 0, 1)
    with pytest.raises(ValueError, match="not as many"):
        _native.add_connections(np.zeros(8, np.uint64), entries, b"\0", 0, 0, 1, records, entries[:1])
