"""The actions of a chaos run. An action is a generator that yields the seconds to wait before its next part.

Actions run concurrently, unless they need the same resource.
"""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.chaos.proxy import MODES
from tests.chaos.scene import Scene, python
from tests.support.rebpf import command

Waits = Iterator[float]
DONE_S = 60.0


@dataclass(frozen=True, slots=True)
class Action:
    """`needs` are the resources that it uses exclusively; `weight` is how often it is chosen."""

    run: Callable[[Scene, random.Random], Waits]
    weight: int
    needs: frozenset[str] = frozenset()


def child(scene: Scene, argv: list[str], what: str) -> Waits:
    """Run a child to its end; note a failure."""
    log = scene.folder / f"{what}.err"
    with log.open("wb") as err:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err)
    end_s = time.monotonic() + 2 * DONE_S
    while process.poll() is None and time.monotonic() < end_s:
        yield 0.2
    if process.poll() is None:
        process.kill()
        process.wait()
        scene.findings.notes[f"{what} took too long"] += 1
    elif process.returncode:
        scene.findings.notes[f"{what} failed: {log.read_text(errors='replace')[-200:]}"] += 1


def guests(kind: str) -> Callable[[Scene, random.Random], Waits]:
    def run(scene: Scene, chance: random.Random) -> Waits:
        seed = chance.randrange(1 << 30)
        if kind == "cgroups":
            target, port = scene.lab.server.ipv4, "5002"
        else:
            target, port = scene.lab.client.ipv4, str(chance.randrange(6000, 7000))
        argv = python("tests.chaos.guests", kind, seed, scene.cgroup, target, port)
        yield from child(scene, scene.lab.client.command(*argv), f"{kind}-{seed}")

    return run


def visitors(scene: Scene, chance: random.Random) -> Waits:
    seconds, seed = chance.uniform(5, 20), chance.randrange(1 << 30)
    argv = python("tests.chaos.visitors", "127.0.0.1", scene.listen, seconds, seed)
    yield from child(scene, argv, f"visitors-{seed}")


def status(scene: Scene, chance: random.Random) -> Waits:
    """Run `rebpf status`, as an operator would."""
    log = scene.folder / "status.err"
    argv = ["setpriv", "--pdeathsig", "KILL", *command("status", "--state-dir", scene.disk / "state")]
    with log.open("wb") as err:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err)
    end_s = time.monotonic() + DONE_S
    while process.poll() is None and time.monotonic() < end_s:
        yield 0.2
    code, text = process.poll(), log.read_text(errors="replace")
    if code not in (0, 69) or "Traceback" in text:
        process.kill()
        process.wait()
        scene.findings.add(f"rebpf status: {code}", text)


def right_rules(scene: Scene, chance: random.Random) -> str:
    below = f"/{scene.cgroup.name}"
    rules = [
        f'[[rules]]\naction = "drop"\ncgroup = ["{below}"]',
        f'[[rules]]\nsample = 2\ncgroup = ["{below}/empty-1", "{below}"]',
        '[[rules]]\naction = "drop"\nuid = [4711, "nobody"]',
        f'[[rules]]\naddress = ["{scene.lab.server.ipv6}"]\nretransmit = "drop"',
        '[[rules]]\naction = "drop"\nport = ["5003-5004"]',
        '[[rules]]\naction = "drop"\nunit = ["nginx.service"]',
        f'[[rules]]\nnetns = [{scene.lab.client.netns}]\nlocal_port = ["1024-65535"]',
        f'[[rules]]\naction = "drop"\naddress = ["@{scene.folder / "addresses"}"]',
    ]
    addresses = (f"198.{chance.randrange(18, 20)}.{each >> 8}.{each & 255}" for each in range(2000))
    (scene.folder / "addresses").write_text("".join(f"{each}\n" for each in addresses))
    return "\n".join(chance.sample(rules, chance.randrange(len(rules) + 1)))


def wrong(scene: Scene, chance: random.Random) -> bytes:
    rule = "[[rules]]\n"
    return chance.choice(
        [
            b"host = [",
            b"\xff\xfe\x00",
            b"",
            b"[[rules]]\n" * 5000,
            scene.config(f"{rule}uid = [-1]"),
            scene.config(f"{rule}uid = [4294967296]"),
            scene.config(f'{rule}address = ["no address"]'),
            scene.config(f'{rule}address = ["@/no/such/file"]'),
            scene.config(f"{rule}port = [70000]"),
            scene.config(f"{rule}sample = 0"),
            scene.config(f'{rule}cgroup = ["\\u0000"]'),
            scene.config(f'{rule}action = "keep\\u001b[31m"'),
            scene.config(f'{rule}no_such_key = "x"'),
            scene.config(f'{rule}interface = ["{"x" * 300}"]'),
            scene.config().replace(b"127.0.0.1:", b"127.0.0.1:9"),
            scene.config().replace(b"spill_after_s = 1.0", b"spill_after_s = nan"),
            b"x = " + b"[" * 100_000,
        ]
    )


def reload_right(scene: Scene, chance: random.Random) -> Waits:
    before = scene.producer.reloaded
    scene.producer.accept(scene.config(right_rules(scene, chance)))
    life = scene.producer.life
    if not scene.producer.ready:
        return
    scene.producer.send(signal.SIGHUP)
    end_s = time.monotonic() + DONE_S
    while scene.producer.reloaded == before and scene.producer.life is life and not life.end_expected:
        if time.monotonic() > end_s:
            scene.findings.add("a valid reload is not applied")
            return
        yield 0.1
    yield chance.uniform(0, 10)


