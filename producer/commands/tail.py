"""`rebpf tail`: print the events of the topics, as any consumer could read them."""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, Message, TopicPartition

from producer.config.load import Registry
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.event_line import EventFormatter
from producer.errors import ReaderGoneError, UnavailableError
from producer.host.output import echo
from producer.host.signals import Flag
from producer.host.text import to_json
from producer.kafka.consumer import QuietConsumer

_LOG = logging.getLogger(__name__)
_METADATA_TIMEOUT_S = 5
_POLL_S = 0.1
_BATCH = 1000
_MOST_REASONS = 100


class Event(NamedTuple):
    """A decoded message."""

    topic: str
    key: str
    record: dict[str, Any]


class _Follower:
    """A consumer of all partitions of the topics, including topics that do not exist yet."""

    def __init__(
        self, brokers: str, topics: Sequence[str], settings: Mapping[str, str], *, from_beginning: bool
    ) -> None:
        self._missing = list(topics)
        self._from_beginning = from_beginning
        self._next_check = 0.0
        self._connection = QuietConsumer(brokers, "tail", settings, {})
        self._consumer = self._connection.client

    def start(self) -> None:
        """Assign existing partitions, at their end or beginning."""
        with self._connection.translated_errors():
            self._assign_existing(from_beginning=self._from_beginning)
        if self._missing:
            _LOG.warning("waiting for topics=%s", ",".join(self._missing))

    def poll(self) -> list[Message]:
        """Wait briefly, and return the messages that arrived."""
        if self._missing and time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + 1
            try:
                self._assign_existing(from_beginning=True)
            except KafkaException as exc:
                _LOG.debug("no metadata: %s", exc)
        return [message for message in self._consumer.consume(_BATCH, _POLL_S) if not self._failed(message)]

    def close(self) -> None:
        self._consumer.close()

    def _assign_existing(self, *, from_beginning: bool) -> None:
        for topic in list(self._missing):
            metadata = self._consumer.list_topics(topic, timeout=_METADATA_TIMEOUT_S).topics[topic]
            if metadata.error is None:
                partitions = [TopicPartition(topic, number, OFFSET_BEGINNING) for number in metadata.partitions]
                if not from_beginning:
                    # Not OFFSET_END, which is the end at the first fetch, some time later.
                    for partition in partitions:
                        partition.offset = self._consumer.get_watermark_offsets(partition, _METADATA_TIMEOUT_S)[1]
                self._consumer.incremental_assign(partitions)
                self._missing.remove(topic)
            elif metadata.error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise UnavailableError(f"topic {topic}: {metadata.error.str()}")

    def _failed(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return False
        if error.retriable() or error.code() == KafkaError._PARTITION_EOF:
            return True
        raise UnavailableError(f"topic {message.topic()}: {error.str()}")


def batches(
    brokers: str,
    topics: Sequence[str],
    *,
    registry: Registry | str | None,
    from_beginning: bool,
    stop: Flag,
    client_settings: Mapping[str, str],
) -> Generator[list[Event]]:
    """Yield events as they arrive, and an empty list when there are none for a moment, until `stop` is set.

    The first list is empty: every message produced after it will be read.
    """
    decoder = Decoder(registry)
    skipped: dict[str, int] = {}
    follower = _Follower(brokers, topics, client_settings, from_beginning=from_beginning)
    try:
        follower.start()
        yield []
        while not stop.is_set():
            yield list(_decoded(follower.poll(), decoder, skipped))
    finally:
        follower.close()
        for reason, count in skipped.items():
            _LOG.warning("skipped messages=%d reason=%r", count, reason)


def _decoded(messages: Sequence[Message], decoder: Decoder, skipped: dict[str, int]) -> Iterator[Event]:
    records = decoder.records([message.value() for message in messages])
    for message, record in zip(messages, records, strict=True):
        if isinstance(record, UndecodableError):
            _skip(message.topic() or "", str(record), skipped)
        else:
            yield Event(message.topic() or "", (message.key() or b"").decode(errors="replace"), record)


def _skip(topic: str, why: str, skipped: dict[str, int]) -> None:
    """Count a skipped message by its reason, of which there are unlimited many: reasons contain schema ids."""
    reason = f"{topic}: {why}"
    if reason not in skipped and len(skipped) >= _MOST_REASONS:
        reason = f"{topic}: other reasons"
    if reason not in skipped:
        _LOG.warning("skipping messages of topic=%s: %s", topic, why)
    skipped[reason] = skipped.get(reason, 0) + 1


def events(
    brokers: str,
    topics: Sequence[str],
    *,
    registry: Registry | str | None,
    from_beginning: bool,
    stop: Flag,
    client_settings: Mapping[str, str],
) -> Iterator[Event]:
    """Yield (topic, key, record) for each event until `stop` is set."""
    for batch in batches(
        brokers, topics, registry=registry, from_beginning=from_beginning, stop=stop, client_settings=client_settings
    ):
        yield from batch


def tail(
    brokers: str,
    topics: Sequence[str],
    *,
    registry: Registry | str | None,
    as_json: bool,
    limit: int | None,
    color: bool,
    from_beginning: bool,
    stop: Flag,
    client_settings: Mapping[str, str],
) -> None:
    """Print the events of the topics, one per line, until `stop` is set or `limit` are printed."""
    formatter = EventFormatter(color=color)
    source = batches(
        brokers, topics, registry=registry, from_beginning=from_beginning, stop=stop, client_settings=client_settings
    )
    try:
        with contextlib.closing(source):
            _print_all(source, limit, color=color, lines=_json_lines if as_json else partial(_text_lines, formatter))
    finally:
        for reason, count in formatter.rejected.items():
            _LOG.warning("skipped records=%d reason=%r", count, reason)


def _print_all(
    source: Iterable[list[Event]], limit: int | None, *, color: bool, lines: Callable[[Sequence[Event]], list[str]]
) -> None:
    remaining = limit
    for batch in source:
        shown = lines(batch)[:remaining]
        if not _print(shown, color=color):
            return
        if remaining is not None:
            remaining -= len(shown)
            if remaining == 0:
                return


def json_line(event: Event) -> str:
    """Return the event as a JSON object with topic, key and the record's fields."""
    return to_json({"topic": event.topic, "key": event.key, **event.record}, compact=True)


def _json_lines(shown: Sequence[Event]) -> list[str]:
    return [json_line(event) for event in shown]


def _text_lines(formatter: EventFormatter, shown: Sequence[Event]) -> list[str]:
    return formatter.lines(event.record for event in shown)


def _print(lines: Sequence[str], *, color: bool) -> bool:
    """Print and flush; return False if the reader of the output has gone."""
    if lines:
        try:
            echo("\n".join(lines), color=color)
        except ReaderGoneError:
            return False
    return True
