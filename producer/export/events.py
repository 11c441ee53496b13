"""Events of a source within a period, as Arrow."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from producer.consume.period import Period
from producer.events import Mask, Stream
from producer.export.arrow import batch_of, schema_of
from producer.export.part import Part
from producer.export.sources import Files, Names, Topics
from producer.host.progress import Progress
from producer.view.filter import parse
from producer.view.records import Records

PartFilter = Callable[[Part], Mask]
"""Returns which events of a part match."""


def matching(text: str) -> PartFilter:
    """Compile a filter. Raises FilterError."""
    matches = parse(text)

    def of_part(part: Part) -> Mask:
        chosen: Mask = part.table.status == 0
        chosen[np.flatnonzero(chosen)] = matches(Records.from_table(part.stream, part.table))
        return chosen

    return of_part


def within(part: Part, period: Period) -> Mask:
    """Return which events of a part were decoded and are in the period."""
    table = part.table
    decoded: Mask = table.status == 0
    return decoded & period.mask(table.cells[table.plan.names.index("ts_ns")])


def record_batches(
    source: Files | Topics,
    period: Period,
    names: Names,
    progress: Progress | None = None,
    matches: PartFilter | None = None,
    *,
    maps_as_text: bool = False,
) -> Iterator[tuple[Stream, Any]]:
    """Yield the events in the period, by batch, with the columns `names`; ts_ns must be among them."""
    schemas: dict[Stream, Any] = {}
    for part in source.parts(names, progress):
        chosen = within(part, period)
        if matches is not None:
            chosen &= matches(part)
        if part.stream not in schemas:
            schemas[part.stream] = schema_of(part.stream, names.get(part.stream), maps_as_text=maps_as_text)
        if chosen.any():
            yield part.stream, batch_of(schemas[part.stream], part.table, chosen)
