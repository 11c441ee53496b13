"""The screen of `rebpf top` as lines of text: which columns fit, and how numbers look. Pure: no terminal, no clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from producer.view.cells import cut, fit, size, styled
from producer.view.line import duration
from producer.view.table import Detail, Line, Table

KEYS = {
    "p": "peer", "f": "flow", "h": "host", "u": "unit", "t": "container", "c": "comm", "o": "port", "n": "subnet",
    "a": "cause",
}  # fmt: skip
"""The grouping of each key."""
_BARS = " ▁▂▃▄▅▆▇█"
_ASCII_BARS = " .:-=+*#@"
_HELP = (
    "q)uit ?=help  p)eer f)low h)ost u)nit con(t)ainer c)omm p(o)rt sub(n)et c(a)use"
    "  s)ort /filter space=pause enter=details"
)
_SHORT_HELP = "q)uit ?=help pfhutcona=group s)ort /filter enter=details space=pause"
_MANUAL = (
    "RETR/S, SEGS/S  retransmitted segments and all segments per second",
    "RATIO           retransmitted share of the segments; red from 1 %",
    "FAIL            connects that failed, within the window of the rates",
    "FLOWS           open connections",
    "SRTT, P95       their smoothed round-trip times: median, 95th percentile",
    "CAUSE, CAUSES   of retransmissions in the last minute, most frequent first:",
    "  rto timeout, and slow_start the rest after it; fast by the peer's ACKs;",
    "  tlp tail loss probe; syn, syn_ack handshake",
    "LIMIT           what holds the connections back:",
    "  application   the sender has nothing to send",
    "  receiver      the peer reads too slowly",
    "  send_buffer   the sender's buffer is full",
    "  congestion    the path is full, and packets wait in a queue",
    "  loss          segments are lost without a queue: a bad link or a policer",
    "",
    "p f h u t c o n a  a line for each peer, flow, host, unit, container, comm,",
    "                   port, subnet or cause;  s sorts by the next column",
    "up down Enter      select a line; its worst connections in the last minute",
    "space /            pause; change the filter (Ctrl-U clears it)",
)
_NAME_WIDTH = 21
_MAX_NAME = 45
"""Longer names get the room that columns leave."""
_HIGH_RATIO = 0.01
_WITH_TITLE = 60
"""Narrower screens leave out the title, and what the rates cover."""
_LEAST_SOURCE = 8
"""To which the name of the source is cut before the rates are."""
_OF_CAUSES = ("RETR/S", "LAST MINUTE")
"""The columns of a line that stands for a cause: only retransmissions have one."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a screen shows."""

    table: Table
    by: str
    sort: str
    filter_text: str
    source: str
    selected: int
    paused: bool
    message: str
    """Of the last lines; or empty."""
    details: Sequence[Detail] | None
    kernel: tuple[int, int] | None
    """RetransSegs of this network namespace, and retransmissions in ours, since the start."""
    lost: int
    name: str = ""
    """Of the selected line, which may have left the table while its details are shown."""
    has_help: bool = False
    window_s: float = 0.0
    """The time that the rates cover."""


@dataclass(frozen=True, slots=True)
class Display:
    """What the terminal can show."""

    width: int
    height: int
    color: bool
    unicode: bool


class _Column(NamedTuple):
    title: str
    width: int
    priority: int
    """Columns with the highest numbers are dropped first."""
    text: Callable[[Any], str]


def rate(value: float) -> str:
    """Return a number of at least 0 in at most five characters; whole ones without a point."""
    if value < 10:
        return f"{value:.1f}" if value % 1 else f"{value:.0f}"
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if value >= 99.95 or not unit else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def percent(ratio: float | None) -> str:
    """Return a ratio in per cent, in at most five characters."""
    if ratio is None:
        return "-"
    return "0%" if ratio == 0 else f"{ratio * 100:.2f}%" if ratio < 0.0995 else f"{ratio * 100:.0f}%"


