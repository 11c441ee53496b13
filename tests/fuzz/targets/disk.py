"""Files of the state folder."""

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from producer.commands import spool_show
from producer.config.load import Config, Registry
from producer.errors import RebpfError
from producer.events import STREAMS, TRANSMITS, Topic
from producer.host import state
from producer.host.state import StateFolder
from producer.kernel.bpf_syscall import MapInfo
from producer.kernel.manifest import Manifest, StoredRing, parse_stored
from producer.kernel.program_cache import Compiled, ProgramCache
from producer.kernel.sequence import EventNumbers
from producer.pipeline.ledger import Account, Ledger
from producer.registry.schema_ids import SchemaIds
from producer.spool.from_config import new_spool
from tests.fuzz.engine import Check, FindingError, Target
from tests.fuzz.known import KNOWN
from tests.fuzz.mutation import mutated, mutated_json
from tests.support import spool_folders

_ODD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": lambda path: (path / "full").mkdir(parents=True),
    "link": lambda path: path.symlink_to("nowhere"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "huge": lambda path: (path.touch(), os.truncate(path, 10 << 30)),
}
odd = st.sampled_from(sorted(_ODD))


def _odd_but_known(target: str) -> st.SearchStrategy[str]:
    """Leave out what is known to hang the target or to exhaust its memory."""
    return st.sampled_from(
        [kind for kind in sorted(_ODD) if f"{target}: a {kind} in the place of the file" not in KNOWN]
    )


def _put(path: Path, content: bytes | str) -> None:
    """Replace the file by content or something odd; delete files set aside earlier."""
    for aside in path.parent.glob(f"{path.name}.damaged*"):
        shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if isinstance(content, str):
        _ODD[content](path)
    else:
        path.write_bytes(content)


@contextlib.contextmanager
def _ledgers() -> Iterator[Check]:
    """What is read is a valid account, and the next one can be written and read."""
    with _folder() as folder:

        def check(content: bytes | str) -> None:
            path = folder / "ledger.transmit"
            _put(path, content)
            ledger = Ledger(path)
            account = ledger.read()
            ledger.open()
            if account is not None:
                ledger.write(account)
            ledger.write(Account("ring", 8))
            ledger.close()
            if Ledger(path).read() != Account("ring", 8):
                raise FindingError("the ledger cannot be written any more")

        yield check


@contextlib.contextmanager
def _sequences() -> Iterator[Check]:
    """No damaged file makes numbers restart below those already used."""
    with _folder() as folder:
        first = EventNumbers(folder, "boot", 2, lambda: 1000.0)
        first.start()
        given = {stream.name: [5000, 6000] for stream in STREAMS}
        first.stop(given)

        def check(content: bytes | str) -> None:
            _put(folder / "sequence.json", content)
            numbers = EventNumbers(folder, "boot", 2, lambda: 1000.0)
            starts = numbers.start()
            for name, row in starts.items():
                if any(start < last for start, last in zip(row, given[name], strict=True)):
                    raise FindingError(f"numbers begin at {row}")
            numbers.stop(starts)
            if EventNumbers(folder, "boot", 2, lambda: 1000.0).start() != starts:
                raise FindingError("the file cannot be written any more")

        yield check


def _sequence_seed() -> bytes:
    with _folder() as folder:
        numbers = EventNumbers(folder, "boot", 2, lambda: 1000.0)
        numbers.start()
        numbers.stop({stream.name: [5000, 6000] for stream in STREAMS})
        return (folder / "sequence.json").read_bytes()