def reload_wrong(scene: Scene, chance: random.Random) -> Waits:
    """Reload an invalid file. The producer is not ended meanwhile: a start would reject the file too."""
    producer = scene.producer
    text = wrong(scene, chance)
    producer.write(text)
    if text == b"":  # an empty file is valid, so use a folder
        producer.config.unlink()
        producer.config.mkdir()
    before, life = producer.refused, producer.life
    producer.send(signal.SIGHUP)
    end_s = time.monotonic() + DONE_S
    while producer.refused == before and producer.life is life:
        if time.monotonic() > end_s:
            scene.findings.add("an invalid reload is not refused", repr(text[:300]))
            break
        yield 0.1
    producer.restore()
    reloaded = producer.reloaded
    producer.send(signal.SIGHUP)
    while producer.reloaded == reloaded and producer.life is life and time.monotonic() < end_s + DONE_S:
        yield 0.1


def storm(scene: Scene, chance: random.Random) -> Waits:
    """Send many signals, a few ms apart."""
    numbers = [signal.SIGHUP] * 5 + [signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE, signal.SIGIO]
    for _ in range(chance.randrange(20, 150)):
        for _ in range(10):
            scene.producer.send(chance.choice(numbers))
        yield 0.01


def freeze(scene: Scene, chance: random.Random) -> Waits:
    producer = scene.producer
    began_s = time.monotonic()
    producer.send(signal.SIGSTOP)
    producer.frozen.append((began_s, began_s + DONE_S))
    yield 1.0
    producer.send(signal.SIGCONT)
    producer.frozen[-1] = (began_s, time.monotonic())


def until_ready(scene: Scene) -> Waits:
    while not scene.producer.ready:  # a start that takes too long is a finding
        yield 0.1


def kill(scene: Scene, chance: random.Random) -> Waits:
    scene.producer.kill()
    scene.producer.start()
    if chance.random() < 0.2:  # again before it is ready
        yield chance.uniform(0, 2)
        scene.producer.kill()
        scene.producer.start()
    yield from until_ready(scene)


def stop(scene: Scene, chance: random.Random) -> Waits:
    scene.producer.terminate()
    end_s = time.monotonic() + DONE_S
    while not scene.producer.ended:
        if time.monotonic() > end_s:
            scene.findings.add("a stop takes more than a minute", "\n".join(scene.producer.last_lines))
            scene.producer.kill()
            break
        yield 0.05
    else:
        scene.note_end(scene.producer.balance())
    scene.producer.start()
    yield from until_ready(scene)


def descriptors(scene: Scene, chance: random.Random) -> Waits:
    scene.producer.limit_descriptors(chance.randrange(0, 4))
    yield chance.uniform(3, 15)
    scene.producer.limit_descriptors(None)


def broker_killed(scene: Scene, chance: random.Random) -> Waits:
    scene.kafka.kill()
    yield chance.uniform(0, 20)
    scene.kafka.launch()
    host, port = scene.kafka.bootstrap.split(":")
    end_s = time.monotonic() + 2 * DONE_S
    while time.monotonic() < end_s:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                break
        yield 0.5
    else:
        raise RuntimeError("the broker does not come up")
    yield 5.0


def broker_frozen(scene: Scene, chance: random.Random) -> Waits:
    scene.kafka.pause()
    yield chance.uniform(1, 25)
    scene.kafka.resume()
    yield 5.0


def registry(scene: Scene, chance: random.Random) -> Waits:
    if chance.random() < 0.5:
        scene.registry.kill()
        yield chance.uniform(1, 30)
        scene.registry.launch()
        yield 15.0
    else:
        scene.registry.pause()
        yield chance.uniform(1, 30)
        scene.registry.resume()


def proxy(scene: Scene, chance: random.Random) -> Waits:
    scene.proxy.mode = chance.choice(MODES[1:])
    yield chance.uniform(10, 60)
    scene.proxy.mode = "pass"


def disk_full(scene: Scene, chance: random.Random) -> Waits:
    filler = scene.disk / "filler"
    with filler.open("wb", buffering=0) as file:
        room = os.statvfs(scene.disk)
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_bsize))
        except OSError:  # the producer used some meanwhile
            scene.findings.notes["disk not quite full"] += 1
    yield chance.uniform(3, 30)
    filler.unlink()


def clock(scene: Scene, chance: random.Random) -> Waits:
    """Step the clock that the producer sees, not the machine's."""
    step_s = chance.choice([-86400, -3600, -5, -0.5, 0.5, 5, 3000])
    scene.step_clock(step_s)
    yield chance.uniform(2, 30)
    scene.step_clock(0)


ACTIONS = {
    "cgroups": Action(guests("cgroups"), 10, frozenset({"cgroups"})),
    "namespaces": Action(guests("namespace"), 6, frozenset({"namespaces"})),
    "reload right": Action(reload_right, 10, frozenset({"config"})),
    "reload wrong": Action(reload_wrong, 10, frozenset({"config", "producer"})),
    "signals": Action(storm, 6, frozenset({"producer"})),
    "SIGSTOP": Action(freeze, 4, frozenset({"producer"})),
    "SIGKILL": Action(kill, 8, frozenset({"producer", "life"})),
    "SIGTERM": Action(stop, 4, frozenset({"producer", "life"})),
    "descriptors short": Action(descriptors, 4, frozenset({"producer"})),
    "broker killed": Action(broker_killed, 3, frozenset({"broker"})),
    "broker frozen": Action(broker_frozen, 3, frozenset({"broker"})),
    "registry": Action(registry, 3, frozenset({"registry"})),
    "registry answers nonsense": Action(proxy, 5, frozenset({"proxy"})),
    "disk full": Action(disk_full, 4, frozenset({"disk"})),
    "clock": Action(clock, 4, frozenset({"clock"})),
    "visitors": Action(visitors, 5, frozenset({"visitors"})),
    "status": Action(status, 5, frozenset({"status"})),
}
