"""A running producer and what its host lacks or holds: it goes on, and a stop delivers what it has captured."""

import os
import resource
import signal
from pathlib import Path

import pytest

from tests.support.fake_systemd import Manager
from tests.support.rebpf import Run, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


def test_without_free_descriptors_the_watchdog_is_notified_and_a_stop_delivers(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        notified = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
        with Run(tmp_path / "run", "--port", 1, env=notified) as run:
            run.ready()
            wait_until("the first status", lambda: any("STATUS=" in each for each in manager.messages))
            _, hard = resource.prlimit(run.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (3, hard))
            before = manager.messages.count("WATCHDOG=1")
            wait_until("more notifications", lambda: manager.messages.count("WATCHDOG=1") > before + 3)
            run.finish()
            assert "STOPPING=1" in manager.messages


@pytest.mark.parametrize("config", ["", "# brokers = 'kafka-1:9092'", "\n[kafka]\n"])
def test_a_service_whose_file_has_lost_its_brokers_is_degraded(tmp_path: Path, config: str) -> None:
    """It delivers to the test broker: without a word, nobody would miss the events."""
    with Manager(tmp_path) as manager:
        for service in ({}, {"NOTIFY_SOCKET": manager.address}):
            name = "service" if service else "by_hand"
            with Run(
                tmp_path / name, "--port", 1, env=service, config=f'metrics.listen = "127.0.0.1:0"\n{config}'
            ) as run:
                run.ready()
                reasons = run.get("status")["reasons"]
                assert any("kafka.brokers is not set" in each for each in reasons) == bool(service)
                run.finish()


def test_a_refused_reload_with_a_name_that_is_not_utf_8_ends_neither_heartbeats_nor_the_stop(tmp_path: Path) -> None:
    fragments = tmp_path / "run" / "conf.d"
    fragments.mkdir(parents=True)
    with Run(tmp_path / "run", "--port", 1, config='metrics.listen = "127.0.0.1:0"') as run:
        run.ready()
        os.symlink("nowhere", os.fsencode(fragments) + b"/\xff.toml")
        run.send(signal.SIGHUP)
        run.wait_for("reload refused")
        assert "conf.d/\\udcff.toml" in run.get("status")["reasons"][0]
        run.finish()
