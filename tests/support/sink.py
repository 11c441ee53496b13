"""Batches for a sink, and what becomes of them."""

import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from producer.events import EncodedBatch, Stream, Topic
from producer.kafka.sink import KafkaSink
from tests.support.rebpf import DEADLINE_S

TOPICS = {"transmit": Topic("t"), "retransmit": Topic("r")}
BEATS = {**TOPICS, "heartbeat": Topic("beats")}
SETTINGS = {"linger.ms": "0", "retry.backoff.ms": "10", "topic.metadata.propagation.max.ms": "300"}


def batch(stream: Stream, messages: Sequence[tuple[bytes, bytes]]) -> EncodedBatch:
    """Lay messages out as the encoder does: with gaps, and keys of one width that rows share."""
    gap = b"\xee" * 7
    keys = sorted({key for key, _ in messages})
    width = max(map(len, keys)) + 3
    lengths = np.array([len(value) for _, value in messages], np.int64)
    numbers = np.array([keys.index(key) for key, _ in messages], np.int64)
    return EncodedBatch(
        stream,
        np.frombuffer(b"".join(value + gap for _, value in messages), np.uint8),
        np.concatenate([[0], np.cumsum(lengths + len(gap))[:-1]]).astype(np.int64),
        lengths,
        np.frombuffer(b"".join(key.ljust(width, b"\xee") for key in keys), np.uint8),
        numbers * width,
        np.array([len(key) for key in keys], np.int64)[numbers],
    )


def messages_of(sent: EncodedBatch) -> list[tuple[bytes, bytes]]:
    keys = [sent.keys[at:][:size].tobytes() for at, size in zip(sent.key_starts, sent.key_lengths, strict=True)]
    values = [sent.payload[at:][:size].tobytes() for at, size in zip(sent.starts, sent.lengths, strict=True)]
    return list(zip(keys, values, strict=True))


def numbered(count: int, start: int = 0) -> list[tuple[bytes, bytes]]:
    return [(b"key %d" % (number % 7), b"value %d" % number) for number in range(start, start + count)]


class Ledger:
    """The sum of a sink's outcomes."""

    def __init__(self, sink: KafkaSink) -> None:
        self._sink = sink
        self.delivered: Counter[str] = Counter()
        self.lost: dict[str, Counter[str]] = {name: Counter() for name in BEATS}
        self.done: list[EncodedBatch] = []
        self.lost_of: dict[EncodedBatch, Counter[str]] = {}

    def poll(self) -> None:
        for stream, outcome in self._sink.poll().items():
            self.delivered[stream] += outcome.delivered
            self.lost[stream].update(outcome.lost)
            self.done += [batch for batch, _ in outcome.done]
            self.lost_of.update(dict(outcome.done))

    def wait(self, condition: Callable[[], object]) -> None:
        """Poll until the condition holds."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, (self.delivered, self.lost, len(self.done))
            self.poll()
            time.sleep(0.005)

    def wait_for(self, *batches: EncodedBatch) -> None:
        self.wait(lambda: all(any(each is one for one in self.done) for each in batches))
