"""The child process that compiles, loads and attaches, and passes the file descriptors to the agent.

LLVM takes about 150 MB of resident memory, which the agent must not hold, and bcc belongs to the system's Python. So
this module runs in a separate process, on a Python (3.10 or later) that has bcc. Standard library and bcc only. Cached
programs are loaded without bcc and LLVM (producer.kernel.program_cache).

The protocol, JSON packets over a Unix socket: the agent sends a request. The child answers with what it loaded and the
descriptors of maps and programs. The agent fills the maps and sends ATTACH. The child answers with the links'
descriptors and exits. An answer with "error" is the last. The first descriptor of each answer is a file with the output
of compiler and verifier.
"""

import ctypes
import errno
import json
import os
import socket
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from producer.errors import HookError, RebpfError, UnavailableError
from producer.host import capabilities
from producer.host.cgroups import cgroup2_root
from producer.kernel import bpf_syscall, hooks, program_cache, program_files, source
from producer.kernel.btf import VMLINUX, Btf
from producer.kernel.features import Features, machine
from producer.kernel.program_cache import Compiled, ProgramCache
from producer.kernel.program_files import ProgramFiles

MAPS = (
    "transmit_pipe",
    "retransmit_pipe",
    "flow_pipe",
    "flow_states",
    "counters",
    "own_sockets",
    "own_listeners",
    "rules_active",
    "rule_generations",
    "rule_actions",
    "rule_prefixes",
    "rule_addresses",
    "rule_port_classes",
    "rule_ports",
    "rule_values",
    "rule_sets",
    "transmit_budget",
)
ATTACH = {"do": "attach"}
BCC_MISSING = "bcc is missing: install the package python3-bpfcc (Debian, Ubuntu) or python3-bcc (Fedora, RHEL)"
NO_RING_BUFFER = "this kernel cannot create a BPF ring buffer: ReBPF needs Linux 5.10 or later"
FEW_DESCRIPTORS = "too few file descriptors: raise LimitNOFILE= of the unit, or ulimit -n"
PACKET_BYTES = 1 << 16
_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
"""bcc's names for the processors that it can compile for, whichever it runs on."""
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9


class _LoggedError(HookError):
    """A HookError with the output of the compiler or the verifier."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


class _NoCompiler(UnavailableError):
    """bcc is missing."""


class _HookFailed(Exception):
    """The verifier rejected a program although its hook works. `stream` is None for the probe of own sockets."""

    def __init__(self, stream: str | None, error: bpf_syscall.VerifierError) -> None:
        super().__init__(str(error))
        self.stream, self.log = stream, error.log


def main(descriptor: int, parent: int) -> None:
    """Serve the agent, process `parent`, over the socket `descriptor`. Never outlive it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        return
    with socket.socket(fileno=descriptor) as channel:
        try:
            _serve(channel, json.loads(channel.recv(PACKET_BYTES)))
        except Exception as error:  # whatever it is, report it to the agent
            _answer_error(channel, error)


def _answer_error(channel: socket.socket, error: Exception) -> None:
    # The agent knows the classes in producer.errors, but not the subclasses here.
    kind = next((each.__name__ for each in type(error).__mro__ if each.__module__ == RebpfError.__module__), "")
    message, log = str(error), error.log if isinstance(error, _LoggedError) else ""
    if _is_short_of_descriptors(error):
        kind, message = "UnavailableError", FEW_DESCRIPTORS
    elif not kind:  # a defect
        kind, message = "HookError", f"the loader failed: {type(error).__name__}: {error}"
        log = "".join(traceback.format_exception(error))
    _answer(channel, {"error": message, "kind": kind}, log)


