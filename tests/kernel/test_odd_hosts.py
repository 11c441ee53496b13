"""A running producer and what its host lacks or holds: it goes on, and a stop delivers what it has captured."""

import json
import os
import resource
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.fake_systemd import Manager
from tests.support.mock_cluster import Cluster
from tests.support.rebpf import Run, wait_until
from tests.support.topics import TRANSMIT
from tests.support.traffic import Echo, exchange

pytestmark = pytest.mark.root


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
        wait_until("the reason", lambda: "conf.d/\\udcff.toml" in "".join(run.get("status")["reasons"]))
        run.finish()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A state folder on a file system of its own."""
    image, folder = tmp_path / "image", tmp_path / "run" / "state"
    folder.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(1 << 26)
    if subprocess.run(["mkfs.ext4", "-q", image], capture_output=True).returncode:
        pytest.skip("NO EXT4: mkfs.ext4 failed")
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True).returncode:
        pytest.skip("NO LOOP DEVICE: the image cannot be mounted")
    folder.chmod(0o700)
    try:
        yield folder
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", folder], capture_output=True)
        subprocess.run(["umount", folder], check=True)


def delivered_by(run: Run) -> int:
    return int(next(each["delivered"] for each in run.get("status")["streams"] if each["topic"] == TRANSMIT))


def test_a_frozen_disk_costs_no_event_and_holds_only_what_is_written_to_it(disk: Path) -> None:
    """As the snapshot of a backup freezes it, here for longer, and during an outage of Kafka."""
    cluster = Cluster()
    for name in (TRANSMIT, "tcp_retransmit", "tcp_flow", "rebpf_agent"):
        cluster.create(name)
    with (
        Echo() as echo,
        Run(
            disk.parent, "--brokers", cluster.brokers, "--port", echo.port, config='metrics.listen = "127.0.0.1:0"'
        ) as run,
    ):
        run.ready()
        health = json.loads((disk / "agent.json").read_text())["status_url"] + "/healthz"
        subprocess.run(["fsfreeze", "--freeze", disk], check=True)
        exchange(echo.port, 11)
        wait_until("Kafka gets the events as always", lambda: delivered_by(run) >= 11)
        cluster.down()
        exchange(echo.port, 11)

        def says_so() -> bool:
            with suppress(TimeoutError):
                try:
                    urllib.request.urlopen(health, timeout=5).close()
                except urllib.error.HTTPError as error:
                    return "the loop has made no step" in error.read().decode()
            return False

        wait_until("health says so", says_so)
        run.send(signal.SIGTERM)
        cluster.up()
        subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)
        balance = run.finish(None)[TRANSMIT]
    assert balance["passed"] == balance["delivered"] + balance["spooled"]
    assert not balance["lost"]
