"""A real Docker engine, with Compose: Debian's packages, unpacked into the cache and never installed.

Its images, containers and mounts are in a folder of its own and in a mount namespace. It makes no bridge and no rule of
a firewall: containers are on the host's network, or on none. It can pull no image where there is no way to a registry,
so that the base image is made by debootstrap.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.servers.fetch import cached
from tests.servers.process import ServerProcess
from tests.vm.guest import TIED
from tests.vm.kernels import KEYRINGS, apt_options, debian_mirror

# bookworm's Compose is of the first generation, and its engine does not know CAP_BPF.
_SUITE = "trixie"
_PACKAGES = ("containerd", "docker-buildx", "docker-cli", "docker-compose", "docker.io")
# Of this machine's own release: the only one that takes more of libc than bookworm's has.
_OWN_PACKAGES = ("runc",)
PLUGINS = "usr/libexec/docker/cli-plugins"
"""Where Compose and BuildKit's client are, below programs(); they run by themselves too."""


def refusal() -> str | None:
    """Return why no engine can be started here, or None if it can."""
    if os.geteuid() != 0:
        return "not root"
    programs = ("apt-get", "debootstrap", "dpkg", "setpriv", "unshare")
    absent = [program for program in programs if not shutil.which(program)]
    return f"no {', '.join(absent)} (scripts/setup --tests installs them)" if absent else None


def programs() -> Path:
    """Return the folder with the engine's programs; LookupError where apt knows no Debian mirror."""
    return cached("docker", _fill_programs)


def compose() -> Path:
    """Return the program of Compose, which needs no engine for its `config`."""
    return programs() / PLUGINS / "docker-compose"


def base(suite: str) -> Path:
    """Return a tar file of a suite's smallest system."""
    return cached(f"docker-base-{suite}", lambda part: _fill_base(suite, part)) / "base.tar"


def _fill_programs(part: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".docker-", dir=part.parent) as name:
        work = Path(name)
        options = apt_options(_SUITE, work)
        _run("apt-get", "-qq", *options, "update", cwd=work)
        _run("apt-get", "-qq", *options, "download", *_PACKAGES, cwd=work)
        _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *_OWN_PACKAGES, cwd=work)
        for package in work.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(part))


def _fill_base(suite: str, part: Path) -> None:
    root = part / "root"
    options = ("--variant=minbase", f"--keyring={KEYRINGS / 'debian-archive-keyring.gpg'}")
    # In namespaces of its own: the file systems that it mounts in there go with it, whatever ends it.
    _run(*TIED, "debootstrap", *options, suite, str(root), debian_mirror())
    # As in Debian's own images: no package waits for the disk.
    (root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")
    without = ("./var/cache/apt/archives/*.deb", "./var/lib/apt/lists/*", "./dev/*")
    _run("tar", "-C", str(root), *(f"--exclude={each}" for each in without), "-cf", str(part / "base.tar"), ".")
    shutil.rmtree(root)


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


class DockerEngine(ServerProcess):
    """An engine with all that it keeps in its folder, whose path must be short: a socket is in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "dockerd")
        self._socket = f"unix://{folder / 'socket'}"
        self._cgroup = f"rebpf-docker-{os.getpid()}"

    def command(self) -> Sequence[str]:
        plugins = self.folder / "client/cli-plugins"
        plugins.mkdir(parents=True, exist_ok=True)
        for plugin in (programs() / PLUGINS).iterdir():
            (plugins / plugin.name).symlink_to(plugin)
        # A KILL would leave containerd and what runs below it: with us, the engine ends in good order too.
        tied = ("setpriv", "--pdeathsig", "TERM", "unshare", "--mount", "env", f"PATH={self._path()}")
        places = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
        folders = (f"--{option}={self.folder / name}" for option, name in places.items())
        network = ("--bridge=none", "--iptables=false", "--ip6tables=false")
        cgroup = ("--exec-opt=native.cgroupdriver=cgroupfs", f"--cgroup-parent=/{self._cgroup}")
        return [*tied, "dockerd", f"--host={self._socket}", *folders, *network, *cgroup]

    def is_ready(self) -> bool:
        return self._docker("version", environment={}).returncode == 0

    def docker(self, *words: str, environment: Mapping[str, str] | None = None, status: int = 0) -> str:
        """Run a command of Docker's, which must end with `status`; return its standard output."""
        done = self._docker(*words, environment=environment or {}, timeout_s=800)  # a build downloads packages
        assert done.returncode == status, f"docker {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def stop(self) -> None:
        """End the engine and its containers; their cgroups, which it leaves, go too."""
        if self.is_running:
            for container in self._docker("ps", "--quiet", "--all", environment={}).stdout.split():
                self._docker("rm", "--force", "--volumes", container, environment={})
        super().stop()
        for root in Path("/sys/fs/cgroup").glob(f"**/{self._cgroup}"):
            for folder, _, _ in os.walk(root, topdown=False):
                os.rmdir(folder)

    def _docker(
        self, *words: str, environment: Mapping[str, str], timeout_s: float = 300
    ) -> "subprocess.CompletedProcess[str]":
        own = {"PATH": self._path(), "DOCKER_HOST": self._socket, "DOCKER_CONFIG": str(self.folder / "client")}
        command = [str(programs() / "usr/bin/docker"), *words]
        return subprocess.run(
            command,
            env={**os.environ, **own, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def _path(self) -> str:
        return os.pathsep.join([*(str(programs() / each) for each in ("usr/sbin", "usr/bin")), os.environ["PATH"]])
