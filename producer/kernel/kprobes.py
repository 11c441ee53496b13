"""Switches of the host that turn off all kprobes, while they stay attached. Standard library only."""

from collections.abc import Collection
from pathlib import Path

from producer.errors import UnavailableError

SWITCHES = (Path("/proc/sys/kernel/ftrace_enabled"), Path("/sys/kernel/debug/kprobes/enabled"))
"""The second one is readable for root only, if debugfs is mounted. Other hooks do not depend on them."""


def check(hooks: Collection[str], switches: Collection[Path] = SWITCHES) -> None:
    """Raise UnavailableError if one of the hooks is kprobe and kprobes are off."""
    for path in switches if "kprobe" in hooks else ():
        try:
            is_off = path.read_bytes().strip() == b"0"
        except OSError:  # missing, or not readable for this user
            continue
        if is_off:
            raise UnavailableError(f"{path} is 0, so no kprobe runs and events are missing: write 1 to it")
