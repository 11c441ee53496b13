"""`rebpf report`: what was retransmitted in a period, as an HTML file and a picture."""

import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from producer.consume.period import Period
from producer.errors import UnavailableError
from producer.events import TRANSMITS
from producer.export.arrow import schema_of
from producer.export.dataset import disk_errors
from producer.export.events import PartFilter
from producer.export.sources import Files, Topics, undecodable
from producer.host.output_file import check_folder, write_whole
from producer.host.progress import Progress
from producer.host.times import iso
from producer.report.collect import NAMES, collect, collect_segments
from producer.report.frame import Frame
from producer.report.page import headline, page
from producer.report.plots import draw_summary, png
from producer.report.summary import Summary, flow_choice, summarize


def report(
    source: Files | Topics,
    period: Period,
    output: Path,
    picture: Path | None,
    *,
    matches: PartFilter | None = None,
    filter_text: str = "",
    options: Sequence[str] = (),
) -> list[str]:
    """Write the report; return the headline. Raises UnavailableError if there are no events.

    `options` are those of other commands that read the same topics.
    """
    for path in filter(None, (output, picture)):
        with disk_errors(path):
            check_folder(path)
    collected = collect(source, period, matches)
    summary = summarize(collected, period)
    if summary.totals is None and summary.timeline is None:
        text = "no connection records and no retransmissions in this period" + (" match the filter" if matches else "")
        raise UnavailableError("; ".join(filter(None, (text, undecodable(source)))))
    if summary.flows and TRANSMITS in collected.quality:
        segments = collect_segments(source, period, flow_choice(summary))
    else:
        segments = Frame(pa.Table.from_batches([], schema_of(TRANSMITS, NAMES[TRANSMITS])))
    with Progress("drawing"):
        commands = list(_commands(summary, options, filter_text))
        text = page(summary, segments, commands, filter_text, of_files=isinstance(source, Files))
        with disk_errors(output):
            write_whole(output, text.encode(errors="backslashreplace"))
        if picture is not None:
            drawn = png(partial(draw_summary, summary, headline(summary), segments), 12, 9)
            with disk_errors(picture):
                write_whole(picture, drawn)
    return headline(summary)


def _commands(summary: Summary, options: Sequence[str], filter_text: str) -> Iterator[str]:
    """Yield command lines that show more of the worst peer and host."""
    peers, hosts = summary.worst["peer"], summary.worst["host"]
    if peers:
        match = shlex.quote(f"peer {peers[0].name}")
        yield f"rebpf trace {match}  # on the host: what is retransmitted to the worst peer now"
        yield f"ss -ti dst {shlex.quote(peers[0].name)}  # on the host: its open connections"
    if hosts and options:
        given = shlex.join(options)
        yield f"rebpf verify {given} --host {shlex.quote(hosts[0].name)}  # whether events are missing"
        ends = {"since": summary.period.since_ns, "until": summary.period.until_ns}
        period = "".join(f" --{name} {iso(end)}" for name, end in ends.items() if end is not None)
        chosen = f" --filter {shlex.quote(filter_text)}" if filter_text else ""
        yield f"rebpf export {given}{period}{chosen} -o events  # these events, for notebooks"