def _is_short_of_descriptors(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        if isinstance(error, _LoggedError) and os.strerror(errno.EMFILE) in error.log:
            return True
        error = error.__cause__ or error.__context__
    return False


def _serve(channel: socket.socket, request: Mapping[str, Any]) -> None:
    capabilities.require_loading()
    bpf_syscall.check_machine()
    btf = Btf.load(Path(request["btf"] or VMLINUX))
    if request["do"] == "compile":
        _compile_all(channel, request, btf)
        return
    kernel = hooks.Kernel(btf, Features.find(btf), cgroup2_root(), keeps=request["keeps"])
    if not kernel.features.ring_buffer:
        raise UnavailableError(NO_RING_BUFFER)
    loaded = _Loaded(request, kernel)
    counted = [(stream, program) for stream, probe, program in loaded.programs if stream and probe.captures]
    answer = {
        "hooks": {stream: hook.name for stream, hook in loaded.chosen.items()},
        "refusals": [[r.stream, r.hook, r.reason] for r in loaded.refusals],
        "maps": list(MAPS),
        "programs": [stream for stream, _ in counted],
        "cached": loaded.cached,
        "programs_from": str(loaded.programs_from or ""),
        "warnings": loaded.warnings,
    }
    _answer(channel, answer, loaded.log, [*loaded.maps, *(program for _, program in counted)])
    if not channel.recv(PACKET_BYTES):  # closed by the agent; otherwise ATTACH
        return
    links: list[int] = []
    iterators: list[int] = []
    for _, probe, program in loaded.programs:
        try:
            link = hooks.attach(probe, program, kernel, loaded.maps[MAPS.index("flow_states")])
            if probe.runs_once:
                for _ in bpf_syscall.run_iterator(link):
                    pass
                continue
        except (OSError, LookupError) as error:
            raise HookError(f"{probe.program} was loaded but cannot be attached: {error}") from error
        if probe.runs_on_demand:
            iterators.append(len(links))
        links.append(link)
    _answer(channel, {"iterators": iterators}, "", links)


def _compile_all(channel: socket.socket, request: Mapping[str, Any], btf: Btf) -> None:
    """Compile for the kernel of a BTF, and answer with a descriptor of the file's content."""
    features = Features.expected(btf)
    if machine(btf) not in _ARCHITECTURES:
        raise UnavailableError(
            f"the BTF belongs to a kernel for {machine(btf)}: ReBPF runs on {' and '.join(_ARCHITECTURES)}"
        )
    if not features.ring_buffer:
        raise UnavailableError("the BTF belongs to a kernel without BPF ring buffers: ReBPF needs Linux 5.10 or later")
    identity = _identity(request, btf, features)
    kernel = hooks.Kernel(btf, features, None, keeps=False)
    programs = {}
    for chosen in hooks.combinations(features):
        unit = _Unit(request, kernel, chosen)
        programs[unit.combination] = unit.compile()
    file = os.memfd_create("programs")
    with open(file, "wb", closefd=False) as writer:
        writer.write(program_files.packed(identity, programs))
    _answer(channel, {"combinations": len(programs)}, "", [file])


def _identity(request: Mapping[str, Any], btf: Btf, features: Features) -> program_files.Identity:
    return program_files.Identity.of(request["version"], Path(request["bpf"]), request["layout_check"], btf, features)


class _Loaded:
    """The loaded programs of the streams, with the best hooks whose programs load."""

    def __init__(self, request: Mapping[str, Any], kernel: hooks.Kernel) -> None:
        self._kernel = kernel
        self._hz = bpf_syscall.jiffies_per_second()
        self.chosen: dict[str, hooks.Hook] = {}
        self.refusals: list[hooks.Refusal] = []
        self.log = ""
        self._ring_bytes: Mapping[str, int] = request["ring_bytes"]
        self.programs_from: Path | None = None
        self.warnings: list[str] = []
        cache = ProgramCache(Path(request["cache"]) if request["cache"] else None)
        path = Path(request["programs"]) if request["programs"] else None
        files = ProgramFiles(path, _identity(request, kernel.btf, kernel.features))
        allowed = {stream: list(request["hooks"]) for stream in request["streams"]}
        if "flow" in allowed:
            allowed["flow"] = [hook.name for hook in hooks.HOOKS_BY_STREAM["flow"]]
        while True:
            self._choose(allowed)
            try:
                self._load(request, files, cache)
                break
            except _HookFailed as failed:
                if failed.stream is None:
                    raise _LoggedError(
                        f"the kernel rejects the program that tracks own sockets: {failed}", failed.log
                    ) from failed
                hook = self.chosen[failed.stream].name
                self.log += f"{failed.stream} {hook}:\n{failed.log}\n"
                self.refusals.append(hooks.Refusal(failed.stream, hook, str(failed)))
                allowed[failed.stream].remove(hook)
        if path and not self.programs_from:
            self.warnings.append(f"compiled programs: {files.none_fits()}")
        self.warnings += cache.warnings
        if "flow" in self.chosen and not kernel.features.iterators:
            self.warnings.append(hooks.NO_ITERATORS)

    def _choose(self, allowed: Mapping[str, list[str]]) -> None:
        known = {(refusal.stream, refusal.hook) for refusal in self.refusals}
        for stream in allowed:
            transmits = self.chosen.get("transmit")
            hook, refused = hooks.choose(stream, allowed[stream], self._kernel, transmits.name if transmits else None)
            self.refusals += [refusal for refusal in refused if (stream, refusal.hook) not in known]
            if hook is None:
                raise self._no_hook(stream)
            self.chosen[stream] = hook

    def _load(self, request: Mapping[str, Any], files: ProgramFiles, cache: ProgramCache) -> None:
        unit = _Unit(request, self._kernel, self.chosen)
        self.cached, rejected = False, self._load_file(unit, files)
        if self.programs_from:
            return
        self.cached = self._load_cached(unit, cache)
        if not self.cached:
            try:
                fresh = unit.compile()
            except _NoCompiler as missing:
                if rejected:  # another hook may work
                    raise rejected from missing
                raise UnavailableError("; ".join(filter(None, [BCC_MISSING, files.none_fits()]))) from missing
            self._load_programs(fresh)
            cache.put(unit.key, fresh, program_cache.compiler())

    def _load_file(self, unit: "_Unit", files: ProgramFiles) -> _HookFailed | None:
        """Load the programs of a file that fits; return why the kernel rejects them, if it does."""
        found = files.find(unit.combination)
        if found is None or not unit.is_whole_in(found):
            return None
        try:
            self._load_programs(found)
        except _HookFailed as rejected:
            files.refusals.append(f"{files.fitting}: rejected by the kernel: {rejected}")
            return rejected
        self.programs_from = files.fitting
        return None

    def _load_cached(self, unit: "_Unit", cache: ProgramCache) -> bool:
        cached = cache.find(unit.key)
        if cached is None:
            return False
        if not unit.is_whole_in(cached):
            cache.drop(unit.key, "maps or programs are missing")
            return False
        try:
            self._load_programs(cached)
        except _HookFailed as refused:
            cache.drop(unit.key, f"rejected by the kernel: {refused}")
            return False
        return True

    def _load_programs(self, code: Compiled) -> None:
        try:
            maps = code.create_maps(self._ring_bytes)
        except OSError as error:
            raise HookError(f"cannot create the maps of the BPF programs: {error.strerror}") from error
        self.maps = maps[: len(MAPS)]
        attached = [(stream, probe) for stream, hook in self.chosen.items() for probe in hook.probes]
        self.programs: list[tuple[str | None, hooks.Probe, int]] = []
        for stream, probe in [(None, hooks.OWN_SOCKETS), (None, hooks.OLD_SOCKETS), *attached]:
            try:
                instructions = code.instructions(probe.program, maps, self._hz)
                program = hooks.load(probe, instructions, self._kernel.btf)
            except bpf_syscall.VerifierError as error:
                if probe == hooks.OLD_SOCKETS:
                    self.log += f"{probe.program}:\n{error.log}\n"
                    continue
                bpf_syscall.close_all([*maps, *(loaded for *_, loaded in self.programs)])
                raise _HookFailed(stream, error) from error
            self.programs.append((stream, probe, program))

    def _no_hook(self, stream: str) -> _LoggedError:
        reasons = "; ".join(f"{r.hook}: {r.reason}" for r in self.refusals if r.stream == stream)
        return _LoggedError(f"no hook for {stream}s can be attached on this host: {reasons}", self.log)


class _Unit:
    """The input of one compilation, and the compilation itself."""

    def __init__(self, request: Mapping[str, Any], kernel: hooks.Kernel, chosen: Mapping[str, hooks.Hook]) -> None:
        folder = Path(request["bpf"])
        names = {stream: hook.name for stream, hook in chosen.items()}
        flags = [*source.hook_macros(names), *source.kernel_macros(kernel.btf, kernel.features)]
        self._text = source.program_text(folder, kernel.btf, request["layout_check"])
        self._flags = [*flags, "-Wno-unused-function"]
        probes = [*(probe for hook in chosen.values() for probe in hook.probes), hooks.OWN_SOCKETS, hooks.OLD_SOCKETS]
        self._programs = [probe.program for probe in probes]
        self._shim = folder / "shim"
        self._architecture = _ARCHITECTURES.get(machine(kernel.btf))
        self.combination = program_files.combination(names)
        self.key = program_cache.key(self._shim, self._text, self._flags, self._programs, MAPS)

    def is_whole_in(self, code: Compiled) -> bool:
        """Whether `code` has all maps and programs."""
        return len(code.maps) >= len(MAPS) and set(self._programs) <= set(code.programs)

    def compile(self) -> Compiled:
        """Compile. The maps in MAPS come first."""
        os.environ["BCC_KERNEL_SOURCE"] = str(self._shim)
        if self._architecture:
            os.environ["ARCH"] = self._architecture
        try:
            import bcc
        except ImportError as error:
            raise _NoCompiler(BCC_MISSING) from error
        # LLVM writes its messages only to file descriptor 2.
        with open(os.memfd_create("messages"), "rb") as messages:  # no disk is needed
            saved = os.dup(2)
            os.dup2(messages.fileno(), 2)
            try:
                module = bcc.BPF(text=self._text.encode(), cflags=self._flags)
            except Exception as error:
                messages.seek(0)
                raise _compile_error(messages.read().decode(errors="replace")) from error
            finally:
                os.dup2(saved, 2)
                os.close(saved)
        # bcc's maps only serve as a description: the real ones are created the same way with and without the cache.
        try:
            programs = {name: module.dump_func(name.encode()) for name in self._programs}
            maps = [bcc.lib.bpf_table_fd(module.module, name.encode()) for name in MAPS]
            return Compiled.from_loaded(programs, maps)
        finally:
            module.cleanup()


def _compile_error(log: str) -> _LoggedError:
    first = next((line for line in log.splitlines() if "error:" in line), "no message")
    return _LoggedError(f"the BPF programs do not compile here: {first.strip()}", log)


def _answer(channel: socket.socket, answer: Mapping[str, Any], log: str, descriptors: list[int] | None = None) -> None:
    log_file = os.memfd_create("log")
    with open(log_file, "wb") as file:
        file.write(log.encode())
        file.flush()
        socket.send_fds(channel, [json.dumps(answer).encode()], [log_file, *(descriptors or [])])
