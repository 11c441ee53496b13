"""The Debian packages: built for both releases, complete, and the same whenever they are built.

That they install, run and leave nothing behind is shown on hosts of those releases: tests/vm.
"""

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from producer.cli.main import rebpf
from producer.config import load
from producer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "deploy" / "packaging"
SUITES = tomllib.loads((PACKAGING / "suites.toml").read_text())

UNIT = "usr/lib/systemd/system/rebpf.service"
ALERT_UNIT = "usr/lib/systemd/system/rebpf-alert.service"
DROP_IN = f"{UNIT}.d/restart.conf"
PLACES = (
    "etc/rebpf/rebpf.toml",
    "usr/bin/rebpf",
    "usr/lib/rebpf/",
    UNIT,
    ALERT_UNIT,
    "usr/lib/sysusers.d/rebpf.conf",
    "usr/share/bash-completion/completions/rebpf",
    "usr/share/doc/rebpf/",
    "usr/share/fish/vendor_completions.d/rebpf.fish",
    "usr/share/lintian/overrides/rebpf",
    "usr/share/man/man1/rebpf.1.gz",
    "usr/share/man/man5/rebpf.toml.5.gz",
    "usr/share/zsh/vendor-completions/_rebpf",
)
MODES = {"etc/rebpf/rebpf.toml": 0o640, "usr/bin/rebpf": 0o755}


