"""`rebpf spool show`, `verify` and `drop`: show the spool without changing it, or discard it."""

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.commands import spool_show
from producer.config.load import Config
from producer.events import RETRANSMITS, TRANSMITS
from producer.host.clock import now
from producer.pipeline.ledger import Account, Ledger
from producer.schemas import load_schema
from producer.spool.from_config import ledger_path, spool_folder
from producer.spool.spool import Spool
from tests.support import spool_folders
from tests.support.rebpf import as_nobody, let_others_in, rebpf

TRANSMIT, RETRANSMIT, FLOW = "tcp_transmit", "tcp_retransmit", "tcp_flow"
SIZE = 97
NOTHING = {
    "events": 0,
    "files": 0,
    "size_bytes": 0,
    "oldest_s": None,
    "damaged_files": 0,
    "quarantine": {},
}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def spool(command: str, state: Path, *arguments: object, code: int = 0) -> Any:
    done = rebpf("spool", command, "--json", "--state-dir", state, *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def test_show_has_spooled_events_and_rejected_messages(state):
    paths = spool_folders.fill(state, batches=7, size=SIZE, per_file=3, acked=4 * SIZE + 5)
    spool_folders.quarantine(state, {"MSG_SIZE_TOO_LARGE": 3, "INVALID_RECORD": 2})
    aside = paths[0].with_name(f"{0:020}.damaged")
    aside.write_bytes(bytes(1009))

    found = spool("show", state)

    oldest_s = found[TRANSMIT].pop("oldest_s")
    assert 0 <= oldest_s < 600
    assert found[TRANSMIT] == {
        "events": 3 * SIZE - 5,
        "files": 2,
        "size_bytes": sum(path.stat().st_size for path in [*paths, aside]),
        "damaged_files": 1,
        "quarantine": {"MSG_SIZE_TOO_LARGE": 3, "INVALID_RECORD": 2},
    }
    assert found[RETRANSMIT] == NOTHING


def test_show_prints_lines(state):
    spool_folders.fill(state, batches=2, size=SIZE, stream=RETRANSMITS)
    spool_folders.quarantine(state, {"INVALID_RECORD": 2}, RETRANSMITS)

    done = rebpf("spool", "show", "--state-dir", state)

    assert done.returncode == 0, done.stderr
    transmit, retransmit, flow = done.stdout.splitlines()
    assert transmit == f"{TRANSMIT} events=0 files=0 size_bytes=0 damaged_files=0 quarantine=0"
    assert flow == f"{FLOW} events=0 files=0 size_bytes=0 damaged_files=0 quarantine=0"
    assert retransmit.startswith(f"{RETRANSMIT} events={2 * SIZE} files=1 size_bytes=")
    assert retransmit.endswith(" damaged_files=0 quarantine=INVALID_RECORD:2")


def test_show_counts_what_a_producer_that_crashed_had_not_noted(state):
    spool_folders.fill(state, batches=3, size=SIZE, noted=2 * SIZE)

    assert spool("show", state)[TRANSMIT]["events"] == 3 * SIZE


def test_show_without_a_ledger_counts_what_is_there(state):
    spool_folders.fill(state, batches=5, size=SIZE, per_file=2, acked=2 * SIZE)
    (state / "ledger.transmit").unlink()

    assert spool("show", state)[TRANSMIT]["events"] == 3 * SIZE


def test_show_leaves_out_discarded_events(state):
    paths = spool_folders.fill(state, batches=5, size=SIZE, per_file=1)
    paths[2].unlink()
    spool_folders.write_ledger(
        state, Account(spool_folders.RING, 0, 0, {"spool_dropped": SIZE}, 5, 5 * SIZE, discarded=SIZE)
    )

    assert spool("show", state)[TRANSMIT]["events"] == 4 * SIZE - 5
    assert spool("verify", state)[TRANSMIT]["damage"] == []


def test_without_a_state_folder_there_is_nothing_and_none_is_made(state):
    shown = rebpf("spool", "show", "--state-dir", state)

    assert (shown.returncode, shown.stdout) == (0, f"no state folder {state}: nothing is spooled\n")
    assert spool("show", state) == {}
    for command in (["verify"], ["replay", "--brokers", "127.0.0.1:1"], ["drop", "--yes"]):
        done = rebpf("spool", *command, "--state-dir", state)
        assert (done.returncode, done.stderr) == (69, f"rebpf: no state folder {state}\n")
    assert not state.exists()


def test_missing_rights_are_reported(state):
    spool_folders.fill(state, batches=1, size=SIZE)
    let_others_in(state)
    (state / "spool").chmod(0o700)

    done = rebpf("spool", "show", "--state-dir", state, before=as_nobody())

    assert done.returncode == 77, done.stderr
    assert done.stderr.endswith("Permission denied\n")


@pytest.mark.parametrize("command", ["show", "verify"])
def test_showing_the_spool_changes_nothing_and_needs_no_lock(state, command):
    paths = spool_folders.fill(state, batches=4, size=SIZE, per_file=2, noted=0)
    spool_folders.flip(paths[0], 10)
    paths[1].with_name(f"{4 * SIZE:020}.avro").touch()  # made, and nothing written
    spool_folders.quarantine(state, {"INVALID_RECORD": 2})
    (state / "lock").touch()
    before = spool_folders.tree(state)

    lock = os.open(state / "lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        spool(command, state, code=65 if command == "verify" else 0)
    finally:
        os.close(lock)

    assert spool_folders.tree(state) == before


def test_verify_of_an_undamaged_spool(state):
    spool_folders.fill(state, batches=4, size=SIZE, per_file=3, acked=SIZE)
    spool_folders.quarantine(state, {"INVALID_RECORD": 2})

    assert spool("verify", state) == {
        TRANSMIT: {"files": 2, "events": 4 * SIZE, "damage": [], "lost": 0},
        f"{TRANSMIT}/quarantine": {"files": 1, "events": 2, "damage": [], "lost": 0},
        RETRANSMIT: {"files": 0, "events": 0, "damage": [], "lost": 0},
        FLOW: {"files": 0, "events": 0, "damage": [], "lost": 0},
    }


def test_a_write_that_a_crash_cut_short_is_no_damage(state):
    (path,) = spool_folders.fill(state, batches=3, size=SIZE, noted=2 * SIZE)
    start, end = spool_folders.blocks(path)[2]
    os.truncate(path, (start + end) // 2)

    assert spool("verify", state)[TRANSMIT] == {"files": 1, "events": 2 * SIZE, "damage": [], "lost": 0}


def test_verify_lists_each_damaged_place_and_its_loss(state):
    paths = spool_folders.fill(state, batches=12, size=SIZE, per_file=4, acked=SIZE + 5)
    for number in (0, 2):  # some events are done, some spooled
        spool_folders.flip(paths[0], sum(spool_folders.blocks(paths[0])[number]) // 2)
    spool_folders.flip(paths[1], 10)  # the header
    os.truncate(paths[2], spool_folders.blocks(paths[2])[3][0])

    found = spool("verify", state, code=65)[TRANSMIT]

    assert found["events"] == 5 * SIZE
    assert found["lost"] == 6 * SIZE
    assert found["damage"] == [
        {"file": paths[0].name, "places": 2, "lost": SIZE},
        {"file": paths[1].name, "places": 1, "lost": 4 * SIZE},
        {"file": paths[2].name, "places": 1, "lost": SIZE},
    ]


def test_verify_misses_files_that_are_gone(state):
    paths = spool_folders.fill(state, batches=5, size=SIZE, per_file=1, acked=5)
    for path in (paths[0], paths[1], paths[4]):
        path.unlink()

    found = spool("verify", state, code=65)[TRANSMIT]

    assert found["damage"] == [
        {"file": "(no file)", "places": 1, "lost": 2 * SIZE - 5},
        {"file": paths[3].name, "places": 1, "lost": SIZE},
    ]


def test_verify_fails_with_one_line(state):
    (path,) = spool_folders.fill(state, batches=3, size=SIZE)
    spool_folders.flip(path, sum(spool_folders.blocks(path)[1]) // 2)

    done = rebpf("spool", "verify", "--state-dir", state)

    assert done.stderr == f"rebpf: {TRANSMIT}: 1 damaged places, {SIZE} events lost\n"
    assert f"  {path.name} damaged_places=1 lost={SIZE}" in done.stdout


DAMAGE = st.tuples(st.integers(0, 2), st.sampled_from(["flip", "cut", "delete"]), st.floats(0, 1, exclude_max=True))


@given(acked=st.integers(0, 8 * SIZE), damages=st.lists(DAMAGE, min_size=1, max_size=4))
@settings(max_examples=settings.default.max_examples * 3 // 5)
def test_verify_costs_what_a_producer_then_loses(tmp_path_factory, acked, damages):
    state = tmp_path_factory.mktemp("damage") / "state"
    paths = spool_folders.fill(state, batches=8, size=SIZE, per_file=3, acked=acked)
    for number, what, share in damages:
        if number < len(paths) and paths[number].exists() and (size := paths[number].stat().st_size):
            damage(paths[number], what, int(size * share))

    told = spool_show.verify(Config(state_dir=state))[TRANSMIT]

    assert told.lost == lost_by_reading(state)


def damage(path: Path, what: str, at: int) -> None:
    if what == "flip":
        spool_folders.flip(path, at)
    elif what == "cut":
        os.truncate(path, at)
    else:
        path.unlink()


def lost_by_reading(state: Path) -> int:
    """Return how many events a producer counts as damaged while it sends the spool."""
    account = spool_folders.read_ledger(state)
    assert account is not None
    waiting = Spool(
        spool_folder(Config(state_dir=state), TRANSMITS),
        TRANSMITS,
        load_schema(TRANSMITS.schema_file),
        now,
        max_bytes=1 << 30,
    )
    waiting.open(account.acked, account.end, account.discarded)
    while batch := waiting.read():
        waiting.ack(batch.first, batch.end)
    waiting.ack(waiting.end, waiting.end)
    waiting.close()
    return waiting.lost["spool_damaged"]


def test_showing_a_spool_in_use_neither_fails_nor_finds_damage(state):
    config = Config(state_dir=state)
    state.mkdir()
    done = threading.Event()
    failures: list[Exception] = []

    def use() -> None:
        ledger = Ledger(ledger_path(config, TRANSMITS))
        ledger.open()
        used = Spool(
            spool_folder(config, TRANSMITS),
            TRANSMITS,
            load_schema(TRANSMITS.schema_file),
            now,
            max_bytes=1 << 20,
            file_bytes=1,
        )
        used.open()
        batch = spool_folders.encoded(TRANSMITS, 1, SIZE)
        try:
            while not done.is_set():
                for _ in range(5):
                    used.append(batch, spool_folders.RING, 0)
                    ledger.write(Account(spool_folders.RING, 0, 0, {}, used.acked, used.end))
                while found := used.read():
                    used.ack(found.first, found.end)
                    ledger.write(Account(spool_folders.RING, 0, 0, {}, used.acked, used.end))
                    used.sweep()
        except Exception as error:  # reported by the test
            failures.append(error)
        used.close()
        ledger.close()

    thread = threading.Thread(target=use)
    thread.start()
    seen = set()
    looks = 0
    try:
        while looks < 200 or (len(seen) < 2 and thread.is_alive()):
            looks += 1
            found = spool_show.spooled(config)
            assert found is not None
            assert 0 <= found[TRANSMIT].events <= 6 * SIZE
            seen.add(found[TRANSMIT].events)
            assert spool_show.complaint(spool_show.verify(config)) is None
    finally:
        done.set()
        thread.join()
    assert not failures
    assert len(seen) > 1, "it was in use"


def test_drop_needs_a_confirmation(state):
    spool_folders.fill(state, batches=2, size=SIZE)
    before = spool_folders.tree(state)

    done = rebpf("spool", "drop", "--state-dir", state, env={"REBPF_YES": "1"})

    assert (done.returncode, done.stderr) == (
        64,
        "rebpf: spool drop deletes events, which cannot be recovered: confirm with --yes\n",
    )
    assert spool_folders.tree(state) == before


def test_drop_discards_the_spool_and_the_ledger_has_it_as_lost(state):
    paths = spool_folders.fill(state, batches=6, size=SIZE, per_file=2, acked=5)
    paths[1].unlink()
    account = Account("ring-1", 77, 11, {"stopped": 3, "spool_dropped": 2 * SIZE}, 5, 5 * SIZE, discarded=2 * SIZE)
    spool_folders.write_ledger(state, account)
    spool_folders.quarantine(state, {"INVALID_RECORD": 2})

    waiting = 4 * SIZE - 5
    assert spool("show", state)[TRANSMIT]["events"] == waiting
    assert spool("drop", state, "--yes") == {
        TRANSMIT: {"dropped": waiting},
        RETRANSMIT: {"dropped": 0},
        FLOW: {"dropped": 0},
    }

    lost = {"stopped": 3, "spool_dropped": 2 * SIZE + waiting}
    assert spool_folders.read_ledger(state) == Account("ring-1", 77, 11, lost, 6 * SIZE, 6 * SIZE, 0)
    assert list((state / "spool" / "transmit").iterdir()) == []
    assert spool("show", state)[TRANSMIT] == {**NOTHING, "quarantine": {"INVALID_RECORD": 2}}
    assert spool("verify", state)[TRANSMIT]["damage"] == []
    assert spool("drop", state, "--yes")[TRANSMIT] == {"dropped": 0}


def test_the_ring_continues_after_dropped_events(state):
    spool_folders.fill(state, batches=3, size=SIZE, noted=2 * SIZE)

    spool("drop", state, "--yes")

    account = spool_folders.read_ledger(state)
    assert account is not None
    assert account.position == 3 * SIZE * spool_folders.STRIDE
    assert account.lost == {"spool_dropped": 3 * SIZE}


def test_drop_counts_what_is_missing_too(state):
    paths = spool_folders.fill(state, batches=3, size=SIZE, per_file=1)
    paths[0].unlink()

    assert spool("drop", state, "--yes")[TRANSMIT] == {"dropped": 3 * SIZE}


def test_events_are_not_dropped_if_the_ledger_cannot_be_written(state):
    paths = spool_folders.fill(state, batches=2, size=SIZE, per_file=1)
    (state / "ledger.transmit").unlink()
    (state / "ledger.transmit").mkdir()
    for ending in ("", ".1", ".2", ".3"):  # so that the folder cannot be renamed
        (state / f"ledger.transmit.damaged{ending}").write_text("")

    done = rebpf("spool", "drop", "--yes", "--state-dir", state)

    assert (done.returncode, done.stderr) == (69, f"rebpf: {state}/ledger.transmit: Is a directory\n")
    assert all(path.exists() for path in paths)


def test_drop_of_the_quarantine_leaves_the_spool(state):
    paths = spool_folders.fill(state, batches=2, size=SIZE)
    (refused,) = spool_folders.quarantine(state, {"MSG_SIZE_TOO_LARGE": 3, "INVALID_RECORD": 2})
    refused.with_suffix(".damaged").touch()

    assert spool("drop", state, "--quarantine", "--yes")[TRANSMIT] == {"dropped": 5}

    assert list(refused.parent.iterdir()) == []
    assert all(path.exists() for path in paths)
    assert spool("show", state)[TRANSMIT]["events"] == 2 * SIZE


@pytest.mark.parametrize(
    "command", [["drop", "--yes"], ["drop", "--yes", "--quarantine"], ["replay", "--brokers", "a:1"]]
)
def test_the_lock_keeps_others_out(state, command):
    spool_folders.fill(state, batches=2, size=SIZE)
    lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    before = spool_folders.tree(state)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = rebpf("spool", *command, "--state-dir", state)
    finally:
        os.close(lock)

    assert done.returncode == 75
    assert "another producer runs" in done.stderr
    assert spool_folders.tree(state) == before
