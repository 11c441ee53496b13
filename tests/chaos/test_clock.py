"""The library that steps a process's clock: it steps what it should, and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.scene import clock_library

SCRIPT = """
import os, struct, sys, threading, time
from producer.kafka.librdkafka import Producer
CLOCKS = time.CLOCK_REALTIME, 5, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME  # 5: CLOCK_REALTIME_COARSE
begin_s = [time.clock_gettime(clock) for clock in CLOCKS]
with open(sys.argv[1], "r+b", buffering=0) as file:
    for step_s in (0, -86400, 3000, 0):
        os.pwrite(file.fileno(), struct.pack("q", step_s * 10**9), 0)
        Producer({"bootstrap.servers": "127.0.0.1:1"}).close()
        threading.Event().wait(0.01)
        print(*(round((time.clock_gettime(clock) - s) / 600) for clock, s in zip(CLOCKS, begin_s)))
"""


def test_clocks_of_the_day_are_stepped_and_a_client_starts(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    step = tmp_path / "step"
    step.write_bytes(bytes(8))
    env = {**os.environ, "LD_PRELOAD": str(clock_library(tmp_path)), "CHAOS_CLOCK": str(step)}
    command = [sys.executable, "-c", SCRIPT, str(step)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["0 0 0 0", "-144 -144 0 0", "5 5 0 0", "0 0 0 0"]  # in ten minutes
