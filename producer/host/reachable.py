"""Checks that the brokers advertised by Kafka are reachable from this host.

A client asks its bootstrap servers for the brokers of the cluster, and then uses their advertised names. If those
cannot be resolved here, the client fails after its first request.
"""

import socket
import threading
import time
from collections.abc import Sequence

_TIMEOUT_S = 5.0
_MOST_THREADS = 64
"""A broker chooses how many others it advertises."""

Broker = tuple[str, int]


def unreachable(brokers: Sequence[Broker], timeout_s: float = _TIMEOUT_S) -> dict[Broker, str]:
    """Return the brokers that do not accept a connection within the time, each with the reason."""
    found: dict[Broker, str | None] = dict.fromkeys(brokers, f"not checked within {timeout_s:g} s")
    pending = iter(brokers)

    def look() -> None:
        for broker in pending:
            found[broker] = f"no response within {timeout_s:g} s"
            found[broker] = _reason(broker, timeout_s)

    # Name resolution has no configurable timeout, hence the threads.
    threads = [threading.Thread(target=look, daemon=True) for _ in brokers[:_MOST_THREADS]]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        try:
            thread.start()
        except RuntimeError as error:  # at the limit on processes; the threads before this one suffice
            if thread is threads[0]:
                return dict.fromkeys(brokers, f"not checked: {error}")
            break
    for thread in filter(threading.Thread.is_alive, threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    return {broker: reason for broker, reason in found.items() if reason is not None}


def _reason(broker: Broker, timeout_s: float) -> str | None:
    try:
        socket.create_connection(broker, timeout_s).close()
    except (OSError, UnicodeError, OverflowError) as error:  # invalid name or port
        return getattr(error, "strerror", None) or str(error)
    return None
