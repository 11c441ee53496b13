"""Shared fixtures."""

import os
import subprocess

import pytest


@pytest.fixture(scope="session")
def mounts() -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("NO MOUNT NAMESPACE: it needs root and unshare")
