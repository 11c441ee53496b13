"""`rebpf check`: whether this host can run the producer, with a fix for each problem."""

import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from producer import __version__
from producer.commands.check_servers import kafka, registry
from producer.commands.check_settings import SERVICE_USER, is_of_service, settings
from producer.commands.finding import Finding
from producer.config.load import Config
from producer.errors import BusyError, ConfigError, HookError, PermissionDenied, UnavailableError
from producer.events import FLOWS, HOOKS, STREAMS, layout_check
from producer.host import capabilities, endpoints
from producer.host.cgroups import ONLY_A_PART, cgroup2_root, is_part
from producer.host.clock import boot_id
from producer.host.exhausted import hidden
from producer.host.state import check_lock, check_locking, check_owners, is_locked, pid
from producer.kernel import bpf_syscall
from producer.kernel.btf import VMLINUX, Btf
from producer.kernel.features import Features
from producer.kernel.hooks import HOOKS_BY_STREAM, NO_ITERATORS, Kernel, choose, fitted, refusal
from producer.kernel.loader import check_descriptor_limit, python_with_bcc
from producer.kernel.loader_child import NO_RING_BUFFER
from producer.kernel.pinned import in_use, unusable
from producer.kernel.pinned import is_locked as is_locked_pins
from producer.kernel.program_files import Identity, ProgramFiles, combination
from producer.paths import BPF
from producer.spool.files import SPOOL_SUFFIX, files
from producer.spool.from_config import ledger_path, spool_bytes, spool_folder

LOCKDOWN = Path("/sys/kernel/security/lockdown")
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
_LEAST_BCC = (0, 26)  # the oldest version that is tested
_MIB = 1 << 20
_PARANOID_FOR_ROOT = 3


def examine(config: Config, *, path: Path | None = None, servers: bool = True) -> list[Finding]:
    """Check this host, and the servers if `servers` is set, for `config`. Attaches and writes nothing.

    `path` is the file of `config`, for the line numbers of problems.
    """
    kernel = list(_kernel(config))
    findings = [
        *settings(config, path),
        *kernel,
        *_python(needs_bcc=not any(finding.subject == "programs" and finding.available for finding in kernel)),
        *_descriptors(),
        *_folders(config),
        *_endpoint(config),
        *_kernel_files(),
        *_others(config),
    ]
    found = {finding.subject for finding in findings}  # invalid settings are reported above
    if servers and "kafka.settings" not in found:
        findings += kafka(config)
    if servers and not found & {"kafka.settings", "registry"}:
        findings += registry(config)
    return findings


def _kernel(config: Config) -> Iterator[Finding]:
    yield from _capabilities()
    yield from _lockdown(LOCKDOWN)
    yield from _perf_events(PARANOID, config.capture.hooks)
    root = cgroup2_root()
    fix = "mount -t cgroup2 none /sys/fs/cgroup, or on another folder if that one is in use"
    text = f"mounted at {root}" if root else f"not mounted, but the hook cgroup_skb needs it: {fix}"
    if root and is_part(root):
        yield Finding("cgroup v2", f"{root} has {ONLY_A_PART}", warns=True)
    else:
        yield Finding("cgroup v2", text, available=root is not None)
    path = config.capture.btf or VMLINUX
    try:
        btf = Btf.load(path)
    except UnavailableError as error:
        fix = "boot a kernel of the distribution: apt install linux-image-$(dpkg --print-architecture)"
        if config.capture.btf:
            fix = "or remove capture.btf to use the BTF of the running kernel"
        yield Finding("BTF", f"{error}; {fix}", error.exit_code)
        return
    yield Finding("BTF", str(path))
    try:
        bpf_syscall.check_machine()
    except UnavailableError as error:
        yield Finding("processor", str(error), error.exit_code)
        return
    if not capabilities.missing(capabilities.LOADING):
        yield from _hooks(config, btf, root)


