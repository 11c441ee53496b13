"""The report as one HTML file without scripts and without anything from the network.

Every name comes from outside and is escaped; the content security policy also forbids scripts.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from string import Template

import numpy as np

from producer.host.text import printable
from producer.host.times import readable
from producer.report import plots
from producer.report.frame import Frame
from producer.report.summary import Line, Summary

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TCP retransmissions</title>
<style>
body { font: 16px/1.45 system-ui, sans-serif; color: #111; background: #fff; max-width: 62rem; margin: 0 auto;
  padding: 0 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #bbb; }
.period, .note { color: #444; }
.headline { font-size: 1.25rem; font-weight: 600; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; }
.cards div { border: 1px solid #888; border-radius: .4rem; padding: .5rem .8rem; flex: 1 1 8rem; }
.cards b { display: block; font-size: 1.3rem; }
.wide { overflow-x: auto; }
.wide svg { display: block; width: 100%; min-width: 34rem; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #ddd; }
th, td { overflow-wrap: normal; max-width: 22rem; }
td:first-child { overflow-wrap: anywhere; min-width: 8rem; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
.box { border: 2px solid #555; border-radius: .4rem; padding: 0 1rem 1rem; margin-top: 2rem; }
.bad { font-weight: 700; }
pre { background: #f2f2f2; padding: .6rem; white-space: pre-wrap; font-size: .9rem; }
h2, h3, tr:first-child { break-after: avoid; }
tr, svg, .box { break-inside: avoid; }
@media (max-width: 40rem) {
  table { font-size: .78rem; }
  th, td { padding-right: .4rem; }
  td:first-child { min-width: 6.8rem; }
}
</style>
</head>
<body>
<h1>TCP retransmissions</h1>
<p class="period">$period</p>
$content
</body>
</html>
""")
_WIDTH = 8.5
"""Of a plot, in inches."""


def page(
    summary: Summary, segments: Frame, commands: Sequence[str], filter_text: str = "", *, of_files: bool = False
) -> str:
    """Return the report; `segments` are those of the worst flows."""
    parts = [*_headline(summary), *_causes(summary), *_worst(summary)]
    parts += [*_limited(summary), *_srtt(summary), *_failures(summary), *_flows(summary, segments)]
    parts += [*_quality(summary, of_files), *_commands(commands)]
    period = f"{readable(summary.first_ns)} to {readable(summary.last_ns)}"
    if filter_text:
        period += f", only {_text(filter_text)}"
    return _PAGE.substitute(period=period, content="\n".join(parts))


def headline(summary: Summary) -> list[str]:
    """Return the most important figures in words."""
    totals = summary.totals
    if totals is None:
        count = summary.timeline.total if summary.timeline else 0
        found = [f"{_counted(count, 'segment was', 'segments were')} retransmitted."]
    else:
        share = f": {totals.retransmitted / totals.sent:.3%}" if totals.sent else ""
        found = [f"{totals.retransmitted:,} of {totals.sent:,} segments were retransmitted{share}."]
    peers = summary.worst["peer"]
    if peers and peers[0].retransmitted:
        worst = peers[0]
        found.append(f"Worst peer: {worst.name}, {_figures(worst)}.")
    return found


def _figures(line: Line) -> str:
    ratio = "" if line.ratio is None else f" ({line.ratio:.2%})"
    return f"{_counted(line.retransmitted, 'segment', 'segments')}{ratio}, mostly {line.cause}"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _headline(summary: Summary) -> Iterator[str]:
    yield "".join(f'<p class="headline">{_text(each)}</p>' for each in headline(summary))
    totals = summary.totals
    if totals is None:
        yield '<p class="note">There are no connection records (tcp_flow) in this period, so ratios are unknown.</p>'
        return
    cards = {
        "segments sent": totals.sent,
        "retransmitted": totals.retransmitted,
        "spurious (DSACK)": totals.spurious,
        "connections": totals.connections,
        "failed connects": totals.failed,
    }
    yield (
        '<div class="cards">'
        + "".join(f"<div><b>{value:,}</b>{name}</div>" for name, value in cards.items())
        + "</div>"
    )
    by_cause = ", ".join(f"{cause} {count:,}" for cause, count in totals.causes.items() if count)
    yield f"<p>By cause: {_text(by_cause) or 'no retransmissions'}.</p>"


def _causes(summary: Summary) -> Iterator[str]:
    if summary.timeline is not None:
        yield "<h2>Causes over time</h2>"
        yield _plot(partial(plots.draw_timeline, summary.timeline), "causes", 3.2)
        events = summary.timeline.total
        if summary.totals is not None and events != summary.totals.retransmitted:
            segments = _counted(events, "retransmitted segment", "retransmitted segments")
            yield (
                f'<p class="note">This plot shows the events of {segments}. The totals on this page come from the'
                " records of connections, which are written only at intervals. An incoming connection whose SYN-ACK is"
                " never answered has none.</p>"
            )


