"""One stream's messages to retry: after a wait, or one by one."""

import logging
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from producer.backoff import BackOff
from producer.events import Ints, Topic
from producer.host.log_limit import LogLimit
from producer.kafka.wording import REPEAT_LOG_S

logger = logging.getLogger(__name__)

ABOUT_THE_MESSAGE = frozenset({
    "INVALID_MSG", "INVALID_MSG_SIZE", "INVALID_RECORD", "MSG_SIZE_TOO_LARGE", "POLICY_VIOLATION",
    "RECORD_LIST_TOO_LARGE",
})  # fmt: skip
"""Errors by which a broker, or the client, rejects a message for good.

After all others it is retried: they are about the broker, the topic's or the client's settings, or the network, or come
from an answer that cannot be understood. INVALID_TIMESTAMP is about this host's clock, since a message gets its time
when it is sent.
"""

Send = Callable[[int, Ints, bool], None]
"""Sends rows of a batch, by its number; the last argument says whether each goes in its own request."""


class Retry:
    """The messages of one stream to retry, by batch number and row.

    An exception while sending leaves the messages here; the next `resend` continues with them.
    """

    def __init__(self, topic: Topic, backoff: BackOff | None = None) -> None:
        self._topic = topic
        self._backoff = backoff or BackOff("kafka_send")
        self._waiting: dict[int, list[Ints]] = {}
        self._waiting_count = 0
        self._due_at = 0.0
        self._singles: deque[tuple[int, Ints]] = deque()
        self._alone = 0
        """Messages in requests by themselves, sent or about to be."""
        self._log_limit = LogLimit(REPEAT_LOG_S)
        self.error = ""
        """The name of the last transient error, until a message is delivered."""

    @property
    def waiting(self) -> int:
        """The number of messages that the client does not have."""
        return self._waiting_count

    @property
    def busy(self) -> bool:
        """Whether messages wait or are sent one by one, so that later ones must not overtake them."""
        return bool(self._waiting_count or self._alone)

    def later(self, number: int, rows: Ints, error: str) -> None:
        """Retry rows after a wait. Rows that fail while others wait join them."""
        first = not self._waiting_count
        self.hold(number, rows)
        self.error = error
        if first:
            wait_s = self._backoff.next()
            self._due_at = time.monotonic() + wait_s
            logger.warning("kafka: retrying messages topic=%s error=%s wait_s=%.1f", self._topic, error, wait_s)

    def hold(self, number: int, rows: Ints) -> None:
        """Add rows to those that wait."""
        self._waiting.setdefault(number, []).append(rows)
        self._waiting_count += len(rows)

    def one_by_one(self, number: int, rows: Ints, error: str) -> None:
        """Retry each message in its own request: another message of the request may have caused the error."""
        self._singles.append((number, rows))
        self._alone += len(rows)
        if self._log_limit.allows(error):
            logger.warning("kafka: retrying %d messages one by one topic=%s error=%s", len(rows), self._topic, error)

    def returned(self, count: int) -> None:
        """Note the results of messages that were sent one by one."""
        self._alone -= count

    def delivered(self) -> None:
        """Note that messages were delivered."""
        self.error = ""
        self._backoff.reset()

    def restart(self) -> None:
        """Forget all messages; rows that are held from now on are due at once."""
        self._waiting, self._waiting_count, self._alone, self._due_at = {}, 0, 0, 0.0
        self._singles.clear()

    def resend(self, in_flight: int, send: Send) -> None:
        """Send what is due. Waiting rows are sent once they are all that is in flight, to keep their order."""
        while self._singles:
            send(*self._singles[0], True)
            self._singles.popleft()
        if not self._waiting_count or self._waiting_count != in_flight or time.monotonic() < self._due_at:
            return
        while self._waiting:
            number = min(self._waiting)
            send(number, np.sort(np.concatenate(self._waiting[number])), False)
            self._waiting_count -= sum(map(len, self._waiting.pop(number)))
