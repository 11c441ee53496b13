"""What this host offers a producer, and what is missing: the answers of `rebpf check`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from producer import privileges
from producer.btf import VMLINUX, Btf
from producer.config import Config
from producer.errors import HookError, PermissionDenied, RebpfError, UnavailableError
from producer.events import STREAMS
from producer.loading import python_with_bcc
from producer.provision import Admin, heartbeat_topic, in_partitions, topic
from producer.rungs import LADDERS, cgroup2_root, refusal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing examined; `exit_code` is 0 unless a producer could not run because of it.

    `there` is False for what this host does not offer, whether or not a producer needs it.
    """

    subject: str
    text: str
    exit_code: int = 0
    there: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as it is printed in JSON."""
        return {"subject": self.subject, "ok": self.exit_code == 0, "text": self.text, "exit_code": self.exit_code}

    def __str__(self) -> str:
        label = "MISSING" if self.exit_code else "ok" if self.there else "no"
        return f"{label:7} {self.subject}: {self.text}"


def examine(config: Config) -> list[Finding]:
    """Examine this host for `config`; leaves nothing attached and nothing written."""
    return [*_kernel(config), *_python(), *_kafka(config)]


def _kernel(config: Config) -> Iterator[Finding]:
    missing = privileges.missing()
    if missing:
        text = f"missing: {', '.join(missing)}; run as root, or grant them (systemd: AmbientCapabilities=)"
        yield Finding("capabilities", text, PermissionDenied.exit_code)
    else:
        yield Finding("capabilities", "enough to load and attach BPF programs")
    root = cgroup2_root()
    text = f"mounted at {root}" if root else "not mounted; the hook cgroup_skb needs it"
    yield Finding("cgroup v2", text, there=root is not None)
    path = config.capture.btf or VMLINUX
    try:
        btf = Btf.load(path)
    except RebpfError as error:
        yield Finding("BTF", str(error), error.exit_code)
        return
    yield Finding("BTF", str(path))
    if missing:
        return
    for stream, ladder in LADDERS.items():
        reasons = {rung.name: refusal(rung, btf, root) for rung in ladder if rung.name in config.capture.hooks}
        for hook, reason in reasons.items():
            yield Finding(f"{stream} by {hook}", reason or "possible", there=reason is None)
        if all(reasons.values()):
            yield Finding(stream, "no hook is possible on this host", HookError.exit_code)


def _python() -> Iterator[Finding]:
    yield Finding("Python", sys.version.split()[0])
    try:
        yield Finding("bcc", f"found by {python_with_bcc()}")
    except UnavailableError as error:
        yield Finding("bcc", str(error), error.exit_code)


def _kafka(config: Config) -> Iterator[Finding]:
    if config.kafka.brokers is None:
        yield Finding("Kafka", "no brokers are configured: the embedded broker will run, for trying only")
        return
    try:
        topics = Admin(config).partitions()
    except RebpfError as error:
        yield Finding("Kafka", str(error), error.exit_code)
        return
    yield Finding("Kafka", config.kafka.brokers)
    heartbeats = heartbeat_topic(config)
    for name in (*(topic(config, stream) for stream in STREAMS), heartbeats):
        if name in topics:
            yield Finding(f"topic {name}", in_partitions(topics[name]))
        elif name == heartbeats:
            yield Finding(f"topic {name}", "missing, so no heartbeats are sent: run `rebpf init`", there=False)
        else:
            yield Finding(f"topic {name}", "missing: run `rebpf init`", UnavailableError.exit_code)
