"""Loading, attaching and the end: nothing is left behind, and errors have a reason."""

import contextlib
import ctypes
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer import paths
from producer.demo.lab import Lab
from producer.errors import HookError, UnavailableError
from producer.events import CAUSES, FLOWS, KNOWN, REASONS, RETRANSMITS, TRANSMITS
from producer.kernel import switches
from producer.kernel.capture import Capture
from producer.kernel.hooks import HOOKS_BY_STREAM
from producer.kernel.settings import CaptureSettings
from tests.support.capture import ALLOWED, Pair, Recording, hook_settings, kernel_btf_with, rules, wait_for
from tests.support.programs import ids_of, program_ids
from tests.support.rebpf import UNUSED_PORT, Run, command, wait_until
from tests.support.rules import filtered
from tests.support.traffic import Echo, exchange

pytestmark = pytest.mark.root


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextlib.contextmanager
def agent(settings: CaptureSettings) -> Iterator["subprocess.Popen[str]"]:
    """Run a process that attaches, prints its programs' ids, and waits."""
    program = (
        "import sys\n"
        "from pathlib import PosixPath\n"
        "from producer.kernel.capture import Capture\n"
        "from producer.kernel.settings import CaptureSettings\n"
        "from producer.rules.tables import only, tables\n"
        "from tests.support.programs import ids_of\n"
        f"allowed, compiled = {settings.hooks!r}, {settings.cache!r}\n"
        "hooks = Capture(CaptureSettings(hooks=allowed, rules=tables(*only((), (1,))), cache=compiled))\n"
        "hooks.load()\n"
        "hooks.attach()\n"
        "print(*ids_of(hooks), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_detach_ends_the_events_and_close_unloads_the_programs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with Capture(hook_settings(rules=filtered(ports=(address[1],)))) as hooks:
            hooks.load()
            assert hooks.counters(TRANSMITS).passed == 0
            socket.create_connection(address).close()
            assert hooks.counters(TRANSMITS).passed == 0, "loaded programs are not attached"
            hooks.attach()
            loaded = ids_of(hooks)
            assert loaded <= program_ids()
            assert len(loaded) == sum(
                probe.captures
                for stream, name in hooks.hooks_in_use.items()
                for hook in HOOKS_BY_STREAM[stream]
                if hook.name == name
                for probe in hook.probes
            )
            socket.create_connection(address).close()
            hooks.detach()
            passed = hooks.counters(TRANSMITS).passed
            assert passed >= 3
            socket.create_connection(address).close()
            assert hooks.counters(TRANSMITS).passed == passed
            with hooks.ring(TRANSMITS) as ring:
                assert ring.unread == passed
    wait_for(lambda: not loaded & program_ids(), "the programs' end")


def test_kill_leaves_nothing_attached() -> None:
    with agent(hook_settings()) as process:
        assert process.stdout is not None
        loaded = {int(each) for each in process.stdout.readline().split()}
        assert loaded
        assert loaded <= program_ids()
        assert children(process.pid) == [], "the loader exits once everything is attached"
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: not loaded & program_ids(), "the programs' end")


def test_kill_while_the_loader_compiles_leaves_no_orphan() -> None:
    def compiling(pid: int) -> int | None:
        for child in children(pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if "libbcc" in Path(f"/proc/{child}/maps").read_text():
                    return child
        return None

    with agent(CaptureSettings(hooks=ALLOWED)) as process:
        loader = wait_for(lambda: compiling(process.pid), "the loader")
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: not is_running(loader), "the loader's end")
        assert process.stdout is not None
        assert process.stdout.readline() == "", "it had not attached yet"


def test_a_program_that_another_process_detaches_is_noticed() -> None:
    with Capture(hook_settings(hooks=("cgroup_skb",), rules=filtered(ports=(UNUSED_PORT,)))) as hooks:
        hooks.load()
        hooks.check()
        before = set(os.listdir("/proc/self/fd"))
        hooks.attach()
        hooks.check()
        links = set(os.listdir("/proc/self/fd")) - before
        cgroup = next(link for link in links if "cgroup_id" in Path(f"/proc/self/fdinfo/{link}").read_text())
        assert ctypes.CDLL("libbpf.so.1").bpf_link_detach(int(cgroup)) == 0
        with pytest.raises(UnavailableError, match="another process has detached a program"):
            hooks.check()


