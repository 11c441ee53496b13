"""An event that cannot be encoded is the only one that is lost."""

import numpy as np
import pytest

from producer.encode.isolate import Isolator, Unencodable
from producer.events import TRANSMITS, Batch, EncodedBatch, Rows
from producer.pipeline.ring_reader import BATCH_ROWS
from tests.support.pipeline import UTC_OFFSET_NS, IdEncoder, ids


class Defective:
    """An encoder that fails on some events, and reports which ones if `masked`."""

    def __init__(self, bad: set[int], *, masked: bool) -> None:
        self._bad = bad
        self._masked = masked

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        bad = np.isin(batch.rows["s"]["cpu_seq"], list(self._bad))
        if bad.any():
            raise Unencodable("too much", bad) if self._masked else KeyError("defect")
        return IdEncoder().encode(batch, utc_offset_ns)


def rows_of(count: int) -> Rows:
    rows = np.zeros(count, TRANSMITS.dtype)
    rows["s"]["cpu_seq"] = np.arange(count)
    return rows


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("bad", [set(), {0}, {96}, {3, 4, 50}, set(range(97))])
def test_only_what_cannot_be_encoded_is_refused(bad: set[int], masked: bool) -> None:
    refused: list[int] = []
    isolator = Isolator(
        Defective(bad, masked=masked), lambda rows, reason: refused.extend(rows["s"]["cpu_seq"].tolist())
    )
    encoded = isolator.encode(Batch(TRANSMITS, rows_of(97)), UTC_OFFSET_NS)
    assert sorted(refused) == sorted(bad)
    assert ([] if encoded is None else ids(encoded)) == [each for each in range(97) if each not in bad]


class Overloaded:
    """An encoder that fails on many rows, and on none of them."""

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        if len(batch.rows) > 50:
            raise RuntimeError("too many at a time")
        return IdEncoder().encode(batch, utc_offset_ns)


def test_an_error_that_is_about_no_event_costs_none() -> None:
    refused: list[Rows] = []
    isolator = Isolator(Overloaded(), lambda rows, reason: refused.append(rows))
    with pytest.raises(RuntimeError):
        isolator.encode(Batch(TRANSMITS, rows_of(97)), UTC_OFFSET_NS)
    assert refused == []


class Counting(Defective):
    """Counts the batches."""

    calls = 0

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        self.calls += 1
        return super().encode(batch, utc_offset_ns)


@pytest.mark.parametrize("bad", [set(range(4096)), set(range(0, 4096, 2)), {5}, set(range(1000, 1100))])
def test_a_step_with_a_defect_is_bounded_and_all_good_events_are_encoded(bad: set[int]) -> None:
    refused: list[int] = []
    encoder = Counting(bad, masked=False)
    isolator = Isolator(encoder, lambda rows, reason: refused.extend(rows["s"]["cpu_seq"].tolist()))
    left, good = rows_of(4096), []
    for _ in range(200):
        if not len(left):
            break
        now = left[: isolator.fit(left)]
        encoder.calls = 0
        try:
            encoded = isolator.encode(Batch(TRANSMITS, now), UTC_OFFSET_NS)
        except KeyError:
            continue
        finally:
            assert encoder.calls <= 300
        good += [] if encoded is None else ids(encoded)
        left = left[len(now) :]
    assert sorted(refused) == sorted(bad)
    assert good == [each for each in range(4096) if each not in bad]
    encoder._bad.clear()
    for _ in range(6):
        isolator.encode(Batch(TRANSMITS, rows_of(1)), UTC_OFFSET_NS)
    assert isolator.fit(rows_of(5000)) == BATCH_ROWS, "again, now that the defect does not show"


class OutOfMemory:
    """An encoder with a defect on one row, for which memory runs out when the defect is searched for."""

    def __init__(self) -> None:
        self._calls = 0

    def encode(self, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        self._calls += 1
        if self._calls > 1:
            raise MemoryError
        raise KeyError("defect")


def test_no_event_is_lost_because_memory_runs_out_in_the_search() -> None:
    refused: list[Rows] = []
    isolator = Isolator(OutOfMemory(), lambda rows, reason: refused.append(rows))
    with pytest.raises(MemoryError):
        isolator.encode(Batch(TRANSMITS, rows_of(97)), UTC_OFFSET_NS)
    assert refused == []
