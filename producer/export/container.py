"""Reads Avro object container files of events, by batch: spool files, and those of other tools.

A spool file (spool/format.py) has batches of framed messages. Any other has a record for each event. One of several
streams, as `rebpf trace -w` writes, is read more slowly, with Python for each event.
"""

import functools
import io
import json
import os
from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import fastavro
import numpy as np

from producer import _native
from producer.consume.accepted import NotAccepted, accepted, accepted_container
from producer.consume.blocks import Blocks, CodecError
from producer.consume.columns import Table, Values, decode
from producer.consume.plan import Plan, plan_for_all, plan_for_names
from producer.errors import IncompleteError, UnavailableError
from producer.events import Stream
from producer.export.part import Part
from producer.schemas import streams
from producer.spool.format import Reader, read_header

_FRAME = bytes(5)
_BRANCH_BYTES = 1
"""Of a union's branch: its number as an Avro long."""
_ROWS = 10_000


def read_container(path: Path, names: Mapping[Stream, frozenset[str]], *, in_order: bool = False) -> Iterator[Part]:
    """Yield the events of a file, with the fields `names` of its stream, or all.

    A file of several streams takes longer if `in_order`. Raises UnavailableError if it cannot be opened or has no
    events of ours, IncompleteError if it is damaged.
    """
    try:
        with path.open("rb") as file:
            yield from _parts(path, file, names, in_order=in_order)
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror or error}") from error


def _parts(path: Path, file: BinaryIO, names: Mapping[Stream, frozenset[str]], *, in_order: bool) -> Iterator[Part]:
    try:
        blocks = Blocks(file)
        text = blocks.metadata["avro.schema"]
        schema = json.loads(text)
    except CodecError as error:
        raise UnavailableError(f"{path}: {error}") from error
    except Exception as error:  # invalid data can raise anything in the parser
        raise UnavailableError(f"{path}: not an Avro object container file") from error
    if isinstance(schema, list):
        try:
            union = accepted_container(text)
            found = {each["name"]: streams()[each["name"]] for each in union}
        except (NotAccepted, LookupError) as error:
            raise UnavailableError(f"{path}: has no events of ReBPF") from error
        plans = {each["name"]: plan_of(json.dumps(each), names.get(found[each["name"]])) for each in union}
        runs = _of_union(path, blocks, union)
        for name, values in runs if in_order else _joined(runs):
            yield Part(found[name], _whole(path, decode(values, plans[name])))
        return
    is_spool = "rebpf.format" in blocks.metadata
    try:
        text = json.dumps(_event_schema(schema) if is_spool else schema)
        stream = streams()[_event(text)["name"]]
    except (NotAccepted, LookupError, TypeError, StopIteration) as error:
        raise UnavailableError(f"{path}: has no events of ReBPF") from error
    plan = plan_of(text, names.get(stream))
    batches = _spooled(path, file, stream) if is_spool else _records(path, blocks, plan_of(text, frozenset()).steps)
    for values in batches:
        yield Part(stream, _whole(path, decode(values, plan)))


def _of_union(path: Path, blocks: Blocks, union: list[Any]) -> Iterator[tuple[str, Values]]:
    """Yield runs of records of one schema, with its name; each record has an empty frame."""
    schema: Any = union
    last, values = "", Values()
    try:
        for count, data in blocks:
            block = io.BytesIO(data)
            for _ in range(count):
                start = block.tell() + _BRANCH_BYTES
                name, _ = cast(Any, fastavro.schemaless_reader(block, schema, None, return_record_name=True))
                if values and (name != last or len(values) == _ROWS):
                    yield last, values
                    values = []
                last = name
                values.append(_FRAME + data[start : block.tell()])
            if block.tell() != len(data):
                raise ValueError("a block has more than its records")
    except Exception as error:  # of fastavro, too, since blocks may have any content
        raise IncompleteError(f"{path}: damaged: {error}") from error
    if values:
        yield last, values


def _joined(runs: Iterator[tuple[str, Values]]) -> Iterator[tuple[str, Values]]:
    """Join the runs of each schema, which may be of a record each."""
    waiting: dict[str, Values] = {}
    for name, values in runs:
        waiting.setdefault(name, []).extend(values)
        if len(waiting[name]) >= _ROWS:
            yield name, waiting.pop(name)
    yield from waiting.items()


# Files have few different schemas, and a plan costs as much as hundreds of events.
@functools.lru_cache(16)
def _event(schema: str) -> Any:
    return accepted(schema)


@functools.lru_cache(16)
def plan_of(schema: str, names: frozenset[str] | None) -> Plan:
    """Return the plan for events of a schema, with the fields `names`, or all."""
    return plan_for_all(_event(schema)) if names is None else plan_for_names(_event(schema), names)


def _event_schema(schema: dict[str, Any]) -> Any:
    """Return the event's schema of a spool file's."""
    messages = next(field for field in schema["fields"] if field["name"] == "messages")
    return next(field for field in messages["type"]["items"]["fields"] if field["name"] == "event")["type"]


def _spooled(path: Path, file: BinaryIO, stream: Stream) -> Iterator[Values]:
    size = os.fstat(file.fileno()).st_size

    def read_at(offset: int, count: int) -> bytes:
        return os.pread(file.fileno(), max(0, min(count, size - offset)), offset)

    start, sync, _ = read_header(read_at(0, 1 << 16))
    reader = Reader(stream, sync, start, read_at)
    while spooled := reader.next():
        yield [*spooled.batch.values()]
    if reader.damaged:
        raise IncompleteError(f"{path}: damaged: `rebpf spool verify` has the details")


def _records(path: Path, blocks: Blocks, steps: bytes) -> Iterator[Values]:
    """Yield the blocks' records, each with an empty frame, which the decoder skips."""
    values: Values = []
    try:
        for count, data in blocks:
            lengths = np.frombuffer(_native.lengths(data, steps, count), np.int64).tolist()
            values += [_FRAME + data[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]
            if len(values) >= _ROWS:
                yield values
                values = []
    except Exception as error:  # of decompression, too, since blocks may have any content
        raise IncompleteError(f"{path}: damaged: {error}") from error
    if values:
        yield values


def _whole(path: Path, table: Table) -> Table:
    if table.status.any():
        raise IncompleteError(f"{path}: {np.count_nonzero(table.status)} events cannot be decoded")
    return table
