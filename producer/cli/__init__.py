"""The `rebpf` command line: options, help, exit codes.

Each command reads its options here and calls one function of `commands`, `demo`, `alert` or `agent`.
Nothing imports this package.
"""

import os
import resource
import sys

_LEAST_FREE_BYTES = 1 << 26


def _may_cut_files() -> bool:
    """Whether a full disk or a limit on the size of files could cut off what is written beside this file."""
    disk = os.statvfs(__file__)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return disk.f_bavail * disk.f_frsize < _LEAST_FREE_BYTES or limit != resource.RLIM_INFINITY


# Python before 3.13.1 caches byte code that was cut off, and no later start could read it (gh-126606).
if _may_cut_files():
    sys.dont_write_bytecode = True
