"""A real Apache Kafka 4.2 on one node (KRaft: broker and controller in one process), on 127.0.0.1.

The controller acknowledges a change before the brokers apply it, so methods that change something wait for that.
"""

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    PartitionMetadata,
)

from . import fetch
from .process import ServerProcess, free_port, wait_until_shown

CLUSTER_ID = "cmVicGYtdGVzdC1rYWZrYQ"
REQUEST_TIMEOUT_S = 30.0
TOOL_DEADLINE_S = 120.0


class KafkaServer(ServerProcess):
    """A broker with its data in `folder`; `settings` are added to server.properties and take precedence.

    Ports are chosen at the first start and kept.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_partitions: int = 3,
        settings: Mapping[str, str] | None = None,
        node_id: int = 1,
        heap_mb: int = 512,
    ) -> None:
        super().__init__(folder, "kafka")
        self.num_partitions = num_partitions
        self.settings = dict(settings or {})
        self.node_id = node_id
        self._heap_mb = heap_mb
        self._ports: dict[str, int] = {}

    @property
    def bootstrap(self) -> str:
        """Address for clients, HOST:PORT."""
        return self.address("PLAINTEXT")

    def address(self, listener: str) -> str:
        """Return the address of a listener, HOST:PORT."""
        if listener not in self._ports:
            raise RuntimeError("kafka has no address before its first start")
        return f"127.0.0.1:{self._ports[listener]}"

    def command(self) -> Sequence[str]:
        for listener in self._protocols():
            self._ports.setdefault(listener, free_port())
        properties = self.folder / "server.properties"
        properties.write_text("".join(f"{key}={value}\n" for key, value in self._properties().items()))
        if not (self.folder / "data").exists():
            _tool("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(properties), *self._format_options())
        return [*_java(self._heap_mb), "kafka.Kafka", str(properties)]

    def is_ready(self) -> bool:
        try:
            return self.node_id in self._admin().list_topics(timeout=1).brokers
        except KafkaException:
            return False

    def create_topic(
        self,
        name: str,
        partitions: int | None = None,
        *,
        replication: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Create a topic, by default with `num_partitions` partitions, and wait until the broker has it."""
        partitions = partitions or self.num_partitions
        topic = NewTopic(name, partitions, replication, config=dict(settings or {}))
        admin = self._admin()  # kept until the answer: the request ends with the client
        admin.create_topics([topic], operation_timeout=REQUEST_TIMEOUT_S)[name].result(REQUEST_TIMEOUT_S)
        self.wait_for_partitions(name, partitions)

    def delete_topic(self, name: str) -> None:
        """Delete a topic, and wait until it is gone from the broker."""
        admin = self._admin()
        admin.delete_topics([name], operation_timeout=REQUEST_TIMEOUT_S)[name].result(REQUEST_TIMEOUT_S)
        wait_until_shown(f"{name} is gone", lambda: name not in admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics)

    def add_partitions(self, name: str, total: int) -> None:
        """Increase a topic's partitions to this number."""
        admin = self._admin()
        more = NewPartitions(name, total)
        admin.create_partitions([more], operation_timeout=REQUEST_TIMEOUT_S)[name].result(REQUEST_TIMEOUT_S)
        self.wait_for_partitions(name, total)

    def set_topic(self, name: str, settings: Mapping[str, str]) -> None:
        """Change a topic's settings."""
        self._set(ConfigResource.Type.TOPIC, name, settings)
        admin, resource = self._admin(), ConfigResource(ConfigResource.Type.TOPIC, name)

        def is_set() -> bool:
            shown = admin.describe_configs([resource], request_timeout=REQUEST_TIMEOUT_S)[resource].result()
            return all(shown[key].value == value for key, value in settings.items())

        wait_until_shown(f"{name} has {settings}", is_set)

    def wait_for_partitions(self, topic: str, count: int) -> None:
        """Wait until this broker shows this many partitions of a topic, each with a leader."""

        def are_led() -> bool:
            found = self.partitions(topic)
            return len(found) == count and all(each.leader >= 0 for each in found.values())

        wait_until_shown(f"{topic} has {count} partitions", are_led)

    def partitions(self, topic: str) -> dict[int, PartitionMetadata]:
        """Return a topic's partitions with leader, replicas and in-sync replicas, as seen by this broker."""
        found: dict[int, PartitionMetadata] = (
            self._admin().list_topics(topic, REQUEST_TIMEOUT_S).topics[topic].partitions
        )
        return found

    @contextmanager
    def slow(self, client_id: str, bytes_per_s: int) -> Iterator[None]:
        """Limit a producer's rate, with a quota on its client id; the broker delays its answers."""
        quota = "producer_byte_rate"
        self._alter(client_id, "--add-config", f"{quota}={bytes_per_s}")
        try:
            yield
        finally:
            self._alter(client_id, "--delete-config", quota)

    def _alter(self, client_id: str, *change: str) -> None:
        which = ("--entity-type", "clients", "--entity-name", client_id)
        _tool("kafka.admin.ConfigCommand", "--bootstrap-server", self.bootstrap, "--alter", *which, *change)

    def _set(self, kind: ConfigResource.Type, name: str, settings: Mapping[str, str]) -> None:
        """Change settings of a topic, or of a running broker."""
        to = [ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in settings.items()]
        resource = ConfigResource(kind, name, incremental_configs=to)
        admin = self._admin()
        admin.incremental_alter_configs([resource], request_timeout=REQUEST_TIMEOUT_S)[resource].result()

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

    def _protocols(self) -> dict[str, str]:
        """Return the listeners' names and protocols."""
        return {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT"}

    def _properties(self) -> dict[str, str]:
        listeners = {name: f"{name}://{self.address(name)}" for name in self._protocols()}
        advertised = [listener for name, listener in listeners.items() if name != "CONTROLLER"]
        return {
            "process.roles": "broker,controller",
            "node.id": str(self.node_id),
            "controller.quorum.bootstrap.servers": self._controller_address(),
            "controller.listener.names": "CONTROLLER",
            "listeners": ",".join(listeners.values()),
            "advertised.listeners": ",".join(advertised),
            "listener.security.protocol.map": ",".join(f"{each}:{by}" for each, by in self._protocols().items()),
            "log.dirs": str(self.folder / "data"),
            "num.partitions": str(self.num_partitions),
            "auto.create.topics.enable": "false",
            # A killed broker may rejoin only after its old session has expired: by default 9 s.
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
            "group.initial.rebalance.delay.ms": "0",
            "offsets.topic.num.partitions": "1",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            **self.settings,
        }

    def _controller_address(self) -> str:
        return self.address("CONTROLLER")

    def _format_options(self) -> Sequence[str]:
        return ["--standalone"]


def _tool(main: str, *arguments: str) -> None:
    """Run one of Kafka's commands."""
    done = subprocess.run([*_java(256), main, *arguments], capture_output=True, text=True, timeout=TOOL_DEADLINE_S)
    if done.returncode:
        raise RuntimeError(f"{main} {' '.join(arguments)}:\n{done.stdout}{done.stderr}")


def _java(heap_mb: int) -> list[str]:
    # Little memory and a fast start matter more than throughput.
    options = [f"-Xmx{heap_mb}m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    return ["java", *options, "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{fetch.kafka()}/*"]
