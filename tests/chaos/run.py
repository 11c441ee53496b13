"""One chaos run: starts actions at random, waits for them to end, and compares what arrived with the balances."""

import itertools
import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.chaos.actions import ACTIONS, Action
from tests.chaos.findings import Findings
from tests.chaos.producer import GaveUp, Life
from tests.chaos.scene import TOPICS, Scene

TICK_S = 0.02
MOST_AT_A_TIME = 5
PAUSE_S = (0.2, 6.0)
FINISH_S = 180.0
DRAIN_S = 300.0
ORACLE_S = 900.0
FLAT_AFTER_S, FLAT_MB = 600.0, 10.0
LONG_LIFE_S = (780.0, 1080.0)
SHORT_LIFE_S = (2.0, 60.0)
QUIET_S = 10.0


class Chaos:
    """Starts actions in a scene until the time is over. The seed determines the actions, not their timing."""

    def __init__(self, scene: Scene, seed: int, end_s: float) -> None:
        self._scene = scene
        self._chance = random.Random(seed)
        self._end_s = end_s
        self._running: dict[str, tuple[Iterator[float], float]] = {}
        self._next_s = 0.0
        self._life: Life | None = None
        self._life_until_s = 0.0

    def run(self) -> None:
        while time.monotonic() < self._end_s:
            self._scene.watch()
            self._plan_life()
            self._step()
            if time.monotonic() >= self._next_s and len(self._running) < MOST_AT_A_TIME:
                self._begin()
            time.sleep(TICK_S)

    def finish(self) -> None:
        """Wait until all running actions end."""
        end_s = time.monotonic() + FINISH_S
        while self._running and time.monotonic() < end_s:
            self._scene.watch()
            self._step()
            time.sleep(TICK_S)
        for name in self._running:
            self._scene.findings.add(f"{name} does not end")

    def _step(self) -> None:
        now = time.monotonic()
        for name, (action, due_s) in tuple(self._running.items()):
            if now >= due_s:
                try:
                    self._running[name] = (action, now + next(action))
                except StopIteration:
                    del self._running[name]
                    self._scene.findings.say(f"{name} is over")

    def _begin(self) -> None:
        self._next_s = time.monotonic() + self._chance.uniform(*PAUSE_S)
        free = {name: each for name, each in ACTIONS.items() if self._may(name, each)}
        if not free:
            return
        (name,) = self._chance.choices(list(free), [each.weight for each in free.values()])
        self._scene.findings.actions[name] += 1
        self._scene.findings.say(name)
        action = free[name].run(self._scene, random.Random(self._chance.randrange(1 << 62)))
        self._running[name] = (action, 0.0)

    def _may(self, name: str, action: Action) -> bool:
        taken = {need for each in self._running for need in ACTIONS[each].needs}
        if name in self._running or action.needs & taken:
            return False
        if name == "clock" and not self._scene.has_clock:
            return False
        # Before it is ready, a signal would end it like any process.
        if "producer" in action.needs and not self._scene.producer.ready:
            return False
        return "life" not in action.needs or time.monotonic() >= self._life_until_s

    def _plan_life(self) -> None:
        """Choose how long a start runs undisturbed: some long enough to see whether its memory grows."""
        life = self._scene.producer.life
        if life is self._life:
            return
        self._life = life
        now = time.monotonic()
        is_long = len(self._scene.producer.lives) % 6 == 1 and self._end_s - now > LONG_LIFE_S[0]
        self._life_until_s = now + self._chance.uniform(*(LONG_LIFE_S if is_long else SHORT_LIFE_S))


def run(folder: Path, minutes: float, events_per_s: float, seed: int) -> dict[str, Any]:
    """Make a run and return its report."""
    findings = Findings()
    with Scene(folder, events_per_s, findings) as scene:
        wait(scene, "the producer is ready", lambda: scene.producer.ready, DRAIN_S)
        began_s = time.monotonic()
        chaos = Chaos(scene, seed, began_s + 60 * minutes)
        findings.say(f"begins seed={seed}")
        try:
            chaos.run()
            seconds = time.monotonic() - began_s
            chaos.finish()
        except GaveUp as error:
            findings.add(str(error))
            seconds = time.monotonic() - began_s
        arrived = end(scene)
        judge(scene, arrived)
        return report(scene, arrived, seconds, seed)


