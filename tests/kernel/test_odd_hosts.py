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

from producer.host.cgroups import cgroup2_root, is_part
from tests.support.fake_systemd import Manager
from tests.support.mock_cluster import Cluster
from tests.support.rebpf import UNUSED_PORT, Run, command, wait_until
from tests.support.topics import TRANSMIT
from tests.support.traffic import Echo, exchange

pytestmark = pytest.mark.root


def test_without_free_descriptors_the_watchdog_is_notified_and_a_stop_delivers(tmp_path: Path) -> None:
    with Manager(tmp_path) as manager:
        notified = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
        with Run(tmp_path / "run", "--port", UNUSED_PORT, env=notified) as run:
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
    """It delivers to the test broker: without a warning, nobody would miss the events."""
    with Manager(tmp_path) as manager:
        for service in ({}, {"NOTIFY_SOCKET": manager.address}):
            name = "service" if service else "by_hand"
            with Run(
                tmp_path / name, "--port", UNUSED_PORT, env=service, config=f'metrics.listen = "127.0.0.1:0"\n{config}'
            ) as run:
                run.ready()
                reasons = run.get("status")["reasons"]
                assert any("kafka.brokers is not set" in each for each in reasons) == bool(service)
                run.finish()


def test_a_container_with_its_own_cgroups_is_degraded_since_the_hook_sees_no_others(tmp_path: Path) -> None:
    """Docker and Kubernetes give it a cgroup namespace. Without the host's mount, nothing of the host is captured."""
    root = cgroup2_root()
    if root is None or is_part(root):
        pytest.skip("the cgroup v2 hierarchy of the host is not mounted")
    container = root / f"rebpf-test-{os.getpid()}"
    container.mkdir()
    entered = f"echo $$ > {container}/cgroup.procs && exec unshare --cgroup --mount sh -c"
    mounted = f'umount {root} && mount -t cgroup2 none {root} && exec "$@"'
    inside = ["sh", "-c", f"{entered} '{mounted}' sh \"$@\"", "sh"]
    hooks = 'metrics.listen = "127.0.0.1:0"\ncapture.hooks = ["cgroup_skb", "raw_tp"]'
    reason = f"{root} has only the cgroups of this container"
    try:
        with Run(tmp_path, "--port", UNUSED_PORT, before=inside, config=hooks) as run:
            run.ready()
            wait_until("health names it", lambda: any(reason in each for each in run.get("status")["reasons"]))
            run.finish()
        checked = subprocess.run([*inside, *command("check", "--local", "--config", run.config)], capture_output=True)
        assert reason in checked.stdout.decode()
    finally:
        wait_until("it is removed", lambda: not container.exists() or remove(container))


def remove(cgroup: Path) -> bool:
    with suppress(OSError):  # the kernel has not yet released its last process
        cgroup.rmdir()
    return not cgroup.exists()


@pytest.mark.parametrize("config", ["", "host = 'web-17'"])
def test_a_host_that_gets_another_name_is_degraded(tmp_path: Path, config: str) -> None:
    """At the first boot of an image, DHCP may set the name after the start. Its events would have that of the image."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname image && exec "$@"', "sh"]
    with Run(tmp_path, "--port", UNUSED_PORT, before=named, config=f'metrics.listen = "127.0.0.1:0"\n{config}') as run:
        run.ready()
        assert run.get("status")["reasons"] == []
        subprocess.run(["nsenter", "--uts", "--target", str(run.pid), "hostname", "web-17"], check=True)
        reason = "host: the name of this host is now web-17, but events have image: restart"
        assert run.get("status")["reasons"] == ([] if config else [reason])
        run.finish()


def test_a_refused_reload_with_a_name_that_is_not_utf_8_ends_neither_heartbeats_nor_the_stop(tmp_path: Path) -> None:
    fragments = tmp_path / "run" / "conf.d"
    fragments.mkdir(parents=True)
    with Run(tmp_path / "run", "--port", UNUSED_PORT, config='metrics.listen = "127.0.0.1:0"') as run:
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


def test_a_frozen_disk_costs_no_event_and_blocks_only_writes_to_it(disk: Path) -> None:
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
