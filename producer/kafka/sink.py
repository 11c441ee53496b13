"""The sink: sends encoded batches to Kafka topics, and reports the outcome of each message.

A batch is passed to librdkafka as one array that points into the batch, which is kept until its last delivery report.
A message is retried after each error that is not about the message itself. A broker that rejects a message rejects the
whole request, so each of its messages is retried in a request of its own. If it is rejected again, it is lost and
counted by the name of the error. What librdkafka retries internally (unavailable brokers, moving leaders) does not show
here: message.timeout.ms is 0, unlimited, because the ring's size is the limit.

Each report that was taken from librdkafka is processed, whatever fails meanwhile: reports are queued first, an error
ends `poll` after the counts of the report at hand have changed, and the next `poll` continues with the next report.
"""

import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

import numpy as np

from producer import _native
from producer.backoff import BackOff
from producer.config.librdkafka import DEFAULTS, TEST_BROKER_PARTITIONS, client_settings
from producer.errors import RebpfError
from producer.events import HEARTBEATS, EncodedBatch, Feed, Ints, Outcome, Topic
from producer.health import metrics
from producer.host.log_limit import LogLimit
from producer.kafka.connection import Connection, rough_utc_offset_ns
from producer.kafka.delivery import Delivery, Run, runs
from producer.kafka.librdkafka import MESSAGE, Error, Reports, check_settings, error_name, rejected
from producer.kafka.retry import ABOUT_THE_MESSAGE, Retry
from producer.kafka.wording import REPEAT_LOG_S

logger = logging.getLogger(__name__)

_SILENT_S = 300.0
"""Seconds without a report, good or bad, after which a client that holds messages of a stream is replaced; at most
twice as long, so that not all hosts connect at once.

librdkafka can lose track of a partition's leader for good: of a topic that was deleted and created again in a cluster
of several brokers, for example (its issues 4898, 5430). It reports no error then.
"""


def producer_settings(brokers: str | None, settings: Mapping[str, str]) -> dict[str, str]:
    """Return all of the producer's librdkafka settings; ConfigError if librdkafka rejects one of `settings`.

    Settings for consumers only are checked too, since they are in the same file.
    """
    client = client_settings(brokers, settings)
    check_settings(settings, aliases=DEFAULTS)
    return client


Quarantine = Callable[[EncodedBatch, str], None]
"""Receives messages that Kafka has rejected one by one, and the name of the error."""


