"""The hot loops in C, from native/. Arrays are passed as C-contiguous buffers; their item sizes are checked.

Raises ValueError for a buffer of another size, and BufferError or TypeError for an object that has none.
"""

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray
from typing_extensions import Buffer

_Array = NDArray[Any] | Buffer
"""numpy's arrays have a buffer that type checkers see from Python 3.12 on."""

def messages(
    out: _Array,
    batch: int,
    payload: _Array,
    starts: _Array,
    lengths: _Array,
    keys: _Array,
    key_starts: _Array,
    key_lengths: _Array,
    rows: _Array | None,
    /,
) -> None:
    """Fill `out`, an array of MESSAGE (producer.kafka.librdkafka), with rows of a batch: all of `out` is written.

    Payload and key point into `payload` and `keys` (uint8), which must outlive the messages. `starts`, `lengths`,
    `key_starts`, `key_lengths` and `rows` are int64; `rows` has the length of `out`, or is None for the first len(out)
    rows. `private` is `batch << 20 | row`; `batch` has at most 44 bits. The other members become 0.
    Raises ValueError for a row that is outside the batch, or whose bytes are outside their buffer.
    """

def reports(pointers: _Array, rows: _Array, /) -> list[tuple[int, int, int, int]]:
    """Read delivery reports; return their runs of one batch and one result: (batch, err, first, end), `end` excluded.

    `pointers` (uint64) point to rd_kafka_message_t and must be valid: those that rd_kafka_event_message_array()
    returned, before rd_kafka_event_destroy(). `rows` (int64), of the same length, receives the messages' rows in their
    batches.
    """

def schema_ids(values: list[bytes | None], /) -> bytes:
    """Return the schema id of each value in Confluent's wire format, as int64.

    -1 where there is none, and -2 where the value is longer than 1 MiB.
    """

def decode(
    values: list[bytes | None], plan: bytes, columns: int, seed: int, canonical: Callable[[dict[str, str]], str], /
) -> tuple[bytes, bytes, bytes, tuple[list[str], bytes]]:
    """Decode values of one schema by a plan (struct decode_step in native/decode.h, made in producer.consume.plan).

    Returns the cells (int64) and whether they are not null (uint8), column by column; each value's status (uint8,
    0 is decoded, 1 invalid, 2 a text too long, 3 a map too large; the cells of others are undefined); and the distinct
    texts with their hashes (int64). A cell of a text is the index of the text, of a map that of its `canonical`
    text, and of a double its bits. `seed` makes the hashes secret.
    """

def lengths(data: _Array, plan: bytes, records: int, /) -> bytes:
    """Return the lengths (int64) of records that follow each other, without frames, by a plan without columns.

    Raises ValueError if the data (uint8) are not that many records.
    """

def groups(seed: int, /, *columns: _Array) -> tuple[bytes, bytes]:
    """Number the distinct rows of 1 to 8 columns (int64) from 0, in order of appearance.

    Returns each row's number, and each number's first row, as int64.
    """

def mark(bits: _Array, positions: _Array, /) -> bytes:
    """Set the bits at the positions (int64) in `bits` (uint8); return which were not set before (uint8)."""

def index_connections(slots: _Array, entries: _Array, kinds: bytes, count: int, floor_ns: int, seed: int, /) -> bool:
    """Fill the slots (uint64) of a table of `count` connections: see native/connections.h and producer.connections."""

def add_connections(
    slots: _Array,
    entries: _Array,
    kinds: bytes,
    count: int,
    floor_ns: int,
    seed: int,
    records: _Array,
    results: _Array,
    /,
) -> int:
    """Take records (int64), set their results, and return how many connections the table then has."""

def count_flows(
    slots: _Array,
    entries: _Array,
    kinds: bytes,
    count: int,
    floor_ns: int,
    seed: int,
    rows: _Array,
    errors: _Array,
    srtt_bounds_us: _Array,
    counts: _Array,
    /,
) -> int:
    """Take rows of the flow stream, add what they count to `counts`, and return how many connections the table has.

    `errors` (uint8) and `srtt_bounds_us` (int64) are struct tcp_groups, and `counts` struct tcp_counts, of
    native/tcp_counts.h. Raises ValueError for sizes other than there.
    """

MAX_IDS: int
"""How many ids an Encoder remembers."""

def finished(data: _Array, offset: int, stride: int, size: int, count: int, /) -> int:
    """Return how many of `count` records of a ring have `size` in their first 32 bits, up to the first that has not.

    They begin at `offset` of `data` and are `stride` bytes apart. What is read of them afterwards is as it was when
    they were submitted. Raises ValueError if one of them begins outside `data`.
    """

def barrier() -> None:
    """Order the accesses to shared memory before this call and after it, as acquire and release do."""

class Encoder:
    """Runs a program of steps (native/encode.h) over rows: one for the messages' bytes, one for their keys."""

    def __new__(cls, steps: bytes, key_steps: bytes, strings: tuple[bytes, ...], row_size: int, /) -> Encoder:
        """Check and copy a program. Raises ValueError if it reads outside rows of `row_size` bytes, or the strings."""

    def bound(self, rows: int, /) -> int:
        """Return how many bytes the messages and keys of `rows` rows have at most, with what is remembered now."""

    def missing(self, rows: _Array, /) -> list[int] | None:
        """Return distinct ids of the rows of which nothing is remembered, 256 at most; None if there are none."""

    def remember(self, id: int, parts: tuple[bytes, ...], /) -> None:
        """Remember an id's encoded parts. All others are forgotten first if there are MAX_IDS, or 8 MiB, of them."""

    def forget(self) -> None:
        """Forget all ids."""

    def encode(self, rows: _Array, utc_offset: int, out: _Array, spans: _Array, /) -> int | None:
        """Encode rows into `out` (uint8), which has `bound(len(rows))` bytes; return how many were written.

        `rows` may lie apart. `spans` (int64, shape (4, rows)) receives starts and lengths of messages, and those of
        keys. Returns None if a number in some row does not fit its field: the lengths of these rows are negative, -1
        minus the index of the step.
        """
