"""A part of what is read: events of one stream and one version of its schema."""

from dataclasses import dataclass

from producer.consume.columns import Table
from producer.events import Ints, Stream


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Events, and for those of a topic, the partition of each message."""

    stream: Stream
    table: Table
    partitions: Ints | None = None
