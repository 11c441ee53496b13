"""A producer with pinned hooks (--pin) is killed repeatedly under traffic, and so is the broker."""

import contextlib
import os
import random
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from producer.demo.lab import Lab
from tests.support import topics
from tests.support.capture import inside
from tests.support.load import SteadyScene, outage, wait_until_drained
from tests.support.rebpf import DEADLINE_S, Run, rebpf
from tests.support.servers.kafka import KafkaServer
from tests.support.tally import tally
from tests.support.topics import FLOW, RETRANSMIT, TRANSMIT
from tests.support.traffic import Echo, Steady, exchange
from tests.support.wire import captured

pytestmark = [pytest.mark.root, pytest.mark.real_kafka]

PARTITIONS = 5
ECHO_PORT, CLOSED_PORT = 5002, 5003
"""Of the lab's server; nobody listens on the second one."""
THREADS = 16
SENDS = 11_000  # a second; with the acknowledgements some 20,000 segments


@pytest.fixture(scope="module")
def server(servers_present, tmp_path_factory) -> Iterator[KafkaServer]:
    with KafkaServer(tmp_path_factory.mktemp("crash"), num_partitions=PARTITIONS) as server:
        yield server


@pytest.fixture
def broker(server: KafkaServer) -> Iterator[KafkaServer]:
    """A broker that a test may kill; it runs again for the next one, even if the test fails."""
    yield server
    if not server.is_running:
        server.start()


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "bpffs"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a bpffs needs root")
    subprocess.run(["mount", "-t", "bpf", "bpf", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def start(tmp_path: Path, broker: KafkaServer, bpffs: Path, port: int, config: str) -> Run:
    return Run(tmp_path, "--brokers", broker.bootstrap, "--port", port, "--pin", bpffs / "pins", config=config)


def prepare(broker: KafkaServer, prefix: str, folder: Path) -> str:
    config = f'[kafka]\ntopic_prefix = "{prefix}"\n'
    (folder / "init.toml").write_text(config)
    done = rebpf("init", "--brokers", broker.bootstrap, "--partitions", PARTITIONS, "--config", folder / "init.toml")
    assert done.returncode == 0, done.stderr
    return config


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.extended)])
def test_kill_9_at_random_moments_with_a_dying_broker_costs_no_segment(broker, bpffs, tmp_path, kills):
    # Holds a minute or more without a producer, which may be killed before it does anything.
    capture = f"[capture]\ntransmit_ring_bytes = {1 << 28}\nflow_interval_s = 1\n"
    config = f"{capture}[spool]\nspill_after_s = 0.2\n"
    chance = random.Random(7)
    with SteadyScene(tmp_path, broker, config, pin=bpffs / "pins") as scene:
        with Steady(scene.port, SENDS) as traffic:
            for number in range(kills):
                time.sleep(chance.uniform(0.05, 1.5))
                if number % 4 == 1:
                    broker.kill()
                scene.run.kill()
                if number % 4 == 3:
                    broker.start()
                assert "taken_over=true" in scene.start().log
            sent = traffic.stop()
        scene.wait_until_drained(120)
        balance = scene.finish()
        assert balance["lost"] == {}
        counted = tally(broker.bootstrap, scene.prefix)
        counted.assert_whole(sent)
        assert balance["passed"] == balance["delivered"] == counted.events
        scene.assert_flows_whole()


def test_events_between_two_producers_are_delivered_by_the_second(broker, bpffs, tmp_path):
    config = prepare(broker, "between.", tmp_path)
    with Echo() as echo, captured(echo.port) as segments:
        run = start(tmp_path, broker, bpffs, echo.port, config)
        run.ready()
        run.kill()
        exchange(echo.port, 53)
        run = start(tmp_path, broker, bpffs, echo.port, config)
        run.ready()
        balance = run.finish()
    events = topics.read(broker.bootstrap, TRANSMIT, "between.")
    assert Counter(map(topics.segment, events)) == segments
    assert balance["between.tcp_transmit"]["delivered"] == len(events)
    assert topics.read(broker.bootstrap, RETRANSMIT, "between.") == []


def test_a_stop_keeps_nothing_and_a_second_producer_is_refused(broker, bpffs, tmp_path):
    config = prepare(broker, "stop.", tmp_path)
    run = start(tmp_path, broker, bpffs, 1, config)
    run.ready()
    assert (bpffs / "pins" / "manifest").is_symlink()
    other = rebpf("run", "--state-dir", tmp_path / "other", "--pin", bpffs / "pins", "--duration", 1)
    assert other.returncode == 75
    assert "has pinned its hooks" in other.stderr
    run.finish()
    assert list((bpffs / "pins").iterdir()) == []


