"""Where events are read from: files, or topics from one time to another."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from confluent_kafka import Message

from producer.config.load import Registry
from producer.consume.decode import Decoder
from producer.consume.reader import TopicReader
from producer.errors import UnavailableError
from producer.events import Stream
from producer.export.container import read_container
from producer.export.part import Part
from producer.host.progress import Progress
from producer.schemas import streams
from producer.spool.files import SPOOL_SUFFIX

Names = Mapping[Stream, frozenset[str]]
"""The fields to read, by stream; all of the streams that are not in it."""
_DELAY_MS = 60_000
"""Messages are read from this long before the period, in case the clock was set back before an event was sent."""
PARQUET = ".parquet"


def read_file(path: Path, names: Names, *, in_order: bool = False) -> Iterator[Part]:
    """Yield the events of a Parquet or Avro file (see read_container); the former needs pyarrow."""
    if path.suffix == PARQUET:
        from producer.export.parquet import read_parquet

        return read_parquet(path, names)
    return read_container(path, names, in_order=in_order)


class Files:
    """Avro and Parquet files, or folders of them. Raises UnavailableError if there are none."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [file for path in paths for file in _files(path)]
        if not self._files:
            where = ", ".join(map(str, paths))
            kinds = "an export to Parquet, a spool, or files of `rebpf trace -w`"
            raise UnavailableError(f"no {SPOOL_SUFFIX} or {PARQUET} files in {where}: expected {kinds}")
        self.undecodable, self.reason = 0, ""

    def parts(self, names: Names, progress: Progress | None = None) -> Iterator[Part]:
        """Yield the events of all files."""
        sizes = [_size(path) for path in self._files]
        read = 0
        for path, size in zip(self._files, sizes, strict=True):
            if progress is not None:
                progress(read, sum(sizes))
            yield from read_file(path, names)
            read += size


@dataclass
class Topics:
    """Topics by stream, as far as they exist. Messages sent before `since_ns` are not read."""

    brokers: str
    topics: Mapping[Stream, str]
    registry: Registry | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    since_ns: int | None = None

    def __post_init__(self) -> None:
        self.undecodable, self.reason = 0, ""
        self._streams = {topic: stream for stream, topic in self.topics.items()}

    def parts(self, names: Names, progress: Progress | None = None) -> Iterator[Part]:
        """Yield the events up to the end that the topics have now."""
        decoder = Decoder(self.registry)
        since_ms = None if self.since_ns is None else self.since_ns // 1_000_000 - _DELAY_MS
        reader = TopicReader(self.brokers, [*self._streams], self.settings, since_ms=since_ms, skip_missing=True)
        with closing(reader):
            if not reader.spans:
                raise UnavailableError(f"no topic {', '.join(self._streams)} at {self.brokers}")
            for batch in reader.batches(progress):
                for topic, messages in batch.items():
                    stream = self._streams[topic]
                    yield from self._decoded(decoder, stream, messages, names.get(stream))

    def _decoded(
        self, decoder: Decoder, stream: Stream, messages: Sequence[Message], names: frozenset[str] | None
    ) -> Iterator[Part]:
        tables, rejected = decoder.tables(list(map(Message.value, messages)), names)
        for _, reason in rejected[:1]:
            self.reason = self.reason or reason
        self.undecodable += len(rejected)
        partitions = np.array(list(map(Message.partition, messages)), np.int64)
        for rows, table in tables:
            decoded = int(np.count_nonzero(table.status == 0))
            if streams().get(table.plan.record) != stream:  # a record of another topic
                self.reason = self.reason or f"a record of another topic: {table.plan.record}"
                self.undecodable += decoded
            elif decoded:
                yield Part(stream, table, partitions[rows])


def undecodable(source: Files | Topics) -> str:
    """Return how many messages could not be decoded, and why the first could not; empty if there are none."""
    return f"undecodable messages: {source.undecodable}, the first: {source.reason}" if source.undecodable else ""


def _files(path: Path) -> list[Path]:
    """Return a file, or those of a folder."""
    if not path.is_dir():
        return [path]
    return sorted(file for suffix in (SPOOL_SUFFIX, PARQUET) for file in path.rglob(f"*{suffix}"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}") from error