def _capabilities() -> Iterator[Finding]:
    wanted = " ".join(capabilities.NAMES.values())
    fix = f"run as root, or run systemctl edit rebpf and add to [Service]: AmbientCapabilities={wanted}"
    missing = capabilities.missing()
    if capabilities.missing(capabilities.LOADING):
        yield Finding("capabilities", f"missing: {', '.join(missing)}; {fix}", PermissionDenied.exit_code)
    elif missing:
        text = f"missing: {', '.join(missing)}, which the hook cgroup_skb needs; {fix}"
        yield Finding("capabilities", text, available=False)
    else:
        yield Finding("capabilities", "sufficient to load and attach BPF programs")


def _lockdown(path: Path) -> Iterator[Finding]:
    """Check the lockdown mode: only confidentiality keeps BPF programs from reading kernel memory."""
    try:
        mode = path.read_text().partition("[")[2].partition("]")[0]
    except OSError:  # no lockdown, or securityfs is not mounted: loading the hooks shows what is allowed
        return
    if mode == "confidentiality":
        fix = "boot with lockdown=integrity on the kernel command line; a running kernel cannot lower it"
        text = f"{path} is {mode}, so BPF programs cannot read kernel memory; {fix}"
        yield Finding("lockdown", text, HookError.exit_code)
    else:
        yield Finding("lockdown", mode)


def _perf_events(path: Path, hooks: Sequence[str]) -> Iterator[Finding]:
    """Check perf events, which kprobes need: at level 3 and above, Debian kernels allow them to root only."""
    try:
        level = int(path.read_text())
    except OSError:  # no perf events: loading the hook shows it
        return
    if level < _PARANOID_FOR_ROOT or "kprobe" not in hooks or capabilities.is_admin():
        return
    fix = f"sysctl kernel.perf_event_paranoid={_PARANOID_FOR_ROOT - 1}"
    text = f"{level}, so the kernel may allow the hook kprobe to root only; to use it: {fix}"
    yield Finding("perf_event_paranoid", text, available=False)


def _hooks(config: Config, btf: Btf, root: Path | None) -> Iterator[Finding]:
    try:
        features = Features.find(btf)
    except PermissionDenied as error:
        yield Finding("BPF", str(error), error.exit_code)
        return
    kernel = Kernel(btf, features, root, keeps=config.capture.pin is not None)
    if not kernel.features.ring_buffer:
        yield Finding("ring buffer", NO_RING_BUFFER, UnavailableError.exit_code)
    for stream, allowed in _allowed(config).items():
        available = [hook for hook in HOOKS_BY_STREAM[stream] if hook.name in allowed]
        reasons = {hook.name: refusal(fitted(hook, kernel.features), kernel) for hook in available}
        for hook, reason in reasons.items():
            yield Finding(f"{stream} by {hook}", reason or "available", available=reason is None)
        if all(reasons.values()):
            text = f"this host supports none of the hooks in capture.hooks: {', '.join(config.capture.hooks)}"
            if stream == FLOWS.name:
                text = "this host cannot capture records of connections: set capture.flow = false"
            yield Finding(stream, text, HookError.exit_code)
        elif stream == FLOWS.name and not features.iterators:
            yield Finding("iterators", NO_ITERATORS, available=False)
    yield from _programs(config, kernel)


def _allowed(config: Config) -> dict[str, Sequence[str]]:
    """Return the allowed hooks of each captured stream."""
    return {each.name: HOOKS if each == FLOWS else config.capture.hooks for each in config.capture.streams}


def _programs(config: Config, kernel: Kernel) -> Iterator[Finding]:
    """Find the programs that a start would load instead of compiling."""
    if config.capture.programs is None:
        return
    chosen: dict[str, str] = {}
    for stream, allowed in _allowed(config).items():
        hook, _ = choose(stream, allowed, kernel, chosen.get("transmit"))
        if hook is None:  # reported above
            return
        chosen[stream] = hook.name
    files = ProgramFiles(
        config.capture.programs, Identity.of(__version__, BPF, layout_check(), kernel.btf, kernel.features)
    )
    if files.find(combination(chosen)):
        yield Finding("programs", f"{files.fitting} fits: {combination(chosen)}")
    else:
        text = f"{files.none_fits()}, or install bcc: then each start compiles"
        yield Finding("programs", text, available=False)


