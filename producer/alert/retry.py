"""Tries of what will work again: for ever, with a way to wait that may end them."""

import logging
from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from producer.errors import UnavailableError
from producer.health.metrics import counted

logger = logging.getLogger(__name__)

Wait = Callable[[float], None]
"""Waits for so many seconds, and raises where there is to be no other try."""


def until_it_works(what: str, wait: Wait) -> Retrying:
    """Return what calls a function again and again while it raises UnavailableError; `what` names it in the metrics."""
    count = counted(what)

    def tell(state: RetryCallState) -> None:
        count(state)
        error = state.outcome.exception() if state.outcome else None
        logger.warning("alert: not out yet, try=%d: %s", state.attempt_number, error)

    return Retrying(
        retry=retry_if_exception_type(UnavailableError),
        wait=wait_random_exponential(multiplier=0.5, max=30),
        sleep=wait,
        before_sleep=tell,
        reraise=True,
    )
