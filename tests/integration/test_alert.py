"""`rebpf alert` on a real Kafka: two members share the partitions, one is killed, and each change is sent once.

The events follow a plan, window by window, so the expected alerts are known.
"""

import logging
import signal
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from confluent_kafka import Producer

from producer.alert.last_alerts import last_alerts
from producer.alert.member import Member as AlertMember
from producer.alert.model import Alert, Sink
from producer.alert.record import AlertEncoder
from producer.alert.retry import Sleep, retry_until_available
from producer.commands.init import create_topics
from producer.config.load import Alert as AlertConfig
from producer.config.load import AlertRule, Config, Kafka, Registry
from producer.consume.decode import Decoder
from producer.errors import UnavailableError
from producer.events import RETRANSMITS, TRANSMITS, Stream
from producer.health.heartbeat import HeartbeatEncoder
from producer.schemas import ALERT_FILE, ALERT_ID, HEARTBEAT_ID, load_schema
from tests.support.events import Sent, messages
from tests.support.rebpf import command, rebpf, repeating, wait_until
from tests.support.servers.consume import decode, kcat_messages
from tests.support.servers.kafka import KafkaServer
from tests.support.statuses import status
from tests.support.topics import FIXED_IDS

pytestmark = pytest.mark.real_kafka

PREFIX = "alert."
WINDOW_S, LATENESS_S = 2, 10
THRESHOLD, CLEAR, MINIMUM, MANY, FEW = 0.1, 0.03, 50, 30, 5
CONFIG = f"""
kafka.topic_prefix = "{PREFIX}"
kafka.settings = {{ "session.timeout.ms" = 6000 }}
[alert]
lateness_s = {LATENESS_S}
missed_heartbeats = 0.5  # of a heartbeat's 10 s
[[alert.rules]]
name = "loss"
by = "host"
measure = "ratio"
window_s = {WINDOW_S}
threshold = {THRESHOLD}
clear = {CLEAR}
minimum = {MINIMUM}
[[alert.rules]]
name = "many"
by = "peer"
measure = "count"
window_s = {WINDOW_S}
threshold = {MANY}
clear = {FEW}
"""
STEADY = "steady"
# Retransmitted segments, of 100 to each of three peers, window by window.
PLAN = {
    STEADY: (0, 15, 15, 6, 6, 4, 15, 15, 0),
    "changing": (12, 0, 12, 0, 12, 0, 12, 0, 12),
    "quiet": (1, 1, 2, 1, 2, 1, 1, 0, 1),
}
SMALL = "small"  # retransmits all of its few segments
PEERS = ("192.0.2.1", "192.0.2.2", "2001:db8::3")
FRAMED = b"\0\0\0\0\7..."  # of schema 7
DYING, LIVING = "dying", "living"
WINDOWS = len(PLAN[STEADY])


class Change(NamedTuple):
    """The checked fields of an alert."""

    rule: str
    group: str
    firing: bool
    window: int
    segs: int
    retransmitted_segs: int


def planned() -> list[list[tuple[Stream, str, str, int]]]:
    """Return stream, host, peer and segments of the events of each window."""
    windows = []
    for window in range(WINDOWS):
        events = []
        for host, again in PLAN.items():
            for peer in PEERS:
                # Several events each, so that there is something to sum.
                events += [(TRANSMITS, host, peer, 10)] * 10
                events += [(RETRANSMITS, host, peer, 1)] * again[window]
        events += [(TRANSMITS, SMALL, PEERS[0], 5), (RETRANSMITS, SMALL, PEERS[0], 5)]
        windows.append(events)
    return windows


def reference() -> list[Change]:
    """Return the expected alerts of the plan, by the simplest computation."""
    changes = []
    firing: set[tuple[str, str]] = set()
    for window, events in enumerate([*planned(), []]):
        sums: dict[tuple[str, str], Counter[Stream]] = defaultdict(Counter)
        for stream, host, peer, segs in events:
            sums["loss", host][stream] += segs
            sums["many", peer][stream] += segs
        for key in sorted({*sums, *firing}):
            total, again = sums[key][TRANSMITS], sums[key][RETRANSMITS]
            if key[0] == "loss":
                value, begins, ends = again / max(total, 1), THRESHOLD, CLEAR
                is_enough = total >= MINIMUM
            else:
                value, begins, ends, total = again, MANY, FEW, 0
                is_enough = True
            if key not in firing and is_enough and value >= begins:
                firing.add(key)
                changes.append(Change(*key, True, window, total, again))
            elif key in firing and value < ends:
                firing.remove(key)
                changes.append(Change(*key, False, window, total, again))
    return changes


class Member:
    """`rebpf alert` as a child process."""

    def __init__(self, folder: Path, config: Path, *arguments: object) -> None:
        folder.mkdir()
        self._err = folder / "err"
        run = ["setpriv", "--pdeathsig", "KILL", *command("alert", "--config", config, *arguments)]
        with self._err.open("wb") as err, (folder / "out").open("wb") as out:
            self.process = subprocess.Popen(run, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    @property
    def log(self) -> str:
        return self._err.read_text()

    def wait_for(self, text: str, count: int = 1) -> None:
        def look() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"rebpf alert ended with {self.process.returncode}:\n{self.log}")
            return self.log.count(text) >= count

        wait_until(f"{text} in the log", look)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


