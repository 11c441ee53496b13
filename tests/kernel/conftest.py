"""The recording and the namespaces that most kernel tests share: loading takes a second here, a minute in a VM."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.demo.lab import Lab
from producer.events import STREAMS
from tests.support.capture import Recording, hook_settings
from tests.support.disks import bpffs
from tests.support.rebpf import COMPILED
from tests.support.rules import filtered

# Below the ephemeral ports, and not used by tests that run in parallel. Each test takes its own.
_PORTS = tuple(10_000 + os.getpid() % 50 * 400 + i for i in range(400))
_unused = iter(_PORTS)


@pytest.fixture(scope="session", autouse=True)
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("kernel tests load BPF programs and create namespaces: run them as root")


@pytest.fixture(scope="session", autouse=True)
def compiled(root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile each set of flags once per session, or once for all sessions with the same folder."""
    with pytest.MonkeyPatch.context() as patch:
        if COMPILED not in os.environ:
            patch.setenv(COMPILED, str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="session")
def capture(root: None) -> Iterator[Recording]:
    """Both streams, filtered in the kernel for the tests' ports."""
    with Recording(hook_settings(rules=filtered(ports=_PORTS))) as capture:
        yield capture


@pytest.fixture(scope="module")
def flows(root: None) -> Iterator[Recording]:
    """All streams, filtered in the kernel for the tests' ports."""
    with Recording(hook_settings(streams=STREAMS, rules=filtered(ports=_PORTS))) as recording:
        yield recording


@pytest.fixture(scope="session")
def lab(root: None) -> Iterator[Lab]:
    """Two namespaces without packet loss."""
    with Lab(loss=0) as lab:
        yield lab


@pytest.fixture
def port() -> int:
    return next(_unused)


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    """A folder for pins in a bpffs of its own."""
    with bpffs(tmp_path / "bpffs") as folder:
        yield folder / "pins"
