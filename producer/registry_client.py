"""A client of the schema registry, with the certificates and the secret that its settings name."""

from typing import Any

from confluent_kafka.schema_registry import SchemaRegistryClient

from producer.config import Registry, read_secret
from producer.errors import ConfigError


def open_client(settings: Registry, retries: int = 0) -> SchemaRegistryClient:
    """Return a client of the registry; ConfigError where its certificates or secrets are not to be had."""
    # The client has no timeout of its own.
    conf: dict[str, Any] = {"url": settings.url, "timeout": settings.timeout_s, "max.retries": retries}
    if settings.auth is not None:
        conf["basic.auth.user.info"] = read_secret(settings.auth, "registry.auth")
    files = {
        "ssl.ca.location": settings.ca,
        "ssl.certificate.location": settings.certificate,
        "ssl.key.location": settings.key,
    }
    conf |= {name: str(path) for name, path in files.items() if path is not None}
    try:
        return SchemaRegistryClient(conf)
    except (OSError, ValueError) as error:  # none of them tells the secret
        raise ConfigError(f"registry: {error}: see url, auth, ca, certificate and key below [registry]") from error
