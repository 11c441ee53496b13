"""The spool on disk: outages, stops, full and read-only disks, damage; every event is accounted for.

Traffic is steady, and too much for a ring to hold during an outage. The oracles are the traffic generator's own counts
and the kernel's numbers in the topic, read by kcat.
"""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import assert_accounted, rss_anon_kb
from tests.support.load import PARTITIONS, SteadyScene, outage
from tests.support.rebpf import wait_until
from tests.support.servers.kafka import KafkaServer
from tests.support.tally import tally
from tests.support.traffic import Steady

pytestmark = [pytest.mark.root, pytest.mark.real_kafka]

SENDS = 6000  # a second; with the acknowledgements some 10,000 segments


@pytest.fixture(scope="module")
def mortal(servers_present: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """A broker that tests may kill; each leaves it running."""
    with KafkaServer(tmp_path_factory.mktemp("mortal"), num_partitions=PARTITIONS) as server:
        yield server


@pytest.fixture
def start(mortal: KafkaServer, tmp_path: Path) -> Iterator[Callable[[str], SteadyScene]]:
    """Starts a producer with additional configuration."""
    with ExitStack() as stack:
        yield lambda config: stack.enter_context(SteadyScene(tmp_path, mortal, config))


def test_an_outage_costs_nothing_keeps_the_order_and_takes_no_memory(mortal, start):
    scene = start("[capture]\nflow_interval_s = 1\n")
    with Steady(scene.port, SENDS) as traffic:
        scene.wait_for("delivered", 20_000)
        with outage(mortal):
            scene.wait_for("spooled", 20_000)
            early_kb = rss_anon_kb(scene.run.pid)
            scene.wait_for("spooled", 150_000)
            late_kb = rss_anon_kb(scene.run.pid)
            assert any("wait on disk" in reason for reason in scene.status()["reasons"])
        scene.wait_for_delivery()
        sent = traffic.stop()
    scene.wait_until_drained()
    balance = scene.finish()
    assert late_kb < early_kb * 1.1 + 4096
    counted = tally(mortal.bootstrap, scene.prefix)
    counted.assert_whole(sent)
    assert balance["lost"] == {}
    assert balance["passed"] == balance["delivered"] == counted.events
    assert list((scene.state / "spool" / "transmit").iterdir()) == []
    scene.assert_flows_whole()


def test_the_balance_holds_at_every_sample_while_brokers_come_and_go(mortal, start):
    scene = start("[spool]\nspill_after_s = 0.2\n")
    samples: list[dict[str, Any]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            samples.append(scene.account())

    with ThreadPoolExecutor(1) as pool, Steady(scene.port, SENDS) as traffic:
        sampling = pool.submit(sample)
        try:
            for _ in range(2):
                scene.wait_for("delivered", scene.account()["delivered"] + 10_000)
                with outage(mortal):
                    scene.wait_for("spooled", 10_000)
                scene.wait_for_delivery()
            traffic.stop()
        finally:
            done.set()
        sampling.result()
    scene.finish()
    assert len(samples) > 50
    for each in samples:
        assert_accounted(each)
        assert min(each[name] for name in ("in_ring", "in_flight", "spooled", "delivered")) >= 0
    for name in ("passed", "delivered"):
        assert [each[name] for each in samples] == sorted(each[name] for each in samples)
    assert max(each["spooled"] for each in samples) >= 10_000


def test_a_stop_during_an_outage_leaves_spooled_events_to_the_next_start(mortal, start):
    scene = start("[spool]\nspill_after_s = 0.5\n")
    with Steady(scene.port, SENDS) as traffic:
        scene.wait_for("delivered", 5000)
        with outage(mortal):
            scene.wait_for("spooled", 20_000)
            first_sent = traffic.stop()
            first = scene.finish()
    assert first["spooled"] > 20_000
    assert first["in_flight"] == first["in_ring"] == 0
    assert first["lost"] == {}
    scene.start()
    with Steady(scene.port, SENDS) as traffic:
        scene.wait_for("delivered", first["spooled"] + 5000)
        sent = traffic.stop()
    scene.wait_until_drained()
    second = scene.finish()
    counted = tally(mortal.bootstrap, scene.prefix)
    counted.assert_whole(first_sent | sent)
    assert second["carried"] >= first["spooled"]
    assert second["lost"] == {}
    assert second["delivered"] == second["passed"]


def test_kill_9_during_an_outage_leaves_spooled_events_to_the_next_start(mortal, start):
    scene = start("[spool]\nspill_after_s = 0.5\n")
    with outage(mortal), Steady(scene.port, SENDS) as traffic:
        scene.wait_for("spooled", 20_000)
        traffic.stop()
        wait_until("the ring is empty", lambda: scene.account()["in_ring"] == 0)
        before = scene.account()
        scene.run.kill()
    scene.start()
    scene.wait_until_drained()
    balance = scene.finish()
    counted = tally(mortal.bootstrap, scene.prefix)
    assert counted.missing == 0
    assert counted.events == before["passed"]
    assert balance["carried"] == balance["delivered"] == before["passed"]


def gaps_are_what_is_lost(scene: SteadyScene, mortal: KafkaServer, reason: str) -> None:
    scene.end_on_each_cpu()
    balance = scene.finish()
    counted = tally(mortal.bootstrap, scene.prefix)
    assert set(balance["lost"]) == {reason}
    assert counted.missing == sum(balance["lost"].values()) > 0
    assert counted.events == balance["delivered"]
    assert counted.inversions == 0


def test_with_a_ring_too_small_what_is_lost_is_what_consumers_see_as_gaps(mortal, start):
    none = "[spool]\ntransmit_bytes = 0\n[capture]\ntransmit_ring_bytes = 65536\n"
    scene = start(none)
    with Steady(scene.port, SENDS) as traffic:
        scene.wait_for("delivered", 5000)
        with outage(mortal):
            wait_until("the ring is full", lambda: scene.account()["lost"].get("ring_full", 0) > 5000)
        scene.wait_for("delivered", scene.account()["delivered"] + 5000)
        traffic.stop()
    gaps_are_what_is_lost(scene, mortal, "ring_full")


def test_with_drop_oldest_a_full_spool_discards_the_oldest_events_and_counts_them(mortal, start):
    scene = start('[spool]\nwhen_full = "drop_oldest"\ntransmit_bytes = 2097152\nspill_after_s = 0.5\n')
    with Steady(scene.port, SENDS) as traffic:
        scene.wait_for("delivered", 5000)
        with outage(mortal):
            wait_until("some are given up", lambda: scene.account()["lost"].get("spool_dropped", 0) > 5000)
            assert scene.account()["spool_bytes"] <= 2097152
        scene.wait_for_delivery()
        traffic.stop()
    gaps_are_what_is_lost(scene, mortal, "spool_dropped")


def test_with_reject_a_full_spool_leaves_new_events_in_the_ring(mortal, start):
    small = "[spool]\ntransmit_bytes = 1048576\nspill_after_s = 0.5\n[capture]\ntransmit_ring_bytes = 524288\n"
    scene = start(small)
    with Steady(scene.port, SENDS) as traffic:
        with outage(mortal):
            wait_until("the ring is full", lambda: scene.account()["lost"].get("ring_full", 0) > 5000)
            assert any("the spool is full" in reason for reason in scene.status()["reasons"])
        scene.wait_for_delivery()
        traffic.stop()
    gaps_are_what_is_lost(scene, mortal, "ring_full")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


SMALL_RING = "[spool]\nspill_after_s = 0.5\n[capture]\ntransmit_ring_bytes = 524288\n"


def on(disk: Path, folder: Path) -> None:
    """Put the state folder of the run in `folder` on this disk."""
    (disk / "state").mkdir(mode=0o700)
    (folder / "state").symlink_to(disk / "state")


def test_disk_full_during_an_outage_is_counted_and_recovers_by_itself(mortal, small_disk, start, tmp_path):
    on(small_disk, tmp_path)
    # Overflows after some seconds of an outage, but not when the producer briefly gets no CPU.
    scene = start("[spool]\nspill_after_s = 0.5\n[capture]\ntransmit_ring_bytes = 8388608\n")
    with Steady(scene.port, SENDS) as traffic:
        scene.wait_for("delivered", 5000)
        with outage(mortal):
            ballast = small_disk / "ballast"
            ballast.write_bytes(bytes(1 << 20))
            wait_until("the ring is full", lambda: scene.account()["lost"].get("ring_full", 0) > 5000)
            assert any("No space left" in reason for reason in scene.status()["reasons"])
            spooled = scene.account()["spooled"]
            ballast.unlink()
            scene.wait_for("spooled", spooled + 5000)  # by itself, while Kafka is still down
        scene.wait_for_delivery()
        wait_until("the ring has room", lambda: scene.account()["in_ring"] < 10_000)

        def loses_nothing() -> bool:
            before = scene.account()
            scene.wait_for("delivered", before["delivered"] + 5000)
            return scene.account()["lost"] == before["lost"]

        wait_until("nothing is lost any more", loses_nothing)
        traffic.stop()
    gaps_are_what_is_lost(scene, mortal, "ring_full")


@pytest.fixture
def breakable_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system that an error makes read-only, even with files open for writing."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(bytes(1 << 25))
    folder.mkdir()
    subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
    done = subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NO DISK TO BREAK: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def break_disk(folder: Path) -> None:
    """Make the kernel find an error in the file system."""
    device = os.stat(folder).st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test")


def test_disk_read_only_during_an_outage_is_counted_and_kafka_gets_the_rest(mortal, breakable_disk, start, tmp_path):
    on(breakable_disk, tmp_path)
    scene = start(SMALL_RING)
    with Steady(scene.port, SENDS) as traffic:
        scene.wait_for("delivered", 5000)
        with outage(mortal):
            scene.wait_for("spooled", 2000)
            break_disk(breakable_disk)
            wait_until("the ring is full", lambda: scene.account()["lost"].get("ring_full", 0) > 5000)
            assert any("Read-only file system" in reason for reason in scene.status()["reasons"])
        delivered = scene.account()["delivered"]
        scene.wait_for("delivered", delivered + 20_000)  # spooled and new events
        traffic.stop()
    gaps_are_what_is_lost(scene, mortal, "ring_full")


def test_a_damaged_spool_file_is_skipped_counted_and_set_aside(mortal, start):
    scene = start("[spool]\nspill_after_s = 0.5\n")
    with outage(mortal), Steady(scene.port, SENDS) as traffic:
        scene.wait_for("spooled", 60_000)
        traffic.stop()
        first = scene.finish()
        files = sorted((scene.state / "spool" / "transmit").glob("*.avro"))
        damage(files[0])
    scene.start()
    scene.wait_until_drained()
    second = scene.finish()
    counted = tally(mortal.bootstrap, scene.prefix)
    assert set(second["lost"]) == {"spool_damaged"}
    assert counted.missing == second["lost"]["spool_damaged"] > 0
    assert counted.events == second["delivered"] == first["spooled"] - counted.missing
    assert [path.suffix for path in (scene.state / "spool" / "transmit").iterdir()] == [".damaged"]


def damage(path: Path) -> None:
    """Overwrite some bytes in the middle of a file."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(100))
