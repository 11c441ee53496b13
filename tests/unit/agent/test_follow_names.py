"""The names in rules are followed without a reload: looked up in a thread, and again if that fails."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from producer.agent.reload import ConfigReader, InForce
from producer.agent.supervise import Pace
from producer.config.load import Config, RuleConfig
from producer.rules.resolve import resolve
from tests.support.rebpf import wait_until


class Hooks:
    """Takes rules, as the kernel does."""

    version = 1

    def __init__(self) -> None:
        self.tables: list[Any] = []

    def put(self, tables: Any) -> int:
        self.tables.append(tables)
        return 2


def in_force_of(config: Config, cgroups: Path) -> tuple[InForce, Hooks]:
    hooks: Any = Hooks()
    return InForce(hooks, config, resolve(config, cgroups), ConfigReader(lambda: config), cgroups), hooks


def make_due(in_force: InForce) -> None:
    """Let the next lookup start at once."""
    in_force._lookup_at, in_force._lookup_pace = 0, Pace()


def test_a_lookup_of_many_cgroups_does_not_block_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()
    config = Config(rules=(RuleConfig(unit=("new.service",)),))

    def slow(*rules: Any) -> Any:
        assert may_end.wait(60)
        return resolve(config, tmp_path)

    monkeypatch.setattr("producer.agent.reload.follow", slow)
    in_force, hooks = in_force_of(config, tmp_path)
    (tmp_path / "new.service").mkdir()
    make_due(in_force)
    in_force.follow_names()
    in_force.follow_names()
    assert not hooks.tables
    may_end.set()
    wait_until("the rules follow", lambda: in_force.follow_names() or hooks.tables)
    assert in_force.version == 2


def test_an_interface_that_does_not_exist_is_a_reason_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_force, hooks = in_force_of(Config(rules=(RuleConfig(interface=("tun77",)),)), tmp_path)
    (reason,) = in_force.reasons
    assert reason.startswith("rule 1: interface tun77: ")
    assert reason.endswith(": it matches nothing until it exists")
    assert f"rules: {reason}" in caplog.text
    monkeypatch.setattr("socket.if_nametoindex", lambda name: 12)
    make_due(in_force)
    wait_until("the rules follow", lambda: in_force.follow_names() or hooks.tables)
    assert (in_force.reasons, hooks.tables[0].values["interface"]) == ([], {12: 1})
    monkeypatch.setattr("socket.if_nametoindex", lambda name: 13)
    make_due(in_force)
    wait_until(
        "the rules follow an interface that was created again", lambda: in_force.follow_names() or hooks.tables[1:]
    )
    assert hooks.tables[1].values["interface"] == {13: 1}


def test_an_error_in_a_lookup_is_a_failed_step_and_the_next_lookup_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_force, _ = in_force_of(Config(rules=(RuleConfig(unit=("new.service",)),)), tmp_path)
    make_due(in_force)
    with monkeypatch.context() as patched:
        patched.setattr("producer.agent.reload.follow", lambda *rules: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            wait_until("the failure", in_force.follow_names)
        with pytest.raises(ZeroDivisionError):  # it lasts until a lookup succeeds
            in_force.follow_names()
    (tmp_path / "new.service").mkdir()
    make_due(in_force)
    with contextlib.suppress(ZeroDivisionError):
        in_force.follow_names()  # starts the next one
    wait_until("it is over", lambda: in_force._lookup_error is None)
    wait_until("the rules follow", lambda: in_force.follow_names() or in_force.version == 2)
