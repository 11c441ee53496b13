"""The ring's reader, on a file with the layout of a BPF ring buffer."""

import mmap
import os
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer._native import finished
from producer.kernel.ringbuf import Ring

PAGE = mmap.PAGESIZE
ROW = np.dtype([("number", "<u8"), ("twice", "<u8")])
RECORD = 8 + ROW.itemsize
BUSY, DISCARD = 1 << 31, 1 << 30


class Kernel:
    """The kernel's side of a one-page ring. A file cannot be mapped twice in a row, so it writes both copies."""

    def __init__(self, position: int = 0) -> None:
        self.descriptor = os.memfd_create("ring")
        os.truncate(self.descriptor, 4 * PAGE)
        self.memory = mmap.mmap(self.descriptor, 4 * PAGE)
        self.position = position
        struct.pack_into("<Q", self.memory, 0, position)
        struct.pack_into("<Q", self.memory, PAGE, position)

    def consumed(self) -> int:
        (position,) = struct.unpack_from("<Q", self.memory, 0)
        return int(position)

    def put(self, number: int, *, flags: int = 0, size: int = ROW.itemsize) -> int:
        """Reserve and fill a record; return its position."""
        at = self.position
        self._write(at, struct.pack("<IIQQ", size | flags, 0, number, 2 * number))
        self.position += RECORD
        struct.pack_into("<Q", self.memory, PAGE, self.position)
        return at

    def submit(self, at: int, flags: int = 0) -> None:
        self._write(at, struct.pack("<I", ROW.itemsize | flags))

    def _write(self, at: int, data: bytes) -> None:
        for i, byte in enumerate(data):
            offset = (at + i) % PAGE
            self.memory[2 * PAGE + offset] = self.memory[3 * PAGE + offset] = byte

    def close(self) -> None:
        self.memory.close()
        os.close(self.descriptor)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.close()


@pytest.fixture
def ring(kernel: Kernel) -> Iterator[Ring]:
    with Ring(kernel.descriptor, PAGE, ROW) as ring:
        yield ring


def numbers(ring: Ring, limit: int = 1000) -> list[int]:
    rows = ring.read(limit)
    assert (rows["twice"] == 2 * rows["number"]).all()
    return [int(number) for number in rows["number"]]


def test_rows_come_in_order_and_once(kernel: Kernel, ring: Ring) -> None:
    assert numbers(ring) == []
    for number in range(5):
        kernel.put(number)
    assert ring.unread == 5
    assert numbers(ring, limit=3) == [0, 1, 2]
    assert numbers(ring) == [3, 4]
    assert numbers(ring) == []
    assert ring.unread == 0


def test_only_commit_releases_space(kernel: Kernel, ring: Ring) -> None:
    kernel.put(1)
    numbers(ring)
    assert kernel.consumed() == 0
    assert ring.fill == RECORD / PAGE
    ring.commit(ring.position)
    assert kernel.consumed() == RECORD
    assert ring.fill == 0


def test_rows_are_a_view_that_the_reader_cannot_write(kernel: Kernel, ring: Ring) -> None:
    at = kernel.put(1)
    rows = ring.read(1)
    kernel._write(at + 8, struct.pack("<Q", 77))
    assert rows["number"][0] == 77
    with pytest.raises(ValueError, match="read-only"):
        rows["number"][0] = 0


def test_a_batch_that_wraps_is_in_one_piece() -> None:
    # Records of 24 bytes do not divide the page: one of them lies across the end.
    kernel = Kernel(position=7 * PAGE + PAGE - 5 * RECORD - 8)
    with Ring(kernel.descriptor, PAGE, ROW) as ring:
        for number in range(11):
            kernel.put(number)
        assert numbers(ring) == list(range(11))
        ring.commit(ring.position)
        assert kernel.consumed() == kernel.position
    kernel.close()


def test_only_a_page_of_the_second_copy_is_mapped() -> None:
    descriptor = os.memfd_create("ring")
    os.truncate(descriptor, (2 + 4 + 1) * PAGE)
    with Ring(descriptor, 4 * PAGE, ROW) as ring:
        assert numbers(ring) == []
    os.close(descriptor)


def test_many_laps_bring_every_row(kernel: Kernel, ring: Ring) -> None:
    seen: list[int] = []
    for number in range(0, 1009, 7):
        for each in range(number, number + 7):
            kernel.put(each)
        seen += numbers(ring)
        ring.commit(ring.position)
    assert seen == list(range(1015))


def test_reading_stops_at_the_first_busy_record(kernel: Kernel, ring: Ring) -> None:
    kernel.put(0)
    busy = kernel.put(1, flags=BUSY)
    kernel.put(2)
    assert numbers(ring) == [0]
    assert numbers(ring) == []
    assert ring.unread == 2
    kernel.submit(busy)
    assert numbers(ring) == [1, 2]


def test_discarded_records_are_skipped(kernel: Kernel, ring: Ring) -> None:
    for number in range(6):
        kernel.put(number, flags=DISCARD if number in (0, 3) else 0)
    busy = kernel.put(6, flags=BUSY)
    assert numbers(ring) == [1, 2, 4, 5]
    assert ring.position == busy
    kernel.submit(busy, DISCARD)
    assert numbers(ring) == []
    assert ring.position == kernel.position


