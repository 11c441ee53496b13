"""Sends alerts to Alertmanager, through its API v2.

Alertmanager resolves alerts that are not repeated: a firing alert's `endsAt` is three repetitions from now.
"""

import json
import logging
import time
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.request import Request

from producer.alert.model import Alert
from producer.alert.record import summary
from producer.alert.retry import Sleep, retry_until_available
from producer.errors import UnavailableError
from producer.host.http_exchange import Answer, ExchangeError, exchange
from producer.host.signals import Flag
from producer.host.text import printable

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_TOO_MANY_REQUESTS = 429
_REPETITIONS = 3
_SHOWN = 200


class Alertmanager:
    """The Alertmanager at `url`. Firing alerts are repeated every `repeat_s`; `sleep` is called between retries.

    `stop` ends a request in flight, with Stopped. Redirects are not followed: they would lose the request body.
    """

    def __init__(self, url: str, repeat_s: float, sleep: Sleep, stop: Flag | None = None) -> None:
        self._url = f"{url.rstrip('/')}/api/v2/alerts"
        self._lasts_s = _REPETITIONS * repeat_s
        self._sleep = sleep
        self._stop = stop
        self.rejected = 0
        """Alerts that Alertmanager rejected."""

    def send(self, alerts: Sequence[Alert]) -> None:
        """Send changes, and retry until Alertmanager accepts them."""
        # Only the last change of each group: all have the same labels.
        last = {alert.key: alert for alert in alerts}
        retry_until_available("alertmanager", self._sleep)(self._post, list(last.values()))

    def repeat(self, firing: Collection[Alert]) -> None:
        """Repeat what fires, without retries: the next repetition is one."""
        try:
            if firing:
                self._post(firing)
        except UnavailableError as error:
            logger.warning("alert: %s", error)

    def close(self) -> None:
        """Do nothing: no connection is kept open."""

    def _post(self, alerts: Collection[Alert]) -> None:
        body = json.dumps([self._payload(alert) for alert in alerts]).encode()
        request = Request(self._url, body, {"Content-Type": "application/json"})
        try:
            answer = exchange(request, _TIMEOUT_S, stop=self._stop)
        except ExchangeError as error:
            raise UnavailableError(f"Alertmanager at {self._url}: {error}") from error
        status, text = answer.status, printable(answer.body[:_SHOWN].decode(errors="replace").strip())
        if status >= 500 or status == _TOO_MANY_REQUESTS:
            raise UnavailableError(f"Alertmanager at {self._url}: {status} {text}")
        if status >= 300:
            # A retry would be rejected too, and hold up all later alerts.
            self.rejected += len(alerts)
            logger.error("alert: Alertmanager rejected %d alerts: %d %s", len(alerts), status, text)
        elif not _is_own(answer):
            raise UnavailableError(f"the answer from {self._url} is not Alertmanager's: {status} {text!r}")

    def _payload(self, alert: Alert) -> dict[str, Any]:
        now_s = time.time()
        ends_s = now_s + self._lasts_s if alert.firing else now_s
        # A host's clock may be ahead, and Alertmanager rejects alerts that start after their end.
        starts_s = min(alert.since_ns / 1e9, now_s)
        return {
            # The group by its kind (host=...) is for inhibition with other alerts of that host.
            "labels": {"alertname": alert.rule, "by": alert.by, "group": alert.group, alert.by: alert.group},
            "annotations": {"summary": summary(alert), "value": f"{alert.value:g}"},
            "startsAt": _rfc3339(starts_s),
            "endsAt": _rfc3339(ends_s),
        }


def _is_own(answer: Answer) -> bool:
    """Return whether the answer is from Alertmanager (empty or JSON) and not, for example, a login page."""
    if not answer.body.strip():
        return True
    try:
        json.loads(answer.body)
    except (ValueError, RecursionError):
        return False
    return True


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
