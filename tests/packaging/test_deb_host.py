"""The life of the Debian package on a host: installation, upgrade, rollback, removal, purge; without the compiler.

The host is a root that debootstrap made, without systemd as its first process: what the running service sees of an
upgrade is shown in tests/vm.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.packages import build_deb
from tests.support.servers.fetch import cached
from tests.support.vm.guest import TIED
from tests.support.vm.kernels import KEYRINGS, debian_mirror

pytestmark = [pytest.mark.extended, pytest.mark.root, pytest.mark.timeout(1500)]

ENABLED = "etc/systemd/system/multi-user.target.wants/rebpf.service"
BROKERS = 'brokers = "kafka-1:9092"'
OURS = ("etc/rebpf", "usr/lib/rebpf", "usr/share/doc/rebpf", "var/lib/rebpf", "usr/bin/rebpf", ENABLED)
PREFIX = 'mount -t proc proc "$0/proc" && DEBIAN_FRONTEND=noninteractive exec chroot "$0" sh -ec "$1"'


class Host:
    """A root folder with Debian, and commands in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, command: str, status: int = 0) -> str:
        """Run a shell command in namespaces of its own, and return its output."""
        done = subprocess.run([*TIED, "sh", "-ec", PREFIX, self.root, command], capture_output=True, text=True)
        assert done.returncode == status, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def install(self, package: Path, options: str = "") -> None:
        """Install, upgrade or downgrade with dpkg."""
        shutil.copy(package, self.root / "root/rebpf.deb")
        self.run(f"dpkg {options} --install /root/rebpf.deb")
        assert self.run("dpkg --audit") == ""
        assert self.run("dpkg --verify rebpf") in ("", "??5?????? c /etc/rebpf/rebpf.toml\n")

    def ours(self) -> list[str]:
        """Return what is there of the package, beside its lists in dpkg."""
        return [name for name in OURS if exists(self.root / name)]

    def enabled(self) -> set[str]:
        """Return the names of the package's links in systemd's folder, whose targets exist only in this root."""
        return {path.name for path in (self.root / "etc/systemd/system").rglob("*") if path.name.startswith("rebpf")}


def exists(path: Path) -> bool:
    return os.path.lexists(path)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two revisions, older first."""
    return [build_deb("bookworm", tmp_path_factory.mktemp("packages"), revision) for revision in ("1", "2")]


@pytest.fixture
def host(packages: list[Path], tmp_path: Path) -> Iterator[Host]:
    """A host with the packages that ReBPF depends on, and without those that it recommends."""
    command = ["dpkg-deb", "--field", str(packages[0]), "Depends"]
    depends = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [re.split(r"[ (|:]", entry.strip())[0] for entry in depends.split(",")]
    base = cached("deb-host-bookworm", lambda part: debootstrap(part, names))
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["tar", "-C", root, "-xf", base / "base.tar"], check=True)
    yield Host(root)
    shutil.rmtree(root)


def debootstrap(part: Path, names: list[str]) -> None:
    root = part / "root"
    options = ["--variant=minbase", f"--keyring={KEYRINGS / 'debian-archive-keyring.gpg'}"]
    subprocess.run([*TIED, "debootstrap", *options, "bookworm", root, debian_mirror()], check=True, capture_output=True)
    (root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")
    Host(root).run(f"apt-get -qq update && apt-get -qq install --no-install-recommends {' '.join(names)}")
    without = ("./var/cache/apt/archives/*.deb", "./var/lib/apt/lists/*", "./dev/*", "./proc/*")
    command = ["tar", "-C", root, *(f"--exclude={each}" for each in without), "-cf", part / "base.tar", "."]
    subprocess.run(command, check=True)
    shutil.rmtree(root)


def test_installation_upgrade_rollback_removal_and_purge(packages: list[Path], host: Host) -> None:
    old, new = packages
    before = set(host.run("getent passwd; getent group").splitlines())
    config = host.root / "etc/rebpf/rebpf.toml"

    host.install(old)
    assert host.run("python3 -c 'import bcc' 2>&1 || true").endswith("No module named 'bcc'\n")
    assert os.readlink(host.root / ENABLED).endswith("/lib/systemd/system/rebpf.service")
    assert host.enabled() == {"rebpf.service"}
    assert host.run("stat -c %a:%U:%G /etc/rebpf/rebpf.toml") == "640:root:rebpf\n"
    assert re.fullmatch(r"rebpf \d+\.\d+\.\d+\n", host.run("rebpf version"))
    host.run("rebpf check --offline --config /etc/rebpf/rebpf.toml", status=78)
    config.write_text(re.sub("brokers = .*", BROKERS, config.read_text()))
    host.run("rebpf check --offline --config /etc/rebpf/rebpf.toml")
    state = host.root / "var/lib/rebpf"
    state.mkdir(mode=0o700)
    (state / "ledger.flow").write_text("of the service")

    host.run("systemctl disable rebpf.service")
    for package in (new, old):  # an upgrade and a rollback
        host.install(package)
        assert package.name.split("_")[1] in host.run("dpkg-query --show rebpf")
        assert BROKERS in config.read_text()
        assert host.run("stat -c %a:%U:%G /etc/rebpf/rebpf.toml") == "640:root:rebpf\n"
        assert (state / "ledger.flow").read_text() == "of the service"
        assert not exists(host.root / ENABLED), "as the administrator left it"
        host.run("rebpf version")
    host.run("systemctl enable rebpf-alert.service")
    config.unlink()
    host.install(new, "--force-confmiss")
    assert host.enabled() == {"rebpf-alert.service"}
    assert host.run("stat -c %a:%U:%G /etc/rebpf/rebpf.toml") == "640:root:rebpf\n", "restored"
    config.write_text(re.sub("brokers = .*", BROKERS, config.read_text()))

    host.run("dpkg --remove rebpf")
    assert BROKERS in config.read_text()
    assert (state / "ledger.flow").exists()
    assert not exists(host.root / "usr/lib/rebpf"), "no byte code is left"
    host.run("dpkg --purge rebpf")
    assert host.ours() == []
    assert host.enabled() == set()
    assert set(host.run("getent passwd; getent group").splitlines()) == before


def test_an_upgrade_that_fails_midway_is_completed_by_the_next(packages: list[Path], host: Host) -> None:
    """The disk is full while dpkg unpacks, or the new postinst fails: here, for want of its interpreter."""
    old, new = packages
    host.install(old)
    compiler = host.root / "usr/bin/py3compile"
    compiler.rename(compiler.with_suffix(".away"))
    shutil.copy(new, host.root / "root/rebpf.deb")
    host.run("dpkg --install /root/rebpf.deb", status=1)
    assert "half-configured" in host.run("dpkg-query --show --showformat '${db:Status-Status}' rebpf")
    compiler.with_suffix(".away").rename(compiler)
    host.run("dpkg --configure --pending")
    assert host.run("dpkg --audit") == ""
    host.install(old)
    assert host.run("rebpf version")
