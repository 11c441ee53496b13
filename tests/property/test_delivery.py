"""Ring, spool and ledger against a model: crashes at each step, short writes, full and broken disks, clock steps.

The ring and Kafka are in memory. The spool and the ledger are real files, with injected failures. Whatever happens,
each event that entered the ring is in the topic or counted as lost, and each flow's events are in order.
"""

import errno
import random
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path as Folder
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from producer.events import TRANSMITS, Batch, EncodedBatch, Outcome, Rows, Stream
from producer.host.clock import Moment
from producer.pipeline.pipeline import Pipeline
from producer.pipeline.recovery import resume
from producer.pipeline.stream import Stores, StreamPipeline
from producer.spool.files import ASIDE_SUFFIX, files
from producer.spool.spool import Spool
from tests.property.faults import CrashError, FailingDisk, FailingLedger, Faults
from tests.support.memory_ring import STRIDE, MemoryRing

MEMORY = Folder("/dev/shm")  # otherwise the test waits for a disk
RING_ROWS = 300
AFTER_S = 2.0
FLOWS = 3
PADDING_BYTES = 60
MESSAGE_BYTES = 5 + 8 + PADDING_BYTES
IDENTITY = {"type": "fixed", "name": "Id", "size": 8 + PADDING_BYTES}
SCHEMA: dict[str, Any] = {"type": "record", "name": "Event", "fields": [{"name": "id", "type": IDENTITY}]}


def flow_of(number: Any) -> Any:
    """Neighbors share a flow, so that a batch may be done before an older one."""
    return number // 100 % FLOWS


class IdEncoder:
    """Encodes an event as its number and incompressible noise; the key is its flow."""

    def __init__(self) -> None:
        self._noise = np.random.default_rng(1)

    def fit(self, rows: Rows) -> int:
        return len(rows)

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        ids = batch.rows["s"]["cpu_seq"].astype(">u8")
        payload = np.zeros((len(ids), MESSAGE_BYTES), np.uint8)
        payload[:, 5:13] = ids.view(np.uint8).reshape(-1, 8)
        payload[:, 13:] = self._noise.integers(0, 256, (len(ids), PADDING_BYTES))
        flows = flow_of(ids.astype(np.int64))
        sizes, ones = np.full(len(ids), MESSAGE_BYTES), np.full(len(ids), 1)
        starts = np.arange(len(ids)) * MESSAGE_BYTES
        keys = np.frombuffer(b"abc", np.uint8)
        return EncodedBatch(batch.stream, payload.reshape(-1), starts, sizes, keys, flows, ones)


def ids_of(batch: EncodedBatch) -> list[int]:
    numbers = []
    for start, size, key_start, key_size in zip(
        batch.starts, batch.lengths, batch.key_starts, batch.key_lengths, strict=True
    ):
        assert size == MESSAGE_BYTES
        number = int.from_bytes(batch.payload[start + 5 : start + 13].tobytes(), "big")
        assert batch.keys[key_start : key_start + key_size].tobytes() == b"%c" % b"abc"[flow_of(number)]
        numbers.append(number)
    return numbers


