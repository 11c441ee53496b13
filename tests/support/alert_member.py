"""`rebpf alert` as a child process."""

import re
import signal
import subprocess
from http import HTTPStatus
from pathlib import Path
from typing import Self
from urllib.error import HTTPError
from urllib.request import urlopen

from tests.support.rebpf import command, wait_until


class Member:
    """`rebpf alert` as a child process."""

    def __init__(self, folder: Path, config: Path, *arguments: object) -> None:
        folder.mkdir()
        self._err = folder / "err"
        run = ["setpriv", "--pdeathsig", "KILL", *command("alert", "--config", config, *arguments)]
        with self._err.open("wb") as err, (folder / "out").open("wb") as out:
            self.process = subprocess.Popen(run, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    @property
    def log(self) -> str:
        return self._err.read_text()

    def wait_for(self, text: str) -> None:
        def look() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"rebpf alert ended with {self.process.returncode}:\n{self.log}")
            return text in self.log

        wait_until(f"{text} in the log", look)

    def get(self, page: str) -> str:
        """Return a page, once the member has answers."""
        (url,) = re.findall(r"endpoint url=(\S+)", self.log)

        def look() -> str | None:
            try:
                with urlopen(f"{url}{page}", timeout=10) as answer:
                    text: str = answer.read().decode()
                    return text
            except HTTPError as error:
                if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
                    return None
                raise

        text: str = wait_until(f"{page} is available", look)
        return text

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
