"""The state folder: one producer at a time, which others find."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest

from producer.commands.check import examine
from producer.config.load import Config
from producer.errors import BusyError, ConfigError, UnavailableError
from producer.host.state import StateFolder, running
from tests.support.disks import files_of_at_most

FACTS = {"brokers": "127.0.0.1:9092", "registry": None}
HOLD = """
import pathlib, signal, sys
from producer.host.state import StateFolder
with StateFolder(pathlib.Path(sys.argv[1])) as folder:
    folder.publish({"brokers": "b:1"})
    print("locked", flush=True)
    signal.pause()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some" / "state"


def test_published_facts_are_found_while_the_producer_runs(path):
    with StateFolder(path) as folder:
        assert running(path) is None
        folder.publish(FACTS)
        assert running(path) == {"pid": os.getpid(), **FACTS}
        folder.publish({**FACTS, "registry": "r"})
        assert running(path) == {"pid": os.getpid(), **FACTS, "registry": "r"}
    assert running(path) is None
    assert [file.name for file in path.iterdir()] == ["lock"]


def test_facts_that_could_not_be_published_are_published_later(path):
    with StateFolder(path) as folder:
        with files_of_at_most(0), pytest.raises(OSError, match="too large"):
            folder.publish_if_new(FACTS)
        assert running(path) is None
        folder.publish_if_new(FACTS)
        assert running(path) == {"pid": os.getpid(), **FACTS}


def test_a_folder_that_was_removed_or_replaced_is_an_error_and_another_producers_is_left_alone(path):
    with ExitStack() as ours:
        folder = ours.enter_context(StateFolder(path))
        folder.publish_if_new(FACTS)
        shutil.rmtree(path)
        for _ in range(2):
            with pytest.raises(UnavailableError, match=f"state_dir {path} was removed or replaced: restart"):
                folder.publish_if_new(FACTS)
        with StateFolder(path) as theirs:
            theirs.publish_if_new({**FACTS, "registry": "theirs"})
            with pytest.raises(UnavailableError, match="was removed or replaced"):
                folder.publish_if_new({**FACTS, "registry": "ours"})
            ours.close()
            assert running(path) == {"pid": os.getpid(), **FACTS, "registry": "theirs"}


def test_the_folder_is_its_owners_alone(path):
    with StateFolder(path):
        assert path.stat().st_mode & 0o777 == 0o700
        assert (path / "lock").stat().st_mode & 0o777 == 0o600


def test_a_second_producer_is_refused_with_the_pid_of_the_first(path):
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


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_by_a_start_and_by_check(path, monkeypatch, code):
    """NFS without rpc.statd, Lustre without its option flock, and some of FUSE."""

    def without_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with (
        pytest.raises(UnavailableError, match=f"state_dir {path}: cannot be locked: .*: use a local disk"),
        StateFolder(path),
    ):
        pass
    found = [each for each in examine(Config(state_dir=path), servers=False) if each.subject == "state_dir"]
    assert [(each.exit_code, "cannot be locked" in each.text) for each in found] == [(69, True)]


def test_checking_the_lock_does_not_keep_a_producer_out(path):
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


def test_an_impossible_folder_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"state_dir {tmp_path}/file: File exists"), StateFolder(tmp_path / "file"):
        pass


