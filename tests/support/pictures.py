"""The pictures of docs/, made from real runs. See scripts/picture."""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from producer.host import state
from tests.support.pty_command import PtyCommand
from tests.support.rebpf import Run, command
from tests.support.terminal_picture import svg
from tests.support.twenty_peers import GUILTY, NETWORK, PORT, twenty_peers

DOCS = Path(__file__).parents[2] / "docs"
BROWSER = shutil.which("chromium-headless-shell")
_HOST = "web-17"
_FILTER = f"peer {NETWORK}"
_MINUTE_S = 65
_PAGE = "1000,2960"


class Studio:
    """The scene, with a producer; draws pictures into a folder."""

    def __init__(self, folder: Path, state_dir: Path, wait_s: float) -> None:
        self._folder, self._wait_s = folder, wait_s
        self._state_dir = state_dir
        self._env = {"REBPF_STATE_DIR": str(state_dir)}

    def top(self) -> None:
        """The live table on a small screen."""
        self._top("top", 80, 24)

    def top_wide(self) -> None:
        """The live table on a large screen."""
        self._top("top-wide", 200, 50)

    def top_details(self) -> None:
        """The connections of a line."""
        self._top("top-details", 80, 24, keys="\r")

    def _top(self, name: str, columns: int, lines: int, keys: str = "") -> None:
        arguments = ("top", _FILTER)
        run = ["unshare", "--uts", "--", "sh", "-c", f'hostname {_HOST}; exec "$@"', "-", *command(*arguments)]
        with PtyCommand(run, columns, lines, **self._env) as shown:
            shown.wait_for(lambda screen: len(screen) > 3 and screen[3].startswith(f">{GUILTY} "), "guilty peer")
            end = time.monotonic() + self._wait_s
            while time.monotonic() < end:
                shown.read(0.5)
            if keys:
                shown.press(keys)
                shown.wait_for(lambda screen: screen[2].startswith(GUILTY), "details")
            screen = shown.colored()
            shown.press("q")
            assert shown.wait() == 0
        self._write(name, screen, columns, arguments)

    def trace(self) -> None:
        """Retransmissions, and counts by connection."""
        self._lines("trace", 100, "trace", "-c", "-n", "16", _FILTER)

    def tail(self) -> None:
        """Retransmissions from the topics."""
        self._lines("tail", 100, "tail", "-n", "16", f"{_FILTER} and cause rto,fast,tlp")

    def _lines(self, name: str, columns: int, *arguments: str) -> None:
        with PtyCommand(command(*arguments), columns, 24, **self._env) as shown:
            assert shown.wait() == 0
        self._write(name, _printed(shown.output), columns, arguments)

    def report(self) -> None:
        """The report, in a browser."""
        if BROWSER is None:
            raise FileNotFoundError("chromium-headless-shell: scripts/setup --all installs it")
        time.sleep(self._wait_s)
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder, "report.html")
            brokers = state.running(self._state_dir)["brokers"]
            run = command("report", "--brokers", brokers, "--filter", _FILTER, "-o", page)
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
            options = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
            picture = f"--screenshot={self._folder / 'report.png'}"
            argv = [BROWSER, *options, f"--window-size={_PAGE}", picture, page.as_uri()]
            subprocess.run(argv, check=True, stderr=subprocess.DEVNULL, timeout=120)
        with Image.open(self._folder / "report.png") as drawn:
            drawn.quantize(64).save(self._folder / "report.png", optimize=True)

    def demo(self) -> None:
        """The results of the demo."""
        arguments = ("demo", "--duration", "10", "--loss", "0.02")
        with PtyCommand(command(*arguments), 96, 40) as shown:
            assert shown.wait() == 0
        lines = _printed(shown.output)
        first = max(number for number, line in enumerate(lines) if "were retransmitted" in line)
        self._write("demo", lines[first:], 96, arguments)

    def _write(self, name: str, lines: list[str], columns: int, arguments: tuple[str, ...]) -> None:
        words = " ".join(f"'{each}'" if " " in each else each for each in arguments)
        while lines and not lines[-1].strip():
            lines.pop()
        title = f"sudo rebpf {words}"
        text = svg([f"\x1b[2m$ {title}\x1b[0m", *lines], columns, title)
        (self._folder / f"{name}.svg").write_text(text, encoding="utf-8")


def _printed(output: str) -> list[str]:
    """Return what stays on the terminal: no progress."""
    lines = output.replace("\r\n", "\n").strip().split("\n")
    return [line.rpartition("\r\x1b[K")[2] for line in lines]


PICTURES: dict[str, Callable[[Studio], None]] = {
    "demo": Studio.demo, "top": Studio.top, "top-wide": Studio.top_wide, "top-details": Studio.top_details,
    "trace": Studio.trace, "tail": Studio.tail, "report": Studio.report,
}  # fmt: skip
"""By the names of their files."""


@contextlib.contextmanager
def studio(folder: Path, wait_s: float) -> Iterator[Studio]:
    """Run the scene and a producer; `wait_s` is how long a view collects before its picture."""
    with (
        tempfile.TemporaryDirectory() as state,
        twenty_peers(),
        Run(Path(state), "--port", PORT, config=f'host = "{_HOST}"\n') as run,
    ):
        run.ready()
        yield Studio(folder, run.state_dir, wait_s)
        run.finish()


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=DOCS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    options = parser.parse_args()
    Path("/proc/self/comm").write_text("shipper")  # the traffic's process, as the views show it
    with studio(options.output, _MINUTE_S) as made:
        for name in options.names or PICTURES:
            PICTURES[name](made)
            print(f"drew {name}", file=sys.stderr)
