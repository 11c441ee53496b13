"""Pictures of terminals as SVG: text that can be searched, in the colors of a light or a dark screen."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from xml.sax.saxutils import escape

from rich.style import Style
from rich.text import Text

_CELL_WIDTH, _LINE_HEIGHT, _MARGIN = 8.4, 18, 12
_FONT_SIZE = 14
_COLORS = {1: "red", 2: "green", 3: "yellow"}
_STYLE = """
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1f2328; }
.screen { fill: #f6f8fa; stroke: #8c959f; } .bar { fill: #57606a; } .on-bar { fill: #ffffff; }
.bold { font-weight: bold; } .red { fill: #b3151f; } .yellow { fill: #7d4e00; } .green { fill: #116329; }
.dim { fill: #57606a; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; }
.screen { fill: #0d1117; stroke: #484f58; } .bar { fill: #8b949e; } .on-bar { fill: #0d1117; }
.red { fill: #ff7b72; } .yellow { fill: #e3b341; } .green { fill: #56d364; } .dim { fill: #9198a1; }
}
"""


def svg(lines: Sequence[str], columns: int, title: str) -> str:
    """Return a picture of lines, which may have escape sequences for colors."""
    width, height = round(columns * _CELL_WIDTH) + 2 * _MARGIN, len(lines) * _LINE_HEIGHT + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect class="screen" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>',
    ]
    for number, line in enumerate(lines):
        parts += _line(line, _MARGIN + number * _LINE_HEIGHT)
    return "\n".join([*parts, "</svg>", ""])


def _line(line: str, top: int) -> Iterator[str]:
    """Place each run of words by itself, so that columns are aligned with any font."""
    text = Text.from_ansi(line)
    styles = [""] * len(text.plain)
    for span in text.spans:
        styles[span.start : span.end] = [_classes(span.style)] * (span.end - span.start)
    at = 0
    for classes, cells in groupby(styles):
        size = len(list(cells))
        left = _MARGIN + at * _CELL_WIDTH
        if "on-bar" in classes:
            width = size * _CELL_WIDTH
            yield f'<rect class="bar" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_LINE_HEIGHT}"/>'
        for run in re.finditer(r"\S+(?: \S+)*", text.plain[at : at + size]):
            x, length = left + run.start() * _CELL_WIDTH, len(run[0]) * _CELL_WIDTH
            how = f' class="{classes}"' if classes else ""
            yield (
                f'<text x="{x:.1f}" y="{top + _FONT_SIZE}" textLength="{length:.1f}"'
                f' lengthAdjust="spacingAndGlyphs"{how}>{escape(run[0])}</text>'
            )
        at += size


def _classes(style: Style | str) -> str:
    if isinstance(style, str):
        return ""
    if style.reverse:
        return "on-bar"
    color = _COLORS.get((style.color.number or 0) % 8, "") if style.color else ""
    return " ".join(filter(None, [color, "bold" if style.bold else "", "dim" if style.dim else ""]))
