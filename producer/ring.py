"""A BPF ring buffer of records of one size, as numpy rows: no callback and no Python per record.

Layout (kernel/bpf/ringbuf.c): a page with the consumer's position, a page with the producer's, then the data, mapped twice in a
row, so that a run of records that wraps is still contiguous. A record is a u32 length with two flag bits, a u32 that is the
kernel's own, and the payload; all are multiples of 8 bytes. Positions count bytes since the ring was made and never wrap.

`read` goes ahead of `commit`: what was read and not committed still belongs to the ring, and the kernel will not overwrite it.
"""

import mmap
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from producer.events import Rows

_BUSY, _DISCARD = np.uint32(1 << 31), np.uint32(1 << 30)
_HEADER_BYTES = 8


class Ring:
    """The reader of one ring. `size_bytes` is the map's size; rows have `dtype`.

    Raises ValueError where a record in the ring has another size than `dtype`.
    """

    def __init__(self, descriptor: int, size_bytes: int, dtype: np.dtype[np.void]) -> None:
        page = mmap.PAGESIZE
        self._size = size_bytes
        self._stride = _HEADER_BYTES + dtype.itemsize
        self._consumer_map = mmap.mmap(descriptor, page)
        self._producer_map = mmap.mmap(descriptor, page + 2 * size_bytes, prot=mmap.PROT_READ, offset=page)
        self._consumer: NDArray[np.uint64] = np.frombuffer(self._consumer_map, "<u8", 1)
        self._producer: NDArray[np.uint64] = np.frombuffer(self._producer_map, "<u8", 1)
        self._record = np.dtype([("length", "<u4"), ("page", "<u4"), ("row", dtype)])
        self.position = int(self._consumer[0])
        """Behind the last record read, in bytes since the ring was made."""

    @property
    def fill(self) -> float:
        """Share of the ring that is taken, from 0 to 1: records unread, and records read but not committed."""
        return (int(self._producer[0]) - int(self._consumer[0])) / self._size

    @property
    def unread(self) -> int:
        """Number of records behind `position`, those included that a program is still filling."""
        return (int(self._producer[0]) - self.position) // self._stride

    def read(self, limit: int) -> Rows:
        """Return up to `limit` finished rows, copied, in the order of their reservation, and move `position` behind them."""
        count = min(self.unread, limit)
        start = self.position % self._size + mmap.PAGESIZE
        records = np.ndarray(count, self._record, buffer=self._producer_map, offset=start)
        lengths = records["length"].copy()
        busy = lengths >= _BUSY
        if busy.any():
            count = int(busy.argmax())
            lengths = lengths[:count]
        rows = records["row"][:count].copy()
        self.position += count * self._stride
        odd = lengths != self._record["row"].itemsize
        if odd.any():
            if not (lengths[odd] & _DISCARD).all():
                raise ValueError("the ring holds records of another size")
            rows = rows[~odd]
        return rows

    def commit(self, position: int) -> None:
        """Give the kernel the room before `position`."""
        self._consumer[0] = position

    def close(self) -> None:
        """Unmap the ring."""
        del self._consumer, self._producer
        self._consumer_map.close()
        self._producer_map.close()

    def __enter__(self) -> "Ring":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
