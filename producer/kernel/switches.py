"""Switches of the host that turn off the probes of kernel functions, while they stay attached. Standard library only.

Before Linux 6.0, the kernel refuses to turn off ftrace while a fentry program is attached, but not to attach one later.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from producer.errors import UnavailableError

_FTRACE = Path("/proc/sys/kernel/ftrace_enabled")
_KPROBES = Path("/sys/kernel/debug/kprobes/enabled")
SWITCHES: Mapping[str, Collection[Path]] = {"fentry": (_FTRACE,), "kprobe": (_FTRACE, _KPROBES)}
"""By hook. The second one is readable for root only, if debugfs is mounted. Other hooks do not depend on any."""


def turned_off(hook: str) -> str | None:
    """Return why the probes of a hook do not run, with the fix; None if no switch is off."""
    for path in SWITCHES.get(hook, ()):
        try:
            is_off = path.read_bytes().strip() == b"0"
        except OSError:  # missing, or not readable for this user
            continue
        if is_off:
            return f"{path} is 0, so no {hook} program runs: write 1 to it"
    return None


def check(hooks: Collection[str]) -> None:
    """Raise UnavailableError if the probes of one of the hooks are turned off."""
    for reason in filter(None, map(turned_off, hooks)):
        raise UnavailableError(f"{reason}; until then, events are missing")
