"""producer._native's arrays of librdkafka messages, against numpy."""

import ctypes
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from producer import _native
from producer.kafka.librdkafka import MESSAGE

Strings = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]


def _strings(values: list[bytes]) -> Strings:
    lengths = np.array([len(value) for value in values], np.int64)
    return np.frombuffer(b"".join(values), np.uint8), np.cumsum(lengths) - lengths, lengths


def _bytes(address: int, length: int) -> bytes:
    return ctypes.string_at(int(address), int(length))


@given(st.data())
def test_messages_point_to_the_chosen_rows(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=9)), min_size=1, max_size=9))
    chosen = data.draw(st.none() | st.lists(st.integers(0, len(values) - 1), max_size=20))
    batch = data.draw(st.integers(0, (1 << 44) - 1))
    payload, keys = _strings([value for value, _ in values]), _strings([key for _, key in values])
    out = np.full(len(values if chosen is None else chosen), 0xFF, MESSAGE)
    _native.messages(out, batch, *payload, *keys, None if chosen is None else np.array(chosen, np.int64))
    rows = range(len(values)) if chosen is None else chosen
    assert [(_bytes(m["payload"], m["len"]), _bytes(m["key"], m["key_len"])) for m in out] == [values[i] for i in rows]
    assert out["private"].tolist() == [batch << 20 | row for row in rows]
    assert not any(out[name].any() for name in ("err", "rkt", "partition", "offset"))


@pytest.mark.parametrize("row", [-1, 2, 1 << 62])
def test_a_row_outside_the_batch_is_an_error(row: int) -> None:
    strings = _strings([b"one", b"two"])
    with pytest.raises(ValueError, match="message 0 is outside its batch"):
        _native.messages(np.zeros(1, MESSAGE), 0, *strings, *strings, np.array([row]))


@pytest.mark.parametrize(("start", "length"), [(0, 7), (7, 0), (6, 1), (-1, 1), (0, -1), (1 << 62, 1 << 62)])
def test_bytes_outside_the_buffer_are_an_error(start: int, length: int) -> None:
    good = _strings([b"onetwo"])
    bad: Strings = good[0], np.array([start]), np.array([length])
    for payload, keys in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="message 0 is outside its batch"):
            _native.messages(np.zeros(1, MESSAGE), 0, *payload, *keys, None)


def test_arrays_of_other_sizes_are_errors() -> None:
    strings = _strings([b"one", b"two"])
    with pytest.raises(ValueError, match="2 messages for 1 rows"):
        _native.messages(np.zeros(2, MESSAGE), 0, *strings, *strings, np.array([0]))
    with pytest.raises(ValueError, match="starts: 4 bytes"):
        _native.messages(np.zeros(1, MESSAGE), 0, strings[0], b"1234", strings[2], *strings, None)
    with pytest.raises(ValueError, match="batch number"):
        _native.messages(np.zeros(1, MESSAGE), 1 << 44, *strings, *strings, None)
    with pytest.raises(ValueError, match="one item for each of 2 pointers"):
        _native.reports(np.zeros(2, np.uint64), np.zeros(1, np.int64))


_batches = st.integers(0, 2) | st.integers(0, (1 << 44) - 1)
_rows = st.integers(0, 3) | st.integers(0, (1 << 20) - 1)
_errors = st.sampled_from([0, 0, 0, -192, 10]) | st.integers(-(1 << 31), (1 << 31) - 1)


@given(st.lists(st.tuples(_batches, _errors, _rows), max_size=50))
def test_reports_are_split_where_batch_or_result_changes(values: list[tuple[int, int, int]]) -> None:
    messages = np.zeros(len(values), MESSAGE)
    messages["private"] = [batch << 20 | row for batch, _, row in values]
    messages["err"] = [err for _, err, _ in values]
    pointers = messages.ctypes.data + np.arange(len(values), dtype=np.uint64) * np.uint64(MESSAGE.itemsize)
    rows = np.empty(len(values), np.int64)
    found = _native.reports(pointers[::-1].copy(), rows)
    values.reverse()

    assert rows.tolist() == [row for _, _, row in values]
    expected = [(key, len(list(run))) for key, run in groupby((batch, err) for batch, err, _ in values)]
    assert [((batch, err), end - first) for batch, err, first, end in found] == expected
    assert [first for *_, first, _ in found] == [0, *(end for *_, end in found)][: len(found)]
