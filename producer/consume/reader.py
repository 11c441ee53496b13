"""Reads topics from beginning to end, over its own connection."""

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress, pairwise
from operator import ne
from typing import NamedTuple

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, Message, TopicPartition

from producer.consume.audit import ALL
from producer.errors import UnavailableError
from producer.host.progress import Progress
from producer.kafka.confluent import is_test_broker, list_topics
from producer.kafka.consumer import QuietConsumer, is_passing, offsets, topic_error

_METADATA_TIMEOUT_S = 5
_SILENCE_S = 30
_POLL_S = 0.1
_BATCH = 10_000
_SKEW_MS = 60_000
"""Allowance for clock differences between hosts and for delivery time."""


class PartitionId(NamedTuple):
    """A partition of a topic."""

    topic: str
    number: int


def collect_rarely() -> None:
    """Let this process collect garbage after 100,000 objects that stay, and not after 700.

    Messages come in batches of thousands and are freed together: collections in between are a tenth of a reader's cost.
    """
    gc.set_threshold(100_000)


def by_partition(messages: list[Message]) -> list[tuple[PartitionId, list[Message]]]:
    """Return a consumer's batch in runs of messages of one partition; an error is the last of its run."""
    if not messages:
        return []
    # map() with the methods of the class costs half as much as a loop over the messages.
    topics, numbers = list(map(Message.topic, messages)), list(map(Message.partition, messages))
    errors = list(map(Message.error, messages))
    starts = {0, *compress(range(1, len(messages)), map(ne, numbers[1:], numbers))}
    starts.update(compress(range(1, len(messages)), map(ne, topics[1:], topics)))
    if any(errors):
        starts.update(at + 1 for at, error in enumerate(errors) if error is not None)
    bounds = [*sorted(starts - {len(messages)}), len(messages)]
    return [
        (PartitionId(topics[start] or "", numbers[start] or 0), messages[start:end]) for start, end in pairwise(bounds)
    ]


class TopicReader:
    """Reads all partitions of the topics up to the ends that they had at the start.

    `since` is the offset to start at, or, if negative, how many messages before the end; `since_ms` is the time of the
    first message instead, if the brokers find messages by time. With `skip_missing`, topics need not exist.
    """

    def __init__(
        self,
        brokers: str,
        topics: Sequence[str],
        settings: Mapping[str, str],
        since: int | None = None,
        *,
        since_ms: int | None = None,
        skip_missing: bool = False,
    ) -> None:
        self._brokers = brokers
        overrides = {"auto.offset.reset": "error", "enable.partition.eof": "true"}
        self._connection = QuietConsumer(brokers, "verify", settings, overrides)
        self._consumer = self._connection.client
        self._skip_missing = skip_missing
        self._finds_times = True
        with self._connection.translated_errors(), Progress(f"connecting to Kafka at {brokers}"):
            partitions = [partition for topic in topics for partition in self._partitions(topic)]
            starts, ends = (
                offsets(self._consumer, partitions, each, _METADATA_TIMEOUT_S)
                for each in (OFFSET_BEGINNING, OFFSET_END)
            )
            self.spans = {each: self._span(starts[each], ends[each], since) for each in partitions}
            if since_ms is not None and self._finds_times:
                self._start_at(since_ms)

    def complete_from_ms(self, topic: str) -> float:
        """Return the time from which the topic is complete: the latest beginning of its partitions.

        ALL if no message was deleted, infinity if all messages of a partition were.
        """
        latest: float = ALL
        for partition, (start, end) in self.spans.items():
            if partition.topic == topic and start > 0:
                latest = max(latest, self._timestamp_ms(partition, start) + _SKEW_MS if start < end else math.inf)
        return latest

    def batches(self, progress: Progress | None = None) -> Iterator[dict[str, list[Message]]]:
        """Yield all messages by topic, in each partition's order; tell `progress` how many were read, of how many."""
        done, total = 0, sum(end - start for start, end in self.spans.values())
        remaining = {partition: end for partition, (start, end) in self.spans.items() if start < end}
        starts = [TopicPartition(*partition, self.spans[partition][0]) for partition in remaining]
        self._consumer.assign(starts)
        while remaining:
            batch: dict[str, list[Message]] = {}
            for partition, messages in by_partition(self._receive()):
                if partition not in remaining:
                    continue
                last = messages[-1]
                is_end = last.error() is not None
                if is_end or (last.offset() or 0) >= remaining[partition] - 1:
                    end = remaining.pop(partition)
                    self._consumer.incremental_unassign([TopicPartition(*partition)])
                    messages = [each for each in messages if each.error() is None and (each.offset() or 0) < end]
                batch.setdefault(partition.topic, []).extend(messages)
            yield batch
            done += sum(map(len, batch.values()))
            if progress is not None:
                progress(done, total)

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def _partitions(self, topic: str) -> list[PartitionId]:
        found = list_topics(self._consumer, _METADATA_TIMEOUT_S, topic)
        # The test broker says of any time that no message is as late.
        self._finds_times, metadata = not is_test_broker(found), found.topics[topic]
        if metadata.error is not None:
            if self._skip_missing and metadata.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return []
            raise topic_error(topic, metadata.error)
        if leaderless := [number for number, each in metadata.partitions.items() if each.leader < 0]:
            which = ", ".join(map(str, sorted(leaderless)))
            raise UnavailableError(f"topic {topic}: no leader of partitions {which}: start their brokers")
        return [PartitionId(topic, number) for number in sorted(metadata.partitions)]

    @staticmethod
    def _span(low: int, high: int, since: int | None) -> tuple[int, int]:
        if since is None:
            return low, high
        return max(low, min(high, since if since >= 0 else high + since)), high

    def _start_at(self, since_ms: int) -> None:
        """Start at the first message of this time or later, in each partition."""
        asked = [TopicPartition(*partition, max(0, since_ms)) for partition in self.spans]
        for found in self._consumer.offsets_for_times(asked, _METADATA_TIMEOUT_S) if asked else ():
            partition = PartitionId(found.topic, found.partition)
            low, high = self.spans[partition]
            # A negative offset is the end: no message is as late.
            self.spans[partition] = (max(low, min(high, found.offset)) if found.offset >= 0 else high, high)

    def _timestamp_ms(self, partition: PartitionId, offset: int) -> float:
        """Return the time of the first message from the offset on; infinity if there are only control records."""
        self._consumer.assign([TopicPartition(*partition, offset)])
        while True:
            for message in self._receive():
                if (message.topic(), message.partition()) == partition:
                    return float(message.timestamp()[1]) if message.error() is None else math.inf

    def _receive(self) -> list[Message]:
        """Wait for messages or end-of-partition events; UnavailableError if none come."""
        deadline = time.monotonic() + _SILENCE_S
        while time.monotonic() < deadline:
            messages = self._consumer.consume(_BATCH, _POLL_S)
            if any(map(Message.error, messages)):
                messages = [each for each in messages if not self._is_transient_error(each)]
            if messages:
                return messages
        reason = self._connection.errors.reason
        raise UnavailableError(f"no message from Kafka at {self._brokers} for {_SILENCE_S} s{reason}")

    @staticmethod
    def _is_transient_error(message: Message) -> bool:
        error = message.error()
        if error is None or error.code() == KafkaError._PARTITION_EOF:
            return False
        if is_passing(error):
            return True
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            raise UnavailableError(f"topic {message.topic()}: messages were deleted while being read: try again")
        raise topic_error(message.topic(), error)
