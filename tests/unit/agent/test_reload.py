"""Reloads by signal: however many come, the rules are resolved at a bounded rate, and the last text wins."""

import errno
import itertools
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from producer.agent.reload import LONG, ConfigReader, InForce
from producer.agent.supervise import Pace
from producer.config.load import Config, RuleConfig, load, located
from producer.errors import ConfigError
from producer.rules.resolve import resolve
from tests.support.rebpf import wait_until


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Asked:
    value = False

    def is_set(self) -> bool:
        return self.value

    def set(self) -> None:
        self.value = True

    def clear(self) -> None:
        self.value = False

    def wait(self, timeout: float | None = None) -> bool:
        return self.value


class Hooks:
    version = 1
    steps: Iterator[None] = iter(())

    def put_in_steps(self, _: object) -> Iterator[None]:
        yield from self.steps
        self.version += 1


def rules(clock: Clock, read: Callable[[], Config], hooks: Any = None) -> InForce:
    hooks = hooks or Hooks()
    return InForce(hooks, Config(), resolve(Config(), None), ConfigReader(read), None, Pace(clock))


def follow(in_force: InForce, asked: Asked) -> None:
    """Follow a signal until no reload is under way."""
    in_force.follow(asked)
    wait_until("the reload is done", lambda: in_force.follow(Asked()) or not in_force.busy)


def reload(in_force: InForce) -> None:
    asked = Asked()
    asked.set()
    follow(in_force, asked)


def test_the_version_is_the_kernels_after_hooks_were_taken_over() -> None:
    hooks = Hooks()
    hooks.version = 7
    in_force = rules(Clock(), Config, hooks)
    assert in_force.version == 7
    reload(in_force)
    assert in_force.version == 8


def test_1500_signals_mean_a_few_reloads_and_the_last_text_is_in_force() -> None:
    clock, asked, reads = Clock(), Asked(), []

    def read() -> Config:
        reads.append(clock.now_s)
        return Config()

    in_force = rules(clock, read)
    for _ in range(1500):
        asked.set()
        follow(in_force, asked)
        clock.now_s += 0.001
    last_signal = clock.now_s
    for _ in range(1000):
        follow(in_force, asked)
        clock.now_s += 0.01
    assert len(reads) <= 5
    assert last_signal - 0.001 <= reads[-1] <= last_signal + 1
    assert not asked.is_set()


def test_the_first_reload_is_at_once_and_a_slow_one_takes_a_share_of_the_time() -> None:
    clock, asked, reads = Clock(), Asked(), []

    def slow() -> Config:
        reads.append(clock.now_s)
        clock.now_s += 1
        raise ConfigError("no")

    in_force = rules(clock, slow)
    for _ in range(1000):
        asked.set()
        follow(in_force, asked)
        clock.now_s += 0.01
    assert reads[0] == 100
    assert len(reads) <= 4
    assert in_force.reloads == len(reads)


@pytest.mark.parametrize("error", [RecursionError(), struct.error("range"), TypeError("x"), MemoryError()])
def test_a_reload_that_meets_a_defect_is_refused_and_answered(error: Exception) -> None:
    def read() -> Config:
        raise error

    in_force, asked = rules(Clock(), read), Asked()
    asked.set()
    follow(in_force, asked)
    assert (in_force.reloads, in_force.version) == (1, 1)
    assert in_force.refusal


def test_a_reload_applies_what_it_can_and_names_what_needs_a_restart() -> None:
    texts = iter(
        [
            Config().with_values(capture__latency_s=0.5, capture__transmit_ring_bytes=1 << 20, log_level="warning"),
            Config().with_values(capture__latency_s=0.5),
        ]
    )
    clock, applied = Clock(), []
    in_force = rules(clock, lambda: next(texts))
    in_force.apply = applied.append
    first = in_force.digest
    reload(in_force)
    assert applied == [in_force.config] == [Config().with_values(capture__latency_s=0.5, log_level="warning")]
    assert in_force.restart_needed == ("capture.transmit_ring_bytes",)
    assert logging.getLogger("producer").level == logging.WARNING
    assert in_force.digest != first
    clock.now_s += 10
    reload(in_force)
    assert not in_force.restart_needed
    assert logging.getLogger("producer").level == logging.INFO


def test_a_refused_reload_changes_no_setting() -> None:
    wrong = Config(rules=(RuleConfig(address=("@/no/such/file",)),)).with_values(
        capture__latency_s=0.5, log_level="error"
    )
    in_force = rules(Clock(), lambda: wrong)
    reload(in_force)
    assert "/no/such/file" in in_force.refusal
    assert in_force.config == Config()
    assert logging.getLogger("producer").level == logging.INFO


def test_a_rule_that_does_not_fit_the_host_is_refused_with_its_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rebpf.toml"
    path.write_text('\n[[rules]]\naddress = ["@/no/such/file"]\n')
    hooks: Any = Hooks()
    reader = ConfigReader(lambda: load(path), located=lambda: located(path))
    in_force = InForce(hooks, Config(), resolve(Config(), None), reader, None)
    reload(in_force)
    assert in_force.refusal.startswith(f"{path}: line 2: rule 1: /no/such/file: No such file")


def test_the_reason_of_a_refusal_is_a_bounded_printable_line() -> None:
    """It goes to agent.json and heartbeats; an address list may quote a line of megabytes."""

    def read() -> Config:
        raise ConfigError("conf.d/\udcff.toml\n" + "x" * (1 << 20))

    in_force = rules(Clock(), read)
    reload(in_force)
    assert in_force.refusal.startswith("conf.d/\\udcff.toml\\x0axxx")
    assert len(in_force.refusal.encode()) < 2000


