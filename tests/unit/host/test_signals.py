"""Signals set flags, in any number, and wake the loop; a second stop signal ends the process at once."""

import ast
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from producer.host import signals
from tests.support.pty_command import PtyCommand
from tests.support.rebpf import DEADLINE_S, wait_until

LOOP = """
import sys
from producer.host.signals import *
import signal
reset()
reload = Hangup()
stop = stop_on_signals(reload)
reloads = 0
print("ready", flush=True)
while not stop.is_set():
    if reload.is_set():
        reload.clear()
        reloads += 1
        print("reload", flush=True)
    {body}
print("stopped", flush=True)
"""
WAITS = "stop.wait(600)"
BUSY = "sum(range(500))"


@contextmanager
def loop(body: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a loop of the kind that commands run, until it has said that it is ready."""
    code = LOOP.format(body=body)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            assert child.stdout
            assert child.stdout.readline() == b"ready\n"
            yield child
        finally:
            child.kill()


def ended(child: subprocess.Popen[bytes]) -> tuple[int, list[bytes], bytes]:
    out, error = child.communicate(timeout=DEADLINE_S)
    return child.returncode, out.split(), error


@pytest.mark.parametrize("body", [WAITS, BUSY])
def test_a_flood_of_reloads_does_not_prevent_the_stop(body: str) -> None:
    with loop(body) as child:
        assert child.stdout
        for _ in range(2):
            for _ in range(10_000):
                child.send_signal(signal.SIGHUP)
            assert child.stdout.readline() == b"reload\n"
        child.send_signal(signal.SIGTERM)
        code, words, error = ended(child)
    assert (code, words[-1], error) == (0, b"stopped", b"")


def test_signals_end_a_wait_and_the_flag_is_set_again_after_it_was_cleared() -> None:
    with loop(WAITS) as child:
        assert child.stdout
        for _ in range(3):
            child.send_signal(signal.SIGHUP)
            assert select.select([child.stdout], [], [], DEADLINE_S)[0]
            assert child.stdout.readline() == b"reload\n"
        child.send_signal(signal.SIGINT)
        assert ended(child) == (0, [b"stopped"], b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_stop_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    with loop("pass\nprint('stopping', flush=True)\nwhile True: pass") as child:
        child.send_signal(number)
        assert child.stdout
        assert child.stdout.readline() == b"stopping\n"
        child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + DEADLINE_S
        while child.poll() is None and time.monotonic() < deadline:
            child.send_signal(signal.SIGTERM)
        assert child.returncode == 130


@pytest.mark.parametrize(
    "number",
    [
        *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO),
        *(signal.SIGPIPE, signal.SIGWINCH, signal.SIGPWR, signal.SIGSTKFLT),
        *(signal.SIGRTMIN, signal.SIGRTMIN + 5, signal.SIGRTMAX),
    ],
)
def test_a_stray_signal_changes_nothing(number: int) -> None:
    with loop(WAITS) as child:
        child.send_signal(number)
        child.send_signal(signal.SIGSTOP)
        child.send_signal(signal.SIGCONT)
        child.send_signal(signal.SIGTERM)
        assert ended(child) == (0, [b"stopped"], b"")


def test_signals_that_the_parent_has_blocked_or_ignored_are_reset() -> None:
    inherit = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); "
    inherit += (
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    code = """
import subprocess
from producer.host import signals
signals.reset()
stop = signals.stop_on_signals()
print(subprocess.run(["false"]).returncode, flush=True)
stop.wait(600)
"""
    run = [sys.executable, "-c", inherit, "-c", code]
    with subprocess.Popen(run, stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stdout.readline() == b"1\n"
        child.terminate()
        try:
            assert child.wait(DEADLINE_S) == 0
        finally:
            child.kill()


def test_a_second_signal_may_raise_once_and_clean_up_and_a_third_ends_the_process() -> None:
    code = """
import signal
from producer.host.signals import *
stop = SignalFlag()
stop.interrupt_on(signal.SIGINT)
stop.interrupt_on(signal.SIGTERM)
print("ready", flush=True)
while not stop.is_set(): stop.wait(600)
try:
    print("stopping", flush=True)
    while True: pass
except KeyboardInterrupt:
    print("cleaning", flush=True)
    while True: pass
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout
        for number, word in ((None, b"ready"), (signal.SIGTERM, b"stopping"), (signal.SIGINT, b"cleaning")):
            if number:
                child.send_signal(number)
            assert child.stdout.readline() == word + b"\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(DEADLINE_S) == 130


ON_A_TERMINAL = """
import os, sys
from producer.host.signals import *
{before}
reload = Hangup()
stop = stop_on_signals(reload)
said = open(sys.argv[1], "a", buffering=1)
print("ready", file=said)
while not stop.wait(600):
    if reload.is_set():
        reload.clear()
        print("reload", file=said)
os._exit(7)
"""


def test_the_end_of_its_terminal_stops_a_process_and_other_hangups_reload(tmp_path: Path) -> None:
    said = tmp_path / "said"
    run = [sys.executable, "-c", ON_A_TERMINAL.format(before=""), str(said)]
    with PtyCommand(run, 80, 24) as child:
        wait_until("it is ready", lambda: said.exists() and said.read_text() == "ready\n")
        child.process.send_signal(signal.SIGHUP)
        wait_until("a reload", lambda: said.read_text() == "ready\nreload\n")
        child.close()
        assert child.wait() == 7
        assert said.read_text() == "ready\nreload\n"


LATE = """
import producer.host.signals as signals
clear = SignalFlag.clear

def late(flag):
    os.write(1, b"clearing")
    while signals._terminal_group() is not None:
        pass
    clear(flag)

SignalFlag.clear = late
"""


def test_a_terminal_that_closes_while_a_reload_begins_stops_the_process(tmp_path: Path) -> None:
    said = tmp_path / "said"
    run = [sys.executable, "-c", ON_A_TERMINAL.format(before=LATE), str(said)]
    with PtyCommand(run, 80, 24) as child:
        wait_until("it is ready", lambda: said.exists() and said.read_text() == "ready\n")
        child.process.send_signal(signal.SIGHUP)
        while "clearing" not in child.output:
            child.read(0.1)
        child.close()
        assert child.wait() == 7


BACKGROUND = "os.fork() and os.wait() and os._exit(0); os.setpgid(0, 0); open(sys.argv[2], 'w').write(str(os.getpid()))"
NOHUP = ["sh", "-c", 'exec nohup "$@" >/dev/null 2>&1', "sh"]


@pytest.mark.parametrize(
    ("before", "prefix"), [(BACKGROUND, []), ("", NOHUP), ("", ["setsid", "--wait"])], ids=["job", "nohup", "setsid"]
)
def test_processes_that_outlive_their_terminal_reload_after_its_end(
    before: str, prefix: list[str], tmp_path: Path
) -> None:
    said, pid = tmp_path / "said", tmp_path / "pid"
    before = before or "open(sys.argv[2], 'w').write(str(os.getpid()))"
    run = [*prefix, sys.executable, "-c", ON_A_TERMINAL.format(before=before), str(said), str(pid)]
    with PtyCommand(run, 80, 24) as shell:
        wait_until("it is ready", lambda: said.exists() and said.read_text() == "ready\n")
        child = int(pid.read_text())
        try:
            shell.close()
            wait_until("the end of the terminal", lambda: terminal_of(child) == 0)
            count = said.read_text().count("reload")
            os.kill(child, signal.SIGHUP)
            wait_until("a reload", lambda: said.read_text().count("reload") > count)
        finally:
            os.kill(child, signal.SIGKILL)


def terminal_of(pid: int) -> int:
    """Return the number of the terminal that controls a process, 0 if there is none."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4])


HANDLERS = {("signals.py", "signal.signal")}


def test_handlers_are_set_in_one_module() -> None:
    producer = Path(signals.__file__).parent
    found = {
        (path.name, called)
        for path in producer.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (called := ast.unparse(node.func)).endswith(("signal.signal", "add_signal_handler", "sigaction"))
    }
    assert found == HANDLERS
