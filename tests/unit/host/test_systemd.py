"""Notifications to systemd, and the proof that they arrived."""

import contextlib
import os
import socket

import pytest

from producer.errors import UnavailableError
from producer.host import systemd
from producer.host.systemd import barrier, notify
from tests.support.fake_systemd import Manager


def test_without_a_manager_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    barrier()


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_text_and_descriptors_arrive(kind, tmp_path, monkeypatch):
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, open("/dev/null") as file:
        manager.bind(name if kind == "path" else "\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", name if kind == "path" else "@" + name)
        assert notify("READY=1\nSTATUS=capturing", [file.fileno()])
        packet, (descriptor,), *_ = socket.recv_fds(manager, 4096, 2)
        assert packet == b"READY=1\nSTATUS=capturing"
        assert os.path.sameopenfile(descriptor, file.fileno())
        os.close(descriptor)


def test_a_missing_manager_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    with pytest.raises(UnavailableError, match=r"none: .*No such file"):
        notify("READY=1")


def test_behind_the_barrier_all_has_been_taken_account_of(tmp_path, monkeypatch):
    with Manager(tmp_path) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        sent = [f"STATUS={number}" for number in range(97)]
        for message in sent:
            notify(message)
        barrier()
        assert manager.messages == [*sent, "BARRIER=1"]


def test_a_manager_that_is_stuck_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(systemd, "TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with pytest.raises(UnavailableError, match="not answered"):
            barrier()


def test_the_watchdog_is_notified_twice_per_interval_and_only_if_there_is_one(tmp_path, monkeypatch):
    with Manager(tmp_path) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        monkeypatch.delenv("WATCHDOG_USEC", raising=False)
        systemd.Watchdog().step(0.0)
        monkeypatch.setenv("WATCHDOG_USEC", "2000000")
        watchdog = systemd.Watchdog()
        for now_s in (10.0, 10.5, 11.0, 11.9, 12.1):
            watchdog.step(now_s)
        monkeypatch.setenv("WATCHDOG_PID", "1")
        systemd.Watchdog().step(20.0)
        barrier()
        assert manager.messages == ["WATCHDOG=1"] * 3 + ["BARRIER=1"]


@pytest.mark.parametrize("stuck", [True, False])
def test_a_manager_that_is_stuck_or_gone_delays_and_ends_no_step(stuck, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        if stuck:
            manager.bind(str(tmp_path / "notify"))
            with contextlib.suppress(UnavailableError):
                while True:
                    notify("STATUS=full", timeout_s=0.01)
        systemd.Watchdog().step(10.0)
        systemd.try_notify("STOPPING=1")
    assert [record.args[0] for record in caplog.records] == ["WATCHDOG=1", "STOPPING=1"]
