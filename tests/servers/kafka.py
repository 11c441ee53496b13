"""A real Apache Kafka 4.2 on one node (KRaft: broker and controller in one process), on 127.0.0.1."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from . import fetch
from .process import ServerProcess, free_port

CLUSTER_ID = "cmVicGYtdGVzdC1rYWZrYQ"
REQUEST_TIMEOUT_S = 30.0


class KafkaServer(ServerProcess):
    """A broker with its data in `folder`; `settings` are added to server.properties and win over what is there.

    Ports are chosen at the first start and kept.
    """

    def __init__(self, folder: Path, *, num_partitions: int = 3, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, "kafka")
        self.num_partitions = num_partitions
        self.settings = dict(settings or {})
        self._port = 0
        self._controller_port = 0

    @property
    def bootstrap(self) -> str:
        """Address for clients, HOST:PORT."""
        if not self._port:
            raise RuntimeError("kafka has no address before its first start")
        return f"127.0.0.1:{self._port}"

    def command(self) -> Sequence[str]:
        self._port = self._port or free_port()
        self._controller_port = self._controller_port or free_port()
        properties = self.folder / "server.properties"
        properties.write_text("".join(f"{key}={value}\n" for key, value in self._properties().items()))
        if not (self.folder / "data").exists():
            self._format(properties)
        return [*_java(), "kafka.Kafka", str(properties)]

    def is_ready(self) -> bool:
        try:
            return bool(self._admin().list_topics(timeout=1).brokers)
        except KafkaException:
            return False

    def create_topic(self, name: str, partitions: int | None = None) -> None:
        """Create a topic, by default of `num_partitions` partitions, and wait until the broker has it."""
        topic = NewTopic(name, partitions or self.num_partitions, replication_factor=1)
        admin = self._admin()  # held until there is an answer: with the client goes the request
        admin.create_topics([topic], operation_timeout=REQUEST_TIMEOUT_S)[name].result(REQUEST_TIMEOUT_S)

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

    def _properties(self) -> dict[str, str]:
        controller = f"127.0.0.1:{self._controller_port}"
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.bootstrap.servers": controller,
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": str(self.folder / "data"),
            "num.partitions": str(self.num_partitions),
            "auto.create.topics.enable": "false",
            # A killed broker is let in again only when its old session is over: by default after 9 s.
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

    def _format(self, properties: Path) -> None:
        arguments = ["format", "--standalone", "-t", CLUSTER_ID, "-c", str(properties)]
        done = subprocess.run(
            [*_java(), "kafka.tools.StorageTool", *arguments], capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"cannot format Kafka's storage:\n{done.stdout}{done.stderr}")


def _java() -> list[str]:
    # Little memory and a quick start count for more than throughput here.
    options = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    return ["java", *options, "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{fetch.kafka()}/*"]
