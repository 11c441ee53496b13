"""Builds producer/_native.abi3.so from the C sources here: `python native/build.py`, and as hatchling's build hook.

The module uses Python's stable ABI, so one file serves every Python from 3.11. CC and CFLAGS are honored.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).resolve().parent
MODULE = HERE.parent / "producer/_native.abi3.so"
_FLAGS = (
    *("-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-Wl,-z,relro,-z,now"),
)


def build(*flags: str, module: Path = MODULE) -> Path:
    """Compile the module, with additional flags for the compiler, and return its path. Exits on failure."""
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        sys.exit(f"native: {include}/Python.h is missing: apt-get install python3-dev")
    unfinished = module.with_suffix(f".{os.getpid()}")
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    chosen = [*_FLAGS, *flags, *shlex.split(os.environ.get("CFLAGS", ""))]
    chosen += [] if "-g" in chosen else ["-s"]
    includes = [f"-I{include}", f"-I{HERE.parent / 'bpf'}"]  # for events.h
    try:
        sources = sorted(map(str, HERE.glob("*.c")))
        subprocess.run([*compiler, *chosen, *includes, *sources, "-o", str(unfinished)], check=True)
        unfinished.chmod(0o755)  # whatever the umask: other users load it too
        unfinished.replace(module)
    except FileNotFoundError:
        sys.exit(f"native: no C compiler {compiler[0]}: apt-get install gcc libc6-dev, or set CC")
    except subprocess.CalledProcessError:
        sys.exit("native: the C compiler failed, see above")
    finally:
        unfinished.unlink(missing_ok=True)
    return module


class BuildHook(BuildHookInterface[Any]):
    """Adds the module to wheels and editable installations."""

    PLUGIN_NAME = "native"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the wheel is packed."""
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"cp311-abi3-{platform}"
        build_data["pure_python"] = False
        name = str(MODULE.relative_to(HERE.parent))
        if platform.endswith(f"_{os.uname().machine}"):
            build()
            build_data["artifacts"].append(name)
        else:  # the checkout keeps its own
            build_data["force_include"][str(build(module=Path(self.directory, MODULE.name)))] = name


def get_build_hook() -> type[BuildHookInterface[Any]]:
    """Return the hook to hatchling."""
    return BuildHook


if __name__ == "__main__":
    build(*sys.argv[1:])
