"""The pipeline with ring, encoder and sink in memory: room is given back in order, and every event is counted."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from producer.events import RETRANSMITS, STREAMS, TRANSMITS, Batch, EncodedBatch, Rows, Stream
from producer.pipeline import Path, Pipeline

STRIDE = 8
UTC_OFFSET_NS = 10**18


class MemoryRing:
    """Rows that are numbered by cpu_seq; a position is STRIDE times the rows before it."""

    def __init__(self, stream: Stream) -> None:
        self._dtype = stream.dtype
        self.written = self.position = self.committed = 0
        self.taken: list[int] = []

    def read(self, limit: int) -> Rows:
        first = self.position // STRIDE
        rows = np.zeros(min(limit, self.written - first), self._dtype)
        rows["s"]["cpu_seq"] = np.arange(first, first + len(rows))
        self.position += STRIDE * len(rows)
        self.taken += rows["s"]["cpu_seq"].tolist()
        return rows

    def commit(self, position: int) -> None:
        assert self.committed < position <= self.position
        self.committed = position


class SimpleEncoder:
    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        assert utc_offset_ns == UTC_OFFSET_NS
        numbers: Any = batch.rows["s"]["cpu_seq"].astype(np.int64)
        nothing = np.zeros(0, np.uint8)
        return EncodedBatch(batch.stream, nothing, numbers, numbers, nothing, numbers, numbers, batch.end)


@dataclass
class Told:
    delivered: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    done: list[EncodedBatch] = field(default_factory=list)


class MemorySink:
    """Keeps batches until it is told what becomes of their messages."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.open: dict[str, list[list[Any]]] = {stream.name: [] for stream in STREAMS}
        """For each batch in flight: the batch, and how many of its messages are."""
        self._told: dict[str, Told] = {}

    def room(self, stream: Stream) -> int:
        return self._most - sum(left for _, left in self.open[stream.name])

    def send(self, batch: EncodedBatch) -> None:
        assert 0 < len(batch) <= self.room(batch.stream)
        self.open[batch.stream.name].append([batch, len(batch)])

    def settle(self, stream: Stream, index: int, count: int, reason: str | None) -> None:
        """Let `count` messages of the batch `index` be delivered, or lost."""
        flight = self.open[stream.name][index]
        told = self._told.setdefault(stream.name, Told())
        flight[1] -= count
        if reason is None:
            told.delivered += count
        else:
            told.lost[reason] += count
        if flight[1] == 0:
            told.done.append(flight[0])
            del self.open[stream.name][index]

    def poll(self) -> Mapping[str, Told]:
        told, self._told = self._told, {}
        return told


class Setup:
    def __init__(self, most: int) -> None:
        self.rings = {stream.name: MemoryRing(stream) for stream in STREAMS}
        self.sink = MemorySink(most)
        self.paths = {stream.name: Path(stream, self.rings[stream.name], SimpleEncoder()) for stream in STREAMS}
        self.pipeline = Pipeline(list(self.paths.values()), self.sink, lambda: UTC_OFFSET_NS)


def first_open(setup: Setup, stream: Stream) -> int:
    """Return the ring position of the first row that is not done."""
    flights = setup.sink.open[stream.name]
    if not flights:
        return setup.rings[stream.name].position
    return min(int(batch.starts[0]) for batch, _ in flights) * STRIDE


actions = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(STREAMS), st.integers(1, 9)),
    st.tuples(st.just("step")),
    st.tuples(
        st.just("settle"),
        st.sampled_from(STREAMS),
        st.integers(0, 99),
        st.integers(1, 9),
        st.sampled_from([None, None, "too_large", "refused"]),
    ),
)


@given(st.integers(1, 12), st.lists(actions, max_size=60))
def test_room_goes_back_in_order_and_every_event_is_counted_once(most: int, steps: list[Any]) -> None:
    setup = Setup(most)
    settled: dict[str, Counter[str | None]] = {stream.name: Counter() for stream in STREAMS}
    for action, *arguments in steps:
        if action == "write":
            stream, count = arguments
            setup.rings[stream.name].written += count
        elif action == "settle":
            stream, index, count, reason = arguments
            flights = setup.sink.open[stream.name]
            if flights:
                index %= len(flights)
                count = min(count, flights[index][1])
                setup.sink.settle(stream, index, count, reason)
                settled[stream.name][reason] += count
        else:
            setup.pipeline.step()
            for stream in STREAMS:
                ring, path = setup.rings[stream.name], setup.paths[stream.name]
                assert ring.committed == first_open(setup, stream)
                assert path.delivered == settled[stream.name][None]
                lost = {reason: count for reason, count in settled[stream.name].items() if reason is not None}
                assert dict(path.lost) == lost

    for stream in STREAMS:
        ring = setup.rings[stream.name]
        assert ring.taken == list(range(ring.position // STRIDE))  # each row once, in order
        flying = sum(left for _, left in setup.sink.open[stream.name])
        assert len(ring.taken) == settled[stream.name].total() + flying


def test_a_stream_without_room_stays_in_its_ring_and_the_other_goes_on() -> None:
    setup = Setup(3)
    setup.rings["transmit"].written, setup.rings["retransmit"].written = 5, 2
    setup.pipeline.step()
    setup.sink.settle(RETRANSMITS, 0, 2, None)
    setup.rings["retransmit"].written += 2
    setup.pipeline.step()
    setup.pipeline.step()

    assert setup.rings["transmit"].position == 3 * STRIDE
    assert setup.rings["transmit"].committed == 0
    assert setup.rings["retransmit"].position == 4 * STRIDE
    assert setup.rings["retransmit"].committed == 2 * STRIDE
    setup.sink.settle(TRANSMITS, 0, 3, "refused")
    setup.pipeline.step()
    assert setup.rings["transmit"].committed == 3 * STRIDE
    setup.pipeline.step()
    assert setup.rings["transmit"].position == 5 * STRIDE


def test_a_batch_behind_one_that_is_not_done_gives_no_room_back() -> None:
    setup = Setup(100)
    for _ in range(3):
        setup.rings["transmit"].written += 2
        setup.pipeline.step()
    setup.sink.settle(TRANSMITS, 2, 2, None)
    setup.sink.settle(TRANSMITS, 1, 2, None)
    setup.sink.settle(TRANSMITS, 0, 1, None)
    setup.pipeline.step()
    assert setup.rings["transmit"].committed == 0

    setup.sink.settle(TRANSMITS, 0, 1, None)
    setup.pipeline.step()
    assert setup.rings["transmit"].committed == 6 * STRIDE


def test_step_says_whether_more_is_likely_to_wait() -> None:
    setup = Setup(1 << 20)
    assert not setup.pipeline.step()
    setup.rings["transmit"].written = 4096 + 5
    assert setup.pipeline.step()
    assert not setup.pipeline.step()
    assert setup.rings["transmit"].position == (4096 + 5) * STRIDE
