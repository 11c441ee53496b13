"""Silent hosts: by the heartbeat's own interval, told once, and not where a producer stopped as it should."""

from producer.alertsilence import Hosts, Silence


def beat(host: str = "web-1", state: str = "ok", interval_s: float = 10.0) -> dict[str, object]:
    return {"host": host, "state": state, "interval_s": interval_s}


def test_a_host_is_silent_after_three_of_its_own_intervals_and_that_is_told_once() -> None:
    hosts = Hosts()
    assert hosts.heard(beat(), 100) == []
    assert hosts.heard(beat("web-2", interval_s=60), 100) == []
    assert hosts.look(130) == []
    assert hosts.look(130.1) == [Silence("web-1", True, 100)]
    assert hosts.look(140) == []


def test_a_host_that_is_heard_again_is_told_once_and_can_go_silent_again() -> None:
    hosts = Hosts()
    hosts.heard(beat(), 100)
    hosts.look(131)
    assert hosts.heard(beat(), 150) == [Silence("web-1", False, 150)]
    assert hosts.heard(beat(), 160) == []
    assert hosts.look(190) == []
    assert hosts.look(191) == [Silence("web-1", True, 160)]


def test_a_host_that_stopped_as_it_should_is_not_silent() -> None:
    hosts = Hosts()
    hosts.heard(beat(), 100)
    hosts.heard(beat(state="stopped"), 105)
    assert hosts.look(1000) == []


def test_a_silent_host_whose_last_heartbeat_says_stopped_is_resolved() -> None:
    hosts = Hosts()
    hosts.heard(beat(), 100)
    hosts.look(131)
    assert hosts.heard(beat(state="stopped"), 140) == [Silence("web-1", False, 140)]
    assert hosts.look(1000) == []


def test_an_older_heartbeat_changes_nothing() -> None:
    hosts = Hosts()
    hosts.heard(beat(), 100)
    assert hosts.heard(beat(state="stopped"), 90) == []
    assert hosts.look(131) == [Silence("web-1", True, 100)]
    assert hosts.heard(beat(), 95) == []
    assert hosts.silent == {"web-1"}
