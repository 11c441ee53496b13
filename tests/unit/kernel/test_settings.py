"""How often the kernel wakes the process."""

import os

import pytest

from producer.events import STREAMS, TRANSMITS, Stream
from producer.kernel.settings import CaptureSettings


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
@pytest.mark.parametrize("cpus", [1, 2, 3])
def test_the_cpus_together_fill_at_most_a_quarter_of_the_ring_between_wake_ups(
    stream: Stream, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    settings = CaptureSettings()
    mask = settings.wakeup_mask(stream)
    records = settings.ring_bytes[stream.ring] / stream.dtype.itemsize
    assert mask & (mask + 1) == 0
    assert records / 8 < cpus * (mask + 1) <= records / 4


@pytest.mark.parametrize(("cpus", "ring_bytes"), [(512, 1 << 24), (1, 1 << 12)])
def test_no_cpu_wakes_the_process_more_often_than_every_256_events(
    cpus: int, ring_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    assert CaptureSettings(ring_bytes={TRANSMITS.ring: ring_bytes}).wakeup_mask(TRANSMITS) == 255