@pytest.mark.parametrize(("hook", "switch"), [(hook, each) for hook, of in switches.SWITCHES.items() for each in of])
def test_a_switch_that_turns_off_all_probes_is_noticed(hook: str, switch: Path) -> None:
    if hook not in ALLOWED or not switch.exists():
        pytest.skip(f"{hook} is not among the hooks under test, or {switch} does not exist")
    settings = hook_settings(hooks=(hook,), rules=filtered(ports=(UNUSED_PORT,)))
    with Capture(settings) as hooks, socket.create_server(("127.0.0.1", 0)) as listener:
        try:
            hooks.load()
        except HookError as error:
            pytest.skip(f"NO {hook}: {error}")
        hooks.rules.put(filtered(ports=(listener.getsockname()[1],)))
        hooks.attach()
        hooks.check()
        socket.create_connection(listener.getsockname()).close()
        wait_for(lambda: hooks.counters(TRANSMITS).passed, "events")
        try:
            try:
                switch.write_text("0")
            except OSError as error:
                if (error.errno, hook) == (errno.EBUSY, "fentry"):  # Linux before 6.0
                    return
                raise
            passed = hooks.counters(TRANSMITS).passed
            socket.create_connection(listener.getsockname()).close()
            assert hooks.counters(TRANSMITS).passed == passed, "the switch has an effect"
            with pytest.raises(UnavailableError, match=f"{switch} is 0"):
                hooks.check()
        finally:
            switch.write_text("1")
        hooks.check()


