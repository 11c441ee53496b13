"""What a member does once a second: all that is ready goes out, and then offsets are committed.

The order is such that an end at any point is harmless: sums before watermarks, both before the offsets of the events;
alerts before the offsets of the sums, and tcp_alerts, from which the next to decide learns what was told, as the last
of the sinks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from producer.alert import sums_topic
from producer.alert.model import Alert, Sink
from producer.alert.partitions import HeartbeatPart, Part, SourcePart, SumsPart


class Place(NamedTuple):
    """A partition of a topic."""

    topic: str
    number: int


Parts = Mapping[Place, Part]
_AT_ONCE = 1000
"""Alerts that a sink gets at a time: however many there are, a request has a bound."""


class Writer(Protocol):
    """Writes to the topic of the sums."""

    def put(self, partition: int, value: bytes) -> None:
        """Queue a message."""

    def flush(self) -> None:
        """Return when Kafka has all that was queued."""


class Cycle:
    """Writes to `writer`, tells `sinks`, and commits with `commit`; `partitions` are those of the topic of the sums."""

    def __init__(self, writer: Writer, partitions: int, sinks: Sequence[Sink], commit: Callable[[Parts], None]) -> None:
        self._writer = writer
        self._partitions = partitions
        self._sinks = sinks
        self._commit = commit

    def run(self, parts: Parts) -> int:
        """Put out what is ready; return how many alerts."""
        for part in parts.values():
            part.reach()
        self._write([part for part in parts.values() if isinstance(part, SourcePart)])
        changes = [alert for part in _deciding(parts) for alert in part.changes()]
        for at in range(0, len(changes), _AT_ONCE):
            for sink in self._sinks:
                sink.send(changes[at : at + _AT_ONCE])
        if parts:
            self._commit(parts)
        return len(changes)

    def repeat(self, parts: Parts) -> None:
        """Remind the sinks of what fires."""
        firing: list[Alert] = [alert for part in _deciding(parts) for alert in part.firing]
        for at in range(0, max(1, len(firing)), _AT_ONCE):
            for sink in self._sinks:
                sink.repeat(firing[at : at + _AT_ONCE])

    def _write(self, sources: Sequence[SourcePart]) -> None:
        for part in sources:
            for sums in part.sums.take():
                for partition, message in sums_topic.sums_messages(part.stream, part.name, sums, self._partitions):
                    self._writer.put(partition, message)
        for part in sources:
            watermark = sums_topic.watermark_message(part.name, part.sums.watermark_ns)
            for partition in range(self._partitions):
                self._writer.put(partition, watermark)
        self._writer.flush()


def _deciding(parts: Parts) -> list[SumsPart | HeartbeatPart]:
    return [part for part in parts.values() if isinstance(part, SumsPart | HeartbeatPart)]
