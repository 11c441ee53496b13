"""`rebpf compile`: makes a file with the programs for a kernel, for hosts without a compiler."""

from pathlib import Path

from producer import __version__
from producer.errors import OutputError, UsageError
from producer.events import layout_check
from producer.host import state_file
from producer.host.output_file import write_whole
from producer.host.progress import Progress
from producer.kernel.loader import Loader
from producer.paths import BPF

_TIMEOUT_S = 1800.0  # for 33 compilations, each of which takes half a minute in a virtual machine without KVM
_MODE = 0o644
"""Readable for the service's user. The file holds nothing secret."""


def compile_programs(btf: Path | None, output: Path) -> str:
    """Compile for the kernel of a BTF file, by default this host's; write the file `output`, and say what is in it."""
    if btf is not None:
        try:
            state_file.check_ordinary(btf)
            btf.open("rb").close()
        except OSError as error:
            raise UsageError(f"--btf: {btf}: {error.strerror}") from error
    if output.is_dir() or not output.parent.is_dir():  # now, not minutes later
        raise OutputError(f"cannot write {output}: expected a file in a folder that exists")
    loader = Loader()
    try:
        with Progress("compiling the BPF programs"):
            answer, descriptors = loader.ask(
                {
                    "do": "compile",
                    "version": __version__,
                    "btf": str(btf.absolute()) if btf else "",
                    "bpf": str(BPF),
                    "layout_check": layout_check(),
                },
                _TIMEOUT_S,
            )
    finally:
        loader.end()
    with open(descriptors[0], "rb") as file:
        file.seek(0)
        content = file.read()
    try:
        write_whole(output, content, _MODE)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}") from error
    return f"{output}: {answer['combinations']} combinations of hooks, {len(content) >> 10} KiB"
