"""`rebpf.read`: events as an Arrow table."""

import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset

from producer import events
from producer.config.load import Registry
from producer.consume.period import Period
from producer.errors import UsageError
from producer.events import Stream
from producer.export.arrow import schema_of
from producer.export.events import record_batches
from producer.export.parquet import open_parquet
from producer.export.sources import PARQUET, Files, Topics
from producer.host.times import parse_time

STREAMS: Mapping[str, Stream] = {stream.topic: stream for stream in events.STREAMS}


def read(
    *paths: str | PathLike[str],
    topic: str,
    brokers: str | None = None,
    registry: str | None = None,
    topic_prefix: str = "",
    since: str | None = None,
    until: str | None = None,
    columns: Sequence[str] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Any:
    """Return the events of a topic as a pyarrow.Table, in no particular order.

    `paths` are folders that `rebpf export` wrote as Parquet, spool folders, or Avro files; without any, the topic is
    read from `brokers`, HOST:PORT[,...], with the schemas of the `registry` at a URL, or without it those of this
    version. `since` and `until` limit the events' time: 2026-11-29T15:00Z, or 1h for an hour ago. `columns` are all by
    default. `settings` are librdkafka's. docs/events.md has the columns and their units.

    Raises subclasses of producer.errors.RebpfError: UsageError for wrong arguments, UnavailableError or
    PermissionDenied if files, topic, brokers or registry cannot be read.
    """
    if topic not in STREAMS:
        raise UsageError(f"topic: expected one of {', '.join(STREAMS)}, found {topic!r}")
    if bool(paths) == bool(brokers):
        raise UsageError("give either files or brokers")
    stream, now_ns = STREAMS[topic], time.time_ns()
    period = Period(parse_time(since, now_ns) if since else None, parse_time(until, now_ns) if until else None)
    schema = schema_of(stream, frozenset((*columns, "ts_ns")) if columns is not None else None)
    if columns is not None and (missing := set(columns) - set(schema.names)):
        raise UsageError(f"{topic} has no column {', '.join(sorted(missing))}")
    folders = list(map(Path, paths))
    parquet = [_parquet_files(path, topic) for path in folders]
    if paths and all(parquet):
        table = _of_parquet([file for files in parquet for file in files], schema, period)
    elif paths:
        table = _of_source(Files(folders), stream, schema, period)
    else:
        config = Registry(registry)
        source = Topics(str(brokers), {stream: topic_prefix + topic}, config, settings or {}, period.since_ns)
        table = _of_source(source, stream, schema, period)
    return table.select(list(columns)) if columns is not None else table


def _parquet_files(path: Path, topic: str) -> list[Path]:
    """Return the files of a topic, if this is a folder of an export, or a topic's folder in one."""
    folder = path if path.name == topic or path.name.startswith("date=") else path / topic
    return sorted(folder.rglob(f"*{PARQUET}")) if folder.is_dir() else []


def _of_parquet(files: Sequence[Path], schema: Any, period: Period) -> Any:
    time_ns, wanted = pyarrow.dataset.field("ts_ns"), None
    if period.since_ns is not None:
        wanted = time_ns >= period.since_ns
    if period.until_ns is not None:
        wanted = time_ns < period.until_ns if wanted is None else wanted & (time_ns < period.until_ns)
    return open_parquet(files, schema).to_table(filter=wanted)


def _of_source(source: Files | Topics, stream: Stream, schema: Any, period: Period) -> Any:
    found = record_batches(source, period, {stream: frozenset(schema.names)})
    batches = [batch for each, batch in found if each == stream]
    if not batches:
        return schema.empty_table()
    return pa.Table.from_batches(batches).unify_dictionaries()
