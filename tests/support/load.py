"""A producer under steady traffic, and its status while Kafka fails and recovers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tests.support import topics
from tests.support.faults import assert_accounted
from tests.support.rebpf import DEADLINE_S, Run, rebpf, wait_until
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.process import free_port
from tests.support.topics import FLOW, TRANSMIT
from tests.support.traffic import Steady

PARTITIONS = 4


class SteadyScene:
    """A producer under steady traffic, with additional `config`; `pin` pins its hooks. It ends with the context."""

    def __init__(self, folder: Path, kafka: KafkaServer, config: str = "", *, pin: Path | None = None) -> None:
        self.prefix = f"{folder.name[-40:]}."
        self.kafka = kafka
        self.port = free_port()
        self._folder = folder
        self._pin = pin
        self._config = (
            f'[kafka]\nkey = "flow"\ntopic_prefix = "{self.prefix}"\n[metrics]\nlisten = "127.0.0.1:0"\n{config}'
        )
        (folder / "init.toml").write_text(self._config)
        arguments = ["--brokers", kafka.bootstrap, "--partitions", PARTITIONS, "--config", folder / "init.toml"]
        done = rebpf("init", *arguments)
        assert done.returncode == 0, done.stderr
        self.flows: dict[str, Any] = {}
        """The balance of connections, after `finish`."""
        self.run = self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.run.__exit__(*exception)

    @property
    def state(self) -> Path:
        return self.run.state_dir

    def start(self) -> Run:
        """Start the producer, with the same state each time."""
        arguments: list[object] = ["--brokers", self.kafka.bootstrap, "--port", self.port]
        if self._pin:
            arguments += ["--pin", self._pin]
        self.run = Run(self._folder, *arguments, config=self._config)
        self.run.ready()
        return self.run

    def status(self) -> dict[str, Any]:
        """Return the producer's status."""
        return self.run.get("status")

    def account(self) -> dict[str, Any]:
        """Return the balance of transmits."""
        (stream,) = (each for each in self.status()["streams"] if each["topic"] == self.prefix + TRANSMIT)
        return {**stream, "lost": {loss["reason"]: loss["count"] for loss in stream["lost"]}}

    def wait_for(self, what: str, least: int) -> None:
        """Wait until a field of the balance reaches a number."""
        wait_until(f"{least} {what}", lambda: self.account()[what] >= least)

    def wait_for_delivery(self) -> None:
        """Wait until the spool is empty and Kafka accepts events again."""
        wait_until("nothing waits", lambda: self.account()["spooled"] == 0 and self.status()["state"] == "ok")

    def wait_until_drained(self, deadline_s: float = DEADLINE_S) -> None:
        """Wait until Kafka has everything. Call it after the traffic: a stop may leave events on disk."""
        wait_until_drained(self.run, deadline_s)

    def end_on_each_cpu(self) -> None:
        """Send a few segments on each CPU after all that may be lost, since a loss at the end leaves no gap.

        The ring must have space again, or these would be lost too.
        """
        self.wait_until_drained()
        for cpu in os.sched_getaffinity(0):
            with Steady(self.port, 100, cpu) as traffic:
                self.wait_for("delivered", self.account()["delivered"] + 50)
                traffic.stop()
        self.wait_until_drained()

    def finish(self) -> dict[str, Any]:
        """Stop the producer, and return the balance of transmits, after checking that of connections."""
        balances = self.run.finish()
        balance: dict[str, Any] = balances[self.prefix + TRANSMIT]
        assert_accounted(balance)
        assert_accounted(balances[self.prefix + FLOW])
        self.flows = balances[self.prefix + FLOW]
        return balance

    def assert_flows_whole(self) -> None:
        """Check after `finish` that each record of a connection is in the topic."""
        records = topics.distinct(topics.read(self.kafka.bootstrap, FLOW, self.prefix))
        assert self.flows["lost"] == {}
        assert self.flows["passed"] == self.flows["delivered"] == len(records)


def wait_until_drained(run: Run, deadline_s: float = DEADLINE_S) -> None:
    """Wait until Kafka has all events of a producer."""

    def is_drained() -> bool:
        accounts = run.get("status")["streams"]
        return not any(each[name] for each in accounts for name in ("in_ring", "in_flight", "spooled"))

    wait_until("all is delivered", is_drained, deadline_s)


@contextmanager
def outage(kafka: KafkaServer) -> Iterator[None]:
    """Stop the broker until the context exits."""
    kafka.kill()
    try:
        yield
    finally:
        kafka.start()
