"""Unlimited retries, with a sleep function that can end them."""

import logging
from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from producer.errors import UnavailableError
from producer.health.metrics import counted

logger = logging.getLogger(__name__)

Sleep = Callable[[float], None]
"""Sleeps for this many seconds; raises to end the retries."""


def retry_until_available(what: str, sleep: Sleep) -> Retrying:
    """Return a caller that retries a function while it raises UnavailableError; `what` is its name in the metrics."""
    count = counted(what)

    def log(state: RetryCallState) -> None:
        count(state)
        error = state.outcome.exception() if state.outcome else None
        logger.warning("alert: retrying, attempt=%d: %s", state.attempt_number, error)

    return Retrying(
        retry=retry_if_exception_type(UnavailableError),
        wait=wait_random_exponential(multiplier=0.5, max=30),
        sleep=sleep,
        before_sleep=log,
        reraise=True,
    )