@contextlib.contextmanager
def _spools() -> Iterator[Check]:
    """Readable events are read, the rest is counted, and the spool accepts the next batch."""
    with _folder() as folder:
        config = Config(state_dir=folder).with_values(kafka__brokers="127.0.0.1:1")

        def check(example: tuple[list[tuple[int, bytes | str]], bool]) -> None:
            contents, with_ledger = example
            spool_folder = folder / "spool" / "transmit"
            shutil.rmtree(spool_folder, ignore_errors=True)
            spool_folder.mkdir(parents=True)
            for number, content in contents:
                _put(spool_folder / f"{number * 5:020}.avro", content)
            spool = new_spool(config, TRANSMITS)
            spool.open(*((0, 10, 0) if with_ledger else ()))
            found = 0
            while spooled := spool.read():  # a file of 10 GB fills the spool until it is skipped
                spool.ack(spooled.first, spooled.end)
            spool.ack(spool.end, spool.end)
            spool.sweep()
            spool.append(spool_folders.encoded(TRANSMITS, 100, 7), "ring", 8)
            while spooled := spool.read():
                found += len(spooled.batch)
                spooled.batch.packed()
                spool.ack(spooled.first, spooled.end)
                spool.sweep()
            spool.ack(spool.end, spool.end)
            spool.expire()
            spool.close()
            if found != 7 or any(count < 0 for count in spool.lost.values()):
                raise FindingError(f"read {found} events, lost {spool.lost}")
            with contextlib.suppress(RebpfError):
                spool_show.spooled(config)
                spool_show.verify(config)

        yield check


def _spool_seeds() -> tuple[bytes, ...]:
    with _folder() as folder:
        paths = spool_folders.fill(folder, batches=2, size=5, per_file=1)
        return tuple(path.read_bytes() for path in paths)


@contextlib.contextmanager
def _compiled() -> Iterator[Check]:
    """A file is ours, or there is a warning of one line."""
    with _folder() as folder:

        def check(content: bytes | str) -> None:
            _put(folder / "key.json", content)
            kept = ProgramCache(folder)
            if (found := kept.find("key")) is not None:
                for program in found.programs:
                    found.instructions(program, range(100, 100 + len(found.maps)), 250)
            elif any(len(warning.splitlines()) != 1 for warning in kept.warnings):
                raise FindingError(f"not one line: {kept.warnings}")

        yield check


def _compiled_seed() -> bytes:
    if os.geteuid() != 0:  # only root uses the cache
        return _signed({})
    with _folder() as folder:
        code = bytes.fromhex("1811000000000000" + "0" * 16 + "b700000000000000" + "9500000000000000")
        maps = [MapInfo(27, 0, 0, 4096, 0, "pipe")]
        ProgramCache(folder).put("key", Compiled(maps, {"program": code}), ["/lib/libbcc.so"])
        return (folder / "key.json").read_bytes()


def _signed(body: Any) -> bytes:
    """Return compiled programs with a valid checksum and any content."""
    import hashlib

    text = json.dumps(body).encode()
    return hashlib.sha256(b"key" + text).hexdigest().encode() + b"\n" + text


@contextlib.contextmanager
def _manifests() -> Iterator[Check]:
    """A manifest is consistent, or raises a ValueError."""

    def check(content: Any) -> None:
        with contextlib.suppress(ValueError):
            kept = Manifest.from_json(parse_stored(json.dumps(content).encode())["manifest"])
            opened = dict.fromkeys(kept.objects, 1)
            for ring in (*kept.old_rings, *kept.rings):
                opened.pop(ring.name)
            kept.to_json()

    yield check


def _manifest() -> dict[str, Any]:
    kept = Manifest(
        "fingerprint",
        "ring",
        {stream.name: "raw_tp" for stream in STREAMS},
        [],
        {"own_sockets": "own_sockets_ring", **{stream.ring: stream.ring for stream in STREAMS}},
        {stream.name: [f"{stream.name}_0"] for stream in STREAMS},
        ["link_0"],
        [StoredRing(stream, stream.ring, 1 << 20) for stream in STREAMS],
        None,
        [StoredRing(TRANSMITS, "old", 1 << 20)],
    )
    return {"objects": kept.objects, "manifest": kept.to_json()}


@contextlib.contextmanager
def _schema_ids() -> Iterator[Check]:
    """Without a registry, the cache has the id, or the registry's error is raised."""
    with _folder() as folder:
        cache, schema = folder / "schema_ids.json", {"type": "string"}

        def check(content: bytes | str) -> None:
            _put(cache, content)
            ids = SchemaIds(Registry("http://127.0.0.1:1", timeout_s=1), cache, attempts=1)
            try:
                (found,) = ids.find({Topic("topic"): schema}).values()
            except RebpfError as error:
                if error.exit_code not in (69, 77, 78):
                    raise
                return
            if type(found) is not int or not 0 < found < 1 << 31:
                raise FindingError(f"schema id {found!r}")

        yield check


