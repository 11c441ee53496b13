"""Counts what arrived, outside the producer: a plain consumer with a map of every event number seen.

python -m tests.chaos.oracle BROKERS HOST TOPIC=SCHEMA_ID ...

Reads the topics from their beginning until its standard input ends, then up to their ends at that moment; its output
is a JSON object. It shares no code with the producer: the first fields of a record are decoded here, a whole batch at
once.
"""

import json
import select
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import Consumer, KafkaError, TopicPartition

FRAME_BYTES = 5
FRONT_BYTES = 128
"""More than the frame and the fields up to the boot id need."""
GENERATION_BITS = 32
BATCH = 20_000
SILENCE_S = 120.0


@dataclass(slots=True)
class Seen:
    """The numbers of one CPU, topic and generation, and how often each was seen. Numbers start at 1."""

    copies: "np.ndarray[Any, np.dtype[np.uint8]]" = field(default_factory=lambda: np.zeros(1 << 16, np.uint8))
    highest: int = 0

    def add(self, numbers: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        self.highest = max(self.highest, int(numbers.max()))
        while self.highest >= len(self.copies):
            self.copies = np.concatenate([self.copies, np.zeros_like(self.copies)])
        found, counts = np.unique(numbers, return_counts=True)
        self.copies[found] = np.minimum(255, self.copies[found].astype(np.int64) + counts)

    @property
    def distinct(self) -> int:
        return int(np.count_nonzero(self.copies))

    @property
    def missing(self) -> int:
        """Numbers from 1 to the highest that were not seen."""
        return self.highest - self.distinct


class Oracle:
    """Counts the messages of topics. Each must have its schema's id, the host and the boot."""

    def __init__(self, host: str, schema_ids: Mapping[str, int], boot_id: str) -> None:
        self._schema_ids = schema_ids
        self._ids = b"".join(bytes([2 * len(text)]) + text.encode() for text in (host, boot_id))
        self._seen: dict[tuple[str, int, int], Seen] = defaultdict(Seen)
        self.messages: dict[str, int] = dict.fromkeys(schema_ids, 0)
        self.foreign: dict[str, int] = dict.fromkeys(schema_ids, 0)
        """Messages that are not this producer's events."""
        self.samples: list[str] = []

    def add(self, topic: str, values: Sequence[bytes | None]) -> None:
        """Count messages."""
        self.messages[topic] += len(values)
        front = b"".join((value or b"")[:FRONT_BYTES].ljust(FRONT_BYTES, b"\0") for value in values)
        rows = np.frombuffer(front, np.uint8).reshape(len(values), FRONT_BYTES)
        good, cpus, numbers = self._decode(topic, rows)
        if not good.all():
            self.foreign[topic] += int(np.count_nonzero(~good))
            bad = next(value for value, is_good in zip(values, good, strict=True) if not is_good)
            self.samples = [*self.samples, f"{topic}: {(bad or b'')[:64].hex()}"][:5]
        cpus, numbers = cpus[good], numbers[good]
        generations = numbers - 1 >> GENERATION_BITS
        for cpu, generation in set(zip(cpus.tolist(), generations.tolist(), strict=True)):
            mine = (cpus == cpu) & (generations == generation)
            self._seen[topic, cpu, generation].add(numbers[mine] - (generation << GENERATION_BITS))

    def _decode(self, topic: str, rows: Any) -> tuple[Any, Any, Any]:
        """Return which rows are events, and their CPUs and numbers.

        After the frame come the varints ts, ts_ns, cpu and cpu_seq, then host and boot id, each after its length.
        """
        frame = bytes([0]) + self._schema_ids[topic].to_bytes(4, "big")
        good = (rows[:, :FRAME_BYTES] == np.frombuffer(frame, np.uint8)).all(axis=1)
        body = rows[:, FRAME_BYTES:]
        ends_so_far = np.cumsum(body < 0x80, axis=1)
        behind = [np.argmax(ends_so_far >= count, axis=1) + 1 for count in (2, 3, 4)]
        cpus = _varint(body, behind[0], behind[1])
        numbers = _varint(body, behind[1], behind[2])
        ids = np.frombuffer(self._ids, np.uint8)
        at = np.minimum(behind[2][:, None] + np.arange(len(ids)), body.shape[1] - 1)
        good &= (np.take_along_axis(body, at, axis=1) == ids).all(axis=1)
        good &= (numbers > 0) & (cpus >= 0) & (cpus < 1 << 14)
        return good, cpus, numbers

    def report(self) -> dict[str, Any]:
        """Return the counts by topic."""
        report: dict[str, Any] = {"foreign_samples": self.samples}
        for topic in self._schema_ids:
            seen = [(key, each) for key, each in self._seen.items() if key[0] == topic]
            report[topic] = {
                "messages": self.messages[topic],
                "foreign": self.foreign[topic],
                "distinct": sum(each.distinct for _, each in seen),
                "missing": sum(each.missing for _, each in seen),
                "generations": len({key[2] for key, _ in seen}),
            }
        return report


def _varint(body: Any, start: Any, end: Any) -> Any:
    """Return the zig-zag numbers between two columns of each row."""
    value = np.zeros(len(body), np.uint64)
    for place in range(10):
        at = np.minimum(start + place, body.shape[1] - 1)
        septet = np.take_along_axis(body, at[:, None], axis=1)[:, 0].astype(np.uint64) & np.uint64(0x7F)
        value |= np.where(start + place < end, septet << np.uint64(min(7 * place, 63)), np.uint64(0))
    return (value >> np.uint64(1)).astype(np.int64) ^ -(value & np.uint64(1)).astype(np.int64)


def main(brokers: str, host: str, *topics: str) -> None:
    schema_ids = {name: int(number) for name, _, number in (each.partition("=") for each in topics)}
    oracle = Oracle(host, schema_ids, Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    consumer = Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "chaos-oracle",
            "enable.auto.commit": False,
            "auto.offset.reset": "error",  # what was deleted before it was read would look like a loss
            "reconnect.backoff.max.ms": 1000,
            "queued.max.messages.kbytes": 65536,
            "log_level": 0,
        }
    )
    metadata = consumer.list_topics(timeout=30).topics
    parts = [(topic, part) for topic in schema_ids for part in metadata[topic].partitions]
    consumer.assign([TopicPartition(*part, 0) for part in parts])
    print("ready", flush=True)
    at: dict[tuple[str, int], int] = dict.fromkeys(parts, 0)
    ends: dict[tuple[str, int], int] | None = None
    last = time.monotonic()
    while ends is None or any(at[part] < ends[part] for part in parts):
        values: dict[str, list[bytes | None]] = defaultdict(list)
        for message in consumer.consume(BATCH, 0.5):
            if error := message.error():
                if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
                    raise SystemExit(f"the oracle is too slow: {error.str()}")
                continue
            topic, part, offset = message.topic() or "", message.partition() or 0, message.offset() or 0
            values[topic].append(message.value())
            at[topic, part] = offset + 1
            last = time.monotonic()
        for topic, some in values.items():
            oracle.add(topic, some)
        if ends is None and select.select([sys.stdin], [], [], 0)[0]:
            ends = {part: consumer.get_watermark_offsets(TopicPartition(*part), 30)[1] for part in parts}
            last = time.monotonic()
        if ends is not None and time.monotonic() > last + SILENCE_S:
            raise SystemExit(f"no message for {SILENCE_S:.0f} s: at {at} of {ends}")
    print(json.dumps(oracle.report()), flush=True)
    consumer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
