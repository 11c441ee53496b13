"""The state folder: one producer at a time, which others find."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from producer.errors import BusyError, ConfigError
from producer.state import StateFolder, running

FACTS = {"brokers": "127.0.0.1:9092", "registry": None}
HOLD = """
import pathlib, signal, sys
from producer.state import StateFolder
with StateFolder(pathlib.Path(sys.argv[1])) as folder:
    folder.publish({"brokers": "b:1"})
    print("locked", flush=True)
    signal.pause()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some" / "state"


def test_what_is_published_is_found_while_the_producer_runs(path):
    with StateFolder(path) as folder:
        assert running(path) is None
        folder.publish(FACTS)
        assert running(path) == {"pid": os.getpid(), **FACTS}
        folder.publish({**FACTS, "registry": "r"})
        assert running(path) == {"pid": os.getpid(), **FACTS, "registry": "r"}
    assert running(path) is None
    assert [file.name for file in path.iterdir()] == ["lock"]


def test_the_folder_is_its_owners_alone(path):
    with StateFolder(path):
        assert path.stat().st_mode & 0o777 == 0o700
        assert (path / "lock").stat().st_mode & 0o777 == 0o600


def test_a_second_producer_is_refused_and_told_the_pid_of_the_first(path):
    with StateFolder(path) as folder:
        with pytest.raises(BusyError, match=f"state_dir {path}: pid not ready yet"), StateFolder(path):
            pass
        folder.publish(FACTS)
        with pytest.raises(BusyError, match=f"state_dir {path}: pid {os.getpid()}$"), StateFolder(path):
            pass
        assert running(path) == {"pid": os.getpid(), **FACTS}
    with StateFolder(path):
        pass


def test_a_producer_that_was_killed_is_not_believed_and_does_not_keep_others_out(path):
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"locked\n"
            assert running(path) == {"pid": holder.pid, "brokers": "b:1"}
        finally:
            holder.send_signal(signal.SIGKILL)
    assert json.loads((path / "agent.json").read_text())["pid"] == holder.pid
    assert running(path) is None

    with StateFolder(path):
        assert running(path) is None


def test_one_who_looks_does_not_keep_a_producer_out(path):
    """Whoever asks whether a producer runs holds the lock for a moment."""
    with StateFolder(path):
        pass
    with (path / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        letting_go = threading.Timer(0.02, fcntl.flock, [lock, fcntl.LOCK_UN])
        letting_go.start()
        with StateFolder(path):
            pass
        letting_go.join()


def test_a_folder_that_cannot_be_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"state_dir {tmp_path}/file: File exists"), StateFolder(tmp_path / "file"):
        pass


@pytest.mark.parametrize("content", ["", "{", "\x00"])
def test_torn_facts_are_no_facts(path, content):
    with StateFolder(path):
        (path / "agent.json").write_text(content)
        assert running(path) is None


def test_no_folder_is_no_producer(tmp_path):
    assert running(tmp_path / "none") is None
