"""Checks that the brokers advertised by Kafka are reachable from this host.

A client asks its bootstrap servers for the brokers of the cluster, and then uses their advertised names. If those
cannot be resolved here, the client fails after its first request.
"""

import socket
import threading
import time
from collections.abc import Sequence

_TIMEOUT_S = 5.0


def unreachable(brokers: Sequence[tuple[str, int]], timeout_s: float = _TIMEOUT_S) -> dict[tuple[str, int], str]:
    """Return the brokers that do not accept a connection within the time, each with the reason."""
    found: dict[tuple[str, int], str | None] = {}

    def look(broker: tuple[str, int]) -> None:
        try:
            socket.create_connection(broker, timeout_s).close()
            found[broker] = None
        except (OSError, UnicodeError, OverflowError) as error:  # invalid name or port
            found[broker] = getattr(error, "strerror", None) or str(error)

    # Name resolution has no configurable timeout, hence the threads.
    threads = [threading.Thread(target=look, args=(broker,), daemon=True) for broker in brokers]
    for broker, thread in zip(brokers, threads, strict=True):
        try:
            thread.start()
        except RuntimeError as error:  # at the limit on processes
            found[broker] = f"not checked: {error}"
    deadline = time.monotonic() + timeout_s
    for thread in filter(threading.Thread.is_alive, threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    reasons = {broker: found.get(broker, f"no answer within {timeout_s:g} s") for broker in brokers}
    return {broker: reason for broker, reason in reasons.items() if reason is not None}
