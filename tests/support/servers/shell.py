"""A server that is a shell script."""

from collections.abc import Sequence
from pathlib import Path

from .process import ServerProcess


class ShellServer(ServerProcess):
    """A shell script that is ready once it has made the file `ready`."""

    def __init__(self, folder: Path, script: str) -> None:
        super().__init__(folder, "shell")
        self.script = script

    def command(self) -> Sequence[str]:
        return ["sh", "-c", self.script]

    def is_ready(self) -> bool:
        return (self.folder / "ready").exists()
