"""The last alert of each group, as the topic tcp_alerts has it: the state that a member begins with."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields

from producer.alert.model import Alert
from producer.alert.silence import MEASURE
from producer.alert.windows import AHEAD_NS, GROUPS, MOST_GROUP, MOST_SEGS
from producer.consume.decode import Decoder
from producer.consume.reader import TopicReader
from producer.errors import RebpfError

logger = logging.getLogger(__name__)

MOST_ALERTS = 100_000
"""Groups whose last alert is kept: the oldest of more are forgotten, and told anew where they still fire."""
MOST_MESSAGES = 1_000_000
_MEASURES = ("count", "ratio", MEASURE)
_SHOWN = 200


def last_alerts(brokers: str, topic: str, settings: Mapping[str, str], decoder: Decoder) -> list[Alert]:
    """Read the topic, which is compacted, and return the last alert of each key.

    Of a long topic only the last MOST_MESSAGES are read: while this lasts, the member does not do its work.
    """
    reader = TopicReader(brokers, [topic], settings, -MOST_MESSAGES)
    try:
        return last_of(_messages(reader), topic, decoder, time.time_ns())
    finally:
        reader.close()


def last_of(messages: Iterable[tuple[bytes, bytes | None]], topic: str, decoder: Decoder, now_ns: int) -> list[Alert]:
    """Return the last alert of each key; what is no alert of ours is counted, told once, and passed over."""
    last: dict[bytes, Alert] = {}
    refused = forgotten = 0
    reason = ""
    for key, value in messages:
        last.pop(key, None)
        if value is None:  # a tombstone: the alert is to be forgotten
            continue
        try:
            last[key] = _alert(key, value, decoder, now_ns)
        except (RebpfError, MemoryError):  # of a server, or of this host
            raise
        except Exception as exc:  # whoever writes to the topic must not end its readers
            refused, reason = refused + 1, reason or f"key={key[:_SHOWN]!r}: {exc!r}"[: 2 * _SHOWN]
        if len(last) > MOST_ALERTS:
            forgotten += 1
            del last[next(iter(last))]
    if refused:
        logger.warning("passed over messages=%d of topic=%s: %s", refused, topic, reason)
    if forgotten:
        logger.warning("topic=%s has more than %d alerts: forgot the oldest %d", topic, MOST_ALERTS, forgotten)
    return list(last.values())


def _messages(reader: TopicReader) -> Iterator[tuple[bytes, bytes | None]]:
    for batch in reader.batches():
        for message in batch:
            yield message.key() or b"", message.value()


def _alert(key: bytes, value: bytes, decoder: Decoder, now_ns: int) -> Alert:
    record = decoder.decode(value)
    alert = Alert(**{field.name: record[field.name] for field in fields(Alert)})
    if key != alert.key.encode():
        raise ValueError("the key is not that of the alert")
    numbers = (alert.value, alert.threshold, alert.clear, alert.window_s)
    counts = (alert.window_start_ns, alert.since_ns, alert.segs, alert.retransmitted_segs)
    if not all(map(math.isfinite, numbers)) or not all(0 <= count <= MOST_SEGS for count in counts):
        raise ValueError("no alert has such numbers")
    if alert.by not in GROUPS or alert.measure not in _MEASURES or len(alert.group) > MOST_GROUP:
        raise ValueError("no alert has such a group or measure")
    # No window before it could be decided; with silence, the time is of the host's own clock.
    if alert.measure != MEASURE and alert.window_start_ns > now_ns + AHEAD_NS:
        raise ValueError("the window is far ahead")
    return alert
