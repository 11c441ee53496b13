"""Times on the command line: any number of digits is a time."""

import pytest

from producer.errors import UsageError
from producer.host.times import parse_time

NOW_NS = 1_795_982_400_000_000_000
LATEST_NS = (1 << 63) - 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1h", NOW_NS - 3_600_000_000_000),
        ("1970-01-01T00:00:00.000001Z", 1000),
        ("1969-12-31", 0),
        ("0001-01-01T00:00+14:00", 0),
        ("9999-12-31T23:59:59-14:00", LATEST_NS),
        ("99999999999999999999d", 0),
        ("9" * 400 + "d", 0),
    ],
)
def test_a_time_fits_in_64_bits(text: str, expected: int) -> None:
    assert parse_time(text, NOW_NS) == expected


@pytest.mark.parametrize("text", ["", "1e5h", "-1h", "nan", "infs", "2026-02-30", "10000-01-01", "12:00"])
def test_anything_else_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected a time in UTC such as"):
        parse_time(text, NOW_NS)
