"""A real Prometheus and promtool, from the Debian package."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from tests.support.servers import debian
from tests.support.servers.process import ServerProcess, free_port

PROGRAMS = ("prometheus", "promtool")


def programs() -> Path:
    """Return the folder of `prometheus` and `promtool`; LookupError if apt does not have it."""
    found = {Path(path).parent for path in map(shutil.which, PROGRAMS) if path}
    return found.pop() if len(found) == 1 else debian.package("prometheus") / "usr/bin"


class Prometheus(ServerProcess):
    """A Prometheus with a config file, and its data in its folder."""

    def __init__(self, folder: Path, config: Path) -> None:
        super().__init__(folder, "prometheus")
        self._config = config
        self._address = f"127.0.0.1:{free_port()}"

    def command(self) -> Sequence[str]:
        return (
            os.fspath(programs() / "prometheus"),
            f"--config.file={self._config}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address={self._address}",
        )

    def is_ready(self) -> bool:
        try:
            with urlopen(f"http://{self._address}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data from a request to /api/v1."""
        with urlopen(f"http://{self._address}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, str]]:
        """Return the labels of each series of an expression."""
        return [series["metric"] for series in self.get("query", query=expression)["result"]]
