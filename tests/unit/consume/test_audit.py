"""Exact counts of missing, duplicate and late events, in whatever order the topics are read."""

import itertools
import re
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.commands.verify import TopicReport, fault_summary
from producer.consume.audit import Audit, BootReport
from producer.consume.gaps import Gaps, Numbers, find_gaps, page_of
from tests.support.batches import Row, events_of

DELIVERY = Path(__file__).resolve().parents[3] / "docs" / "delivery.md"
GENERATION = 1 << 32


def row(cpu_seq: int, **fields: Any) -> Row:
    """An event sent and captured at the time `cpu_seq`, unless `fields` override it."""
    at = fields.pop("at", cpu_seq)
    values = {"partition": 0, "saddr": "10.0.0.1", "sent_ms": at, "ts_ns": at, "host": "h", "boot_id": "b", "cpu": 0}
    return Row(**{**values, **fields}, cpu_seq=cpu_seq)


def boots(rows: Iterable[Row], chunk: int = 1000, **settings: Any) -> list[BootReport]:
    audit = Audit(**settings)
    rest = iter(rows)
    while piece := list(itertools.islice(rest, chunk)):
        audit.add(events_of(piece))
    return list(audit.boots())


def boot(rows: Iterable[Row], **settings: Any) -> BootReport:
    (report,) = boots(rows, **settings)
    return report


def added(numbers: Numbers, counters: Sequence[int], some: Sequence[int]) -> list[bool]:
    values = np.array(some, np.int64)
    slots = [numbers.slot(*page) for page in zip(counters, page_of(values).tolist(), strict=True)]
    return numbers.add(np.array(slots, np.int64), values).tolist()


# Around the ends of pages and generations, and few enough for duplicates.
near = st.sampled_from([0, 4095, 4096, 8192, GENERATION, 2 * GENERATION, 7 * GENERATION + 4096])
some_numbers = st.builds(lambda base, step: max(1, base + step), near, st.integers(-5, 9))


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), some_numbers), max_size=30), max_size=6))
def test_numbers_are_new_once_and_all_there(chunks: list[list[tuple[int, int]]]) -> None:
    numbers, seen = Numbers(), set()
    for chunk in chunks:
        expected = []
        for each in chunk:
            expected.append(each not in seen)
            seen.add(each)
        assert added(numbers, [counter for counter, _ in chunk], [number for _, number in chunk]) == expected
    held = {counter: np.concatenate(list(pieces)).tolist() for counter, pieces in numbers.held()}
    assert held == {
        counter: sorted(number for each, number in seen if each == counter) for counter in {c for c, _ in seen}
    }


