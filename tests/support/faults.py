"""A producer whose Kafka fails under known traffic, and the checks of what arrived."""

import contextlib
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import topics
from tests.support.rebpf import Run, repeating, wait_until
from tests.support.servers.cluster import KafkaCluster
from tests.support.servers.kafka import KafkaServer
from tests.support.topics import FLOW, RETRANSMIT, TRANSMIT
from tests.support.traffic import Echo, exchange
from tests.support.wire import Packet, Segment, sniffed

AGENT = "rebpf_agent"
PARTITIONS = 5

EventId = tuple[str, int, int]

# Large enough for all traffic of a test, if only the ring holds it.
CAPTURE = f'[capture]\ntransmit_ring_bytes = {1 << 26}\n[metrics]\nlisten = "127.0.0.1:0"\n'


@dataclass(slots=True)
class Scene:
    """A producer that sends an Echo's traffic to the topics with `prefix`, and an independent capture of it."""

    run: Run
    port: int
    packets: list[Packet]
    """What was captured so far; all of it when the scene is over."""
    bootstrap: str
    """Where the administrator reads the topics."""
    prefix: str
    balance: dict[str, Any] = field(default_factory=dict)

    @property
    def segments(self) -> list[Segment]:
        """The captured packets without what only the capture knows."""
        return [packet.segment for packet in self.packets]

    def events(self, topic: str = TRANSMIT) -> list[topics.Event]:
        return topics.read(self.bootstrap, topic, self.prefix)

    def exchange(self, connections: int = 53) -> None:
        exchange(self.port, connections)

    @contextmanager
    def steady_traffic(self) -> Iterator[None]:
        """Make one or two connections at once, until the context exits."""
        with repeating(lambda: exchange(self.port, 2), 0.02):
            yield

    def wait_for_more(self, segments: int = 503) -> None:
        """Wait until this many more segments were on the wire."""
        target = len(self.packets) + segments
        wait_until("more traffic", lambda: len(self.packets) >= target)

    def wait_for_delivery(self) -> None:
        """Wait until the topic has as many events as there were segments so far."""
        target = len(self.packets)
        wait_until("the topic has all", lambda: len(once(self.events())) >= target)

    def wait_for_rest(self) -> None:
        """Wait until no event is in flight or spooled: each is delivered or lost."""
        waits = ("in_ring", "in_flight", "spooled")

        def is_at_rest() -> bool:
            return not any(stream[name] for stream in self.run.get("status")["streams"] for name in waits)

        wait_until("nothing is on its way", is_at_rest)

    def reasons(self) -> list[str]:
        """Return the producer's reasons for being degraded."""
        answer = self.run.get("readyz")
        assert (answer["state"] == "degraded") == bool(answer["reasons"]), answer
        return list(answer["reasons"])

    def wait_for_reason(self, pattern: str) -> None:
        """Wait for a reason in the producer's health."""
        wait_until(f"{pattern} in its health", lambda: re.search(pattern, "\n".join(self.reasons())))

    def finish(self) -> None:
        """Stop the producer once everything is delivered and it is healthy again."""
        self.wait_for_delivery()
        wait_until("its health is good", lambda: not self.reasons())
        self.balance = self.run.finish()

    def assert_nothing_is_missing(self, delivered_before: tuple[topics.Event, ...] = ()) -> None:
        """Check the topic, and events that were in it before, against the capture and the balance. After the scene."""
        events = once([*delivered_before, *self.events()])
        assert_same(self.segments, list(events.values()))
        self.assert_balance(delivered=len(events))
        assert_accounted(self.balance[self.prefix + RETRANSMIT])
        assert_accounted(self.balance[self.prefix + FLOW])

    def assert_balance(self, *, delivered: int, lost: Mapping[str, int] | None = None) -> None:
        """Check the transmit stream's balance at the end of a run with nothing pending."""
        account = self.balance[self.prefix + TRANSMIT]
        assert_accounted(account)
        assert account["lost"] == (lost or {})
        assert account["delivered"] == delivered
        assert account["passed"] == delivered + sum(account["lost"].values())


