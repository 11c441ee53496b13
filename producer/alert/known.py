"""The last alert of each group, as the topic tcp_alerts has it: the state that a member begins with."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import fields

from producer.alert.alert import Alert
from producer.decode import Decoder, UndecodableError
from producer.topicreader import TopicReader

logger = logging.getLogger(__name__)


def last_alerts(brokers: str, topic: str, settings: Mapping[str, str], decoder: Decoder) -> list[Alert]:
    """Read the whole topic, which is compacted, and return the last alert of each key."""
    last: dict[bytes, Alert] = {}
    reader = TopicReader(brokers, [topic], settings, None)
    try:
        for key, value in _messages(reader):
            last.pop(key, None)
            if value is not None:  # else a tombstone: the alert is to be forgotten
                try:
                    last[key] = _alert(value, decoder)
                except (UndecodableError, KeyError) as exc:
                    logger.warning("passing over an alert in topic=%s key=%r: %r", topic, key, exc)
    finally:
        reader.close()
    return list(last.values())


def _messages(reader: TopicReader) -> Iterator[tuple[bytes, bytes | None]]:
    for batch in reader.batches():
        for message in batch:
            yield message.key() or b"", message.value()


def _alert(value: bytes, decoder: Decoder) -> Alert:
    record = decoder.decode(value)
    return Alert(**{field.name: record[field.name] for field in fields(Alert)})
