"""`rebpf tail`: print the events of the topics, as any consumer could read them."""

import contextlib
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from confluent_kafka import Message

from producer.config.load import Registry
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.follow import Follower, Start
from producer.consume.period import ALWAYS, Period
from producer.consume.reader import TopicReader
from producer.errors import ReaderGoneError, UnavailableError
from producer.events import TRANSMITS
from producer.host.output import echo, require_reader
from producer.host.signals import Flag
from producer.host.text import to_json
from producer.view.filter import Filter
from producer.view.line import Lines
from producer.view.records import Records, stream_of

logger = logging.getLogger(__name__)
_MOST_REASONS = 100


class Event(NamedTuple):
    """A decoded message."""

    topic: str
    key: str
    record: dict[str, Any]


def batches(
    brokers: str,
    topics: Sequence[str],
    *,
    registry: Registry | None,
    from_beginning: bool,
    stop: Flag,
    client_settings: Mapping[str, str],
    since_ms: int | None = None,
) -> Generator[list[Event]]:
    """Yield events as they arrive, and an empty list when there are none for a moment, until `stop` is set.

    The first list is empty: every message produced after it will be read.
    """
    start: int = Start.BEGINNING if from_beginning else Start.END
    if since_ms is not None:
        start = since_ms or Start.BEGINNING
    return _events(_arriving(brokers, topics, client_settings, start, stop), registry)


def _arriving(
    brokers: str, topics: Sequence[str], settings: Mapping[str, str], start: int, stop: Flag
) -> Generator[list[Message]]:
    with contextlib.closing(Follower(brokers, "tail", topics, settings, start=start)) as follower:
        follower.start()
        yield []
        while not stop.is_set():
            yield follower.poll()


def _existing(
    brokers: str, topics: Sequence[str], settings: Mapping[str, str], since_ms: int | None, stop: Flag
) -> Generator[list[Message]]:
    reader = TopicReader(brokers, topics, settings, since_ms=since_ms, skip_missing=True)
    with contextlib.closing(reader):
        if not reader.spans:
            raise UnavailableError(f"no topic {', '.join(topics)} at {brokers}")
        for batch in reader.batches():
            if stop.is_set():
                return
            yield [message for messages in batch.values() for message in messages]


def _events(source: Generator[list[Message]], registry: Registry | None) -> Generator[list[Event]]:
    """Yield the events among messages; at the end, log how many others were skipped."""
    decoder = Decoder(registry)
    skipped: dict[str, int] = {}
    try:
        with contextlib.closing(source):
            for messages in source:
                yield list(_decoded(messages, decoder, skipped))
    finally:
        for reason, count in skipped.items():
            logger.warning("skipped messages=%d reason=%r", count, reason)


def _decoded(messages: Sequence[Message], decoder: Decoder, skipped: dict[str, int]) -> Iterator[Event]:
    records = decoder.records([message.value() for message in messages])
    for message, record in zip(messages, records, strict=True):
        if isinstance(record, UndecodableError):
            _skip(message.topic() or "", str(record), skipped)
        else:
            yield Event(message.topic() or "", (message.key() or b"").decode(errors="replace"), record)


def _skip(topic: str, why: str, skipped: dict[str, int]) -> None:
    """Count a skipped message by its reason. Reasons contain schema ids, so their number has to be limited."""
    reason = f"{topic}: {why}"
    if reason not in skipped and len(skipped) >= _MOST_REASONS:
        reason = f"{topic}: other reasons"
    if reason not in skipped:
        logger.warning("skipping messages of topic=%s: %s", topic, why)
    skipped[reason] = skipped.get(reason, 0) + 1


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which events to print: those that match, in a period; with an end, those of it that exist."""

    matches: Filter | None = None
    period: Period = ALWAYS

    @property
    def since_ms(self) -> int | None:
        """Kafka's time of the first message to read: an event is sent after its time."""
        return None if self.period.since_ns is None else self.period.since_ns // 1_000_000

    def events(self, batch: list[Event]) -> list[Event]:
        """Return the chosen events of a batch."""
        if self.matches is None and self.period == ALWAYS:
            return batch
        # Records with the same fields are checked together.
        alike: dict[tuple[Any, ...], list[int]] = {}
        for at, event in enumerate(batch):
            alike.setdefault((stream_of(event.record) or TRANSMITS, *event.record), []).append(at)
        chosen = np.zeros(len(batch), np.bool_)
        for (stream, *_), places in alike.items():
            records = Records.from_rows(stream, [batch[at].record for at in places])
            has_ns = "ts_ns" in records.columns  # alerts and heartbeats have milliseconds alone
            mask = self.period.mask(records["ts_ns"].cells if has_ns else records["ts"].cells * 1_000_000)
            chosen[places] = mask if self.matches is None else mask & self.matches(records)
        return [batch[at] for at in np.flatnonzero(chosen).tolist()]


def tail(
    brokers: str,
    topics: Sequence[str],
    *,
    registry: Registry | None,
    as_json: bool,
    limit: int | None,
    color: bool,
    from_beginning: bool,
    stop: Flag,
    client_settings: Mapping[str, str],
    chosen: Chosen = Chosen(),  # frozen
    width: int = 200,
) -> None:
    """Print the events of the topics, one per line, until `stop` is set or `limit` are printed."""
    view = Lines(width, hosts=True, color=color, connections=True)
    if chosen.period.until_ns is None:
        source = batches(
            brokers, topics, registry=registry, from_beginning=from_beginning, stop=stop,
            client_settings=client_settings, since_ms=chosen.since_ms,
        )  # fmt: skip
    else:
        source = _events(_existing(brokers, topics, client_settings, chosen.since_ms, stop), registry)

    def lines(shown: list[Event]) -> list[str]:
        return list(map(json_line, shown)) if as_json else view.lines(event.record for event in shown)

    try:
        with contextlib.suppress(ReaderGoneError), contextlib.closing(source):
            if not as_json:
                echo(view.header())
            _print(map(lines, map(chosen.events, source)), limit, color=color)
    finally:
        for reason, count in view.rejected.items():
            logger.warning("skipped records=%d reason=%r", count, reason)


def _print(batches: Iterable[list[str]], limit: int | None, *, color: bool) -> None:
    """Print the lines of each batch, until `limit` are printed."""
    remaining = limit
    for lines in batches:
        shown = lines[:remaining]
        if shown:
            echo("\n".join(shown), color=color)
        require_reader()
        if remaining is not None:
            remaining -= len(shown)
            if remaining == 0:
                return


def json_line(event: Event) -> str:
    """Return the event as a JSON object with topic, key and the record's fields."""
    return to_json({"topic": event.topic, "key": event.key, **event.record}, compact=True)