class MemoryKafka:
    """Accepts messages in order on demand, and rejects `poison`.

    `topic` and `poison` outlive the process; messages in flight do not.
    """

    def __init__(self, topic: list[int], poison: set[int], most: int) -> None:
        self.topic = topic
        self.poison = poison
        self._most = most
        self._waiting: list[tuple[EncodedBatch, int]] = []
        self._open: dict[EncodedBatch, int] = {}
        self._lost: dict[EncodedBatch, Counter[str]] = {}
        self._outcome = Outcome()

    @property
    def in_flight(self) -> int:
        return sum(self._open.values())

    def capacity(self, stream: Stream) -> int:
        return max(0, self._most - self.in_flight)

    def send(self, batch: EncodedBatch) -> None:
        self._waiting += [(batch, number) for number in ids_of(batch)]
        self._open[batch], self._lost[batch] = len(batch), Counter()

    def unacknowledged(self, batch: EncodedBatch) -> int:
        return self._open.get(batch, 0)

    def take(self, count: int, *, flow: int | None = None, tell: bool = True) -> None:
        """Accept messages, of one flow or of all. Without `tell`, they reach the topic but are not acknowledged."""
        taken = [each for each in self._waiting if flow in (None, flow_of(each[1]))][:count]
        for batch, number in taken:
            refuse = number in self.poison
            if not refuse:
                self.topic.append(number)
            if not tell:
                continue
            self._outcome.delivered += not refuse
            self._outcome.lost.update({"REFUSED": 1} if refuse else {})
            self._lost[batch].update({"REFUSED": 1} if refuse else {})
            self._open[batch] -= 1
            if not self._open[batch]:
                self._outcome.done.append((batch, self._lost.pop(batch)))
                del self._open[batch]
        if tell:
            self._waiting = [each for each in self._waiting if each not in taken]

    def refuse(self, count: int) -> None:
        """Reject the next messages, now and whenever they are resent."""
        self.poison.update(number for _, number in self._waiting[:count] if number not in self.topic)
        self.take(count)

    def poll(self) -> Mapping[str, Outcome]:
        outcome, self._outcome = self._outcome, Outcome()
        return {TRANSMITS.name: outcome}


class NoWaits:
    def next(self) -> float:
        return 0.0

    def reset(self) -> None:
        pass


