"""Tells Alertmanager, by its API v2, what fires and what is resolved.

Alertmanager forgets what it is not told again: each alert that fires says that it ends three repetitions from now.
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
from producer.alert.retry import Wait, until_it_works
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
    """The Alertmanager at `url`, which is told every `repeat_s` what fires; `wait` is called between two tries.

    `stop` ends a request that is under way, with Stopped. A redirect is not followed: what was posted would get lost.
    """

    def __init__(self, url: str, repeat_s: float, wait: Wait, stop: Flag | None = None) -> None:
        self._url = f"{url.rstrip('/')}/api/v2/alerts"
        self._lasts_s = _REPETITIONS * repeat_s
        self._wait = wait
        self._stop = stop
        self.refused = 0
        """Alerts that Alertmanager refused for good."""

    def send(self, alerts: Sequence[Alert]) -> None:
        """Tell of changes, for as long as it takes."""
        # Of a group that changed more than once, only the last: they would all have the same labels.
        last = {alert.key: alert for alert in alerts}
        until_it_works("alertmanager", self._wait)(self._post, list(last.values()))

    def repeat(self, firing: Collection[Alert]) -> None:
        """Tell again what fires, in one try: the next repetition is another."""
        try:
            if firing:
                self._post(firing)
        except UnavailableError as error:
            logger.warning("alert: %s", error)

    def close(self) -> None:
        """Do nothing: no connection is kept."""

    def _post(self, alerts: Collection[Alert]) -> None:
        body = json.dumps([self._told(alert) for alert in alerts]).encode()
        request = Request(self._url, body, {"Content-Type": "application/json"})
        try:
            answer = exchange(request, _TIMEOUT_S, stop=self._stop)
        except ExchangeError as error:
            raise UnavailableError(f"Alertmanager at {self._url}: {error}") from error
        status, text = answer.status, printable(answer.body[:_SHOWN].decode(errors="replace").strip())
        if status >= 500 or status == _TOO_MANY_REQUESTS:
            raise UnavailableError(f"Alertmanager at {self._url}: {status} {text}")
        if status >= 300:
            # The same request would be refused for ever, and hold up all alerts that follow.
            self.refused += len(alerts)
            logger.error("alert: Alertmanager refuses %d alerts: %d %s", len(alerts), status, text)
        elif not _is_own(answer):
            raise UnavailableError(f"not Alertmanager's answer at {self._url}: {status} {text!r}")

    def _told(self, alert: Alert) -> dict[str, Any]:
        now_s = time.time()
        ends_s = now_s + self._lasts_s if alert.firing else now_s
        # A host's clock may be ahead, and what begins after its end is refused.
        starts_s = min(alert.since_ns / 1e9, now_s)
        return {
            # By the group's own name for inhibition against other alerts of that host; `group` for any rule.
            "labels": {"alertname": alert.rule, "by": alert.by, "group": alert.group, alert.by: alert.group},
            "annotations": {"summary": summary(alert), "value": f"{alert.value:g}"},
            "startsAt": _rfc3339(starts_s),
            "endsAt": _rfc3339(ends_s),
        }


def _is_own(answer: Answer) -> bool:
    """Whether it is Alertmanager that has taken alerts, and not a login page: its answer is empty, or JSON."""
    if not answer.body.strip():
        return True
    try:
        json.loads(answer.body)
    except (ValueError, RecursionError):
        return False
    return True


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
