"""A real Docker engine with Compose, from Debian packages unpacked into the cache.

Its images, containers and mounts are in its folder and in a mount namespace. It creates no bridge and no firewall
rules: containers use the host's network, or none. It may have no access to an image registry, so debootstrap makes the
base image.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.servers.fetch import cached
from tests.support.servers.process import ServerProcess
from tests.support.vm.guest import TIED
from tests.support.vm.kernels import KEYRINGS, apt_options, debian_mirror

# bookworm has Compose v1, and its engine does not know CAP_BPF.
_SUITE = "trixie"
_PACKAGES = ("containerd", "docker-buildx", "docker-cli", "docker-compose", "docker.io")
# From this machine's release: it is the only one that needs a newer libc than bookworm's.
_OWN_PACKAGES = ("runc",)
PLUGINS = "usr/libexec/docker/cli-plugins"
"""Folder of Compose and buildx, below programs(); they also run standalone."""


def refusal() -> str | None:
    """Return why no engine can be started here, or None if it can."""
    if os.geteuid() != 0:
        return "not root"
    programs = ("apt-get", "debootstrap", "dpkg", "setpriv", "unshare")
    absent = [program for program in programs if not shutil.which(program)]
    return f"no {', '.join(absent)} (scripts/setup --tests installs them)" if absent else None


def programs() -> Path:
    """Return the folder with the engine's programs; LookupError if apt has no Debian mirror."""
    return cached("docker", _fill_programs)


def compose() -> Path:
    """Return the Compose program, whose `config` needs no engine."""
    return programs() / PLUGINS / "docker-compose"


def base(suite: str) -> Path:
    """Return a tar file of a suite's minimal system."""
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
    # In new namespaces, so that its mounts disappear with it, however it ends.
    _run(*TIED, "debootstrap", *options, suite, str(root), debian_mirror())
    # As in Debian's images: do not sync to disk for each package.
    (root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")
    without = ("./var/cache/apt/archives/*.deb", "./var/lib/apt/lists/*", "./dev/*")
    _run("tar", "-C", str(root), *(f"--exclude={each}" for each in without), "-cf", str(part / "base.tar"), ".")
    shutil.rmtree(root)


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


class DockerEngine(ServerProcess):
    """An engine with all its data in its folder, whose path must be short, since it contains a socket."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "dockerd")
        self._socket = f"unix://{folder / 'socket'}"
        self._cgroup = f"rebpf-docker-{os.getpid()}"

    def command(self) -> Sequence[str]:
        plugins = self.folder / "client/cli-plugins"
        plugins.mkdir(parents=True, exist_ok=True)
        for plugin in (programs() / PLUGINS).iterdir():
            (plugins / plugin.name).symlink_to(plugin)
        # SIGKILL would leave containerd and its children running, so stop the engine with SIGTERM when we die.
        tied = ("setpriv", "--pdeathsig", "TERM", "unshare", "--mount", "env", f"PATH={self._path()}")
        places = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
        folders = (f"--{option}={self.folder / name}" for option, name in places.items())
        network = ("--bridge=none", "--iptables=false", "--ip6tables=false")
        cgroup = ("--exec-opt=native.cgroupdriver=cgroupfs", f"--cgroup-parent=/{self._cgroup}")
        return [*tied, "dockerd", f"--host={self._socket}", *folders, *network, *cgroup]

    def is_ready(self) -> bool:
        return self._docker("version", environment={}).returncode == 0

    def docker(self, *words: str, environment: Mapping[str, str] | None = None, status: int = 0) -> str:
        """Run a Docker command, which must exit with `status`; return its standard output."""
        done = self._docker(*words, environment=environment or {}, timeout_s=800)  # a build downloads packages
        assert done.returncode == status, f"docker {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def stop(self) -> None:
        """Stop the engine and its containers, and remove the cgroups that it leaves."""
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
