"""Alerts of each measure, and those in a topic."""

from dataclasses import replace
from typing import Any

from producer.alert.model import Alert
from producer.events import ALERTS
from producer.schemas import load_schema
from tests.support.servers.consume import decode, kcat_messages

LOSS = Alert(
    rule="loss",
    by="host",
    group="web-1",
    firing=True,
    measure="ratio",
    value=0.0625,
    threshold=0.05,
    clear=0.02,
    window_start_ns=1_790_000_060 * 10**9,
    window_s=60.0,
    segs=16_000,
    retransmitted_segs=1_000,
    since_ns=1_790_000_000 * 10**9,
)
COUNT = replace(
    LOSS,
    rule="many",
    by="peer",
    group="192.0.2.1",
    measure="count",
    value=7.0,
    threshold=5.0,
    clear=2.0,
    labels='{"team": "net"}',
)
SILENT = replace(LOSS, rule="silent", measure="silence", value=31.4)


def alert_records(bootstrap: str, prefix: str) -> list[dict[str, Any]]:
    """Return the records of the alerts topic."""
    found = []
    for message in kcat_messages(bootstrap, f"{prefix}tcp_alerts"):
        assert message.value is not None
        record = decode(message.value, load_schema(ALERTS.schema_file))[1]
        assert message.key == f"{record['rule']}/{record['group']}".encode()
        found.append(record)
    return found