class Feed:
    """Puts events and heartbeats into the topics."""

    def __init__(self, bootstrap: str) -> None:
        self._client = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random"})
        self._ids = {PREFIX + topic: number for topic, number in FIXED_IDS.items()}
        self._numbers: Counter[tuple[Stream, str]] = Counter()
        self._beats = HeartbeatEncoder(HEARTBEAT_ID)

    def events(self, planned: Sequence[tuple[Stream, str, str, int]], start_s: int) -> None:
        """Produce a window's events, some of them twice."""
        sent = []
        for i, (stream, host, peer, segs) in enumerate(planned):
            self._numbers[stream, host] += 1
            at_ms = start_s * 1000 + i * WINDOW_S * 1000 // len(planned)
            cause = "fast" if stream is RETRANSMITS else ""
            port = 50_000 + PEERS.index(peer)
            sent.append(Sent(stream, host, self._numbers[stream, host], at_ms, peer, port, segs, cause=cause))
        for topic, key, value in messages(sent + sent[::7], self._ids, PREFIX):
            self._client.produce(topic, value, key)
        self._flush()

    def beat(self, host: str) -> None:
        key, value = self._beats.encode(status(host=host), time.time())
        self._client.produce(f"{PREFIX}rebpf_agent", value, key)
        self._flush()

    def _flush(self) -> None:
        assert self._client.flush(30) == 0


def alert_records(bootstrap: str, prefix: str = PREFIX) -> list[dict[str, Any]]:
    """Return the records of the alerts topic."""
    found = []
    for message in kcat_messages(bootstrap, f"{prefix}tcp_alerts"):
        assert message.value is not None
        record = decode(message.value, load_schema(ALERT_FILE))[1]
        assert message.key == f"{record['rule']}/{record['group']}".encode()
        found.append(record)
    return found


@pytest.fixture
def config(kafka, tmp_path: Path) -> Path:
    path = tmp_path / "rebpf.toml"
    path.write_text(f'kafka.brokers = "{kafka.bootstrap}"\n{CONFIG}')
    return path


def test_a_topic_that_is_missing_is_named_with_what_makes_it(config):
    done = rebpf("alert", "--config", config)
    assert done.returncode == 69
    assert f"topic {PREFIX}tcp_" in done.stderr
    assert "run `rebpf init" in done.stderr.splitlines()[-1]


class WaitingSink:
    """Starts another member on `repeat`, and waits; it must not be called again."""

    def __init__(self, kafka: KafkaServer, is_ready: Callable[[], bool], wait: Sleep) -> None:
        self._kafka = kafka
        self._is_ready = is_ready
        self._wait = wait
        self.other: subprocess.Popen[bytes] | None = None

    def send(self, alerts: Sequence[Alert]) -> None:
        pass

    def repeat(self, firing: Collection[Alert]) -> None:
        if not self._is_ready():
            return
        client = Producer({"bootstrap.servers": self._kafka.bootstrap})
        client.produce("waiting.tcp_alerts", FRAMED, "a/b")
        assert client.flush(30) == 0
        # In a process that can be killed: a client that is closed while joining may never return.
        strategy = "partition.assignment.strategy=roundrobin"
        join = ["kcat", "-q", "-b", self._kafka.bootstrap, "-X", strategy, "-G", "waiting", "waiting.tcp_retransmit"]
        self.other = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *join], stdout=subprocess.DEVNULL)
        retry_until_available("alerts", pytest.fail)(self._wait, 60)

    def close(self) -> None:
        if self.other is not None:
            self.other.kill()
            self.other.wait()


def test_an_assignment_that_fails_while_a_sink_waits_ends_the_member_without_retries(kafka, caplog):
    """An unavailable registry keeps the member from reading the last alerts, which it needs to start."""
    caplog.set_level(logging.INFO, "producer.alert")
    group = AlertConfig(group="waiting", repeat_s=1, rules=(AlertRule(name="loss"),))
    often = Kafka(topic_prefix="waiting.", brokers=kafka.bootstrap, settings={"heartbeat.interval.ms": "200"})
    config = Config(kafka=often, registry=Registry("http://127.0.0.1:1"), alert=group)
    create_topics(config, 1, 1, alerts=True)

    def open_sinks(wait: Sleep) -> list[Sink]:
        return [WaitingSink(kafka, lambda: "ready brokers" in caplog.text, wait)]

    member = AlertMember(config, kafka.bootstrap, open_sinks, threading.Event(), from_beginning=False)
    with pytest.raises(UnavailableError, match="registry does not answer for schema id 7"):
        member.run(60)