class Delivery(RuleBasedStateMachine):
    """Draws `when_full` and the sizes once; then events arrive, Kafka accepts some, and things break."""

    @initialize(
        when_full=st.sampled_from(["reject", "drop_oldest"]),
        max_bytes=st.sampled_from([1 << 16, 1 << 20]),
        most=st.sampled_from([64, 1 << 13]),
        seed=st.integers(0, 99),
    )
    def set_up(self, when_full: str, max_bytes: int, most: int, seed: int) -> None:
        self.faults = Faults()
        self.chance = random.Random(seed)
        self.home = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.ring = MemoryRing(TRANSMITS, RING_ROWS, lambda position: self.faults.crash())
        self.topic: list[int] = []
        self.poison: set[int] = set()
        self.when_full, self.max_bytes, self.most = when_full, max_bytes, most
        self.now_s, self.wall_s = 1000.0, 1e9
        self.crashes = 0
        self.exact = True
        self.start()

    def start(self) -> None:
        """Start a process that takes over from the last one."""
        folder = Folder(self.home.name)
        self.faults.calls = 0
        self.ring.position = self.ring.committed
        ledger = FailingLedger(folder / "ledger", self.faults)
        ledger.open()
        account = ledger.read()
        self.disk = FailingDisk(self.faults, self.chance)
        self.spool = Spool(
            folder / "spool",
            TRANSMITS,
            SCHEMA,
            lambda: Moment("boot", self.now_s, self.wall_s),
            max_bytes=self.max_bytes,
            file_bytes=1 << 13,
            when_full=self.when_full,
            max_age_s=1e6,
            disk=self.disk,
        )
        self.spool.open(*((account.acked, account.end, account.discarded) if account else ()))
        resumed = resume(account, "ring", self.ring, self.spool)
        if self.spool.last:
            assert ids_of(self.spool.last.batch)[-1] < self.ring.records_before, "no event is there twice"
        stores = Stores(self.spool, ledger.write, NoWaits(), AFTER_S)
        self.path = StreamPipeline(TRANSMITS, self.ring, IdEncoder(), stores, resumed)
        self.kafka = MemoryKafka(self.topic, self.poison, self.most)
        self.path.account.open({})
        self.pipeline = Pipeline([self.path], self.kafka, lambda: self.now_s, lambda: 0)
        self.ledger = ledger

    def crash(self) -> None:
        self.crashes += 1
        self.exact &= not self.path.account.ledger_error  # a count that could not be written ends with the process
        self.ledger.close()
        self.disk.end()
        self.faults.errno = 0
        self.start()

    @rule(count=st.integers(1, 120))
    def events_arrive(self, count: int) -> None:
        self.ring.arrive(count)

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        try:
            for _ in range(steps):
                self.pipeline.step()
                self.spool.expire()
        except CrashError:
            self.crash()

    @rule(seconds=st.sampled_from([0.0, 0.02, 1.0]))
    def turn(self, seconds: float) -> None:
        """What the producer's loop does, which reads only what is due."""
        self.now_s += seconds
        try:
            self.pipeline.turn({TRANSMITS.name})
        except CrashError:
            self.crash()

    @rule(rounds=st.integers(2, 12), count=st.integers(1, 120), seconds=st.sampled_from([0.1, AFTER_S]))
    def traffic_without_an_answer(self, rounds: int, count: int, seconds: float) -> None:
        for _ in range(rounds):
            self.ring.arrive(count)
            self.now_s += seconds
            self.step(1)

    @rule(count=st.integers(1, 500), flow=st.sampled_from([None, 0, 1]))
    def kafka_takes(self, count: int, flow: int | None) -> None:
        self.kafka.take(count, flow=flow)
        self.step(1)

    @rule(count=st.integers(1, 5))
    def kafka_refuses(self, count: int) -> None:
        self.kafka.refuse(count)

    @rule(seconds=st.sampled_from([0.1, AFTER_S * 2]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(seconds=st.sampled_from([-1e9, 1e9]))
    def the_clock_is_set(self, seconds: float) -> None:
        self.wall_s += seconds

    @rule(number=st.sampled_from([0, 0, errno.ENOSPC, errno.EIO, errno.EROFS]))
    def the_disk_changes(self, number: int) -> None:
        self.faults.errno = number

    @rule(calls=st.integers(1, 12), count=st.integers(0, 300))
    def it_crashes_soon(self, calls: int, count: int) -> None:
        self.faults.calls = calls
        self.step(4)
        if self.faults.calls:  # not reached: crash now, after some messages reached the topic
            self.kafka.take(count, tell=False)
            self.crash()

    @rule()
    def it_is_killed_while_messages_are_under_way(self) -> None:
        self.kafka.take(self.chance.randint(0, 200), tell=False)
        self.crash()

    @invariant()
    def every_event_taken_is_in_one_place(self) -> None:
        if not hasattr(self, "path") or self.path.account.ledger_error:
            return
        path = self.path
        pending = self.kafka._outcome
        places = path.account.delivered + path.account.lost.total() + path.spooled + self.kafka.in_flight
        assert path.taken + path.account.carried == places + pending.delivered + pending.lost.total()

    def teardown(self) -> None:
        if not hasattr(self, "path"):
            return
        with self.home:
            try:
                self.end()
            finally:
                self.spool.close()
                self.ledger.close()

    def end(self) -> None:
        self.faults.errno = self.faults.calls = 0
        self.now_s += AFTER_S * 2
        for _ in range(10_000):
            self.pipeline.step()
            self.kafka.take(1 << 20)
            if self.path.taken == self.ring.written and not self.kafka.in_flight and not self.path.spooled:
                break
        else:
            raise AssertionError(f"{self.path.spooled} events are never sent")
        self.pipeline.step()
        missing = set(range(self.ring.written)) - set(self.topic)
        if self.exact:
            # Messages in flight may have reached the topic, and been discarded after a crash.
            assert len(missing) <= self.path.account.lost.total()
            assert len(missing) == self.path.account.lost.total() or self.when_full == "drop_oldest"
        if not self.crashes:
            assert len(missing) == self.path.account.lost.total()
            assert self.path.account.delivered == len(self.topic) == len(set(self.topic))
        # All files are deleted, except those that a crash tore, which are kept for inspection.
        aside = files(Folder(self.home.name, "spool"), ASIDE_SUFFIX)
        assert self.spool.size_bytes == sum(path.stat().st_size for path in aside)
        assert self.crashes or not aside
        assert self.ring.committed // STRIDE == self.ring.written
        for flow in range(FLOWS):
            first_seen = list(dict.fromkeys(number for number in self.topic if flow_of(number) == flow))
            assert first_seen == sorted(first_seen)


Delivery.TestCase.settings = settings(max_examples=8 * settings.default.max_examples, stateful_step_count=40)
TestDelivery = Delivery.TestCase