def _schema_ids_seed() -> dict[str, int]:
    import hashlib

    digest = hashlib.sha256(json.dumps({"type": "string"}).encode()).hexdigest()
    return {f"http://127.0.0.1:1 topic-value {digest}": 7}


@contextlib.contextmanager
def _agents() -> Iterator[Check]:
    """Looking up the running producer returns an answer or None."""
    with _folder() as folder, StateFolder(folder):

        def check(content: bytes | str) -> None:
            _put(folder / "agent.json", content)
            facts = state.running(folder)
            state.pid(folder)
            if facts is not None and not isinstance(facts, dict):
                raise FindingError(f"{facts!r}")

        yield check


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


_ACCOUNT = {"ring": "r", "position": 8, "carried": 0, "lost": {"stopped": 3}, "acked": 5, "end": 10, "discarded": 1}


def _page(account: Any) -> bytes:
    text = json.dumps(account).encode()
    return (b"%08x %s" % (zlib.crc32(text), text)).ljust(4096)


def _crc(note: Any) -> bytes:
    """Return a sequence.json with a valid checksum and any content."""
    if not isinstance(note, dict):
        return json.dumps(note).encode()
    crc = zlib.crc32(json.dumps(note, sort_keys=True).encode())
    return json.dumps({**note, "crc32": crc}).encode()


_NOTE = {"boot_id": "boot", "generation": 3, "last": {stream.name: [5000, 6000] for stream in STREAMS}}
_damaged_spool = st.one_of(mutated(_spool_seeds()), odd)
_spool = st.tuples(st.lists(st.tuples(st.integers(0, 4), _damaged_spool), max_size=3), st.booleans())
_KEY_SEED = _compiled_seed()
_facts = mutated_json([{"pid": 1, "brokers": "a:1", "rules_version": 1, "status_url": "http://127.0.0.1:1"}])


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _same_or_later_note(note: Any) -> bool:
    """Whether a note could not come from an intact file: a note with a valid checksum is believed."""
    return not isinstance(note, dict) or note.get("boot_id") == "boot"


def _goes_back(note: Any) -> bool:
    """Whether a note, if valid, names numbers below those already used, which nothing can detect."""
    last = note.get("last") if isinstance(note, dict) else None
    rows = last.values() if isinstance(last, dict) else ()
    return any(
        isinstance(row, list) and any(isinstance(n, int) and n < 6000 for n in row) and list(row) != [5000, 6000]
        for row in rows
    )


_notes = mutated_json([_NOTE]).filter(lambda note: _same_or_later_note(note) and not _goes_back(note)).map(_crc)

TARGETS = (
    Target("ledger", st.one_of(mutated([_page(_ACCOUNT)]), mutated_json([_ACCOUNT]).map(_page), odd), _ledgers, 150),
    Target("sequence", st.one_of(mutated([_sequence_seed()]), _notes, odd), _sequences, 80),
    Target("spool", _spool, _spools, 60),
    Target(
        "compiled",
        st.one_of(mutated([_KEY_SEED]), odd, mutated_json([json.loads(_KEY_SEED.split(b"\n")[1])]).map(_signed)),
        _compiled,
        150,
    ),
    Target("manifest", mutated_json([_manifest()]), _manifests, 200),
    Target(
        "schema_ids",
        st.one_of(
            mutated([_text(_schema_ids_seed())]),
            mutated_json([_schema_ids_seed()]).map(_text),
            _odd_but_known("schema_ids"),
        ),
        _schema_ids,
        15,
    ),
    Target(
        "agent",
        st.one_of(mutated([b'{"pid": 1, "rules_version": 1}']), _facts.map(_text), _odd_but_known("agent")),
        _agents,
        80,
    ),
)
