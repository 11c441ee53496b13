"""A server as a child process: it logs to a file, answers before start() returns, and never outlives the tests."""

import random
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 20.0
CHANGE_DEADLINE_S = 120.0
LOG_TAIL_LINES = 40


class ServerProcess(ABC):
    """One server in one folder; start() after stop() or kill() is a restart on the same ports and data.

    The process dies with the thread that started it (PR_SET_PDEATHSIG goes by thread): start it in one that lasts.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Write the configuration and return the command line; called at each start."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Return whether the server answers requests, within about a second."""

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def is_running(self) -> bool:
        """Whether it has been started, and not stopped or killed since."""
        return self._process is not None

    def start(self) -> None:
        """Start the server and wait until it is ready; a failure shows the end of its log."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Start the server without waiting for it, so that several can start in parallel."""
        if self._process is not None:
            raise RuntimeError(f"{self.name} runs already")
        self.folder.mkdir(parents=True, exist_ok=True)
        # setpriv instead of preexec_fn, which Python 3.12 warns about with threads, such as librdkafka's.
        command = ["setpriv", "--pdeathsig", "KILL", *self.command()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt at the terminal ends the tests, which then stop the server
            )

    def wait_until_ready(self) -> None:
        """Wait until a launched server is ready; kill it on failure."""
        try:
            self._wait_until_ready(self._running())
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Stop the server, by force after a deadline. Does nothing if it is not running."""
        if self._process is None:
            return
        self._process.terminate()
        self._process.send_signal(signal.SIGCONT)  # a paused process ends too
        try:
            self._process.wait(STOP_DEADLINE_S)
            self._process = None
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Kill the server, as in a crash."""
        process = self._running()
        process.kill()
        process.wait()
        self._process = None

    def pause(self) -> None:
        """Freeze the server with its connections open: to its clients it is a black hole."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.name} does not run")
        return self._process

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while not self.is_ready():
            if process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {process.returncode}:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} not ready after {START_DEADLINE_S:.0f} s:\n{self._log_tail()}")
            time.sleep(0.1)

    def _log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def wait_until_shown(what: str, is_shown: Callable[[], bool]) -> None:
    """Wait until a server shows a requested change."""
    deadline = time.monotonic() + CHANGE_DEADLINE_S
    while not is_shown():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {CHANGE_DEADLINE_S:.0f} s: {what}")
        time.sleep(0.05)


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1 that no client gets while its server is down, and no other caller.

    From below the range of ephemeral ports: a server that restarts must find its port again. It stays this process's
    until that ends, so that tests in another one do not get it while the server is down.
    """
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(min(20_000, first_ephemeral // 2), first_ephemeral), 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if claim(port):
            return port
    raise RuntimeError("no free port among 100 tried")


def claim(port: int) -> bool:
    """Make a port this process's until it ends, by a name that only one socket can have; False if it is taken."""
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0rebpf-test-port-{port}")
    except OSError:
        name.close()
        return False
    name.detach()
    return True
