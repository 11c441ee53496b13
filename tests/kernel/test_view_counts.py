"""`rebpf top` and `rebpf trace` count as many retransmissions as the kernel does meanwhile, as nstat shows it."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fastavro
import pytest

from producer.demo.lab import Lab
from tests.support.capture import DEADLINE_S, inside, rules
from tests.support.comparison import COUNTED_CAUSES, MAX_SEGS
from tests.support.rebpf import command

pytestmark = pytest.mark.root

_CLOSED_PORT = 9
_LOSS = "meta l4proto tcp numgen random mod 100 < 5 drop"


@contextlib.contextmanager
def busy(lab: Lab) -> Iterator[None]:
    """Let the client send and lose segments all the time."""
    stop = threading.Event()
    thread = threading.Thread(target=lab.traffic, args=(DEADLINE_S, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_table_has_as_many_retransmissions_as_the_kernel_has_counted() -> None:
    with Lab(loss=0.05) as lab, busy(lab):
        once = lab.client.command(*command("top", "--once", "--json", "--window", 3))
        done = subprocess.run(once, capture_output=True, timeout=DEADLINE_S, check=True)
    found = json.loads(done.stdout)
    assert found["seen_retrans_segs"] > 0
    missing = found["kernel_retrans_segs"] - found["seen_retrans_segs"]
    assert 0 <= missing <= MAX_SEGS * found["lost"]


def refuse(lab: Lab, stop: threading.Event) -> None:
    """Connect to a closed port until the trace shows it."""
    with inside(lab.client):
        while not stop.wait(0.1):
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection((lab.server.ipv4, _CLOSED_PORT)).close()


def test_a_trace_has_as_many_retransmissions_as_the_kernel_has_counted(tmp_path: Path) -> None:
    file, attached = tmp_path / "file", threading.Event()
    with Lab(loss=0) as lab:
        run = command("trace", "-w", file, "netns", lab.client.netns)
        with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as trace:
            knocking = threading.Thread(target=refuse, args=(lab, attached))
            knocking.start()
            assert trace.stdout is not None
            assert trace.stdout.readline().startswith("TIME")
            assert "ECONNREFUSED" in trace.stdout.readline()
            attached.set()
            knocking.join()
            unread = threading.Thread(target=trace.stdout.read)
            unread.start()
            before, start_ns = lab.client.counters(), time.time_ns()
            with rules(lab.server, "prerouting", _LOSS), rules(lab.client, "prerouting", _LOSS):
                lab.traffic(4)
                assert lab.wait_idle(DEADLINE_S)
            after = lab.client.counters()
            trace.send_signal(signal.SIGINT)
            unread.join()
            assert trace.stderr is not None
            told = trace.stderr.read()
            assert trace.wait(DEADLINE_S) == 0
    assert re.fullmatch(r"(.*events are missing lost=\d+\n)?", told)
    missing = MAX_SEGS * int(told.rpartition("=")[2] or 0)
    causes: Counter[str] = Counter()
    with file.open("rb") as opened:
        for record in fastavro.reader(opened):
            if "cause" in record and record["ts_ns"] > start_ns:
                causes[record["cause"]] += record["segs"]
    for name, counted in COUNTED_CAUSES.items():
        seen = sum(causes[cause] for cause in counted)
        assert 0 <= after[name] - before[name] - seen <= missing, name
    assert causes.total() > 0
