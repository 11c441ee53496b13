import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.host.text import MAX_NAME, name, printable
from tests.support.names import raw_name


@given(st.binary(max_size=200))
def test_a_name_of_any_bytes_is_printable_and_can_be_turned_back(raw: bytes) -> None:
    text = name(raw)
    assert text.isprintable()
    assert raw_name(text) == raw


@given(st.binary(min_size=MAX_NAME + 1, max_size=3000))
def test_a_long_name_is_bounded_and_differs_from_its_neighbors(raw: bytes) -> None:
    text = name(raw)
    assert len(text) <= MAX_NAME
    assert raw_name(text) is None
    assert name(raw + b"x") != text


def test_a_name_that_prints_is_left_alone() -> None:
    assert name(b"/system.slice/dev-disk-by\\x2duuid.swap") == "/system.slice/dev-disk-by\\x2duuid.swap"
    assert name("/größe/日本".encode()) == "/größe/日本"
    assert name(b"caf\xe9\n100%") == "caf%E9%0A100%25"


@given(st.text())
def test_printable_text_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown


@pytest.mark.parametrize(
    "number", [0x00AD, 0x034F, 0x115F, 0x180B, 0x200B, 0x200D, 0x2060, 0x3164, 0xFE0F, 0xFEFF, 0xE01EF]
)
def test_a_name_with_an_invisible_character_does_not_look_like_another(number: int) -> None:
    shown = printable(f"web{chr(number)}-1")
    assert shown.isascii()
    assert printable(f"größe {shown}") == f"größe {shown}"


def test_a_forged_line_stays_on_its_line() -> None:
    assert printable("x\r\n12:00 INFO ready\x1b[2J\u202e") == "x\\x0d\\x0a12:00 INFO ready\\x1b[2J\\u202e"
