"""A real Kafka on this machine's loopback, reachable from a guest, and its topics' content, by kcat and fastavro."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import fastavro

from tests.support.servers.consume import decode, kcat_messages
from tests.support.servers.kafka import KafkaServer
from tests.vm.systemd_guest import HOST

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"
_LISTENER = "GUEST"


class GuestKafka(KafkaServer):
    """A broker with a second listener, which advertises the address at which the guest sees this machine."""

    @property
    def guest_bootstrap(self) -> str:
        """Address for clients in the guest, HOST:PORT."""
        return f"{HOST}:{self.address(_LISTENER).rpartition(':')[2]}"

    def make_topics(self) -> None:
        """Set up topics and schemas, as an administrator does once."""
        command = [sys.executable, "-m", "producer", "init", "--brokers", self.bootstrap, "--partitions", "3"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def events(self, topic: str) -> list[dict[str, Any]]:
        """Return the events of a topic, without duplicates, which a kill may cause."""
        schema = fastavro.parse_schema(fastavro.schema.load_schema(SCHEMAS / f"{topic}.avsc"))
        events = (decode(message.value, schema)[1] for message in kcat_messages(self.bootstrap, topic) if message.value)
        return list({(event["boot_id"], event["cpu"], event["cpu_seq"]): event for event in events}.values())

    def _protocols(self) -> dict[str, str]:
        return {**super()._protocols(), _LISTENER: "PLAINTEXT"}

    def _properties(self) -> dict[str, str]:
        advertised = f"PLAINTEXT://{self.bootstrap},{_LISTENER}://{self.guest_bootstrap}"
        return {**super()._properties(), "advertised.listeners": advertised}