def test_what_fires_is_read_back_without_what_is_forgotten_or_not_ours(kafka, caplog):
    config = Config(kafka=Kafka(topic_prefix="known.", brokers=kafka.bootstrap))
    create_topics(config, 1, 1, alerts=True)
    fires, over, forgotten = (
        Alert("loss", "host", group, True, "ratio", 0.5, 0.1, 0.03, 0, 2, 10, 5, 0) for group in ("a", "b", "c")
    )
    resolved = replace(over, firing=False, value=0.0)
    encoder = AlertEncoder(ALERT_ID)
    client = Producer({"bootstrap.servers": kafka.bootstrap})
    for alert in (fires, over, forgotten, resolved):
        key, value = encoder.encode(alert, time.time())
        client.produce("known.tcp_alerts", value, key)
    client.produce("known.tcp_alerts", None, forgotten.key)
    client.produce("known.tcp_alerts", b"not ours", "loss/d")
    assert client.flush(30) == 0

    decoder = Decoder(config.registry, {ALERT_ID: load_schema(ALERT_FILE)})
    assert last_alerts(kafka.bootstrap, "known.tcp_alerts", {}, decoder) == [fires, resolved]
    assert "loss/d" in caplog.text


def test_a_partition_that_is_added_is_read_as_soon_as_it_is_seen(kafka, tmp_path):
    path = tmp_path / "rebpf.toml"
    path.write_text(f"""
        kafka.brokers = "{kafka.bootstrap}"
        kafka.topic_prefix = "added."
        kafka.settings = {{ "topic.metadata.refresh.interval.ms" = 500 }}
        alert.lateness_s = 1
        alert.rules = [{{ name = "many", measure = "count", window_s = 1, threshold = 3, clear = 1 }}]
    """)
    assert rebpf("init", "--alerts", "--partitions", 1, "--config", path).returncode == 0
    client = Producer({"bootstrap.servers": kafka.bootstrap})
    with Member(tmp_path / "member", path) as member:
        member.wait_for(" ready ")
        kafka.add_partitions("added.tcp_retransmit", 2)
        member.wait_for("added.tcp_retransmit/1")
        at_ms = (int(time.time()) + 5) * 1000  # the window ends after they arrive
        sent = [Sent(RETRANSMITS, "busy", i, at_ms + i, PEERS[0], 50_000, 1, cause="fast") for i in range(3)]
        for topic, key, value in messages(sent, {"added.tcp_retransmit": FIXED_IDS["tcp_retransmit"]}, "added."):
            client.produce(topic, value, key, partition=1)
        assert client.flush(30) == 0
        wait_until("it fires and is resolved", lambda: len(alert_records(kafka.bootstrap, "added.")) == 2)
        member.stop()
    found = [
        (record["group"], record["firing"], record["retransmitted_segs"])
        for record in alert_records(kafka.bootstrap, "added.")
    ]
    assert found == [("busy", True, 3), ("busy", False, 0)]


def test_two_members_of_which_one_is_killed_tell_each_change_once(kafka, config, tmp_path):
    assert rebpf("init", "--alerts", "--partitions", 3, "--config", config).returncode == 0
    feed, heart, expected = Feed(kafka.bootstrap), Feed(kafka.bootstrap), reference()
    with (
        Member(tmp_path / "one", config) as one,
        Member(tmp_path / "two", config) as two,
        repeating(lambda: heart.beat(LIVING), 0.5),
    ):
        for member in (one, two):
            member.wait_for(" ready ")
        # Both are in the group, and the partitions are reassigned.
        wait_until("both have partitions", lambda: shares(one) and shares(two))

        def steady_has_fired() -> bool:
            return any(each["group"] == STEADY for each in alert_records(kafka.bootstrap))

        first_s = (int(time.time()) // WINDOW_S + 1) * WINDOW_S
        for window, events in enumerate(planned()):
            time.sleep(max(0.0, first_s + window * WINDOW_S - time.time()))
            feed.events(events, first_s + window * WINDOW_S)
            if window < 2:
                feed.beat(DYING)
            # The next owner has to know what fires now.
            if one.process.poll() is None and steady_has_fired():
                one.kill()
        if one.process.poll() is None:
            wait_until("it fires", steady_has_fired)
            one.kill()
        # And which hosts are silent.
        wait_until("all changes are sent", lambda: len(alert_records(kafka.bootstrap)) > len(expected))
        two.stop()

    found = alert_records(kafka.bootstrap)
    changes = [
        Change(
            record["rule"],
            record["group"],
            record["firing"],
            (record["window_start_ns"] // 10**9 - first_s) // WINDOW_S,
            record["segs"],
            record["retransmitted_segs"],
        )
        for record in found
        if record["measure"] != "silence"
    ]
    assert sorted(changes, key=lambda change: (change.window, change[:2])) == expected
    of_key: dict[str, list[bool]] = defaultdict(list)
    for change in changes:
        of_key[change.rule + change.group].append(change.firing)
    assert all(firing == [i % 2 == 0 for i in range(len(firing))] for firing in of_key.values()), "in order"
    silent = [(record["group"], record["firing"]) for record in found if record["measure"] == "silence"]
    assert silent == [(DYING, True)]
    assert " late=0 " in two.log.splitlines()[-1]


def shares(member: Member) -> bool:
    """Whether the member's last assignment has partitions."""
    lines = [line for line in member.log.splitlines() if " partitions=" in line]
    return bool(lines) and not lines[-1].endswith("partitions=none")
