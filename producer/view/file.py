"""Files of records: an Avro object container with a union of the streams' schemas, readable by any Avro library."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import fastavro
from fastavro.write import Writer

from producer.consume.accepted import accepted_container
from producer.consume.blocks import Blocks
from producer.errors import IncompleteError, OutputError, UnavailableError
from producer.events import FLOWS, RETRANSMITS, TRANSMITS
from producer.schemas import load_schema
from producer.view.records import Records, of_rows

_STREAMS = {f"rebpf.v1.{name}": stream for name, stream in
            (("TcpTransmit", TRANSMITS), ("TcpRetransmit", RETRANSMITS), ("TcpFlow", FLOWS))}  # fmt: skip
_BATCH = 4096


class RecordFile:
    """A file that is being written. OutputError if that fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        names: dict[str, Any] = {}
        schema = [fastavro.parse_schema(load_schema(stream.schema_file), names) for stream in _STREAMS.values()]
        self._names = {stream: name for name, stream in _STREAMS.items()}
        self._buffer = io.BytesIO()
        self._writer = Writer(self._buffer, schema, codec="deflate")
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}") from error
        self._flush()

    def write(self, records: Records) -> None:
        """Add records, and pass them to the kernel."""
        for row in records.rows():
            self._writer.write(cast(Any, (self._names[records.stream], row)))
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


def read(path: Path) -> Iterator[Records]:
    """Yield the records of a file, in its order, in batches of one stream.

    Raises UnavailableError if it cannot be opened, IncompleteError if it is not such a file, or damaged.
    """
    try:
        with path.open("rb") as file:
            yield from _batches(Blocks(file))
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}") from error
    except Exception as error:  # invalid data can raise anything in the parser and in decompression
        raise IncompleteError(f"{path}: expected an Avro file of `rebpf trace -w`: {error}") from error


def _batches(blocks: Blocks) -> Iterator[Records]:
    stream = FLOWS
    rows: list[dict[str, Any]] = []
    for name, row in _named(blocks):
        if _STREAMS[name] != stream or len(rows) == _BATCH:
            yield from [of_rows(stream, rows)] if rows else []
            stream, rows = _STREAMS[name], []
        rows.append(row)
    if rows:
        yield of_rows(stream, rows)


def _named(blocks: Blocks) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each record's schema, and the record."""
    union = accepted_container(blocks.metadata["avro.schema"])
    schema: Any = union if blocks.metadata["avro.schema"].lstrip().startswith("[") else union[0]
    for count, data in blocks:
        block = io.BytesIO(data)
        for _ in range(count):
            record: Any = fastavro.schemaless_reader(block, schema, None, return_record_name=True)
            yield record if isinstance(record, tuple) else (union[0]["name"], record)
        if block.tell() != len(data):
            raise ValueError("a block has more than its records")
