"""The plots of a report, by matplotlib. Each cause has a marker and a hatch, so that no plot depends on colors."""

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.dates import AutoDateLocator, DateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from producer.events import Ints
from producer.host.text import printable
from producer.host.times import readable
from producer.report.frame import Frame
from producer.report.summary import Line, Summary, Timeline, WorstFlow, segments_of

# The palette of Okabe and Ito, which people with any color vision can tell apart.
_STYLES = {
    "rto": ("#D55E00", "X", "///"),
    "fast": ("#0072B2", "^", ""),
    "slow_start": ("#E69F00", "s", "..."),
    "tlp": ("#56B4E9", "v", "\\\\\\"),
    "syn": ("#CC79A7", "D", "xxx"),
    "syn_ack": ("#F0E442", "P", "+++"),
    "other": ("#999999", "o", "ooo"),
}
_MOST_POINTS = 2000
"""Segments in a plot; a larger file shows no more."""
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
_SEQUENCE_SPACE = 1 << 32
SPAN_S = 20
"""Seconds of a connection that are drawn: in more, the segments cannot be told apart."""
_BEFORE_NS = 500_000_000
"""Shown before the first retransmission: what was lost has been sent before."""
Draw = Callable[[Figure], None]


def svg(draw: Draw, name: str, width: float, height: float) -> str:
    """Return a plot as an SVG element; `name` makes its ids differ from those of others."""
    with _settings(name):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def png(draw: Draw, width: float, height: float) -> bytes:
    """Return a plot as PNG."""
    with _settings("png"):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
        draw(figure)
        content = io.BytesIO()
        FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


@contextmanager
def _settings(salt: str) -> Any:
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt}), warnings.catch_warnings():
        # Names may have any character, and fonts do not.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def draw_summary(summary: Summary, headline: Sequence[str], segments: Frame, figure: Figure) -> None:
    """Draw the whole report on one page."""
    lines = [*headline, f"{readable(summary.first_ns)} to {readable(summary.last_ns)}"]
    figure.suptitle("\n".join(map(printable, lines)), x=0.02, ha="left")
    panels: Any = figure.subfigures(2, 1, height_ratios=(3, 4))  # whose type leaves out that they may be several
    top, bottom = panels
    left, right = top.subfigures(1, 2)
    if summary.timeline is not None:
        draw_timeline(summary.timeline, left)
    draw_worst(summary.worst["peer"], "peer", right)
    if summary.flows:
        draw_flow(summary.flows[0], summary.retransmits, segments, bottom)


def draw_timeline(timeline: Timeline, figure: Figure) -> None:
    """Draw the causes over time."""
    axes = figure.subplots()
    moments = [datetime.fromtimestamp(each, UTC) for each in timeline.edges_s.tolist()]
    times = date2num(moments)
    below = np.zeros(len(times) - 1)
    for cause, counts in timeline.causes.items():
        color, _, hatch = _style(cause)
        axes.stairs(
            below + counts, times, baseline=below, fill=True, facecolor=color, hatch=hatch, edgecolor="#333333",
            linewidth=0.3, label=f"{printable(cause)} ({int(counts.sum()):,})",
        )  # fmt: skip
        below = below + counts
    axes.set_ylabel("retransmitted segments")
    axes.set_ylim(0)
    axes.margins(x=0)
    axes.xaxis.set_major_locator(AutoDateLocator(tz=UTC))
    axes.xaxis.set_major_formatter(_clock(moments[0], moments[-1]))
    axes.tick_params(axis="x", rotation=30)
    axes.set_xlabel(f"{moments[0]:%Y-%m-%d}, UTC")
    _legend_above(axes)


def draw_worst(lines: Sequence[Line], title: str, figure: Figure) -> None:
    """Draw bars with the figures beside them."""
    axes = figure.subplots()
    shown = [line for line in lines if line.retransmitted]
    names = [_short(line.name) for line in shown]
    counts = [line.retransmitted for line in shown]
    for at, line in enumerate(shown):
        color, _, hatch = _style(line.cause)
        axes.barh(at, line.retransmitted, color=color, hatch=hatch, edgecolor="#333333", linewidth=0.3)
        ratio = "" if line.ratio is None else f"  {line.ratio:.2%}"
        axes.annotate(
            f"{line.retransmitted:,}{ratio}  {printable(line.cause)}", (line.retransmitted, at),
            (4, 0), textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(counts, default=1) * 1.5 or 1)
    axes.set_xlabel(f"retransmitted segments by {title}")
    axes.grid(visible=False, axis="y")


