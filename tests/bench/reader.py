"""How old events are when a consumer has them.

python -m tests.bench.reader BROKERS. Reads both topics from their ends, and for each line on standard input prints, by
topic, the ages in ms of a sample of the events since the line before, in JSON. It decodes nothing but the time.
"""

import json
import sys
import threading
import time

from confluent_kafka import Consumer, Message, TopicPartition

TOPICS = ("tcp_transmit", "tcp_retransmit")
_FRAME_BYTES = 5
_SAMPLED = 50
"""Events of each fetch whose age is taken, at most."""


def ts_ns(value: bytes) -> int:
    """Return the event's time: the second field, after ts, which is as long as its bytes with the high bit set."""
    at = _FRAME_BYTES
    while value[at] & 0x80:
        at += 1
    zigzag = shift = 0
    while True:
        at += 1
        zigzag |= (value[at] & 0x7F) << shift
        shift += 7
        if not value[at] & 0x80:
            return zigzag >> 1


class Ages:
    """Collects ages, and hands them out, from different threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ms: dict[str, list[float]] = {topic: [] for topic in TOPICS}

    def add(self, messages: list[Message]) -> None:
        """Take the ages of a sample of messages that have just come, and of all retransmits."""
        now_ns = time.time_ns()
        step = 1 + len(messages) // _SAMPLED
        chosen = [m for i, m in enumerate(messages) if not i % step or m.topic() == "tcp_retransmit"]
        with self._lock:
            for message in chosen:
                value, topic = message.value(), message.topic()
                if message.error() is None and value and topic:
                    self._ms[topic].append((now_ns - ts_ns(value)) / 1e6)

    def take(self) -> dict[str, list[float]]:
        """Return the ages since the last call, by topic."""
        with self._lock:
            taken, self._ms = self._ms, {topic: [] for topic in TOPICS}
        return taken


def main(brokers: str) -> None:
    """Read until standard input ends."""
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": "bench", "enable.auto.commit": False})
    ages = Ages()

    def answer() -> None:
        for _ in sys.stdin:
            print(json.dumps(ages.take()), flush=True)

    answering = threading.Thread(target=answer, daemon=True)
    ends = []
    for topic in TOPICS:
        for partition in consumer.list_topics(topic).topics[topic].partitions:
            _, end = consumer.get_watermark_offsets(TopicPartition(topic, partition))
            ends.append(TopicPartition(topic, partition, end))
    consumer.assign(ends)
    answering.start()
    while answering.is_alive():
        # What has come, without waiting for more.
        if (first := consumer.poll(0.1)) is not None:
            ages.add([first, *consumer.consume(10_000, 0)])
    consumer.close()


if __name__ == "__main__":
    main(sys.argv[1])
