"""The child process that compiles, loads and attaches, and hands the file descriptors to the agent.

LLVM costs some 150 MB of resident memory that the agent must not keep, and bcc lives in the system's Python. So this module
runs in a process of its own, on a Python that has bcc; standard library and bcc only.

Over a Unix socket of packets, JSON each: the agent sends a Request; the child answers with what it loaded, and the descriptors
of maps and programs; the agent fills the maps and sends "attach"; the child answers with the links' descriptors and exits.
An answer with "error" in it is the last.
"""

import json
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from producer import rungs, source, sysbpf
from producer.btf import VMLINUX, Btf
from producer.errors import HookError, PermissionDenied, RebpfError, UnavailableError

MAPS = ("transmit_pipe", "retransmit_pipe", "counters", "addresses", "ports", "own_sockets", "own_listeners")
PACKET_BYTES = 1 << 18
_LOG_BYTES = 1 << 16


class LoadError(Exception):
    """One rung's program did not compile or load; `log` is the compiler's or the verifier's."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


def main(descriptor: int) -> None:
    """Serve one agent over the socket `descriptor`."""
    with socket.socket(fileno=descriptor) as channel:
        try:
            _serve(channel, json.loads(channel.recv(PACKET_BYTES)))
        except RebpfError as error:
            _answer(channel, {"error": str(error), "kind": type(error).__name__, "log": getattr(error, "log", "")})


def _serve(channel: socket.socket, request: Mapping[str, Any]) -> None:
    if os.geteuid() != 0 and not _may_load():
        raise PermissionDenied("loading BPF programs needs root, or the capabilities CAP_BPF and CAP_PERFMON")
    btf = Btf.load(Path(request["btf"] or VMLINUX))
    root = rungs.cgroup2_root()
    chosen, programs, maps, refusals = _load(request, btf, root)
    hooks = [(stream, hook, fd) for stream, rung in chosen.items() for hook, fd in zip(rung.hooks, programs[stream], strict=True)]
    answer = {
        "rungs": {stream: rung.name for stream, rung in chosen.items()},
        "refusals": [[r.stream, r.rung, r.reason] for r in refusals],
        "maps": list(MAPS),
        "programs": [[stream, hook.program] for stream, hook, _ in hooks],
    }
    _answer(channel, answer, [*maps, *(fd for *_, fd in hooks)])
    if channel.recv(PACKET_BYTES) != b"attach":
        return
    links: list[int] = []
    for _, hook, program in hooks:
        try:
            links.append(rungs.attach(hook, program, root))
        except (OSError, LookupError) as error:
            raise HookError(f"{hook.program} loaded but did not attach: {error}") from error
    _answer(channel, {"links": len(links)}, links)


def _load(
    request: Mapping[str, Any], btf: Btf, root: Path | None
) -> tuple[dict[str, rungs.Rung], dict[str, list[int]], list[int], list[rungs.Refusal]]:
    """Go down the ladders until both streams' programs load."""
    allowed = {stream: list(request["hooks"]) for stream in rungs.LADDERS}
    failures: list[rungs.Refusal] = []
    hz = sysbpf.jiffies_per_second()
    while True:
        chosen, refusals = {}, []
        for stream in rungs.LADDERS:
            rung, refused = rungs.choose(stream, allowed[stream], btf, root)
            known = {failure.rung for failure in failures if failure.stream == stream}
            refusals += [refusal for refusal in refused if refusal.rung not in known]
            if rung is None:
                raise _no_rung(stream, refusals + failures)
            chosen[stream] = rung
        try:
            module = _compile(request, btf, {stream: rung.name for stream, rung in chosen.items()}, hz)
            programs = {stream: _programs(module, stream, rung, btf) for stream, rung in chosen.items()}
        except _RungFailed as failed:
            print(failed.log, file=sys.stderr)
            failures.append(rungs.Refusal(failed.stream, chosen[failed.stream].name, str(failed)))
            allowed[failed.stream].remove(chosen[failed.stream].name)
            continue
        return chosen, programs, [module[name].map_fd for name in MAPS], refusals + failures


class _RungFailed(Exception):
    def __init__(self, stream: str, error: sysbpf.VerifierError) -> None:
        super().__init__(str(error))
        self.stream, self.log = stream, error.log


def _programs(module: Any, stream: str, rung: rungs.Rung, btf: Btf) -> list[int]:
    try:
        return [rungs.load(hook, module.dump_func(hook.program.encode()), btf) for hook in rung.hooks]
    except sysbpf.VerifierError as error:
        raise _RungFailed(stream, error) from error


def _no_rung(stream: str, refusals: list[rungs.Refusal]) -> RebpfError:
    reasons = "; ".join(f"{r.rung}: {r.reason}" for r in refusals if r.stream == stream)
    return HookError(f"no hook for {stream}s can be attached on this host: {reasons}")


def _compile(request: Mapping[str, Any], btf: Btf, chosen: Mapping[str, str], hz: int) -> Any:
    folder = Path(request["bpf"])
    os.environ["BCC_KERNEL_SOURCE"] = str(folder / "shim")
    try:
        import bcc
    except ImportError as error:
        raise UnavailableError("bcc is missing: install the package python3-bpfcc (Debian, Ubuntu) or python3-bcc") from error
    text = source.program_text(folder, btf, request["layout_check"])
    flags = source.macros(btf, chosen, request["pages"], request["filters"], hz)
    flags += ["-Wno-address-of-packed-member", "-Wno-unused-function"]
    # LLVM writes its messages to file descriptor 2 and returns none of them.
    with tempfile.TemporaryFile() as messages:
        saved = os.dup(2)
        os.dup2(messages.fileno(), 2)
        try:
            return bcc.BPF(text=text.encode(), cflags=flags)
        except Exception as error:
            messages.seek(0)
            log = messages.read().decode(errors="replace")
            raise _compile_error(log) from error
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _compile_error(log: str) -> RebpfError:
    first = next((line for line in log.splitlines() if "error:" in line), "no message")
    error = HookError(f"the BPF programs do not compile here: {first.strip()}")
    error.log = log  # type: ignore[attr-defined]  # read by main, which hands it to the agent
    return error


def _may_load() -> bool:
    effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    bits = int(effective.split()[1], 16)
    return bool(bits >> 39 & 1 and bits >> 38 & 1)  # CAP_BPF, CAP_PERFMON


def _answer(channel: socket.socket, answer: Mapping[str, Any], descriptors: list[int] | None = None) -> None:
    if "log" in answer:
        answer = {**answer, "log": answer["log"][-_LOG_BYTES:]}
    socket.send_fds(channel, [json.dumps(answer).encode()], descriptors or [])
