"""`rebpf status`: finds the running producer and asks it for its status."""

from typing import Any

from producer.config.load import Config
from producer.errors import PermissionDenied, UnavailableError
from producer.health.endpoint_client import ask
from producer.host import state


def report(config: Config) -> dict[str, Any]:
    """Return the status of the producer that runs with this configuration.

    Users who cannot read its state folder ask at `metrics.listen`. Raises UnavailableError or PermissionDenied.
    """
    folder = config.state_dir
    try:
        facts = state.running(folder)
    except PermissionDenied as error:
        if not config.metrics.listen:
            raise
        try:
            return ask(f"http://{config.metrics.listen}")
        except UnavailableError:  # another address, no endpoint, or one with a password
            raise error from None
    if facts is None:
        raise UnavailableError(f"no producer is running with state_dir {folder}, or it is not ready yet")
    if not facts.get("status_url"):
        raise UnavailableError(
            f"the producer with pid {facts['pid']} has no HTTP endpoint: set metrics.listen to a free address"
        )
    return ask(facts["status_url"], folder / state.STATUS_SOCKET if facts.get("status_socket") else None)
