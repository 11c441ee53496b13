"""Standard output and standard error whose far ends block, hang, are full or closed."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.rebpf import command

TIMEOUT_S = 60
LOG = """
import logging
from producer.host.output import LineFormatter
handler = stdio.LogHandler()
handler.setFormatter(LineFormatter())
logging.basicConfig(handlers=[handler])
"""


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that does not take a byte more, until somebody reads."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        size = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
        assert os.write(writer, b"\n" * size) == size
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


@contextmanager
def unread_terminal() -> Iterator[int]:
    """A terminal that nobody reads, as of a frozen connection or window."""
    main, terminal = pty.openpty()
    try:
        yield terminal
    finally:
        os.close(main)
        os.close(terminal)


def python(code: str, **streams: object) -> "subprocess.Popen[bytes]":
    text = f"import sys\nfrom producer.host import stdio\nstdio.take_over()\n{code}"
    return subprocess.Popen([sys.executable, "-c", text], **streams)  # type: ignore[call-overload, no-any-return]


def test_a_pipe_that_does_not_block_gets_all_of_the_output() -> None:
    with full_pipe() as (reader, writer):
        child = python("print('x' * 500_000, flush=True)", stdout=writer)
        got = bytearray()

        def read() -> None:
            while got.count(b"x") < 500_000:
                got.extend(os.read(reader, 1 << 16))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        assert child.wait(TIMEOUT_S) == 0
        thread.join(TIMEOUT_S)
        assert got.strip() == b"x" * 500_000


@pytest.mark.slow
@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_hangs_behind_standard_error_stops_nothing(blocking: bool) -> None:
    with full_pipe() as (_, writer):
        os.set_blocking(writer, blocking)
        code = "import logging\nfor _ in range(300): logging.error('x' * 10_000)\nprint('went on')"
        child = python(code, stdout=subprocess.PIPE, stderr=writer)
        assert child.communicate(timeout=TIMEOUT_S)[0] == b"went on\n"
        assert child.returncode == 0


@pytest.mark.slow
def test_a_terminal_that_nobody_reads_stops_no_log() -> None:
    with unread_terminal() as terminal:
        code = "import logging\nfor _ in range(3000): logging.error('x' * 100)\nprint('went on')"
        child = python(code, stdout=subprocess.PIPE, stderr=terminal)
        assert child.communicate(timeout=TIMEOUT_S)[0] == b"went on\n"
        assert child.returncode == 0


def test_dropped_lines_are_counted_and_the_log_says_how_many() -> None:
    with full_pipe() as (reader, writer):
        code = f"""
{LOG}
for _ in range(7): logging.error('lost')
print(stdio.dropped_lines(), flush=True)
input()
logging.error('seen')
"""
        child = python(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writer)
        assert child.stdout is not None
        assert child.stdout.readline() == b"7\n"
        os.read(reader, 1 << 20)
        child.communicate(b"\n", timeout=TIMEOUT_S)
        told, seen = os.read(reader, 1 << 20).decode().splitlines()
        assert told.endswith("WARNING log: 7 lines dropped: standard error was full or closed")
        assert seen.endswith("ERROR seen")


def test_a_line_that_was_cut_does_not_join_the_next() -> None:
    with full_pipe() as (reader, writer):
        os.read(reader, 4096)  # room for the first part of a line
        code = f"{LOG}\nlogging.error('x' * 7000)\nprint(flush=True)\ninput()\nlogging.error('seen')"
        child = python(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writer)
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        assert os.read(reader, 1 << 20).endswith(b"x")
        child.communicate(b"\n", timeout=TIMEOUT_S)
        end_of_line, told, seen = os.read(reader, 1 << 20).decode().splitlines()
        assert end_of_line == ""
        assert told.endswith("WARNING log: 1 lines dropped: standard error was full or closed")
        assert seen.endswith("ERROR seen")


STOPPED = """
from producer.host import signals
from producer.errors import OutputError
from producer.host.output import echo
stop = signals.stop_on_signals()
sys.stderr.write("ready\\n")
try:
    echo("x\\n" * 1_000_000)
except OutputError as error:
    sys.exit(f"{stop.is_set()} {error}")
"""


@pytest.mark.slow
def test_a_stop_that_arrives_just_before_a_write_ends_output_to_a_terminal() -> None:
    """The signal is noted, but interrupts no call that begins afterwards."""
    with unread_terminal() as terminal:
        code = STOPPED.replace("try:", "signal.raise_signal(signal.SIGTERM)\ntry:", 1)
        child = python(f"import signal\n{code}", stdout=terminal, stderr=subprocess.PIPE)
        assert child.communicate(timeout=TIMEOUT_S)[1] == b"ready\nTrue standard output: the reader does not read\n"


@pytest.mark.slow
@pytest.mark.parametrize("blocking", [True, False])
def test_a_stop_ends_output_that_nobody_reads(blocking: bool) -> None:
    with full_pipe() as (_, writer):
        os.set_blocking(writer, blocking)
        code = STOPPED
        child = python(code, stdout=writer, stderr=subprocess.PIPE)
        assert child.stderr is not None
        assert child.stderr.readline() == b"ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.communicate(timeout=TIMEOUT_S)[1] == b"True standard output: the reader does not read\n"


@pytest.mark.parametrize("end", ["/dev/full", "a dead pipe"])
def test_standard_error_that_fails_stops_nothing(end: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full, open(writer, "wb") as dead:
        stderr = full if end == "/dev/full" else dead
        code = "import logging\nlogging.error('x')\nprint('went on')"
        child = python(code, stdout=subprocess.PIPE, stderr=stderr)
        assert child.communicate(timeout=TIMEOUT_S)[0] == b"went on\n"
        assert child.returncode == 0


def test_output_that_fails_raises_once_and_leaves_the_exit_status_alone() -> None:
    code = "import sys\ntry: print('x', flush=True)\nexcept OSError: sys.exit(3)"
    with open("/dev/full", "wb") as full:
        child = python(code, stdout=full, stderr=subprocess.PIPE)
        assert child.communicate(timeout=TIMEOUT_S)[1] == b""
        assert child.returncode == 3


@pytest.mark.parametrize(
    "raising",
    [
        "import threading\nthreading.Thread(target=fail).start()",
        "class A: __del__ = fail\nA()",
        "import warnings\nwarnings.warn('x\\n12:00 INFO ready\\x1b[2J')",
        "fail()",
    ],
)
def test_uncaught_exceptions_go_through_the_logs_formatter(raising: str) -> None:
    code = f"{LOG}\ndef fail(*_): raise ValueError('x\\n12:00 INFO ready\\x1b[2J')\n{raising}"
    child = python(code, stderr=subprocess.PIPE)
    first, *others = child.communicate(timeout=TIMEOUT_S)[1].decode().removesuffix("\n").split("\n")
    assert re.match(r"[\d :,-]+ (ERROR uncaught ValueError|WARNING .*UserWarning)", first)
    assert all(line.startswith("    ") and line.isprintable() for line in others)
    assert r"\x1b[2J" in "".join([first, *others])


def test_text_that_the_encoding_lacks_is_shown() -> None:
    child = python(r"print('\u20ac \udce9', flush=True)", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert child.communicate(timeout=TIMEOUT_S)[0] == b"\\u20ac \\udce9\n"


@pytest.mark.slow
def test_a_usage_error_is_64_even_if_standard_error_is_full() -> None:
    with full_pipe() as (_, writer):
        os.set_blocking(writer, True)
        assert subprocess.run(command("nonsense"), stderr=writer, timeout=TIMEOUT_S).returncode == 64
