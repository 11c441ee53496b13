"""The hot loops in C, from native/. Arrays are passed as C-contiguous buffers; their item sizes are checked.

Raises ValueError for a buffer of another size, and BufferError or TypeError for an object that has none.
"""

from typing_extensions import Buffer

def messages(
    out: Buffer,
    batch: int,
    payload: Buffer,
    starts: Buffer,
    lengths: Buffer,
    keys: Buffer,
    key_starts: Buffer,
    key_lengths: Buffer,
    rows: Buffer | None,
    /,
) -> None:
    """Fill `out`, an array of MESSAGE (producer.kafka.librdkafka), with rows of a batch: all of `out` is written.

    Payload and key point into `payload` and `keys` (uint8), which must outlive the messages. `starts`, `lengths`,
    `key_starts`, `key_lengths` and `rows` are int64; `rows` has the length of `out`, or is None for the first len(out)
    rows. `private` is `batch << 20 | row`; `batch` has at most 44 bits. The other members become 0.
    Raises ValueError for a row that is outside the batch, or whose bytes are outside their buffer.
    """

def reports(pointers: Buffer, err: Buffer, private: Buffer, /) -> None:
    """Copy `err` (int32) and `private` (uint64) of each rd_kafka_message_t that `pointers` (uint64) point to.

    All three have the same length. The pointers must be valid: those that rd_kafka_event_message_array() returned,
    before rd_kafka_event_destroy().
    """
