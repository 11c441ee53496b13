"""Names as they are in events (producer.host.text.name), and back."""

from urllib.parse import unquote_to_bytes


def raw_name(text: str) -> bytes | None:
    """Return the bytes of a name; None if it was cut."""
    return None if "%~" in text else unquote_to_bytes(text)
