"""The RPM package: its files, its dependencies, and what its scripts do."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.packages import AARCH64, arm64_refusal, build_arm64_rpm, machines, unpack_rpm

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "deploy/packaging"
RELEASES = tomllib.loads((PACKAGING / "releases.toml").read_text())
SPEC = PACKAGING / "rpm/rebpf.spec"

# Of another Python than this one: all wheels may have to be downloaded.
built = pytest.mark.extended
PARAMS = [pytest.param(release, marks=built) for release in RELEASES]


class Package:
    """A built package and its content."""

    def __init__(self, release: str, folder: Path) -> None:
        command = [sys.executable, str(PACKAGING / "build-rpm"), release, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.release = release
        self.path = Path(done.stdout.splitlines()[-1])
        self.root = folder / "root"
        unpack_rpm(self.path, self.root)

    def query(self, *words: str) -> list[str]:
        """Return the lines of rpm's answer about the file."""
        done = subprocess.run(["rpm", "-qp", *words, self.path], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()


@pytest.fixture(scope="module")
def programs() -> None:
    for program in ("rpmbuild", "rpm2cpio", "cpio"):
        if not shutil.which(program):
            pytest.skip(f"NO RPM: {program} is missing (scripts/setup --tests installs it)")


@pytest.fixture(scope="module", params=PARAMS)
def package(request: pytest.FixtureRequest, programs: None, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package(request.param, tmp_path_factory.mktemp(request.param))


def test_it_needs_the_releases_python_and_libbpf_and_little_else(package: Package) -> None:
    python = RELEASES[package.release]["python"]
    required = [each for each in package.query("--requires") if not each.startswith("rpmlib(")]
    assert set(required) == {
        "/bin/sh", "/usr/bin/python3", "glibc >= 2.28", "libbpf.so.1()(64bit)", f"python(abi) = {python}", "systemd",
    }  # fmt: skip
    assert "python3-bcc >= 0.26" in package.query("--recommends")
    assert [each.split(" ")[0] for each in package.query("--provides")] == ["rebpf", "rebpf(x86-64)"]


def test_its_files_belong_to_root_and_the_settings_stay(package: Package) -> None:
    columns = "%{FILENAMES}|%{FILEUSERNAME}|%{FILEGROUPNAME}|%{FILEMODES:perms}|%{FILEFLAGS:fflags}"
    listed = [line.split("|") for line in package.query("--queryformat", f"[{columns}\n]")]
    assert {(user, group) for _, user, group, _, _ in listed} == {("root", "root")}
    assert [(name, mode, flags) for name, _, _, mode, flags in listed if "c" in flags] == [
        ("/etc/rebpf/rebpf.toml", "-rw-r-----", "cn")
    ]
    writable = [name for name, _, _, mode, _ in listed if mode[5] == "w" or mode[8] == "w"]
    assert writable == []


def test_its_program_is_complete(package: Package) -> None:
    private = package.root / "usr/lib/rebpf"
    tag = f"cpython-{RELEASES[package.release]['python'].replace('.', '')}"
    natives = [path.name for path in private.rglob("*.so") if "cpython-" in path.name]
    assert natives
    assert [name for name in natives if tag not in name] == [], "for the release's Python"
    ours = {path.relative_to(ROOT) for path in ROOT.glob("producer/**/*.py")}
    assert {path.relative_to(private) for path in private.glob("producer/**/*.py")} == ours
    for name in ("rebpf.service", "rebpf-alert.service", "rebpf.service.d/restart.conf"):
        unit = package.root / "usr/lib/systemd/system" / name
        assert unit.read_bytes() == (ROOT / "deploy/systemd" / name).read_bytes()
    program = (package.root / "usr/bin/rebpf").read_text()
    assert 'sys.path += ["/usr/lib/rebpf"]' in program
    assert (package.root / "usr/share/doc/rebpf/examples/prometheus/rebpf.rules.yml").is_file()


@pytest.mark.extended
@pytest.mark.parametrize("release", RELEASES)
def test_each_binary_of_the_package_for_arm64_is_for_it(release: str, programs: None, tmp_path: Path) -> None:
    if reason := arm64_refusal():
        pytest.skip(f"NO PACKAGE FOR ARM64: {reason}")
    path = build_arm64_rpm(release, tmp_path)
    architecture = ["rpm", "-qp", "--queryformat", "%{ARCH}", path]
    assert subprocess.run(architecture, capture_output=True, text=True, check=True).stdout == "aarch64"
    unpack_rpm(path, tmp_path / "root")
    found = machines(tmp_path / "root")
    assert "usr/lib/rebpf/producer/_native.abi3.so" in found
    assert {name: machine for name, machine in found.items() if machine != AARCH64} == {}


def test_a_new_installation_starts_nothing_and_an_upgrade_restarts(tmp_path: Path) -> None:
    """Runs the scripts of the spec with programs that record their calls."""
    calls = tmp_path / "calls"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("systemctl", "systemd-sysusers", "chgrp", "python3", "find"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{calls}\n')
        (programs / name).chmod(0o755)

    def called(section: str, count: int, group: str = "root") -> list[str]:
        calls.write_text("")
        (programs / "stat").write_text(f"#!/bin/sh\necho {group}\n")
        (programs / "stat").chmod(0o755)
        (text,) = re.findall(rf"^%{section}\n(.*?)(?=^%\w+\n|\Z)", SPEC.read_text(), re.MULTILINE | re.DOTALL)
        script = text.replace("/run/systemd/system", str(tmp_path)).replace("/usr/bin/python3", "python3")
        run = ["sh", "-e", "-c", script, "sh", str(count)]
        subprocess.run(run, check=True, env={"PATH": f"{programs}:/usr/bin:/bin"})
        return [line.partition(" ")[0] + " " + line.split(" ")[-1] for line in calls.read_text().splitlines()]

    compiled = "python3 /usr/lib/rebpf"
    reloaded = "systemctl daemon-reload"
    preset = "systemctl rebpf-alert.service"
    users, readable = "systemd-sysusers rebpf.conf", "chgrp /etc/rebpf/rebpf.toml"
    assert called("post", 1) == [users, readable, preset, compiled, reloaded]
    assert called("post", 2) == [users, readable, compiled, reloaded], "rpm gave the unchanged file to root again"
    assert called("post", 2, group="ops") == [users, compiled, reloaded]
    assert called("preun", 1) == []
    assert called("preun", 0) == ["systemctl rebpf-alert.service", "find +"]
    assert called("postun", 0) == [reloaded]
    assert called("postun", 1) == [reloaded, "systemctl rebpf-alert.service"]
    assert "try-restart" in calls.read_text()
