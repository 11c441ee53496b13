"""The unit file says what the program and systemd do."""

from configparser import RawConfigParser
from pathlib import Path

import pytest

from producer.errors import ConfigError, PermissionDenied, UsageError
from producer.privileges import NAMES

UNIT = Path(__file__).resolve().parents[2] / "deploy/systemd/rebpf.service"


@pytest.fixture(scope="module")
def service():
    """The settings of [Service]; of one that is there more than once, the last."""
    parser = RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(UNIT)
    return parser["Service"]


def test_the_service_is_told_the_size_of_its_store(service):
    assert service["Environment"] == f"FDSTORE={service['FileDescriptorStoreMax']}"


def test_no_restart_after_what_the_next_start_would_only_repeat(service):
    codes = {UsageError.exit_code, PermissionDenied.exit_code, ConfigError.exit_code}
    assert {int(code) for code in service["RestartPreventExitStatus"].split()} == codes


def test_the_capabilities_are_those_that_are_asked_for(service):
    assert set(service["AmbientCapabilities"].split()) == set(NAMES.values())
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"]
