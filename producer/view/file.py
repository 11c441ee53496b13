"""Files of records: an Avro object container with a union of the streams' schemas, readable by any Avro library."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import fastavro
from fastavro.write import Writer

from producer.errors import OutputError
from producer.events import STREAMS
from producer.host.stdio import Output
from producer.schemas import load_schema
from producer.view.records import Row


class RecordFile:
    """A file that is being written. OutputError if that fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        names: dict[str, Any] = {}
        schema: list[Any] = [fastavro.parse_schema(load_schema(stream.schema_file), names) for stream in STREAMS]
        self._names = {stream: each["name"] for stream, each in zip(STREAMS, schema, strict=True)}
        self._buffer = io.BytesIO()
        self._writer = Writer(self._buffer, schema, codec="deflate")
        try:
            self._file = Output(path, "w")  # perhaps a pipe that nobody reads
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}") from error
        self._flush()

    def write(self, rows: Iterable[Row]) -> None:
        """Add records, and pass them to the kernel."""
        for stream, record in rows:
            self._writer.write(cast(Any, (self._names[stream], record)))
        self._writer.flush()
        self._flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _flush(self) -> None:
        content = self._buffer.getbuffer()
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            self._file.close()
            raise OutputError(f"{self._path}: {error.strerror}") from error
        finally:
            content.release()
        self._buffer.seek(0)
        self._buffer.truncate()