def test_changed_files_are_reloaded_if_the_setting_says_so() -> None:
    states, reads, asked = [1], [], Asked()
    hooks: Any = Hooks()
    watching = Config().with_values(reload_when_changed=True)

    def read() -> Config:
        reads.append(states[0])
        return watching

    def reloads_after_a_change(config: Config) -> int:
        reader = ConfigReader(read, files=lambda: states[0])
        reader.read()
        reads.clear()
        in_force = InForce(hooks, config, resolve(config, None), reader, None)
        follow(in_force, asked)
        states[0] += 1
        in_force._files_at = 0
        follow(in_force, asked)
        in_force._files_at = 0
        follow(in_force, asked)
        return len(reads)

    assert reloads_after_a_change(Config()) == 0
    assert reloads_after_a_change(watching) == 1


def test_a_file_that_changes_during_the_start_is_reloaded() -> None:
    """The start may compile for a minute, or wait for the registry."""
    states, reads = [1], []
    watching = Config().with_values(reload_when_changed=True)

    def read() -> Config:
        reads.append(states[0])
        return watching

    reader = ConfigReader(read, lambda: states[0])
    config = reader.read()
    states[0] = 2
    hooks: Any = Hooks()
    follow(InForce(hooks, config, resolve(watching, None), reader, None), Asked())
    assert reads == [1, 2]


def test_a_file_that_takes_long_does_not_block_the_loop() -> None:
    may_end = threading.Event()

    def read() -> Config:
        assert may_end.wait(60)
        return Config().with_values(capture__latency_s=0.5)

    in_force, asked = rules(Clock(), read), Asked()
    asked.set()
    in_force.follow(asked)
    in_force.follow(asked)
    assert in_force.busy
    assert in_force.config == Config()
    may_end.set()
    follow(in_force, asked)
    assert in_force.config.capture.latency_s == 0.5


def test_a_file_whose_disk_hangs_does_not_block_the_loop_and_health_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at a file of NFS or FUSE may hang forever; here, after the start."""
    may_end, threads = threading.Event(), [threading.get_ident()]
    watching = Config().with_values(reload_when_changed=True)

    def look() -> int:
        if len(threads) > 1:
            assert threading.get_ident() != threads[0]
            assert may_end.wait(60)
        threads.append(threading.get_ident())
        return len(threads)

    hooks: Any = Hooks()
    reader = ConfigReader(lambda: watching, look)
    reader.read()
    in_force, asked = InForce(hooks, watching, resolve(watching, None), reader, None), Asked()
    in_force.follow(asked)
    in_force.follow(asked)
    assert not in_force.reasons
    later_ns = time.monotonic_ns() + 31_000_000_000
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic_ns", lambda: later_ns)
        assert in_force.reasons == [LONG]
    may_end.set()
    follow(in_force, asked)
    assert (in_force.reasons, in_force.reloads) == ([], 1)


def test_cgroups_are_followed_while_the_disk_of_a_file_hangs(tmp_path: Path) -> None:
    may_end, asked, put = threading.Event(), Asked(), []
    config = Config(rules=(RuleConfig(cgroup=("new",)),))
    hooks: Any = Hooks()
    hooks.put = lambda tables: put.append(tables) or 2
    read = lambda: may_end.wait(60) and config  # noqa: E731
    in_force = InForce(hooks, config, resolve(config, tmp_path), ConfigReader(read), tmp_path)
    asked.set()
    in_force.follow(asked)
    (tmp_path / "new").mkdir()
    in_force._lookup_at = 0
    wait_until("the rules follow", lambda: in_force.follow_names() or put)
    assert (in_force.busy, in_force.version, len(put)) == (True, 2, 1)
    may_end.set()
    follow(in_force, asked)


def test_many_writes_into_the_kernel_do_not_block_the_loop() -> None:
    hooks, asked = Hooks(), Asked()
    are_over = False
    hooks.steps = itertools.takewhile(lambda _: not are_over, itertools.repeat(None))
    in_force = rules(Clock(), lambda: Config().with_values(capture__latency_s=0.5), hooks)
    asked.set()
    in_force.follow(asked)
    wait_until("the writes have begun", lambda: in_force.follow(asked) or in_force._filling)
    in_force.follow(asked)
    assert (in_force.config, in_force.version) == (Config(), 1)
    are_over = True
    follow(in_force, asked)
    assert (in_force.config.capture.latency_s, in_force.version) == (0.5, 2)


def test_a_reload_without_free_descriptors_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    clock, asked, tries = Clock(), Asked(), itertools.count(1)

    def read() -> Config:
        if next(tries) < 4:
            raise ConfigError("rebpf.toml: Too many open files") from OSError(errno.EMFILE, "Too many open files")
        return Config().with_values(capture__latency_s=0.5)

    in_force = rules(clock, read)
    asked.set()
    for _ in range(4):
        in_force.follow(asked)
        wait_until("a try is done", lambda: in_force.follow(asked) or not in_force.busy)
        clock.now_s += 10
    assert in_force.config.capture.latency_s == 0.5
    assert (in_force.reloads, in_force.refusal, asked.value) == (2, "", False)
    assert [record.levelname for record in caplog.records if "refused" in record.message] == ["ERROR"]


def test_a_reload_waits_until_a_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    in_force, asked = rules(Clock(), Config), Asked()
    asked.set()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError):
            in_force.follow(asked)
    assert (asked.value, in_force.busy, in_force.reloads) == (True, False, 0)
    follow(in_force, asked)
    assert (asked.value, in_force.reloads) == (False, 1)
