"""`rebpf export`: write events to Parquet or CSV files."""

from collections.abc import Mapping
from pathlib import Path

from producer.consume.period import Period
from producer.errors import UnavailableError
from producer.events import Stream
from producer.export.dataset import Dataset
from producer.export.events import PartFilter, record_batches
from producer.export.sources import Files, Topics, undecodable
from producer.host.progress import Progress
from producer.host.times import compact


def export(
    source: Files | Topics,
    folder: Path,
    form: str,
    period: Period,
    streams: frozenset[Stream],
    matches: PartFilter | None = None,
) -> Mapping[Path, int]:
    """Write the streams' events; return the files' numbers of events. Raises UnavailableError if there are none."""
    name = f"{compact(period.since_ns, 'begin')}-{compact(period.until_ns, 'end')}"
    with Dataset(folder, name, form) as dataset, Progress("exporting") as progress:
        for stream, batch in record_batches(source, period, {}, progress, matches, maps_as_text=form == "csv"):
            if stream in streams:
                dataset.add(stream, batch)
        written = dataset.commit()
    if not written:
        text = "no events in this period" + (" match the filter" if matches else "")
        raise UnavailableError("; ".join(filter(None, (text, undecodable(source)))))
    return written