def sparkline(history: Sequence[int], width: int, *, unicode: bool = True) -> str:
    """Return the history as bars; each stands for the sum of as many seconds as fit."""
    bars = _BARS if unicode else _ASCII_BARS
    step = -(-len(history) // width)
    sums = [sum(history[at : at + step]) for at in range(0, len(history), step)]
    most = max(sums, default=0)
    steps = len(bars) - 1
    return "".join(bars[-(-each * steps // most)] if most else bars[0] for each in sums)


def causes(found: dict[str, int]) -> str:
    """Return causes, the most frequent first."""
    return " ".join(f"{name} {rate(count)}" for name, count in sorted(found.items(), key=lambda each: -each[1]))


_DETAILS = (
    _Column("RETR", 5, 0, lambda detail: rate(detail.retransmitted)),
    _Column("RATIO", 6, 1, lambda detail: percent(detail.ratio)),
    _Column("CWND", 5, 5, lambda detail: str(detail.snd_cwnd)),
    _Column("LOST", 4, 4, lambda detail: str(detail.lost_out)),
    _Column("RTO", 6, 3, lambda detail: duration(detail.rto_us or None)),
    _Column("SRTT", 6, 6, lambda detail: duration(detail.srtt_us or None)),
    _Column("LIMIT", -11, 2, lambda detail: detail.limit or "-"),
    _Column("HOST", -16, 1, lambda detail: detail.host),
    _Column("WHO", -10, 7, lambda detail: detail.who),
)
"""Those of a connection; 0 is a time that is not known yet."""


def _columns(unicode: bool) -> list[_Column]:
    return [
        _Column("RETR/S", 6, 0, lambda line: rate(line.retransmitted)),
        _Column("RATIO", 6, 1, lambda line: percent(line.ratio)),
        _Column("SEGS/S", 6, 2, lambda line: rate(line.segments)),
        _Column("FAIL", 5, 3, lambda line: rate(line.failed)),
        _Column("FLOWS", 5, 7, lambda line: rate(line.flows)),
        _Column("SRTT", 6, 6, lambda line: duration(line.srtt_p50_us)),
        _Column("P95", 6, 8, lambda line: duration(line.srtt_p95_us)),
        _Column("CAUSE", -10, 4, lambda line: causes(line.causes).partition(" ")[0]),
        _Column("LIMIT", -11, 5, lambda line: line.limit or "-"),
        _Column("LAST MINUTE", -20, 9, lambda line: sparkline(line.history, 20, unicode=unicode)),
        _Column("CAUSES", -45, 10, lambda line: causes(line.causes)),
    ]


def _fitting(width: int, longest: int, by: str, unicode: bool) -> tuple[int, list[_Column]]:
    """Return the width of names, and the columns that fit beside the longest name."""
    columns = [each for each in _columns(unicode) if by != "cause" or each.title in _OF_CAUSES]
    name_width = max(_NAME_WIDTH, min(longest, _MAX_NAME, width - 1))
    shown, rest = _without_the_last(columns, width - 1 - name_width)
    has_all = any(each.title == "CAUSES" for each in shown)
    return min(max(_MAX_NAME, longest), name_width + rest), [
        each for each in shown if each.title != "CAUSE" or not has_all
    ]


def _without_the_last(columns: Sequence[_Column], room: int) -> tuple[list[_Column], int]:
    """Return the columns that fit, each with a space, and the rest of the room."""
    kept = set()
    for column in sorted(columns, key=lambda each: each.priority):
        if 1 + abs(column.width) <= room:
            room -= 1 + abs(column.width)
            kept.add(column.title)
    return [each for each in columns if each.title in kept], max(0, room)


def render(frame: Frame, display: Display) -> list[str]:
    """Return the lines of the screen, as many as it has."""
    lines = _head(frame, display)
    foot = _foot(frame, display)
    room = max(0, display.height - len(lines) - len(foot))
    if frame.has_help:
        body = [cut(each, display.width) for each in _MANUAL]
    else:
        body = _details(frame, display) if frame.details is not None else _body(frame, display, room - 1)
    lines += body[:room] + [""] * (room - len(body)) + foot
    return lines[: display.height]


def _head(frame: Frame, display: Display) -> list[str]:
    total = frame.table.total
    kernel = "" if frame.kernel is None else f"  kernel RetransSegs {frame.kernel[0]}, seen {frame.kernel[1]}"
    rates = f"{rate(total.retransmitted)} retransmitted/s  {percent(total.ratio)}  {rate(total.segments)} segments/s"
    title, covered = ("rebpf top  ", f"last {frame.window_s:.0f} s: ") if display.width >= _WITH_TITLE else ("", "")
    source = cut(frame.source, max(_LEAST_SOURCE, display.width - len(f"{title}  {covered}{rates}")))
    first = f"{title}{source}  {covered}{rates}"
    groups = f"{frame.table.groups} {frame.by}{'s' * (frame.table.groups != 1)}"
    second = f"{groups}, by {frame.sort}  lost events {frame.lost}{kernel}"
    if frame.paused:
        second = f"PAUSED  {second}"
    if frame.filter_text:
        second += f"  filter: {frame.filter_text}"
    return [_paint(cut(first, display.width), "bold", display), cut(second, display.width)]


def _body(frame: Frame, display: Display, room: int) -> list[str]:
    """Return the titles and as many lines as there is room for, the selected one among them."""
    longest = max((size(line.name) for line in frame.table.lines), default=0)
    name_width, columns = _fitting(display.width, longest, frame.by, display.unicode)
    title = " ".join(["", fit(frame.by.upper(), -name_width), *(fit(each.title, each.width) for each in columns)])
    lines = [_paint(fit(title, -display.width), "reverse", display)]
    first = max(0, frame.selected - room + 1)
    for number, line in enumerate(frame.table.lines[first : first + room], first):
        cells = [fit(each.text(line), each.width) for each in columns]
        mark = ">" if number == frame.selected else " "
        name = _peer_of(line.name) if frame.by == "flow" and size(line.name) > name_width else line.name
        text = mark + " ".join([fit(name, -name_width), *cells])
        lines.append(_paint(cut(text, display.width), _style(line), display))
    if not frame.table.lines:
        lines.append(cut("Nothing matches the filter yet." if frame.filter_text else "No traffic yet.", display.width))
    return lines


def _peer_of(flow: str) -> str:
    return flow[flow.index("> ") :]


def _details(frame: Frame, display: Display) -> list[str]:
    line = next((each for each in frame.table.lines if each.name == frame.name), None)
    minute = f"  last minute: {causes(line.causes) or 'no retransmissions'}" if line else ""
    peers = [each.flow.partition(" > ")[2] for each in frame.details or ()]
    has_hosts = len({each.host for each in frame.details or ()}) > 1
    possible = [each for each in _DETAILS if has_hosts or each.title != "HOST"]
    columns, _ = _without_the_last(possible, display.width - max(map(size, peers), default=0))
    head = " ".join([*(fit(each.title, each.width) for each in columns), "FLOW"])
    lines = [cut(frame.name + minute, display.width), "", _paint(fit(head, -display.width), "reverse", display)]
    for each, peer in zip(frame.details or (), peers, strict=True):
        text = " ".join([*(fit(column.text(each), column.width) for column in columns), ""])
        # Narrow screens show the peer alone.
        lines.append(cut(text + (each.flow if size(text + each.flow) <= display.width else peer), display.width))
    return lines


def _foot(frame: Frame, display: Display) -> list[str]:
    if frame.message:
        typed, *error = frame.message.split("\n")
        if not error and size(typed) > display.width:
            typed = f"~{typed[1 - display.width :]}"  # the end, where more is typed
        return [cut(typed, display.width), *(_paint(cut(each, display.width), "bold red", display) for each in error)]
    if frame.has_help or frame.details is not None:
        return [cut("esc=back q)uit" if frame.has_help else "esc=back q)uit  up, down=other lines", display.width)]
    return [_paint(cut(_HELP if display.width >= len(_HELP) else _SHORT_HELP, display.width), "dim", display)]


def _style(line: Line) -> str:
    if not line.retransmitted:
        return ""
    return "bold red" if (line.ratio or 0) >= _HIGH_RATIO else "yellow"


def _paint(text: str, style: str, display: Display) -> str:
    return styled(text, style) if display.color and style else text
