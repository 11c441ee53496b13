"""docker-compose.yml as Compose reads it."""

import re
from pathlib import Path
from typing import Any

from tests.support.servers.kafka import KafkaServer
from tests.support.servers.registry import SchemaRegistry

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "deploy/container"

Servers = tuple[KafkaServer, SchemaRegistry]


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """Return the checkout's files and folders mounted in a service, by target."""
    bound = [each for each in service.get("volumes", ()) if each["type"] == "bind"]
    return {each["target"]: Path(each["source"]) for each in bound if each["source"].startswith(str(ROOT))}


def kafka_settings(composed: dict[str, Any]) -> dict[str, str]:
    """Return Compose's Kafka settings by Kafka's names, except for paths and addresses that differ here."""
    environment = composed["services"]["kafka"]["environment"]
    names = {name: name.removeprefix("KAFKA_").lower().replace("_", ".") for name in environment}
    places = re.compile(r".*listener.*|controller\..*|process\.roles|node\.id|log\.dirs")
    return {names[name]: value for name, value in environment.items() if not places.fullmatch(names[name])}
