"""`rebpf spool replay` on a real Kafka: each event once and in order, and a ledger that the next run continues from."""

import json
import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from producer.events import RETRANSMITS
from producer.pipeline.ledger import Account
from tests.support import spool_folders, topics
from tests.support.faults import assert_accounted
from tests.support.rebpf import UNUSED_PORT, Run, command, rebpf, wait_until
from tests.support.servers.kafka import KafkaServer
from tests.support.servers.process import free_port
from tests.support.topics import FLOW, RETRANSMIT, TRANSMIT
from tests.support.traffic import Echo, exchange
from tests.support.wire import captured

pytestmark = pytest.mark.real_kafka

PARTITIONS = 3
SIZE = 97


class Place:
    """A state folder, and topics below a prefix."""

    def __init__(self, folder: Path, kafka: KafkaServer, prefix: str) -> None:
        self.state = folder / "state"
        self.prefix = prefix
        self.config = folder / "rebpf.toml"
        self.config.write_text(self._text(0.3))
        self.kafka = kafka

    def _text(self, after_s: float) -> str:
        kafka = f'[kafka]\nkey = "flow"\ntopic_prefix = "{self.prefix}"\nstop_timeout_s = 60.0\n'
        return f'{kafka}[metrics]\nlisten = ""\n[spool]\nspill_after_s = {after_s}\n'

    def init(self) -> None:
        done = rebpf("init", "--brokers", self.kafka.bootstrap, "--partitions", PARTITIONS, "--config", self.config)
        assert done.returncode == 0, done.stderr

    def arguments(self, brokers: str | None = None) -> list[object]:
        return ["--brokers", brokers or self.kafka.bootstrap, "--config", self.config, "--state-dir", self.state]

    def replay(self, *options: object, code: int = 0, brokers: str | None = None) -> Any:
        done = rebpf("spool", "replay", "--json", *self.arguments(brokers), *options)
        assert done.returncode == code, done.stderr
        found = json.loads(done.stdout) if done.stdout else {}
        return {name.removeprefix(self.prefix): each for name, each in found.items()}

    def waiting(self) -> Any:
        done = rebpf("spool", "show", "--json", "--config", self.config, "--state-dir", self.state)
        assert done.returncode == 0, done.stderr
        return {name.removeprefix(self.prefix): each for name, each in json.loads(done.stdout).items()}

    def events(self, topic: str = TRANSMIT) -> list[topics.Event]:
        return topics.read(self.kafka.bootstrap, topic, self.prefix)

    def run(self, folder: Path, *options: object, brokers: str | None = None) -> Run:
        # A reachable broker accepts everything, however slow; an unreachable one nothing.
        config = self._text(0.3 if brokers else 60.0)
        return Run(folder, "--brokers", brokers or self.kafka.bootstrap, *options, config=config)


@pytest.fixture
def place(kafka: KafkaServer, tmp_path: Path) -> Place:
    made = Place(tmp_path, kafka, f"{tmp_path.name[-40:]}.")
    made.init()
    return made


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a bpffs needs root")
    folder = tmp_path / "bpffs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def numbers(events: Sequence[topics.Event]) -> list[int]:
    return sorted(event.record["cpu_seq"] for event in events)


def assert_in_order(events: Sequence[topics.Event]) -> None:
    """Check that each flow is in one partition, with first copies in order."""
    flows: dict[bytes | None, list[int]] = defaultdict(list)
    partitions = defaultdict(set)
    seen: set[int] = set()
    for event in sorted(events, key=lambda each: each.message.offset):
        partitions[event.message.key].add(event.message.partition)
        if event.record["cpu_seq"] not in seen:
            seen.add(event.record["cpu_seq"])
            flows[event.message.key].append(event.record["cpu_seq"])
    assert all(len(each) == 1 for each in partitions.values())
    assert len(flows) == spool_folders.FLOWS
    assert all(each == sorted(each) for each in flows.values())


def test_replay_sends_each_event_once_and_in_order(place):
    before = spool_folders.fill(place.state, batches=23, size=SIZE, per_file=5, acked=6 * SIZE, noted=22 * SIZE)
    spool_folders.fill(place.state, batches=2, size=SIZE, stream=RETRANSMITS)
    assert len(before) == 4

    sent = place.replay()

    assert sent == {
        TRANSMIT: {"delivered": 17 * SIZE, "waiting": 0, "lost": {}, "last_error": ""},
        RETRANSMIT: {"delivered": 2 * SIZE, "waiting": 0, "lost": {}, "last_error": ""},
        FLOW: {"delivered": 0, "waiting": 0, "lost": {}, "last_error": ""},
    }
    assert numbers(place.events()) == list(range(6 * SIZE + 1, 23 * SIZE + 1))
    assert_in_order(place.events())
    assert numbers(place.events(RETRANSMIT)) == list(range(1, 2 * SIZE + 1))
    # The ring also continues after the batch that the ledger had not recorded.
    end = 23 * SIZE
    assert spool_folders.read_ledger(place.state) == Account(
        spool_folders.RING, end * spool_folders.STRIDE, 0, {}, end, end, 0
    )
    assert list((place.state / "spool").rglob("*.avro")) == []
    assert place.waiting()[TRANSMIT]["events"] == 0

    assert place.replay()[TRANSMIT]["delivered"] == 0
    assert len(place.events()) == 17 * SIZE