@pytest.mark.parametrize(
    "header",
    [0, 8, ROW.itemsize - 8, ROW.itemsize + 8, 8 | DISCARD, 8 | BUSY, ROW.itemsize | BUSY | DISCARD, (1 << 32) - 1],
)
def test_a_record_whose_header_is_garbage_costs_that_record(kernel: Kernel, ring: Ring, header: int) -> None:
    kernel.put(0)
    kernel._write(kernel.put(1), struct.pack("<I", header))
    kernel.put(2, flags=DISCARD)
    kernel.put(3)
    assert numbers(ring) == [0, 3]
    assert ring.damaged == 1
    assert ring.position == kernel.position
    kernel.put(4)
    assert numbers(ring) == [4]
    assert ring.damaged == 0


def test_a_record_that_stays_busy_is_skipped_after_a_minute(kernel: Kernel) -> None:
    now = [100.0]
    with Ring(kernel.descriptor, PAGE, ROW, lambda: now[0]) as ring:
        kernel.put(0)
        kernel.put(1, flags=BUSY)
        kernel.put(2)
        assert numbers(ring) == [0]
        assert numbers(ring) == []
        now[0] += 59
        assert numbers(ring) == []
        now[0] += 2
        assert numbers(ring) == []
        assert ring.damaged == 1
        assert numbers(ring) == [2]


@pytest.mark.parametrize("consumer", [7 * PAGE + 24, 5, (1 << 64) - 1, 3 * PAGE, 0])
def test_an_invalid_consumer_position_loses_nothing(consumer: int) -> None:
    kernel = Kernel(position=4 * PAGE)
    for number in range(100):
        kernel.put(number)
    struct.pack_into("<Q", kernel.memory, 0, consumer)
    with Ring(kernel.descriptor, PAGE, ROW) as ring:
        held = PAGE // RECORD
        assert ring.position == kernel.consumed() == kernel.position - held * RECORD
        assert ring.unread == held
        assert numbers(ring)[-100:] == list(range(100))
        ring.commit(ring.position)
        kernel.put(100)
        assert numbers(ring) == [100]
    kernel.close()


def test_holds_accepts_the_boundaries_of_uncommitted_records(kernel: Kernel, ring: Ring) -> None:
    for number in range(3):
        kernel.put(number)
    ring.read(1)
    ring.commit(ring.position)
    held = [position for position in range(-8, 4 * RECORD) if ring.holds(position)]
    assert held == [RECORD, 2 * RECORD, 3 * RECORD]


@given(data=st.data())
def test_whatever_a_ring_holds_reading_ends_at_its_end_and_counts_each_record(data: st.DataObject) -> None:
    kernel = Kernel(position=data.draw(st.integers(0, 1 << 40)) * RECORD)
    count = data.draw(st.integers(0, PAGE // RECORD))
    for number in range(count):
        kernel.put(number)
    for _ in range(data.draw(st.integers(0, 20))):
        at = data.draw(st.integers(0, PAGE - 1))
        kernel._write(at, data.draw(st.binary(max_size=16)))
    if data.draw(st.booleans()):
        struct.pack_into("<Q", kernel.memory, 0, data.draw(st.integers(0, (1 << 64) - 1)))
    now = iter(range(0, 100_000, 61))
    with Ring(kernel.descriptor, PAGE, ROW, lambda: next(now)) as ring:
        begin, taken = ring.position, 0
        for _ in range(10 * PAGE // RECORD):
            taken += len(ring.read(1000)) + ring.damaged
        assert ring.position == kernel.position
        assert taken <= (ring.position - begin) // RECORD
        ring.commit(ring.position)
        at = kernel.put(7)
        assert numbers(ring) == [7]
        assert ring.position == at + RECORD
    kernel.close()


def test_uncommitted_rows_are_read_again_by_the_next_reader(kernel: Kernel) -> None:
    for number in range(4):
        kernel.put(number)
    with Ring(kernel.descriptor, PAGE, ROW) as ring:
        numbers(ring, limit=2)
        ring.commit(ring.position)
        numbers(ring)
    with Ring(kernel.descriptor, PAGE, ROW) as ring:
        assert numbers(ring) == [2, 3]


def test_rows_outlive_the_ring(kernel: Kernel) -> None:
    kernel.put(41)
    ring = Ring(kernel.descriptor, PAGE, ROW)
    rows = ring.read(1)
    ring.close()
    assert rows["number"][0] == 41


def test_the_rings_own_descriptor_is_not_needed_after_the_start(kernel: Kernel) -> None:
    descriptor = os.dup(kernel.descriptor)
    with Ring(descriptor, PAGE, ROW) as ring:
        os.close(descriptor)
        kernel.put(5)
        assert numbers(ring) == [5]


@pytest.mark.parametrize(
    ("offset", "stride", "count"),
    [(-8, 24, 1), (0, 0, 1), (0, -24, 1), (0, 24, -1), (0, 24, 5), (85, 24, 1), (1 << 62, 8, 1)],
)
def test_records_outside_the_data_are_refused(offset: int, stride: int, count: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        finished(bytes(88), offset, stride, 16, count)


def test_records_are_finished_up_to_the_first_of_another_length() -> None:
    data = b"".join(struct.pack("<II16x", length, 0) for length in (16, 16, 16 | BUSY, 16))
    assert [finished(data, 0, 24, 16, count) for count in (0, 1, 2, 3, 4)] == [0, 1, 2, 2, 2]
    assert finished(data, 72, 24, 16, 1) == 1