def draw_srtt(srtt_us: Ints, figure: Figure) -> None:
    """Draw the distribution of round-trip times."""
    axes = figure.subplots()
    times_ms = srtt_us / 1000
    low, high = times_ms.min(), max(times_ms.max(), times_ms.min() * 1.1)
    axes.hist(times_ms, bins=np.geomspace(low, high, 41).tolist(), color="#0072B2", edgecolor="white", linewidth=0.3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # Where the times are within a decade, these are the only numbers.
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    for share, style in ((50, "-"), (95, "--"), (99, ":")):
        value = float(np.percentile(times_ms, share))
        axes.axvline(value, color="black", linestyle=style, label=f"p{share} {value:.3g} ms")
    axes.set_xlabel("smoothed round-trip time, ms")
    axes.set_ylabel("connections")
    axes.legend(fontsize=8)


def draw_flow(flow: WorstFlow, retransmits: Frame, segments: Frame, figure: Figure) -> None:
    """Draw a connection: sequence numbers over time, and below congestion window, losses and RTO."""
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(4, 2, 1.3))
    start_ns, lossy = worst_span(flow, retransmits)
    sent = _rows_of(flow, segments, start_ns)
    base = int(retransmits.numbers("seq")[lossy[0]])
    if len(sent):
        times, seq, end = _points(segments, sent, start_ns, base)
        upper.vlines(times, seq, end, color="#777777", linewidth=1.2, label="sent")
    _draw_retransmits(upper, lossy, retransmits, start_ns, base)
    upper.yaxis.set_major_formatter(EngFormatter("B"))
    upper.set_ylabel("sequence number")
    where = " ".join(_short(each) for each in (flow.host, flow.owner) if each)
    shown = "" if len(lossy) == len(flow.rows) else f", the worst {SPAN_S} s"
    upper.set_title(f"{printable(flow.name)} on {where}{shown}", fontsize=9, loc="left")
    upper.legend(fontsize=8, loc="upper left")
    frame, rows = (segments, sent) if len(sent) else (retransmits, lossy)
    rows = _thinned(rows)
    times = _seconds(frame, rows, start_ns)
    middle.step(times, frame.numbers("snd_cwnd")[rows], where="post", color="#0072B2", label="snd_cwnd")
    lost = _thinned(lossy)
    middle.plot(
        _seconds(retransmits, lost, start_ns), retransmits.numbers("lost_out")[lost], "X", color="#D55E00",
        markersize=4, label="lost_out",
    )  # fmt: skip
    middle.set_ylabel("segments")
    _legend_above(middle)
    lower.step(times, frame.numbers("rto_us")[rows] / 1000, where="post", color="black")
    lower.set_ylabel("RTO, ms")
    lower.set_ylim(0)
    lower.set_xlabel(f"seconds since {readable(int(start_ns))}")


def worst_span(flow: WorstFlow, retransmits: Frame) -> tuple[int, Ints]:
    """Return when the SPAN_S seconds with the most retransmitted segments begin (ns since 1970), and their rows."""
    times, segments = retransmits.numbers("ts_ns")[flow.rows], np.cumsum(segments_of(retransmits)[flow.rows])
    ends = np.searchsorted(times, times + SPAN_S * 1_000_000_000)
    worst = int(np.argmax(segments[ends - 1] - np.concatenate([[0], segments[:-1]])))
    return int(times[worst]), flow.rows[worst : ends[worst]]


def _draw_retransmits(axes: Any, lossy: Ints, retransmits: Frame, start_ns: int, base: int) -> None:
    causes, segments = retransmits.codes("cause")[lossy], segments_of(retransmits)
    # The rarest is drawn last, so that none hides it.
    for code in sorted(np.unique(causes).tolist(), key=lambda code: -np.count_nonzero(causes == code)):
        cause = retransmits.texts("cause")[code] if code >= 0 else ""
        color, marker, _ = _style(cause)
        rows = lossy[causes == code]
        times, seq, _ = _points(retransmits, rows, start_ns, base)
        axes.plot(
            times, seq, marker, color=color, markeredgecolor="#333333", markeredgewidth=0.5, markersize=5,
            label=f"retransmitted: {printable(cause)} ({int(segments[rows].sum()):,})",
        )  # fmt: skip


def _legend_above(axes: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=8, frameon=False)


def _rows_of(flow: WorstFlow, segments: Frame, start_ns: int) -> Ints:
    """Return the rows of a connection's segments in the worst span, in order."""
    if flow.host not in segments.texts("host"):
        return np.empty(0, np.int64)
    own = segments.codes("host") == segments.texts("host").index(flow.host)
    for name, number in zip(("sk_cookie", "sport", "dport"), flow.numbers, strict=True):
        own &= segments.numbers(name) == number
    since_ns = segments.numbers("ts_ns") - start_ns
    own &= (since_ns >= -_BEFORE_NS) & (since_ns < SPAN_S * 1_000_000_000)
    rows = np.flatnonzero(own)
    return rows[np.argsort(segments.numbers("ts_ns")[rows], kind="stable")]


def _points(frame: Frame, rows: Ints, start_ns: int, base: int) -> Any:
    """Return times, and begins and ends of sequence numbers relative to `base`, without wraps."""
    rows = _thinned(rows)
    seq = np.unwrap((frame.numbers("seq")[rows] - base) % _SEQUENCE_SPACE, period=_SEQUENCE_SPACE)
    if len(seq) and seq[0] > _SEQUENCE_SPACE / 2:
        seq = seq - _SEQUENCE_SPACE
    length = (frame.numbers("end_seq")[rows] - frame.numbers("seq")[rows]) % _SEQUENCE_SPACE
    return _seconds(frame, rows, start_ns), seq, seq + length


def _thinned(rows: Ints) -> Ints:
    return rows[:: 1 + len(rows) // _MOST_POINTS]


def _seconds(frame: Frame, rows: Ints, start_ns: int) -> Any:
    return (frame.numbers("ts_ns")[rows] - start_ns) / 1e9


def _style(cause: str) -> tuple[str, str, str]:
    return _STYLES.get(cause, _STYLES["other"])


def _short(name: str) -> str:
    text = printable(name)
    return text if len(text) <= 28 else text[:13] + "..." + text[-12:]


def _clock(first: datetime, last: datetime) -> Any:
    days = (last - first).total_seconds() / 86_400
    return DateFormatter("%H:%M:%S" if days < 0.02 else "%H:%M" if days < 1.5 else "%m-%d %H:%M", tz=UTC)
