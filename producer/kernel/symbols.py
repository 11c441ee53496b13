"""The kernel's functions that its compiler has split or copied. Standard library only.

GCC may move a part of a function out (foo.part.0), or copy it for some of its callers (foo.isra.0, foo.constprop.0).
Callers in the same source file may then call that, and bypass a probe on foo. Only the names in /proc/kallsyms show it.
A cold part (foo.cold) is reached from foo alone, and foo.localalias is another name of foo.
"""

import re
from collections.abc import Iterable
from pathlib import Path

KALLSYMS = (Path("/proc/kallsyms"), Path("/run/rebpf-kallsyms"))
"""The second one is a mount of the first, in a systemd unit with ProtectKernelTunables=, which hides the first."""

_SPLIT = re.compile(rb" (\w+)\.(?!cold|localalias)[\w.]+$", re.MULTILINE)


def split_functions(paths: Iterable[Path] = KALLSYMS) -> frozenset[str] | None:
    """Return the names of the split functions, or None if the symbols cannot be read."""
    for path in paths:
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if text:
            return frozenset(name.decode() for name in _SPLIT.findall(text))
    return None
