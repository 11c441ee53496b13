"""What the producer says of itself, taken from its parts: the balances, and why it is not as it should be."""

import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from producer.agent.streams import StreamParts
from producer.events import Topic
from producer.health.balance import Balance
from producer.health.status import Status, StreamStatus, usage
from producer.host.clock import boot_id
from producer.kafka.sink import KafkaSink
from producer.kernel.capture import Hooks, KernelCounters


class Reporter:
    """Reports on the parts of a run; `topics` are by the stream's name."""

    def __init__(
        self, host: str, hooks: Hooks, sink: KafkaSink, parts: Sequence[StreamParts], topics: Mapping[str, Topic]
    ) -> None:
        self._host = host
        self._hooks = hooks
        self._sink = sink
        self._parts = parts
        self._topics = topics
        self._boot_id = boot_id()
        self._version = version("rebpf")
        self._started_s = time.time()

    def balances(self) -> dict[Topic, Balance]:
        """Return each topic's balance now."""
        return {
            self._topics[each.stream.name]: self.balance(each, self._hooks.counters(each.stream))
            for each in self._parts
        }

    def status(self, rules_version: int, more_reasons: Sequence[str] = ()) -> Status:
        """Return the whole status now; `more_reasons` say what else is not as it should be."""
        cpu_s, rss_bytes = usage()
        return Status(
            self._host,
            self._boot_id,
            self._version,
            os.getpid(),
            self._started_s,
            rules_version,
            tuple(self._stream(each) for each in self._parts),
            (*self.reasons(), *more_reasons),
            cpu_s,
            rss_bytes,
        )

    def balance(self, parts: StreamParts, kernel: KernelCounters) -> Balance:
        """Return a stream's balance with these counters, which were read after its ring."""
        path = parts.path
        losses = {"ring_full": kernel.ring_full, "nested": kernel.nested, **path.lost}
        return Balance(
            passed=kernel.passed + kernel.nested + path.carried,
            delivered=path.delivered,
            in_flight=self._sink.in_flight[parts.stream.name],
            in_ring=kernel.passed - kernel.ring_full - path.taken,
            spooled=path.spooled,
            carried=path.carried,
            lost={reason: count for reason, count in losses.items() if count},
        )

    def _stream(self, parts: StreamParts) -> StreamStatus:
        return StreamStatus(
            self._topics[parts.stream.name],
            self._hooks.rungs[parts.stream.name],
            self.balance(parts, self._hooks.counters(parts.stream)),
            parts.ring.size_bytes,
            round(parts.ring.fill * parts.ring.size_bytes),
            parts.spool.size_bytes if parts.spool else 0,
            parts.spool.max_bytes if parts.spool else 0,
        )

    def reasons(self) -> list[str]:
        """Return why the producer is not as it should be, for an operator; empty where it is."""
        reasons = [f"kafka: {self._sink.last_error.name}"] if self._sink.last_error else []
        for each in self._parts:
            troubles = {
                "kafka": self._sink.last_error_of(each.stream.name),
                "spool": each.trouble or each.path.spool_trouble,
                "ledger": each.path.ledger_trouble,
            }
            topic = self._topics[each.stream.name]
            reasons += [f"{topic}: {part}: {text}" for part, text in troubles.items() if text]
            if each.path.spooling:
                reasons.append(f"{topic}: events wait on disk")
        return reasons
