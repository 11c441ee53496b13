"""Statuses to try things with."""

from typing import Any

from producer.events import RETRANSMITS, TRANSMITS
from producer.health.balance import Balance
from producer.health.status import Status, StreamStatus

LOST = {"ring_full": 3, "MSG_SIZE_TOO_LARGE": 2}


def status(**values: Any) -> Status:
    """Return a status in which no two numbers are the same."""
    transmits = Balance(1000, 700, in_flight=200, in_ring=45, spooled=50, carried=60, lost=LOST)
    streams = (
        StreamStatus(TRANSMITS.topic, "fentry", transmits, 1 << 24, 1 << 22, 3 << 20, 1 << 30),
        StreamStatus(RETRANSMITS.topic, "raw_tp", Balance(13, 13), 1 << 20, 0, 0, 1 << 28),
    )
    facts = {
        "host": "höst-1",
        "boot_id": "9b0e4b6f-4a3c-4f6e-9d6b-0d2a0c5e8f11",
        "version": "1.2.3",
        "pid": 4711,
        "started_s": 1_790_000_000.25,
        "rules_version": 7,
        "streams": streams,
        "reasons": ("kafka: _ALL_BROKERS_DOWN", "tcp_transmit: spooling"),
        "cpu_s": 1.5,
        "rss_bytes": 77 << 20,
        "labels": {"dc": "fra-1", "env": "prod"},
        "config_hash": "0123456789abcdef",
        "restart_needed": ("capture.transmit_ring_bytes",),
        "transmit_sample_rate": 64,
    }
    return Status(**{**facts, **values})
