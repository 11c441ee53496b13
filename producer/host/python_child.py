"""The command that runs another of our modules as a process of its own.

`python -m` would look for it in the working directory and in the interpreter's own places: installed by a
distribution's package, it is in neither.
"""

import sys

_RUN = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module on this process's Python and path, and takes no other modules."""
    return sys.executable, "-I", "-c", _RUN.format(path=sys.path, module=module), *arguments
