"""The profiles are valid configurations that do what their names promise."""

from pathlib import Path

import pytest

from producer.commands.check_settings import settings_offline
from producer.config.load import load
from producer.events import STREAMS
from producer.view.topics import EARLIER_S, WINDOW_S

PROFILES = Path(__file__).resolve().parents[2] / "deploy" / "profiles"


@pytest.mark.parametrize("path", sorted(PROFILES.iterdir()), ids=lambda path: path.name)
def test_a_profile_is_valid_and_captures_all_retransmissions_and_connections(path: Path) -> None:
    config = load(path)
    assert [finding.exit_code for finding in settings_offline(config, path)] == [0]
    assert config.capture.streams == STREAMS
    assert not config.rules


@pytest.mark.parametrize("path", sorted(PROFILES.iterdir()), ids=lambda path: path.name)
def test_the_windows_of_a_fleets_view_have_the_same_number_of_records_of_each_connection(path: Path) -> None:
    interval_s = load(path).capture.flow_interval_s
    assert WINDOW_S % interval_s == 0
    assert interval_s < EARLIER_S


def test_only_the_fleets_profile_has_a_budget_for_transmits() -> None:
    full, fleet = (load(PROFILES / f"{name}.toml").capture.transmit_events_per_s for name in ("full", "fleet"))
    assert (full, fleet) == (0, 1000)
