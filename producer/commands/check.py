"""What this host offers a producer, and what is missing with what mends it: the answers of `rebpf check`."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from producer.commands.check_servers import kafka, registry
from producer.commands.finding import Finding
from producer.config.load import Config, placed
from producer.errors import BusyError, ConfigError, HookError, PermissionDenied, RebpfError, UnavailableError
from producer.health.web_config import WebSettings
from producer.host import capabilities
from producer.host.state import check_owners, is_locked, pid
from producer.kafka.librdkafka import Producer
from producer.kafka.sink import producer_settings
from producer.kernel import bpf_syscall
from producer.kernel.btf import VMLINUX, Btf
from producer.kernel.hooks import HOOKS_BY_STREAM, cgroup2_root, refusal
from producer.kernel.loader import python_with_bcc
from producer.registry.client import RegistryClient
from producer.rules.resolve import resolve

LOCKDOWN = Path("/sys/kernel/security/lockdown")
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
_LEAST_BCC = (0, 26)  # the oldest that the programs are compiled with in tests
_MIB = 1 << 20
_PARANOID_FOR_ROOT = 3


def examine(config: Config, *, path: Path | None = None, servers: bool = True) -> list[Finding]:
    """Examine this host, and the servers if wanted, for `config`; leaves nothing attached and nothing written.

    `path` is the file that `config` was read from, so that what is wrong there is found.
    """
    findings = [
        *settings(config, path),
        *_kernel(config),
        *_python(),
        *_folders(config),
        *_endpoint(config),
        *_others(config),
    ]
    found = {finding.subject for finding in findings}  # what no client would take is found above
    if servers and "kafka.settings" not in found:
        findings += kafka(config)
    if servers and not found & {"kafka.settings", "registry"}:
        findings += registry(config)
    return findings


def settings(config: Config, path: Path | None = None) -> Iterator[Finding]:
    """Make what a producer makes of its settings before it touches the kernel or a server."""
    try:
        with placed(path):
            client = producer_settings(config.kafka.brokers, config.kafka.settings)
            # The client of `run`, without the brokers: it connects nowhere, or to the embedded one in this process.
            Producer({name: value for name, value in client.items() if name != "bootstrap.servers"}).close()
    except ConfigError as error:
        yield Finding("kafka.settings", str(error), error.exit_code)
    try:
        with placed(path):
            if config.registry.url is not None:
                RegistryClient(config.registry)
    except ConfigError as error:
        yield Finding("registry", str(error), error.exit_code)
    try:
        with placed(path):
            WebSettings(config.metrics.web_config_file)
    except ConfigError as error:
        yield Finding("metrics.web_config_file", str(error), error.exit_code)
    try:
        with placed(path):
            resolve(config, cgroup2_root()).tables()
    except RebpfError as error:
        yield Finding("rules", str(error), error.exit_code)
    else:
        yield Finding("rules", f"{len(config.rules)}" if config.rules else "none: no segment is left out by a rule")


def _kernel(config: Config) -> Iterator[Finding]:
    yield from _capabilities()
    yield from _lockdown(LOCKDOWN)
    yield from _perf_events(PARANOID, config.capture.hooks)
    root = cgroup2_root()
    mend = "mount -t cgroup2 none /sys/fs/cgroup, or another folder where that is taken"
    text = f"mounted at {root}" if root else f"not mounted, and the hook cgroup_skb needs it: {mend}"
    yield Finding("cgroup v2", text, there=root is not None)
    path = config.capture.btf or VMLINUX
    try:
        btf = Btf.load(path)
    except RebpfError as error:
        yield Finding("BTF", _with_path(path, str(error), own=config.capture.btf is None), error.exit_code)
        return
    except OSError as error:
        text = _with_path(path, error.strerror or str(error), own=config.capture.btf is None)
        yield Finding("BTF", text, UnavailableError.exit_code)
        return
    yield Finding("BTF", str(path))
    if not capabilities.missing(capabilities.LOADING):
        yield from _hooks(config, btf, root)


def _with_path(path: Path, text: str, *, own: bool) -> str:
    text = text if text.startswith(str(path)) else f"{path}: {text}"
    if own:
        return (
            f"{text}; distributions' kernels have it: apt install linux-image-$(dpkg --print-architecture), and reboot"
        )
    return f"{text}; or remove capture.btf, and the running kernel's is read"


def _capabilities() -> Iterator[Finding]:
    wanted = " ".join(capabilities.NAMES.values())
    mend = f"run as root, or grant them: systemctl edit rebpf, and below [Service] AmbientCapabilities={wanted}"
    missing = capabilities.missing()
    if capabilities.missing(capabilities.LOADING):
        yield Finding("capabilities", f"missing: {', '.join(missing)}; {mend}", PermissionDenied.exit_code)
    elif missing:
        text = f"missing: {', '.join(missing)}, and the hook cgroup_skb needs it; {mend}"
        yield Finding("capabilities", text, there=False)
    else:
        yield Finding("capabilities", "enough to load and attach BPF programs")


def _lockdown(path: Path) -> Iterator[Finding]:
    """Integrity lets BPF programs read the kernel's memory; confidentiality does not."""
    try:
        mode = path.read_text().partition("[")[2].partition("]")[0]
    except OSError:  # a kernel without it, or securityfs is not mounted: the hooks' trial says what is allowed
        return
    if mode == "confidentiality":
        mend = "boot with lockdown=integrity on the kernel's command line; a running kernel does not go back"
        yield Finding("lockdown", f"{path} is at {mode}: no BPF program may read; {mend}", HookError.exit_code)
    else:
        yield Finding("lockdown", mode)


