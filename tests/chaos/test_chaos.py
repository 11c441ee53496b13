"""An hour in which everything around the producer fails at random: every missing event is reported.

A shorter one: `python -m tests.chaos --minutes 5`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import fetch

MINUTES = 60


@pytest.mark.extended
@pytest.mark.root
@pytest.mark.real_kafka
@pytest.mark.timeout(2 * 60 * MINUTES)
def test_an_hour_of_chaos_has_no_unreported_loss(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("BPF programs, namespaces and mounts need root")
    if absent := fetch.missing():
        pytest.skip(f"NO REAL KAFKA: {', '.join(absent)} not installed")
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        "--minutes",
        str(MINUTES),
        "--report",
        str(tmp_path / "report.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
