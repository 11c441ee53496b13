"""Progress: one line on a terminal that vanishes, and nothing anywhere else."""

import os
import pty
import subprocess
import sys
from typing import Any

STEPS = """
import logging, time
from producer.host import stdio
from producer.host.progress import Progress
stdio.take_over()
logging.basicConfig(handlers=[stdio.LogHandler()], format="%(message)s")
with Progress("reading \\x1b[31m") as progress:
    progress(1, 4)
    logging.warning("a warning")
    time.sleep(0.25)
    progress(3, 4)
print("done")
"""


def run(environment: dict[str, str], stderr: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", STEPS],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, **environment},
    )


def on_terminal(environment: dict[str, str]) -> str:
    """Return what the steps write to a terminal as their standard error."""
    main, terminal = pty.openpty()
    with os.fdopen(main, "rb") as reader, os.fdopen(terminal, "wb") as writer:
        assert run(environment, writer).stdout == "done\n"
        os.set_blocking(main, False)
        return (reader.read() or b"").decode()


def test_a_terminal_shows_how_much_is_done_and_nothing_stays() -> None:
    shown = on_terminal({"TERM": "xterm"})
    for share in ("25%", "75%"):
        assert f"\x1b[?7lreading \\x1b[31m: {share} of 4\x1b[?7h" in shown, "long lines do not wrap"
    lines = [line.rpartition("\r\x1b[K")[2] for line in shown.split("\r\n")]
    assert lines == ["a warning", ""]


def test_a_terminal_without_control_sequences_shows_what_is_done_once() -> None:
    assert on_terminal({"TERM": "dumb"}) == "reading \\x1b[31m ...\r\na warning\r\n"


def test_a_pipe_and_a_closed_stream_get_none() -> None:
    assert run({}, subprocess.PIPE).stderr == "a warning\n"
    closed = f"exec 2>&-; exec {sys.executable} -c '{STEPS}'"
    assert subprocess.run(["sh", "-c", closed], capture_output=True, text=True).stdout == "done\n"