def _perf_events(path: Path, hooks: Sequence[str]) -> Iterator[Finding]:
    """kprobes are perf events, which Debian's kernels at 3 and above give to nobody but root."""
    try:
        level = int(path.read_text())
    except OSError:  # a kernel without perf events: the trial of the hook says so
        return
    if level < _PARANOID_FOR_ROOT or "kprobe" not in hooks or capabilities.is_admin():
        return
    mend = f"sysctl kernel.perf_event_paranoid={_PARANOID_FOR_ROOT - 1}"
    text = f"{level}, and the kernel may refuse the hook kprobe to all but root; where it is wanted: {mend}"
    yield Finding("perf_event_paranoid", text, there=False)


def _hooks(config: Config, btf: Btf, root: Path | None) -> Iterator[Finding]:
    for stream, available in HOOKS_BY_STREAM.items():
        reasons = {hook.name: refusal(hook, btf, root) for hook in available if hook.name in config.capture.hooks}
        for hook, reason in reasons.items():
            yield Finding(f"{stream} by {hook}", reason or "possible", there=reason is None)
        if all(reasons.values()):
            wanted = ", ".join(config.capture.hooks)
            text = f"no hook is possible on this host of those that capture.hooks allows: {wanted}"
            yield Finding(stream, text, HookError.exit_code)


def _python() -> Iterator[Finding]:
    yield Finding("Python", sys.version.split()[0])
    try:
        python = python_with_bcc()
    except UnavailableError as error:
        yield Finding("bcc", str(error), error.exit_code)
        return
    done = subprocess.run(
        [python, "-I", "-c", "import bcc; print(bcc.__version__)"], capture_output=True, text=True, check=False
    )
    version = done.stdout.strip()
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        text = f"{python} has it and cannot import it: {said}; apt install --reinstall python3-bpfcc"
        yield Finding("bcc", text, UnavailableError.exit_code)
    elif _numbers(version) < _LEAST_BCC:
        least = ".".join(map(str, _LEAST_BCC))
        text = f"{version} of {python} is too old, {least} is wanted: apt install python3-bpfcc of a newer release"
        yield Finding("bcc", text, UnavailableError.exit_code)
    else:
        yield Finding("bcc", f"{version}, found by {python}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _endpoint(config: Config) -> Iterator[Finding]:
    """Say where the endpoint cannot be had, without which a producer runs too."""
    if not config.metrics.listen or is_locked(config.state_dir):  # a producer that runs here has the port
        return
    host, _, port = config.metrics.listen.rpartition(":")
    host = host.strip("[]")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((host, int(port)))
    except OSError as error:
        text = f"{config.metrics.listen}: {error.strerror or error}; a producer would run without an endpoint: "
        yield Finding("metrics.listen", f"{text}set metrics.listen to a free address and port", warns=True)


def _folders(config: Config) -> Iterator[Finding]:
    problem = _unusable(config.state_dir) or _unsafe(config.state_dir)
    if problem:
        yield Finding("state_dir", problem, ConfigError.exit_code)
    else:
        yield Finding("state_dir", f"{config.state_dir} can be written")
        for name in ("spool", "quarantine"):
            problem = _unusable(config.state_dir / name)
            if problem:
                yield Finding(f"state_dir/{name}", problem, ConfigError.exit_code)
        yield _room(config)
    if config.capture.pin is not None:
        yield _pins(config.capture.pin)


def _unsafe(path: Path) -> str:
    """Say why root does not write into the folder; empty where it does."""
    try:
        check_owners(path)
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def _unusable(path: Path) -> str:
    """Say why this user cannot make or write the folder; empty where it can."""
    there = _nearest(path)
    user = os.geteuid()
    if not there.is_dir():
        return f"{there} is no folder: remove it, or set state_dir to another"
    if os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        return ""
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return f"{there} is read-only: mount -o remount,rw, or set state_dir to another folder"
    return f"{path} cannot be written by user {user}: install -d -m 0700 -o {user} {path}"


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest above it that exists."""
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def _room(config: Config) -> Finding:
    spool = config.spool
    wanted = spool.transmit_bytes + spool.retransmit_bytes + 2 * spool.quarantine_bytes
    disk = os.statvfs(_nearest(config.state_dir))
    taken = sum(_size(config.state_dir / name) for name in ("spool", "quarantine"))
    free = disk.f_bavail * disk.f_frsize + taken
    if free >= wanted:
        return Finding("spool", f"{config.state_dir} has room for the {wanted // _MIB} MiB that it may take")
    text = f"{config.state_dir} has room for {free // _MIB} MiB, and the spool may take {wanted // _MIB} MiB"
    return Finding("spool", f"{text}: lower spool.transmit_bytes and its like, or give it a larger disk", warns=True)


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a producer that runs has sent and deleted it
            size += path.lstat().st_size
    return size


def _pins(path: Path) -> Finding:
    there = _nearest(path)
    if not bpf_syscall.is_bpffs(there):
        text = f"{path} is not in a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf"
        return Finding("capture.pin", text, ConfigError.exit_code)
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        text = f"{path} cannot be written by user {os.geteuid()}: install -d -m 0700 -o {os.geteuid()} {path}"
        return Finding("capture.pin", text, ConfigError.exit_code)
    return Finding("capture.pin", f"{path} can be written")


def _others(config: Config) -> Iterator[Finding]:
    if is_locked(config.state_dir):
        text = f"another runs with state_dir {config.state_dir}: pid {pid(config.state_dir)}"
        yield Finding("producer", f"{text}; `rebpf status` says how it fares", BusyError.exit_code)