def test_hooks_that_are_not_the_same_are_replaced_and_what_they_took_is_delivered(broker, bpffs, tmp_path):
    config = prepare(broker, "other.", tmp_path)
    with Echo() as echo, captured(echo.port) as segments:
        run = start(tmp_path, broker, bpffs, echo.port, config)
        run.ready()
        run.kill()
        exchange(echo.port, 53)
        run = start(tmp_path, broker, bpffs, echo.port, config + "[capture]\ntransmit_ring_bytes = 1048576\n")
        run.ready()
        assert "hooks of the last run do not match the configuration or version" in run.log
        exchange(echo.port, 3)
        balance = run.finish()["other.tcp_transmit"]
    events = topics.read(broker.bootstrap, TRANSMIT, "other.")
    topics.assert_one_each(events)
    assert Counter(map(topics.segment, events)) == segments
    assert balance["delivered"] == balance["passed"] == len(events)
    assert balance["carried"] > 53 * 16


def test_a_folder_that_is_in_no_bpffs_is_refused(tmp_path):
    done = rebpf("run", "--state-dir", tmp_path / "state", "--pin", tmp_path / "pins", "--duration", 1)
    assert done.returncode == 78
    assert "not in a bpffs" in done.stderr


@pytest.fixture
def lossy() -> Iterator[Lab]:
    with Lab(loss=0.02) as lab:
        yield lab


def connect_and_close(lab: Lab, port: int) -> None:
    """Exchange a few bytes with the server; a refused connect is none to this."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((lab.server.ipv4, port)) as client:
        client.sendall(bytes(211))
        assert len(client.recv(211, socket.MSG_WAITALL)) == 211


def short_and_failed_connections(lab: Lab) -> None:
    """Make 1,009 short connections to the lab's echo server and 100 to a port where nobody listens."""
    ports = [ECHO_PORT] * 1009 + [CLOSED_PORT] * 100
    random.Random(11).shuffle(ports)

    def some(number: int) -> None:
        with inside(lab.client):
            for port in ports[number::THREADS]:
                connect_and_close(lab, port)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(some, range(THREADS)))


def test_records_of_connections_equal_the_kernels_counters_after_kills_and_an_outage(broker, bpffs, tmp_path, lossy):
    capture = "[capture]\ntransmit = false\nflow_interval_s = 1\n[metrics]\nlisten = '127.0.0.1:0'\n"
    config = prepare(broker, "flows.", tmp_path) + capture
    filters = [word for address in lossy.addresses for word in ("--address", address)]

    def start_again() -> Run:
        run = Run(tmp_path, "--brokers", broker.bootstrap, *filters, "--pin", bpffs / "pins", config=config)
        run.ready()
        return run

    run = start_again()
    with ThreadPoolExecutor(2) as pool:
        traffic = pool.submit(lossy.traffic, 6)
        short = pool.submit(short_and_failed_connections, lossy)
        run.kill()
        with outage(broker):
            run = start_again()
            assert "taken_over=true" in run.log
            run.kill()
        run = start_again()
        traffic.result()
        short.result()
    assert lossy.wait_idle(DEADLINE_S)
    wait_until_drained(run)
    balance = run.finish()
    # Some hosts run no tracepoint's program in softirqs that interrupt process 1: docs/truth.md.
    assert {reason for each in balance.values() for reason in each["lost"]} <= {"unseen"}

    records = topics.distinct(topics.read(broker.bootstrap, FLOW, "flows."))
    assert len(records) == balance["flows.tcp_flow"]["passed"]
    for host in lossy.hosts:
        of_host = [record for record in records if record["netns"] == host.netns]
        last = {record["sk_cookie"]: record for record in sorted(of_host, key=lambda each: each["reason"] == "close")}
        closing = [record["sk_cookie"] for record in of_host if record["reason"] == "close"]
        assert len(set(closing)) == len(closing), "no connection has two closing records"
        counters = host.counters()
        # A close for which no program ran lacks its record.
        missed = counters["ActiveOpens"] + counters["PassiveOpens"] - len(closing)
        assert missed in range(6)
        opened = Counter(record["role"] for record in last.values())
        assert opened <= +Counter(client=counters["ActiveOpens"], server=counters["PassiveOpens"])
        retransmitted = sum(record["total_retrans"] for record in last.values())
        assert counters["RetransSegs"] - retransmitted in range(100 * missed + 1)
        by_cause = [name for name in records[0] if name.startswith("retrans_")]
        assert sum(record[name] for record in last.values() for name in by_cause) == retransmitted > 0
        refused = [record["dport"] for record in last.values() if record["error"] == "ECONNREFUSED"]
        expected = 100 if host == lossy.client else 0
        assert set(refused) <= {CLOSED_PORT}
        assert expected - len(refused) in range(missed + 1)
