"""A BPF ring buffer of records of one size, as numpy rows: no callback, no Python per record, no copy.

Layout (kernel/bpf/ringbuf.c): a page with the consumer's position, a page with the producer's, then the data, mapped
twice in a row, so that a run of records that wraps is still contiguous. A record is a u32 length with two flag bits, a
u32 that is the kernel's own, and the payload; all are multiples of 8 bytes. Positions count bytes since the ring was
made and never wrap.

A program reserves a record by writing its length with the busy bit and then moving the producer's position; it submits
by clearing the bit. So the reader looks at the position first, then at the lengths, then at payloads, and stops at the
first busy record. Between these steps stands a barrier on machines that reorder loads.

A ring outlives its process, and the next one may find anything in it. A record whose header the kernel cannot have
written costs that record: `read` leaves it out and counts it in `damaged`. So does one that stays busy for a minute. A
consumer's position that cannot be right would keep the kernel from writing: `Ring` starts at the oldest record that the
memory still holds, and events come twice rather than never.

`read` goes ahead of `commit`: what was read and not committed still belongs to the ring, and the kernel will not
overwrite it.
"""

import ctypes
import logging
import mmap
import platform
import time
from collections.abc import Callable
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from producer.events import Rows

logger = logging.getLogger(__name__)

_BUSY, _DISCARD = 1 << 31, 1 << 30
_HEADER_BYTES = 8
_BUSY_MAX_S = 60.0
"""A program fills a record within microseconds."""


class Ring:
    """The reader of one ring of `size_bytes`; rows have `dtype`. The descriptor may be closed afterwards.

    OSError where the descriptor is no ring of this size.
    """

    def __init__(
        self,
        descriptor: int,
        size_bytes: int,
        dtype: np.dtype[np.void],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        page = mmap.PAGESIZE
        consumer = mmap.mmap(descriptor, page)
        # Arrays keep their map: the memory goes with the last array on it.
        self._data = mmap.mmap(descriptor, page + 2 * size_bytes, prot=mmap.PROT_READ, offset=page)
        self._consumer: NDArray[np.uint64] = np.frombuffer(consumer, "<u8", 1)
        self._producer: NDArray[np.uint64] = np.frombuffer(self._data, "<u8", 1)
        self.size_bytes = size_bytes
        self.stride = _HEADER_BYTES + dtype.itemsize
        """Bytes that a record takes."""
        self._record = np.dtype([("length", "<u4"), ("page", "<u4"), ("row", dtype)])
        self.position = int(self._consumer[0])
        """Behind the last record read, in bytes since the ring was made."""
        self.damaged = 0
        """Records that the last `read` has passed over because they are damaged."""
        self._clock = clock
        self._busy_position, self._busy_since_s = -1, 0.0
        self._repair()

    @property
    def records_before(self) -> int:
        """Number of records before `position`, since the ring was made."""
        return self.position // self.stride

    @property
    def fill(self) -> float:
        """Share of the ring that is taken, from 0 to 1: records unread, and records read but not committed."""
        return (int(self._producer[0]) - int(self._consumer[0])) / self.size_bytes

    @property
    def unread(self) -> int:
        """Number of records behind `position`, those included that a program is still filling."""
        return (int(self._producer[0]) - self.position) // self.stride

    def holds(self, position: int) -> bool:
        """Say whether `position` is between two records that are not committed, or at an end of them."""
        committed = int(self._consumer[0])
        return committed <= position <= int(self._producer[0]) and (position - committed) % self.stride == 0

    def read(self, limit: int) -> Rows:
        """Return up to `limit` finished rows, in the order of their reservation, and move `position` behind them.

        The rows are a read-only view of the ring: they keep their values until a position behind them is committed.
        Only where records between them were discarded, or are damaged, they are a copy.
        """
        count = min(self.unread, limit)
        _barrier()
        start = mmap.PAGESIZE + self.position % self.size_bytes
        records = np.ndarray(count, self._record, buffer=self._data, offset=start)
        lengths = records["length"].copy()
        _barrier()
        self.damaged = 0
        size = records.dtype["row"].itemsize
        count = self._finished(lengths, size)
        lengths, rows = lengths[:count], records["row"][:count]
        odd = lengths != size
        if odd.any():
            self.damaged = int((odd & (lengths != size | _DISCARD)).sum())
            rows = rows[~odd]
        self.position += count * self.stride
        return rows

    def _finished(self, lengths: NDArray[np.uint32], size: int) -> int:
        """Return how many records come before the first that a program is filling."""
        busy = lengths == size | _BUSY
        if not busy.any():
            return len(lengths)
        first = int(busy.argmax())
        position = self.position + first * self.stride
        if position != self._busy_position:
            self._busy_position, self._busy_since_s = position, self._clock()
        elif first == 0 and self._clock() - self._busy_since_s > _BUSY_MAX_S:
            return 1  # and `read` takes it for damaged
        return first

    def _repair(self) -> None:
        """Replace a consumer's position that the kernel would not go on from."""
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
        """Give the kernel the room before `position`; rows read from there lose their values."""
        _barrier()
        self._consumer[0] = position

    def close(self) -> None:
        """Let go of the ring. Rows still in use stay readable: the memory is unmapped with the last of them."""
        del self._consumer, self._producer, self._data

    def __enter__(self) -> "Ring":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


if platform.machine() == "x86_64":

    def _barrier() -> None:
        """x86 reorders neither loads nor stores among themselves."""

else:
    _libc = ctypes.CDLL(None)
    _NR_MEMBARRIER, _PRIVATE_EXPEDITED, _REGISTER = 283, 1 << 3, 1 << 4
    _libc.syscall(_NR_MEMBARRIER, _REGISTER, 0, 0)

    def _barrier() -> None:
        """membarrier(2), once or twice a batch: Python has no instruction for it."""
        _libc.syscall(_NR_MEMBARRIER, _PRIVATE_EXPEDITED, 0, 0)
