"""The status of a run: the balances, and the reasons for being degraded."""

import os
import time
from collections.abc import Mapping, Sequence

from producer import __version__
from producer.agent.reload import InForce
from producer.agent.streams import StreamParts
from producer.config.sources import shown
from producer.config.validate import host_name
from producer.events import Topic
from producer.health.balance import Balance
from producer.health.status import Status, StreamStatus, usage
from producer.host.clock import boot_id
from producer.kafka.sink import KafkaSink
from producer.kernel.capture import Capture, KernelCounters


class Reporter:
    """Collects the status from the parts of a run. `topics` are by the stream's name."""

    def __init__(
        self,
        in_force: InForce,
        hooks: Capture,
        sink: KafkaSink,
        parts: Sequence[StreamParts],
        topics: Mapping[str, Topic],
    ) -> None:
        self._in_force = in_force
        self._hooks = hooks
        self._sink = sink
        self._parts = parts
        self._topics = topics
        self._host_then = host_name()
        self._started_s = time.time()

    def balances(self) -> dict[Topic, Balance]:
        """Return each topic's current balance."""
        return {
            self._topics[each.stream.name]: self.balance(each, self._hooks.counters(each.stream))
            for each in self._parts
        }

    def status(self, transmit_sample_rate: int, more_reasons: Sequence[str]) -> Status:
        """Return the current status; `more_reasons` are added to the reasons for being degraded."""
        cpu_s, rss_bytes = usage()
        return Status(
            host=self._in_force.config.host,
            boot_id=boot_id(),
            version=__version__,
            pid=os.getpid(),
            started_s=self._started_s,
            rules_version=self._in_force.version,
            streams=tuple(self._stream(each) for each in self._parts),
            reasons=tuple(map(shown, (*self.reasons(), *more_reasons))),  # they quote names, which may not be UTF-8
            cpu_s=cpu_s,
            rss_bytes=rss_bytes,
            labels=self._in_force.config.labels,
            transmit_sample_rate=transmit_sample_rate,
            config_hash=self._in_force.digest,
            restart_needed=self._in_force.restart_needed,
        )

    def balance(self, parts: StreamParts, kernel: KernelCounters) -> Balance:
        """Return a stream's balance. Read the counters after the ring."""
        account = parts.pipeline.account
        losses = {"ring_full": kernel.ring_full, "nested": kernel.nested, "unseen": kernel.unseen, **account.lost}
        return Balance(
            passed=kernel.passed + kernel.nested + kernel.unseen + account.carried,
            delivered=account.delivered,
            in_flight=self._sink.in_flight[parts.stream.name],
            in_ring=kernel.passed - kernel.ring_full - parts.pipeline.taken,
            spooled=parts.pipeline.spooled,
            carried=account.carried,
            lost={reason: count for reason, count in losses.items() if count},
        )

    def _stream(self, parts: StreamParts) -> StreamStatus:
        return StreamStatus(
            self._topics[parts.stream.name],
            self._hooks.hooks_in_use.get(parts.stream.name, "off"),
            self.balance(parts, self._hooks.counters(parts.stream)),
            parts.ring.size_bytes,
            round(parts.ring.fill * parts.ring.size_bytes),
            parts.spool.size_bytes if parts.spool else 0,
            parts.spool.max_bytes if parts.spool else 0,
        )

    def reasons(self) -> list[str]:
        """Return the reasons for being degraded, for an operator; empty if there are none."""
        reasons = [f"kafka: {self._sink.last_error.name}"] if self._sink.last_error else []
        for each in self._parts:
            errors = {
                "kafka": self._sink.last_error_of(each.stream.name),
                "spool": each.open_error or each.pipeline.spool_error,
                "ledger": each.pipeline.account.ledger_error,
            }
            topic = self._topics[each.stream.name]
            reasons += [f"{topic}: {part}: {text}" for part, text in errors.items() if text]
            if each.pipeline.spooling:
                reasons.append(f"{topic}: events wait on disk")
        host = self._in_force.config.host
        if host == self._host_then != (now := host_name()):  # it may get its name late in its first boot
            reasons.append(f"host: the name of this host is now {now}, but events have {host}: restart")
        return reasons
