"""Users that no name service knew are looked for in a thread."""

import pwd
import threading
from types import SimpleNamespace

import pytest

from producer.rules.users import Users
from tests.support.rebpf import wait_until


def test_a_name_service_that_hangs_holds_nobody_and_its_answer_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = threading.Event(), []

    def look_up(name: str) -> SimpleNamespace:
        asked.append(name)
        answers.wait(60)
        if name == "none":
            raise KeyError(name)
        return SimpleNamespace(pw_uid=7)

    monkeypatch.setattr(pwd, "getpwnam", look_up)
    clock = [0.0]
    users = Users(lambda: clock[0])
    users.look_up([])
    assert asked == []
    for clock[0] in (0.0, 29.0, 100.0):
        users.look_up(["none", "late"])
    wait_until("the name service is asked", lambda: asked)
    assert asked == ["none"], "one look at a time"
    assert users.take("late") is None
    answers.set()
    assert wait_until("the user is found", lambda: users.take("late")) == 7
    assert users.take("late") is users.take("none") is None
    wait_until("the lookup has ended", lambda: users.look_up(["late"]) or len(asked) > 2)
    users.look_up(["late"])
    assert asked == ["none", "late", "late"], "at most every 30 s"
