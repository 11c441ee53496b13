"""A reload signals the producer that holds the lock, and nobody else, and gives its answer."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from producer.errors import ConfigError, UnavailableError
from producer.host.state import StateFolder, reload


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some" / "state"


SAME_NUMBER = """
import fcntl, json, os, pathlib, signal, subprocess, sys
from producer.host import state
from producer.errors import UnavailableError
base = pathlib.Path(sys.argv[1])
for name in ("one", "two"):  # each tmpfs begins its numbers anew
    (base / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", base / name], check=True)
    (base / name / "lock").touch()
assert (base / "one/lock").stat().st_ino == (base / "two/lock").stat().st_ino
hold = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); time.sleep(600)"
run = [sys.executable, "-c", hold]
with (
    subprocess.Popen([*run, base / "one/lock"], stdout=subprocess.PIPE) as victim,
    subprocess.Popen([*run, base / "two/lock"], stdout=subprocess.PIPE) as holder,
):
    try:
        victim.stdout.readline()
        holder.stdout.readline()
        facts = {"pid": victim.pid, "rules_version": 1, "reloads": 0}
        (base / "two/agent.json").write_text(json.dumps(facts))
        try:
            state.reload(base / "two")
        except UnavailableError as error:
            print(error)
        assert victim.poll() is None
    finally:
        victim.kill()
        holder.kill()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_reload_signals_no_holder_of_a_file_with_the_same_number_on_another_disk(tmp_path):
    run = ["unshare", "--mount", sys.executable, "-c", SAME_NUMBER, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    if "mount" in done.stderr:
        pytest.skip("NO MOUNTS in this container")
    assert (done.returncode, done.stderr) == (0, "")
    assert "which does not hold the lock" in done.stdout


@pytest.fixture
def bystander():
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_a_reload_signals_nobody_who_does_not_hold_the_lock(path, bystander):
    with StateFolder(path):
        (path / "agent.json").write_text(json.dumps({"pid": bystander.pid, "rules_version": 1, "reloads": 0}))
        with pytest.raises(UnavailableError, match=f"pid {bystander.pid}, which does not hold the lock"):
            reload(path)
    assert bystander.poll() is None


def test_a_reload_of_a_process_that_has_ended(path, bystander):
    bystander.kill()
    bystander.wait()
    with StateFolder(path):
        (path / "agent.json").write_text(json.dumps({"pid": bystander.pid, "rules_version": 1, "reloads": 0}))
        with pytest.raises(UnavailableError, match=f"agent.json names pid {bystander.pid}: No such process"):
            reload(path)


def test_a_reload_signals_the_holder_of_the_lock(path):
    with StateFolder(path) as folder:
        folder.publish({"rules_version": 4, "reloads": 1})
        answer = {"rules_version": 6, "reloads": 2, "reload_refused": "", "restart_needed": ["kafka.brokers"]}
        with answering(folder, answer):
            assert reload(path) == (6, ("kafka.brokers",))


def test_a_reload_that_is_refused_gives_the_producers_reason(path):
    with StateFolder(path) as folder:
        folder.publish({"rules_version": 4, "reloads": 1})
        # The version rises too, as when cgroups come and go.
        answer = {"rules_version": 5, "reloads": 2, "reload_refused": "rule 1: no such user"}
        with answering(folder, answer), pytest.raises(ConfigError, match="the configuration: rule 1: no such user"):
            reload(path)


def test_the_answer_is_not_that_of_a_reload_that_had_begun_before(path):
    with StateFolder(path) as folder:
        earlier = {"rules_version": 4, "reloads": 2, "reload_refused": "an old file", "reload_began_ns": 1}
        folder.publish({**earlier, "reloads": 1})
        later = threading.Timer(0.2, lambda: folder.publish({"rules_version": 5, "reloads": 3, **began()}))
        with answering(folder, earlier, later.start):
            assert reload(path) == (5, ())
        later.join()


def began() -> dict[str, int]:
    return {"reload_began_ns": time.monotonic_ns()}


@contextmanager
def answering(folder: StateFolder, answer: dict[str, Any], then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Publish an answer when SIGHUP arrives; it is that of a reload that begins then, unless it says when."""

    def answered(*_: object) -> None:
        folder.publish({**began(), **answer})
        then()

    before = signal.signal(signal.SIGHUP, answered)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