def _python(*, needs_bcc: bool) -> Iterator[Finding]:
    yield Finding("Python", sys.version.split()[0])
    if not needs_bcc:
        return
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
        reason = done.stderr.strip().rpartition("\n")[2]
        text = f"{python} cannot import it: {reason}; apt install --reinstall python3-bpfcc"
        yield Finding("bcc", text, UnavailableError.exit_code)
    elif _numbers(version) < _LEAST_BCC:
        least = ".".join(map(str, _LEAST_BCC))
        text = f"expected {least} or later, found {version} of {python}: install python3-bpfcc of a newer release"
        yield Finding("bcc", text, UnavailableError.exit_code)
    else:
        yield Finding("bcc", f"{version}, in {python}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _descriptors() -> Iterator[Finding]:
    try:
        check_descriptor_limit()
    except UnavailableError as error:
        yield Finding("descriptors", str(error), error.exit_code)


def _endpoint(config: Config) -> Iterator[Finding]:
    """Check that the endpoint can listen; the producer also runs without it."""
    if not config.metrics.listen or _is_running(config):  # the running producer has the port
        return
    host, port = endpoints.split(config.metrics.listen)
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((host, port))
    except OSError as error:
        text = f"{config.metrics.listen}: {error.strerror or error}; the producer would run without its endpoint: "
        yield Finding("metrics.listen", f"{text}set metrics.listen to a free address and port", warns=True)


def _folders(config: Config) -> Iterator[Finding]:
    problem = _unusable(config.state_dir) or _unsafe(config.state_dir)
    if os.geteuid() == 0 and is_of_service(config.state_dir):
        text = f"{config.state_dir} belongs to the service's user {SERVICE_USER}: the service can use it, but not root"
        yield Finding("state_dir", text, warns=True)
        yield _space(config)
    elif problem:
        yield Finding("state_dir", problem, ConfigError.exit_code)
    else:
        yield _lockable(config.state_dir)
        unusable_folders = list(_unusable_folders(config))
        yield from unusable_folders or _unreadable(config)
        yield _space(config)
    if config.capture.pin is not None:
        yield _pins(config, config.capture.pin)


def _lockable(path: Path) -> Finding:
    try:
        check_locking(_nearest(path))
    except UnavailableError as error:
        return Finding("state_dir", str(error), error.exit_code)
    except OSError:  # it may be entered, but not be read
        pass
    return Finding("state_dir", f"{path} is writable")


def _unusable_folders(config: Config) -> Iterator[Finding]:
    spooled = (f"spool/{stream.name}" for stream in STREAMS if spool_bytes(config, stream))
    for name in ("spool", "quarantine", *spooled):
        path = config.state_dir / name
        if os.path.isdir(path) and (problem := _unusable(path)):  # anything else is renamed at startup
            starts = name == "quarantine" or _is_read_only(path)  # degraded, and stores nothing there
            yield Finding(f"state_dir/{name}", problem, 0 if starts else ConfigError.exit_code, warns=starts)


def _unsafe(path: Path) -> str:
    """Return why root must not write to the folder, or why its lock cannot be opened; empty if neither applies."""
    try:
        check_owners(path)
        check_lock(path)
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def _unusable(path: Path) -> str:
    """Return why this user cannot create or write to the folder; empty if it can."""
    existing = _nearest(path)
    user = os.geteuid()
    if not existing.is_dir():
        return f"{existing} is not a folder: remove it, or set state_dir to another path"
    # The producer creates the folder with all its capabilities, and uses it with none.
    with capabilities.set_aside() if existing == path else contextlib.nullcontext():
        is_usable = os.access(existing, os.R_OK | os.W_OK | os.X_OK, effective_ids=True)
    if is_usable:
        return "" if _takes_files(existing) else f"{existing} cannot hold files: set state_dir to another folder"
    if _is_read_only(existing):
        return f"{existing} is read-only: mount -o remount,rw, or set state_dir to another folder"
    return f"{path} is not writable for user {user}: install -d -m 0700 -o {user} {path}"


def _is_read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _unreadable(config: Config) -> Iterator[Finding]:
    """Find files of an earlier run that the producer could not read, for example of another user."""
    user = os.geteuid()
    for stream in STREAMS:
        spooled = files(spool_folder(config, stream), SPOOL_SUFFIX) if spool_bytes(config, stream) else []
        for path in (ledger_path(config, stream), *spooled):
            with contextlib.suppress(FileNotFoundError):  # sent and deleted by a running producer
                status = path.lstat()
                # Not access(2): root gives up the right to read all files.
                if not status.st_mode & (stat.S_IRUSR if status.st_uid == user else stat.S_IRGRP | stat.S_IROTH):
                    text = f"{path} is not readable for user {user}: chown {user} {path} and chmod 600 {path}"
                    yield Finding("state_dir", text, UnavailableError.exit_code)
                    return


def _takes_files(folder: Path) -> bool:
    """Whether files can be created in a folder that is writable. The kernel's own file systems have no blocks."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))  # has no name and leaves no trace
    except OSError:  # not all file systems can
        return os.statvfs(folder).f_blocks > 0
    return True


def _nearest(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def _space(config: Config) -> Finding:
    spool = config.spool
    needed = sum(getattr(spool, f"{stream.name}_bytes") + spool.quarantine_bytes for stream in config.capture.streams)
    disk = os.statvfs(_nearest(config.state_dir))
    used = sum(_size(config.state_dir / name) for name in ("spool", "quarantine"))
    free = disk.f_bavail * disk.f_frsize + used
    if free >= needed:
        return Finding("spool", f"{config.state_dir} has enough space for the {needed // _MIB} MiB of [spool]")
    text = f"{config.state_dir} has space for {free // _MIB} MiB, but [spool] allows {needed // _MIB} MiB"
    return Finding("spool", f"{text}: lower the limits in [spool], or use a larger disk", warns=True)


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # sent and deleted by a running producer
            size += path.lstat().st_size
    return size


def _pins(config: Config, path: Path) -> Finding:
    existing = _nearest(path)
    if not bpf_syscall.is_bpffs(existing):
        text = f"{path} is not in a bpffs: mount -t bpf bpf /sys/fs/bpf"
        return Finding("capture.pin", text, ConfigError.exit_code)
    if why := unusable(path):
        return Finding("capture.pin", f"{path}: {why}", ConfigError.exit_code)
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
        text = f"{path} is not writable for user {os.geteuid()}: install -d -m 0700 -o {os.geteuid()} {path}"
        return Finding("capture.pin", text, ConfigError.exit_code)
    if existing == path and not _is_running(config) and is_locked_pins(path):
        return Finding("capture.pin", in_use(path), BusyError.exit_code)
    return Finding("capture.pin", f"{path} is writable")


def _kernel_files() -> Iterator[Finding]:
    for subject, read in (("boot id", boot_id), ("CPUs", bpf_syscall.possible_cpus)):
        try:
            read()
        except OSError as error:
            yield Finding(subject, hidden(error) or str(error), UnavailableError.exit_code)


def _others(config: Config) -> Iterator[Finding]:
    if _is_running(config):
        text = f"another producer runs with state_dir {config.state_dir}: pid {pid(config.state_dir)}"
        yield Finding("producer", f"{text}; see `rebpf status`", BusyError.exit_code)


def _is_running(config: Config) -> bool:
    with contextlib.suppress(PermissionDenied):  # the finding on state_dir says so
        return is_locked(config.state_dir)
    return False
