"""Text in columns of a terminal, where East Asian characters take two columns and combining ones none."""

from rich.cells import cell_len, set_cell_size
from rich.color import ColorSystem
from rich.style import Style

from producer.host.text import printable


def size(text: str) -> int:
    """Return how many columns a text takes."""
    return len(text) if text.isascii() else cell_len(text)


def cut(text: str, columns: int) -> str:
    """Return a text escaped, and of at most this width."""
    text = printable(text)
    return text if size(text) <= columns else f"{set_cell_size(text, columns - 1)}~"


def fit(text: str, columns: int) -> str:
    """Return a text escaped, and of this width, aligned to the left if it is negative; 0 is any width."""
    text = cut(text, abs(columns)) if columns else printable(text)
    padding = " " * (abs(columns) - size(text))
    return padding + text if columns > 0 else text + padding


def styled(text: str, style: str) -> str:
    """Return a text in a style of rich."""
    return Style.parse(style).render(text, color_system=ColorSystem.STANDARD)
