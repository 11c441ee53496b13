"""An alert as a message of the topic tcp_alerts, and in words.

Key: rule/group in UTF-8. Value: Confluent-framed Avro of schemas/tcp_alerts.avsc.
"""

from dataclasses import asdict

from producer.alert.model import Alert
from producer.events import SchemaId
from producer.schemas import ALERT_FILE, RecordEncoder


class AlertEncoder:
    """Encodes alerts."""

    def __init__(self, schema_id: SchemaId) -> None:
        self._encoder = RecordEncoder(ALERT_FILE, schema_id)

    def encode(self, alert: Alert, now_s: float) -> tuple[bytes, bytes]:
        """Return the message's key and value; `now_s` is the time in seconds since 1970 UTC."""
        record = {**asdict(alert), "ts": round(now_s * 1000), "summary": summary(alert)}
        return alert.key.encode(), self._encoder.encode(record)


def summary(alert: Alert) -> str:
    """Describe the alert, or its end, in one sentence."""
    who = f"{alert.by} {alert.group}"
    if alert.measure == "silence":
        return f"{who} is silent: no heartbeat for {alert.value:.0f} s" if alert.firing else f"{who} is heard again"
    if alert.measure == "ratio":
        what = f"{alert.value:.2%} of {alert.segs} segments were retransmitted in {alert.window_s:g} s"
        limits = f"fires from {alert.threshold:.2%}, resolves below {alert.clear:.2%}"
    else:
        what = f"{alert.retransmitted_segs} segments were retransmitted in {alert.window_s:g} s"
        limits = f"fires from {alert.threshold:g}, resolves below {alert.clear:g}"
    return f"{who}{'' if alert.firing else ' is resolved'}: {what} ({alert.rule} {limits})"
