"""`capture.transmit_events_per_s`: above it, connections are sampled, and events and status have the rate."""

import os
import shutil
import signal

import pytest

from tests.support import topics
from tests.support.rebpf import Run, repeating, wait_until
from tests.support.topics import TRANSMIT
from tests.support.traffic import Echo, exchange

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("kcat") is None, reason="kcat is not installed (apt-get install kcat)"),
]

CONFIG = """
[capture]
transmit_events_per_s = 100

[metrics]
listen = "127.0.0.1:0"
"""


def test_transmits_above_the_budget_are_sampled(tmp_path):
    with Echo() as echo, Run(tmp_path, "--port", echo.port, config=CONFIG) as run:
        brokers = run.ready()

        def rate() -> int:
            found: int = run.get("status")["transmit_sample_rate"]
            return found

        def rates() -> list[int]:
            return [each.record["sample_rate"] for each in topics.read(brokers, TRANSMIT)]

        assert rate() == 1
        with repeating(lambda: exchange(echo.port, 40), 0.01):
            wait_until("the rate is above 1", lambda: rate() > 1)
            wait_until("events of sampled connections", lambda: max(rates(), default=1) > 1)
            run.config.write_text(CONFIG.replace("= 100", "= 0"))
            os.kill(run.pid, signal.SIGHUP)
            wait_until("without a budget nothing is sampled", lambda: rate() == 1)
            assert "need a restart" not in run.log
        run.finish()