def test_replay_counts_what_is_damaged_and_sends_the_rest(place):
    paths = spool_folders.fill(place.state, batches=6, size=SIZE, per_file=3)
    spool_folders.flip(paths[0], sum(spool_folders.blocks(paths[0])[1]) // 2)
    spool_folders.flip(paths[1], sum(spool_folders.blocks(paths[1])[2]) // 2)

    sent = place.replay(code=65)[TRANSMIT]

    assert sent == {"delivered": 4 * SIZE, "waiting": 0, "lost": {"spool_damaged": 2 * SIZE}, "last_error": ""}
    account = spool_folders.read_ledger(place.state)
    assert account is not None
    assert (account.acked, account.end, account.lost) == (6 * SIZE, 6 * SIZE, {"spool_damaged": 2 * SIZE})
    assert place.waiting()[TRANSMIT]["damaged_files"] == 2


def test_replay_of_nothing_but_damage_ends(place):
    (path,) = spool_folders.fill(place.state, batches=3, size=SIZE)
    spool_folders.flip(path, 10)

    assert place.replay(code=65)[TRANSMIT]["lost"] == {"spool_damaged": 3 * SIZE}
    assert place.waiting()[TRANSMIT]["events"] == 0


def test_without_a_broker_replay_changes_nothing(place):
    spool_folders.fill(place.state, batches=4, size=SIZE, per_file=2, acked=5, noted=3 * SIZE)
    spool_folders.quarantine(place.state, {"INVALID_RECORD": 2})
    (place.state / "lock").touch(0o600)
    before = spool_folders.tree(place.state)

    for options in ([], ["--quarantine"]):
        place.replay(*options, code=69, brokers=f"127.0.0.1:{free_port()}")
        assert spool_folders.tree(place.state) == before


def test_a_topic_that_is_missing_does_not_delay_the_others(kafka, tmp_path):
    place = Place(tmp_path, kafka, "halves.")
    kafka.create_topic("halves.tcp_retransmit", PARTITIONS)
    spool_folders.fill(place.state, batches=2, size=SIZE)
    spool_folders.fill(place.state, batches=2, size=SIZE, stream=RETRANSMITS)

    sent = place.replay("--timeout", 3, code=69)

    assert sent[TRANSMIT]["waiting"] == 2 * SIZE
    assert sent[RETRANSMIT] == {"delivered": 2 * SIZE, "waiting": 0, "lost": {}, "last_error": ""}
    assert place.waiting()[TRANSMIT]["events"] == 2 * SIZE

    place.init()
    assert place.replay()[TRANSMIT]["delivered"] == 2 * SIZE
    assert numbers(place.events()) == list(range(1, 2 * SIZE + 1))
    assert len(place.events(RETRANSMIT)) == 2 * SIZE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_replay_that_is_interrupted_can_be_repeated(place, number):
    batches = 120
    spool_folders.fill(place.state, batches=batches, size=SIZE, per_file=15)
    with place.config.open("a") as file:  # slow, so that there is time to interrupt it
        file.write('[kafka.settings]\n"batch.num.messages" = 5\n"linger.ms" = 0\n')
    started = subprocess.Popen(
        command("spool", "replay", "--json", *place.arguments()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_until("something is acknowledged", lambda: acked(place.state) or started.poll() is not None)
    started.send_signal(number)
    out, err = started.communicate(timeout=60)

    left = batches * SIZE - acked(place.state)
    assert started.returncode == (-number if number == signal.SIGKILL else 69), err
    assert 0 < left < batches * SIZE
    if number == signal.SIGTERM:
        assert json.loads(out)[place.prefix + TRANSMIT]["waiting"] == left
    assert place.waiting()[TRANSMIT]["events"] == left

    assert place.replay()[TRANSMIT] == {"delivered": left, "waiting": 0, "lost": {}, "last_error": ""}
    events = place.events()
    assert sorted(set(numbers(events))) == list(range(1, batches * SIZE + 1))
    assert_in_order(events)


def acked(state: Path) -> int:
    account = spool_folders.read_ledger(state)
    return account.acked if account else 0


def test_rejected_messages_stay_in_the_quarantine_until_they_are_replayed(place):
    kafka, topic = place.kafka, place.prefix + TRANSMIT
    spool_folders.fill(place.state, batches=3, size=SIZE)
    kafka.set_topic(topic, {"max.message.bytes": "100"})

    sent = place.replay(code=65)[TRANSMIT]

    assert sent["delivered"] == 0
    assert sent["waiting"] == 0
    assert sent["lost"] == {"MSG_SIZE_TOO_LARGE": 3 * SIZE}
    account = spool_folders.read_ledger(place.state)
    assert account is not None
    assert (account.acked, account.lost) == (3 * SIZE, {"MSG_SIZE_TOO_LARGE": 3 * SIZE})

    for _ in range(2):
        assert place.waiting()[TRANSMIT]["quarantine"] == {"MSG_SIZE_TOO_LARGE": 3 * SIZE}
        assert place.replay("--quarantine", code=65)[TRANSMIT]["lost"] == {"MSG_SIZE_TOO_LARGE": 3 * SIZE}

    kafka.set_topic(topic, {"max.message.bytes": "1048588"})
    assert place.replay("--quarantine")[TRANSMIT]["delivered"] == 3 * SIZE
    assert numbers(place.events()) == list(range(1, 3 * SIZE + 1))
    assert_in_order(place.events())
    assert place.waiting()[TRANSMIT]["quarantine"] == {}
    assert list((place.state / "quarantine").rglob("*.avro")) == []
    assert spool_folders.read_ledger(place.state) == account, "what was lost stays so"


@pytest.mark.root
def test_while_a_producer_runs_the_spool_can_only_be_shown(place, tmp_path):
    spool_folders.fill(place.state, batches=2, size=SIZE)
    away = f"127.0.0.1:{free_port()}"
    with place.run(tmp_path, "--port", UNUSED_PORT, brokers=away) as run:
        assert run.state_dir == place.state
        run.ready()
        for options in (["replay", *place.arguments()], ["drop", "--yes", "--state-dir", place.state]):
            done = rebpf("spool", *options)
            assert done.returncode == 75
            assert f"pid {run.pid}\n" in done.stderr
        assert place.waiting()[TRANSMIT]["events"] == 2 * SIZE
        assert rebpf("spool", "verify", "--state-dir", place.state).returncode == 0
        run.kill()
    assert place.replay()[TRANSMIT]["delivered"] == 2 * SIZE


@pytest.mark.root
@pytest.mark.parametrize("how", ["replay", "drop"])
def test_a_run_after_a_stop_has_nothing_to_carry(place, tmp_path, how):
    with Echo() as echo, captured(echo.port) as segments:
        with place.run(tmp_path, "--port", echo.port, brokers=f"127.0.0.1:{free_port()}") as run:
            run.ready()
            exchange(echo.port, 53)
            stopped = run.finish()[place.prefix + TRANSMIT]
        assert stopped["spooled"] == stopped["passed"] > 0
        if how == "replay":
            assert place.replay()[TRANSMIT]["delivered"] == stopped["spooled"]
        else:
            assert rebpf("spool", "drop", "--yes", "--state-dir", place.state).returncode == 0
        with place.run(tmp_path, "--port", echo.port) as run:
            run.ready()
            exchange(echo.port, 3)
            balance = run.finish()[place.prefix + TRANSMIT]
    assert balance["passed"] == balance["delivered"] > 0
    assert (balance["carried"], balance["lost"]) == (0, {})
    dropped = stopped["passed"] if how == "drop" else 0
    events = place.events()
    topics.assert_one_each(events)
    assert len(events) == segments.total() - dropped


@pytest.mark.root
@pytest.mark.parametrize("how", ["replay", "drop"])
def test_a_run_with_the_same_rings_continues_where_the_command_ended(place, bpffs, tmp_path, how):
    options = ["--pin", bpffs / "pins"]
    with Echo() as echo, captured(echo.port) as segments:
        options += ["--port", echo.port]
        with place.run(tmp_path, *options, brokers=f"127.0.0.1:{free_port()}") as run:
            run.ready()
            exchange(echo.port, 53)
            wait_until("all is on disk", lambda: place.waiting()[TRANSMIT]["events"] >= 53 * 16)
            run.kill()
        spooled = place.waiting()[TRANSMIT]["events"]
        exchange(echo.port, 5)
        if how == "replay":
            assert place.replay()[TRANSMIT] == {"delivered": spooled, "waiting": 0, "lost": {}, "last_error": ""}
        else:
            assert rebpf("spool", "drop", "--yes", "--state-dir", place.state).returncode == 0
        exchange(echo.port, 3)
        with place.run(tmp_path, *options) as run:
            run.ready()
            assert "taken_over=true" in run.log
            exchange(echo.port, 2)
            balance = run.finish()[place.prefix + TRANSMIT]
    dropped = {"spool_dropped": spooled} if how == "drop" else {}
    assert_accounted(balance)
    assert balance["lost"] == dropped
    assert balance["passed"] == segments.total()
    assert balance["delivered"] == segments.total() - sum(dropped.values())
    events = place.events()
    topics.assert_one_each(events)
    assert len(events) == balance["delivered"]
