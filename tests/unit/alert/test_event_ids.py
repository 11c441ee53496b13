"""Event ids that `rebpf alert` remembers: each new once, until its window is long closed or memory is full."""

from collections.abc import Sequence

import numpy as np

from producer.alert.event_ids import EventIds
from producer.alert.model import Counts

WIDTH_NS = 10
PAGE = 4096
"""Numbers in a page."""
PAGE_COST = 812
"""Memory of a page, by the module's own count."""


def added(ids: EventIds, numbers: Sequence[int], ts_ns: int, boot: int = 1, cpu: int = 0) -> list[bool]:
    values = np.array(numbers, np.int64)
    rows = np.ones_like(values)
    found: list[bool] = ids.add(rows * boot, rows * cpu, values, rows * ts_ns).tolist()
    return found


def test_an_id_is_new_once_for_each_boot_and_cpu() -> None:
    ids = EventIds(WIDTH_NS, 1 << 20, Counts())
    assert added(ids, [5, 6, 5, PAGE + 5, -(1 << 63), 0], 1) == [True, True, False, True, True, True]
    assert added(ids, [5, 7], 1) == [False, True]
    assert added(ids, [5], 1, boot=2) == added(ids, [5], 1, cpu=3) == [True]


def test_ids_are_kept_as_long_as_events_of_their_page_are_recent() -> None:
    counts = Counts()
    ids = EventIds(WIDTH_NS, 1 << 20, counts)
    added(ids, [1], 5)
    added(ids, [PAGE + 1], 5)
    added(ids, [2], 45)
    ids.forget(40)
    assert (added(ids, [1, PAGE + 1], 45), counts.forgotten) == ([False, True], 0)


def test_with_memory_full_the_oldest_are_forgotten_and_their_memory_is_used_again() -> None:
    counts = Counts()
    ids = EventIds(WIDTH_NS, 3 * PAGE_COST, counts)
    for number in range(3):
        added(ids, [number * PAGE + 1, number * PAGE + 2], number * WIDTH_NS)
    assert added(ids, [9 * PAGE + 1], 50) == [True]
    assert counts.forgotten == 2
    assert added(ids, [9 * PAGE + 2, 2 * PAGE + 1], 50) == [True, False]
    assert added(ids, [1], 50) == [True]


def test_a_batch_of_more_pages_than_there_is_room_for_is_still_counted_once() -> None:
    counts = Counts()
    ids = EventIds(WIDTH_NS, PAGE_COST, counts)
    numbers = [number * PAGE + 1 for number in range(200)]
    assert added(ids, numbers * 2, 1) == [True] * 200 + [False] * 200
    added(ids, [1000 * PAGE], 2)
    assert counts.forgotten == 200
