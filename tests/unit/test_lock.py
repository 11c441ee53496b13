"""The lock files that scripts/setup installs from: they fit pyproject.toml, and each package has its hashes."""

import ast
import platform
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from producer import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13")  # bookworm, Ubuntu 24.04, trixie
MACHINES = ("x86_64", "aarch64")
BUILD = [*PROJECT["build-system"]["requires"], "editables>=0.5"]
RUN = [*PROJECT["project"]["dependencies"], *BUILD]
TESTS = [*RUN, *(each for extra in PROJECT["project"]["optional-dependencies"].values() for each in extra)]
LOCKS = {"run.lock": RUN, "tests.lock": TESTS}
ENTRY = re.compile(r"[\w.-]+==[^\n]*(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n")

locks = pytest.mark.parametrize("name", LOCKS)
targets = pytest.mark.parametrize("target", [(python, machine) for python in PYTHONS for machine in MACHINES])


def entries(name: str) -> list[str]:
    return ENTRY.findall((ROOT / "scripts" / name).read_text())


def pinned(name: str, target: tuple[str, str]) -> dict[str, str]:
    """Return the versions that a machine gets."""
    found = {}
    for entry in entries(name):
        requirement = Requirement(entry.partition(" \\\n")[0])
        if requirement.marker is None or requirement.marker.evaluate(environment(target)):
            (version,) = requirement.specifier
            assert canonicalize_name(requirement.name) not in found
            found[canonicalize_name(requirement.name)] = version.version
    return found


def environment(target: tuple[str, str], extra: str = "") -> dict[str, str]:
    python, machine = target
    return {
        "python_version": python,
        "python_full_version": f"{python}.2",
        "platform_machine": machine,
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_system": "Linux",
        "extra": extra,
    }


@locks
def test_a_lock_has_pins_with_hashes_and_nothing_else(name: str) -> None:
    text = (ROOT / "scripts" / name).read_text()
    assert text == "# Written by scripts/lock.\n" + "".join(entries(name)), "no option, no index, no address"


@locks
@targets
def test_a_lock_fits_pyproject(name: str, target: tuple[str, str]) -> None:
    versions = pinned(name, target)
    unmet = [each for each in LOCKS[name] if not fits(Requirement(each), versions)]
    assert unmet == [], "run scripts/lock"


def fits(requirement: Requirement, versions: dict[str, str]) -> bool:
    version = versions.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


@locks
@targets
def test_a_lock_has_what_its_packages_need(name: str, target: tuple[str, str]) -> None:
    versions = pinned(name, target)
    needed = [
        each for package, version in versions.items() for each in requirements(package, version, target, LOCKS[name])
    ]
    assert [str(each) for each in needed if not fits(each, versions)] == [], "run scripts/lock"


def test_hosts_get_nothing_that_no_package_needs() -> None:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}", platform.machine()
    versions = pinned("run.lock", here)
    needed = [each for package, version in versions.items() for each in requirements(package, version, here, RUN)]
    names = {canonicalize_name(each.name) for each in [*map(Requirement, RUN), *needed]}
    assert versions.keys() - names == set(), "run scripts/lock"


@pytest.mark.slow
def test_hosts_get_what_the_producer_imports_and_nothing_else() -> None:
    trees = [ast.parse(path.read_text()) for path in ROOT.glob("producer/**/*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    modules = {name.partition(".")[0] for name in names}
    requirements = [Requirement(each) for each in PROJECT["project"]["dependencies"]]
    assert {each.name for each in requirements if each.name.replace("-", "_") not in modules} == {"pyyaml"}
    assert "yaml" in modules
    assert [each.name for each in requirements if each.extras] == [], "an extra's packages are imported by no module"


def requirements(package: str, version: str, target: tuple[str, str], wanted: list[str]) -> Iterator[Requirement]:
    """Yield what a package requires, with the wanted extras; of those alone that are installed here in this version."""
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return
    if found.version == version:
        extras = ("", *(extra for each in map(Requirement, wanted) if each.name == package for extra in each.extras))
        for requirement in map(Requirement, found.requires or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate(environment(target, extra)) for extra in extras):
                yield requirement


@targets
def test_tests_run_with_what_is_run(target: tuple[str, str]) -> None:
    run, testing = pinned("run.lock", target), pinned("tests.lock", target)
    assert {name: testing.get(name) for name in run} == run


def test_setup_installs_by_hash_and_by_nothing_else() -> None:
    lines = re.findall(r"^.*\bpip(?:_install)? .*$", (ROOT / "scripts/setup").read_text(), re.MULTILINE)
    installs = [line.strip() for line in lines if line.strip().startswith("pip_install -")]
    assert installs == [
        'pip_install --require-hashes --only-binary=:all: --requirement "$lock"',
        "pip_install --no-deps --no-build-isolation -e .",
    ]


def test_the_package_has_the_projects_version() -> None:
    assert __version__ == PROJECT["project"]["version"]
