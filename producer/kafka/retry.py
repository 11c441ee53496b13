"""Failed messages of one stream that wait for a retry."""

import numpy as np
from numpy.typing import NDArray

from producer.backoff import BackOff

TRANSIENT = frozenset({
    "_MSG_TIMED_OUT", "_TRANSPORT", "_TIMED_OUT", "_UNKNOWN_TOPIC", "_UNKNOWN_PARTITION", "_QUEUE_FULL", "_PURGE_QUEUE",
    "_PURGE_INFLIGHT", "_FATAL", "UNKNOWN_TOPIC_OR_PART", "LEADER_NOT_AVAILABLE", "NOT_LEADER_FOR_PARTITION",
    "REQUEST_TIMED_OUT", "BROKER_NOT_AVAILABLE", "NOT_ENOUGH_REPLICAS", "NOT_ENOUGH_REPLICAS_AFTER_APPEND",
    "TOPIC_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED", "KAFKA_STORAGE_ERROR",
})  # fmt: skip
"""Errors after which a message is retried."""


class Retry:
    """Rows to retry, by batch number."""

    def __init__(self) -> None:
        self.backoff = BackOff("kafka_send")
        self.rows: dict[int, list[NDArray[np.int64]]] = {}
        self.count = 0
        self.at = 0.0
        self.error = ""
        """The last failure, until a message is delivered."""

    def add(self, number: int, rows: NDArray[np.int64], error: str) -> None:
        """Add failed rows of a batch."""
        self.rows.setdefault(number, []).append(rows)
        self.count += len(rows)
        self.error = error

    def take(self) -> dict[int, NDArray[np.int64]]:
        """Remove and return all rows, in order, by batch number."""
        rows, self.rows, self.count = self.rows, {}, 0
        return {number: np.sort(np.concatenate(rows[number])) for number in sorted(rows)}