@contextmanager
def scene(
    folder: Path,
    bootstrap: str,
    prefix: str,
    *,
    brokers: str | None = None,
    settings: Mapping[str, object] | None = None,
    ports: tuple[int, ...] = (),
    stop_timeout_s: float = 60.0,
) -> Iterator[Scene]:
    """Start a producer with librdkafka's `settings` that captures the traffic of an Echo and of `ports`.

    It sends to `brokers`; `bootstrap` is the administrator's listener of the same brokers.
    """
    wanted = ", ".join(f'"{name}" = "{value}"' for name, value in (settings or {}).items())
    # By flow, so that each fault meets events of all partitions.
    config = f'kafka.key = "flow"\nkafka.topic_prefix = "{prefix}"\nkafka.stop_timeout_s = {stop_timeout_s}\n'
    config += f"kafka.settings = {{ {wanted} }}\n"
    with Echo() as echo, sniffed(echo.port) as packets:
        arguments: list[object] = ["--brokers", brokers or bootstrap]
        for port in (echo.port, *ports):
            arguments += ["--port", port]
        with Run(folder, *arguments, config=config + CAPTURE) as run:
            run.ready()
            yield Scene(run, echo.port, packets, bootstrap, prefix)


def once(events: list[topics.Event]) -> dict[EventId, topics.Event]:
    """Return the events without duplicates."""
    return {(each.record["boot_id"], each.record["cpu"], each.record["cpu_seq"]): each for each in events}


def assert_same(segments: list[Segment], events: list[topics.Event]) -> None:
    """Check that the events are exactly these segments."""
    captured, told = Counter(segments), Counter(map(topics.segment, events))
    # Not the whole difference, which may be large.
    missing, unknown = captured - told, told - captured
    assert (missing.total(), unknown.total()) == (0, 0), (next(iter(missing), None), next(iter(unknown), None))


def assert_accounted(account: Mapping[str, Any]) -> None:
    """Check that each event that passed the filter is in one place."""
    places = [account.get(name, 0) for name in ("delivered", "in_flight", "spooled", "in_ring")]
    assert account["passed"] == sum(places) + sum(account["lost"].values()), account


def rss_anon_kb(pid: int) -> int:
    """Return a process's anonymous memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise RuntimeError(f"no RssAnon of process {pid}")


def create_topics(kafka: KafkaServer | KafkaCluster, prefix: str, *but: str) -> None:
    for topic in (TRANSMIT, RETRANSMIT, FLOW, AGENT):
        if topic not in but:
            kafka.create_topic(prefix + topic)


def retransmitted_syn(port: int) -> None:
    """Connect to a listener with a full queue until the kernel has retransmitted a SYN."""
    with socket.create_server(("127.0.0.1", port), backlog=0), contextlib.ExitStack() as clients:
        for _ in range(8):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        wait_until("a SYN is retransmitted", lambda: syn_retransmits(client))


def syn_retransmits(client: socket.socket) -> int:
    """Return tcpi_total_retrans of struct tcp_info."""
    return struct.unpack_from("<I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0]


def assert_other_port_too(at: Scene, port: int) -> None:
    """Check a run with two ports, of which one was not captured by others and had retransmitted SYNs."""
    events, syns = once(at.events()), once(at.events(RETRANSMIT))
    of_echo = [each for each in events.values() if at.port in (each.record["sport"], each.record["dport"])]
    assert_same(at.segments, of_echo)
    assert {event.record["dport"] for event in syns.values()} == {port}
    for topic, found in ((TRANSMIT, events), (RETRANSMIT, syns)):
        account = at.balance[at.prefix + topic]
        assert_accounted(account)
        assert account["lost"] == {}
        assert account["passed"] == account["delivered"] == len(found)
