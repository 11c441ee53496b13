"""A service is killed, and its next process continues with the hooks in the service manager's store."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.events import TRANSMITS
from producer.kernel.capture import Capture
from producer.kernel.fdstore import FdStore
from tests.support import fdstore_service
from tests.support.capture import hook_settings, wait_for
from tests.support.fake_systemd import Manager
from tests.support.procfs import bpf_ids
from tests.support.programs import program_ids
from tests.support.rules import filtered
from tests.support.traffic import Echo, exchange
from tests.support.wire import Segment, captured, late_acks

pytestmark = pytest.mark.root


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(tmp_path) as manager:
        yield manager


class Service:
    """A ready process of the service."""

    def __init__(self, manager: Manager, file: Path, port: int, *arguments: str) -> None:
        self._manager, self._file = manager, file
        self._before = manager.messages.count("READY=1")
        command = [sys.executable, "-m", "tests.support.fdstore_service", str(file), str(port), *arguments]
        # It ends with the tests, however they end.
        self._process = manager.start(["setpriv", "--pdeathsig", "KILL", *command])

    def wait_events(self, count: int) -> "Counter[fdstore_service.Event]":
        """Wait for at least `count` events that all hooks see, and return all events."""

        def look() -> "Counter[fdstore_service.Event] | None":
            events = Counter(fdstore_service.read(self._file))
            return events if segments(events).total() >= count else None

        return wait_for(look, f"{count} events")

    @property
    def programs(self) -> set[int]:
        return bpf_ids(self._process.pid, "prog")

    def terminate(self) -> None:
        self._process.terminate()
        assert self._process.wait(60) == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "Service":
        wait_for(self._is_ready, "the service to be ready")
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, "the service has ended"
        return self._manager.messages.count("READY=1") > self._before


@pytest.mark.parametrize("hold", [(), ("hold",)], ids=["acknowledged", "not acknowledged"])
def test_the_next_process_reads_on_at_the_acknowledged_position(
    manager: Manager, tmp_path: Path, hold: tuple[str, ...]
) -> None:
    with Echo() as echo:
        with Service(manager, tmp_path / "first", echo.port, *hold) as first:
            with captured(echo.port) as before:
                exchange(echo.port, 7)
            before -= late_acks(before)
            old = first.wait_events(before.total())
            programs = first.programs
            first.kill()
        with captured(echo.port) as between:
            exchange(echo.port, 53)
        assert programs <= program_ids()
        with Service(manager, tmp_path / "second", echo.port) as second:
            assert second.programs == programs
            with captured(echo.port) as after:
                exchange(echo.port, 11)
            unread = before + between if hold else between
            unread, after = unread - late_acks(unread), after - late_acks(after)
            new = second.wait_events((unread + after).total())
    assert segments(old) == before
    assert segments(new) == unread + after
    numbers: dict[int, set[int]] = {}
    for event in old | new:
        numbers.setdefault(event.cpu, set()).add(event.cpu_seq)
    assert all(len(seen) == max(seen) - min(seen) + 1 for seen in numbers.values()), "no gap in the kernel's numbers"


def test_a_restart_is_no_end_and_a_stop_is_one(manager: Manager, tmp_path: Path) -> None:
    with Service(manager, tmp_path / "first", 1) as first:
        programs = first.programs
        first.terminate()
    assert programs <= program_ids()
    with Service(manager, tmp_path / "second", 1) as second:
        assert second.programs == programs
        second.terminate()
    manager.forget()
    wait_for(lambda: not programs & program_ids(), "the programs' end")


def test_leftovers_of_an_interrupted_start_are_discarded(manager: Manager, tmp_path: Path) -> None:
    with Service(manager, tmp_path / "first", 1) as first:
        remains = first.programs
        first.kill()
    manager.forget("manifest_1")
    with Service(manager, tmp_path / "second", 1) as second:
        assert not second.programs & remains
        wait_for(lambda: not remains & program_ids(), "the old programs' end")


def test_detach_clears_the_store(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in manager.environment.items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:
        echo, store = stack.enter_context(Echo()), stack.enter_context(FdStore())
        capture = stack.enter_context(Capture(hook_settings(rules=filtered(ports=(echo.port,))), store))
        others = bpf_ids(os.getpid(), "prog")
        capture.load()
        capture.attach()
        programs = bpf_ids(os.getpid(), "prog") - others
        for prefix in ("manifest_", "transmit_pipe", "retransmit_pipe", "counters", "link_0"):
            assert any(name.startswith(prefix) for name in manager.stored)
        assert len(manager.stored) <= 64, "the unit's store must hold two of these"
        exchange(echo.port, 1)
        capture.detach()
        assert manager.stored == {}
        passed = capture.counters(TRANSMITS).passed
        assert passed > 0
        exchange(echo.port, 1)
        assert capture.counters(TRANSMITS).passed == passed
    wait_for(lambda: not programs & program_ids(), "the programs' end")


def segments(events: "Counter[fdstore_service.Event]") -> "Counter[Segment]":
    """Return the events' segments, except those that only some hooks see."""
    found = Counter(event.segment for event in events.elements())
    return found - late_acks(found)
