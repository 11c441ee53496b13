"""The last alert of each group, from the topic tcp_alerts: the state that a member starts with."""

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any

from producer.alert.engine import AHEAD_NS
from producer.alert.model import Alert
from producer.alert.silence import MEASURE
from producer.alert.windows import MOST_GROUP, MOST_SEGS
from producer.config.alerts import GROUPS, MEASURES
from producer.consume.decode import Decoder, UndecodableError
from producer.consume.reader import TopicReader
from producer.errors import RebpfError

logger = logging.getLogger(__name__)

MOST_ALERTS = 100_000
"""Groups whose last alert is kept. Beyond it the oldest are forgotten, and resent if they still fire."""
MOST_MESSAGES = 1_000_000
_SHOWN = 200


def last_alerts(brokers: str, topic: str, settings: Mapping[str, str], decoder: Decoder) -> list[Alert]:
    """Read the topic, which is compacted, and return the last alert of each key.

    Reads at most the last MOST_MESSAGES of each partition, since the member does nothing else meanwhile.
    """
    with closing(TopicReader(brokers, [topic], settings, -MOST_MESSAGES)) as reader:
        runs = (messages for batch in reader.batches() for messages in batch.values())
        batches = ([(message.key() or b"", message.value()) for message in messages] for messages in runs)
        return last_of(batches, topic, decoder, time.time_ns())


def last_of(
    batches: Iterable[Sequence[tuple[bytes, bytes | None]]], topic: str, decoder: Decoder, now_ns: int
) -> list[Alert]:
    """Return the last alert of each key; other messages are skipped, counted and logged once."""
    last: dict[bytes, Alert] = {}
    rejected = forgotten = 0
    reason = ""
    for batch in batches:
        records = decoder.records([value for _, value in batch])
        for (key, value), record in zip(batch, records, strict=True):
            last.pop(key, None)
            if value is None:  # a tombstone
                continue
            try:
                last[key] = _alert(key, record, now_ns)
            except (RebpfError, MemoryError):  # not about this message
                raise
            except Exception as exc:  # no message may stop its readers
                rejected, reason = rejected + 1, reason or f"key={key[:_SHOWN]!r}: {exc!r}"[: 2 * _SHOWN]
            if len(last) > MOST_ALERTS:
                forgotten += 1
                del last[next(iter(last))]
    if rejected:
        logger.warning("skipped messages=%d of topic=%s: %s", rejected, topic, reason)
    if forgotten:
        logger.warning("topic=%s has more than %d alerts: forgot the oldest %d", topic, MOST_ALERTS, forgotten)
    return list(last.values())


def _alert(key: bytes, record: dict[str, Any] | UndecodableError, now_ns: int) -> Alert:
    if isinstance(record, UndecodableError):
        raise record
    # An earlier version may have written it, without the fields added since.
    alert = Alert(**{field.name: record[field.name] for field in fields(Alert) if field.name in record})
    if key != alert.key.encode():
        raise ValueError("the key does not match the alert")
    numbers = (alert.value, alert.threshold, alert.clear, alert.window_s)
    counts = (alert.window_start_ns, alert.since_ns, alert.segs, alert.retransmitted_segs)
    if not all(map(math.isfinite, numbers)) or not all(0 <= count <= MOST_SEGS for count in counts):
        raise ValueError("numbers out of range")
    if alert.by not in GROUPS or alert.measure not in (*MEASURES, MEASURE) or len(alert.group) > MOST_GROUP:
        raise ValueError("unknown group or measure")
    for texts in map(json.loads, (alert.labels, alert.annotations)):
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("labels or annotations are not texts by name")
    # It would keep earlier windows from being decided. An alert on silence has the time of the host's clock instead.
    if alert.measure != MEASURE and alert.window_start_ns > now_ns + AHEAD_NS:
        raise ValueError("the window is far in the future")
    return alert
