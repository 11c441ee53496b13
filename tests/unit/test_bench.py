"""The benchmark's consumer finds the time in messages without decoding them."""

from producer.events import TRANSMITS, Batch
from tests.bench import stages
from tests.bench.reader import ts_ns


def test_the_events_time_is_read_from_the_message():
    rows = stages.rows()
    rows["s"]["ts"][:3] = [0, 1, 63]
    messages = stages.messages(stages.encoder().encode(Batch(TRANSMITS, rows), stages.UTC_OFFSET_NS))

    assert [ts_ns(each) for each in messages] == (rows["s"]["ts"] + stages.UTC_OFFSET_NS).tolist()
