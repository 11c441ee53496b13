"""A real Kafka cluster of three brokers on 127.0.0.1. Two can fail; the third is also the controller."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from .kafka import KafkaServer

HEAP_MB = 320
REPLICATION = 3
TOPIC_SETTINGS = {"min.insync.replicas": "2"}


class Broker(KafkaServer):
    """A broker that is not a controller, and joins another node's cluster."""

    def __init__(self, folder: Path, node_id: int, controller: KafkaServer, num_partitions: int) -> None:
        super().__init__(folder, num_partitions=num_partitions, node_id=node_id, heap_mb=HEAP_MB)
        self._controller = controller

    def _protocols(self) -> dict[str, str]:
        return {"PLAINTEXT": "PLAINTEXT"}

    def _properties(self) -> dict[str, str]:
        return {
            **super()._properties(),
            "process.roles": "broker",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        }

    def _controller_address(self) -> str:
        return self._controller.address("CONTROLLER")

    def _format_options(self) -> list[str]:
        return []


class KafkaCluster:
    """Three nodes; the first is the only controller, with `settings` of its own, and must stay up."""

    def __init__(self, folder: Path, *, num_partitions: int = 6, settings: Mapping[str, str] | None = None) -> None:
        self.controller = KafkaServer(folder / "1", num_partitions=num_partitions, settings=settings, heap_mb=HEAP_MB)
        self.brokers = [Broker(folder / str(each), each, self.controller, num_partitions) for each in (2, 3)]
        self.nodes = {node.node_id: node for node in (self.controller, *self.brokers)}

    @property
    def bootstrap(self) -> str:
        """Addresses for clients, separated by commas."""
        return ",".join(node.bootstrap for node in self.nodes.values())

    def create_topic(self, name: str, partitions: int | None = None) -> None:
        """Create a topic with three replicas that accepts messages with two in sync."""
        self.controller.create_topic(name, partitions, replication=REPLICATION, settings=TOPIC_SETTINGS)
        for broker in self.brokers:
            broker.wait_for_partitions(name, partitions or self.controller.num_partitions)

    def leaders(self, topic: str) -> dict[int, int]:
        """Return the leader of each partition, as seen by the controller; -1 if none."""
        return {number: partition.leader for number, partition in self.controller.partitions(topic).items()}

    def in_sync(self, topic: str) -> dict[int, set[int]]:
        """Return the in-sync replicas of each partition."""
        return {number: set(partition.isrs) for number, partition in self.controller.partitions(topic).items()}

    def start(self) -> None:
        """Start all nodes in parallel, and wait until each is ready."""
        try:
            for node in self.nodes.values():
                node.launch()
            for node in self.nodes.values():
                node.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all nodes, the controller last, since the others deregister from it."""
        for node in reversed(self.nodes.values()):
            node.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
