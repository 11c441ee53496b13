"""`rebpf tail`: print the events of the topics, as any consumer could read them."""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from confluent_kafka import Message

from producer.config.load import Registry
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.event_line import EventFormatter
from producer.consume.follow import Follower, Start
from producer.errors import ReaderGoneError
from producer.host.output import echo
from producer.host.signals import Flag
from producer.host.text import to_json

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
) -> Generator[list[Event]]:
    """Yield events as they arrive, and an empty list when there are none for a moment, until `stop` is set.

    The first list is empty: every message produced after it will be read.
    """
    decoder = Decoder(registry)
    skipped: dict[str, int] = {}
    follower = Follower(
        brokers, "tail", topics, client_settings, start=Start.BEGINNING if from_beginning else Start.END
    )
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