def wait(scene: Scene, what: str, condition: Any, deadline_s: float) -> bool:
    """Watch the scene until the condition is true; add a finding if it does not become true."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end_s:
            scene.findings.add(f"not within {deadline_s:.0f} s: {what}", str(scene.waiting))
            return False
        scene.watch()
        time.sleep(TICK_S)
    return True


def end(scene: Scene) -> dict[str, Any]:
    """End the traffic, let the producer deliver everything, stop it, and return the oracle's counts."""
    producer = scene.producer
    wait(scene, "the producer is ready", lambda: producer.ready, DRAIN_S)
    producer.accept(scene.config())
    producer.send(signal.SIGHUP)
    scene.end_traffic()
    quiet_s = time.monotonic() + QUIET_S  # open connections may retransmit until then
    wait(scene, "traffic is over", lambda: time.monotonic() > quiet_s, DRAIN_S)
    wait(scene, "all is delivered", lambda: scene.waiting and not any(scene.waiting.values()), DRAIN_S)
    producer.terminate()
    wait(scene, "the producer stops", lambda: producer.ended, DRAIN_S)
    scene.note_end(producer.balance())
    output, _ = scene.oracle.communicate("end\n", timeout=ORACLE_S)
    arrived: dict[str, Any] = json.loads(output)
    return arrived


def judge(scene: Scene, arrived: dict[str, Any]) -> None:
    """Compare what arrived with the producer's balances."""
    findings = scene.findings
    for topic in TOPICS:
        account, seen = scene.accounts[topic], arrived[topic]
        waiting = scene.waiting.get(topic, 0)  # on disk, since there is no next start
        unnamed = account.numbered - seen["distinct"] - account.named - waiting
        detail = f"numbered={account.numbered} {seen} waiting={waiting} lost={dict(account.lost)}"
        if unnamed > 0:
            findings.add(f"{topic}: {unnamed} events are missing that the balance does not name", detail)
        if seen["missing"] > account.named + waiting:
            findings.add(f"{topic}: gaps of {seen['missing']} events, of which {account.named} are named", detail)
        if unnamed < 0:
            findings.notes[f"{topic}: events named as lost, or not numbered, that arrived"] = -unnamed
        if seen["foreign"]:
            findings.add(f"{topic}: {seen['foreign']} messages are no events", str(arrived["foreign_samples"]))
        if account.unaccounted:
            findings.add(f"{topic}: {account.unaccounted} balances do not add up")
        if not seen["distinct"]:
            findings.add(f"{topic}: nothing arrived")
    for number, life in enumerate(scene.producer.lives):
        if (most := peaks(life)) and most[1] > most[0] + FLAT_MB:
            findings.add(f"start {number}: memory grew from {most[0]} to {most[1]} MB")


def report(scene: Scene, arrived: dict[str, Any], seconds: float, seed: int) -> dict[str, Any]:
    """Return the run's report."""
    findings, producer = scene.findings, scene.producer
    events = sum(arrived[topic]["distinct"] for topic in TOPICS)
    starts = [life.ready_s - life.began_s for life in producer.lives if life.ready_s is not None]
    return {
        "seed": seed,
        "seconds": round(seconds),
        "events": events,
        "events_per_s": round(events / seconds),
        "actions": dict(findings.actions),
        "clock_stepped": scene.has_clock,
        "topics": {
            topic: {
                **arrived[topic],
                "numbered": scene.accounts[topic].numbered,
                "lost": {reason: count for reason, count in scene.accounts[topic].lost.items() if count},
            }
            for topic in TOPICS
        },
        "starts": len(producer.lives),
        "longest_start_s": round(max(starts), 1),
        "longest_step_s": round(producer.longest_step_s, 1),
        "memory": [summary(life) for life in producer.lives if len(life.memory) > 1],
        "notes": dict(findings.notes.most_common(40)),
        "findings": findings.found,
    }


def peaks(life: Life) -> tuple[float, float] | None:
    """Return a start's peaks of memory in the first ten minutes and after them, in MB; None if it was shorter.

    Peaks, since each outage takes up to 20 MB while it lasts.
    """
    before = [mb for age_s, mb in life.memory if age_s < FLAT_AFTER_S]
    after = [mb for age_s, mb in life.memory if age_s >= FLAT_AFTER_S]
    return (max(before), max(after)) if after else None


def summary(life: Life) -> dict[str, Any]:
    """Return a start's memory: first, the peaks before and after ten minutes, last, and the peak of each minute."""
    most = peaks(life)
    flat = {"most_before_10_min": most[0], "most_after": most[1]} if most else {}
    minutes = [max(mb for _, mb in each) for _, each in itertools.groupby(life.memory, lambda seen: seen[0] // 60)]
    ends = {"first": life.memory[0][1], **flat, "last": life.memory[-1][1]}
    return {"seconds": life.memory[-1][0], **ends, "each_minute": minutes}
