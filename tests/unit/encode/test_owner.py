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
from producer.host.pods import Pod
from producer.host.text import name as shown_name
from producer.schemas import load_schema
from tests.support.encoding import HOST, PARSED, decode, encode, resident_bytes


def cgroup_rows(ids: Sequence[int]) -> Any:
    rows = np.zeros(len(ids), TRANSMITS.dtype)
    rows["s"]["flow"]["flow_known"] = events.KNOWN["cgroup_id"]
    rows["s"]["flow"]["cgroup_id"] = ids
    return rows


class NamedPaths:
    """Cgroups with chosen paths; counts the lookups."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        self.found = 0
        self.asked = 0
        self._paths = paths

    def path(self, cgroup_id: int) -> str | None:
        self.asked += 1
        return self._paths.get(cgroup_id)

    def look_up(self, ids: Iterable[int] = ()) -> None: ...


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


@pytest.mark.slow
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

    def look_up(self, ids: Iterable[int] = ()) -> None: ...


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


class Pods:
    """Pods that become known."""

    def __init__(self) -> None:
        self.version = 0
        self.known: dict[str, Pod] = {}

    def find(self, uid: str) -> Pod | None:
        return self.known.get(uid)

    def list(self, **pods: Pod) -> None:
        self.known = {uid.replace("_", "-"): pod for uid, pod in pods.items()}
        self.version += 1


UID = "5a1ff1fd-3c1b-4a5c-9f0e-0a3e1a7c9d01"
POD_PATH = f"/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/cri-containerd-{'ab' * 32}.scope"


def pods_of(encoder: BatchEncoder, ids: Sequence[int]) -> list[tuple[Any, ...]]:
    events = [decode(value, PARSED["transmit"])[1] for _, value in encode(encoder, TRANSMITS, cgroup_rows(ids))]
    return [tuple(each[name] for name in ("pod_uid", "pod", "namespace", "workload")) for each in events]


def test_events_have_the_names_of_a_pod_once_they_are_known() -> None:
    pods = Pods()
    paths = NamedPaths({1: POD_PATH, 2: "/system.slice/sshd.service"})
    schema = load_schema(TRANSMITS.schema_file)
    encoder = BatchEncoder(TRANSMITS, schema, SchemaId(1), HOST, paths, pods=pods)
    no_pod = (None, None, None, None)
    assert pods_of(encoder, [1, 2, 3]) == [(UID, None, None, None), no_pod, no_pod]
    pods.list(other=Pod("x", "y", None))
    assert pods_of(encoder, [1, 2]) == [(UID, None, None, None), no_pod]
    pods.list(**{UID.replace("-", "_"): Pod("web-1", "shop", "Deployment/web")})
    assert pods_of(encoder, [1, 2]) == [(UID, "web-1", "shop", "Deployment/web"), no_pod]
    asked = paths.asked
    # A deleted pod keeps its name.
    pods.list()
    assert pods_of(encoder, [1, 2]) == [(UID, "web-1", "shop", "Deployment/web"), no_pod], (
        "a deleted pod keeps its name"
    )
    assert paths.asked == asked + 1, "only that of cgroup 3, which is not known"


def test_without_a_list_of_pods_there_is_only_the_uid() -> None:
    encoder = BatchEncoder(TRANSMITS, load_schema(TRANSMITS.schema_file), SchemaId(1), HOST, NamedPaths({1: POD_PATH}))
    assert pods_of(encoder, [1]) == [(UID, None, None, None)]
