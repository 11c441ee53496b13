"""Names of cgroups in messages: any name, looked up a few at a time, in bounded memory."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import events
from producer.encode.batch import BatchEncoder
from producer.events import TRANSMITS, SchemaId
from producer.host.text import name as shown_name
from producer.schemas import load_schema
from tests.support.encoding import HOST, PARSED, decode, encode, resident_bytes


def cgroup_rows(ids: Sequence[int]) -> Any:
    rows = np.zeros(len(ids), TRANSMITS.dtype)
    rows["s"]["flow"]["flow_known"] = events.KNOWN["cgroup_id"]
    rows["s"]["flow"]["cgroup_id"] = ids
    return rows


class NamedPaths:
    """Cgroups with chosen paths; counts the look-ups."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        self.found = 0
        self.asked = 0
        self._paths = paths

    def path(self, cgroup_id: int) -> str | None:
        self.asked += 1
        return self._paths.get(cgroup_id)

    def look(self, ids: Iterable[int] = ()) -> None: ...


def cgroups_of(encoder: BatchEncoder, ids: Sequence[int]) -> list[str | None]:
    told = encode(encoder, TRANSMITS, cgroup_rows(ids))
    return [decode(value, PARSED["transmit"])[1]["cgroup"] for _, value in told]


@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=5))
def test_a_cgroup_may_have_any_name(names: list[bytes]) -> None:
    shown = [shown_name(b"/" + raw) for raw in names]
    paths = NamedPaths(dict(enumerate(shown)))
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), HOST, paths)
    assert cgroups_of(encoder, range(len(names))) == shown
    assert cgroups_of(encoder, range(len(names))) == shown
    assert paths.asked == len(names)


def test_many_cgroups_are_looked_up_a_few_at_a_time() -> None:
    paths = NamedPaths({number: f"/{number}" for number in range(1000)})
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), HOST, paths)
    for known in (256, 512, 768, 1000):
        assert cgroups_of(encoder, range(1000)) == [f"/{number}" if number < known else None for number in range(1000)]
        assert paths.asked == known
    assert paths.asked == 1000


@pytest.mark.parametrize("length", [1, 1000])
def test_the_memory_of_cgroups_is_bounded(length: int) -> None:
    """More cgroups than are remembered; all long, or all short. Some have no path."""
    paths = NamedPaths({number: f"/{number}".ljust(length, "x") for number in range(40_000) if number % 3})
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), HOST, paths)
    before = resident_bytes()
    for first in range(0, 40_000, 200):
        ids = range(first, first + 200)
        told = [each and each.rstrip("x") for each in cgroups_of(encoder, ids)]
        assert told == [f"/{number}" if number % 3 else None for number in ids]
    assert resident_bytes() - before < 16 << 20


class LatePaths:
    """Cgroups that are found only after they were asked for."""

    def __init__(self) -> None:
        self.found = 0
        self.names: dict[int, str] = {}

    def path(self, cgroup_id: int) -> str | None:
        return self.names.get(cgroup_id)

    def look(self, ids: Iterable[int] = ()) -> None: ...


def test_a_flow_gets_the_path_of_its_cgroup_when_that_is_known():
    paths = LatePaths()
    schema = load_schema(TRANSMITS.schema_file)
    encoder = BatchEncoder(TRANSMITS, schema, SchemaId(1), HOST, paths)
    rows = np.zeros(3, TRANSMITS.dtype)
    rows["s"]["flow"]["flow_known"] = events.KNOWN["cgroup_id"]
    rows["s"]["flow"]["cgroup_id"] = 7, 8, 7

    def read() -> list[tuple[str | None, str | None]]:
        records = [decode(value, schema)[1] for _, value in encode(encoder, TRANSMITS, rows)]
        return [(record["cgroup"], record["unit"]) for record in records]

    assert read() == [(None, None)] * 3
    paths.names[7], paths.found = "/system.slice/a.service", 1
    assert read() == [("/system.slice/a.service", "a.service"), (None, None), ("/system.slice/a.service", "a.service")]
    assert read() == [("/system.slice/a.service", "a.service"), (None, None), ("/system.slice/a.service", "a.service")]
