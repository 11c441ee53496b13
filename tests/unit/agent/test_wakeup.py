"""The loop's sleep: what ends it, and what does not."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.agent.wakeup import Wakeup

NEVER_S = 60.0


@pytest.fixture
def pipes() -> Iterator[dict[str, tuple[int, int]]]:
    """Pipes in the place of a ring and of signals: reader and writer."""
    made = {name: os.pipe() for name in ("ring", "signals")}
    yield made
    for ends in made.values():
        for end in ends:
            os.close(end)


@pytest.fixture
def wakeup(pipes: dict[str, tuple[int, int]]) -> Iterator[Wakeup]:
    with Wakeup({"retransmit": pipes["ring"][0]}, pipes["signals"][0]) as made:
        yield made


def test_a_ring_ends_the_wait_once_for_each_wake_up_though_it_stays_readable(
    wakeup: Wakeup, pipes: dict[str, tuple[int, int]]
) -> None:
    for _ in range(2):
        os.write(pipes["ring"][1], b"x")
        assert wakeup.wait(NEVER_S) == {"retransmit"}
        assert wakeup.wait(0) == set()


def test_a_signal_ends_every_wait_until_it_is_noticed(wakeup: Wakeup, pipes: dict[str, tuple[int, int]]) -> None:
    os.write(pipes["signals"][1], b"x")
    for _ in range(2):
        assert wakeup.wait(NEVER_S) == set()
    os.read(pipes["signals"][0], 1)
    os.write(pipes["ring"][1], b"x")
    assert wakeup.wait(NEVER_S) == {"retransmit"}


def test_another_thread_ends_one_wait(wakeup: Wakeup) -> None:
    caller = threading.Thread(target=wakeup.call)
    caller.start()
    assert wakeup.wait(NEVER_S) == set()
    caller.join()
    assert wakeup.called
    wakeup.wait(0)
    assert not wakeup.called


def test_a_call_after_the_end_writes_to_no_other_file(pipes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    """A visitor of the endpoint may still call; the next file gets the lowest descriptor that is free."""
    with Wakeup({}, pipes["signals"][0]) as wakeup:
        pass
    with open(tmp_path / "file", "wb", buffering=0):
        wakeup.call()
    assert (tmp_path / "file").read_bytes() == b""