@dataclass(frozen=True)
class Package:
    suite: str
    path: Path
    root: Path

    @property
    def private(self) -> Path:
        return self.root / "usr/lib/rebpf"

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yield its content with owners and modes, which only root could unpack."""
        command = ["dpkg-deb", "--fsys-tarfile", str(self.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking:
            assert unpacking.stdout is not None
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
                yield from archive


def _build(suite: str, folder: Path, umask: int = 0o022, **environment: str) -> Path:
    command = [sys.executable, str(PACKAGING / "build-deb"), suite, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, umask=umask, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


# The package of one release is enough here; the other is built for the tests that boot its host.
PARAMS = [suite if suite == "bookworm" else pytest.param(suite, marks=pytest.mark.extended) for suite in SUITES]


@pytest.fixture(scope="module", params=PARAMS)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    if not shutil.which("dpkg-deb"):
        pytest.skip("NO DEBIAN PACKAGE: dpkg-deb is missing")
    folder = tmp_path_factory.mktemp(request.param)
    path = _build(request.param, folder)
    subprocess.run(["dpkg-deb", "-x", path, folder / "root"], check=True)
    return Package(request.param, path, folder / "root")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.extended
def test_lintian_finds_no_error(package: Package) -> None:
    if not shutil.which("lintian"):
        pytest.skip("NO LINTIAN (scripts/setup --tests installs it)")
    command = ["lintian", "--allow-root", "--fail-on", "error", str(package.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_installed_elsewhere_or_with_other_rights_than_meant(package: Package) -> None:
    files = {member.name.removeprefix("./"): member for member in package.members()}
    assert {(member.uname, member.gname) for member in files.values()} == {("root", "root")}
    folders = {name for name, member in files.items() if member.isdir()}
    assert {files[name].mode for name in folders} == {0o755}
    assert [name for name in files if name not in folders and not name.startswith(PLACES)] == []
    assert {name: files[name].mode for name in files if name not in folders and files[name].mode != 0o644} == MODES


def test_nothing_shows_where_it_was_built(package: Package) -> None:
    traces = [f"{ROOT}/{name}".encode() for name in ("deploy", "producer")]
    traces += [sys.executable.encode(), b"rebpf-deb-", b"rebpf-wheel-"]
    files = _files(package.root)
    assert [(name, trace) for name, data in files.items() for trace in traces if trace in data] == []


def test_documents_and_examples_come_with_it(package: Package) -> None:
    documents = _files(package.root / "usr/share/doc/rebpf")
    for name in ("changelog.Debian.gz", "changelog.gz", "copyright"):
        del documents[name]
    examples = [ROOT / "deploy" / name for name in ("flink", "grafana", "kubernetes", "profiles", "prometheus")]
    expected = {
        f"examples/{path.relative_to(ROOT / 'deploy')}": path.read_bytes()
        for folder in examples
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    expected |= {
        str(path.relative_to(ROOT)): path.read_bytes()
        for pattern in ("README.md", "docs/*.md", "docs/*.ipynb", "schemas/*.avsc")
        for path in ROOT.glob(pattern)
    }
    assert documents == expected


def test_links_of_its_readme_lead_to_its_documents(package: Package) -> None:
    folder = package.root / "usr/share/doc/rebpf"
    links = set(re.findall(r"\]\((docs/\w+\.md)", (folder / "README.md").read_text()))
    assert links
    assert [link for link in sorted(links) if not (folder / link).is_file()] == []


def test_the_flink_example_prints_its_tables_from_the_schemas_of_the_package(package: Package) -> None:
    examples = package.root / "usr/share/doc/rebpf/examples/flink"
    done = subprocess.run([sys.executable, "-B", examples / "ddl.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (examples / "tables.sql").read_text()


def test_its_files_are_those_of_the_tree(package: Package) -> None:
    assert (package.root / UNIT).read_bytes() == (ROOT / "deploy/systemd/rebpf.service").read_bytes()
    assert (package.root / ALERT_UNIT).read_bytes() == (ROOT / "deploy/systemd/rebpf-alert.service").read_bytes()
    assert (package.root / DROP_IN).exists() == (SUITES[package.suite]["systemd"] >= 254)
    ours = _files(package.private / "producer")
    assert ours.pop("_native.abi3.so").startswith(b"\x7fELF")
    sources = {
        str(path.relative_to(ROOT / "producer")): path.read_bytes()
        for path in ROOT.glob("producer/**/*.py*")
        if path.suffix != ".pyc"
    }
    data = {f"data/{name}/{file}": text for name in ("bpf", "schemas") for file, text in _files(ROOT / name).items()}
    assert ours == sources | data


def test_each_requirement_of_its_python_packages_is_met(package: Package) -> None:
    suite = SUITES[package.suite]
    theirs = dict(line.split() for line in suite["debian"].values())
    own = {dist.name: dist for dist in distributions(path=[str(package.private)])}
    versions = {canonicalize_name(name): dist.version for name, dist in own.items()} | theirs
    environment = {"python_version": suite["python"], "python_full_version": f"{suite['python']}.0", "extra": ""}
    wanted = [each for dist in own.values() for each in _requirements(dist, environment)]
    unmet = [str(each) for each in wanted if not _meets(versions.get(canonicalize_name(each.name)), each)]
    assert unmet == [], "run deploy/packaging/lock, or fix suites.toml"


def _requirements(dist: Distribution, environment: dict[str, str]) -> Iterator[Requirement]:
    for requirement in map(Requirement, dist.requires or []):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement


def _meets(version: str | None, requirement: Requirement) -> bool:
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def test_the_packages_of_the_release_are_depended_on_and_the_compiler_is_recommended(package: Package) -> None:
    def field(name: str) -> list[str]:
        command = ["dpkg-deb", "--field", str(package.path), name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")

    assert set(field("Depends")) >= {"libbpf1 (>= 1:1.0)", *SUITES[package.suite]["debian"]}
    assert "python3-bpfcc" not in field("Depends")
    assert "python3-bpfcc" in field("Recommends")


def test_the_manual_pages_are_set_without_a_warning(package: Package) -> None:
    if not shutil.which("groff"):
        pytest.skip("NO GROFF (lintian brings it; scripts/setup --tests installs that)")
    for page in package.root.glob("usr/share/man/man*/*.gz"):
        text = gzip.decompress(page.read_bytes())
        done = subprocess.run(["groff", "-man", "-ww", "-Tutf8"], input=text, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b""), page
        assert b"rebpf" in done.stdout


def test_the_manual_page_has_each_command_and_option(package: Package) -> None:
    page = gzip.decompress((package.root / "usr/share/man/man1/rebpf.1.gz").read_bytes()).decode().replace("\\-", "-")
    for path, command in _commands(rebpf, ()):
        section = page.partition(f".SS {' '.join(path)}\n")[2].partition("\n.SS ")[0].partition("\n.SH ")[0]
        assert section, path
        for option in (each for each in command.params if isinstance(each, click.Option)):
            assert all(name in section for name in option.opts), (path, option.opts)
    filters = page.partition(".SH FILTERS\n")[2].partition("\n.SH ")[0]
    assert "cwnd" in filters


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))


def test_bash_completes_a_command(package: Package, tmp_path: Path) -> None:
    # The release's click is not installed here; the tools include the same version.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "tools")]
    subprocess.run([*pip, "--requirement", str(PACKAGING / "tools.lock")], check=True)
    program = tmp_path / "rebpf"
    program.write_text(
        f"#!{sys.executable} -IS\n"
        f"import sys; sys.path += {[str(tmp_path / 'tools'), str(package.private)]}\n"
        "from producer.cli.main import main; main()\n"
    )
    program.chmod(0o755)
    script = package.root / "usr/share/bash-completion/completions/rebpf"
    words = f"source {script}; COMP_WORDS=(rebpf sp); COMP_CWORD=1; _rebpf_completion rebpf; echo ${{COMPREPLY[@]}}"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    # `complete -o nosort` and the like only work in interactive shells.
    done = subprocess.run(["bash", "-c", words], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["spool"], done.stderr


def test_its_configuration_is_refused_until_brokers_are_set_in_it(package: Package, tmp_path: Path) -> None:
    file = package.root / "etc/rebpf/rebpf.toml"
    text = file.read_text()
    number = next(number for number, line in enumerate(text.splitlines(), 1) if line.startswith("brokers"))
    with pytest.raises(ConfigError, match=rf"line {number}: kafka\.brokers"):
        load.load(file)
    changed = tmp_path / "rebpf.toml"
    changed.write_text(text.replace('brokers = ""', 'brokers = "a:9092"'))
    assert load.load(changed) == load.Config().with_values(kafka__brokers="a:9092")


def test_the_commented_settings_of_its_configuration_are_valid(package: Package, tmp_path: Path) -> None:
    _, _, settings = (package.root / "etc/rebpf/rebpf.toml").read_text().partition("\n\n")
    changed = tmp_path / "rebpf.toml"
    changed.write_text(settings.replace('brokers = ""', 'brokers = "a:9092"').replace("\n#", "\n"))
    loaded = load.load(changed)
    assert loaded.kafka.settings == {"security.protocol": "SASL_SSL"}
    assert loaded.registry.url == "https://registry.example:8081"


def test_the_same_input_gives_the_same_bytes(package: Package, tmp_path: Path) -> None:
    again = _build(package.suite, tmp_path, umask=0o077, TZ="Asia/Tokyo", LC_ALL="C", PYTHONHASHSEED="1")
    assert again.name == package.path.name
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (package.path, again)]
    assert digests[0] == digests[1]