def compiling(pid: int) -> int | None:
    """Return the process's loader."""
    for child in children(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"loader_child" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    return None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_the_loader_compiles_is_honored_at_once(tmp_path: Path, number: signal.Signals) -> None:
    run = command("run", "--state-dir", tmp_path / "state")
    with subprocess.Popen(run, stderr=subprocess.PIPE, start_new_session=True, text=True) as process:
        loader = wait_for(lambda: compiling(process.pid), "loader")
        os.kill(loader, signal.SIGSTOP)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == "rebpf: stopped while the BPF programs were compiled and loaded\n"
    assert not is_running(loader)


def test_the_hook_is_reported_with_the_reasons_against_better_ones(capture: Recording) -> None:
    hooks = capture.kernel
    for stream, in_use in hooks.hooks_in_use.items():
        names = [hook.name for hook in HOOKS_BY_STREAM[stream]]
        better = names[: names.index(in_use)]
        refused = [refusal for refusal in hooks.refusals if refusal.stream == stream]
        assert [refusal.hook for refusal in refused] == better
        assert all(refusal.reason for refusal in refused)
        assert in_use in ALLOWED or len(names) == 1


def test_without_an_allowed_hook_the_error_names_the_reasons() -> None:
    with Capture(CaptureSettings(hooks=("raw_tp",))) as hooks, pytest.raises(HookError) as caught:
        hooks.load()
    assert "no hook for transmits can be attached" in str(caught.value)
    assert "cgroup_skb: not among the hooks that the configuration allows" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of bpf/ that the loader uses instead."""
    copy = tmp_path / "bpf"
    subprocess.run(["cp", "-r", str(paths.BPF), str(copy)], check=True)
    monkeypatch.setattr("producer.kernel.capture.BPF", copy)
    return copy


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def error_of(settings: CaptureSettings) -> str:
    with Capture(settings) as hooks, pytest.raises(HookError) as caught:
        hooks.load()
    return str(caught.value)


def test_a_compile_error_is_one_line_and_its_log_is_there_for_debugging(
    sources: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(sources / "fill.h", "READ(sk, skc_dport)", "READ(sk, skc_dport_number)")
    with caplog.at_level(logging.DEBUG, "producer.kernel.loader"):
        message = error_of(CaptureSettings(hooks=ALLOWED))
    assert message.startswith("the BPF programs do not compile here: fill.h:")
    assert "skc_dport_number" in message
    assert "\n" not in message
    assert "error generated" in caplog.text or "errors generated" in caplog.text


def test_a_layout_that_differs_from_the_agents_does_not_compile(sources: Path) -> None:
    edit(sources / "events.h", "\tu32 seq;\n\tu32 end_seq;\n", "\tu32 end_seq;\n\tu32 seq;\n")
    assert "transmit_event.s.seq: offset" in error_of(CaptureSettings(hooks=ALLOWED))


def test_a_program_that_the_verifier_rejects_costs_its_hook(
    sources: Path, caplog: pytest.LogCaptureFixture, capture: Recording
) -> None:
    hook = capture.kernel.hooks_in_use["retransmit"]
    # The program of the cgroup hook captures both streams.
    stream = "transmits" if hook == "cgroup_skb" else "retransmits"
    edit(sources / "fill.h", "\te->cause = CAUSE_SYN_ACK;\n", "\te->cause = ((u8 *)e)[4096];\n")
    with caplog.at_level(logging.DEBUG, "producer.kernel.loader"):
        message = error_of(CaptureSettings(hooks=(hook, capture.kernel.hooks_in_use["transmit"])))
    assert message.startswith(f"no hook for {stream} can be attached on this host")
    assert f"; {hook}: " in message or f"host: {hook}: " in message
    assert "\n" not in message
    assert "processed" in caplog.text, "the verifier's log"


def lose(pair: Pair, lab: Lab, port: int) -> None:
    """Let the client retransmit some data twice."""
    before = lab.client.counters()["RetransSegs"]
    with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
        pair.client.sendall(b"lost")
        wait_for(lambda: lab.client.counters()["RetransSegs"] >= before + 2, "retransmissions")
    assert len(pair.accepted.recv(4, socket.MSG_WAITALL)) == 4


def test_retransmissions_that_no_program_sees_are_counted(sources: Path, lab: Lab, port: int) -> None:
    """As where the kernel runs no tracepoint's program in an interrupt of process 1: docs/truth.md."""
    program = sources / "rebpf.bpf.c"
    edit(program, "? count_retransmission(tp, (void *)ctx[1]) : 0;", "? 0 : 0;")
    taken = "take_retransmit(tp, (void *)ctx[1], TRACEPOINT_ERR(ctx), false, HOOK_RAW_TP)"
    edit(program, f"return tp ? {taken} : 0;", "return 0;")
    settings = CaptureSettings(hooks=("raw_tp",), streams=(RETRANSMITS, FLOWS), rules=filtered(ports=(port,)))
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(Pair(lab.client, lab.server, lab.server.ipv4, port))
        lose(old, lab, port)
        recording = stack.enter_context(Recording(settings))
        recording.kernel.report_flows()
        before = lab.counters()["RetransSegs"]
        new = stack.enter_context(Pair(lab.client, lab.server, lab.server.ipv6, port))
        for pair in (old, new):
            lose(pair, lab, port)
        assert recording.kernel.counters(RETRANSMITS).unseen == 0
        for _ in range(2):
            recording.kernel.report_flows()
        assert recording.kernel.counters(RETRANSMITS).unseen == lab.counters()["RetransSegs"] - before >= 4
        lose(new, lab, port)
        new.end()
        closes = REASONS.index("close")
        wait_for(lambda: (recording.all(FLOWS)["reason"] == closes).sum() == 2, "the closing records")
        assert recording.kernel.counters(RETRANSMITS).unseen == lab.counters()["RetransSegs"] - before >= 6
        assert not len(recording.all(RETRANSMITS))


def test_members_that_the_kernel_lacks_are_null_fields(tmp_path: Path, lab: Lab, port: int) -> None:
    btf = kernel_btf_with(
        tmp_path,
        {
            "snd_cwnd": "snd_cwmd",
            "sk_uid": "sk_uxd",
            "icsk_pending": "icsk_pemding",
            "retransmit_skb_hint": "retransmit_skb_himt",
            "sk_cgrp_data": "sk_cgrp_dada",
        },
    )
    with Recording(hook_settings(rules=filtered(ports=(port,)), btf=btf)) as capture:
        with Pair(lab.client, lab.server, lab.server.ipv4, port) as pair:
            with rules(lab.server, "prerouting", f"tcp dport {port} drop"):
                pair.client.sendall(b"lost")
                capture.wait_rows(RETRANSMITS, port, 1)
            assert len(pair.accepted.recv(4, socket.MSG_WAITALL)) == 4
        rows, again = capture.of_port(TRANSMITS, port), capture.of_port(RETRANSMITS, port)
    assert not (rows["s"]["flow"]["flow_known"] & (KNOWN["uid"] | KNOWN["cgroup_id"])).any()
    assert not (rows["s"]["known"] & KNOWN["tcp"]).any()
    assert (again["s"]["known"] & KNOWN["ca_state"]).all()
    # The better hooks recognize a loss probe by the function that sends it.
    by_function = set() if capture.kernel.hooks_in_use["retransmit"] == "raw_tp" else {"tlp"}
    assert {CAUSES[cause] for cause in again["cause"]} <= {"other"} | by_function


def test_a_kernel_without_a_required_member_is_rejected_by_the_members_name(tmp_path: Path) -> None:
    btf = kernel_btf_with(tmp_path, {"tcp_gso_segs": "tcp_gso_sexs"})
    with Capture(CaptureSettings(hooks=ALLOWED, btf=btf)) as hooks, pytest.raises(UnavailableError) as caught:
        hooks.load()
    assert "that ReBPF needs: tcp_skb_cb.tcp_gso_segs" in str(caught.value)


def test_without_btf_the_error_says_what_to_do(tmp_path: Path) -> None:
    with (
        Capture(CaptureSettings(hooks=ALLOWED, btf=tmp_path / "none")) as hooks,
        pytest.raises(UnavailableError) as caught,
    ):
        hooks.load()
    assert "CONFIG_DEBUG_INFO_BTF" in str(caught.value)


def test_signals_and_umask_of_an_odd_parent_affect_neither_files_nor_the_stop(
    tmp_path: Path,
) -> None:
    parent = [sys.executable, "-c", "import os, signal, sys; os.umask(0o777); "
              "signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
              "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); "
              "os.execvp(sys.argv[1], sys.argv[1:])"]  # fmt: skip
    with Echo() as echo, Run(tmp_path, "--brokers", "127.0.0.1:1", "--port", echo.port, before=parent) as run:
        run.ready()
        exchange(echo.port, 5)
        wait_until("events are on disk", lambda: list(run.state_dir.glob("spool/transmit/*.avro")))
        balance = run.finish()["tcp_transmit"]
    assert balance["spooled"] == balance["passed"] > 0
    assert not balance["lost"]
