"""`rebpf tail`: print the events of the topics, as any consumer could read them."""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from confluent_kafka import Message

from producer.config.load import Registry
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.follow import Follower, Start
from producer.consume.period import ALWAYS, Period
from producer.consume.reader import TopicReader
from producer.errors import ReaderGoneError, UnavailableError
from producer.events import FLOWS, RETRANSMITS, TRANSMITS, Stream
from producer.host.output import echo, require_reader
from producer.host.signals import Flag
from producer.host.text import to_json
from producer.view.filter import Filter
from producer.view.line import Lines, is_connection, is_retransmission
from producer.view.records import of_rows

_LOG = logging.getLogger(__name__)
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
    registry: Registry | str | None,
    from_beginning: bool,
    stop: Flag,
    client_settings: Mapping[str, str],
    since_ms: int | None = None,
) -> Generator[list[Event]]:
    """Yield events as they arrive, and an empty list when there are none for a moment, until `stop` is set.

    The first list is empty: every message produced after it will be read.
    """
    decoder = Decoder(registry)
    skipped: dict[str, int] = {}
    if since_ms is None:
        start: int = Start.BEGINNING if from_beginning else Start.END
    else:
        start = since_ms or Start.BEGINNING
    follower = Follower(brokers, "tail", topics, client_settings, start=start)
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
    """Count a skipped message by its reason. Reasons contain schema ids, so their number has to be limited."""
    reason = f"{topic}: {why}"
    if reason not in skipped and len(skipped) >= _MOST_REASONS:
        reason = f"{topic}: other reasons"
    if reason not in skipped:
        _LOG.warning("skipping messages of topic=%s: %s", topic, why)
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
        # Those with the same fields are looked at together.
        alike: dict[tuple[Any, ...], list[int]] = {}
        for at, event in enumerate(batch):
            alike.setdefault((_stream(event.record), *event.record), []).append(at)
        chosen = np.zeros(len(batch), np.bool_)
        for (stream, *_), places in alike.items():
            records = of_rows(stream, [batch[at].record for at in places])
            ts_ns = records["ts_ns"]
            mask = self.period.mask(ts_ns.cells) | ~ts_ns.valid  # alerts and heartbeats do not have it
            chosen[places] = mask if self.matches is None else mask & self.matches(records)
        return [batch[at] for at in np.flatnonzero(chosen).tolist()]


def _stream(record: Mapping[str, Any]) -> Stream:
    return RETRANSMITS if is_retransmission(record) else FLOWS if is_connection(record) else TRANSMITS


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
    chosen: Chosen = Chosen(),  # frozen
    width: int = 200,
) -> None:
    """Print the events of the topics, one per line, until `stop` is set or `limit` are printed."""
    view = Lines(width, hosts=True, color=color, connections=True)
    if not as_json and not _print([view.header()], color=False):
        return
    if chosen.period.until_ns is None:
        source = batches(
            brokers, topics, registry=registry, from_beginning=from_beginning, stop=stop,
            client_settings=client_settings, since_ms=chosen.since_ms,
        )  # fmt: skip
    else:
        source = _until_end(brokers, topics, registry, chosen.since_ms, stop, client_settings)
    try:
        with contextlib.closing(source):
            matching = map(chosen.events, source)
            _print_all(matching, limit, color=color, lines=_json_lines if as_json else partial(_text_lines, view))
    finally:
        for reason, count in view.rejected.items():
            _LOG.warning("skipped records=%d reason=%r", count, reason)


def _until_end(
    brokers: str,
    topics: Sequence[str],
    registry: Registry | str | None,
    since_ms: int | None,
    stop: Flag,
    client_settings: Mapping[str, str],
) -> Generator[list[Event]]:
    """Yield the events that exist now."""
    decoder = Decoder(registry)
    skipped: dict[str, int] = {}
    reader = TopicReader(brokers, topics, client_settings, None, since_ms=since_ms, skip_missing=True)
    try:
        if not reader.spans:
            raise UnavailableError(f"no topic {', '.join(topics)} at {brokers}")
        for batch in reader.batches():
            if stop.is_set():
                return
            yield list(_decoded([message for messages in batch.values() for message in messages], decoder, skipped))
    finally:
        reader.close()
        for reason, count in skipped.items():
            _LOG.warning("skipped messages=%d reason=%r", count, reason)


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


def _text_lines(view: Lines, shown: Sequence[Event]) -> list[str]:
    return view.lines(event.record for event in shown)


def _print(lines: Sequence[str], *, color: bool) -> bool:
    """Print and flush; return False if the reader of the output has gone."""
    try:
        if lines:
            echo("\n".join(lines), color=color)
        require_reader()
    except ReaderGoneError:
        return False
    return True
