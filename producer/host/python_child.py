"""The command line that runs another of our modules in a child process.

`python -m` would search the working directory and the interpreter's folders; the Debian package is in neither.
"""

import sys

_RUN = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module with this process's Python and exactly its path."""
    return sys.executable, "-B", "-I", "-c", _RUN.format(path=sys.path, module=module), *arguments
