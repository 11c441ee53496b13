"""The command `rebpf` as a child process, as a user runs it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from unittest import SkipTest

DEADLINE_S = 120.0
"""How long tests wait for what happens within seconds, unless the machine is slow or busy."""
COMPILED = "REBPF_TEST_COMPILED"
"""The variable with the folder of compiled programs that tests of a session share. Compiling takes seconds."""
PROGRAMS = "REBPF_TEST_PROGRAMS"
"""The variable with a file of `rebpf compile` for the kernel under test: a machine without KVM compiles for minutes."""
UNUSED_PORT = 2
"""No test connects to it. Many connect to port 1, where nobody listens."""
_READY = re.compile(r" ready brokers=(\S+)")


def wait_until(what: str, condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Return the condition's first true value."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s:.0f} s: {what}")
        time.sleep(0.02)
    return value


@contextmanager
def repeating(work: Callable[[], Any], interval_s: float) -> Iterator[None]:
    """Repeat an action in a thread until the context exits; raise its exception."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(interval_s):
            work()

    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(repeat)
        try:
            yield
        finally:
            done.set()
        task.result()


def command(*arguments: object) -> list[str]:
    """Return the command line of `rebpf ARGUMENTS`."""
    return [sys.executable, "-m", "producer", *map(str, arguments)]


def rebpf(
    *arguments: object, env: Mapping[str, str] | None = None, before: Sequence[str] = ()
) -> "subprocess.CompletedProcess[str]":
    """Run a command; `before` is its prefix, such as setpriv with options."""
    run = [*before, *command(*arguments)]
    return subprocess.run(run, capture_output=True, text=True, timeout=DEADLINE_S, env={**os.environ, **(env or {})})


def findings(*arguments: object) -> tuple[int, dict[str, dict[str, object]]]:
    """Run `rebpf check`; return its exit code, and the findings by subject."""
    done = rebpf("check", "--json", *arguments)
    found = {each["subject"]: each for each in json.loads(done.stdout)}
    return done.returncode, found


def let_others_in(folder: Path) -> None:
    """Let other users look into a folder and those above it."""
    for each in (folder, *folder.parents):
        mode = each.stat().st_mode
        if mode & 0o005 != 0o005:
            each.chmod(mode | 0o055)


def as_nobody(user: int = 65534) -> list[str]:
    """Return a prefix that runs a command as an unprivileged user; skip the test if impossible."""
    nobody = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=-all"]
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        raise SkipTest("giving up privileges needs root and setpriv")
    # Twice: the first setpriv may start a program that the user cannot.
    imports = "import producer.cli.main, producer._native, subprocess, sys"
    probe = f"{imports}; subprocess.run([sys.executable, '-V'], check=True)"
    if subprocess.run([*nobody, sys.executable, "-c", probe], capture_output=True).returncode:
        raise SkipTest(f"{sys.executable} and the package are not readable for other users")
    return nobody


class Run:
    """`rebpf run --json` with its state in `folder`/state; `config` is the content of its configuration file.

    `before` is a prefix of its command line.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        config: str = "",
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.state_dir = folder / "state"
        self.config = folder / "rebpf.toml"
        self.config.write_text(config)
        if COMPILED in os.environ and not (self.state_dir / "compiled").exists():
            _copy_compiled(Path(os.environ[COMPILED]), self.state_dir / "compiled")
        self._out, self._err = folder / "out", folder / "err"
        # Dies with the tests, however they end.
        run = ["setpriv", "--pdeathsig", "KILL", *before]
        run += command("run", "--json", "--config", self.config, "--state-dir", self.state_dir, *arguments)
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                run, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **(env or {})}
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def log(self) -> str:
        """Its standard error so far."""
        return self._err.read_text()

    @property
    def output(self) -> str:
        """Its standard output so far."""
        return self._out.read_text()

    def wait_for(self, pattern: str | re.Pattern[str], deadline_s: float = DEADLINE_S) -> "re.Match[str]":
        """Wait for a text in the log."""

        def look() -> "re.Match[str] | None":
            ended = self._process.poll()  # before reading the log, so that nothing is written after
            found = re.search(pattern, self.log)
            if not found and ended is not None:
                raise RuntimeError(f"rebpf run ended with {ended}:\n{self.log}")
            return found

        match: re.Match[str] = wait_until(f"{pattern} in the log", look, deadline_s)
        return match

    def ready(self) -> str:
        """Wait until it captures; return the brokers' address."""
        brokers = self.wait_for(_READY)[1]
        if COMPILED in os.environ:
            _copy_compiled(self.state_dir / "compiled", Path(os.environ[COMPILED]))
        return brokers

    def get(self, page: str) -> dict[str, Any]:
        """Return a page of its endpoint, which has none before the loop's first step."""
        url = json.loads((self.state_dir / "agent.json").read_text())["status_url"]

        def answer() -> dict[str, Any] | None:
            try:
                with urllib.request.urlopen(f"{url}/{page}", timeout=DEADLINE_S) as response:
                    found: dict[str, Any] = json.load(response)
                    return found
            except urllib.error.HTTPError as error:
                error.close()
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise
                return None

        found: dict[str, Any] = wait_until(f"an answer to /{page}", answer)
        return found

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Wait until it exits and return the exit code."""
        return self._process.wait(deadline_s)

    def finish(self, number: signal.Signals | None = signal.SIGTERM) -> dict[str, Any]:
        """Stop it, check that it succeeds, and return the balance."""
        if number is not None:
            self.send(number)
        code = self.wait()
        if code:
            raise RuntimeError(f"rebpf run ended with {code}:\n{self.log}")
        balance: dict[str, Any] = json.loads(self.output.splitlines()[-1])
        return balance

    def kill(self) -> None:
        """Kill it, as in a crash."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()


def _copy_compiled(source: Path, target: Path) -> None:
    """Copy compiled programs that are missing, into folders that the producer accepts."""
    for file in source.glob("*.json"):
        target.parent.mkdir(mode=0o700, exist_ok=True)
        target.mkdir(mode=0o700, exist_ok=True)
        if not (target / file.name).exists():
            fresh = target / f"{file.name}.{os.getpid()}"
            fresh.touch(mode=0o600)
            fresh.write_bytes(file.read_bytes())
            fresh.rename(target / file.name)
