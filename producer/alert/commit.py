"""The commit step: once a second, a member publishes everything that is ready, then commits offsets.

The order makes a crash at any point harmless: sums before watermarks, both before the offsets of the events; alerts
before the offsets of the sums, and the topic tcp_alerts last of the sinks, because the next owner of a partition reads
it to learn which alerts were sent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from producer.alert import sums_topic
from producer.alert.model import Alert, Sink
from producer.alert.partitions import EventPartition, HeartbeatPartition, Partition, SumsPartition


class PartitionId(NamedTuple):
    """A partition of a topic."""

    topic: str
    number: int


Assigned = Mapping[PartitionId, Partition]
_AT_ONCE = 1000
"""Most alerts per call of a sink, to bound its requests."""


class Writer(Protocol):
    """Writes to the sums topic."""

    def put(self, partition: int, value: bytes) -> None:
        """Queue a message."""

    def flush(self) -> None:
        """Return when Kafka has acknowledged all queued messages."""


class CommitStep:
    """Writes sums to `writer`, sends alerts to `sinks`, and commits with `commit`."""

    def __init__(
        self, writer: Writer, sums_partitions: int, sinks: Sequence[Sink], commit: Callable[[Assigned], None]
    ) -> None:
        self._writer = writer
        self._sums_partitions = sums_partitions
        self._sinks = sinks
        self._commit = commit

    def run(self, assigned: Assigned) -> int:
        """Publish what is ready; return the number of alerts."""
        for partition in assigned.values():
            partition.reach()
        self._write([partition for partition in assigned.values() if isinstance(partition, EventPartition)])
        changes = [alert for partition in _deciding(assigned) for alert in partition.changes()]
        for at in range(0, len(changes), _AT_ONCE):
            for sink in self._sinks:
                sink.send(changes[at : at + _AT_ONCE])
        if assigned:
            self._commit(assigned)
        return len(changes)

    def repeat(self, assigned: Assigned) -> None:
        """Repeat to the sinks everything that fires."""
        firing: list[Alert] = [alert for partition in _deciding(assigned) for alert in partition.firing]
        for at in range(0, max(1, len(firing)), _AT_ONCE):
            for sink in self._sinks:
                sink.repeat(firing[at : at + _AT_ONCE])

    def _write(self, sources: Sequence[EventPartition]) -> None:
        for partition in sources:
            for sums in partition.sums.take():
                for number, message in sums_topic.sums_messages(
                    partition.stream, partition.name, sums, self._sums_partitions
                ):
                    self._writer.put(number, message)
        for partition in sources:
            watermark = sums_topic.watermark_message(partition.name, partition.sums.watermark_ns)
            for number in range(self._sums_partitions):
                self._writer.put(number, watermark)
        self._writer.flush()


def _deciding(assigned: Assigned) -> list[SumsPartition | HeartbeatPartition]:
    return [partition for partition in assigned.values() if isinstance(partition, SumsPartition | HeartbeatPartition)]
