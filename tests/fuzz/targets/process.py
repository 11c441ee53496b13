"""Targets that need a process: a service manager's environment, and reloads of a running producer."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st

from producer.config.load import load
from producer.errors import ConfigError
from producer.host import state
from producer.host.cgroups import cgroup2_root
from producer.rules.resolve import resolve
from tests.fuzz.engine import Check, FindingError, Target
from tests.fuzz.mutation import HOSTILE, NUMBERS, mutated
from tests.support.rebpf import Run, wait_until

_SERVICE = """
import os, sys, time
if os.environ.get("LISTEN_PID") == "mine":
    os.environ["LISTEN_PID"] = str(os.getpid())
from producer.kernel import fdstore
from producer.host import systemd
from producer.config.load import read_secret
from producer.errors import RebpfError
from pathlib import Path
try:
    systemd.Watchdog().step(time.monotonic())
    if fdstore.available():
        with fdstore.FdStore() as store:
            store.manifest()
    else:
        with fdstore.FdStore() as store:
            store.manifest()
    read_secret(Path("password"), "kafka.settings.sasl.password")
except RebpfError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@contextlib.contextmanager
def _services() -> Iterator[Check]:
    """Nonsense in the variables of sd_notify and of the descriptor store is a one-line error, or ignored."""

    def check(variables: dict[str, str]) -> None:
        environment = {**os.environ, **variables}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _SERVICE],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        except (ValueError, OSError):
            return  # no process has such an environment
        if done.returncode not in (0, 69, 78) or "Traceback" in done.stderr:
            raise FindingError(f"exit code {done.returncode}: {done.stderr}")

    yield check


@contextlib.contextmanager
def _reloads() -> Iterator[Check]:
    """A running producer continues; its rules are those of the last valid file."""
    with tempfile.TemporaryDirectory() as name, _traffic():
        root = cgroup2_root()
        with Run(Path(name), config=_RELOADS[0].decode()) as producer:
            producer.ready()

            def check(content: bytes) -> None:
                producer.config.write_bytes(content)
                before, refused = _version(producer), producer.log.count("reload refused")
                good = _is_right(producer.config, root)
                producer.send(signal.SIGHUP)

                def answered() -> bool:
                    if producer.ended:
                        raise FindingError(f"the producer has ended: {producer.log[-3000:]}")
                    return _version(producer) > before or producer.log.count("reload refused") > refused

                wait_until("the reload", answered, 20)
                if (_version(producer) > before) != good:
                    raise FindingError(f"a {'right' if good else 'wrong'} file: {producer.log[-2000:]}")

            yield check


def _is_right(path: Path, root: Path | None) -> bool:
    try:
        resolve(load(path), root).tables()
    except ConfigError:
        return False
    return True


def _version(producer: Run) -> int:
    facts = state.running(producer.state_dir)
    return int(facts["rules_version"]) if facts else -1


@contextlib.contextmanager
def _traffic() -> Iterator[None]:
    """Sequential connections on loopback."""
    stop = threading.Event()

    def connect() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            while not stop.wait(0.01):
                with socket.create_connection(server.getsockname()) as client, server.accept()[0] as other:
                    client.sendall(b"x" * 100)
                    other.recv(100)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


_RELOADS = (
    b'[[rules]]\naddress = ["127.0.0.0/8"]\nport = [443, "8000-8999"]\n',
    b'[capture]\ndefault = "drop"\n[[rules]]\nuid = [0]\nstate = ["ESTABLISHED"]\nsample = 2\n',
    b'[[rules]]\ninterface = ["lo"]\ncgroup = ["/system.slice"]\nnetns = [1]\naction = "drop"\n',
)
_words = st.sampled_from(
    [*map(str, NUMBERS), *(text for text in HOSTILE if "\0" not in text), "manifest_x", "/nowhere"]
)
_variables = st.fixed_dictionaries(
    {"LISTEN_PID": st.one_of(st.just("mine"), _words)},
    optional={
        "LISTEN_FDS": _words,
        "LISTEN_FDNAMES": _words,
        "FDSTORE": _words,
        "NOTIFY_SOCKET": _words,
        "WATCHDOG_USEC": _words,
        "WATCHDOG_PID": _words,
        "CREDENTIALS_DIRECTORY": _words,
    },
)

TARGETS = (
    Target("service", _variables, _services, 15, bound_s=60.0),
    Target("reload", mutated(_RELOADS), _reloads, 20, bound_s=30.0),
)
