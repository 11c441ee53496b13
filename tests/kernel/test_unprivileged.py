"""A user without root but with the service's capabilities loads and attaches every hook, then needs none of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.capture import ALLOWED

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = "-all,+bpf,+perfmon,+net_admin"
ATTACH = """
import sys
from producer.events import FLOWS, STREAMS
from producer.host import capabilities
from producer.kernel.capture import Capture
from producer.kernel.settings import CaptureSettings
from producer.rules.tables import only, tables
settings = CaptureSettings(tuple(sys.argv[1].split(",")), STREAMS, rules=tables(*only((), (1,))))
with Capture(settings) as capture:
    capture.load()
    capture.attach()
    capabilities.drop_unneeded(lambda: capture.sequence(STREAMS[0]))
    capture.report_flows()
    print(capture.hooks_in_use["transmit"], capture.hooks_in_use["retransmit"])
"""


def attach(*hooks: str) -> str:
    if not shutil.which("setpriv"):
        pytest.skip("giving up privileges needs setpriv")
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    user += [f"--inh-caps={CAPABILITIES}", f"--ambient-caps={CAPABILITIES}"]
    if subprocess.run(
        [*user, sys.executable, "-c", "import producer.kernel.capture"], cwd=ROOT, capture_output=True
    ).returncode:
        pytest.skip(f"{sys.executable} and the package are not readable for other users")
    command = [*user, sys.executable, "-c", ATTACH, ",".join(hooks)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_allowed_hooks_attach_without_root() -> None:
    assert attach(*ALLOWED)


def test_the_last_hooks_attach_without_root() -> None:
    assert attach("cgroup_skb", "raw_tp") in ("cgroup_skb cgroup_skb", "cgroup_skb raw_tp")
