"""librdkafka's mock cluster, with events in its topics."""

import logging
from collections.abc import Sequence

from confluent_kafka import Producer

from producer.events import STREAMS, Stream
from tests.support.records import message

TOPICS = [stream.topic for stream in STREAMS]


class Cluster:
    """librdkafka's mock cluster, and a producer for it."""

    def __init__(self) -> None:
        self._producer = Producer(
            {"bootstrap.servers": "none", "test.mock.num.brokers": 1, "linger.ms": 0},
            logger=logging.getLogger("cluster"),
        )
        (broker,) = self._producer.list_topics(timeout=10).brokers.values()
        self.brokers = f"{broker.host}:{broker.port}"

    def put(self, topic: str, value: bytes, key: str = "a:1>b:2") -> None:
        self._producer.produce(topic, value, key)
        assert self._producer.flush(10) == 0

    def put_events(self, stream: Stream, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.put(stream.topic, message(stream, seq=number))

    def close(self) -> None:
        self._producer.close()