def test_a_link_to_nowhere_and_a_link_to_a_folder(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "none")
    with pytest.raises(ConfigError, match=f"state_dir {link}: a link to {tmp_path}/none, which is not a folder"):
        StateFolder(link).__enter__()
    (tmp_path / "none").mkdir()
    with StateFolder(link) as folder:
        folder.publish(FACTS)
        assert running(link) == {"pid": os.getpid(), **FACTS}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_writes_nothing_into_the_folder_of_another_user(tmp_path):
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to the user with uid 65534: run this as that user"):
        StateFolder(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []
    config = Config().with_values(state_dir=tmp_path)
    assert [each.exit_code for each in examine(config, servers=False) if each.subject == "state_dir"] == [78]


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
MODES = {"open to all": 0o777, "open to a group": 0o770, "itself open to all": 0o777, "itself sticky": 0o1777}


@as_root
@pytest.mark.parametrize("make", ["folder above", "link", "link above", "behind a link", *MODES])
def test_root_writes_nothing_where_another_user_could_put_a_link(tmp_path, make):
    theirs, victim = tmp_path / "theirs", tmp_path / "victim"
    theirs.mkdir()
    victim.mkdir()
    path = theirs / "state"
    if make == "link":
        path.symlink_to(victim)
        os.lchown(path, 65534, 65534)
    elif make == "link above":
        (theirs / "there").symlink_to(victim)
        os.lchown(theirs / "there", 65534, 65534)
        path = theirs / "there" / "state"
    elif make == "behind a link":
        os.chown(theirs, 65534, 65534)
        path = tmp_path / "link"
        path.symlink_to(theirs / "state")
        (theirs / "state").mkdir()
    elif make in MODES:
        where = path if "itself" in make else theirs
        where.mkdir(exist_ok=True)
        os.chown(where, 0, 65534)
        where.chmod(MODES[make])
    else:
        os.chown(theirs, 65534, 65534)
    with pytest.raises(ConfigError, match="so root does not write below it: "):
        StateFolder(path).__enter__()
    config = Config().with_values(state_dir=path)
    assert [each.exit_code for each in examine(config, servers=False) if each.subject == "state_dir"] == [78]
    assert list(victim.iterdir()) == []
    assert not (theirs / "state" / "lock").exists()


@as_root
def test_roots_own_links_and_sticky_folders_are_followed(tmp_path):
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    (tmp_path / "link").symlink_to("sticky/state")
    (tmp_path / "sticky" / "state").mkdir()
    (tmp_path / "sticky" / "state").chmod(0o770)  # root's group
    with StateFolder(tmp_path / "link"):
        assert (tmp_path / "sticky" / "state" / "lock").exists()


def be_folder(path):
    path.mkdir()


def be_pipe(path):
    os.mkfifo(path)


def be_link(path):
    (path.parent / "elsewhere").write_text('{"pid": 1000}')
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("what", [be_folder, be_pipe, be_link])
def test_a_lock_that_is_no_file_is_refused(tmp_path, what):
    what(tmp_path / "lock")
    with pytest.raises(ConfigError, match=f"state_dir {tmp_path}: .*lock"):
        StateFolder(tmp_path).__enter__()
    assert running(tmp_path) is None


@pytest.mark.parametrize("what", [be_folder, be_pipe, be_link])
def test_anything_in_place_of_agent_json_is_not_read_and_stops_no_producer(path, what):
    with StateFolder(path):
        what(path / "agent.json")
        assert running(path) is None
    with StateFolder(path) as folder:
        folder.publish(FACTS)
        assert running(path) == {"pid": os.getpid(), **FACTS}
    if what is be_link:
        assert (path / "elsewhere").read_text() == '{"pid": 1000}'


def test_a_link_in_the_place_of_the_new_facts_is_not_followed(path, tmp_path):
    (tmp_path / "victim").write_text("as it was")
    with StateFolder(path) as folder:
        (path / "agent.new").symlink_to(tmp_path / "victim")
        folder.publish(FACTS)
        assert running(path) == {"pid": os.getpid(), **FACTS}
    assert (tmp_path / "victim").read_text() == "as it was"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "\x00",
        "null",
        "[]",
        "7",
        "{}",
        '{"pid": null}',
        '{"pid": "7"}',
        '{"pid": true}',
        '{"pid": 1}',
        '{"pid": 0}',
        '{"pid": -1}',
        '{"pid": 4294967297}',
        '{"pid": 7.5}',
        '{"pid": 7, "brokers": 1}',
        "[" * 60000,
        '{"pid": 7, "rules_version": "1"}',
        '{"pid": 7, "status_url": []}',
        '{"pid": 7}' + " " * 65536,
    ],
    ids=lambda content: content[:40],
)
def test_torn_facts_are_no_facts(path, content):
    with StateFolder(path):
        (path / "agent.json").write_text(content)
        assert running(path) is None


def test_no_folder_is_no_producer(tmp_path):
    assert running(tmp_path / "none") is None
