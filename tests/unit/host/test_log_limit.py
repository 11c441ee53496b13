"""How often the same kind of message is logged."""

from producer.host.log_limit import LogLimit


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_kind_is_let_through_once_per_interval() -> None:
    clock = Clock()
    limit = LogLimit(30, clock)
    seen = []
    for clock.now in range(0, 65, 5):
        seen += [(clock.now, kind) for kind in ("disk", "broker") if limit.allows(kind)]
    assert seen == [(now, kind) for now in (0, 30, 60) for kind in ("disk", "broker")]


def test_a_kind_that_is_forgotten_is_let_through_again_and_others_are_not() -> None:
    limit = LogLimit(30, Clock())
    assert limit.allows("disk")
    assert limit.allows("broker")
    limit.forget("disk")
    assert limit.allows("disk")
    assert not limit.allows("broker")
    assert limit.has_logged
    limit.clear()
    assert not limit.has_logged
    assert limit.allows("broker")


def test_kinds_without_end_are_held_back_until_the_oldest_have_had_their_interval() -> None:
    clock = Clock()
    limit = LogLimit(30, clock, most=3)
    assert [limit.allows(f"at byte {number}") for number in range(5)] == [True, True, True, False, False]
    clock.now = 30
    assert [limit.allows(f"at byte {number}") for number in range(5, 10)] == [True, True, True, False, False]
