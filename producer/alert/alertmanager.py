"""Sends alerts by HTTP: to Alertmanager, through its API v2, and to a webhook.

Alertmanager resolves alerts that are not repeated: a firing alert's `endsAt` is three repetitions from now.
"""

import json
import logging
import time
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.request import Request

from producer.alert.model import Alert, Sink
from producer.alert.record import as_json_object, summary
from producer.alert.retry import Sleep, retry_until_available
from producer.errors import UnavailableError
from producer.host.endpoints import without_path
from producer.host.http_exchange import Answer, ExchangeError, exchange
from producer.host.signals import Flag
from producer.host.text import parse_json, printable

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_TOO_LARGE, _TOO_MANY_REQUESTS = 413, 429
_REPETITIONS = 3
_SHOWN = 200


class _Receiver(Sink):
    """A server that takes POST requests with JSON. `sleep` is called between retries, and `stop` ends a request."""

    name = ""

    def __init__(self, url: str, sleep: Sleep, stop: Flag | None = None) -> None:
        self._url = url
        self._shown = url
        self._sleep = sleep
        self._stop = stop
        self.rejected = 0
        """Alerts that the server rejected."""

    def _post(self, body: list[dict[str, Any]]) -> None:
        """Send alerts. Redirects are not followed: they would lose the request body."""
        if not body:
            return
        request = Request(self._url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            answer = exchange(request, _TIMEOUT_S, stop=self._stop)
        except ExchangeError as error:
            raise UnavailableError(f"{self.name} at {self._shown}: {error}") from error
        status, text = answer.status, printable(answer.body[:_SHOWN].decode(errors="replace").strip())
        if status == _TOO_LARGE and len(body) > 1:  # of a proxy: nginx takes 1 MB, and an outage may have 1,000 alerts
            half = len(body) // 2
            self._post(body[:half])
            self._post(body[half:])
            return
        if status >= 500 or status == _TOO_MANY_REQUESTS:
            raise UnavailableError(f"{self.name} at {self._shown}: {status} {text}")
        if status >= 300:
            # A retry would be rejected too, and hold up all later alerts.
            self.rejected += len(body)
            logger.error("alert: %s rejected %d alerts: %d %s", self.name, len(body), status, text)
        elif not self._is_own(answer):
            raise UnavailableError(f"the response from {self._shown} is not {self.name}'s: {status} {text!r}")

    def _is_own(self, answer: Answer) -> bool:
        return True


class Webhook(_Receiver):
    """A server that takes each change once: POST with a JSON list of alerts, with the fields of tcp_alerts."""

    name = "Webhook"

    def __init__(self, url: str, sleep: Sleep, stop: Flag | None = None) -> None:
        super().__init__(url, sleep, stop)
        self._shown = without_path(url)

    def send(self, alerts: Sequence[Alert]) -> None:
        """Send changes, and retry until the server accepts them."""
        retry_until_available("webhook", self._sleep)(self._post, [as_json_object(alert) for alert in alerts])


class Alertmanager(_Receiver):
    """The Alertmanager at `url`. Firing alerts are repeated every `repeat_s`."""

    name = "Alertmanager"

    def __init__(self, url: str, repeat_s: float, sleep: Sleep, stop: Flag | None = None) -> None:
        super().__init__(f"{url.rstrip('/')}/api/v2/alerts", sleep, stop)
        self._lasts_s = _REPETITIONS * repeat_s

    def send(self, alerts: Sequence[Alert]) -> None:
        """Send changes, and retry until Alertmanager accepts them."""
        # Only the last change of each group: all have the same labels.
        last = {alert.key: alert for alert in alerts}
        retry_until_available("alertmanager", self._sleep)(self._post, list(map(self._payload, last.values())))

    def repeat(self, firing: Collection[Alert]) -> None:
        """Repeat what fires, without retries: the next repetition is one."""
        try:
            self._post(list(map(self._payload, firing)))
        except UnavailableError as error:
            logger.warning("alert: %s", error)

    def _is_own(self, answer: Answer) -> bool:
        """Return whether the response is from Alertmanager (empty or JSON) and not, for example, a login page."""
        try:
            parse_json(answer.body.strip() or "{}")
        except ValueError:
            return False
        return True

    def _payload(self, alert: Alert) -> dict[str, Any]:
        now_s = time.time()
        ends_s = now_s + self._lasts_s if alert.firing else now_s
        # A host's clock may be ahead, and Alertmanager rejects alerts that start after their end.
        starts_s = min(alert.since_ns / 1e9, now_s)
        behind = {name: found for name in ("causes", "hosts", "flows") if (found := getattr(alert, name))}
        # The group by its kind (host=...) is for inhibition with other alerts of that host.
        own = {"alertname": alert.rule, "by": alert.by, "group": alert.group, alert.by.replace("+", "_"): alert.group}
        severity = {"severity": alert.severity} if alert.severity else {}
        values = {"summary": summary(alert), "value": f"{alert.value:.10g}"}
        return {
            "labels": {**json.loads(alert.labels), **severity, **own},
            "annotations": {**json.loads(alert.annotations), **behind, **values},
            "startsAt": _rfc3339(starts_s),
            "endsAt": _rfc3339(ends_s),
        }


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
