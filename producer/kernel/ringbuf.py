"""A BPF ring buffer of fixed-size records, read as numpy rows without callbacks, copies or Python code per record.

Layout (kernel/bpf/ringbuf.c): a page with the consumer position, a page with the producer position, then the data,
twice in a row. A page of the second copy is mapped, so that a record that wraps is contiguous; all of it would be
counted as resident memory. A record is a u32 length with two flag bits, a u32 that the kernel uses, and the payload,
padded to a multiple of 8 bytes. Positions count bytes since the ring was created and never wrap.

A program reserves a record by writing its length with the busy bit and then advancing the producer position. It submits
by clearing the bit. So the reader loads the position first, then the lengths, then the payloads, and stops at the first
busy record. Between these steps is a barrier (native/module.c), for machines that reorder loads.

A ring outlives its process, so the next process may find damage. A record whose header the kernel cannot have written
is skipped and counted in `damaged`. So is one that stays busy for a minute. An invalid consumer position would prevent
the kernel from writing: `Ring` then starts at the oldest record in memory, so events are repeated rather than lost.

`read` runs ahead of `commit`: the kernel does not overwrite records that were read but not committed.
"""

import logging
import mmap
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from producer._native import barrier, finished
from producer.events import Rows

logger = logging.getLogger(__name__)

_BUSY, _DISCARD = 1 << 31, 1 << 30
_HEADER_BYTES = 8
_BUSY_MAX_S = 60.0
"""A program fills a record within microseconds."""


class Ring:
    """Reads one ring of `size_bytes`; rows have `dtype`. The descriptor may be closed afterwards.

    OSError if the descriptor is not a ring of this size.
    """

    def __init__(
        self, descriptor: int, size_bytes: int, dtype: np.dtype[np.void], clock: Callable[[], float] = time.monotonic
    ) -> None:
        page = mmap.PAGESIZE
        consumer = mmap.mmap(descriptor, page)
        # Arrays hold the mapping: the memory is unmapped with the last array on it.
        self._data = mmap.mmap(descriptor, page + size_bytes + page, prot=mmap.PROT_READ, offset=page)
        self._consumer: NDArray[np.uint64] = np.frombuffer(consumer, "<u8", 1)
        self._producer: NDArray[np.uint64] = np.frombuffer(self._data, "<u8", 1)
        self.size_bytes = size_bytes
        self.stride = _HEADER_BYTES + dtype.itemsize
        """Bytes per record."""
        self._dtype = dtype
        self._record = np.dtype([("length", "<u4"), ("page", "<u4"), ("row", dtype)])
        self.position = int(self._consumer[0])
        """Position after the last record read, in bytes since the ring was created."""
        self.damaged = 0
        """Damaged records that the last `read` skipped."""
        self._clock = clock
        self._busy_position, self._busy_since_s = -1, 0.0
        self._repair()

    @property
    def records_before(self) -> int:
        """Number of records before `position`, since the ring was created."""
        return self.position // self.stride

    @property
    def fill(self) -> float:
        """Used share of the ring, from 0 to 1: unread records, and those read but not committed."""
        return (int(self._producer[0]) - int(self._consumer[0])) / self.size_bytes

    @property
    def unread(self) -> int:
        """Number of records after `position`, including those that a program is still filling."""
        return (int(self._producer[0]) - self.position) // self.stride

    @property
    def unread_share(self) -> float:
        """Share of the ring that these records use, from 0 to 1."""
        return (int(self._producer[0]) - self.position) / self.size_bytes

    def holds(self, position: int) -> bool:
        """Whether `position` is a boundary of uncommitted records."""
        committed = int(self._consumer[0])
        return committed <= position <= int(self._producer[0]) and (position - committed) % self.stride == 0

    def read(self, limit: int) -> Rows:
        """Return up to `limit` finished rows, in the order of their reservation, and move `position` past them.

        The rows are a read-only view of the ring, valid until a position after them is committed. They are a copy only
        if the ring wraps between them, or if records between them were discarded or are damaged.
        """
        count = min(self.unread, limit)
        barrier()
        self.damaged = 0
        offset = self.position % self.size_bytes
        left = -(-(self.size_bytes - offset) // self.stride)
        offset += mmap.PAGESIZE
        if count <= left and finished(self._data, offset, self.stride, self._dtype.itemsize, count) == count:
            self.position += count * self.stride
            return np.ndarray(count, self._dtype, self._data, offset + _HEADER_BYTES, self.stride)
        return self._read_slowly(count, left)

    def _read_slowly(self, count: int, left: int) -> Rows:
        """Read up to `count` records, `left` of them before the ring wraps, and skip those that are not finished."""
        parts = [self._records(self.position, min(count, left))]
        if count > left:
            parts.append(self._records(self.position + left * self.stride, count - left))
        lengths = np.concatenate([part["length"] for part in parts])
        barrier()
        if count > left:
            parts = [np.concatenate([part.view(np.uint8) for part in parts]).view(self._record)]
        rows = parts[0]["row"]
        size = rows.itemsize
        odd = lengths != size
        if odd.any():
            count = self._finished(lengths, size)
            lengths, rows, odd = lengths[:count], rows[:count], odd[:count]
            self.damaged = int((odd & (lengths != size | _DISCARD)).sum())
            rows = rows[~odd] if odd.any() else rows
        self.position += count * self.stride
        return rows

    def _records(self, position: int, count: int) -> Rows:
        """Return a view of records; only the last may wrap."""
        start = mmap.PAGESIZE + position % self.size_bytes
        return np.ndarray(count, self._record, buffer=self._data, offset=start)

    def _finished(self, lengths: NDArray[np.uint32], size: int) -> int:
        """Return the number of records before the first that a program is filling."""
        busy = lengths == size | _BUSY
        if not busy.any():
            return len(lengths)
        first = int(busy.argmax())
        position = self.position + first * self.stride
        if position != self._busy_position:
            self._busy_position, self._busy_since_s = position, self._clock()
        elif first == 0 and self._clock() - self._busy_since_s > _BUSY_MAX_S:
            return 1  # `read` then treats it as damaged
        return first

    def _repair(self) -> None:
        """Replace an invalid consumer position, which would keep the kernel from writing."""
        end = int(self._producer[0])
        unread = end - self.position
        if 0 <= unread <= self.size_bytes and unread % self.stride == 0:
            return
        found = self.position
        self.position = end - min(end, self.size_bytes) // self.stride * self.stride
        logger.warning(
            "ring: consumer position %d does not fit producer position %d: reading from %d, so events may be repeated",
            found,
            end,
            self.position,
        )
        self.commit(self.position)

    def commit(self, position: int) -> None:
        """Release the space before `position` to the kernel. Rows before it become invalid."""
        barrier()
        self._consumer[0] = position

    def close(self) -> None:
        """Release the ring. Rows in use stay readable: the memory is unmapped with the last of them."""
        del self._consumer, self._producer, self._data

    def __enter__(self) -> "Ring":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
