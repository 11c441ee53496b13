"""An alert as a message of the topic tcp_alerts, and in words.

Key: rule/group in UTF-8. Value: Confluent-framed Avro of schemas/tcp_alerts.avsc.
"""

import io
import json
from dataclasses import asdict
from typing import Any

import fastavro

from producer.alert.alert import Alert
from producer.encode import frame
from producer.events import SchemaId, Topic
from producer.paths import SCHEMAS

TOPIC = Topic("tcp_alerts")
FIXED_SCHEMA_ID = SchemaId(4)
"""The id in the Confluent frame where no registry is configured."""


def alert_schema() -> dict[str, Any]:
    """Return the published schema."""
    schema: dict[str, Any] = json.loads((SCHEMAS / "tcp_alerts.avsc").read_text())
    return schema


class AlertEncoder:
    """Makes messages of alerts."""

    def __init__(self, schema_id: SchemaId) -> None:
        self._schema = fastavro.parse_schema(alert_schema())
        self._frame = frame(schema_id)

    def encode(self, alert: Alert, now_s: float) -> tuple[bytes, bytes]:
        """Return the message's key and value; `now_s` is the time in seconds since 1970 UTC."""
        record = {**asdict(alert), "ts": round(now_s * 1000), "summary": summary(alert)}
        value = io.BytesIO(self._frame)
        value.seek(len(self._frame))
        fastavro.schemaless_writer(value, self._schema, record, strict=True)
        return alert.key.encode(), value.getvalue()


def summary(alert: Alert) -> str:
    """Say in one sentence what is the matter, or that it is over."""
    who = f"{alert.by} {alert.group}"
    if alert.measure == "silence":
        return f"{who} is silent: no heartbeat for {alert.value:.0f} s" if alert.firing else f"{who} is heard again"
    if alert.measure == "ratio":
        what = f"{alert.value:.2%} of {alert.segs} segments were sent again in {alert.window_s:g} s"
        limits = f"fires from {alert.threshold:.2%}, is resolved below {alert.clear:.2%}"
    else:
        what = f"{alert.retransmitted_segs} segments were sent again in {alert.window_s:g} s"
        limits = f"fires from {alert.threshold:g}, is resolved below {alert.clear:g}"
    return f"{who}{'' if alert.firing else ' is resolved'}: {what} ({alert.rule} {limits})"
