"""librdkafka's mock cluster with faults: failed requests, a broker that is down or slow."""

import ctypes
import logging
import uuid

import confluent_kafka

from producer.kafka import librdkafka
from tests.support.rebpf import DEADLINE_S

PRODUCE, FETCH, LIST_OFFSETS, OFFSET_COMMIT = 0, 1, 2, 8
FIND_COORDINATOR, JOIN_GROUP, INIT_PRODUCER_ID = 10, 11, 22


lib = librdkafka._lib


lib.rd_kafka_mock_push_request_errors_array.argtypes = (
    ctypes.c_void_p, ctypes.c_int16, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int)
)  # fmt: skip


lib.rd_kafka_mock_broker_set_down.argtypes = (ctypes.c_void_p, ctypes.c_int32)


lib.rd_kafka_mock_broker_set_up.argtypes = (ctypes.c_void_p, ctypes.c_int32)


lib.rd_kafka_mock_broker_set_rtt.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int)


lib.rd_kafka_mock_partition_set_leader.argtypes = (
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32
)  # fmt: skip


lib.rd_kafka_mock_topic_delete.argtypes = (ctypes.c_void_p, ctypes.c_char_p)


lib.rd_kafka_mock_start_request_tracking.argtypes = (ctypes.c_void_p,)


lib.rd_kafka_mock_get_requests.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t))
lib.rd_kafka_mock_get_requests.restype = ctypes.POINTER(ctypes.c_void_p)


lib.rd_kafka_mock_request_api_key.argtypes = (ctypes.c_void_p,)
lib.rd_kafka_mock_request_api_key.restype = ctypes.c_int16


lib.rd_kafka_mock_request_destroy_array.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)


lib.rd_kafka_queue_length.argtypes = (ctypes.c_void_p,)


lib.rd_kafka_test_fatal_error.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)


class Cluster:
    """The cluster, inside an otherwise unused client."""

    def __init__(self, brokers: int = 1) -> None:
        self._owner = librdkafka.Producer({"test.mock.num.brokers": str(brokers)})
        self._handle = lib.rd_kafka_handle_mock_cluster(self._owner._handle)
        self.brokers = self._owner.mock_bootstraps()

    def create(self, topic: str, partitions: int = 1) -> None:
        self._owner.mock_topic(topic, partitions)

    def delete(self, topic: str) -> None:
        assert lib.rd_kafka_mock_topic_delete(self._handle, topic.encode()) == 0

    def answer_produce_with(self, *codes: int) -> None:
        """Make the next requests fail with these codes."""
        self.answer_with(PRODUCE, *codes)

    def answer_with(self, request: int, *codes: int) -> None:
        """Make the next requests of a kind fail with these codes."""
        errors = (ctypes.c_int * len(codes))(*codes)
        lib.rd_kafka_mock_push_request_errors_array(self._handle, request, len(codes), errors)

    def track(self) -> None:
        """Begin to remember requests."""
        lib.rd_kafka_mock_start_request_tracking(self._handle)

    def requests(self, kind: int) -> int:
        """Return the number of requests of a kind."""
        count = ctypes.c_size_t()
        found = lib.rd_kafka_mock_get_requests(self._handle, ctypes.byref(count))
        kinds = [lib.rd_kafka_mock_request_api_key(found[at]) for at in range(count.value)]
        lib.rd_kafka_mock_request_destroy_array(found, count)
        return kinds.count(kind)

    def down(self) -> None:
        lib.rd_kafka_mock_broker_set_down(self._handle, 1)

    def slow_down(self, milliseconds: int) -> None:
        """Delay each answer."""
        lib.rd_kafka_mock_broker_set_rtt(self._handle, 1, milliseconds)

    def lead(self, topic: str, partition: int, broker: int) -> None:
        """Make a broker the leader of a partition; -1: none."""
        lib.rd_kafka_mock_partition_set_leader(self._handle, topic.encode(), partition, broker)

    def up(self) -> None:
        lib.rd_kafka_mock_broker_set_up(self._handle, 1)

    def put(self, topic: str, value: bytes, partition: int, at_ms: int = 0) -> None:
        """Write a message, from another client, with a timestamp; 0: now."""
        client = confluent_kafka.Producer({"bootstrap.servers": self.brokers}, logger=logging.getLogger("put"))
        client.list_topics(topic, timeout=10)
        client.produce(topic, value, partition=partition, timestamp=at_ms)
        assert client.flush(10) == 0
        client.close()

    def read(self, topic: str, count: int) -> list[tuple[bytes, bytes]]:
        """Return key and value of a topic's first messages."""
        consumer = confluent_kafka.Consumer(
            {"bootstrap.servers": self.brokers, "group.id": str(uuid.uuid4())}, logger=logging.getLogger("reader")
        )
        try:
            partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            consumer.assign([confluent_kafka.TopicPartition(topic, number, 0) for number in partitions])
            messages = consumer.consume(count, DEADLINE_S)
        finally:
            consumer.close()
        assert [message.error() for message in messages] == [None] * count
        return [(message.key(), message.value()) for message in messages]

    def close(self) -> None:
        self._owner.close()
