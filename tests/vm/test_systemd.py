"""The unit file on a host with a real systemd: restarted, killed, reloaded and stopped under traffic.

REBPF_TEST_SYSTEMD names the Debian releases that are booted, `bookworm` (systemd 252, Linux 6.1) unless told otherwise.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.vm import systemd_guest
from tests.vm.systemd_steps import LIVES

pytestmark = [pytest.mark.vm, pytest.mark.timeout(2100)]

SUITES = os.environ.get("REBPF_TEST_SYSTEMD", "bookworm").split(",")
COMMAND = "env PYTHONPATH=/usr/lib/rebpf PYTHONDONTWRITEBYTECODE=1 python3 -m tests.vm.systemd_steps"
DEADLINE_S = 1200


@pytest.fixture(scope="module", params=SUITES)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen of the service in the guest, by its lives."""
    if reason := systemd_guest.refusal():
        pytest.skip(f"NO VIRTUAL MACHINE: {reason}")
    folder: Path = tmp_path_factory.mktemp(request.param)
    result = systemd_guest.run(request.param, COMMAND, DEADLINE_S, folder)
    assert result.status == 0, result.output
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


@pytest.fixture(params=LIVES)
def life(request: pytest.FixtureRequest, seen: dict[str, Any]) -> dict[str, Any]:
    """One of them, with `visible`: between how many and how many of the captured segments its hooks see."""
    found: dict[str, Any] = seen[request.param]
    captured = found["captured"]
    if request.param != "cgroup":
        # The other hooks see nothing that has no socket. That is rare: a peer that is slow sends its end twice.
        return {**found, "visible": (captured - found["late_acks"], captured)}
    # The cgroup hook of older kernels is not run for SYN-ACKs over IPv6.
    kernel = tuple(map(int, seen["kernel"].split(".")[:2]))
    unseen = found["ipv6_synacks"] if kernel < (6, 12) else 0
    return {**found, "visible": (captured - unseen - found["late_acks"], captured - unseen)}


def test_the_same_programs_stay_attached_over_a_restart_and_kills(life: dict[str, Any]) -> None:
    sights = life["sights"]
    running = [sights[name] for name in ("start", "restart", "kill", "second kill", "reload")]
    assert [sight["state"] for sight in running] == ["active"] * 5
    assert len({sight["pid"] for sight in running}) == 4, "a reload is no restart"
    assert running[0]["programs"]
    assert all(sight["programs"] == running[0]["programs"] for sight in running)
    assert life["taken_over"] == 3
    assert sights["second kill"]["restarts"] == 2, "by Restart=always"


def test_every_segment_that_left_meanwhile_is_accounted_for_and_none_is_lost(life: dict[str, Any]) -> None:
    print(life["captured"], life["visible"], *life["balances"], sep="\n")
    account = re.search(r"tcp_transmit (.*?)( \||$)", life["balances"][-1])
    assert account is not None
    counts = dict(word.split("=") for word in account[1].split())
    least, most = life["visible"]
    assert 1000 < least <= int(counts["passed"]) <= most
    assert counts["passed"] == counts["delivered"]
    assert set(re.findall(r"\d+", counts["lost"])) == {"0"}


def test_a_stop_leaves_no_program_and_nothing_in_the_store(life: dict[str, Any]) -> None:
    # The steps have waited for the programs' end.
    assert life["sights"]["start"]["stored"] > 15
    assert life["sights"]["stop"] == {
        "state": "inactive", "pid": 0, "restarts": 0, "stored": 0, "programs": [], "capabilities": []
    }  # fmt: skip


def test_hooks_that_are_not_the_same_take_the_old_ones_place(seen: dict[str, Any]) -> None:
    # The steps have waited for the old programs' end.
    before, after = seen["change"]["before"], seen["change"]["after"]
    assert after["state"] == "active"
    assert not set(before["programs"]) & set(after["programs"])
    assert after["stored"] == before["stored"], "the old ones are not in the store any more"


def test_a_service_that_hangs_is_started_again_with_the_same_programs(seen: dict[str, Any]) -> None:
    before, after = seen["hang"]["before"], seen["hang"]["after"]
    assert after["state"] == "active"
    assert after["restarts"] == before["restarts"] + 1
    assert after["programs"] == before["programs"] != []
    assert "tcp_transmit" in seen["hang"]["said"]


def test_no_thread_keeps_a_capability(life: dict[str, Any]) -> None:
    running = [sight for sight in life["sights"].values() if sight["pid"]]
    assert [sight["capabilities"] for sight in running] == [[0]] * len(running)


def test_the_unit_is_as_tight_as_it_was(seen: dict[str, Any]) -> None:
    print(seen["security"])
    score = re.search(r"Overall exposure level for rebpf.service: (\d+\.\d+)", seen["security"])
    assert score is not None
    assert float(score[1]) <= 1.8
