"""The unit file says what the program and systemd do."""

import re
import shutil
import subprocess
from configparser import RawConfigParser
from ipaddress import ip_address, ip_network
from itertools import product
from pathlib import Path

import pytest

from producer.config.load import Capture, Config, Metrics
from producer.errors import ConfigError, PermissionDenied, UsageError
from producer.host.capabilities import NAMES
from producer.kernel.hooks import HOOKS_BY_STREAM
from producer.kernel.loader_child import MAPS

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy/systemd/rebpf.service"
ALERT_UNIT = ROOT / "deploy/systemd/rebpf-alert.service"
SECURITY = ROOT / "docs/security.md"


@pytest.fixture(scope="module")
def service():
    """The settings of [Service]; of one that is there more than once, the last."""
    parser = RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(UNIT)
    return parser["Service"]


def test_the_service_gets_the_size_of_its_store(service):
    assert service["Environment"] == f"FDSTORE={service['FileDescriptorStoreMax']}"


def test_two_sets_of_maps_programs_and_links_fit_into_the_store(service):
    sets = [[probe for hook in hooks for probe in hook.probes] for hooks in product(*HOOKS_BY_STREAM.values())]
    maps, programs = len(MAPS), max(sum(probe.captures for probe in probes) for probes in sets)
    links = max(map(len, sets)) + 1  # that of own sockets
    assert f"up to {maps} maps, {programs} programs, {links} links and a\n# manifest, twice" in UNIT.read_text()
    assert int(service["FileDescriptorStoreMax"]) >= 2 * (maps + programs + links + 1)


def test_the_alerting_service_has_threads_for_a_large_cluster():
    """librdkafka has one for each broker in each client."""
    clients, brokers = 4, 400
    (most,) = re.findall("^TasksMax=([0-9]+)$", ALERT_UNIT.read_text(), re.MULTILINE)
    assert int(most) > clients * brokers


def test_no_restart_after_what_the_next_start_would_only_repeat(service):
    codes = {UsageError.exit_code, PermissionDenied.exit_code, ConfigError.exit_code}
    assert {int(code) for code in service["RestartPreventExitStatus"].split()} == codes


def test_the_capabilities_are_those_that_are_asked_for(service):
    assert set(service["AmbientCapabilities"].split()) == set(NAMES.values())
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"]


def test_a_reload_has_the_producers_answer(service):
    folder = service["StateDirectory"]
    assert service["ExecReload"] == f"/usr/bin/rebpf reload --state-dir %S/{folder}"
    assert str(Config().state_dir) == f"/var/lib/{folder}"


def test_the_check_before_it_decides_nothing(service):
    # systemd does not look at RestartPreventExitStatus= for it: a status would be tried again forever.
    assert service["ExecStartPre"].startswith("-/usr/bin/rebpf check --local ")


def test_two_sets_of_rings_and_the_compiler_fit_into_the_memory(service):
    rings_mib = (Capture().transmit_ring_bytes + Capture().retransmit_ring_bytes) >> 20
    assert int(service["MemoryHigh"].removesuffix("M")) >= 2 * rings_mib + 80 + 150
    assert int(service["MemoryMax"].removesuffix("M")) > int(service["MemoryHigh"].removesuffix("M"))


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "127.0.0.53", "169.254.169.254", "203.0.113.9", "::1", "2001:db8::1", "fd00::1", "fe80::1"]
)
def test_it_may_speak_with_any_unicast_address(address):
    assert any(ip_address(address) in network for network in allowed_networks())


@pytest.mark.parametrize("address", ["224.0.0.251", "255.255.255.255", "ff02::fb"])
def test_it_may_speak_with_neither_multicast_nor_broadcast(address):
    assert not any(ip_address(address) in network for network in allowed_networks())


def test_it_leaves_no_core_dump_and_shares_no_memory_with_others(service):
    assert service["LimitCORE"] == "0"
    assert service["PrivateIPC"] == "yes"
    assert service["KeyringMode"] == "private"


def test_it_listens_by_tcp_alone_and_a_drop_in_names_the_port(service):
    assert (service["SocketBindDeny"], service["SocketBindAllow"]) == ("any", "tcp")
    drop_in = f"SocketBindAllow=\n{{0}}SocketBindAllow=tcp:{Metrics().listen.rpartition(':')[2]}\n"
    assert "#   " + drop_in.format("#   ") in UNIT.read_text()
    assert drop_in.format("") in SECURITY.read_text()


def analyzed(*words):
    if not shutil.which("systemd-analyze"):
        pytest.skip("NO systemd-analyze: the virtual machines' tests look at the score")
    command = ["systemd-analyze", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={"LC_ALL": "C.UTF-8", "COLUMNS": "300"})
    print(done.stdout, done.stderr)
    return done


@pytest.fixture
def unit(tmp_path):
    """The unit by itself, without the drop-in of later systemds, and with a program that is here."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/usr/bin/rebpf", "/bin/true"))
    return copy


@pytest.fixture
def alert_unit(tmp_path):
    copy = tmp_path / ALERT_UNIT.name
    copy.write_text(ALERT_UNIT.read_text().replace("/usr/bin/rebpf", "/bin/true"))
    return copy


def test_systemd_analyze_has_no_complaint_about_them(unit, alert_unit):
    done = analyzed("verify", "--man=no", str(unit), str(alert_unit))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_exposure_of_alert_is_low(alert_unit):
    done = analyzed("security", "--offline=true", "--no-pager", str(alert_unit))
    score = re.search(r"exposure level for rebpf-alert.service: (\d+\.\d+)", done.stdout)
    assert score is not None
    assert float(score[1]) <= 1.5


def test_alert_is_not_restarted_after_what_would_only_repeat():
    codes = f"{UsageError.exit_code} {ConfigError.exit_code}"
    assert f"\nRestartPreventExitStatus={codes}\n" in ALERT_UNIT.read_text(), "and after missing rights it is"


def test_its_exposure_is_low_and_each_finding_has_its_reason(unit):
    done = analyzed("security", "--offline=true", "--no-pager", "--threshold=15", str(unit))
    score = re.search(r"exposure level for rebpf.service: (\d+\.\d+)", done.stdout)
    assert score is not None
    assert float(score[1]) <= 1.5
    text = SECURITY.read_text().replace("\\", "")
    found = re.findall(r"^\S+ (\S+) .* 0\.\d\s*$", done.stdout, re.MULTILINE)
    assert len(found) >= 8
    assert [name for name in found if name not in text and name.partition("=")[2] not in text] == []


def allowed_networks():
    # The parser keeps the last of several.
    lines = re.findall(r"^IPAddressAllow=(.+)$", UNIT.read_text(), re.MULTILINE)
    return [ip_network(word) for line in lines for word in line.split()]
