"""Event numbers: none is used twice within a boot, however the last run ended."""

import contextlib
import itertools
import json
import logging

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from producer.kernel.sequence import EventNumbers, _crc32
from tests.support.disks import files_of_at_most

BOOT = "b5f8c1d2"
ZEROS = {"transmit": [0, 0], "retransmit": [0, 0], "flow": [0, 0]}
LAST = {"transmit": [1009, 7], "retransmit": [0, 13], "flow": [3, 101]}


def numbers(folder, uptime_s=0.0, boot=BOOT):
    return EventNumbers(folder, boot, 2, lambda: uptime_s)


def all_at(generation):
    return {stream: [generation << 32] * 2 for stream in ZEROS}


def test_the_first_start_begins_at_zero(tmp_path):
    assert numbers(tmp_path, 1000).start() == ZEROS


def test_an_orderly_stop_is_continued(tmp_path):
    first = numbers(tmp_path)
    first.start()
    first.stop(LAST)
    second = numbers(tmp_path, 1000)
    assert second.start() == LAST
    second.stop(LAST)
    assert numbers(tmp_path, 2000).start() == LAST


def test_a_file_without_all_streams_lets_all_numbers_jump(tmp_path):
    content = {"boot_id": BOOT, "generation": 0, "last": {name: LAST[name] for name in ("transmit", "retransmit")}}
    (tmp_path / "sequence.json").write_text(json.dumps({**content, "crc32": _crc32(content)}))
    assert numbers(tmp_path, 100).start() == all_at(100)


def test_another_boot_begins_at_zero(tmp_path):
    first = numbers(tmp_path)
    first.start()
    first.stop(LAST)
    assert numbers(tmp_path, boot="another").start() == ZEROS


def test_after_a_crash_an_unused_generation_begins(tmp_path):
    numbers(tmp_path, 50).start()
    assert numbers(tmp_path, 100.9).start() == all_at(100)
    assert numbers(tmp_path, 100.9).start() == all_at(101), "twice in a second"
    assert numbers(tmp_path, 100.9).start() == all_at(102)
    third = numbers(tmp_path, 300)
    assert third.start() == all_at(300)
    third.stop({**all_at(300), "transmit": [(300 << 32) + 5, 300 << 32]})
    fourth = numbers(tmp_path, 400)
    assert fourth.start()["transmit"] == [(300 << 32) + 5, 300 << 32]


def test_overlapping_programs_get_a_separate_generation(tmp_path):
    assert numbers(tmp_path, 0).start(overlap=True) == all_at(1)
    first = numbers(tmp_path, 20)
    first.start()
    first.stop(LAST)
    assert numbers(tmp_path, 30).start(overlap=True) == all_at(30)


def test_programs_that_were_taken_over_are_not_continued_from_an_older_stop(tmp_path):
    first = numbers(tmp_path)
    first.start()
    first.stop(LAST)
    numbers(tmp_path).resume()
    assert numbers(tmp_path, 30).start() == all_at(30)


def test_numbers_of_a_generation_from_elsewhere_are_never_begun_again(tmp_path):
    taken_over = numbers(tmp_path)
    taken_over.resume()
    last = {**ZEROS, "transmit": [(77 << 32) + 1, 0]}
    taken_over.stop(last)
    second = numbers(tmp_path)
    assert second.start() == last
    assert numbers(tmp_path).start() == all_at(78)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        json.dumps({"boot_id": BOOT, "generation": 1 << 40, "last": None}),
        json.dumps({"boot_id": BOOT, "generation": "1", "last": None}),
        json.dumps({"boot_id": BOOT, "generation": 0, "last": {"transmit": [1, 2]}}),
        json.dumps({"boot_id": BOOT, "generation": 0, "last": {"transmit": [1], "retransmit": [2]}}),
        json.dumps({"boot_id": BOOT, "generation": 0, "last": {"transmit": [1, -1], "retransmit": [2, 2]}}),
        json.dumps({"boot_id": BOOT, "generation": 0, "last": [1, 2]}),
    ],
)
def test_an_unusable_file_causes_a_jump_and_a_warning(tmp_path, content, caplog):
    (tmp_path / "sequence.json").write_text(content)
    assert numbers(tmp_path, 55).start() == all_at(55)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert numbers(tmp_path, 66).start() == all_at(66)


def test_without_a_writable_file_numbers_differ_from_all_that_the_file_will_contain(tmp_path, caplog):
    first = numbers(tmp_path)
    first.start()
    first.stop(LAST)
    with files_of_at_most(0):
        assert numbers(tmp_path, 100).start() == all_at(1 << 30 | 100)
        assert len(caplog.records) == 1
        unwritten = numbers(tmp_path, 200)
        assert unwritten.start() == all_at(1 << 30 | 200)
    assert numbers(tmp_path, 300).start() == LAST, "the file knows no better"
    assert numbers(tmp_path, 300).start() == all_at(300)
    unwritten.stop(all_at(1 << 30 | 200))
    assert numbers(tmp_path, 400).start() == all_at(1 << 30 | 200)
    assert numbers(tmp_path, 500).start() == all_at(1 << 30 | 500), "a crash after it"


def test_a_stop_that_cannot_be_written_is_no_error(tmp_path, caplog):
    first = numbers(tmp_path)
    first.start()
    with files_of_at_most(0):
        first.stop(LAST)
    assert len(caplog.records) == 1


def test_numbers_fit_a_signed_long_after_34_years(tmp_path):
    with files_of_at_most(0):
        assert max(numbers(tmp_path, 34 * 365 * 86_400).start()["transmit"]) < 1 << 63


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["stop", "crash"]),
            st.booleans(),
            st.integers(0, 100_000),
            st.integers(1, 1 << 20),
            st.booleans(),
        ),
        max_size=12,
    )
)
@example([("stop", False, 1, 1000, True), ("stop", False, 1, 1000, False), ("stop", True, 100_000, 1 << 20, True)])
def test_no_number_is_given_twice(tmp_path_factory, runs):
    """Runs with or without a disk, at up to 2^20 numbers per second, that end in any way."""
    folder = tmp_path_factory.mktemp("numbers")
    uptime_s = 60
    given_out: list[tuple[int, int]] = []
    for end, can_write, length_s, rate, can_write_at_end in runs:
        run = numbers(folder, uptime_s)
        with contextlib.nullcontext() if can_write else files_of_at_most(0):
            first = run.start()["transmit"][0]
        last = first + length_s * rate
        given_out.append((first, last))
        uptime_s += length_s + 1
        if end == "stop":
            with contextlib.nullcontext() if can_write_at_end else files_of_at_most(0):
                run.stop({**ZEROS, "transmit": [last, 0]})
    given_out.sort()
    assert all(last <= first for (_, last), (first, _) in itertools.pairwise(given_out))


def test_numbers_beyond_the_last_generation_are_not_continued(tmp_path):
    numbers(tmp_path).start()
    content = {"boot_id": BOOT, "generation": 3, "last": {**LAST, "flow": [(1 << 63) - 1, 0]}}
    (tmp_path / "sequence.json").write_text(json.dumps({**content, "crc32": _crc32(content)}))
    second = numbers(tmp_path, 100)
    starts = second.start()
    second.stop(starts)
    assert numbers(tmp_path, 200).start() == starts