def _worst(summary: Summary) -> Iterator[str]:
    for title, lines in summary.worst.items():
        if lines:
            yield f"<h2>Worst {title}s</h2>"
            if title == "peer" and lines[0].retransmitted:
                yield _plot(partial(plots.draw_worst, lines, title), "peers", 0.9 + 0.28 * len(lines))
            heads = (title, "retransmitted", "sent", "ratio", "main cause", "failed connects")
            yield _table(heads, [_cells(line) for line in lines], numbers=(1, 2, 3, 5))


def _cells(line: Line) -> list[str]:
    sent = "-" if line.sent is None else f"{line.sent:,}"
    ratio = "-" if line.ratio is None else f"{line.ratio:.2%}"
    return [line.name, f"{line.retransmitted:,}", sent, ratio, line.cause, f"{line.failed:,}"]


def _limited(summary: Summary) -> Iterator[str]:
    if summary.limited:
        yield "<h2>What limits connections</h2>"
        rows = [
            [each.limit.replace("_", " "), f"{each.connections:,}", f"{each.sent:,}", f"{each.retransmitted:,}"]
            for each in summary.limited
        ]
        yield _table(("limit", "connections", "sent", "retransmitted"), rows, numbers=(1, 2, 3))


def _srtt(summary: Summary) -> Iterator[str]:
    if len(summary.srtt_us):
        yield "<h2>Round-trip times</h2>"
        shares = ", ".join(f"p{share} {np.percentile(summary.srtt_us, share) / 1000:.3g} ms" for share in (50, 95, 99))
        whose = _counted(len(summary.srtt_us), "connection", "connections")
        yield f"<p>The last smoothed round-trip time of {whose}: {shares}.</p>"
        yield _plot(partial(plots.draw_srtt, summary.srtt_us), "srtt", 2.8)


def _failures(summary: Summary) -> Iterator[str]:
    if summary.failures:
        yield "<h2>Failed connects</h2>"
        rows = [[each.error, each.peer, f"{each.count:,}"] for each in summary.failures]
        yield _table(("error", "peer", "connects"), rows, numbers=(2,))


def _flows(summary: Summary, segments: Frame) -> Iterator[str]:
    if summary.flows:
        yield "<h2>Worst connections</h2>"
        if not len(segments):
            yield '<p class="note">No transmits were read, so only retransmitted segments are shown.</p>'
    for number, flow in enumerate(summary.flows):
        retransmitted = _counted(flow.retransmitted, "segment", "segments")
        yield f"<h3>{_text(flow.name)}: {retransmitted} retransmitted</h3>"
        yield _plot(partial(plots.draw_flow, flow, summary.retransmits, segments), f"flow{number}", 5.2)


def _quality(summary: Summary, of_files: bool) -> Iterator[str]:
    yield '<div class="box"><h2>Data quality</h2>'
    rows = []
    for topic, each in summary.quality.items():
        counts = [
            sum(getattr(boot, name) for boot in each.boots)
            for name in ("missing", "duplicates", "restarts", "out_of_order")
        ]
        rows.append([topic, f"{each.events:,}", *(f"{count:,}" for count in counts), f"{each.sampled:,}"])
    heads = ("topic", "events", "missing", "duplicates", "restarts", "out of order", "sampled")
    yield _table(heads, rows, numbers=range(1, 7))
    for sentence in _sentences(summary, of_files):
        yield f"<p>{_text(sentence)}</p>"
    yield "</div>"


def _sentences(summary: Summary, of_files: bool) -> Iterator[str]:
    missing = sum(each.missing for each in summary.quality.values())
    if missing:
        yield f"{_counted(missing, 'event is', 'events are')} missing."
        if of_files:
            yield "If `rebpf trace -w` wrote the files with a filter, this includes the events that it excluded."
    else:
        yield "No event is missing between the first and the last one."
    if summary.undecodable:
        yield f"{_counted(summary.undecodable, 'message', 'messages')} could not be decoded."
    if summary.totals is not None and summary.totals.partial:
        whose = _counted(summary.totals.partial, "connection has", "connections have")
        yield f"{whose} no record before the period: counted from the first record in it."


def _commands(commands: Sequence[str]) -> Iterator[str]:
    if commands:
        yield "<h2>Next steps</h2>"
        yield f"<pre>{escape(chr(10).join(map(printable, commands)))}</pre>"


def _plot(draw: plots.Draw, name: str, height: float) -> str:
    return f'<div class="wide">{plots.svg(draw, name, _WIDTH, height)}</div>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    def cell(tag: str, at: int, text: str) -> str:
        mark = ' class="n"' if at in numbers else ""
        return f"<{tag}{mark}>{_text(text)}</{tag}>"

    head = "".join(cell("th", at, text) for at, text in enumerate(heads))
    lines = ("<tr>" + "".join(cell("td", at, text) for at, text in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _text(text: str) -> str:
    return escape(printable(text))
