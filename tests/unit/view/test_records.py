"""Records by column have the values that fastavro reads."""

from typing import Any

import numpy as np
import pytest

from producer.consume.decode import Decoder
from producer.events import FLOWS, RETRANSMITS, TRANSMITS, Batch, Stream
from producer.schemas import load_schema
from producer.view.records import Records
from tests.support.encoding import OFFSET_NS, decode, encoder_of, messages, parsed

RANDOM = np.random.default_rng(7)


def random_rows(dtype: Any, count: int) -> Any:
    """Return rows with any numbers that fit their fields."""
    rows = np.zeros(count, dtype)
    for name in dtype.names:
        kind = dtype[name]
        if kind.names:
            rows[name] = random_rows(kind, count)
        else:
            most = min(1 << 60, int(np.iinfo(kind.base).max), (1 << 31) - 1 if kind.base.itemsize == 4 else 1 << 60)
            rows[name] = RANDOM.integers(0, most, (count, *kind.shape), endpoint=True)
    return rows


@pytest.mark.parametrize("stream", [TRANSMITS, RETRANSMITS, FLOWS], ids=lambda stream: stream.name)
def test_records_are_those_that_fastavro_reads(stream: Stream) -> None:
    schema = load_schema(stream.schema_file)
    rows = random_rows(stream.dtype, 50)
    values = [value for _, value in messages(encoder_of(stream).encode(Batch(stream, rows), OFFSET_NS))]
    parts, rejected = Decoder(None).tables(values, None)
    assert not rejected
    [(_, table)] = parts
    records = Records.from_table(stream, table)
    expected = [decode(value, parsed(schema))[1] for value in values]
    assert [*records.rows()] == expected
    chosen = np.arange(50) % 2 == 0
    assert [*records.select(chosen).rows()][1]["cpu_seq"] == expected[2]["cpu_seq"]


def test_only_the_fields_asked_for_are_decoded() -> None:
    rows = np.zeros(3, RETRANSMITS.dtype)
    values = [value for _, value in messages(encoder_of(RETRANSMITS).encode(Batch(RETRANSMITS, rows), OFFSET_NS))]
    [(_, table)], rejected = Decoder(None).tables([*values, b"foreign"], frozenset({"cause", "unit", "no_such"}))
    assert [each.row for each in rejected] == [3]
    assert set(Records.from_table(RETRANSMITS, table).columns) == {"cause", "unit"}


def test_rows_become_columns_and_rows() -> None:
    rows = [
        {"host": "a", "srtt_us": None, "labels": {"env": "prod", "dc": "a"}},
        {"host": None, "srtt_us": 3, "labels": {}},
    ]
    assert [*Records.from_rows(RETRANSMITS, rows).rows()] == rows
    assert Records.from_rows(RETRANSMITS, rows)["comm"].values() == [None, None]
