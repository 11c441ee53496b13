"""The `rebpf` command line: options, help, exit codes.

Each command reads its options here and calls one function of `commands`, `demo`, `alert` or `agent`.
Nothing imports this package.
"""

import os
import resource
import signal
import sys

_LEAST_FREE_BYTES = 1 << 26
_STARTED_AS = ("/rebpf", "/producer/__main__.py")
"""How the process's first argument ends if it is the command, and not a test that imports it."""

# Ctrl-C during the imports ends the process without a traceback of them. `signals.reset` undoes this.
if sys.argv[0].endswith(_STARTED_AS) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _may_cut_files() -> bool:
    """Whether a full disk or a limit on the size of files could cut off what is written beside this file."""
    try:
        disk = os.statvfs(__file__)
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    except OSError:  # a filter of system calls
        return True
    return disk.f_bavail * disk.f_frsize < _LEAST_FREE_BYTES or limit != resource.RLIM_INFINITY


# Python before 3.13.1 caches byte code that was cut off, and no later start could read it (gh-126606).
if _may_cut_files():
    sys.dont_write_bytecode = True
