"""What is kept beside hooks that outlive the process, and what of it is refused."""

import json

import numpy as np
import pytest

from producer.events import STREAMS, TRANSMITS
from producer.kernel.manifest import Manifest, StoredRing, parse_stored

DEEP = b"[" * 100_000
MANIFEST = Manifest(
    fingerprint="f",
    ring_id="r",
    hooks={stream.name: "raw_tp" for stream in STREAMS},
    refusals=[],
    maps={"own_sockets": "own_sockets_r", **{stream.ring: f"{stream.ring}_r" for stream in STREAMS}},
    programs={stream.name: [f"{stream.name}_0_r"] for stream in STREAMS},
    links=["link_0_r"],
    rings=[StoredRing(stream, f"{stream.ring}_r", 1 << 20) for stream in STREAMS],
    old_ring_id=None,
    old_rings=[],
    iterators=["link_0_r"],
)


def test_a_manifest_is_read_as_written() -> None:
    assert Manifest.from_json(json.loads(json.dumps(MANIFEST.to_json()))) == MANIFEST


def test_a_manifest_of_a_version_without_iterators_has_none() -> None:
    manifest = MANIFEST.to_json()
    del manifest["iterators"]
    assert Manifest.from_json(manifest).iterators == []


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": None},
        {"ring_id": 7},
        {"hooks": None},
        {"hooks": {"transmit": "raw_tp"}},
        {"hooks": {"transmit": None, "retransmit": "raw_tp"}},
        {"maps": []},
        {"maps": {}},
        {"maps": {"own_sockets": None}},
        {"programs": None},
        {"programs": {"transmit": [], "retransmit": None}},
        {"links": None},
        {"iterators": None},
        {"iterators": ["link_1_r"]},
        {"links": [None]},
        {"rings": []},
        {"old_ring_id": 7},
        {"old_rings": None},
        {"refusals": [["a", "b"]]},
        {"refusals": [["a", "b", None]]},
    ],
)
def test_an_inconsistent_manifest_is_rejected(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="the manifest cannot be read"):
        Manifest.from_json({**MANIFEST.to_json(), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": 0},
        {"bytes": "4096"},
        {"bytes": 4097},
        {"bytes": 1 << 40},
        {"layout": "|O"},
        {"layout": "<u4"},
        {"layout": [["a", "|O"]]},
        {"layout": [["a", f"|V{1 << 30}"]]},
        {"layout": None},
        {"name": "another"},
        {"stream": "third"},
    ],
)
def test_an_invalid_ring_in_a_manifest_is_rejected(change: dict[str, object]) -> None:
    manifest = json.loads(json.dumps(MANIFEST.to_json()))
    manifest["rings"][0].update(change)
    with pytest.raises(ValueError, match="the manifest cannot be read"):
        Manifest.from_json(manifest)


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"{}", b'{"objects": null, "manifest": {}}', b'{"objects": [1], "manifest": {}}', DEEP],
)
def test_stored_objects_are_checked(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_stored(text)


def test_layouts_are_the_streams_own() -> None:
    (found,) = [ring.stream.dtype for ring in Manifest.from_json(MANIFEST.to_json()).rings if ring.stream == TRANSMITS]
    assert isinstance(found, np.dtype)
    assert found == TRANSMITS.dtype
