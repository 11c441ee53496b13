"""An alert as a message of the topic tcp_alerts, and in words.

Key: rule/group in UTF-8. Value: Confluent-framed Avro of schemas/tcp_alerts.avsc.
"""

import json
from dataclasses import asdict
from typing import Any

from producer.alert.evaluate import RATIOS
from producer.alert.model import Alert
from producer.events import ALERTS, SchemaId
from producer.schemas import RecordEncoder

_MOST_SUMMARY = 4000
"""Characters that readers decode, about."""


class AlertEncoder:
    """Encodes alerts."""

    def __init__(self, schema_id: SchemaId) -> None:
        self._encoder = RecordEncoder(ALERTS, schema_id)

    def encode(self, alert: Alert, now_s: float) -> tuple[bytes, bytes]:
        """Return the message's key and value; `now_s` is the time in seconds since 1970 UTC."""
        record = {**asdict(alert), "ts": round(now_s * 1000), "summary": summary(alert)}
        return alert.key.encode(), self._encoder.encode(record)


def as_json_object(alert: Alert) -> dict[str, Any]:
    """Return the alert for readers of JSON."""
    texts = {name: json.loads(getattr(alert, name)) for name in ("labels", "annotations")}
    return {**asdict(alert), **texts, "summary": summary(alert)}


def summary(alert: Alert) -> str:
    """Describe the alert, or its end, in one sentence."""
    who = f"{alert.by} {alert.group}"
    if alert.measure == "silence":
        return f"{who} is silent: no heartbeat for {alert.value:.0f} s" if alert.firing else f"{who} is heard again"
    limit = "{:.2%}" if alert.measure in RATIOS else "{:g} s" if alert.measure == "srtt" else "{:.10g}"
    limits = f"fires from {limit.format(alert.threshold)}, resolves below {limit.format(alert.clear)}"
    behind = [f"{name} {found}" for name in ("causes", "hosts", "flows") if (found := getattr(alert, name))]
    text = f"{who}{'' if alert.firing else ' is resolved'}: {_what(alert)} ({alert.rule} {limits})"
    return "; ".join([text, *behind])[:_MOST_SUMMARY]


def _what(alert: Alert) -> str:
    within = f"in {alert.window_s:g} s"
    if alert.measure in RATIOS:
        kind = "segments" if alert.measure == "ratio" else "data segments"
        return f"{alert.value:.2%} of {alert.segs} {kind} were retransmitted {within}"
    if alert.measure == "count":
        return f"{alert.retransmitted_segs} segments were retransmitted {within}"
    if alert.measure == "failed_connects":
        return f"{alert.value:.10g} connects failed {within}"
    return f"the round-trip time was {alert.value:g} s {within}, of {alert.segs} measured"
