"""A stop moves what is left to disk, and what cannot be moved is counted."""

from pathlib import Path as Folder

import pytest

from producer.events import TRANSMITS, Batch, EncodedBatch, Rows
from producer.pipeline.ledger import Account
from tests.support.memory_ring import STRIDE
from tests.support.pipeline import IdEncoder, Setup


@pytest.mark.parametrize("full", [False, True])
def test_at_a_stop_all_is_spilled_if_the_disk_takes_it(tmp_path: Folder, full: bool) -> None:
    setup = Setup(tmp_path, most=5)
    setup.disk.full = full
    setup.arrive(5)
    setup.ring.written = 12
    setup.pipeline.spill_all()
    assert bool(setup.transmits.spool_error) == full
    setup.sink.report(TRANSMITS, 0, 2)
    setup.pipeline.poll_reports()
    unread = setup.ring.written - setup.ring.records_before
    spooled, in_ring = setup.transmits.end(setup.sink, unread, ring_stays=True)

    assert (spooled, in_ring) == ((0, 10) if full else (10, 0))
    assert setup.ring.committed == (0 if full else 12 * STRIDE)
    assert not setup.transmits.account.lost


def test_without_a_spool_and_a_ring_that_stays_what_is_left_at_a_stop_is_lost() -> None:
    setup = Setup(most=5)
    setup.arrive(12)
    setup.pipeline.spill_all()
    setup.sink.report(TRANSMITS, 0, 2)
    setup.pipeline.poll_reports()

    assert setup.transmits.end(setup.sink, 7, ring_stays=False) == (0, 0)
    assert setup.transmits.account.lost == {"stopped": 3 + 7}
    assert setup.log[-1] == ("ledger", Account("ring", 0, 0, {"stopped": 10}))


@pytest.mark.parametrize("fixed", [True, False])
def test_a_defect_at_a_stop_costs_no_other_events(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Folder, fixed: bool
) -> None:
    """After a failure, the encoder takes fewer rows; if it fails for good, the other streams are spilled."""
    setup, encode = Setup(tmp_path), IdEncoder.encode
    for name in ("transmit", "retransmit"):
        setup.rings[name].written = 5
    failures = []

    def failing(self: IdEncoder, batch: Batch, utc_offset_ns: int) -> EncodedBatch:
        if batch.stream == TRANSMITS and not (fixed and failures):
            failures.append(len(batch.rows))
            raise TypeError("a defect")
        return encode(self, batch, utc_offset_ns)

    monkeypatch.setattr(IdEncoder, "encode", failing)
    setup.pipeline.spill_all()
    assert {name: spool.end for name, spool in setup.spools.items()} == {
        "transmit": 5 * fixed,
        "retransmit": 5,
        "flow": 0,
    }
    if not fixed:
        assert setup.transmits.end(setup.sink, 5, ring_stays=False) == (0, 0)
        assert setup.transmits.account.lost == {"stopped": 5}


def test_a_stop_does_not_wait_for_a_ring_that_is_filled_faster_than_it_is_emptied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Folder
) -> None:
    setup = Setup(tmp_path)

    def fit(_: IdEncoder, rows: Rows) -> int:
        setup.now_s += 1
        setup.ring.arrive(5)
        return 2

    monkeypatch.setattr(IdEncoder, "fit", fit)
    setup.ring.arrive(5)
    setup.pipeline.spill_all(setup.now_s + 10)
    assert setup.now_s == 110
    assert setup.spools["transmit"].end == 20
    setup.assert_balanced()