def model(held: list[int], complete_from: int) -> Gaps:
    """Gaps, literally as specified."""
    gaps, missing, unsure, generations = 0, 0, 0, set()
    for before, behind in itertools.pairwise(held):
        start = before + 1
        if behind > start and (before - 1) // GENERATION != (behind - 1) // GENERATION:
            generations.add((behind - 1) // GENERATION)
            start = (behind - 1) // GENERATION * GENERATION + 1
        if behind > complete_from:
            gaps += behind > start
            missing += behind - start
        else:
            unsure += behind - start
    return Gaps(held[0], gaps, missing, unsure, frozenset(generations))


@given(st.sets(some_numbers, min_size=1), st.integers(1, 7), st.just(0) | some_numbers)
def test_gaps_are_those_of_the_rules(held: set[int], piece: int, complete_from: int) -> None:
    ordered = sorted(held)
    pieces = [np.array(ordered[at : at + piece], np.int64) for at in range(0, len(ordered), piece)]
    assert find_gaps(pieces, complete_from) == model(ordered, complete_from)


def test_more_numbers_than_the_first_pages_hold() -> None:
    numbers = Numbers()
    for start in range(1, 1_000_001, 50_000):
        chunk = range(start, start + 50_000)
        assert all(added(numbers, [start & 1] * len(chunk), chunk))
    found = {counter: find_gaps(pieces, 0) for counter, pieces in numbers.held()}
    assert found == {1: Gaps(1, 0, 0, 0, frozenset())}


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_complete_topic_has_no_fault_in_any_order_of_its_partitions(chunk: int) -> None:
    rows = [row(number, partition=number % 3, saddr=f"10.0.0.{number % 3}") for number in range(1, 102)]
    by_partition = sorted(rows, key=lambda each: each.partition)
    report = boot(by_partition, chunk=chunk)
    assert (report.events, report.duplicates, report.gaps, report.missing, report.out_of_order) == (101, 0, 0, 0, 0)
    assert (report.first_ns, report.last_ns, report.restarts, report.first_numbers) == (1, 101, 0, {})


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_second_copy_is_a_duplicate_and_not_out_of_order(chunk: int) -> None:
    report = boot([row(number) for number in (1, 2, 3, 4, 2, 3, 5, 2)], chunk=chunk)
    assert (report.events, report.duplicates, report.out_of_order, report.missing) == (5, 3, 0, 0)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_an_event_behind_a_later_one_of_its_flow_is_out_of_order(chunk: int) -> None:
    late = [row(number) for number in (1, 4, 2, 3, 5)]
    other_flow = [row(6, at=1, saddr="10.9.9.9"), row(7, at=1, partition=1), row(1, at=1, host="g")]
    reports = boots([*late, *other_flow], chunk=chunk)
    assert [(each.host, each.out_of_order, each.missing) for each in reports] == [("g", 0, 0), ("h", 2, 0)]


def test_numbers_go_by_topic_host_boot_and_cpu() -> None:
    rows = [
        row(number, host=host, boot_id=boot_id, cpu=cpu, at=1)
        for host in "hg"
        for boot_id in "bc"
        for cpu in (0, 3)
        for number in (1, 2, 4)
    ]
    reports = boots(rows)
    assert [(each.host, each.boot_id) for each in reports] == [("g", "b"), ("g", "c"), ("h", "b"), ("h", "c")]
    assert {(each.events, each.gaps, each.missing) for each in reports} == {(6, 2, 2)}


def test_a_crash_is_one_restart_of_all_cpus_and_what_lacks_behind_it_is_missing() -> None:
    rows = [row(base + number, cpu=cpu, at=1) for base in (0, 9 * GENERATION) for cpu in (0, 1) for number in (1, 2)]
    assert (boot(rows).restarts, boot(rows).gaps, boot(rows).missing) == (1, 0, 0)
    again = [*rows, row(10 * GENERATION + 3, at=1)]
    assert (boot(again).restarts, boot(again).gaps, boot(again).missing) == (2, 1, 2)


def test_events_before_the_first_number_are_reported_and_not_counted() -> None:
    report = boot([row(7, cpu=2), row(8, cpu=2), row(1), row(GENERATION + 1, cpu=3)])
    assert (report.missing, report.restarts) == (0, 0)
    assert report.first_numbers == {2: 7, 3: GENERATION + 1}


def test_gaps_before_the_start_of_the_last_partition_may_be_deleted_events() -> None:
    rows = [row(number, at=number) for number in (3, 5, 6, 9, 11, 13)]
    report = boot(rows, complete_from_ms=9)
    assert (report.perhaps_deleted, report.gaps, report.missing) == (4, 1, 1)
    assert boot(rows, complete_from_ms=float("inf")).perhaps_deleted == 5


def test_with_many_flows_the_quiet_ones_are_forgotten_and_counted() -> None:
    audit = Audit(flows=10)
    audit.add(events_of([row(number, saddr=f"10.0.0.{number}") for number in range(1, 31)]))
    assert audit.flows_forgotten == 10
    audit.add(events_of([row(31, saddr="10.0.0.1", at=0), row(32, saddr="10.0.0.30", at=0)]))
    (report,) = audit.boots()
    assert report.out_of_order == 1


def test_boots_and_scattered_numbers_beyond_the_memory_limit_are_unchecked() -> None:
    audit = Audit(boots=10, pages=20)
    audit.add(events_of([row(1, host=f"h-{number}") for number in range(50)]))
    assert audit.unchecked == 40
    audit.add(events_of([row(number << 12, host="h-0") for number in range(1, 50)]))
    assert audit.unchecked == 40 + 38
    audit.add(events_of([row(2, host="h-9"), row(1, host="h-99")]))
    assert [report.events for report in audit.boots()] == [12, *[1] * 8, 2]
    assert audit.unchecked == 40 + 38 + 1


def test_unchecked_events_are_a_fault() -> None:
    report = TopicReport("events", 1, 5, 0, 0, 0, (), 3)
    assert fault_summary([report]) == "events: unchecked 3"
    assert str(report).endswith("unchecked=3")


def documented_sql() -> str:
    """Return the SQL statement of docs/delivery.md that finds gaps."""
    blocks = re.findall(r"```sql\n(.*?)```", DELIVERY.read_text(), re.DOTALL)
    (statement,) = [block for block in blocks if "LAG(" in block]
    return statement


def by_sql(rows: Iterable[Row]) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE tcp_transmit (host TEXT, boot_id TEXT, cpu INT, cpu_seq INT)")
        values = [(each.host, each.boot_id, each.cpu, each.cpu_seq) for each in rows]
        database.executemany("INSERT INTO tcp_transmit VALUES (?, ?, ?, ?)", values)
        return database.execute(documented_sql()).fetchall()


def by_audit(rows: Iterable[Row]) -> list[tuple[Any, ...]]:
    return sorted(
        (each.host, each.boot_id, each.events, each.duplicates, each.gaps, each.missing, each.restarts)
        for each in boots(rows)
    )


def test_the_documented_sql_finds_known_gaps_and_duplicates() -> None:
    after_crash = [5 * GENERATION + number for number in (3, 4, 6)]
    rows = [row(number, cpu=cpu) for cpu in (0, 1) for number in (1, 2, 2, 3, 7, 8, 8, *after_crash)]
    rows += [row(number, host="g", boot_id="c") for number in (10, 11, 12)]
    assert by_sql(rows) == [("g", "c", 3, 0, 0, 0, 0), ("h", "b", 16, 4, 6, 12, 1)]


identities = st.tuples(st.sampled_from("gh"), st.sampled_from("bc"), st.integers(0, 1), some_numbers)


@given(st.lists(identities, max_size=60))
def test_the_documented_sql_and_verify_agree(events: list[tuple[str, str, int, int]]) -> None:
    rows = [row(number, host=host, boot_id=boot_id, cpu=cpu) for host, boot_id, cpu, number in events]
    assert by_sql(rows) == by_audit(rows)
