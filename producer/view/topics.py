"""Records of a fleet, from the topics."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from producer.config.load import Registry
from producer.consume.decode import Decoder
from producer.consume.follow import Follower, Start
from producer.consume.reader import TopicReader
from producer.errors import UnavailableError
from producer.events import FLOWS
from producer.host.progress import Progress
from producer.host.signals import Flag
from producer.schemas import streams
from producer.view.records import Records

logger = logging.getLogger(__name__)

_BATCH = 10_000
_READ_S = 0.5
_MAX_REASONS = 100
INTERVAL_S = 10
"""Seconds between two records of an open connection, unless producers set another `capture.flow_interval_s`."""
WINDOW_S = 30.0
"""A multiple of that interval with each profile, so that a window has a record of each open connection."""
EARLIER_S = 40.0
"""Seconds before the view whose records are read: more than an interval with each profile."""


class TopicSource:
    """The records of topics from `start` on (see Follower)."""

    is_local = False

    def __init__(
        self,
        brokers: str,
        topics: Sequence[str],
        *,
        registry: Registry,
        client_settings: Mapping[str, str],
        start: int = Start.END,
        stop: Flag,
    ) -> None:
        self._brokers, self._client_settings, self._stop = brokers, client_settings, stop
        self._topics = topics
        self._follower = Follower(brokers, "view", topics, client_settings, start=start, batch=_BATCH)
        self._decoder = Decoder(registry, stop=stop)
        self._skipped: Counter[str] = Counter()

    def __enter__(self) -> Self:
        try:
            self._follower.start()
        except BaseException:
            self._follower.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._follower.close()
        for reason, count in self._skipped.items():
            logger.warning("skipped messages=%d reason=%r", count, reason)

    def earlier(self) -> Iterator[Records]:
        """Yield the records of connections of the last EARLIER_S, up to the end of the topics.

        They only make the first rates come sooner, so it is no error if Kafka no longer has them.
        """
        try:
            yield from self._earlier()
        except UnavailableError as error:
            logger.warning("the first rates are incomplete: %s", error)

    def _earlier(self) -> Iterator[Records]:
        since_ms = int((time.time() - EARLIER_S) * 1000)
        reader = TopicReader(self._brokers, self._topics, self._client_settings, since_ms=since_ms, skip_missing=True)
        with contextlib.closing(reader), Progress("reading the last records") as progress:
            for batch in reader.batches(progress):
                if self._stop.is_set():
                    return
                for messages in batch.values():
                    parts, _ = self._decoder.tables([message.value() for message in messages])
                    found = (table for _, table in parts if streams().get(table.plan.record) == FLOWS)
                    yield from (Records.from_table(FLOWS, table) for table in found)

    def read(self) -> list[Records]:
        """Return the records that have arrived, within a bounded time."""
        found = []
        deadline, wait_s = time.monotonic() + _READ_S, 0.1
        while messages := self._follower.poll(wait_s):
            parts, rejected = self._decoder.tables([message.value() for message in messages])
            for each in rejected:
                many = len(self._skipped) >= _MAX_REASONS and each.reason not in self._skipped
                self._skipped["other reasons" if many else each.reason] += 1
            tables = [(streams().get(table.plan.record), table) for _, table in parts]
            found += [Records.from_table(stream, table) for stream, table in tables if stream is not None]
            wait_s = 0
            if time.monotonic() > deadline:
                break
        return found

    def report(self) -> None:
        """Do nothing: the producers report at their interval."""

    def lost(self) -> int:
        """Return the number of messages that could not be decoded."""
        return self._skipped.total()
