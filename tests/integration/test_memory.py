"""What a running producer keeps of the memory that it needed while Kafka was down."""

import platform
from pathlib import Path

import pytest

from tests.support.load import wait_until_drained
from tests.support.mock_cluster import Cluster
from tests.support.procfs import anonymous_bytes, arenas
from tests.support.rebpf import Run, wait_until
from tests.support.topics import FLOW, RETRANSMIT, TRANSMIT
from tests.support.traffic import Echo, exchange

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries manage memory otherwise"),
]


def waiting(run: Run) -> int:
    return sum(stream["in_flight"] + stream["spooled"] for stream in run.get("status")["streams"])


def test_memory_of_an_outage_is_returned(tmp_path: Path) -> None:
    cluster = Cluster()
    for topic in (TRANSMIT, RETRANSMIT, FLOW, "rebpf_agent"):
        cluster.create(topic)
    config = "[spool]\ntransmit_bytes = 0\n[metrics]\nlisten = '127.0.0.1:0'\n"
    try:
        with Echo() as echo, Run(tmp_path, "--brokers", cluster.brokers, "--port", echo.port, config=config) as run:
            run.ready()
            exchange(echo.port, 1, 2000)
            wait_until_drained(run)
            before = anonymous_bytes(run.pid)
            cluster.down()
            exchange(echo.port, 4, 5000)
            wait_until("many messages are in flight", lambda: waiting(run) >= 20_000)
            assert anonymous_bytes(run.pid) > before + 6_000_000
            cluster.up()
            wait_until_drained(run)
            assert arenas(run.pid) <= 2
            wait_until("memory is returned", lambda: anonymous_bytes(run.pid) < before + 4_000_000, deadline_s=30)
    finally:
        cluster.close()
