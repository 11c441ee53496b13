"""The Debian package for arm64, built on another machine. That its programs run is shown in tests/vm/test_arm64.py."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.packages import AARCH64, ROOT, X86_64, arm64_refusal, build_arm64_deb, machines

pytestmark = pytest.mark.extended

CORE = "producer/_native.abi3.so"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := arm64_refusal():
        pytest.skip(f"NO PACKAGE FOR ARM64: {reason}")
    return build_arm64_deb("trixie", tmp_path_factory.mktemp("arm64"))


@pytest.fixture(scope="module")
def root(package: Path) -> Path:
    """The package's files."""
    root = package.with_name("root")
    subprocess.run(["dpkg-deb", "-x", package, root], check=True)
    return root


def test_each_binary_of_it_is_for_arm64(package: Path, root: Path) -> None:
    field = subprocess.run(["dpkg-deb", "--field", package, "Architecture"], capture_output=True, text=True, check=True)
    assert (field.stdout.strip(), package.name.rpartition("_")[2]) == ("arm64", "arm64.deb")
    found = machines(root)
    assert f"usr/lib/rebpf/{CORE}" in found
    assert {name: machine for name, machine in found.items() if machine != AARCH64} == {}


def test_the_steps_of_reading_a_ring_are_ordered_by_an_instruction(root: Path) -> None:
    # An emulated processor may not reorder them, so no test that runs there shows it.
    command = ["aarch64-linux-gnu-objdump", "--disassemble", root / "usr/lib/rebpf" / CORE]
    assert "dmb\tish" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_checkout_keeps_its_own_core(package: Path) -> None:
    assert machines((ROOT / CORE).parent)[Path(CORE).name] == X86_64


def test_lintian_finds_no_error(package: Path) -> None:
    if not shutil.which("lintian"):
        pytest.skip("NO LINTIAN (scripts/setup --tests installs it)")
    done = subprocess.run(["lintian", "--allow-root", "--fail-on", "error", package], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