class KafkaSink:
    """Sends batches and reports the outcomes. At most about `max_in_flight` messages per stream are in flight.

    Streams share only the client: a missing topic of one does not block the other.

    `topics` are by the stream's name. `on_socket` is called with each socket of the client before it connects, from a
    thread of librdkafka. `quarantine` receives lost messages. `utc_offset_ns` returns UTC minus the monotonic clock.
    """

    def __init__(
        self,
        settings: Mapping[str, str],
        topics: Mapping[str, Topic],
        *,
        max_in_flight: int = 1 << 15,
        on_socket: Callable[[int], None] = lambda descriptor: None,
        quarantine: Quarantine = lambda batch, error: None,
        utc_offset_ns: Callable[[], int] = rough_utc_offset_ns,
    ) -> None:
        self._connection = Connection(settings, on_socket, utc_offset_ns)
        self._topics = topics
        self._max_in_flight = max_in_flight
        self._quarantine = quarantine
        self._deliveries: dict[int, Delivery] = {}
        self._by_batch: dict[EncodedBatch, Delivery] = {}
        self._next_number = 0
        self._retries = {stream: Retry(topic) for stream, topic in topics.items()}
        if HEARTBEATS.name in topics:  # a site may do without them
            self._retries[HEARTBEATS.name] = Retry(
                topics[HEARTBEATS.name], BackOff("heartbeat", first_s=20, most_s=600)
            )
        self._reports: deque[tuple[Reports, bool]] = deque()
        self._runs: deque[Run] = deque()
        self._outcomes: dict[str, Outcome] = {}
        self._messages = np.zeros(0, MESSAGE)
        self._heard_at = dict.fromkeys(self._retries, 0.0)
        """When each stream last had a report, or gave the client its only messages."""
        self._silent_s = random.uniform(_SILENT_S, 2 * _SILENT_S)
        self._log_limit = LogLimit(REPEAT_LOG_S)
        self._unlogged_losses: Counter[tuple[Topic, str]] = Counter()
        self.in_flight: Counter[str] = Counter()
        """Messages in flight by stream."""

    @property
    def last_error(self) -> Error | None:
        """The client's last error, until a message is delivered."""
        return self._connection.last_error

    def open(self) -> str:
        """Start the client and return the brokers' address. It connects in the background, with unlimited retries."""
        return self._connection.open(
            {topic: 1 if name == HEARTBEATS.name else TEST_BROKER_PARTITIONS for name, topic in self._topics.items()}
        )

    def capacity(self, stream: Feed) -> int:
        """Return how many more messages of a stream may be sent now. 0 during retries, to keep the order."""
        if self._retries[stream.name].busy:
            return 0
        return max(0, self._max_in_flight - self.in_flight[stream.name])

    def unacknowledged(self, batch: EncodedBatch) -> int:
        """Return how many messages of a batch are still in flight."""
        delivery = self._by_batch.get(batch)
        return delivery.open if delivery else 0

    def last_error_of(self, stream: str) -> str:
        """Return the name of the error that a stream's messages are retried for, or an empty string."""
        return self._retries[stream].error

    def send(self, batch: EncodedBatch) -> None:
        """Queue a batch. It may be larger than what `capacity` returned."""
        number, self._next_number = self._next_number, self._next_number + 1
        delivery = Delivery(number, batch, len(batch))
        self._produce(delivery, None, alone=False)
        self._deliveries[number] = self._by_batch[batch] = delivery
        self.in_flight[batch.stream.name] += len(batch)

    def poll(self) -> dict[str, Outcome]:
        """Process the delivery reports that have arrived, and return the outcomes by stream."""
        for stream, retry in self._retries.items():
            try:
                retry.resend(self.in_flight[stream], self._resend)
            except RebpfError as failure:  # no second client for now: no threads, for example
                if self._log_limit.allows("resend"):
                    logger.warning("kafka: cannot retry messages topic=%s: %s", self._topics[stream], failure)
        for each in self._connection.reports():
            self._reports.append(each)
        while self._reports:
            reports, alone = self._reports[0]
            self._runs.extend(runs(reports, alone=alone))
            self._reports.popleft()
        while self._runs:
            run = self._runs[0]
            batch = self._deliveries[run.number].batch
            lost = self._on_run(run)
            self._runs.popleft()
            if lost:
                self._quarantine(batch.take(run.rows), lost)
        if self._unlogged_losses and self._log_limit.allows("rejected"):
            for (topic, error), count in self._unlogged_losses.items():
                logger.error("kafka: %d messages rejected and lost topic=%s error=%s", count, topic, error)
            self._unlogged_losses.clear()
        self._look_for_silence()
        if self._connection.replace_if_needed(self._deliveries.values()):
            self._send_all_again()
        outcomes, self._outcomes = self._outcomes, {}
        return outcomes

    def close(self) -> None:
        """Close the client; messages in flight are dropped."""
        self._connection.close(self._deliveries.values())

    def _produce(self, delivery: Delivery, rows: Ints | None, *, alone: bool) -> None:
        """Pass rows of a batch to librdkafka; None: all."""
        batch = delivery.batch
        if self._retries[batch.stream.name].waiting == self.in_flight[batch.stream.name]:
            self._heard_at[batch.stream.name] = time.monotonic()
        count = len(batch) if rows is None else len(rows)
        if count > len(self._messages):
            self._messages = np.zeros(count, MESSAGE)
        messages = self._messages[:count]
        _native.messages(
            messages, delivery.number, batch.payload, batch.starts, batch.lengths, batch.keys, batch.key_starts,
            batch.key_lengths, rows,
        )  # fmt: skip
        if self._connection.produce(self._topics[batch.stream.name], messages, alone=alone) < count:
            self._reports.append((rejected(messages), alone))

    def _resend(self, number: int, rows: Ints, alone: bool) -> None:
        self._produce(self._deliveries[number], rows, alone=alone)

    def _look_for_silence(self) -> None:
        for stream, retry in self._retries.items():
            is_silent = time.monotonic() - self._heard_at[stream] > self._silent_s
            if is_silent and retry.waiting < self.in_flight[stream]:
                self._connection.give_up(f"no delivery report for {self._silent_s:.0f} s topic={self._topics[stream]}")

    def _on_run(self, run: Run) -> str:
        """Record that messages of a batch were acknowledged, must be retried, or are lost; return the loss's error."""
        delivery = self._deliveries[run.number]
        retry = self._retries[delivery.batch.stream.name]
        self._heard_at[delivery.batch.stream.name] = time.monotonic()
        if run.alone:
            retry.returned(len(run))
        if not run.code:
            self._close(delivery, run).delivered += len(run)
            retry.delivered()
            self._connection.delivered()
            return ""
        error = error_name(run.code)
        metrics.kafka_error(error, len(run))
        if error not in ABOUT_THE_MESSAGE:
            retry.later(run.number, run.rows, error)
        elif not run.alone:
            retry.one_by_one(run.number, run.rows, error)
        else:
            delivery.lost[error] += len(run)
            self._close(delivery, run).lost[error] += len(run)
            self._unlogged_losses[self._topics[delivery.batch.stream.name], error] += len(run)
            return error
        return ""

    def _close(self, delivery: Delivery, run: Run) -> Outcome:
        """Remove acknowledged or lost messages from what is in flight; return the outcome that counts them."""
        stream = delivery.batch.stream.name
        outcome = self._outcomes.setdefault(stream, Outcome())
        self.in_flight[stream] -= len(run)
        delivery.close(run)
        if not delivery.open:
            del self._deliveries[delivery.number], self._by_batch[delivery.batch]
            outcome.done.append((delivery.batch, delivery.lost))
        return outcome

    def _send_all_again(self) -> None:
        """Send what is not acknowledged with a new client, at the next poll."""
        self._heard_at = dict.fromkeys(self._heard_at, time.monotonic())
        for retry in self._retries.values():
            retry.restart()
        for delivery in self._deliveries.values():
            self._retries[delivery.batch.stream.name].hold(delivery.number, delivery.open_rows())
